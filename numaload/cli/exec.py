"""``numaload exec``: an unmodified program on one node or several, each reading its own replica."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from numaload.cli.output import complain, note, on_nodes, progress_bar

if TYPE_CHECKING:
    from numaload.replicas.exec import Ended

USAGE = (
    "numaload exec [--node NODE | --nodes LIST | --all-nodes] [--memory POLICY] MODEL"
    " -- PROGRAM [ARG...]"
)
FORMS = (
    "In PROGRAM and each ARG, {model} is replaced by the replica's first file, {folder} by a folder"
    " with the replica and links to what else the source's has, {node} by the node, {index} by 0,"
    " 1, ... of the nodes, and {port:8080} by 8080 + {index}. Nothing else is replaced."
)
EXPECTED = (signal.SIGINT, signal.SIGPIPE)  # ends of which shells say nothing


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "exec",
        help="run a program that reads a node's replica, on that node",
        usage=USAGE,
        epilog=FORMS,
    )
    parser.add_argument("model", metavar="MODEL", help="any one of a model's files")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--node", metavar="NODE", type=int, help="run it on this node (default: the nearest)"
    )
    where.add_argument(
        "--nodes", metavar="LIST", help="run one on each of these nodes, whose lines begin [node N]"
    )
    where.add_argument(
        "--all-nodes", dest="nodes", action="store_const", const="all", help="as --nodes all"
    )
    parser.add_argument(
        "--memory",
        choices=["prefer", "bind", "none"],
        default="prefer",
        help="of what the program allocates: prefer the node, or bind it there (default: prefer)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    from numaload.errors import ProgramError
    from numaload.replicas.exec import exec_programs

    @contextmanager
    def building(nodes: list[int]) -> Iterator[Any]:
        note(f"{options.model}: no replica on {on_nodes(nodes)} yet: building it, as mirror does")
        with progress_bar("mirror", quiet=False) as progress:
            yield progress

    def tell(ended: Ended) -> None:
        how = f"with status {ended.code}"
        if ended.code < 0:
            how = f"by signal {-ended.code} ({signal.strsignal(-ended.code)})"
        if labelled or (ended.code < 0 and -ended.code not in EXPECTED):
            note(f"node {ended.node}: {options.program[0]} ended {how}")

    labelled = options.nodes is not None
    nodes = options.nodes if labelled else "local" if options.node is None else options.node
    try:
        found = exec_programs(
            options.model, options.program, nodes, memory=options.memory, labelled=labelled,
            forward=True, building=building, ended=tell,
        )  # fmt: skip
    except ProgramError as error:
        complain(error)
        return error.status
    return max(ended.status for ended in found)
