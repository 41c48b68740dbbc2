"""Mirrors of one process alone, and the one that is only the mapped file."""

from __future__ import annotations

from collections.abc import Sequence

from numaload.mirrors.views import Mirror, report_of
from numaload.mirrors.wanted import Wanted, can_bind
from numaload.numa.lists import Group
from numaload.numa.topology import Topology
from numaload.replicas.arena import private_memory
from numaload.replicas.build import Progress, build
from numaload.replicas.plan import PRIVATE, plan
from numaload.weights import Weights


def private(
    weights: Weights, machine: Topology, wanted: Wanted, progress: Progress | None
) -> Mirror:
    groups = wanted.groups
    bound = can_bind(wanted, machine)
    plan([(weights.model(), groups)], machine, kept=PRIVATE, bound=bound).check()
    files = [part.file for part in weights.parts]
    memory = private_memory(bound=bound)
    built = build(files, groups, memory, machine, progress, bound=bound)
    report = report_of(weights, machine, groups, "private", built)
    replicas = {group: [arena.mapping for arena in row] for group, row in built.arenas.items()}
    return Mirror(weights, replicas, report, machine, dict.fromkeys(groups, built.checksums))


def mapped(weights: Weights, machine: Topology, groups: Sequence[Group]) -> Mirror:
    report = report_of(weights, machine, groups, "mapped")
    report.note = "one NUMA node: nothing was copied, the view is the opened file itself"
    return Mirror(weights, {}, report, machine, {})
