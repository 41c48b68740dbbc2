"""Mirrors in the store: built once, attached by every process of the user."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from numaload.errors import NumaloadError, ReplicaNotFoundError, StoreError, reason, warn_once
from numaload.mirrors.views import Mirror, report_of
from numaload.mirrors.wanted import Wanted, can_bind, with_room
from numaload.numa.lists import Group, format_list
from numaload.numa.topology import Topology
from numaload.replicas import store
from numaload.replicas.arena import held_memory, store_memory
from numaload.replicas.build import Built, build
from numaload.replicas.entry import Entry
from numaload.replicas.lease import Lease
from numaload.replicas.plan import HELD, STORED, Plan, nodes_of, plan
from numaload.replicas.verify import Verified, by_node, placements_of, verify
from numaload.storage import known, userdir
from numaload.storage.reader import Progress
from numaload.weights import Weights


def plan_shared(
    models: Sequence[Weights],
    machine: Topology,
    wanted: Wanted,
    *,
    bound: bool = True,
    building: bool = False,
) -> Plan:
    """What ``mirror_shared`` would build: groups of nodes that have no replica of a model yet.

    building: else a store that cannot be used is said, and the plan made as if it were empty.
    Raises: StoreError where what is there is not what is wanted: without a holder, or not bound.
    """
    builds = []
    there: dict[str, set[Group]] = {}
    for weights in models:
        model = weights.model()
        if model.key not in there:
            found = _found(model, building=building)
            _check_kind(weights, [e for g, e in found.items() if g in wanted.groups], wanted)
            there[model.key] = set(found)
        builds.append((model, [g for g in wanted.groups if g not in there[model.key]]))
        there[model.key].update(wanted.groups)  # the same model once more needs nothing more
    return plan(builds, machine, kept=HELD if wanted.hold else STORED, bound=bound)


def _found(model: known.Model, *, building: bool) -> dict[Group, Entry]:
    try:
        return store.find(model)
    except StoreError as error:
        if building:
            raise
        warn_once(str(error), f"{error}; planned as if nothing were in the store")
        return {}


def _check_kind(weights: Weights, found: Sequence[Entry], wanted: Wanted) -> None:
    lacks = {
        "without a holder": wanted.hold and any(entry.holder is None for entry in found),
        "placed, not bound": wanted.strict and not all(entry.bound for entry in found),
    }
    for what, holds in lacks.items():
        if holds:
            path = weights.paths[0]
            raise StoreError(f"{path}: is mirrored already, {what}: numaload release {path}")


def mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    wanted: Wanted,
    progress: Progress | None = None,
    announce: Callable[[Plan], None] | None = None,
) -> list[Mirror]:
    """Put replicas of all these models into the store. Nothing is built unless all of them fit.

    announce: called with the plan before it is checked and carried out. Once more where replicas
    are released meanwhile. Raises: ReplicaNotFoundError if they are again.
    """
    try:
        return _mirror_shared(models, machine, wanted, progress, announce)
    except ReplicaNotFoundError as error:
        warn_once("released", f"{error}; mirrored once more")
    try:
        return _mirror_shared(models, machine, wanted, progress, announce)
    except ReplicaNotFoundError as error:
        paths = ", ".join(weights.paths[0] for weights in models)
        raise ReplicaNotFoundError(
            f"{paths}: replicas were released by another process while they were mirrored, twice"
        ) from error


def _mirror_shared(
    models: Sequence[Weights],
    machine: Topology,
    wanted: Wanted,
    progress: Progress | None,
    announce: Callable[[Plan], None] | None,
) -> list[Mirror]:
    with store.building() as folder:
        bound = can_bind(wanted, machine)
        todo = with_room(
            lambda: plan_shared(models, machine, wanted, bound=bound, building=True),
            models,
            bound=bound,
        )
        if announce:
            announce(todo)
        todo.check()
        memory = held_memory(bound=bound) if wanted.hold else store_memory(folder, bound=bound)
        with ExitStack() as failed:
            done = []
            for weights, (model, missing) in zip(models, todo.builds, strict=True):
                built = None
                if missing:
                    files = [part.file for part in weights.parts]
                    drop = wanted.drop_source
                    built = build(
                        files, missing, memory, machine, progress, bound=bound, drop_source=drop
                    )
                    _publish(model, built, folder, hold=wanted.hold)
                known.remember(model)
                done.append(_attach(weights, machine, list(wanted.groups), built))
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


def attach_shared(weights: Weights, machine: Topology, needed: Sequence[int] | None) -> Mirror:
    """``needed``: nodes; by default every replica that is there."""
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
        failed.pop_all()
    return Mirror(weights, replicas, report, machine, sums, list(leases.values()))


def _unbound(entries: Iterable[Entry], groups: Sequence[Group]) -> list[int]:
    return nodes_of([g for e in entries if not e.bound for g in e.groups if g in groups])


def verify_entry(entry: Entry, machine: Topology) -> Verified:
    """What ``Mirror.verify`` does, of an entry of the store whose source may be gone.

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
            when = time.strftime("%H:%M", time.localtime(entry.created))
            return (
                f"{weights.paths[0]}: changed since it was mirrored at {when};"
                f" numaload mirror {weights.paths[0]}"
            )
    return f"{weights.paths[0]}: no replica{where}: numaload mirror {weights.paths[0]}"
