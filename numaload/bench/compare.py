"""Compare a report with an older one of the same bench. What may be noise is no difference.

As pyperf's ``compare_to``, but for machines whose speed drifts: single rounds are compared by
ranks, beside a baseline of the same turns where there is one, and an interval must exclude more
than 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, median
from typing import Any

import numpy as np

from numaload.bench.machine import LOAD_AFTER, MOST_ROUNDS, Series
from numaload.errors import FormatError, UsageError
from numaload.files.source import read_whole
from numaload.formats.jsontext import parse_object

LARGEST = 16 << 20  # bytes of a report
MOST_SERIES, MOST_VALUES, LONGEST_NAME = 10_000, 2 * MOST_ROUNDS, 200  # VALUES: of a series
UNITS = ("GB/s", "Gw/s", "ns")
SIGNIFICANT = 0.05  # of all rows of a report together: each has its part of it
NO_LIMIT = ("rounds", "pairs")  # parameters that may differ: they only change how much is seen
LISTS = ("dtype", "nodes", "qtype", "threads", "ways")  # parameters of any order and case
LABELS = {"file": "FILE", "bytes": "the size of FILE", "files": "the number of its files"}
CHANGING = ("date", "load before", LOAD_AFTER, "in huge pages")  # from run to run
FASTER, SLOWER, SAME, FEW = "faster", "slower", "no difference", "too few rounds"


@dataclass(frozen=True)
class Row:
    """One figure. old, new: medians. ratio: how many times as fast now, of kernels beside their
    ``baseline``, and the ends of its interval, None where there are too few rounds.

    seen: the least slowdown that would have been called one here, as a share.
    """

    name: str
    unit: str
    old: float
    new: float
    baseline: str
    ratio: float
    interval: tuple[float, float] | None
    seen: float | None
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """machine: {what: (then, now)} of what is not the same. left_out: rows that only one
    report has, or in another unit.
    """

    rows: list[Row]
    machine: dict[str, tuple[str, str]]
    left_out: list[str]

    @property
    def slower(self) -> bool:
        return any(row.verdict == SLOWER for row in self.rows)

    @property
    def summary(self) -> str:
        """Say what could be seen at all."""
        if not self.rows:
            return "nothing is compared: the reports have no figure in common"
        seen = sorted(row.seen for row in self.rows if row.seen is not None)
        if not seen:
            return "nothing can be told apart here: there are too few rounds (--rounds)"
        ends = " to ".join(dict.fromkeys(f"{100 * share:.0f}" for share in (seen[0], seen[-1])))
        return f"differences under {ends} % (by row) cannot be told apart here"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"slower": self.slower, "summary": self.summary}


def load_report(path: str) -> dict[str, Any]:
    """Read what ``--json`` printed. Raises: ReadError, FormatError."""
    report = parse_object(read_whole(path, LARGEST), path, FormatError)
    for key, kind in (("bench", str), ("parameters", dict), ("machine", dict), ("series", list)):
        if not isinstance(report.get(key), kind):
            raise FormatError(f"no report of a bench: {key} is not there, or is something else",
                              path=path)  # fmt: skip
    if len(report["series"]) > MOST_SERIES:
        raise FormatError(f"more than {MOST_SERIES} series", path=path)
    report["series"] = [_series(one, i, path) for i, one in enumerate(report["series"])]
    if len({one.name for one in report["series"]}) < len(report["series"]):
        raise FormatError("two series have one name", path=path)
    return report


def _series(found: Any, number: int, path: str) -> Series:
    """Check what a file says of one figure. Raises: FormatError."""
    known: dict[str, Any] = found if isinstance(found, dict) else {}
    keys = ("name", "unit", "values", "baseline", "beside")
    fields: list[Any] = [known.get(key) for key in keys]
    name, unit, values, baseline, beside = fields
    right = (
        isinstance(name, str)
        and isinstance(baseline, str)
        and max(len(name), len(baseline)) <= LONGEST_NAME
        and unit in UNITS
        and _is_rounds(values)
        and _is_rounds(beside)
        and bool(values)
        and len(beside) == (len(values) if baseline else 0)
    )
    if not right:
        raise FormatError(
            f"series {number}: expected a name, a unit of {', '.join(UNITS)}, 1 to {MOST_VALUES}"
            " values above 0, and a baseline with as many beside them, or none",
            path=path,
        )
    return Series(name, unit, values, 0, baseline, beside)  # the new one says the margin


def _is_rounds(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= MOST_VALUES
        and all(type(value) in (int, float) and 1e-12 < value < 1e12 for value in values)
    )


def check_same(
    path: str, old: Mapping[str, Any], bench: str, parameters: Mapping[str, Any], processor: str
) -> None:
    """Refuse a report of something else: its figures mean something else. Raises: UsageError."""
    pairs: dict[str, tuple[Any, Any]] = {"the bench": (old["bench"], bench)}
    for name in sorted((set(old["parameters"]) | set(parameters)) - set(NO_LIMIT)):
        pairs[LABELS.get(name, f"--{name}")] = (old["parameters"].get(name), parameters.get(name))
    pairs["the processor"] = (old["machine"].get("processor"), processor)
    for what, (then, now) in pairs.items():
        if _as_measured(what, then) != _as_measured(what, now):
            raise UsageError(f"--compare {path}: {what} is {then!r} there, and {now!r} here")


def _as_measured(what: str, value: Any) -> Any:
    """Return a value that is equal for all that measures the same."""
    is_list = what.removeprefix("--") in LISTS and isinstance(value, str)
    return set(value.upper().split(",")) if is_list else value


def compare(
    old: Mapping[str, Any], machine: dict[str, str], series: Sequence[Series]
) -> Comparison:
    """Compare what was measured with an older report.

    old: as of ``load_report``. machine, series: of the new one.
    """
    before = {one.name: one for one in old["series"]}
    now = {one.name: one for one in series}
    both = [name for name in now if name in before and before[name].unit == now[name].unit]
    rows = [_row(before[name], now[name], SIGNIFICANT / len(both)) for name in both]
    differs = {
        what: (str(old["machine"].get(what)), found)
        for what, found in machine.items()
        if what not in CHANGING and old["machine"].get(what) != found
    }
    return Comparison(rows, differs, sorted((before.keys() | now.keys()) - set(both)))


def _row(old: Series, new: Series, significant: float) -> Row:
    beside = old.baseline == new.baseline and bool(new.baseline)
    before, now = (_logarithms(one, beside=beside) for one in (old, new))
    differences = np.sort(np.subtract.outer(now, before), axis=None)
    middle, margin = float(np.median(differences)), math.log1p(new.margin)
    outside = _outside(len(before), len(now), significant)
    verdict, seen, interval = FEW, None, None
    if outside:
        low, high = float(differences[outside - 1]), float(differences[-outside])
        verdict = SLOWER if high < -margin else FASTER if low > margin else SAME
        seen, interval = 1 - math.exp(middle - high - margin), (math.exp(low), math.exp(high))
    return Row(
        new.name, new.unit, median(old.values), median(new.values),
        new.baseline if beside else "", math.exp(middle), interval, seen, verdict,
    )  # fmt: skip


def _logarithms(series: Series, *, beside: bool) -> Any:
    """Return how fast each round was, on a scale on which ratios are differences."""
    values = np.log(series.values) * (-1 if series.unit == "ns" else 1)
    return values - np.log(series.beside) if beside else values


def _outside(before: int, now: int, significant: float) -> int:
    """Return which of all sorted differences of two samples, from both ends, bounds their shift.

    It is the interval of the rank sum test (Mann and Whitney; Hodges and Lehmann), by its normal
    approximation, rounded to the wider side. It assumes nothing about the distribution. 0 where
    there are too few values for so small a ``significant``.
    """
    pairs = before * now
    spread = math.sqrt(pairs * (before + now + 1) / 12)
    return max(0, int(pairs / 2 - NormalDist().inv_cdf(1 - significant / 2) * spread))
