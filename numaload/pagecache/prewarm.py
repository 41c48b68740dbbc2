"""Bring models into the page cache, the way that is fastest on their storage."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from numaload import trace
from numaload.errors import SplitError, UsageError, check_limits
from numaload.files import known
from numaload.files.residency import (
    AbsentRange,
    ByteRange,
    Residency,
    between,
    cached_on,
    length,
    merged,
    residency,
)
from numaload.files.source import SourceFile, make_room_for, reach
from numaload.files.source import io_timeout as waiting
from numaload.formats.shards import SUFFIX
from numaload.formats.splits import is_there
from numaload.pagecache.choice import Chosen, Source, choose, models_of, real
from numaload.pagecache.report import PrewarmReport

if TYPE_CHECKING:  # what reads is imported once something is absent
    from numaload.files.plan import Forced
    from numaload.files.reader import Announce, Progress
    from numaload.pagecache.reading import Placing

__all__ = ["PrewarmReport", "Source", "prewarm"]

GIVEN_UP = (
    "memory has room: another program, or its file system (as FUSE without keep_cache), gave up"
    " what was read"
)
LITTLE, AGAIN = 16, 3  # a share of the bytes that may be read again, and how often


class PrewarmOptions(NamedTuple):
    """Say where page cache shall land, and how it is read. None: as the plan chooses."""

    placing: Placing | None = None
    forced: Forced | None = None
    max_rate: int | None = None
    force: bool = False


@trace.spanned("prewarm")
def prewarm(
    what: Source | Sequence[Source],
    *,
    nodes: str | int | Sequence[int] | None = None,
    policy: str | None = None,
    move: bool = False,
    tensors: str | None = None,
    layers: str | int | None = None,
    way: str | None = None,
    threads: int | None = None,
    chunk: int | None = None,
    order: str | None = None,
    max_rate: int | None = None,
    force: bool = False,
    background: bool = False,
    lock: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> PrewarmReport:
    """Read what is not yet in RAM of these files, weights, and their split siblings.

    what: a path (of safetensors also an index or a folder), opened weights, or several of them.
    nodes, policy: where the page cache is to land ("bind" to these nodes, or "interleave" over
    them); what was resident before stays where it is and is counted; move: it is moved there.
    tensors, layers: only the tensors in whose names this regular expression is found, and of these
    layers ("0-9"), and the headers.
    way ("mapped" or "buffered"), threads, chunk (bytes a read), order ("file" or "stripes"): as
    the plan chooses unless given. max_rate: bytes a second.
    force: begin also what does not fit into available memory; it stops when its own beginning
    would be pushed out. announce: called with the plan, if there is something to read.
    background: return when another process has begun to read. lock: another process reads, and
    keeps all of it locked in RAM until it is released. See ``report.holder`` for either.
    io_timeout: seconds to wait for an answer of a network file system, then StalledError.
    Raises: ReadError, SplitError, NodeMemoryError, CancelledError, UsageError, NumaError,
    TensorNotFoundError.
    """
    forced = _forced(way, threads, chunk, order)
    placing = _placing(nodes, policy, move=move)
    if max_rate is not None and max_rate < 1:
        raise UsageError(f"max_rate: {max_rate} bytes a second, expected at least 1")
    options = PrewarmOptions(placing, forced, max_rate, force)
    with waiting(io_timeout):
        models = models_of(what)
        if not (background or lock):
            chosen = _chosen(models, tensors, layers, placing)
            return _on_files(models, chosen, options, progress, announce)
        from numaload.pagecache.background import Request, prewarm_held

        how = {
            "nodes": placing.nodes if placing else None, "policy": policy, "move": move,
            "way": way, "threads": threads, "chunk": chunk, "order": order,
            "max_rate": max_rate, "force": force, "io_timeout": io_timeout,
        }  # fmt: skip
        request = Request.of(models, tensors, layers, how, lock=lock)
        return prewarm_held(request, background=background, progress=progress)


def _on_files(
    models: Sequence[Sequence[str]],
    chosen: Chosen,
    options: PrewarmOptions,
    progress: Progress | None,
    announce: Announce | None,
) -> PrewarmReport:
    # A file that was given twice, or through a link too, is one file.
    names = {path: real(path) for paths in models for path in paths}
    whole = {names[path]: path for path in names}
    make_room_for(len(whole))
    files = [SourceFile(path) for path in whole.values()]
    try:
        ranges = [chosen.of(name, file) for name, file in zip(whole, files, strict=True)]
        report = _Prewarming(files, ranges, options, progress, announce).run()
        report.tensors = chosen.tensors
        opened = dict(zip(whole, files, strict=True))
        _remember({path: opened[names[path]] for path in names}, models)
        return report
    finally:
        for file in files:
            file.close()


def _forced(
    way: str | None, threads: int | None, chunk: int | None, order: str | None
) -> Forced | None:
    """Return what the caller insists on, checked. Raises: UsageError."""
    if (way, threads, chunk, order) == (None, None, None, None):
        return None
    from numaload.files.plan import CACHE, Forced

    forced = Forced(way, threads, chunk, order)
    forced.check(CACHE)
    return forced


def _placing(
    nodes: str | int | Sequence[int] | None, policy: str | None, *, move: bool
) -> Placing | None:
    """Return where the page cache shall land; None: wherever it is read. Raises: UsageError."""
    if nodes is None and policy is None:
        if move:
            raise UsageError("move: where to? give nodes, as in nodes='0'")
        return None
    from numaload.linux import placement  # noqa: F401 - before files take the last descriptors
    from numaload.machine.topology import topology
    from numaload.pagecache.reading import POLICIES, Placing

    if policy is not None and policy not in POLICIES:
        raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
    machine = topology()
    selected = machine.select("all" if nodes is None else nodes)
    return Placing(machine, selected, policy or "bind", move=move)


def _chosen(
    models: Sequence[Sequence[str]],
    tensors: str | None,
    layers: str | int | None,
    placing: Placing | None,
) -> Chosen:
    """Choose bytes; the headers that are read for that land on the nodes asked for, too."""
    if placing is None:
        return choose(models, tensors, layers)
    from numaload.pagecache.reading import landing

    with landing(placing):
        return choose(models, tensors, layers)


class _Seen(NamedTuple):
    """What of the chosen ranges is in RAM: ``absent`` ranges for each file."""

    absent: list[list[AbsentRange]]
    known: bool

    @property
    def nbytes(self) -> int:
        return sum(map(length, self.absent))


class _Prewarming(NamedTuple):
    files: Sequence[SourceFile]
    ranges: Sequence[Sequence[ByteRange]]
    options: PrewarmOptions
    progress: Progress | None
    announce: Announce | None

    def run(self) -> PrewarmReport:
        begin, placing = time.perf_counter(), self.options.placing
        seen = self._look()
        size = sum(map(length, self.ranges))
        report = PrewarmReport(
            paths=[file.path for file in self.files],
            size=size,
            resident_before=size - seen.nbytes,
            nodes=placing.nodes if placing else [],
            policy=placing.policy if placing else None,
            residency_known=seen.known,
        )
        if seen.nbytes:
            seen = self._in_turn(report, seen)
        report.resident = size - seen.nbytes
        if placing:
            self._place(report, seen, placing)
        report.seconds = time.perf_counter() - begin
        return report

    def _look(self) -> _Seen:
        absent, known = [], True
        for file, ranges in zip(self.files, self.ranges, strict=True):
            found = [residency(file, *each) for each in ranges]
            absent.append([gap for one in found for gap in one.absent])
            known &= all(one.known for one in found)
        return _Seen(absent, known)

    def _look_anew(self) -> _Seen:
        """Look as the next program that opens the files will.

        Some network file systems have the kernel forget a file's pages whenever it is opened.
        """
        with ExitStack() as opened:
            files = [
                opened.enter_context(SourceFile(file.path)) if file.is_network else file
                for file in self.files
            ]
            return self._replace(files=files)._look()  # noqa: SLF001 - of this very class

    @property
    def _is_part(self) -> bool:
        """Return whether only some tensors are meant: what lies beside them then stays."""
        whole = sum(file.size for file in self.files)
        return sum(map(length, self.ranges)) < whole

    def _in_turn(self, report: PrewarmReport, seen: _Seen) -> _Seen:
        """Read what no other process of this user reads meanwhile."""
        try:
            with trace.importing("numaload.pagecache.reading"):
                from numaload.files.holes import say_holes
                from numaload.files.reading_lock import reading_lock
                from numaload.pagecache import reading  # noqa: F401 - with all that it needs
        except OSError as error:
            check_limits(error, self.files[0].path)
            raise
        for file in self.files:  # before: what was read is no hole to the kernel any more
            say_holes(file)
        with reading_lock(self.files, self.progress, seen.nbytes) as waited_for:
            now = self._look()
            report.followed = waited_for
            if waited_for is not None and seen.known:
                report.read_by_others = max(0, seen.nbytes - now.nbytes)
            return self._read(report, now) if now.nbytes else now

    def _read(self, report: PrewarmReport, seen: _Seen) -> _Seen:
        from numaload.files.plan import CACHE
        from numaload.files.tuned import plan_reading
        from numaload.pagecache.reading import CacheBudget, read_into_cache

        options = self.options
        budget = CacheBudget(self.files, seen.absent, report.size - seen.nbytes, options.placing)
        if not options.force:
            budget.check()
        biggest = max(range(len(self.files)), key=lambda i: length(seen.absent[i]))
        file = self.files[biggest]
        with trace.span("plan", seen.nbytes):
            plan = plan_reading(CACHE, file, seen.nbytes, forced=options.forced, seen=seen.known)
        if self.announce:
            self.announce(plan)
        read = partial(
            read_into_cache,
            self.files,
            placing=options.placing,
            rate=options.max_rate,
            exact=self._is_part,
        )
        done, report.plan = read(seen.absent, plan, budget, self.progress)
        report.read, report.stopped = done, budget.stopped
        report.threads = report.plan.way.threads
        after = self._look_anew() if seen.known else _Seen([[] for _ in self.files], known=False)
        for _ in range(AGAIN):
            # Some machines page out what is idle at any time: this is not what lacks memory.
            if not budget.stopped and 0 < after.nbytes <= report.size // LITTLE:
                report.read += read(after.absent, report.plan, budget, None)[0]
                after = self._look()
        if after.nbytes and not budget.stopped and budget.is_enough:
            report.stopped = GIVEN_UP
        return after

    def _place(self, report: PrewarmReport, seen: _Seen, placing: Placing) -> None:
        resident = [
            _resident(*each) for each in zip(self.files, self.ranges, seen.absent, strict=True)
        ]
        report.on_nodes = _locate(self.files, resident)
        if placing.move and report.elsewhere:
            from numaload.pagecache.reading import move_pages

            report.moved, report.unmoved = move_pages(self.files, resident, placing)
            report.on_nodes = _locate(self.files, resident)


def _resident(
    file: SourceFile, ranges: Iterable[ByteRange], absent: Iterable[AbsentRange]
) -> Residency:
    """Return what is in RAM of the chosen ranges; all others count as absent."""
    outside = between(ranges, 0, file.size)
    return Residency(file.size, tuple(merged((*outside, *absent))))


def _locate(files: Sequence[SourceFile], found: Sequence[Residency]) -> dict[int, int]:
    on: Counter[int] = Counter()
    for file, resident in zip(files, found, strict=True):
        on.update(cached_on(file, resident))
    return dict(sorted(on.items()))


def _remember(files: Mapping[str, SourceFile], models: Sequence[Sequence[str]]) -> None:
    """Remember models only: a bare ``mirror`` shall not pick up any file that was warmed.

    files: {path: file}, those that were read, whatever has these names by now.
    Raises: SplitError for a model of which a file is gone.
    """
    for paths in set(map(tuple, models)):
        reach(paths[0])
        gone = [path for path in paths if not is_there(path)]
        if gone and len(paths) > 1:
            message = f"went away while {len(paths)} files of one model were read"
            raise SplitError(message, path=gone[0], missing=gone)
        its = [files[path] for path in paths]
        if _is_model(its[0]):
            identities = tuple(file.identity() for file in its)
            known.remember(known.Model(tuple(map(_absolute, paths)), identities))


def _absolute(path: str) -> str:
    import os

    return os.path.abspath(path)


def _is_model(file: SourceFile) -> bool:
    return file.path.endswith(SUFFIX) or file.read_at(0, min(4, file.size)) == b"GGUF"
