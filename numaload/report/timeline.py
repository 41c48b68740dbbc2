"""Turn trace events into lanes of a drawing: which stage worked when, in which thread.

A trace file is not trusted. Its events are read one at a time, each of bounded length, and what is
no complete event is counted and left out. However many there are, a lane has at most CELLS runs.
Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
from typing import Any, NamedTuple

from numaload.errors import FormatError, printable
from numaload.files.source import SourceFile
from numaload.formats.jsontext import DECODER, JsonText
from numaload.trace.perfetto import END, HEAD

MOST_BYTES = 64 << 20  # of a trace file: some 400,000 events
LONGEST_EVENT = 16 << 10  # characters
LONGEST_NAME = 80  # characters of a stage or a thread
LATEST = 1e17  # microseconds: since 1970, as some write, it is 1.8e15
MOST_NODE = 1 << 16  # kernels are built for at most 1024
CELLS = 400  # into which the time is divided
LANES = 40  # that are drawn; of the others only the sum is told
NO_NODE, IDLE = -1, -2  # in cells

Key = tuple[str, str, str]  # stage, process, thread


class Lane(NamedTuple):
    """One stage in one thread. runs: (first cell, end, node or -1) of when it worked."""

    stage: str
    thread: str
    times: int
    busy_s: float
    nbytes: int
    runs: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Timeline:
    """``source``: the file of the trace, None where it is what this process did just now.

    others, others_s: events, and their seconds, of stages and threads that are not drawn.
    odd: events of the file that were left out, since they are not as expected. cut: so was its last
    one, of which a process had not written all.
    """

    source: str | None
    seconds: float
    lanes: list[Lane]
    others: int = 0
    others_s: float = 0.0
    odd: int = 0
    cut: bool = False


class _Event(NamedTuple):
    begin: float  # microseconds
    end: float
    nbytes: int
    node: int


def read_trace(path: str) -> Timeline:
    """Read a trace that NUMALOAD_TRACE wrote, or any in the Chrome trace event format.

    Raises: ReadError, FormatError for what is none, has no event or is larger than 64 MiB.
    """
    nothing = object()
    with SourceFile(path) as file:
        if file.size > MOST_BYTES:
            raise FormatError(f"{file.size} bytes, expected at most {MOST_BYTES}", path=path)
        raw = file.read_at(0, file.size)
    cut = raw.startswith(HEAD) and not raw.endswith(END)
    if cut:  # as who adds to it does
        raw = (raw[: raw.rfind(b"},\n") + 1] or b"[") + END
    events = _events(raw, path)
    first = next(events, nothing)
    if first is nothing:
        raise FormatError("expected trace events, found none", path=path)
    return replace(timeline_of(chain([first], events), path), cut=cut)


def _events(raw: bytes, path: str) -> Iterator[Any]:
    """Yield the elements of the array, or of the member ``traceEvents``."""
    text = JsonText(raw, path, FormatError)
    if text.text.lstrip(" \t\n\r").startswith("{"):
        for name in text.members("the trace"):
            if name == "traceEvents":
                yield from _elements(text)
            else:
                text.skip(name)
    else:
        yield from _elements(text)
    text.end("the trace")


def _elements(text: JsonText) -> Iterator[Any]:
    text.mark("[", "[ of trace events")
    if text.text.startswith("]", text.pos):
        text.mark("]", "")
        return
    mark = ","
    while mark == ",":
        part = text.text[text.pos : text.pos + LONGEST_EVENT]
        try:
            event, end = DECODER.raw_decode(part)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)  # without its place, which is in the part
            text.fail(f"expected a trace event of at most {LONGEST_EVENT} characters: {why}")
        text.pos += end
        yield event
        mark = text.mark(",]", ", or ] after a trace event")


def timeline_of(events: Iterable[Any], source: str | None) -> Timeline:
    """Divide the time from the first event to the last among lanes, the busiest of all."""
    found: dict[Key, list[_Event]] = {}
    threads: dict[tuple[str, str], str] = {}
    processes: dict[str, str] = {}
    odd = 0
    for event in events:
        try:
            if event["ph"] == "X":
                checked = _checked(event)  # before there is a lane for it
                found.setdefault(_key(event), []).append(checked)
            elif event["ph"] == "M" and event["name"] == "thread_name":
                threads[_text(event["pid"]), _text(event["tid"])] = _text(event["args"]["name"])
            elif event["ph"] == "M" and event["name"] == "process_name":
                processes[_text(event["pid"])] = _text(event["args"]["name"])
        except (KeyError, TypeError, ValueError):  # noqa: PERF203 - of a file that is not trusted
            odd += 1
    every = [event for its in found.values() for event in its]
    begin = min((event.begin for event in every), default=0.0)
    span = max((event.end for event in every), default=0.0) - begin
    by_work = sorted(found, key=lambda key: -_busy(found[key]))
    drawn = sorted(by_work[:LANES], key=lambda key: min(event.begin for event in found[key]))
    rest = [found[key] for key in by_work[LANES:]]
    several = len({pid for _, pid, _ in found}) > 1

    def named(_: str, pid: str, tid: str) -> str:
        thread = threads.get((pid, tid), f"thread {tid}")
        return f"{thread}, {processes.get(pid, 'process')} {pid}" if several else thread

    lanes = [
        Lane(
            key[0],
            named(*key),
            len(found[key]),
            _busy(found[key]) / 1e6,
            sum(event.nbytes for event in found[key]),
            list(_runs(found[key], begin, span)),
        )
        for key in drawn
    ]
    others_s = sum(map(_busy, rest)) / 1e6
    return Timeline(source, span / 1e6, lanes, sum(map(len, rest)), others_s, odd)


def _key(event: dict[str, Any]) -> Key:
    return _text(event["name"]), _text(event["pid"]), _text(event["tid"])


def _text(value: Any) -> str:
    if not isinstance(value, (str, int)):
        raise TypeError
    return printable(value, LONGEST_NAME)


def _checked(event: dict[str, Any]) -> _Event:
    """Return what is drawn of an event. Raises: KeyError, TypeError, ValueError."""
    begin, lasted = event["ts"], event["dur"]
    if not (type(begin) in (int, float) and type(lasted) in (int, float)):
        raise TypeError
    if not (0 <= begin < LATEST and 0 <= lasted < LATEST):
        raise ValueError
    more = event.get("args", {})
    if not isinstance(more, dict):
        raise TypeError
    nbytes, node = more.get("bytes", 0), more.get("node", NO_NODE)
    if not (type(nbytes) is int and type(node) is int):
        raise TypeError
    if not (0 <= nbytes < 1 << 63 and NO_NODE <= node < MOST_NODE):
        raise ValueError
    return _Event(begin, begin + lasted, nbytes, node)


def _busy(events: Sequence[_Event]) -> float:
    return sum(event.end - event.begin for event in events)


def _runs(events: Sequence[_Event], begin: float, span: float) -> Iterator[tuple[int, int, int]]:
    """Yield (first cell, end, node) of when there was an event: a short one has a cell, too."""
    cells = [IDLE] * CELLS
    each = max(span, 1e-3) / CELLS  # microseconds
    for event in events:
        first = min(CELLS - 1, int((event.begin - begin) / each))
        stop = max(first + 1, min(CELLS, round((event.end - begin) / each)))
        cells[first:stop] = [event.node] * (stop - first)
    at = 0
    for node, run in groupby(cells):
        start, at = at, at + len(list(run))
        if node != IDLE:
            yield start, at, node
