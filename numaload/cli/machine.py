"""``numaload nodes``: what the machine is made of and how memory will be bound."""

from __future__ import annotations

import argparse
from typing import Any

from numaload.cli.output import print_json, print_table, size


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("nodes", help="NUMA nodes, their CPUs, memory and distances")
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=nodes)


def nodes(options: argparse.Namespace) -> int:
    from numaload.numa.lists import format_list
    from numaload.numa.opinion import second_opinion
    from numaload.numa.syscalls import LIBNUMA, LIBNUMA_HINT, binding
    from numaload.numa.topology import topology

    machine = topology()
    opinion = second_opinion(machine)
    if options.json:
        found = machine.to_dict() | {"binding": binding().name, "libnuma_says": opinion}
        print_json(found)
        return 0
    ids = list(machine.nodes)
    rows = [
        [
            node.id,
            format_list(node.usable_cpus) + _of(node.cpus - node.usable_cpus) or "none",
            size(node.memory_total),
            size(node.memory_free),
            " ".join(str(node.distances.get(other, "?")) for other in ids),
        ]
        for node in machine.nodes.values()
    ]
    print_table(["node", "CPUs", "memory", "free", "distances"], rows)
    print(f"all: {format_list(machine.all) or 'none'}")
    for node_id, why in machine.left_out.items():
        print(f"node {node_id} is left out of all: {why}")
    how = f"through {LIBNUMA}"
    if binding().name != LIBNUMA:
        how = f"by system calls used directly: {LIBNUMA} not found ({LIBNUMA_HINT})"
    print(f"memory is bound {how}")
    print(f"second opinion: {opinion}")
    return 0


def _of(forbidden: frozenset[int]) -> str:
    return f" ({len(forbidden)} more not allowed here)" if forbidden else ""
