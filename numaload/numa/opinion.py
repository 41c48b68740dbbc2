"""A second opinion on the nodes: libnuma's, through the optional package py-libnuma.

It is compared with /sys and never used to place anything. The package needs guarding: without
libnuma its import dies with AttributeError, and asking about an absent node crashes the process.
"""

from __future__ import annotations

import warnings
from typing import Any

from numaload.numa.lists import format_list
from numaload.numa.syscalls import LIBNUMA, binding
from numaload.numa.topology import Topology


def second_opinion(machine: Topology) -> str:
    """One sentence: agrees, what differs, or why there is none."""
    if binding().name != LIBNUMA:
        return f"none, {LIBNUMA} is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from numa import info

            if not info.numa_available():
                return "libnuma says that NUMA is not available here"
            found = _ask(info, machine)
    except ImportError:
        return "none, py-libnuma is not installed: pip install numaload[libnuma]"
    except Exception as error:  # noqa: BLE001 - whatever a second opinion dies of, ours stands
        return f"none, py-libnuma failed: {error!r}"
    return "; ".join(found) if found else "libnuma agrees on CPUs and distances"


def _ask(info: Any, machine: Topology) -> list[str]:
    """Differences, for nodes known to exist."""
    lines = []
    ids = sorted(machine.nodes)
    highest = info.get_max_node()
    if highest != ids[-1]:
        lines.append(f"libnuma's highest node is {highest}, /sys has {ids[-1]}")
    for node in machine.nodes.values():
        if node.id > highest or not node.cpus:
            continue
        theirs, ours = format_list(info.node_to_cpus(node.id)), format_list(node.cpus)
        if theirs != ours:
            lines.append(f"node {node.id}: libnuma has CPUs {theirs or 'none'}, /sys {ours}")
        for other in ids:
            distance = info.numa_distance(node.id, other)
            if distance != node.distances.get(other, distance):
                known = node.distances[other]
                lines.append(f"distance {node.id} to {other}: libnuma {distance}, /sys {known}")
    return lines
