"""Prewarming: bring whole files into the page cache with large parallel reads."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

from numaload.errors import (
    NodeMemoryError,
    NumaUnavailableError,
    ReadError,
    SplitError,
    UsageError,
    warn_once,
)
from numaload.formats.shards import SUFFIX
from numaload.formats.splits import is_there
from numaload.numa import memory, syscalls
from numaload.numa.affinity import pin
from numaload.numa.lists import format_list
from numaload.numa.topology import Topology, topology
from numaload.storage import known
from numaload.storage.files import SourceFile, model_paths
from numaload.storage.parallel import CHUNK, Job, Progress, pieces
from numaload.storage.residency import Residency, cached_on, residency

LITTLE = 16  # a share of the bytes that may be read once more
POLICIES = {"bind": syscalls.MPOL_BIND, "interleave": syscalls.MPOL_INTERLEAVE}


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

    what: a path (of safetensors also an index or a folder), opened weights, or several of them.
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
    models = _models(what)
    real = {path: _real(path) for paths in models for path in paths}
    whole = {real[path]: path for path in real}
    files = [SourceFile(path) for path in whole.values()]
    try:
        report = _prewarm(files, machine, selected, policy, threads, force, progress)
        opened = dict(zip(whole, files, strict=True))
        _remember({path: opened[real[path]] for path in real}, models)
        return report
    finally:
        for file in files:
            file.close()


def _real(path: str) -> str:
    try:
        return os.path.realpath(path)
    except ValueError as error:  # a NUL in it
        raise ReadError(str(error), path=path) from error


def _models(what: Source | Sequence[Source]) -> list[list[str]]:
    """The files of each."""
    if isinstance(what, (str, os.PathLike)):
        return [model_paths(os.fspath(what))]
    if isinstance(what, Sequence):
        return [paths for one in what for paths in _models(one)]
    return [what.paths]


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
    after = before = [residency(file) for file in files]
    absent = _absent(before)
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
        job = _Prewarming(files, before, absent, progress)
        report.threads = job.read(machine, nodes, policy, threads)
        after = [residency(file) for file in files]
        if report.residency_known and 0 < (lost := _absent(after)) <= report.size // LITTLE:
            # Some machines page out what is idle at any time: this is not what lacks memory.
            _Prewarming(files, after, lost, None).read(machine, nodes, policy, threads)
            report.read += lost
            after = [residency(file) for file in files]
    report.resident = sum(found.resident for found in after)
    if nodes:
        report.on_nodes = _locate(files, after)
    report.seconds = time.perf_counter() - begin
    return report


def _absent(found: list[Residency]) -> int:
    return sum(one.size - one.resident for one in found)


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


class _Prewarming(Job):
    """Reading what is absent, into buffers that are thrown away."""

    def __init__(
        self,
        files: list[SourceFile],
        before: list[Residency],
        total: int,
        progress: Progress | None,
    ) -> None:
        super().__init__(pieces(found.absent for found in before), total, progress)
        self.files = files

    def read(
        self, machine: Topology, nodes: list[int], policy: str | None, threads: int | None
    ) -> int:
        """Read everything; how many threads did."""
        cpus = machine.cpus
        if nodes:
            cpus = machine.cpus_of(nodes)
        count = self.threads(cpus, threads)
        # Threads of this job alone: the memory policy ends with them.
        places = [machine.cpus_of([node]) for node in nodes]
        self.run(partial(self._read, nodes, policy, places), cpus, count, "numaload-prewarm")
        return count

    def _read(self, nodes: list[int], policy: str | None, places: list[frozenset[int]]) -> None:
        bound = policy is None or _set_policy(policy, nodes)
        buffer = memoryview(bytearray(CHUNK))
        for piece in self:
            if not bound:
                pin(places[piece.offset // CHUNK % len(places)])
            self.files[piece.which].read_into(buffer[: piece.nbytes], piece.offset)
            self.advance(piece.nbytes)


def _set_policy(policy: str, nodes: list[int]) -> bool:
    """False where that is refused, as in a container: then page cache lands where it is read."""
    try:
        syscalls.set_mempolicy(POLICIES[policy], nodes)
    except NumaUnavailableError as error:
        warn_once("set_mempolicy", f"{error}; read by threads on these nodes and counted after")
        return False
    return True


def _locate(files: list[SourceFile], found: list[Residency]) -> dict[int, int]:
    on: Counter[int] = Counter()
    for file, resident in zip(files, found, strict=True):
        # Where the kernel does not tell what is resident, all of it was read just now.
        on.update(cached_on(file, resident if resident.known else Residency(file.size, ())))
    return dict(sorted(on.items()))


def _remember(files: Mapping[str, SourceFile], models: Sequence[Sequence[str]]) -> None:
    """Models only: a bare ``mirror`` shall not pick up any file that was ever warmed.

    files: {path: file}, those that were read, whatever has these names by now.
    Raises: SplitError for a model of which a file is gone.
    """
    for paths in set(map(tuple, models)):
        gone = [path for path in paths if not is_there(path)]
        if gone and len(paths) > 1:
            message = f"went away while {len(paths)} files of one model were read"
            raise SplitError(message, path=gone[0])
        its = [files[path] for path in paths]
        if _is_model(its[0]):
            identities = tuple(file.identity() for file in its)
            known.remember(known.Model(tuple(map(os.path.abspath, paths)), identities))


def _is_model(file: SourceFile) -> bool:
    return file.path.endswith(SUFFIX) or file.read_at(0, min(4, file.size)) == b"GGUF"
