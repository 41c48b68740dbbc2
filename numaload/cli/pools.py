"""``numaload store``: the store's table, a folder for other programs, budgets, and collecting."""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import TYPE_CHECKING, Any

from numaload.cli.output import (
    add_io_timeout,
    complain,
    count,
    duration,
    files_of,
    on_nodes,
    print_json,
    print_table,
    say,
    seconds,
    size,
)

if TYPE_CHECKING:
    from numaload.replicas.catalogue import Row

SHOWN = 5  # of what went
NONE = "none"


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("store", help="what is in the store, who uses it, what went and why")
    parser.set_defaults(run=table)
    parts = parser.add_subparsers(title="parts", metavar="PART", prog="numaload store")
    path = parts.add_parser("path", help="print a folder from which any program loads the replica")
    path.add_argument("file", metavar="FILE", help="any one of a mirrored model's files")
    path.add_argument("--node", metavar="NODE", type=int, help="by default the nearest")
    path.set_defaults(run=show_path)
    budget = parts.add_parser("budget", help="show what pools may take of each node, or set it")
    budget.add_argument("pool", metavar="POOL", nargs="?")
    budget.add_argument("amount", metavar="AMOUNT", nargs="?", help="as 20G, or 25%%, or none")
    budget.set_defaults(run=set_budget)
    gc = parts.add_parser(
        "gc", help="have replicas go that nobody uses: of changed files, and over a budget"
    )
    gc.add_argument("--pool", metavar="POOL", default="", help="only of this one")
    gc.add_argument(
        "--idle",
        metavar="SECONDS",
        type=partial(seconds, zero=True),
        help="also what was not used for so long",
    )
    gc.set_defaults(run=collect)
    for part in parts.choices.values():
        part.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
        add_io_timeout(part, argparse.SUPPRESS)


def table(options: argparse.Namespace) -> int:
    from numaload.replicas import catalogue

    found = catalogue.table()
    if options.json:
        print_json(found)
    else:
        _print_rows(found.rows)
        for pool, budget in found.budgets.items():
            say(f"pool {pool}: at most {_amount(budget)} of each node")
        for one in found.gone[:SHOWN]:
            ago = duration(time.time() - one.when)
            what = f"{one.path} ({size(one.nbytes)}, pool {one.pool}, idle {duration(one.idle_s)})"
            say(f"went {ago} ago: {what}: {one.why}")
    for row in found.rows:
        if row.error:
            complain(row.error)
    return 1 if any(row.error for row in found.rows) else 0


def _print_rows(rows: list[Row]) -> None:
    if not rows:
        say("nothing is in the store")
        return
    header = ("model", "pool", "bytes by node", "huge pages", "used by", "last use", "")
    print_table(header, [_cells(row) for row in rows])


def _cells(row: Row) -> list[str]:
    nodes: dict[int, list[int]] = {}
    for node, nbytes in row.nodes.items():
        nodes.setdefault(nbytes, []).append(node)
    by_node = ", ".join(f"{on_nodes(them)}: {size(nbytes)}" for nbytes, them in nodes.items())
    notes = ["kept"] if row.keep else []
    notes += [] if row.source == "unchanged" else [f"the file is {row.source}"]
    notes += [f"held by process {row.holder}"] if row.holder else []
    last = "now" if row.users else f"{duration(row.idle_s)} ago"
    huge = "unknown" if row.error else size(row.huge_pages)
    users = ", ".join(row.users) or "nobody"
    return [files_of(row.paths), row.pool, by_node, huge, users, last, ", ".join(notes)]


def _amount(budget: Any) -> str:
    return str(budget) if budget.percent else size(budget.amount)


def show_path(options: argparse.Namespace) -> int:
    from numaload.replicas import catalogue

    found = catalogue.folder(options.file, options.node)
    if options.json:
        print_json({"folder": found})
    else:
        say(found)
    return 0


def set_budget(options: argparse.Namespace) -> int:
    from numaload.replicas import catalogue, pools

    if options.amount is not None:
        catalogue.budget(options.pool, None if options.amount == NONE else options.amount)
    found = pools.budgets()
    if options.amount is None and options.pool is not None:
        pool = pools.checked(options.pool)
        found = {pool: found[pool]} if pool in found else {}
    if options.json:
        print_json({pool: str(budget) for pool, budget in found.items()})
        return 0
    for pool, budget in found.items():
        say(f"pool {pool}: at most {_amount(budget)} of each node")
    if not found:
        only = options.pool if options.amount is None else None
        say("no pool has a budget" if only is None else f"pool {only}: no budget")
    return 0


def collect(options: argparse.Namespace) -> int:
    from numaload.replicas import catalogue

    done = catalogue.collect(options.pool, options.idle)
    failed = [one for one in done if one.error]
    for one in failed:
        complain(f"{one.entry.model.paths[0]}: {one.error}")
    if options.json:
        print_json(done)
    else:
        nbytes = sum(one.nbytes for one in done if not one.error)
        say(f"{count(len(done) - len(failed), 'model')} went: {size(nbytes)}")
    return 1 if failed else 0
