"""Filling replicas: threads on every node read the source straight into that node's memory."""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import xxhash

from numaload.errors import CancelledError, ChecksumError, NodeMemoryError
from numaload.numa.placement import Placement, locate
from numaload.numa.topology import Topology
from numaload.numa.workers import Workers, finish
from numaload.replicas.arena import Arena
from numaload.replicas.plan import LEAST_FREE, free_on
from numaload.storage.files import SourceFile
from numaload.storage.residency import Residency, residency

CHUNK = 16 << 20  # bytes filled and checksummed at a time; a multiple of a huge page
MAX_THREADS = 8  # per node; a memory controller is busy with fewer
PIECE = 1 << 20  # bytes of the source hashed at a time: they stay in a core's cache
TRUSTED = 256 << 20  # bytes filled, at most, between two looks at a node's free memory

Progress = Callable[[int, int], object]
Allocate = Callable[[int, int], Arena]  # (size, node) -> where to fill


@dataclass
class Built:
    """``arenas[node][i]`` holds file i; ``checksums[i]`` has its chunks' XXH3-64, in order."""

    arenas: dict[int, list[Arena]]
    checksums: list[list[int]]
    placements: dict[int, Placement]
    seconds: float
    given_back: int = 0  # bytes of source page cache that this brought in and dropped again

    def close(self) -> None:
        for arenas in self.arenas.values():
            for arena in arenas:
                arena.close()


def build(
    files: Sequence[SourceFile],
    nodes: Sequence[int],
    allocate: Allocate,
    machine: Topology,
    progress: Progress | None = None,
) -> Built:
    """Fill one replica per node and prove it: same bytes, right node. All of them or none.

    Raises: NodeMemoryError, ReadError, FileChangedError, ChecksumError, PlacementError,
    CancelledError; whatever was filled is freed then.
    """
    begin = time.perf_counter()
    job = _Build(files, nodes, machine, progress)
    try:
        for node in nodes:
            for file in files:
                job.arenas[node].append(allocate(file.size, node))
        job.run()
        for file in files:
            file.check_unchanged()
        placements = prove(job.arenas)
    except BaseException:
        for arenas in job.arenas.values():
            for arena in arenas:
                arena.close()
        raise
    seconds = time.perf_counter() - begin
    return Built(job.arenas, job.sums, placements, seconds, job.given_back)


def prove(arenas: dict[int, list[Arena]]) -> dict[int, Placement]:
    """Ask the kernel where every page is. Raises: PlacementError."""
    groups = [([node], [arena.mapping for arena in row]) for node, row in arenas.items()]
    placements = dict(zip(arenas, locate(groups), strict=True))
    for node, placement in placements.items():
        placement.check(f"replica on node {node}")
    return placements


class _Build:
    """The state that the threads of one build share."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        nodes: Sequence[int],
        machine: Topology,
        progress: Progress | None,
    ) -> None:
        self.files, self.nodes, self.machine, self.progress = files, nodes, machine, progress
        self.arenas: dict[int, list[Arena]] = {node: [] for node in nodes}
        self.sums = [[0] * -(-file.size // CHUNK) for file in files]
        self.before = [residency(file) for file in files]
        self.waiting = [[len(nodes)] * len(row) for row in self.sums]
        self.known: dict[tuple[int, int], int] = {}
        self.room = dict.fromkeys(nodes, 0)  # bytes that may be filled before looking again
        self.done, self.total = 0, sum(file.size for file in files) * len(nodes)
        self.given_back = 0
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.scratch = threading.local()

    def run(self) -> None:
        if self.progress:
            self.progress(0, self.total)
        pools = {node: self._workers(node) for node in self.nodes}
        try:
            finish(
                [
                    workers.submit(self._work, node, todo)
                    for node, workers in pools.items()
                    for todo in [self._chunks()]
                    for _ in range(workers.count)
                ],
                self.stop,
            )
        except KeyboardInterrupt:
            raise CancelledError("interrupted", done=self.done, total=self.total) from None
        finally:
            for workers in pools.values():
                workers.close()
        for i, file in enumerate(self.files):
            # Read-ahead reached beyond chunks: once more over what was not there before.
            self._give_back(file, self.before[i], 0, file.size)

    def _workers(self, node: int) -> Workers:
        cpus = self.machine.nodes[self.machine.threads_node(node)].usable_cpus
        chunks = sum(map(len, self.sums))
        return Workers(cpus, max(1, min(MAX_THREADS, len(cpus), chunks)), f"numaload-build-{node}")

    def _chunks(self) -> Iterator[tuple[int, int]]:
        """(file, chunk) in order; the threads of a node share one of these."""
        for i, row in enumerate(self.sums):
            for chunk in range(len(row)):
                yield i, chunk

    def _work(self, node: int, todo: Iterator[tuple[int, int]]) -> None:
        while not self.stop.is_set():
            with self.lock:
                task = next(todo, None)
            if task is None:
                return
            self._fill(node, *task)

    def _fill(self, node: int, i: int, chunk: int) -> None:
        file, arena = self.files[i], self.arenas[node][i]
        start = chunk * CHUNK
        stop = min(start + CHUNK, file.size)
        self._check_room(node, stop - start)
        # Released at once: a view in the traceback of an error would keep the whole arena.
        with arena.mapping.view(start, stop - start, write=True) as view:
            arena.prepare(start, stop)
            file.read_into(view, start)
            self._compare(file, i, chunk, view, node)
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
        free = free_on(node, self.machine)
        if free < nbytes + LEAST_FREE:
            raise NodeMemoryError(
                f"node {node} ran out while it was filled: needs {nbytes + LEAST_FREE} bytes for"
                f" the next chunk, has {free}; all of it is given back: free memory there, or"
                " leave this node out (--nodes)",
                node=node,
                needed=nbytes + LEAST_FREE,
                free=free,
            )
        with self.lock:
            self.room[node] = min(TRUSTED, (free - LEAST_FREE) // 8)

    def _compare(self, file: SourceFile, i: int, chunk: int, view: memoryview, node: int) -> None:
        """The first node to have a chunk reads the source once more, into a buffer of its own."""
        found = xxhash.xxh3_64_intdigest(view)
        with self.lock:
            first = (i, chunk) not in self.known
            expected = self.known.setdefault((i, chunk), found)
        if first:
            expected = self._source(file, chunk * CHUNK, len(view))
            self.sums[i][chunk] = found
        if found != expected:
            raise ChecksumError(
                f"{file.path}: chunk {chunk} (byte {chunk * CHUNK}) on node {node} has checksum"
                f" {found:016x}, expected {expected:016x}: the file changed, or memory is faulty",
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
