"""What kernels shall reach, as a table, and how a report stands to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numaload.bench.dequant import DequantReport, Row

SLOW_IN_GGML = {"IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "Q1_0"}


@dataclass(frozen=True)
class Wish:
    """``least`` of the ratio to ``baseline``, of each type that ``types`` takes, or by ``of``."""

    level: str  # must, goal
    what: str
    baseline: str
    least: float
    types: Callable[[str], bool] = lambda _: True
    of: Callable[[Iterable[float]], float] = min


WISHES = (
    Wish("must", "as fast as ggml as shipped", "ggml", 1.0),
    Wish(
        "must", "6 times ggml as shipped (IQ2, IQ3, Q1_0)", "ggml", 6.0, SLOW_IN_GGML.__contains__
    ),
    Wish("must", "10 times gguf-py (not F16)", "gguf-py", 10.0, lambda name: name != "F16"),
    Wish("must", "float16: 0.8 of float32's weights", "float16", 0.8),
    Wish("must", "bfloat16: 0.8 of float32's weights", "bfloat16", 0.8),
    Wish("must", "several threads: 0.83 of what they could", "threads", 1 / 1.2),
    Wish("must", "two callers at once: 0.7 of half each", "two callers", 0.7),
    Wish("goal", "as fast as ggml built natively", "native", 1.0),
    Wish("goal", "0.45 of filling past the caches", "past caches", 0.45),
    Wish("goal", "median type: 0.75 of filling past the caches", "past caches", 0.75, of=median),
    Wish("goal", "float16: more weights than float32", "float16", 1.0),
    Wish("goal", "bfloat16: more weights than float32", "bfloat16", 1.0),
)


@dataclass(frozen=True)
class Finding:
    wish: Wish
    found: float
    where: str  # the type that has least; empty for a median

    @property
    def met(self) -> bool:
        return self.found >= self.wish.least

    def __str__(self) -> str:
        wish, verdict = self.wish, "met" if self.met else "MISSED"
        where = f" ({self.where})" if self.where else ""
        found = f"{self.found:.2f}{where}, wanted {wish.least:.2f}: {verdict}"
        return f"{wish.level}: {wish.what}: {found}"


def findings(report: DequantReport) -> list[Finding]:
    """Of every wish whose baseline was measured."""
    found = []
    for wish in WISHES:
        rows = [row for row in report.rows if wish.baseline in row.ratios and wish.types(row.qtype)]
        if rows:
            found.append(_finding(wish, rows))
    return found


def _finding(wish: Wish, rows: list[Row]) -> Finding:
    ratios = {row.qtype: row.ratios[wish.baseline] for row in rows}
    value = wish.of(ratios.values())
    worst = min(ratios, key=lambda name: ratios[name])
    return Finding(wish, value, worst if wish.of is min else "")
