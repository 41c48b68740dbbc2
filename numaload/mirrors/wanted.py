"""What was asked of a mirror, and whether memory can be bound for it here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from numaload.errors import NumaUnavailableError, warn_once
from numaload.numa.lists import Group, format_list
from numaload.numa.probe import why_not_bound
from numaload.numa.topology import Topology
from numaload.replicas.plan import Plan, nodes_of
from numaload.storage.residency import give_back
from numaload.weights import Weights


@dataclass(frozen=True)
class Wanted:
    """A replica for each group of nodes. hold: by a holder process; strict: bound or not at all.

    drop_source: page cache of the files is given back, also what was there before.
    """

    groups: Sequence[Group]
    hold: bool = False
    strict: bool = False
    drop_source: bool = False


def can_bind(wanted: Wanted, machine: Topology) -> bool:
    """Whether memory binds here; if not, that is said, and first touch must do.

    Raises: NumaUnavailableError where first touch cannot do, or may not (strict).
    """
    nodes = nodes_of(wanted.groups)
    refused = why_not_bound(nodes)
    if refused is None:
        return True
    if wanted.strict:
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
        "first touch", f"{refused}; memory is placed by threads on its nodes and counted afterwards"
    )
    return False


def with_room(make: Callable[[], Plan], models: Sequence[Weights], *, bound: bool) -> Plan:
    """The plan, after giving back page cache of the models where it needs that room.

    Bound memory pushes page cache out by itself; first touch would go to another node instead.
    """
    plan = make()
    if plan.fits or bound:
        return plan
    for weights in models:
        for part in weights.parts:
            give_back(part.file, [(0, part.file.size)])
    after = make()
    if after.fits:
        warn_once("room", "page cache of the source was given back: the plan needs its room")
    return after
