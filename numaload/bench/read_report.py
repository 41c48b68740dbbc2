"""What ``bench read`` found: figures of every way, and what they are relative to others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import comb
from statistics import median
from typing import Any

from numaload.bench.read_ways import CACHE, CEILING, DD_LIMIT, PREWARM

COLD, WARM = "cold", "warm"
STATES = (COLD, WARM)
LOADED = 0.99  # of the file, in the page cache after it was read: below that it is shown
CHAMPION = 0.9  # and below that it is no way to read the file
CONFIDENCE = 0.95


@dataclass
class Figures:
    """Rounds in order. rates: GB/s; cpu: seconds a GiB; loaded: share that is in the page cache
    afterwards, None where that is not what the way is for, or not known.
    """

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loaded: list[float | None] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def least_loaded(self) -> float | None:
        return min((share for share in self.loaded if share is not None), default=None)


@dataclass
class Row:
    """One way. states: {"cold" or "warm": figures}; the rest as in ``read_ways.Family``."""

    way: str
    family: str
    sink: str
    what: str
    loads: bool
    ours: bool
    own: bool
    states: dict[str, Figures] = field(default_factory=dict)

    def counts(self, state: str) -> bool:
        """Whether it did read the file, so that its rate is one."""
        if not self.loads or state not in self.states:
            return False
        loaded = self.states[state].least_loaded
        return loaded is None or loaded >= CHAMPION


@dataclass
class Pairs:
    """``ours`` and ``theirs`` in turns. ratios: of their rates, pair by pair.

    interval: of the median, at ``confidence``; None where there are too few pairs for 95 %.
    """

    what: str
    state: str
    ours: str
    theirs: str
    ratios: list[float]

    @property
    def median(self) -> float:
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        return median_interval(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        more = {"median": self.median, "interval": self.interval, "confidence": CONFIDENCE}
        return asdict(self) | more


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """The narrowest two order statistics that hold the median with at least 95 %.

    It assumes nothing of how values are distributed: each is below the median with one half. None
    for fewer than six values. Source: the sign test's interval, in any book on order statistics.
    """
    count, found = len(values), None
    outside = 0.0  # that fewer than ``k`` of the values are below the median
    for k in range(count // 2):
        outside += comb(count, k) / 2**count
        if 2 * outside > 1 - CONFIDENCE:
            break
        found = k
    ordered = sorted(values)
    return None if found is None else (ordered[found], ordered[count - 1 - found])


@dataclass
class ReadReport:
    """nbytes: of the file's ``size``, from its start. plan: what prewarm chose on the cold file.

    left_out: {way: why it was not measured}. notes: what limits the figures' meaning.
    """

    path: str
    size: int
    nbytes: int
    rounds: int
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    plan: Any = None
    pairs: list[Pairs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def best(self, state: str, wanted: Callable[[Row], bool]) -> Row | None:
        """The fastest in medians of the rows wanted."""
        rows = [row for row in self.rows if row.counts(state) and wanted(row)]
        return max(rows, key=lambda row: row.states[state].rate, default=None)

    def ceiling(self, state: str) -> Row | None:
        return self.best(state, lambda row: row.sink == CEILING)

    def dd_limit(self, state: str) -> Row | None:
        """What dd and fio would call the limit."""
        return self.best(state, lambda row: row.family == DD_LIMIT)

    def champion(self, state: str) -> Row | None:
        """The fastest way into the page cache that is not numaload's."""
        return self.best(state, lambda row: row.sink == CACHE and not row.ours)

    def own_best(self) -> Row | None:
        """The fastest cold way into the page cache of those that numaload has."""
        return self.best(COLD, lambda row: row.sink == CACHE and (row.own or row.ours))

    def plan_share(self) -> float | None:
        """What the chosen plan reaches of the best of numaload's own ways, cold."""
        row, best = self.row(PREWARM), self.own_best()
        if row is None or best is None or not row.counts(COLD):
            return None
        return row.states[COLD].rate / best.states[COLD].rate

    def row(self, way: str) -> Row | None:
        return next((row for row in self.rows if row.way == way), None)

    def ratios(self, row: Row, state: str) -> dict[str, float]:
        """{"best": to the fastest of the same sink, "ceiling": to that}; empty if it is no rate."""
        if not row.counts(state):
            return {}
        others = {"best": self.best(state, lambda one: one.sink == row.sink)}
        others["ceiling"] = self.ceiling(state)
        rate = row.states[state].rate
        return {name: rate / other.states[state].rate for name, other in others.items() if other}

    def to_dict(self) -> dict[str, Any]:
        names = {
            "own_best": self.own_best(),
            **{f"champion_{state}": self.champion(state) for state in STATES},
            **{f"ceiling_{state}": self.ceiling(state) for state in STATES},
            **{f"dd_limit_{state}": self.dd_limit(state) for state in STATES},
        }
        return asdict(self) | {
            "rows": [self._row(row) for row in self.rows],
            "pairs": [pairs.to_dict() for pairs in self.pairs],
            "plan_share": self.plan_share(),
            **{name: row and row.way for name, row in names.items()},
        }

    def _row(self, row: Row) -> dict[str, Any]:
        states = {
            state: asdict(figures)
            | {
                "rate": figures.rate if row.loads else None,
                "cpu_per_gib": median(figures.cpu),
                "ratios": self.ratios(row, state),
            }
            for state, figures in row.states.items()
        }
        return asdict(row) | {"states": states}
