"""Filling replicas: threads on every node read the source straight into that node's memory."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import xxhash

from numaload.errors import CancelledError, ChecksumError, NodeMemoryError
from numaload.numa.lists import Group, format_list
from numaload.numa.memory import Limit, cgroup_limits
from numaload.numa.placement import Placement, locate
from numaload.numa.topology import Topology
from numaload.numa.workers import Workers, finish
from numaload.replicas.arena import Allocate, Arena
from numaload.replicas.plan import LEAST_FREE, free_on
from numaload.storage.files import SourceFile
from numaload.storage.residency import Residency, residency

CHUNK = 16 << 20  # bytes filled and checksummed at a time; a multiple of a huge page
MAX_THREADS = 8  # per node; a memory controller is busy with fewer
PIECE = 1 << 20  # bytes of the source hashed at a time: they stay in a core's cache
TRUSTED = 256 << 20  # bytes filled, at most, between two looks at a node's free memory

Progress = Callable[[int, int], object]


@dataclass
class Built:
    """``arenas[group][i]`` holds file i; ``checksums[i]`` has its chunks' XXH3-64, in order."""

    arenas: dict[Group, list[Arena]]
    checksums: list[list[int]]
    placements: dict[Group, Placement]
    seconds: float
    bound: bool = True
    given_back: int = 0  # bytes of source page cache that this brought in and dropped again

    def close(self) -> None:
        for arenas in self.arenas.values():
            for arena in arenas:
                arena.close()


def build(
    files: Sequence[SourceFile],
    groups: Sequence[Group],
    allocate: Allocate,
    machine: Topology,
    progress: Progress | None = None,
    *,
    bound: bool = True,
) -> Built:
    """Fill one replica per group of nodes and prove it: same bytes, right nodes. All or none.

    bound: whether ``allocate`` binds; if not, pages are where the threads of their nodes touched
    them first, and free memory alone counts as room.
    Raises: NodeMemoryError, ReadError, FileChangedError, ChecksumError, PlacementError,
    CancelledError; whatever was filled is freed then.
    """
    begin = time.perf_counter()
    job = _Build(files, groups, machine, progress, bound=bound)
    try:
        for group in groups:
            for file in files:
                job.arenas[group].append(allocate(file.size, group))
        job.run()
        for file in files:
            file.check_unchanged()
        for arenas in job.arenas.values():
            for arena in arenas:
                arena.settle()
        placements = prove(job.arenas)
    except BaseException:
        for arenas in job.arenas.values():
            for arena in arenas:
                arena.close()
        raise
    seconds = time.perf_counter() - begin
    return Built(job.arenas, job.sums, placements, seconds, bound, job.given_back)


def prove(arenas: dict[Group, list[Arena]]) -> dict[Group, Placement]:
    """Ask the kernel where every page is. Raises: PlacementError."""
    asked = [(list(group), [arena.mapping for arena in row]) for group, row in arenas.items()]
    placements = dict(zip(arenas, locate(asked), strict=True))
    for group, placement in placements.items():
        placement.check(f"replica on node {format_list(group)}")
    return placements


class _Build:
    """The state that the threads of one build share."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        groups: Sequence[Group],
        machine: Topology,
        progress: Progress | None,
        *,
        bound: bool,
    ) -> None:
        self.files, self.groups, self.machine, self.progress = files, groups, machine, progress
        self.bound = bound
        self.arenas: dict[Group, list[Arena]] = {group: [] for group in groups}
        self.sums = [[0] * -(-file.size // CHUNK) for file in files]
        self.before = [residency(file) for file in files]
        self.waiting = [[len(groups)] * len(row) for row in self.sums]
        self.known: dict[tuple[int, int], int] = {}
        # Bytes that may be filled on a node before looking again.
        self.room = dict.fromkeys((node for group in groups for node in group), 0)
        self.done, self.total = 0, sum(file.size for file in files) * len(groups)
        self.given_back = 0
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.scratch = threading.local()

    def run(self) -> None:
        if self.progress:
            self.progress(0, self.total)
        places = [(group, i) for group in self.groups for i in range(len(group))]
        pools = {place: self._workers(*place) for place in places}
        try:
            finish(
                [
                    workers.submit(self._work, group, todo)
                    for (group, i), workers in pools.items()
                    for todo in [islice(self._chunks(), i, None, len(group))]
                    for _ in range(workers.count)
                ],
                self.stop,
            )
        except KeyboardInterrupt:
            raise CancelledError("interrupted", done=self.done, total=self.total) from None
        finally:
            self.stop.set()  # Ctrl-C may come while threads are still being started
            for workers in pools.values():
                workers.close()
            for i, file in enumerate(self.files):
                # Read-ahead reached beyond chunks, and a failed build ended within some.
                self._give_back(file, self.before[i], 0, file.size)

    def _workers(self, group: Group, i: int) -> Workers:
        """Threads of one node of a group: they fill every n-th chunk."""
        node = group[i]
        cpus = self.machine.nodes[self.machine.threads_node(node)].usable_cpus
        chunks = -(-sum(map(len, self.sums)) // len(group))
        return Workers(cpus, max(1, min(MAX_THREADS, len(cpus), chunks)), f"numaload-build-{node}")

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(file, chunk) in order; the threads of a node share what they take of it."""
        for i, row in enumerate(self.sums):
            for chunk in range(len(row)):
                yield i, chunk

    def _work(self, group: Group, todo: Iterator[tuple[int, int]]) -> None:
        while not self.stop.is_set():
            with self.lock:
                task = next(todo, None)
            if task is None:
                return
            self._fill(group, *task)

    def _fill(self, group: Group, i: int, chunk: int) -> None:
        file, arena = self.files[i], self.arenas[group][i]
        start = chunk * CHUNK
        stop = min(start + CHUNK, file.size)
        for node in group:
            self._check_room(node, -(-(stop - start) // len(group)))
        # Released at once: a view in the traceback of an error would keep the whole arena.
        with arena.mapping.view(start, stop - start, write=True) as view:
            arena.prepare(start, stop)
            file.read_into(view, start)
            self._compare(file, i, chunk, view, group)
        self._finished(file, i, chunk, stop - start)

    def _check_room(self, node: int, nbytes: int) -> None:
        """Someone else may fill the node meanwhile, and the kernel would kill rather than fail.

        Looking takes longer than it takes eight threads to fill a chunk, so while there is plenty
        a look is good for several chunks.
        """
        with self.lock:
            self.room[node] -= nbytes
            if self.room[node] >= 0:
                return
        limits = [Limit(f"node {node}", free_on(node, self.machine, bound=self.bound))]
        name, free = min([*limits, *cgroup_limits()], key=lambda limit: limit.free)
        if free < nbytes + LEAST_FREE:
            raise NodeMemoryError(
                f"{name} ran out while node {node} was filled: needs {nbytes + LEAST_FREE} bytes"
                f" for the next chunk, has {free}; all of it is given back: free memory there, or"
                " leave this node out (--nodes)",
                node=node,
                needed=nbytes + LEAST_FREE,
                free=free,
            )
        with self.lock:
            self.room[node] = min(TRUSTED, (free - LEAST_FREE) // 8)

    def _compare(
        self, file: SourceFile, i: int, chunk: int, view: memoryview, group: Group
    ) -> None:
        """The first to have a chunk reads the source once more, into a buffer of its own."""
        found = xxhash.xxh3_64_intdigest(view)
        with self.lock:
            first = (i, chunk) not in self.known
            expected = self.known.setdefault((i, chunk), found)
        if first:
            expected = self._source(file, chunk * CHUNK, len(view))
            self.sums[i][chunk] = found
        if found != expected:
            raise ChecksumError(
                f"{file.path}: chunk {chunk} (byte {chunk * CHUNK}) on node {format_list(group)}"
                f" has checksum {found:016x}, expected {expected:016x}: the file changed, or memory"
                " is faulty",
                path=file.path,
                chunk=chunk,
            )

    def _source(self, file: SourceFile, start: int, nbytes: int) -> int:
        if not hasattr(self.scratch, "buffer"):
            self.scratch.buffer = bytearray(PIECE)
        digest = xxhash.xxh3_64()
        for offset in range(start, start + nbytes, PIECE):
            view = memoryview(self.scratch.buffer)[: min(PIECE, start + nbytes - offset)]
            file.read_into(view, offset)
            digest.update(view)
        return digest.intdigest()

    def _finished(self, file: SourceFile, i: int, chunk: int, nbytes: int) -> None:
        with self.lock:
            self.waiting[i][chunk] -= 1
            last = self.waiting[i][chunk] == 0
            self.done += nbytes
            if self.progress and self.progress(self.done, self.total) is False:
                self.stop.set()
                raise CancelledError("cancelled", done=self.done, total=self.total)
        if last:
            start = chunk * CHUNK
            dropped = self._give_back(file, self.before[i], start, start + nbytes)
            with self.lock:
                self.given_back += dropped

    @staticmethod
    def _give_back(file: SourceFile, before: Residency, start: int, stop: int) -> int:
        """Drop the page cache that this build brought in; what was there before stays."""
        dropped = 0
        for first, last in _overlaps(before.absent, start, stop) if before.known else ():
            file.drop_cache(first, last - first)
            dropped += last - first
        return dropped


def _overlaps(runs: Sequence[tuple[int, int]], start: int, stop: int) -> Iterator[tuple[int, int]]:
    """``runs`` ascend and may be a hundred thousand: a large file, half evicted."""
    for i in range(max(0, bisect_right(runs, (start,)) - 1), len(runs)):
        first, last = runs[i]
        if first >= stop:
            return
        if last > start:
            yield max(first, start), min(last, stop)
