"""Mirroring: one replica of a model per NUMA node, and local views of it for threads.

``mirror`` builds, ``attach`` finds what is in the store. Both give a Mirror.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Mapping as MappingType
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from numaload.errors import ClosedError, ReplicaNotFoundError, UsageError
from numaload.numa.affinity import pinned_to
from numaload.numa.lists import format_list
from numaload.numa.mapping import Mapping
from numaload.numa.placement import Placement
from numaload.numa.syscalls import binding
from numaload.numa.topology import Topology, topology
from numaload.replicas import store
from numaload.replicas.arena import private_arena, shared_arena
from numaload.replicas.build import Built, Progress, build
from numaload.replicas.plan import Plan, plan
from numaload.replicas.verify import Verified, placements_of, verify
from numaload.storage import known
from numaload.weights import Weights, open_weights

POLICIES = ("mirror",)


@dataclass
class MirrorReport:
    """What was asked and what the kernel says of it. ``nbytes`` is the model's, once."""

    paths: list[str]
    nbytes: int
    asked: list[int]
    kind: str  # "private" to this process, "shared" in the store, "mapped": the file itself
    placements: dict[int, Placement] = field(default_factory=dict)
    built: list[int] = field(default_factory=list)  # nodes whose replica was made now
    seconds: float = 0.0
    left_out: dict[int, str] = field(default_factory=dict)
    given_back: int = 0  # bytes of source page cache dropped again
    binding: str = ""
    note: str = ""

    @property
    def placed(self) -> bool:
        return all(placement.right for placement in self.placements.values())

    def to_dict(self) -> dict[str, Any]:
        row = {key: value for key, value in vars(self).items() if key != "placements"}
        placements = {node: p.to_dict() for node, p in self.placements.items()}
        return row | {"placements": placements, "placed": self.placed}


class Mirror:
    """Replicas of one model, a view of each, and ways to run beside them."""

    def __init__(
        self,
        weights: Weights,
        replicas: dict[int, list[Mapping]],
        report: MirrorReport,
        machine: Topology,
        checksums: MappingType[int, Sequence[Sequence[int]]],
        leases: Sequence[store.Lease] = (),
    ) -> None:
        self.report, self.nodes = report, sorted(report.asked)
        self._weights, self._machine, self._leases = weights, machine, list(leases)
        self._replicas, self._checksums = replicas, checksums
        self._views = {n: Weights(weights.parts, m, n) for n, m in replicas.items()}
        self._closed = self._owns_weights = False

    def view(self, node: int) -> Weights:
        """The weights in ``node``'s memory. Raises: UsageError, ClosedError."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        if node not in self.nodes:
            raise UsageError(f"no replica on node {node}; there are on {format_list(self.nodes)}")
        return self._views.get(node, self._weights)

    def local(self) -> Weights:
        """The view nearest to the CPU that the calling thread runs on now."""
        here = self._machine.node_of_cpu(_current_cpu())
        if here is None:
            return self.view(self.nodes[0])
        return self.view(self._machine.nearest(here, self.nodes))

    @contextmanager
    def pinned(self, node: int) -> Iterator[Weights]:
        """Run the calling thread on ``node``'s CPUs and see its memory; undone at the end."""
        view = self.view(node)
        cpus = self._machine.nodes[self._machine.threads_node(node)].usable_cpus
        with pinned_to(cpus):
            yield view

    def addresses(self, name: str) -> dict[int, int]:
        """{node: address of the tensor's blocks there}, valid until ``close()``."""
        return {node: self.view(node)[name].address for node in self.nodes}

    def verify(self) -> Verified:
        """Ask the kernel for every page again and hash every chunk. Nothing is raised by this."""
        if self._closed:
            raise ClosedError("this mirror was closed")
        return verify(self._replicas, self.report.paths, self._checksums, self._machine)

    def close(self) -> None:
        """Let go. Memory is unmapped when the last array of it is gone; addresses end now."""
        self._closed = True
        for view in self._views.values():
            view.close()
        for mappings in self._replicas.values():
            for mapping in mappings:
                mapping.close()
        for lease in self._leases:
            lease.close()
        self._leases.clear()
        if self._owns_weights:
            self._weights.close()

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.report.kind
        return f"<Mirror of {self.report.paths[0]} on nodes {format_list(self.nodes)}, {state}>"


def _current_cpu() -> int:
    """The CPU this thread was last seen on (field 39 of /proc/thread-self/stat)."""
    with open("/proc/thread-self/stat", encoding="ascii", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[36])


def mirror(
    weights: Weights | str | os.PathLike[str],
    nodes: str | int | Sequence[int] = "all",
    policy: str = "mirror",
    *,
    shared: bool = False,
    progress: Progress | None = None,
) -> Mirror:
    """Put a verified replica of the model into each of these nodes' own memory.

    nodes: "all" (with CPUs and memory), "0,2-3", "!1", "local", an id or ids.
    shared: keep them in the store, for other processes and after this one, until released;
    otherwise they are this process's. On a machine with one node nothing is copied unless shared:
    the view is the mapped file, and ``report.note`` says so.
    progress(bytes done, bytes in all): returning False cancels.
    Raises: NodeMemoryError before anything is touched if it does not fit; PlacementError,
    ChecksumError, ReadError, FileChangedError, CancelledError, StoreError: then nothing is left.
    """
    if policy not in POLICIES:
        raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
    machine = topology()
    chosen = machine.select(nodes)

    def make(opened: Weights) -> Mirror:
        if shared:
            return mirror_shared([opened], machine, chosen, progress)[0]
        if len(machine.usable) == 1:
            return _mapped(opened, machine, chosen)
        return _private(opened, machine, chosen, progress)

    return _opened(weights, make)


def _opened(what: Weights | str | os.PathLike[str], make: Callable[[Weights], Mirror]) -> Mirror:
    """Weights that were opened here are closed with the mirror, or with its failure."""
    if isinstance(what, Weights):
        return make(what)
    opened = open_weights(what)
    try:
        made = make(opened)
    except BaseException:
        opened.close()
        raise
    made._owns_weights = True  # noqa: SLF001
    return made


def _private(
    opened: Weights, machine: Topology, chosen: list[int], progress: Progress | None
) -> Mirror:
    plan([(opened.model(), chosen)], machine, shared=False).check()
    files = [part.file for part in opened.parts]
    built = build(files, chosen, private_arena, machine, progress)
    report = _report(opened, machine, chosen, "private", built)
    replicas = {n: [arena.mapping for arena in row] for n, row in built.arenas.items()}
    return Mirror(opened, replicas, report, machine, dict.fromkeys(chosen, built.checksums))


def _mapped(weights: Weights, machine: Topology, nodes: list[int]) -> Mirror:
    report = _report(weights, machine, nodes, "mapped", None)
    report.note = "one NUMA node: nothing was copied, the view is the mapped file"
    return Mirror(weights, {}, report, machine, {})


def _report(
    weights: Weights, machine: Topology, nodes: list[int], kind: str, built: Built | None
) -> MirrorReport:
    report = MirrorReport(weights.paths, weights.nbytes, nodes, kind, binding=binding().name)
    report.left_out = {n: why for n, why in machine.left_out.items() if n not in nodes}
    if built is not None:
        report.placements, report.seconds = built.placements, built.seconds
        report.built, report.given_back = list(built.arenas), built.given_back
    return report


def plan_shared(models: Sequence[Weights], machine: Topology, nodes: Sequence[int]) -> Plan:
    """What ``mirror_shared`` would build: nodes that have no replica of a model yet."""
    builds = []
    there: dict[str, set[int]] = {}
    for weights in models:
        model = weights.model()
        if model.key not in there:
            there[model.key] = {node for entry in store.find(model) for node in entry.nodes}
        builds.append((model, [node for node in nodes if node not in there[model.key]]))
        there[model.key].update(nodes)  # the same model once more needs nothing more
    return plan(builds, machine, shared=True)


def mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    nodes: Sequence[int],
    progress: Progress | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> list[Mirror]:
    """Put replicas of all these models into the store. Nothing is built unless all of them fit.

    announce: called with the plan before it is checked and carried out.
    """
    with store.building() as folder:
        todo = plan_shared(models, machine, nodes)
        if announce:
            announce(todo)
        todo.check()
        with ExitStack() as failed:
            done = []
            for weights, (model, missing) in zip(models, todo.builds, strict=True):
                built = None
                if missing:
                    built = _build_shared(weights, model, missing, machine, folder, progress)
                known.remember(model)
                done.append(_attach(weights, machine, list(nodes), built))
                failed.callback(done[-1].close)
            failed.pop_all()
    return done


def _build_shared(
    weights: Weights,
    model: known.Model,
    nodes: Sequence[int],
    machine: Topology,
    folder: int,
    progress: Progress | None,
) -> Built:
    files = [part.file for part in weights.parts]
    built = build(
        files, nodes, lambda size, node: shared_arena(size, node, folder), machine, progress
    )
    try:
        store.publish(model, built, folder)
    finally:
        built.close()
    return built


def attach(
    path: str | os.PathLike[str] | Weights, nodes: str | int | Sequence[int] | None = None
) -> Mirror:
    """The replicas of this model that are in the store, for this process to use.

    nodes: which are needed; by default all that is there. Where their pages are is asked of the
    kernel, for ``report``; ``verify()`` asks again and checks the checksums too.
    Raises: ReplicaNotFoundError, saying whether the file changed since it was mirrored.
    """
    machine = topology()
    wanted = None if nodes is None else machine.select(nodes)
    return _opened(path, lambda weights: _attach(weights, machine, wanted, None))


def _attach(
    weights: Weights, machine: Topology, wanted: list[int] | None, built: Built | None
) -> Mirror:
    model = weights.model()
    by_node = {node: entry for entry in store.find(model) for node in entry.nodes}
    nodes = sorted(by_node) if wanted is None else wanted
    missing = [node for node in nodes if node not in by_node]
    if missing or not nodes:
        raise ReplicaNotFoundError(_why_missing(weights, model, missing))
    with ExitStack() as failed:
        leases: dict[str, store.Lease] = {}
        for entry in (by_node[node] for node in nodes):
            if entry.name not in leases:
                leases[entry.name] = store.Lease(entry)
                failed.callback(leases[entry.name].close)
        replicas = {node: leases[by_node[node].name].map(node) for node in nodes}
        report = _report(weights, machine, nodes, "shared", built)
        report.placements |= placements_of({n: replicas[n] for n in nodes if n not in report.built})
        sums = {node: by_node[node].checksums for node in nodes}
        failed.pop_all()
    return Mirror(weights, replicas, report, machine, sums, list(leases.values()))


def verify_entry(entry: store.Entry, machine: Topology) -> Verified:
    """What ``Mirror.verify`` does, of an entry of the store whose source may be gone.

    Raises: StoreError for replicas that cannot be mapped.
    """
    lease = store.Lease(entry)
    try:
        replicas = {node: lease.map(node) for node in entry.nodes}
        sums = dict.fromkeys(entry.nodes, entry.checksums)
        return verify(replicas, entry.model.paths, sums, machine)
    finally:
        lease.close()


def _why_missing(weights: Weights, model: known.Model, missing: list[int]) -> str:
    where = f" on node {format_list(missing)}" if missing else ""
    for entry in store.entries():
        if entry.model.paths == model.paths and entry.model.key != model.key:
            when = time.strftime("%H:%M", time.localtime(entry.created))
            return (
                f"{weights.paths[0]}: changed since it was mirrored at {when};"
                f" numaload mirror {weights.paths[0]}"
            )
    return f"{weights.paths[0]}: no replica{where}: numaload mirror {weights.paths[0]}"
