"""The store as its user sees it: what is in it, who uses it, what it may take, and what went."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

from numaload.errors import NumaloadError, UsageError
from numaload.linux.lists import Group, format_list
from numaload.linux.placement import Placement
from numaload.machine.topology import topology
from numaload.replicas import pools, reclaim
from numaload.replicas import store as stored
from numaload.replicas.entry import Entry
from numaload.replicas.mirror import attach, placements_of_entry
from numaload.replicas.pools import Budget, Gone
from numaload.replicas.verify import by_node


@dataclass
class Row:
    """One entry: replicas of a model that were built together. Sizes are bytes, times seconds.

    paths: the model's files. nodes: {node: bytes}. source: whether the files are "unchanged",
    "changed", "gone" or "unreadable". users: processes that use it, as "name (pid)". holder: the
    process that keeps its memory. replicas: {nodes: its files}. error: why the kernel could not be
    asked, with ``placements``.
    """

    paths: list[str]
    pool: str
    keep: bool
    policy: str
    nodes: dict[int, int]
    groups: list[Group]
    replicas: dict[str, list[str]]
    source: str
    age_s: float
    idle_s: float
    users: list[str]
    holder: int | None
    bound: bool
    placements: dict[int, Placement] = field(default_factory=dict)
    error: str = ""

    @property
    def nbytes(self) -> int:
        return sum(self.nodes.values())

    @property
    def huge_pages(self) -> int:
        """Return the bytes of all its replicas that huge pages hold."""
        each = {id(found): found for found in self.placements.values()}
        return sum(found.huge_pages for found in each.values())

    def to_dict(self) -> dict[str, Any]:
        placements = {node: found.to_dict() for node, found in self.placements.items()}
        return vars(self) | {
            "placements": placements, "nbytes": self.nbytes, "huge_pages": self.huge_pages,
        }  # fmt: skip


@dataclass
class Table:
    """All that is in the store. gone: the last replicas that went, latest first."""

    rows: list[Row]
    budgets: dict[str, Budget]
    gone: list[Gone]

    def to_dict(self) -> dict[str, Any]:
        return {
            "rows": [row.to_dict() for row in self.rows],
            "budgets": {pool: str(budget) for pool, budget in self.budgets.items()},
            "gone": [one.to_dict() for one in self.gone],
        }


def table() -> Table:
    """Return what is in the store, rebuilt from what is there. Raises: StoreError.

    What went with its holder, or was replaced and has no user any more, is cleared before.
    """
    reclaim.sweep()
    entries = stored.entries()
    used = reclaim.uses(entries)
    rows = [_row(entry, used[entry.name]) for entry in entries]
    reclaim.tell_over(entries, used, topology())
    return Table(rows, pools.budgets(), pools.journal())


def _row(entry: Entry, use: reclaim.Use) -> Row:
    row = Row(
        paths=list(entry.model.paths),
        pool=entry.pool,
        keep=entry.keep,
        nodes=entry.on_nodes,
        policy=entry.policy,
        groups=list(entry.groups),
        replicas={format_list(group): entry.paths(group) for group in entry.groups},
        source=entry.model.state(),
        age_s=time.time() - entry.created,
        idle_s=use.idle_s,
        users=use.users,
        holder=entry.holder.pid if entry.holder else None,
        bound=entry.bound,
    )
    try:
        row.placements = by_node(placements_of_entry(entry))
    except NumaloadError as error:  # the others are still worth showing
        row.error = str(error)
    return row


def budget(pool: str, amount: str | int | None) -> None:
    """Say what a pool may take of each node: "20G", bytes, "25%" of its memory; None: all.

    What is over it goes when somebody mirrors to that pool, or with ``collect``.
    Raises: UsageError, StoreError.
    """
    pools.set_budget(pool, None if amount is None else Budget.parse(str(amount)))


def collect(pool: str = "", idle_s: float | None = None) -> list[reclaim.Released]:
    """Have replicas go that nobody uses: of files that changed, and of pools over their budget.

    pool: only of this one. idle_s: also all that were not used for so many seconds. What is kept
    stays. Returns what went. Raises: StoreError, UsageError.
    """
    if pool != "":
        pools.checked(pool)
    if idle_s is not None and not (isinstance(idle_s, (int, float)) and idle_s >= 0):
        raise UsageError(f"idle_s {idle_s!r}: expected a number of seconds, 0 or more")
    return reclaim.collect(topology(), pool, idle_s)


def folder(path: str | os.PathLike[str], node: int | None = None) -> str:
    """Return a folder from which any program loads the model's replica: see ``Mirror.folder``.

    node: whose replica; None: the nearest to the CPU that this thread runs on.
    Raises: ReplicaNotFoundError, UsageError, StoreError.
    """
    with attach(path) as found:
        if node is None:
            node = next(iter(found.local().nodes), None)
        if node is None:
            raise UsageError(f"{os.fsdecode(path)}: no replica with a node")
        return found.folder(node)
