"""``numaload nodes``: what the machine is made of and how memory will be bound."""

from __future__ import annotations

import argparse
from collections.abc import Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

from numaload.cli.output import print_json, print_table, size

if TYPE_CHECKING:
    from numaload.numa.topology import Node, Topology

K = TypeVar("K", bound=Hashable)


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("nodes", help="NUMA nodes, their CPUs, memory and distances")
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=nodes)


def nodes(options: argparse.Namespace) -> int:
    from numaload.numa.opinion import second_opinion
    from numaload.numa.syscalls import binding
    from numaload.numa.topology import topology

    machine = topology()
    opinion = second_opinion(machine)
    if options.json:
        found = machine.to_dict() | {"binding": binding().name, "libnuma_says": opinion}
        print_json(found)
        return 0
    print_nodes(machine)
    print(f"memory is bound {_how(binding().name)}")
    print(f"second opinion: {opinion}")
    return 0


def print_nodes(machine: Topology) -> None:
    """A line per node: nodes at the same distance are named together, long lists come last."""
    from numaload.numa.lists import format_list

    header = ["node", "memory", "free", "distances", "CPUs"]
    rows = [
        [node.id, size(node.memory_total), size(node.memory_free), _distances(node), _cpus(node)]
        for node in machine.nodes.values()
    ]
    print_table(header, rows)
    print(f"all: {format_list(machine.all) or 'none'}")
    for line in left_out(machine):
        print(line)


def left_out(machine: Topology) -> list[str]:
    """A line per reason why ``all`` does not include some nodes."""
    usable = set(machine.usable)
    reasons = ((why, n in usable) for n, why in machine.left_out.items())
    return [
        f"node {ids} is left out of all: {why}{', but may be named' if named else ''}"
        for (why, named), ids in _grouped(reasons, machine.left_out).items()
    ]


def _how(name: str) -> str:
    from numaload.numa.syscalls import LIBNUMA, LIBNUMA_HINT, NO_CALLS

    missing = f"{LIBNUMA} not found ({LIBNUMA_HINT})"
    return {
        LIBNUMA: f"through {LIBNUMA}",
        NO_CALLS: f"by nothing: {missing}, and no system call numbers for this processor",
    }.get(name, f"by system calls used directly: {missing}")


def _cpus(node: Node) -> str:
    from numaload.numa.lists import format_list

    forbidden = len(node.cpus - node.usable_cpus)
    rest = f" ({forbidden} {'more ' if node.usable_cpus else ''}not allowed here)"
    return (format_list(node.usable_cpus) or "none") + (rest if forbidden else "")


def _distances(node: Node) -> str:
    """``10 to 0; 12 to 1-3; 32 to 4-7``: one number per node is unreadable beyond eight."""
    near = _grouped(node.distances.values(), node.distances)
    return "; ".join(f"{distance} to {ids}" for distance, ids in sorted(near.items())) or "unknown"


def _grouped(keys: Iterable[K], ids: Iterable[int]) -> dict[K, str]:
    """{key: list of the ids that have it}."""
    from numaload.numa.lists import format_list

    groups: dict[K, list[int]] = {}
    for key, number in zip(keys, ids, strict=True):
        groups.setdefault(key, []).append(number)
    return {key: format_list(numbers) for key, numbers in groups.items()}
