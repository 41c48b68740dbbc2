"""Put replicas of a model into NUMA nodes' own memory, and find those that are there.

``mirror`` builds them, ``attach`` finds them in the store; both return a Mirror. Replicas of the
store are built once, and every process of the user attaches them.
"""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from numaload import trace
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
from numaload.linux.placement import Placement
from numaload.machine import userdir
from numaload.machine.probe import why_not_bound
from numaload.machine.topology import Topology, topology
from numaload.replicas import pools, reclaim, store
from numaload.replicas.arena import held_memory, hugetlb_lacks, private_memory, store_memory
from numaload.replicas.build import Built, build
from numaload.replicas.entry import BASE, Entry
from numaload.replicas.layout import (
    BIND,
    INTERLEAVE,
    MIRROR,
    MIXED,
    POLICIES,
    STRIPE,
    Layout,
    Place,
    check_place,
    in_turn,
    kernel_weights,
    placed_by,
    striped,
    sums_of,
)
from numaload.replicas.lease import Lease, damage
from numaload.replicas.plan import (
    HELD,
    NO_BUDGET,
    PRIVATE,
    STORED,
    Build,
    MirrorPlan,
    nodes_of,
    plan,
)
from numaload.replicas.verify import Verified, by_node, placements_of, verify
from numaload.replicas.views import Mirror, report_of
from numaload.weights import Weights, open_weights


@trace.spanned("mirror")
def mirror(
    weights: Weights | str | os.PathLike[str],
    nodes: str | int | Sequence[int] = "all",
    policy: str = MIRROR,
    *,
    ratio: Mapping[int, int] | None = None,
    place: Place = (),
    per: str = "node",
    shared: bool = False,
    hold: bool = False,
    pool: str = "",
    keep: bool = False,
    strict: bool = False,
    hugetlb: bool = False,
    drop_source: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
) -> Mirror:
    """Put verified replicas of the model into these nodes' own memory.

    nodes: "all" (with CPUs and memory), "0,2-3", "!1", "local", an id or ids.
    policy: "mirror": a replica for each node; "interleave": one, whose blocks of 2 MiB take turns;
    "stripe": one, of whose every tensor each node has a run of rows or experts; "bind": one, on the
    only node that is named.
    ratio: of "interleave": {node: blocks that it takes in turn}; by default the kernel's own
    weights, or one each.
    place: instead of one policy for all, (pattern, policy) for tensors whose names the pattern is
    in; the first that matches counts. "skip" leaves a tensor where the file is, "bind:1" puts it on
    node 1. Then ``Weights`` alone sees them: there is no file for other programs.
    per: "node", or "socket": one replica for these nodes of each socket, interleaved over them.
    shared: keep them in the store, for other processes and after this one, until released;
    otherwise only this process has them. On a machine with one node nothing is copied unless
    shared: the view is the mapped file, and ``report.note`` says so.
    hold: shared, by a holder process: not limited by the tmpfs, not emptied at logout.
    pool: of shared replicas: for room others of this pool go that nobody uses; "base" if not said.
    keep: shared, and never goes for room.
    strict: refuse where memory cannot be bound. Otherwise threads on the nodes touch it first, and
    if the kernel then counts every page where it was asked for, ``report.unbound`` names the nodes.
    hugetlb: take huge pages that the administrator set aside on each node; where there are too few,
    which is said, ordinary memory. Not of shared replicas: such pages hold no file of any size.
    drop_source: give back all page cache of the files, not only what reading them brought in.
    io_timeout: seconds to wait for an answer of a network file system, then StalledError.
    progress(bytes done, bytes in all): returning False cancels.
    Raises: NodeMemoryError before anything is touched if it does not fit; NumaUnavailableError,
    PlacementError, ChecksumError, ReadError, FileChangedError, CancelledError, StoreError: then
    nothing is left.
    """
    for name, asked in (("hold", hold), ("pool", pool), ("keep", keep)):
        if asked and not shared:
            raise UsageError(f"{name}: only of shared replicas (shared=True)")
    if hugetlb and (shared or policy == STRIPE or place):
        raise UsageError("hugetlb: only of replicas of this process in whole blocks of 2 MiB")
    machine = topology()
    options = MirrorOptions.of(
        machine, nodes, per, policy, ratio, place, hold=hold, strict=strict, hugetlb=hugetlb,
        drop_source=drop_source, pool=pool, keep=keep,
    )  # fmt: skip
    opened = [part.file for part in weights.parts] if isinstance(weights, Weights) else []
    with waiting(io_timeout, opened), _opened(weights) as model:
        if shared:
            made = mirror_shared([model], machine, options, progress)[0]
        elif len(machine.usable) == 1:
            made = _mapped(model, machine, options.groups)
        else:
            made = private(model, machine, options, progress)
        made.owns_weights = model is not weights
        return made


@trace.spanned("attach")
def attach(
    path: str | os.PathLike[str] | Weights,
    nodes: str | int | Sequence[int] | None = None,
    policy: str = "",
) -> Mirror:
    """Return the replicas of this model that are in the store, for this process to use.

    nodes: which are needed; by default all that is there. policy: only replicas of this one; on
    one node they are all the same.
    Looked at are the source's and the replicas' sizes, owners and times; pages and checksums were
    proved when they were built. The kernel is asked where the pages are when ``report`` is first
    looked at; ``verify()`` checks the checksums too.
    Raises: ReplicaNotFoundError, saying whether the file changed since it was mirrored; UsageError.
    """
    if policy not in ("", *POLICIES, MIXED):
        raise UsageError(f"policy {policy!r}: expected {' or '.join((*POLICIES, MIXED))}")
    needed = None if nodes is None else topology().select(nodes)
    with _opened(path) as weights:
        made = _attach_shared(weights, needed, policy)
        made.owns_weights = weights is not path
        return made


def lacking(path: str | os.PathLike[str], nodes: Sequence[int], policy: str = "") -> list[int]:
    """Return the nodes that no whole replica of the model, as its files are now, serves.

    Whole: of which no file was removed or cut; ``verify`` asks for its pages and bytes.

    policy: only by replicas of this one.
    """
    with open_weights(path) as weights:
        found = store.find(weights.model(), policy)
    whole = {g for g, one in found.items() if one.policy != MIXED and not damage(one)}
    serving = by_node({group: group for group in whole})
    return [node for node in nodes if node not in serving]


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

    policy: "mirror", "interleave", "stripe", or "mixed", where ``place`` says one for each tensor.
    The last three have one group, of all nodes. turns: of what is interleaved.
    hugetlb: of huge pages that were set aside, if there are enough.
    hold: a holder process keeps it. strict: bind it or do not build it.
    drop_source: give back all page cache of the files, also what was there before.
    pool: where it belongs, "" where it belongs already, or to "base". keep: it never goes for room.
    Raises: UsageError for what is no name of a pool.
    """

    groups: Sequence[Group]
    policy: str = MIRROR
    turns: Group = ()
    place: tuple[tuple[str, str], ...] = ()
    hold: bool = False
    strict: bool = False
    hugetlb: bool = False
    drop_source: bool = False
    pool: str = ""
    keep: bool = False

    def __post_init__(self) -> None:
        if self.pool:
            pools.checked(self.pool)

    @classmethod
    def of(
        cls,
        machine: Topology,
        nodes: str | int | Sequence[int] = "all",
        per: str = "node",
        policy: str = MIRROR,
        ratio: Mapping[int, int] | None = None,
        place: Place = (),
        **rest: Any,
    ) -> MirrorOptions:
        """Return the options for these nodes of this machine. Raises: UsageError."""
        if policy not in POLICIES:
            raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
        chosen = tuple(machine.select(nodes))
        if policy == BIND and len(chosen) > 1:
            raise UsageError(
                f"policy bind: expected one node, found {format_list(chosen)}: name it (--nodes"
                f" {chosen[0]}), or take interleave, stripe or mirror"
            )
        if policy != MIRROR and per != "node":
            raise UsageError(f"per {per}: only of the policy mirror, found {policy}")
        if place:
            if (policy, per) != (MIRROR, "node"):
                raise UsageError("place: says a policy for each tensor, expected no other")
            check_place(place, chosen)
            policy, rest["place"] = MIXED, tuple((pattern, one) for pattern, one in place)
        if ratio is not None and policy not in (INTERLEAVE, MIXED):
            raise UsageError(f"weights: only of the policy interleave, found {policy}")
        if policy in (INTERLEAVE, MIXED):
            layout = in_turn(chosen, kernel_weights(chosen) if ratio is None else ratio)
            rest["turns"] = layout.turns
        # On one node they are all the same.
        if policy in (MIRROR, BIND) or (len(chosen) == 1 and policy != MIXED):
            return cls(machine.groups(chosen, per), **rest | {"turns": ()})
        return cls([chosen], policy, **rest)

    def layouts(self, weights: Weights) -> dict[Group, Layout]:
        """Return the layouts of all replicas of a model, by the nodes of each."""
        (first, *_) = self.groups
        if self.policy == MIXED:
            return placed_by(weights, self.place, first, self.turns)
        if self.policy == STRIPE:
            return {first: striped(weights, first)}
        return {group: Layout(self.turns or group) for group in self.groups}

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
    why = ""
    if options.policy != MIRROR:
        why = (
            "only whole replicas of a node can be placed, by its own CPUs, and"
            f" {options.policy} places ranges: take the policy mirror, or bind"
        )
    elif bare and len(machine.usable) > 1:
        why = (
            "only a node's own CPUs can place memory on it, and node"
            f" {format_list(bare)} has none that this process may use"
        )
    if why:
        raise NumaUnavailableError(
            f"{refused}; without binding {why}",
            call=refused.call,
            node=bare[0] if bare else nodes[0],
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
    pool: str = "",
    moved: Mapping[int, int] = NO_BUDGET,
) -> MirrorPlan:
    """Return the plan, after giving back page cache of the models where it needs that room.

    Bound memory pushes page cache out by itself; first touch would go to another node instead.
    """
    left = _left(pool, machine)
    before = plan(builds, machine, kept=kept, bound=bound, pool=pool, left=left, moved=moved)
    if before.fits or bound:
        return before
    for weights in models:
        for part in weights.parts:
            give_back(part.file, [(0, part.file.size)])
    after = plan(builds, machine, kept=kept, bound=bound, pool=pool, left=left, moved=moved)
    if after.fits:
        warn_once("room", "page cache of the source was given back: the plan needs its room")
    return after


def _left(pool: str, machine: Topology) -> dict[int, int]:
    return pools.left(pool, store.entries(), machine) if pool else {}


def private(
    weights: Weights, machine: Topology, options: MirrorOptions, progress: Progress | None
) -> Mirror:
    """Build replicas for this process alone."""
    layouts, bound = options.layouts(weights), can_bind(options, machine)
    groups = list(layouts)
    model = weights.model()
    lacks = hugetlb_lacks(model, layouts.values()) if options.hugetlb else ""
    if lacks:
        warn_once("hugetlb", f"{lacks}; ordinary memory is used")
    hugetlb = options.hugetlb and not lacks
    if not hugetlb:
        builds = [Build(model, layouts)]
        fitted(builds, [weights], machine, kept=PRIVATE, bound=bound).check()
    files = [part.file for part in weights.parts]
    # A huge page of anonymous memory is made where any byte of it is touched, also across stripes.
    by_stripes = any(layout.stripes for layout in layouts.values())
    memory = private_memory(bound=bound, hugetlb=hugetlb)
    if by_stripes:
        memory = held_memory(bound=bound)
    built = build(
        files, layouts, memory, machine, progress, bound=bound, set_aside=hugetlb,
        drop_source=options.drop_source,
    )  # fmt: skip
    report = report_of(weights, machine, groups, "private", built)
    report.policy = options.policy
    replicas = {group: [arena.mapping for arena in row] for group, row in built.arenas.items()}
    sums = dict.fromkeys(groups, lambda: sums_of(built.pieces, built.checksums))
    known = layouts if bound else dict.fromkeys(groups)
    made = Mirror(weights, replicas, groups, report, machine, sums, known)
    report.off_node = made.off_node()
    return made


def _mapped(weights: Weights, machine: Topology, groups: Sequence[Group]) -> Mirror:
    """Return the opened file itself as the only view: there is one node."""
    report = report_of(weights, machine, groups, "mapped")
    report.note = "one NUMA node: nothing was copied, the view is the opened file itself"
    return Mirror(weights, {}, groups, report, machine, {}, {})


def plan_shared(models: Sequence[Weights], machine: Topology, options: MirrorOptions) -> MirrorPlan:
    """Return what ``mirror_shared`` would build: the groups of nodes that lack a replica.

    A store that cannot be used is reported, and the plan made as if it were empty.
    Raises: StoreError where a replica is there that is not what the options ask for.
    """
    builds = _missing(models, options, building=False)
    bound = can_bind(options, machine)
    try:
        pool = _pool(models, options)
        left = _left(pool, machine)
        todo = plan(
            builds, machine, kept=options.kept, bound=bound, pool=pool, left=left,
            moved=_moved(models, options),
        )  # fmt: skip
        goes, why = ([], "") if todo.fits else reclaim.room(todo.needs, pool, _keys(models))
    except StoreError:  # said already
        return plan(builds, machine, kept=options.kept, bound=bound)
    return replace(todo, goes=tuple(entry.model.paths[0] for entry in goes), why=why)


def _pool(models: Sequence[Weights], options: MirrorOptions) -> str:
    """Return the pool that replicas of these models are built for."""
    if options.pool:
        return options.pool
    before = (entry.pool for weights in models for entry in store.changed(weights.model()))
    return next(before, BASE)


def _moved(models: Sequence[Weights], options: MirrorOptions) -> Counter[int]:
    """Return {node: bytes} of what is there and comes into the pool from another one."""
    entries: dict[str, Entry] = {}
    for weights in models if options.pool else ():
        found = store.find(weights.model(), options.policy)
        entries |= {entry.name: entry for entry in _asked(found, options)}
    moved: Counter[int] = Counter()
    for entry in entries.values():
        moved.update(entry.on_nodes if entry.pool != options.pool else {})
    return moved


def _asked(found: Mapping[Group, Entry], options: MirrorOptions) -> list[Entry]:
    """Return the entries of these that the options ask for."""
    groups = options.groups if options.policy != MIXED else sorted(found, key=len)
    return [found[group] for group in groups if group in found]


def _keys(models: Sequence[Weights]) -> set[str]:
    return {weights.model().key for weights in models}


def _missing(models: Sequence[Weights], options: MirrorOptions, *, building: bool) -> list[Build]:
    """Return each model with its groups of nodes that have no replica yet."""
    builds: list[Build] = []
    there: dict[str, set[Group]] = {}
    for weights in models:
        model, layouts = weights.model(), options.layouts(weights)
        if model.key not in there:
            found = _found(model, options.policy, building=building)
            _check_kind(weights, found, layouts, options)
            there[model.key] = set(found)
        missing = {group: one for group, one in layouts.items() if group not in there[model.key]}
        builds.append(Build(model, missing))
        there[model.key].update(layouts)  # the same model once more needs nothing more
    return builds


def _found(model: known.Model, policy: str, *, building: bool) -> dict[Group, Entry]:
    try:
        found = store.find(model, policy)
        return {group: entry for group, entry in found.items() if not damage(entry)}
    except StoreError as error:
        if building:
            raise
        warn_once(str(error), f"{error}; planned as if nothing were in the store")
        return {}


def _check_kind(
    weights: Weights,
    there: Mapping[Group, Entry],
    layouts: Mapping[Group, Layout],
    options: MirrorOptions,
) -> None:
    found = [entry for group, entry in there.items() if group in layouts]
    others = there.keys() - layouts.keys() if options.policy == MIXED else set()
    lacks = {
        "without a holder": options.hold and any(entry.holder is None for entry in found),
        "placed, not bound": options.strict and not all(entry.bound for entry in found),
        "placed otherwise": others
        or any(there[g].layout(g) != one for g, one in layouts.items() if g in there),
    }
    for what, holds in lacks.items():
        if holds:
            path = weights.paths[0]
            raise StoreError(
                f"{path}: is mirrored already, {what}; release it first:"
                f" numaload release {shlex.quote(path)}"
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
            f"{paths}: replicas were released or removed while they were mirrored, twice: {error}"
        ) from error


def _mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    options: MirrorOptions,
    progress: Progress | None,
    announce: Callable[[MirrorPlan], None] | None,
) -> list[Mirror]:
    with reclaim.building() as folder:
        bound = can_bind(options, machine)
        reclaim.drop_damaged(_keys(models))
        builds = _missing(models, options, building=True)
        pool = _pool(models, options)
        planned = partial(
            fitted, builds, models, machine, kept=options.kept, bound=bound, pool=pool,
            moved=_moved(models, options),
        )  # fmt: skip
        todo = planned()
        if not todo.fits:
            whom = ", ".join(weights.paths[0] for weights in models)
            why = reclaim.make_room(todo.needs, pool, _keys(models), whom)
            todo = replace(planned(), why=why)
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
                    _publish(model, built, folder, options)
                    reclaim.drop_replaced()
                known.remember(model)
                found = store.find(model, options.policy)
                groups = options.groups if options.policy != MIXED else sorted(found, key=len)
                for entry in _asked(found, options):
                    store.mark(entry, pool=options.pool, keep=options.keep)
                done.append(_attach(weights, list(groups), found, built, machine))
                failed.callback(done[-1].close)
            failed.pop_all()
    return done


@trace.spanned("publish")
def _publish(model: known.Model, built: Built, folder: int, options: MirrorOptions) -> None:
    hold, pool, keep = options.hold, options.pool, options.keep
    try:
        store.publish(model, built, folder, hold=hold, policy=options.policy, pool=pool, keep=keep)
    except NumaloadError:
        raise
    except OSError as error:
        raise StoreError(
            f"{model.paths[0]}: cannot be published in {userdir.path()}: {reason(error)}"
        ) from error
    finally:
        built.close()


def _attach_shared(weights: Weights, needed: Sequence[int] | None, policy: str) -> Mirror:
    """Attach the replicas on the ``needed`` nodes; None: every replica that is there."""
    opened = [part.file.opened for part in weights.parts]
    found = store.find_of(opened, MIRROR if policy == BIND else policy)
    if not found and policy in (INTERLEAVE, STRIPE):  # on one node it was stored as mirror
        alike = store.find_of(opened, MIRROR)
        found = {group: one for group, one in alike.items() if len(one.nodes) == 1}
    if not found:
        raise ReplicaNotFoundError(_why_missing(weights, ()))
    if needed is None:
        return _attach(weights, sorted(found, key=lambda group: (len(group), group)), found)
    serving = by_node({group: group for group in found})
    missing = [node for node in needed if node not in serving]
    if missing:
        raise ReplicaNotFoundError(_why_missing(weights, missing))
    groups = sorted({serving[node] for node in needed})
    if any(entry.policy == MIXED for entry in found.values()):  # no replica is whole alone
        groups = sorted(found, key=lambda group: (len(group), group))
    return _attach(weights, groups, found)


@trace.spanned("attach")
def _attach(
    weights: Weights,
    groups: Sequence[Group],
    found: Mapping[Group, Entry],
    built: Built | None = None,
    machine: Topology | None = None,
) -> Mirror:
    """Attach replicas. Pages that were there before are asked for when the report is looked at."""
    missing = [group for group in groups if group not in found]
    if missing:
        raise ReplicaNotFoundError(_why_missing(weights, nodes_of(missing)))
    with ExitStack() as failed:
        leases: dict[str, Lease] = {}
        for entry in (found[group] for group in groups):
            if entry.name not in leases:
                leases[entry.name] = Lease(entry, uses=True)
                failed.callback(leases[entry.name].close)
        replicas = {group: leases[found[group].name].map(group) for group in groups}
        sums = {group: found[group].sums for group in groups}
        paths = {group: found[group].paths(group) for group in groups}
        layouts = layouts_of([found[group] for group in groups])
        failed.pop_all()
    held = list(leases.values())
    made = Mirror(weights, replicas, groups, None, machine, sums, layouts, held, paths)
    made.built = built
    return made


def placements_of_entry(entry: Entry) -> dict[Group, Placement]:
    """Ask the kernel where the pages of an entry's replicas are, by the nodes of each.

    Raises: StoreError for replicas that cannot be mapped, ReplicaNotFoundError.
    """
    lease = Lease(entry)
    try:
        replicas = {group: lease.map(group) for group in entry.groups}
        return placements_of(replicas, layouts_of([entry]))
    finally:
        lease.close()


def verify_entry(entry: Entry, machine: Topology) -> Verified:
    """Verify an entry of the store as ``Mirror.verify`` does; its source may be gone.

    Raises: StoreError for replicas that cannot be mapped.
    """
    lease = Lease(entry)
    try:
        replicas = {group: lease.map(group) for group in entry.groups}
        sums = dict.fromkeys(entry.groups, entry.sums())
        return verify(replicas, entry.model.paths, sums, layouts_of([entry]), machine)
    finally:
        lease.close()


def layouts_of(entries: Iterable[Entry]) -> dict[Group, Layout | None]:
    """Return the layouts of all replicas of these; None for those that were not bound."""
    return {
        group: entry.layout(group) if entry.bound else None
        for entry in entries
        for group in entry.groups
    }


def _why_missing(weights: Weights, missing: Sequence[int]) -> str:
    model = weights.model()
    where = f" on node {format_list(missing)}" if missing else ""
    found = () if store.find(model) else store.entries()
    for entry in found:
        if entry.model.paths == model.paths and entry.model.key != model.key:
            when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.created))
            return (
                f"{weights.paths[0]}: changed since it was mirrored on {when};"
                f" mirror it again: numaload mirror {shlex.quote(weights.paths[0])}"
            )
    path = weights.paths[0]
    return f"{path}: no replica{where}; build it: numaload mirror {shlex.quote(path)}"
