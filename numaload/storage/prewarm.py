"""Prewarming: bring whole files into the page cache with large parallel reads."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from numaload.errors import CancelledError, NodeMemoryError, UsageError
from numaload.formats.splits import sibling_paths
from numaload.numa import memory, syscalls
from numaload.numa.lists import format_list
from numaload.numa.topology import Topology, topology
from numaload.storage import known
from numaload.storage.files import SourceFile
from numaload.storage.residency import Residency, cached_on, residency

CHUNK = 8 << 20  # bytes a read; 1 MiB and 32 MiB were no faster
MAX_THREADS = 8
POLICIES = {"bind": syscalls.MPOL_BIND, "interleave": syscalls.MPOL_INTERLEAVE}

Progress = Callable[[int, int], Any]  # (bytes done, bytes in all); returning False cancels


@dataclass
class PrewarmReport:
    """Bytes throughout. ``on_nodes`` is the kernel's word, where nodes were asked for."""

    paths: list[str]
    size: int
    resident_before: int
    read: int
    resident: int
    seconds: float
    threads: int = 0
    nodes: list[int] = field(default_factory=list)
    policy: str | None = None
    on_nodes: dict[int, int] = field(default_factory=dict)
    residency_known: bool = True

    @property
    def elsewhere(self) -> int:
        """Bytes in RAM on nodes that were not asked for."""
        return sum(n for node, n in self.on_nodes.items() if node not in self.nodes)

    @property
    def done(self) -> bool:
        """Whether all of it is in RAM, and on the nodes asked for if any were."""
        whole = self.resident == self.size or not self.residency_known
        counted = sum(self.on_nodes.values()) >= self.size
        return whole and (not self.nodes or (counted and self.elsewhere == 0))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"elsewhere": self.elsewhere, "done": self.done}


class HasPaths(Protocol):
    """Opened weights, as far as prewarming needs to know them."""

    @property
    def paths(self) -> list[str]: ...


Source = str | os.PathLike[str] | HasPaths


def prewarm(
    what: Source | Sequence[Source],
    *,
    nodes: str | int | Sequence[int] | None = None,
    policy: str | None = None,
    threads: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> PrewarmReport:
    """Read what is not yet in RAM of these files, weights, and their split siblings.

    what: a path, opened weights, or several of them.
    nodes, policy: where the page cache is to land ("bind" to these nodes, or "interleave" over
    them); what was resident before stays where it is and is counted.
    force: read even what does not fit into available memory.
    Raises: ReadError, SplitError, NodeMemoryError, CancelledError, UsageError, NumaError.
    """
    if policy is not None and policy not in POLICIES:
        raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
    if threads is not None and threads < 1:
        raise UsageError(f"threads: {threads}, expected at least 1")
    machine = topology() if nodes is not None or policy is not None else None
    selected = machine.select("all" if nodes is None else nodes) if machine else []
    policy = (policy or "bind") if machine else None
    # A file that was given twice, or through a link too, is one file.
    whole = {os.path.realpath(p): p for path in _paths(what) for p in sibling_paths(path)}
    files = [SourceFile(path) for path in whole.values()]
    try:
        return _prewarm(files, machine, selected, policy, threads, force, progress)
    finally:
        for file in files:
            file.close()


def _paths(what: Source | Sequence[Source]) -> list[str]:
    if isinstance(what, (str, os.PathLike)):
        return [os.fspath(what)]
    if isinstance(what, Sequence):
        return [path for one in what for path in _paths(one)]
    return what.paths


def _prewarm(
    files: list[SourceFile],
    machine: Topology | None,
    nodes: list[int],
    policy: str | None,
    threads: int | None,
    force: bool,
    progress: Progress | None,
) -> PrewarmReport:
    begin = time.perf_counter()
    before = [residency(file) for file in files]
    absent = sum(file.size - found.resident for file, found in zip(files, before, strict=True))
    report = PrewarmReport(
        paths=[file.path for file in files],
        size=sum(file.size for file in files),
        resident_before=sum(found.resident for found in before),
        read=absent,
        resident=0,
        seconds=0.0,
        nodes=nodes,
        policy=policy,
        residency_known=all(found.known for found in before),
    )
    if absent:
        if not force:
            # All nodes together are the machine, whose own estimate is better than a sum.
            _check_room(absent, nodes if machine and nodes != machine.usable else [])
        machine = machine or topology()
        job = _Job(files, before, absent, progress)
        report.threads = job.run(machine, nodes, policy, threads)
    after = [residency(file) for file in files] if absent else before
    report.resident = sum(found.resident for found in after)
    if nodes:
        report.on_nodes = _locate(files, after)
    report.seconds = time.perf_counter() - begin
    _remember(files)
    return report


def _check_room(absent: int, nodes: list[int]) -> None:
    """Refuse, with numbers, to push out other programs' memory or this file's own beginning."""
    limits = [memory.available()]
    if nodes:
        free = sum(memory.node_free(node) for node in nodes)
        limits.append(memory.Limit(f"node {format_list(nodes)}", free))
    tightest = min(limits, key=lambda limit: limit.free)
    if absent > tightest.free:
        raise NodeMemoryError(
            f"{absent} bytes ({absent / 2**30:.1f} GiB) are to be read, {tightest.name} has room"
            f" for {tightest.free} ({tightest.free / 2**30:.1f} GiB); --force reads anyway",
            needed=absent,
            free=tightest.free,
        )


class _Job:
    """One prewarming: a shared list of chunks, and threads that take the next."""

    def __init__(
        self,
        files: list[SourceFile],
        before: list[Residency],
        total: int,
        progress: Progress | None,
    ) -> None:
        self.chunks = self._chunks(files, before)
        self.total, self.progress = total, progress
        self.done = 0
        self.lock, self.stop = threading.Lock(), threading.Event()

    @staticmethod
    def _chunks(
        files: list[SourceFile], before: list[Residency]
    ) -> Iterator[tuple[SourceFile, int, int]]:
        for file, found in zip(files, before, strict=True):
            for start, stop in found.absent:
                for offset in range(start, stop, CHUNK):
                    yield file, offset, min(CHUNK, stop - offset)

    def run(
        self, machine: Topology, nodes: list[int], policy: str | None, threads: int | None
    ) -> int:
        """Read everything; how many threads did."""
        from numaload.numa.workers import Workers, finish  # a resident file needs no threads

        cpus = machine.cpus
        if nodes:
            cpus = frozenset().union(
                *(machine.nodes[machine.threads_node(n)].usable_cpus for n in nodes)
            )
        count = min(threads or min(MAX_THREADS, max(1, len(cpus) // 2)), -(-self.total // CHUNK))
        if self.progress:
            self.progress(0, self.total)
        # Threads of this job alone: the memory policy ends with them.
        workers = Workers(cpus, count, "numaload-prewarm")
        try:
            finish([workers.submit(self._read, nodes, policy) for _ in range(count)], self.stop)
        except KeyboardInterrupt:
            raise CancelledError("interrupted", done=self.done, total=self.total) from None
        finally:
            workers.close()
        return count

    def _read(self, nodes: list[int], policy: str | None) -> None:
        if policy:
            syscalls.set_mempolicy(POLICIES[policy], nodes)
        buffer = bytearray(CHUNK)
        while not self.stop.is_set():
            with self.lock:
                chunk = next(self.chunks, None)
            if chunk is None:
                return
            file, offset, nbytes = chunk
            file.read_into(memoryview(buffer)[:nbytes], offset)
            self._advance(nbytes)

    def _advance(self, nbytes: int) -> None:
        with self.lock:
            self.done += nbytes
            if self.progress and self.progress(self.done, self.total) is False:
                self.stop.set()
                raise CancelledError("cancelled", done=self.done, total=self.total)


def _locate(files: list[SourceFile], found: list[Residency]) -> dict[int, int]:
    on: Counter[int] = Counter()
    for file, resident in zip(files, found, strict=True):
        # Where the kernel does not tell what is resident, all of it was read just now.
        on.update(cached_on(file, resident if resident.known else Residency(file.size, ())))
    return dict(sorted(on.items()))


def _remember(files: list[SourceFile]) -> None:
    """Models only: a bare ``mirror`` shall not pick up any file that was ever warmed."""
    opened = {os.path.realpath(file.path): file for file in files}
    groups = {
        tuple(sibling_paths(file.path))
        for file in files
        if file.size >= 4 and file.read_at(0, 4) == b"GGUF"
    }
    for paths in groups:
        # Of the files that were read, not of what has these names by now.
        identities = tuple(opened[os.path.realpath(path)].identity() for path in paths)
        known.remember(known.Model(tuple(map(os.path.abspath, paths)), identities))
