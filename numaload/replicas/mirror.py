"""Put replicas of a model into NUMA nodes' own memory, and find those that are there.

``mirror`` builds them, ``attach`` finds them in the store; both return a Mirror. Replicas of the
store are built once, and every process of the user attaches them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from numaload.errors import (
    NumaloadError,
    NumaUnavailableError,
    ReplicaNotFoundError,
    StoreError,
    UsageError,
    reason,
    warn_once,
)
from numaload.files import known
from numaload.files.reader import Progress
from numaload.files.residency import give_back
from numaload.files.source import io_timeout as waiting
from numaload.linux.lists import Group, format_list
from numaload.machine import userdir
from numaload.machine.probe import why_not_bound
from numaload.machine.topology import Topology, topology
from numaload.replicas import store
from numaload.replicas.arena import held_memory, private_memory, store_memory
from numaload.replicas.build import Built, build
from numaload.replicas.entry import Entry
from numaload.replicas.lease import Lease
from numaload.replicas.plan import HELD, PRIVATE, STORED, Build, MirrorPlan, nodes_of, plan
from numaload.replicas.verify import Verified, by_node, placements_of, verify
from numaload.replicas.views import Mirror, report_of
from numaload.weights import Weights, open_weights

POLICIES = ("mirror",)


def mirror(
    weights: Weights | str | os.PathLike[str],
    nodes: str | int | Sequence[int] = "all",
    policy: str = "mirror",
    *,
    per: str = "node",
    shared: bool = False,
    hold: bool = False,
    strict: bool = False,
    drop_source: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
) -> Mirror:
    """Put a verified replica of the model into each of these nodes' own memory.

    nodes: "all" (with CPUs and memory), "0,2-3", "!1", "local", an id or ids.
    per: "node", or "socket": one replica for these nodes of each socket, interleaved over them.
    shared: keep them in the store, for other processes and after this one, until released;
    otherwise only this process has them. On a machine with one node nothing is copied unless
    shared: the view is the mapped file, and ``report.note`` says so.
    hold: shared, by a holder process: not limited by the tmpfs, not emptied at logout.
    strict: refuse where memory cannot be bound. Otherwise threads on the nodes touch it first, and
    if the kernel then counts every page where it was asked for, ``report.unbound`` names the nodes.
    drop_source: give back all page cache of the files, not only what reading them brought in.
    io_timeout: seconds to wait for an answer of a network file system, then StalledError.
    progress(bytes done, bytes in all): returning False cancels.
    Raises: NodeMemoryError before anything is touched if it does not fit; NumaUnavailableError,
    PlacementError, ChecksumError, ReadError, FileChangedError, CancelledError, StoreError: then
    nothing is left.
    """
    if policy not in POLICIES:
        raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
    if hold and not shared:
        raise UsageError("hold: only shared replicas have a holder (shared=True)")
    machine = topology()
    groups = machine.groups(machine.select(nodes), per)
    options = MirrorOptions(groups, hold=hold, strict=strict, drop_source=drop_source)

    opened = [part.file for part in weights.parts] if isinstance(weights, Weights) else []
    with waiting(io_timeout, opened), _opened(weights) as model:
        if shared:
            made = mirror_shared([model], machine, options, progress)[0]
        elif len(machine.usable) == 1:
            made = _mapped(model, machine, groups)
        else:
            made = private(model, machine, options, progress)
        made.owns_weights = model is not weights
        return made


def attach(
    path: str | os.PathLike[str] | Weights, nodes: str | int | Sequence[int] | None = None
) -> Mirror:
    """Return the replicas of this model that are in the store, for this process to use.

    nodes: which are needed; by default all that is there. The kernel is asked where
    their pages are, for ``report``; ``verify()`` asks again and checks the checksums too.
    Raises: ReplicaNotFoundError, saying whether the file changed since it was mirrored.
    """
    machine = topology()
    needed = None if nodes is None else machine.select(nodes)
    with _opened(path) as weights:
        made = _attach_shared(weights, machine, needed)
        made.owns_weights = weights is not path
        return made


@contextmanager
def _opened(what: Weights | str | os.PathLike[str]) -> Iterator[Weights]:
    """Open weights if only a path is given, and close those again if anything fails."""
    if isinstance(what, Weights):
        yield what
        return
    weights = open_weights(what)
    try:
        yield weights
    except BaseException:
        weights.close()
        raise


@dataclass(frozen=True)
class MirrorOptions:
    """Say what to build: a replica for each group of nodes.

    hold: a holder process keeps it. strict: bind it or do not build it.
    drop_source: give back all page cache of the files, also what was there before.
    """

    groups: Sequence[Group]
    hold: bool = False
    strict: bool = False
    drop_source: bool = False

    @property
    def kept(self) -> str:
        """Return who keeps a shared replica: a holder, or the store's tmpfs."""
        return HELD if self.hold else STORED


def can_bind(options: MirrorOptions, machine: Topology) -> bool:
    """Return whether memory can be bound here; if not, warn that first touch places it.

    Raises: NumaUnavailableError where first touch cannot do, or may not (strict).
    """
    nodes = nodes_of(options.groups)
    refused = why_not_bound(nodes)
    if refused is None:
        return True
    if options.strict:
        raise refused
    bare = [node for node in nodes if not machine.nodes[node].usable_cpus]
    if bare and len(machine.usable) > 1:
        raise NumaUnavailableError(
            f"{refused}; without binding only a node's own CPUs can place memory on it, and node"
            f" {format_list(bare)} has none that this process may use",
            call=refused.call,
            node=bare[0],
            errno=refused.errno or 0,
        )
    warn_once(
        "first touch",
        f"{refused}; threads on each node place its memory by first touch, and it is counted then",
    )
    return False


def fitted(
    builds: Sequence[Build],
    models: Sequence[Weights],
    machine: Topology,
    *,
    kept: str,
    bound: bool,
) -> MirrorPlan:
    """Return the plan, after giving back page cache of the models where it needs that room.

    Bound memory pushes page cache out by itself; first touch would go to another node instead.
    """
    before = plan(builds, machine, kept=kept, bound=bound)
    if before.fits or bound:
        return before
    for weights in models:
        for part in weights.parts:
            give_back(part.file, [(0, part.file.size)])
    after = plan(builds, machine, kept=kept, bound=bound)
    if after.fits:
        warn_once("room", "page cache of the source was given back: the plan needs its room")
    return after


def private(
    weights: Weights, machine: Topology, options: MirrorOptions, progress: Progress | None
) -> Mirror:
    """Build replicas for this process alone."""
    groups, bound = options.groups, can_bind(options, machine)
    builds = [(weights.model(), groups)]
    fitted(builds, [weights], machine, kept=PRIVATE, bound=bound).check()
    files = [part.file for part in weights.parts]
    memory, drop = private_memory(bound=bound), options.drop_source
    built = build(files, groups, memory, machine, progress, bound=bound, drop_source=drop)
    report = report_of(weights, machine, groups, "private", built)
    replicas = {group: [arena.mapping for arena in row] for group, row in built.arenas.items()}
    return Mirror(weights, replicas, report, machine, dict.fromkeys(groups, built.checksums))


def _mapped(weights: Weights, machine: Topology, groups: Sequence[Group]) -> Mirror:
    """Return the opened file itself as the only view: there is one node."""
    report = report_of(weights, machine, groups, "mapped")
    report.note = "one NUMA node: nothing was copied, the view is the opened file itself"
    return Mirror(weights, {}, report, machine, {})


def plan_shared(models: Sequence[Weights], machine: Topology, options: MirrorOptions) -> MirrorPlan:
    """Return what ``mirror_shared`` would build: the groups of nodes that lack a replica.

    A store that cannot be used is reported, and the plan made as if it were empty.
    Raises: StoreError where a replica is there that is not what the options ask for.
    """
    builds = _missing(models, options, building=False)
    bound = can_bind(options, machine)
    return plan(builds, machine, kept=options.kept, bound=bound)


def _missing(models: Sequence[Weights], options: MirrorOptions, *, building: bool) -> list[Build]:
    """Return each model with its groups of nodes that have no replica yet."""
    builds: list[Build] = []
    there: dict[str, set[Group]] = {}
    for weights in models:
        model = weights.model()
        if model.key not in there:
            found = _found(model, building=building)
            _check_kind(weights, [e for g, e in found.items() if g in options.groups], options)
            there[model.key] = set(found)
        builds.append((model, tuple(g for g in options.groups if g not in there[model.key])))
        there[model.key].update(options.groups)  # the same model once more needs nothing more
    return builds


def _found(model: known.Model, *, building: bool) -> dict[Group, Entry]:
    try:
        return store.find(model)
    except StoreError as error:
        if building:
            raise
        warn_once(str(error), f"{error}; planned as if nothing were in the store")
        return {}


def _check_kind(weights: Weights, found: Sequence[Entry], options: MirrorOptions) -> None:
    lacks = {
        "without a holder": options.hold and any(entry.holder is None for entry in found),
        "placed, not bound": options.strict and not all(entry.bound for entry in found),
    }
    for what, holds in lacks.items():
        if holds:
            path = weights.paths[0]
            raise StoreError(
                f"{path}: is mirrored already, {what}; release it first: numaload release {path}"
            )


def mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    options: MirrorOptions,
    progress: Progress | None = None,
    announce: Callable[[MirrorPlan], None] | None = None,
) -> list[Mirror]:
    """Put replicas of all these models into the store. Nothing is built unless all of them fit.

    announce: called with the plan before it is checked and carried out. If another process
    releases replicas meanwhile, all is done once more.
    Raises: ReplicaNotFoundError if that happens again.
    """
    try:
        return _mirror_shared(models, machine, options, progress, announce)
    except ReplicaNotFoundError as error:
        warn_once("released", f"replicas were released meanwhile ({error}); mirroring once more")
    try:
        return _mirror_shared(models, machine, options, progress, announce)
    except ReplicaNotFoundError as error:
        paths = ", ".join(weights.paths[0] for weights in models)
        raise ReplicaNotFoundError(
            f"{paths}: replicas were released by another process while they were mirrored, twice"
        ) from error


def _mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    options: MirrorOptions,
    progress: Progress | None,
    announce: Callable[[MirrorPlan], None] | None,
) -> list[Mirror]:
    with store.building() as folder:
        bound = can_bind(options, machine)
        builds = _missing(models, options, building=True)
        todo = fitted(builds, models, machine, kept=options.kept, bound=bound)
        if announce:
            announce(todo)
        todo.check()
        memory = held_memory(bound=bound) if options.hold else store_memory(folder, bound=bound)
        with ExitStack() as failed:
            done = []
            for weights, (model, missing) in zip(models, todo.builds, strict=True):
                built = None
                if missing:
                    files = [part.file for part in weights.parts]
                    drop = options.drop_source
                    built = build(
                        files, missing, memory, machine, progress, bound=bound, drop_source=drop
                    )
                    _publish(model, built, folder, hold=options.hold)
                known.remember(model)
                done.append(_attach(weights, machine, list(options.groups), built))
                failed.callback(done[-1].close)
            failed.pop_all()
    return done


def _publish(model: known.Model, built: Built, folder: int, *, hold: bool) -> None:
    try:
        store.publish(model, built, folder, hold=hold)
    except NumaloadError:
        raise
    except OSError as error:
        raise StoreError(
            f"{model.paths[0]}: cannot be published in {userdir.path()}: {reason(error)}"
        ) from error
    finally:
        built.close()


def _attach_shared(weights: Weights, machine: Topology, needed: Sequence[int] | None) -> Mirror:
    """Attach the replicas on the ``needed`` nodes; None: every replica that is there."""
    found = store.find(weights.model())
    if not found:
        raise ReplicaNotFoundError(_why_missing(weights, ()))
    if needed is None:
        return _attach(weights, machine, sorted(found), None)
    serving = by_node({group: group for group in found})
    missing = [node for node in needed if node not in serving]
    if missing:
        raise ReplicaNotFoundError(_why_missing(weights, missing))
    groups = sorted({serving[node] for node in needed})
    return _attach(weights, machine, groups, None)


def _attach(
    weights: Weights, machine: Topology, groups: Sequence[Group], built: Built | None
) -> Mirror:
    found = store.find(weights.model())
    missing = [group for group in groups if group not in found]
    if missing:
        raise ReplicaNotFoundError(_why_missing(weights, nodes_of(missing)))
    with ExitStack() as failed:
        leases: dict[str, Lease] = {}
        for entry in (found[group] for group in groups):
            if entry.name not in leases:
                leases[entry.name] = Lease(entry)
                failed.callback(leases[entry.name].close)
        replicas = {group: leases[found[group].name].map(group) for group in groups}
        report = report_of(weights, machine, groups, "shared", built)
        old = {g: m for g, m in replicas.items() if built is None or g not in built.arenas}
        report.placements |= by_node(placements_of(old))
        entries = [lease.entry for lease in leases.values()]
        report.unbound = _unbound(entries, groups)
        report.holders = [entry.holder.pid for entry in entries if entry.holder]
        sums = {group: found[group].checksums for group in groups}
        paths = {group: found[group].paths(group) for group in groups}
        failed.pop_all()
    return Mirror(weights, replicas, report, machine, sums, list(leases.values()), paths)


def _unbound(entries: Iterable[Entry], groups: Sequence[Group]) -> list[int]:
    return nodes_of([g for e in entries if not e.bound for g in e.groups if g in groups])


def verify_entry(entry: Entry, machine: Topology) -> Verified:
    """Verify an entry of the store as ``Mirror.verify`` does; its source may be gone.

    Raises: StoreError for replicas that cannot be mapped.
    """
    lease = Lease(entry)
    try:
        replicas = {group: lease.map(group) for group in entry.groups}
        sums = dict.fromkeys(entry.groups, entry.checksums)
        return verify(replicas, entry.model.paths, sums, machine)
    finally:
        lease.close()


def _why_missing(weights: Weights, missing: Sequence[int]) -> str:
    model = weights.model()
    where = f" on node {format_list(missing)}" if missing else ""
    found = () if store.find(model) else store.entries()
    for entry in found:
        if entry.model.paths == model.paths and entry.model.key != model.key:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created))
            return (
                f"{weights.paths[0]}: changed since it was mirrored on {when};"
                f" mirror it again: numaload mirror {weights.paths[0]}"
            )
    return f"{weights.paths[0]}: no replica{where}; build it: numaload mirror {weights.paths[0]}"
