"""Hand a mirror to its user: views of the replicas, threads beside them, and a report."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from numaload.errors import ClosedError, NotCopyable, UsageError, printable, warn_once
from numaload.files.known import Model
from numaload.files.plan import ReadPlan
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory
from numaload.linux.placement import Placement
from numaload.linux.syscalls import binding
from numaload.machine.affinity import pinned_to
from numaload.machine.topology import Topology, topology
from numaload.replicas.build import Built
from numaload.replicas.folders import link_others
from numaload.replicas.layout import MIRROR, Share, divided, off_node, unit_of
from numaload.replicas.lease import Lease
from numaload.replicas.plan import nodes_of
from numaload.replicas.verify import Checksum, Layouts, Verified, by_node, placements_of, verify
from numaload.weights import Weights
from numaload.weights.model import Memory


@dataclass
class MirrorReport:
    """Report what was asked and what the kernel says of it. ``nbytes``: the model's, once.

    ``placements`` are by node; nodes that share a replica have the same one.
    """

    paths: list[str]
    nbytes: int
    asked: list[int]
    kind: str  # "private" to this process, "shared" in the store, "mapped": the file itself
    policy: str = MIRROR
    groups: list[Group] = field(default_factory=list)  # a replica each: the nodes that share it
    placements: dict[int, Placement] = field(default_factory=dict)
    built: list[int] = field(default_factory=list)  # nodes whose replica was made now
    copied: int = 0  # bytes that were written for that
    seconds: float = 0.0
    left_out: dict[int, str] = field(default_factory=dict)
    given_back: int = 0  # bytes of the source that were read and do not stay in page cache
    plan: ReadPlan | None = None  # how the source was read; None where nothing was built
    binding: str = ""
    unbound: list[int] = field(default_factory=list)  # placed by first touch, not bound
    holders: list[int] = field(default_factory=list)  # processes that keep the memory
    # Bytes of stripes that lie on another node than their rows; None where patterns placed some.
    off_node: int | None = 0
    note: str = ""

    @property
    def placed(self) -> bool:
        return all(placement.right for placement in self.placements.values())

    def to_dict(self) -> dict[str, Any]:
        row = {key: value for key, value in vars(self).items() if key != "placements"}
        placements = {node: p.to_dict() for node, p in self.placements.items()}
        return row | {"placements": placements, "placed": self.placed}


class Mirror(NotCopyable):
    """Hold replicas of one model, a view of each, and ways to run beside them.

    Its report, and what this machine is, are looked up when somebody wants to know.
    """

    def __init__(
        self,
        weights: Weights,
        replicas: dict[Group, list[MappedMemory]],
        groups: Sequence[Group],
        report: MirrorReport | None,
        machine: Topology | None,
        checksums: Mapping[Group, Callable[[], Sequence[Sequence[Checksum]]]],
        layouts: Layouts,
        leases: Sequence[Lease] = (),
        paths: Mapping[Group, list[str]] | None = None,
    ) -> None:
        self._report, self._asked, self.nodes = report, list(groups), nodes_of(groups)
        self._weights, self._topology, self._leases = weights, machine, list(leases)
        self.built: Built | None = None  # replicas that were made for this, without a report
        self._replicas, self._checksums, self._layouts = replicas, checksums, layouts
        self._groups = by_node({group: group for group in replicas})
        self._views: dict[Group, Weights] = {}
        self._paths = by_node(paths or {})
        self._closed = self.owns_weights = False
        self._is_mixed = any(layout and layout.only for layout in layouts.values())

    def view(self, node: int) -> Weights:
        """Return the weights on ``node`` or on its group. Raises: UsageError, ClosedError."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        if node not in self.nodes:
            raise UsageError(f"no replica on node {node}; there are on {format_list(self.nodes)}")
        group = self._groups.get(node)
        if group is None:
            return self._weights
        if group not in self._views:
            self._views[group] = self._apart(group) or Weights(
                self._weights.parts, self._replicas[group], group
            )
        return self._views[group]

    def _apart(self, group: Group) -> Weights | None:
        """Return a view of what patterns placed: its own copies, what there is once, the file."""
        if not self._is_mixed:
            return None
        apart = {}
        for name, tensor in self._weights.items():
            file, start = tensor.place_in_files
            stop = start + tensor.as_stored().nbytes
            for where in dict.fromkeys((group, self._asked[-1])):
                layout = self._layouts[where]
                if layout and start < stop and layout.covers(file, start, stop):
                    apart[name] = Memory(self._replicas[where], where)
                    break
        return Weights(self._weights.parts, nodes=group, apart=apart)

    @property
    def report(self) -> MirrorReport:
        """Report what the kernel says of it; asked when this is first looked at.

        Raises: ClosedError if it was closed before that.
        """
        if self._report is None:
            self._report = self._ask()
        return self._report

    def _ask(self) -> MirrorReport:
        if self._closed:
            raise ClosedError("this mirror was closed before the kernel was asked of its pages")
        machine, built = self._machine, self.built
        report = report_of(self._weights, machine, self._asked, "shared", built)
        old = {g: self._replicas[g] for g in self._asked if built is None or g not in built.arenas}
        report.placements |= by_node(placements_of(old, self._layouts))
        entries = [lease.entry for lease in self._leases]
        placed = [group for entry in entries if not entry.bound for group in entry.groups]
        report.unbound = nodes_of([group for group in placed if group in self._asked])
        report.policy = ", ".join(sorted({entry.policy for entry in entries}))
        report.off_node = self.off_node()
        report.holders = [entry.holder.pid for entry in entries if entry.holder]
        return report

    def off_node(self) -> int | None:
        """Return the bytes of striped replicas that lie on another node than their rows.

        None where patterns placed tensors: no layout says which of them are striped.
        """
        striped = [one for one in self._layouts.values() if one and one.stripes]
        if any(one.only for one in striped):
            return None
        return sum(off_node(self._weights, layout) for layout in striped)

    @property
    def _machine(self) -> Topology:
        if self._topology is None:
            self._topology = topology()
        return self._topology

    @property
    def model(self) -> Model:
        """Return the files that it is of, as they were when it was made."""
        return self._weights.model()

    def local(self) -> Weights:
        """Return the view nearest to the CPU that the calling thread runs on now."""
        here = self._machine.node_of_cpu(_current_cpu())
        if here is None:
            return self.view(self.nodes[0])
        return self.view(self._machine.nearest(here, self.nodes))

    def only(self, node: int | None) -> Weights:
        """Return one view, which takes over what is open here and closes it. None: the nearest.

        Raises: UsageError, ClosedError.
        """
        try:
            found = self.local() if node is None else self.view(node)
        except BaseException:
            self.close()
            raise
        found.owned = [*self._leases, *([self._weights] if self.owns_weights else [])]
        self._leases, self.owns_weights = [], False
        return found

    @contextmanager
    def pinned(self, node: int) -> Iterator[Weights]:
        """Run the calling thread on ``node``'s CPUs and see its memory; undone at the end.

        For a thread's own work, not across an ``await``: tasks of one thread share its CPUs.
        """
        view = self.view(node)
        cpus = self._machine.nodes[self._machine.threads_node(node)].usable_cpus
        with pinned_to(cpus):
            yield view

    def local_rows(self, name: str) -> Share:
        """Return which rows or experts of a tensor are on the calling thread's node.

        Of a striped replica that node's run; all of them where each node has its own replica. At
        both ends of a run there may be a part of a page that lies on a neighbour.
        Raises: TensorNotFoundError, ClosedError; UsageError where nodes take turns by blocks,
        whatever the rows.
        """
        here = self._machine.node_of_cpu(_current_cpu())
        near = self.nodes[0] if here is None else self._machine.nearest(here, self.nodes)
        return self._share(name, near)[0]

    def rows(self, name: str, threads: int) -> dict[int, list[Share]]:
        """Return {node: the rows, or experts, of each of its ``threads`` threads}.

        Every row is one thread's, on a node that has it. Warns where threads do not divide them.
        Raises: as ``local_rows``, UsageError for less than one thread.
        """
        if threads < 1:
            raise UsageError(f"threads {threads}: expected 1 or more")
        found, nodes = {}, self.nodes
        for part, node in enumerate(nodes):
            share, is_shared = self._share(name, node)
            first, last = share.start, share.stop
            if not is_shared:  # the node has all of it, and computes a part
                first, last = divided(share.size, len(nodes))[part : part + 2]
            stops = divided(last - first, threads)
            found[node] = [Share(first + a, first + b, share.unit) for a, b in pairwise(stops)]
            if (last - first) % threads:
                best = max(n for n in range(1, threads + 1) if (last - first) % n == 0)
                warn_once(
                    f"threads {threads} of {last - first}",
                    f"{name}: {last - first} {share.unit} of node {node} among {threads} threads:"
                    f" some wait for those with one more; {best} would have as many each",
                )
        return found

    def _share(self, name: str, node: int) -> tuple[Share, bool]:
        """Return which of its rows a node has, and whether other nodes have the others."""
        if self._closed:  # the weights may be the caller's, and open
            raise ClosedError("this mirror was closed")
        tensor = self._weights[name].as_stored()
        group = self._groups.get(node, (node,))
        if self._is_mixed:
            group = self.view(node).nodes_of(name) or (node,)  # where the file is, nothing is near
        layout = self._layouts.get(group)
        unit, count = unit_of(tensor, len(group))
        if len(group) == 1:
            return Share(0, count, unit), False
        found = None if layout is None else layout.run_of(tensor, node)
        if found is None:
            raise UsageError(
                f"{name}: nodes {format_list(group)} take turns by blocks of 2 MiB: node {node} has"
                " no run of rows; mirror it with policy='stripe'"
            )
        each = tensor.nbytes / max(1, count)
        start, stop = (round((border - tensor.offset) / max(1, each)) for border in found)
        return Share(start, stop, unit), True

    def addresses(self, name: str) -> dict[int, int]:
        """Return {node: address of the tensor's blocks there}, valid until ``close()``."""
        return {node: self.view(node)[name].address for node in self.nodes}

    def paths(self, node: int) -> list[str]:
        """Return the files of ``node``'s replica, in file order, for programs that open files.

        Each is the source file byte for byte, until it is released. Where nothing was copied they
        are the source files. ``Tensor.path`` always is the source.
        Raises: UsageError for replicas of this process alone, which have no files; ClosedError.
        """
        if self._is_mixed:
            raise UsageError(
                f"{self._weights.paths[0]}: its tensors were placed by patterns (place): no file"
                " has all of them; Weights alone reads them, other programs need another policy"
            )
        if self.view(node) is self._weights:
            return list(self._weights.paths)
        if node not in self._paths:
            raise UsageError("replicas of one process have no files: mirror(..., shared=True)")
        return self._paths[node]

    def folder(self, node: int) -> str:
        """Return a folder with ``node``'s replica beside links to what else the source's has.

        The replica's files have the source's names, so that any program loads the model from this
        path: transformers, diffusers, peft, vLLM, llama.cpp. Links are made when this is called.
        Who opened the files by other names, or in another folder, than they were mirrored by has a
        folder apart, with those names and what that folder has.
        Where nothing was copied it is the source's own folder.
        Raises: as ``paths``; UsageError for a model whose files are in several folders; StoreError.
        """
        paths, sources = self.paths(node), self._weights.paths
        folders = {os.path.dirname(path) for path in sources}
        if len(folders) > 1:
            raise UsageError(f"{sources[0]}: its files are in several folders, which no folder has")
        found, (source,) = os.path.dirname(paths[0]), folders
        if found == source:
            return found
        mirrored = [lease.entry for lease in self._leases if f"/{lease.entry.name}/" in found]
        apart = {}
        if any(entry.model.paths != tuple(sources) for entry in mirrored):
            own = map(os.path.basename, paths)
            apart = dict(zip(map(os.path.basename, sources), own, strict=True))
        return link_others(found, source, apart)

    def verify(self) -> Verified:
        """Ask the kernel for every page again and hash every chunk. Nothing is raised by this."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        paths = self._weights.paths
        sums = {group: found() for group, found in self._checksums.items()}
        return verify(self._replicas, paths, sums, self._layouts, self._machine)

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
        state = "closed" if self._closed else self._report.kind if self._report else "shared"
        nodes = format_list(self.nodes)
        return printable(f"<Mirror of {self._weights.paths[0]} on nodes {nodes}, {state}>")


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
    report = MirrorReport(weights.paths, weights.nbytes, asked, kind, groups=list(groups))
    report.binding = binding().name
    report.left_out = {n: why for n, why in machine.left_out.items() if n not in asked}
    if built is not None:
        report.placements, report.seconds = by_node(built.placements), built.seconds
        report.built, report.given_back = nodes_of(list(built.arenas)), built.given_back
        report.plan = built.plan
        report.copied = built.copied
        report.unbound = [] if built.bound else report.built
    return report
