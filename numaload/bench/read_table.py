"""A report of ``bench read`` in words: a table for each state, and what was chosen."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from numaload.bench.read_report import LOADED, STATES, ReadReport, Row
from numaload.bench.read_ways import CEILING

HEADER = (
    "GB/s", "least", "most", "of best", "of ceiling", "CPU s/GiB", "in cache",
)  # fmt: skip


def tables(report: ReadReport) -> Iterator[tuple[list[str], list[list[str]]]]:
    """(header, rows) for cold and for warm, as far as they were measured."""
    for state in STATES:
        rows = [_cells(report, row, state) for row in report.rows if state in row.states]
        if rows:
            yield [state, *HEADER], rows


def _cells(report: ReadReport, row: Row, state: str) -> list[str]:
    """A dash where there is no such figure; what is in the cache only where that is not all."""
    figures, ratios = row.states[state], report.ratios(row, state)
    rates = [figures.rate, min(figures.rates), max(figures.rates)] if row.loads else [None] * 3
    loaded = figures.least_loaded
    shown = "" if loaded is None or loaded >= LOADED else f"{100 * loaded:.2f} %"
    best = None if row.sink == CEILING else ratios.get("best")
    return [
        f"{row.sink}: {name(row)}",
        *[_number(value) for value in (*rates, best, ratios.get("ceiling"))],
        f"{median(figures.cpu):.2f}",
        shown,
    ]


def name(row: Row) -> str:
    return f"numaload {row.way}" if row.ours else row.way


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def conclusions(report: ReadReport) -> Iterator[str]:
    for state in STATES:
        ceiling, dd = report.ceiling(state), report.dd_limit(state)
        if ceiling:
            yield f"{state} ceiling: {_rate(ceiling, state)}"
        if dd:
            yield f"{state}, what dd would call the limit: {_rate(dd, state)}"
        champion = report.champion(state)
        if champion:
            yield f"{state}, the fastest other way into the page cache: {_rate(champion, state)}"
    if report.plan is not None:
        yield f"numaload prewarm chose: {plan_words(report.plan)}"


def _rate(row: Row, state: str) -> str:
    return f"{row.states[state].rate:.2f} GB/s ({name(row)})"


def plan_words(plan: dict[str, object]) -> str:
    """A plan of whatever fields: the way and why, how wide, then what it lies on."""
    chunk = plan.get("chunk")
    words = [str(plan.get("way", "?"))]
    if plan.get("threads"):
        words.append(f"{plan['threads']} thread{'s' * (plan['threads'] != 1)}")
    if isinstance(chunk, int) and chunk:
        words.append(f"{chunk / 2**20:g} MiB a read")
    why = f", because: {plan['why']}" if plan.get("why") else ""
    return ", ".join(words) + why
