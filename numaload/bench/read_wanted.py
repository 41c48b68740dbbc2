"""What reading shall reach, and how a report stands to it: against whom, in pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from numaload.bench.read_report import COLD, WARM, Pairs, ReadReport, Row
from numaload.bench.read_ways import COPY, PREWARM

PLAN_SHARE = 0.9
KERNELS_OWN = frozenset({"populate", "vmtouch"})


def _warm_rival(report: ReadReport) -> Row | None:
    return report.best(WARM, lambda row: row.family in KERNELS_OWN)


@dataclass(frozen=True)
class Duel:
    """``ours`` against the rival; of the ratio ``least``.

    or_equal: an interval that holds 1 will do as well: they cannot be told apart.
    """

    what: str
    state: str
    ours: str
    rival: Callable[[ReadReport], Row | None]
    level: str
    least: float
    or_equal: bool = False

    def fighters(self, report: ReadReport) -> tuple[str, str] | None:
        """Names of ways, ours first; None where one of them was not measured."""
        ours, rival = report.row(self.ours), self.rival(report)
        if ours is None or rival is None or self.state not in ours.states:
            return None
        return ours.way, rival.way


DUELS = (
    Duel(
        "into the page cache, beside the fastest other way", COLD, PREWARM,
        lambda report: report.champion(COLD), "must", 0.95, or_equal=True,
    ),
    Duel(
        "into the page cache, beside the direct limit", COLD, PREWARM,
        lambda report: report.ceiling(COLD), "goal", 0.9,
    ),
    Duel(
        "what is resident, beside the kernel's own call and vmtouch", WARM, PREWARM,
        _warm_rival, "must", 1.0, or_equal=True,
    ),
    Duel(
        "into private memory, beside the direct limit", COLD, COPY,
        lambda report: report.ceiling(COLD), "must", 0.9,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """``found`` of what is wanted; the interval of that, if it was measured in pairs."""

    level: str
    what: str
    found: float
    least: float
    interval: tuple[float, float] | None = None
    where: str = ""
    or_equal: bool = False

    @property
    def met(self) -> bool:
        low, high = self.interval or (2.0, 0.0)
        return self.found >= self.least or (self.or_equal and low <= 1 <= high)

    def __str__(self) -> str:
        shown = [f"{self.found:.2f}"]
        if self.interval is not None:
            shown.append("[{:.2f}, {:.2f}]".format(*self.interval))
        where = f" ({self.where})" if self.where else ""
        verdict = "met" if self.met else "MISSED"
        return (
            f"{self.level}: {self.what}: {' '.join(shown)}{where}, wanted {self.least:.2f}:"
            f" {verdict}"
        )


def findings(report: ReadReport) -> list[Finding]:
    """Of the plan, where it and other ways were measured cold; of every duel that took place."""
    found = []
    share, best = report.plan_share(), report.own_best()
    if share is not None and best is not None:
        what = "the chosen plan beside the best of numaload's own ways"
        found.append(Finding("must", what, share, PLAN_SHARE, where=best.way))
    for pairs in report.pairs:
        (duel,) = (one for one in DUELS if one.what == pairs.what)
        found.append(_finding(duel, pairs))
    return found


def _finding(duel: Duel, pairs: Pairs) -> Finding:
    where = f"{pairs.ours} / {pairs.theirs}, {len(pairs.ratios)} pairs"
    what = f"{pairs.state} {pairs.what}"
    return Finding(duel.level, what, pairs.median, duel.least, pairs.interval, where, duel.or_equal)
