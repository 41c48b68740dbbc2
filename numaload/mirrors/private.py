"""Mirrors of one process alone, and the one that is only the mapped file."""

from __future__ import annotations

from collections.abc import Sequence

from numaload.mirrors.views import Mirror, report_of
from numaload.mirrors.wanted import Wanted, can_bind, with_room
from numaload.numa.lists import Group
from numaload.numa.topology import Topology
from numaload.replicas.arena import private_memory
from numaload.replicas.build import build
from numaload.replicas.plan import PRIVATE, plan
from numaload.storage.reader import Progress
from numaload.weights import Weights


def private(
    weights: Weights, machine: Topology, wanted: Wanted, progress: Progress | None
) -> Mirror:
    groups = wanted.groups
    bound = can_bind(wanted, machine)
    builds = [(weights.model(), groups)]
    with_room(
        lambda: plan(builds, machine, kept=PRIVATE, bound=bound), [weights], bound=bound
    ).check()
    files = [part.file for part in weights.parts]
    memory = private_memory(bound=bound)
    drop = wanted.drop_source
    built = build(files, groups, memory, machine, progress, bound=bound, drop_source=drop)
    report = report_of(weights, machine, groups, "private", built)
    replicas = {group: [arena.mapping for arena in row] for group, row in built.arenas.items()}
    return Mirror(weights, replicas, report, machine, dict.fromkeys(groups, built.checksums))


def mapped(weights: Weights, machine: Topology, groups: Sequence[Group]) -> Mirror:
    report = report_of(weights, machine, groups, "mapped")
    report.note = "one NUMA node: nothing was copied, the view is the opened file itself"
    return Mirror(weights, {}, report, machine, {})
