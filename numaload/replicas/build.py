"""Filling replicas: threads on every node read the source straight into that node's memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate

import xxhash

from numaload import trace
from numaload.errors import ChecksumError
from numaload.files.copy import plan_for
from numaload.files.plan import BUFFERED, DIRECT, ReadMethod, ReadPlan
from numaload.files.reader import Chunk, Progress, Reading
from numaload.files.residency import ByteRange, give_back, overlaps, residency
from numaload.files.source import SourceFile
from numaload.files.ways import IntoMemory
from numaload.linux.lists import Group, format_list
from numaload.linux.placement import Placement, locate
from numaload.machine.affinity import pin
from numaload.machine.topology import Topology
from numaload.machine.workers import Workers, finish
from numaload.replicas.arena import Allocate, Arena
from numaload.replicas.layout import CHUNK, Layout, asked_of, pieces_of
from numaload.replicas.plan import MemoryBudget

PIECE = 2 << 20  # bytes that are copied, and hashed while they are in a core's caches
# Bytes of huge pages that are made just before they are filled: clearing them brings them into the
# caches too. 16 MiB at a time took 6 % longer.
STEP = 4 << 20
Prepare = Callable[[int, int], None]  # has pages under [start, stop) of the file
MAX_THREADS = 8  # per node, that copy; a memory controller is busy with fewer


@dataclass
class Built:
    """``arenas[group][i]`` holds file i; ``checksums[i]`` has its pieces' XXH3-64, in order."""

    arenas: dict[Group, list[Arena]]
    layouts: Mapping[Group, Layout]
    pieces: list[list[ByteRange]]
    checksums: list[list[int]]
    placements: dict[Group, Placement]
    seconds: float
    bound: bool = True
    given_back: int = 0  # bytes of the source that were read and do not stay in page cache
    plan: ReadPlan | None = None  # how what was not in RAM was read

    @property
    def copied(self) -> int:
        """Return the bytes that were written."""
        rows = self.arenas.values()
        return sum(b - a for row in rows for arena in row for a, b in arena.spans)

    def close(self) -> None:
        for arenas in self.arenas.values():
            for arena in arenas:
                arena.close()


def build(
    files: Sequence[SourceFile],
    layouts: Mapping[Group, Layout],
    allocate: Allocate,
    machine: Topology,
    progress: Progress | None = None,
    *,
    bound: bool = True,
    set_aside: bool = False,
    drop_source: bool = False,
) -> Built:
    """Fill one replica per layout and prove it: same bytes, right nodes. All or none.

    bound: whether ``allocate`` binds; if not, pages are where the threads of their nodes touched
    them first, and free memory alone counts as room.
    set_aside: the memory is none that nodes show as free: that does not count.
    drop_source: give back all page cache of the files, not only what this brought in.
    Raises: NodeMemoryError, ReadError, FileChangedError, ChecksumError, PlacementError,
    CancelledError; whatever was filled is freed then.
    """
    begin = time.perf_counter()
    job = _Build(files, layouts, machine, progress, bound=bound, drop_source=drop_source)
    job.budget = None if set_aside else job.budget
    try:
        for group, layout in layouts.items():
            for i, file in enumerate(files):
                job.arenas[group].append(allocate(file.size, layout, i))
        job.run()
        for file in files:
            file.check_unchanged()
        placements = _prove(job.arenas, bound=bound)
    except BaseException:
        for arenas in job.arenas.values():
            for arena in arenas:
                arena.close()
        raise
    seconds = time.perf_counter() - begin
    done = (job.arenas, layouts, job.pieces, job.sums, placements)
    return Built(*done, seconds, bound, job.given_back, plan=job.plan)


@trace.spanned("prove")
def _prove(arenas: dict[Group, list[Arena]], *, bound: bool) -> dict[Group, Placement]:
    """Ask the kernel where every page is. Raises: PlacementError."""
    asked = [
        asked_of(group, row[0].layout if bound else None, [arena.mapping for arena in row])
        for group, row in arenas.items()
    ]
    placements = dict(zip(arenas, locate(asked), strict=True))
    for group, placement in placements.items():
        placement.check(f"replica on node {format_list(group)}")
    return placements


class _Build:
    """The state that the threads of one build share.

    Every chunk is read once, into the replica of one group (its leader, in turn), and copied from
    there to the others: by threads of the node that it is filled on.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        layouts: Mapping[Group, Layout],
        machine: Topology,
        progress: Progress | None,
        *,
        bound: bool,
        drop_source: bool = False,
    ) -> None:
        groups = list(layouts)
        self.files, self.groups, self.machine = files, groups, machine
        self.drop_source = drop_source
        self.arenas: dict[Group, list[Arena]] = {group: [] for group in groups}
        self.layouts = layouts
        self.pieces = [pieces_of(layouts.values(), i, file.size) for i, file in enumerate(files)]
        self.index = [{start: k for k, (start, _) in enumerate(each)} for each in self.pieces]
        self.sums = [[0] * len(each) for each in self.pieces]
        self.starts = list(accumulate(map(len, self.sums), initial=0))
        self.before = [residency(file) for file in files]
        self.budget: MemoryBudget | None = MemoryBudget(machine, groups, bound=bound)
        self.reading = Reading(self._nbytes(), progress)
        self.copies: list[Future[None]] = []
        self.pools: dict[int, Workers] = {}
        self.sources: list[IntoMemory] = []
        self.plan: ReadPlan | None = None
        self.given_back = 0
        self.lock = self.reading.lock
        self.own = threading.local()
        self.busy = threading.Semaphore(len(machine.cpus))

    def _nbytes(self) -> int:
        """Return the bytes of all replicas together."""
        return sum(
            stop - start
            for layout in self.layouts.values()
            for i, file in enumerate(self.files)
            for start, stop in layout.spans(i, file.size)
        )

    def run(self) -> None:
        if not self.files:
            return
        self.plan = plan = self._plan()
        self.sources = [IntoMemory(file, direct=plan.way.name == DIRECT) for file in self.files]
        cpus = self.machine.cpus_of(sorted({self._seat(n) for g in self.groups for n in g}))
        try:
            if len(self.groups) > 1:
                self.pools = {n: self._copiers(n) for group in self.groups for n in group}
            self.reading.run(self.pieces, plan, self._lead, cpus, "numaload-build")
            finish(self.copies, self.reading.token, self.reading.steps)
        except KeyboardInterrupt:
            raise self.reading.cancelled("interrupted") from None
        finally:
            self.reading.end()
            for workers in self.pools.values():
                workers.close()
            for source in self.sources:
                source.close()
            for i, file in enumerate(self.files):
                # Read-ahead reached beyond chunks, and a failed build ended within some.
                give_back(file, self._not_wanted(i))

    def _plan(self) -> ReadPlan:
        """Plan reads of whole chunks. What is in RAM is copied, by a thread for each CPU."""
        plan = plan_for(self.files, self.before)
        absent = sum(found.size - found.resident for found in self.before)
        chunks = sum(map(len, self.sums))
        cpus = len(self.machine.cpus_of(sorted({self._seat(n) for g in self.groups for n in g})))
        copying = min(MAX_THREADS * len(self.groups), cpus)
        # Twice as many as read, since each makes its pages first and counts them after.
        threads = max(copying, 2 * plan.way.threads if absent else 0)
        way = plan.way if absent else ReadMethod(BUFFERED, threads)
        return plan.forced_to([way._replace(threads=max(1, min(threads, chunks)), chunk=CHUNK)])

    def _seat(self, node: int) -> int:
        """Return the node whose CPUs work for ``node``."""
        return self.machine.threads_node(node)

    def _copiers(self, node: int) -> Workers:
        cpus = self.machine.nodes[self._seat(node)].usable_cpus
        count = max(1, min(MAX_THREADS, len(cpus), sum(map(len, self.sums))))
        return Workers(cpus, count, f"numaload-build-{node}")

    def _node(self, group: Group, which: int, index: int) -> int:
        """Return which node of a group fills a chunk: its own, or each one every n-th."""
        layout = self.layouts[group]
        if layout.stripes:
            return layout.node_at(which, sum(self.pieces[which][index]) // 2)
        return group[(self.starts[which] + index) % len(group)]

    def _lead(self, chunk: Chunk, way: ReadMethod) -> None:
        which, index = chunk.which, self.index[chunk.which][chunk.offset]
        groups = self.groups
        if self.layouts[groups[0]].only:
            groups = [g for g in groups if self.layouts[g].covers(which, chunk.offset, chunk.stop)]
        leader = groups[(self.starts[which] + index) // len(groups[0]) % len(groups)]
        self._sit(self._node(leader, which, index))

        def read(view: memoryview, prepare: Prepare) -> int | None:
            segments, source = list(self._segments(chunk)), self.sources[which]
            path = self.files[which].path
            if not any(absent for *_, absent in segments):
                with trace.span("copy", chunk.nbytes, leader, path):
                    return _hashed(
                        view, chunk, prepare, lambda part, at: source.read(part, at, BUFFERED)
                    )
            prepare(chunk.offset, chunk.stop)
            for start, stop, absent in segments:
                part = view[start - chunk.offset : stop - chunk.offset]
                with part, trace.span("read" if absent else "copy", len(part), leader, path):
                    name = way.name if absent else BUFFERED
                    source.read(part, start, name)
            return None

        self.sums[which][index] = self._fill(leader, chunk, read)
        dropped = self._give_back(chunk)
        with self.lock:
            self.given_back += dropped
        for group in groups:
            if group != leader:
                pool = self.pools[self._node(group, which, index)]
                copy = pool.submit(self._copy, leader, group, chunk, token=self.reading.token)
                self.copies.append(copy)

    def _sit(self, node: int) -> None:
        """Move this thread to the node that it fills."""
        cpus = self.machine.nodes[self._seat(node)].usable_cpus
        if getattr(self.own, "cpus", None) != cpus:
            pin(cpus)
            self.own.cpus = cpus

    def _segments(self, chunk: Chunk) -> Iterator[tuple[int, int, bool]]:
        """Yield (start, stop, absent from RAM) of a chunk, on pages' borders."""
        found, at = self.before[chunk.which], chunk.offset
        for start, stop in overlaps(found.absent, chunk.offset, chunk.stop):
            if at < start:
                yield at, start, False
            yield start, stop, True
            at = stop
        if at < chunk.stop:
            yield at, chunk.stop, False

    def _fill(
        self, group: Group, chunk: Chunk, write: Callable[[memoryview, Prepare], int | None]
    ) -> int:
        """Fill a chunk; return the XXH3-64 of what is in the arena then.

        write: has pages prepared before it fills them. It may have hashed all of it already.
        """
        arena = self.arenas[group][chunk.which]

        def prepare(start: int, stop: int) -> None:
            # No more at a time than there are CPUs: else all are half done before one can read.
            with self.busy, trace.span("prepare", stop - start, group):
                arena.prepare(start, stop)

        ranges = arena.layout.ranges(chunk.which, chunk.offset, chunk.stop)
        # Released at once: a view in the traceback of an error would keep the whole arena.
        with (
            self.budget.taken(ranges) if self.budget else nullcontext(),
            arena.mapping.view(chunk.offset, chunk.nbytes, write=True) as view,
        ):
            found = write(view, prepare)
            if found is not None:
                return found
            with self.busy, trace.span("hash", chunk.nbytes, group):
                return xxhash.xxh3_64_intdigest(view)

    def _copy(self, leader: Group, group: Group, chunk: Chunk) -> None:
        if self.reading.token.cancelled():
            return
        try:
            self._copied(leader, group, chunk)
        except BaseException:
            self.reading.token.cancel()  # nobody waits for copies while there is something to read
            raise

    def _copied(self, leader: Group, group: Group, chunk: Chunk) -> None:
        import numpy as np

        source = self.arenas[leader][chunk.which].mapping

        def copy(part: memoryview, at: int) -> None:
            with source.view(at, len(part)) as read:
                # Of its ways to copy this is the one that lets other threads of Python run.
                np.copyto(np.frombuffer(part, np.uint8), np.frombuffer(read, np.uint8))

        with trace.span("copy", chunk.nbytes, group, self.files[chunk.which].path):
            found = self._fill(
                group, chunk, lambda view, prepare: _hashed(view, chunk, prepare, copy)
            )
        self._compare(group, chunk, found)
        self.reading.advance(chunk.nbytes)

    def _compare(self, group: Group, chunk: Chunk, found: int) -> None:
        file, index = self.files[chunk.which], self.index[chunk.which][chunk.offset]
        expected = self.sums[chunk.which][index]
        if found != expected:
            raise ChecksumError(
                f"{file.path}: chunk {index} (byte {chunk.offset}) on node {format_list(group)}"
                f" has checksum {found:016x}, expected {expected:016x}: memory is faulty",
                path=file.path,
                chunk=index,
            )

    def _not_wanted(self, which: int, start: int = 0, stop: int | None = None) -> list[ByteRange]:
        """Return the page cache to give back: what this build brought in, or all of it.

        What was there before stays, also where the kernel does not tell what that was.
        """
        stop = self.files[which].size if stop is None else stop
        if self.drop_source:
            return [(start, stop)] if start < stop else []
        before = self.before[which]
        return list(overlaps(before.absent, start, stop)) if before.known else []

    def _give_back(self, chunk: Chunk) -> int:
        dropped = 0
        for start, stop in self._not_wanted(chunk.which, chunk.offset, chunk.stop):
            self.files[chunk.which].drop_cache(start, stop - start)
            dropped += stop - start
        return dropped


def _hashed(
    view: memoryview, chunk: Chunk, prepare: Prepare, copy: Callable[[memoryview, int], None]
) -> int:
    """Have every piece copied from RAM, hash it while it is in the caches; return the XXH3-64.

    copy: fills the part that begins at this byte of the file.
    """
    found, at = xxhash.xxh3_64(), chunk.offset
    while at < chunk.stop:
        if at == chunk.offset or at % STEP == 0:
            prepare(at, min(chunk.stop, at - at % STEP + STEP))
        end = min(chunk.stop, at - at % PIECE + PIECE)
        with view[at - chunk.offset : end - chunk.offset] as part:
            copy(part, at)
            found.update(part)
        at = end
    return found.intdigest()
