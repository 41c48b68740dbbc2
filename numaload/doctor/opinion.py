"""A second opinion on the nodes: libnuma's, through the optional package py-libnuma.

It is compared with /sys and never used to place anything. The package needs guarding: without
libnuma its import dies with AttributeError, and asking about an absent node crashes the process.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

from numaload.linux.lists import format_list
from numaload.linux.syscalls import LIBNUMA, binding
from numaload.machine.topology import Topology


def second_opinion(machine: Topology) -> str:
    """Say in a sentence that libnuma agrees, where it differs, or why it was not asked."""
    if binding().name != LIBNUMA:
        return f"none, {LIBNUMA} is not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from numa import info

            if not info.numa_available():
                return "libnuma says that NUMA is not available here"
            found = list(_differences(info, machine))
    except ImportError:
        return "none, py-libnuma is not installed: pip install numaload[libnuma]"
    except Exception as error:  # noqa: BLE001 - a second opinion that fails must not stop ours
        return f"none, py-libnuma failed: {error!r}"
    return "; ".join(found) or "libnuma agrees on CPUs and distances"


def _differences(info: Any, machine: Topology) -> Iterator[str]:
    """Compare the nodes that both know, with their CPUs and distances."""
    highest = info.get_max_node()
    if highest != max(machine.nodes):
        yield f"libnuma's highest node is {highest}, /sys has {max(machine.nodes)}"
    for node in machine.nodes.values():
        if node.id > highest or not node.cpus:
            continue
        theirs, ours = format_list(info.node_to_cpus(node.id)), format_list(node.cpus)
        if theirs != ours:
            yield f"node {node.id}: libnuma has CPUs {theirs or 'none'}, /sys {ours}"
        for other in machine.nodes:
            distance = info.numa_distance(node.id, other)
            known = node.distances.get(other, distance)
            if distance != known:
                yield f"distance {node.id} to {other}: libnuma {distance}, /sys {known}"
