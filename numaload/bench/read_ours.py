"""Ways of reading that are numaload's own, by its API."""

from __future__ import annotations

from dataclasses import dataclass

from numaload.bench.read_turn import Done, Run, Turn, Unavailable
from numaload.errors import NumaloadError
from numaload.pagecache.prewarm import prewarm
from numaload.pipeline.stream import stream
from numaload.storage import known
from numaload.storage.copy import copy_files
from numaload.weights import open_weights


@dataclass
class OneFile:
    """As opened weights, to whoever asks only for their files: not the other splits."""

    paths: list[str]


def prewarmed(turn: Turn, _: int) -> Run:
    subject = turn.subject
    if not subject.whole:
        raise Unavailable("prewarm reads whole files only")
    what = OneFile([subject.path])
    if len(subject.files) > 1:
        turn.callback(known.forget, (subject.path,))

    def run() -> Done:
        report = prewarm(what)
        return Done(report.size, plan=report.plan and report.plan.to_dict())

    return run


def copied(turn: Turn, _: int) -> Run:
    def run() -> Done:
        copies = copy_files([turn.subject.file])
        for one in copies:
            turn.callback(one.close)
        return Done(sum(one.length for one in copies))

    return run


def streamed(turn: Turn, _: int) -> Run:
    subject = turn.subject
    if not subject.whole or len(subject.files) > 1:
        raise Unavailable("stream reads whole models only, and this is a part of one")
    try:
        weights = turn.enter_context(open_weights(subject.path))
    except NumaloadError as error:
        raise Unavailable(f"stream reads models only: {error}") from error

    def run() -> Done:
        total = sum(array.nbytes for _, array in stream(weights, None))
        return Done(turn.nbytes if total == sum(t.nbytes for t in weights.values()) else total)

    return run
