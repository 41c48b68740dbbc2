"""Hand a mirror to its user: views of the replicas, threads beside them, and a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from numaload.errors import ClosedError, NotCopyable, UsageError, printable
from numaload.files.plan import ReadPlan
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory
from numaload.linux.placement import Placement
from numaload.linux.syscalls import binding
from numaload.machine.affinity import pinned_to
from numaload.machine.topology import Topology
from numaload.replicas.build import Built
from numaload.replicas.lease import Lease
from numaload.replicas.plan import nodes_of
from numaload.replicas.verify import Verified, by_node, verify
from numaload.weights import Weights


@dataclass
class MirrorReport:
    """Report what was asked and what the kernel says of it. ``nbytes``: the model's, once.

    ``placements`` are by node; nodes that share a replica have the same one.
    """

    paths: list[str]
    nbytes: int
    asked: list[int]
    kind: str  # "private" to this process, "shared" in the store, "mapped": the file itself
    groups: list[Group] = field(default_factory=list)  # a replica each: the nodes that share it
    placements: dict[int, Placement] = field(default_factory=dict)
    built: list[int] = field(default_factory=list)  # nodes whose replica was made now
    copied: int = 0  # bytes that were written for that
    seconds: float = 0.0
    left_out: dict[int, str] = field(default_factory=dict)
    given_back: int = 0  # bytes of source page cache dropped again
    plan: ReadPlan | None = None  # how the source was read; None where nothing was built
    binding: str = ""
    unbound: list[int] = field(default_factory=list)  # placed by first touch, not bound
    holders: list[int] = field(default_factory=list)  # processes that keep the memory
    note: str = ""

    @property
    def placed(self) -> bool:
        return all(placement.right for placement in self.placements.values())

    def to_dict(self) -> dict[str, Any]:
        row = {key: value for key, value in vars(self).items() if key != "placements"}
        placements = {node: p.to_dict() for node, p in self.placements.items()}
        return row | {"placements": placements, "placed": self.placed}


class Mirror(NotCopyable):
    """Hold replicas of one model, a view of each, and ways to run beside them."""

    def __init__(
        self,
        weights: Weights,
        replicas: dict[Group, list[MappedMemory]],
        report: MirrorReport,
        machine: Topology,
        checksums: Mapping[Group, Sequence[Sequence[int]]],
        leases: Sequence[Lease] = (),
        paths: Mapping[Group, list[str]] | None = None,
    ) -> None:
        self.report, self.nodes = report, sorted(report.asked)
        self._weights, self._machine, self._leases = weights, machine, list(leases)
        self._replicas, self._checksums = replicas, checksums
        self._views = by_node({g: Weights(weights.parts, m, g) for g, m in replicas.items()})
        self._paths = by_node(paths or {})
        self._closed = self.owns_weights = False

    def view(self, node: int) -> Weights:
        """Return the weights on ``node`` or on its group. Raises: UsageError, ClosedError."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        if node not in self.nodes:
            raise UsageError(f"no replica on node {node}; there are on {format_list(self.nodes)}")
        return self._views.get(node, self._weights)

    def local(self) -> Weights:
        """Return the view nearest to the CPU that the calling thread runs on now."""
        here = self._machine.node_of_cpu(_current_cpu())
        if here is None:
            return self.view(self.nodes[0])
        return self.view(self._machine.nearest(here, self.nodes))

    @contextmanager
    def pinned(self, node: int) -> Iterator[Weights]:
        """Run the calling thread on ``node``'s CPUs and see its memory; undone at the end.

        For a thread's own work, not across an ``await``: tasks of one thread share its CPUs.
        """
        view = self.view(node)
        cpus = self._machine.nodes[self._machine.threads_node(node)].usable_cpus
        with pinned_to(cpus):
            yield view

    def addresses(self, name: str) -> dict[int, int]:
        """Return {node: address of the tensor's blocks there}, valid until ``close()``."""
        return {node: self.view(node)[name].address for node in self.nodes}

    def paths(self, node: int) -> list[str]:
        """Return the files of ``node``'s replica, in file order, for programs that open files.

        Each is the source file byte for byte, until it is released. Where nothing was copied they
        are the source files. ``Tensor.path`` always is the source.
        Raises: UsageError for replicas of this process alone, which have no files; ClosedError.
        """
        if self.view(node) is self._weights:
            return list(self._weights.paths)
        if node not in self._paths:
            raise UsageError("replicas of one process have no files: mirror(..., shared=True)")
        return self._paths[node]

    def verify(self) -> Verified:
        """Ask the kernel for every page again and hash every chunk. Nothing is raised by this."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        return verify(self._replicas, self.report.paths, self._checksums, self._machine)

    def close(self) -> None:
        """Let go of the replicas. Memory is unmapped with its last array; addresses end now."""
        self._closed = True
        for view in self._views.values():
            view.close()
        for mappings in self._replicas.values():
            for mapping in mappings:
                mapping.close()
        for lease in self._leases:
            lease.close()
        self._leases.clear()
        if self.owns_weights:
            self._weights.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.report.kind
        nodes = format_list(self.nodes)
        return printable(f"<Mirror of {self.report.paths[0]} on nodes {nodes}, {state}>")


def _current_cpu() -> int:
    """Return the CPU this thread ran on last (field 39 of /proc/thread-self/stat); -1: unknown."""
    try:
        with open("/proc/thread-self/stat", encoding="ascii", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[36])
    except (OSError, IndexError):
        return -1


def report_of(
    weights: Weights,
    machine: Topology,
    groups: Sequence[Group],
    kind: str,
    built: Built | None = None,
) -> MirrorReport:
    """Return the report of replicas that are there; ``built``: those that were made now."""
    asked = nodes_of(groups)
    report = MirrorReport(weights.paths, weights.nbytes, asked, kind, list(groups))
    report.binding = binding().name
    report.left_out = {n: why for n, why in machine.left_out.items() if n not in asked}
    if built is not None:
        report.placements, report.seconds = by_node(built.placements), built.seconds
        report.built, report.given_back = nodes_of(list(built.arenas)), built.given_back
        report.plan = built.plan
        report.copied = weights.nbytes * len(built.arenas)
        report.unbound = [] if built.bound else report.built
    return report
