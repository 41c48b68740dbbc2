"""Pools of the store: what each may take, which replicas go for room, and a journal of those.

A replica belongs to the pool that it was mirrored for. A pool may have a budget, in bytes or in
percent of the memory of each node. For room only replicas of the same pool go, that nobody uses and
nobody asked to keep; first those with the highest product of idle time and size.

::

    pools/budgets.json      {pool: "25%" or bytes of each node}
    pools/journal.json      the last replicas that went: when, what, how long idle, and why
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from numaload.errors import StoreError, UsageError, check_limits, reason, warn_once
from numaload.machine import userdir
from numaload.machine.topology import Topology
from numaload.replicas.entry import POOL, Entry
from numaload.replicas.plan import Need

FOLDER, BUDGETS, JOURNAL = "pools", "budgets.json", "journal.json"
ROWS = 100  # of the journal
ASIDE = re.compile(rf"\.({BUDGETS}|{JOURNAL})\.[0-9a-f]{{8}}")  # while one is written
AMOUNT = re.compile(r"(\d{1,18}(?:\.\d{1,6})?)\s*(?:(%)|([kKmMgGtT])?(?:i?[bB])?)")
UNITS = " KMGT"
MOST = 10**18  # bytes of a budget, as it is written: they must be read again


class Budget(NamedTuple):
    """What a pool may take of each node. percent: of the node's memory; else bytes."""

    amount: float
    percent: bool

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read "25%", "20G" or bytes. Raises: UsageError."""
        found = AMOUNT.fullmatch(text.strip())
        if found is None or (found[2] and float(found[1]) > 100):
            raise UsageError(f"budget {text!r}: expected bytes, as 20G, or a share, as 25%")
        if found[2]:
            return cls(float(found[1]), percent=True)
        nbytes = float(found[1]) * 1024 ** UNITS.index((found[3] or " ").upper())
        if nbytes >= MOST:
            raise UsageError(f"budget {text!r}: expected less than 10^18 bytes (909494T)")
        return cls(nbytes, percent=False)

    def of(self, total: int) -> int:
        """Return the bytes of a node that has ``total``."""
        return int(total * self.amount / 100) if self.percent else int(self.amount)

    def __str__(self) -> str:
        if self.percent:
            return f"{self.amount:.6f}".rstrip("0").rstrip(".") + "%"
        return f"{self.amount:.0f}"


@dataclass(frozen=True)
class Gone:
    """A replica that left the store. when: seconds since the epoch. nbytes: on all its nodes."""

    when: float
    path: str
    pool: str
    nodes: tuple[int, ...]
    nbytes: int
    idle_s: float
    why: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def checked(pool: str) -> str:
    """Return the name of a pool. Raises: UsageError."""
    if not (isinstance(pool, str) and POOL.fullmatch(pool)):
        raise UsageError(
            f"pool {str(pool)[:100]!r}: expected letters, digits, '.', '_' or '-', at most 32"
        )
    return pool


def budgets() -> dict[str, Budget]:
    """Return {pool: its budget}; what cannot be read is reported, and counts as none."""
    with _folder(create=False) as folder:
        rows = {} if folder is None else _read(BUDGETS, folder, dict)
    found = {}
    for pool, text in rows.items():
        try:
            found[checked(str(pool))] = Budget.parse(str(text))
        except UsageError as error:  # noqa: PERF203 - the others are budgets all the same
            warn_once(f"{BUDGETS} {pool}", f"{_where(BUDGETS)}: {error}; left out")
    return found


def set_budget(pool: str, budget: Budget | None) -> None:
    """Give a pool a budget, or none. Raises: UsageError, StoreError."""
    checked(pool)
    with _folder(create=True) as folder:
        assert folder is not None  # noqa: S101 - it was made
        now = {name: str(one) for name, one in budgets().items() if name != pool}
        if budget is not None:
            now[pool] = str(budget)
        with userdir.named(_where(BUDGETS)):
            userdir.write_whole(BUDGETS, json.dumps(now).encode(), folder)


def journal() -> list[Gone]:
    """Return what went, latest first."""
    with _folder(create=False) as folder:
        rows = [] if folder is None else _read(JOURNAL, folder, list)
    found = []
    for row in rows[:ROWS]:
        with suppress(*userdir.UNREADABLE):
            found.append(_gone(row))
    return found


def note(entry: Entry, why: str, idle_s: float) -> None:
    """Write into the journal that an entry went. If that fails, only the journal lacks it."""
    nodes, path = tuple(entry.nodes), entry.model.paths[0]
    gone = Gone(time.time(), path, entry.pool, nodes, entry.nbytes, max(0.0, idle_s), why)
    try:
        with _folder(create=True) as folder:
            assert folder is not None  # noqa: S101 - it was made
            rows = [gone.to_dict(), *_read(JOURNAL, folder, list)][:ROWS]
            userdir.write_whole(JOURNAL, json.dumps(rows).encode(), folder)
    except OSError as error:
        why = str(error) if isinstance(error, StoreError) else reason(error)
        warn_once(JOURNAL, f"{_where(JOURNAL)}: {why}; what goes is not noted")


def left(pool: str, entries: Sequence[Entry], machine: Topology) -> dict[int, int]:
    """Return what the pool's budget leaves of each node; nothing where it has none."""
    budget = budgets().get(pool)
    if budget is None:
        return {}
    own = [entry for entry in entries if entry.pool == pool]
    return {
        node.id: budget.of(node.memory_total) - sum(entry.on_nodes.get(node.id, 0) for entry in own)
        for node in machine.nodes.values()
        if node.has_memory
    }


def over(pool: str, entries: Sequence[Entry], machine: Topology) -> list[Need]:
    """Return by how much a pool is over its budget, as needs of nothing more."""
    rest = left(pool, entries, machine).items()
    return [Need(f"pool {pool} on node {node}", 0, free, node) for node, free in rest if free < 0]


def chosen(
    candidates: Sequence[Entry], needs: Sequence[Need], idle: dict[str, float]
) -> tuple[list[Entry], bool]:
    """Return what goes so that all of these fit, in order, and whether that is enough.

    idle: seconds that nobody used them, by name.
    """
    short = {need: need.needed - need.free for need in needs if need.free is not None}
    short = {need: missing for need, missing in short.items() if missing > 0}
    going: list[Entry] = []
    for entry in sorted(candidates, key=lambda e: idle[e.name] * e.nbytes, reverse=True):
        if any(missing > 0 and _freed(entry, need) for need, missing in short.items()):
            going.append(entry)
            short = {need: missing - _freed(entry, need) for need, missing in short.items()}
    return going, not any(missing > 0 for missing in short.values())


def _freed(entry: Entry, need: Need) -> int:
    if need.is_tmpfs and entry.holder is not None:
        return 0
    return entry.nbytes if need.node is None else entry.on_nodes.get(need.node, 0)


def _gone(row: dict[str, Any]) -> Gone:
    """Parse a row. Raises: userdir.UNREADABLE."""
    number, (path,) = userdir.number, userdir.paths([row["path"]])
    return Gone(
        when=number(row["when"], float, below=1 << 40),
        path=path,
        pool=checked(str(row["pool"])),
        nodes=tuple(number(node) for node in row["nodes"]),
        nbytes=number(row["nbytes"]),
        idle_s=number(row["idle_s"], float),
        why=str(row["why"])[:1000],
    )


@contextmanager
def _folder(*, create: bool) -> Iterator[int | None]:
    """Give a descriptor of the folder, locked against other writers where it is to be written."""
    with userdir.within(FOLDER, create=create) as folder:
        if folder is None or not create:
            yield folder
            return
        userdir.flock(folder, fcntl.LOCK_EX)
        try:
            for name in filter(ASIDE.fullmatch, userdir.listed(folder)):  # of killed writers
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
            yield folder
        finally:  # closing alone would leave it locked where a child was forked meanwhile
            userdir.flock(folder, fcntl.LOCK_UN)


def _read(name: str, folder: int, kind: type) -> Any:
    """Return what a record holds; an empty one of its kind where it cannot be read."""
    try:
        found = json.loads(userdir.read_owned(name, folder))
        if isinstance(found, kind):
            return found
        why = f"expected a {kind.__name__}"
    except FileNotFoundError:
        return kind()
    except userdir.UNREADABLE as error:
        check_limits(error, _where(name))
        why = str(error)
    warn_once(name, f"{_where(name)}: no record that can be read ({why}); left out, remove it")
    return kind()


def _where(name: str) -> str:
    return f"{userdir.path()}/{FOLDER}/{name}"
