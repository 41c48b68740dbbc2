"""Reports in words, as tables for terminals, and as a picture, which needs matplotlib."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from statistics import median
from typing import Any

from numaload.bench.bandwidth import FIGURES, BandwidthReport
from numaload.bench.compare import Comparison
from numaload.bench.dequant import (
    CALLERS,
    COPY,
    FILL,
    GGUF,
    GGUF_WARM,
    PAST,
    THREADS,
    DequantReport,
)
from numaload.bench.dequant import Row as TypeRow
from numaload.bench.mirror import COPY as COPY_FILE
from numaload.bench.mirror import MirrorReport
from numaload.bench.read import STATES, ReadReport, Row
from numaload.bench.ways import BUFFER, CEILING
from numaload.dequantize import DTYPES
from numaload.errors import UsageError, reason
from numaload.linux.syscalls import PAGE
from numaload.machine import userdir

ALL = 0.99  # of a file: with less in the page cache, that share is shown
COLORS = ("#1f6feb", "#9a6700", "#6e7781", "#a40e26")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


# bench read --------------------------------------------------------------------------------------


def read_tables(report: ReadReport) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Yield (header, rows) for cold and for warm, as far as they were measured."""
    columns = ["GB/s", "least", "most", "of best", "of ceiling", "CPU s/GiB", "in cache"]
    for state in STATES:
        rows = [_read_cells(report, row, state) for row in report.rows if state in row.states]
        if rows:
            yield [state, *columns], rows


def _read_cells(report: ReadReport, row: Row, state: str) -> list[str]:
    """Show a dash where there is no such figure, and what is in the cache if that is not all."""
    figures, ratios = row.states[state], report.ratios(row, state)
    loaded = figures.least_loaded
    best = None if row.sink in (BUFFER, CEILING) else ratios.get("best")
    numbers = (
        figures.rate, min(figures.rates), max(figures.rates), best, ratios.get("ceiling"),
        median(figures.cpu),
    )  # fmt: skip
    return [
        f"{row.sink}: {_name(row)}",
        *map(_number, numbers),
        "" if loaded is None or loaded >= ALL else f"{100 * loaded:.2f} %",
    ]


def _name(row: Row) -> str:
    return f"numaload {row.way}" if row.ours else row.way


def conclusions(report: ReadReport) -> Iterator[str]:
    """Yield the limits, the fastest other ways, numaload's choice, and the pairs, a line each."""
    for state in STATES:
        for what, row in (
            (f"{state} ceiling, direct reads into prepared memory", report.ceiling(state)),
            (f"{state}, direct reads into one buffer", report.buffer_limit(state)),
            (f"{state}, what dd would call the limit", report.dd_limit(state)),
            (f"{state}, the fastest other way into the page cache", report.champion(state)),
        ):
            if row:
                yield f"{what}: {row.states[state].rate:.2f} GB/s ({_name(row)})"
    if report.plan is not None:
        yield f"numaload prewarm chose: {plan_words(report.plan)}"
    share, best = report.plan_share(), report.own_best()
    if share is not None and best is not None:
        yield f"it reaches {share:.2f} of the best of numaload's own ways ({_name(best)})"
    for pairs in report.pairs:
        interval = "" if pairs.interval is None else " [{:.2f}, {:.2f}]".format(*pairs.interval)
        yield (
            f"{pairs.state}, {pairs.what}: {pairs.median:.2f}{interval}"
            f" ({pairs.ours} / {pairs.theirs}, {len(pairs.ratios)} pairs)"
        )


def plan_words(plan: dict[str, object]) -> str:
    """Put a plan of whatever fields in words: the way, how wide, and why."""
    chunk = plan.get("chunk")
    words = [str(plan.get("way", "?"))]
    if plan.get("threads"):
        words.append(f"{plan['threads']} thread{'s' * (plan['threads'] != 1)}")
    if isinstance(chunk, int) and chunk:
        words.append(f"{chunk / 2**20:g} MiB a read")
    why = f", because: {plan['why']}" if plan.get("why") else ""
    return ", ".join(words) + why


# bench bandwidth ---------------------------------------------------------------------------------


def bandwidth_table(report: BandwidthReport) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows), a row for each pair of nodes: medians, and where the memory was."""
    names = ["CPUs of", "memory of", "distance", "threads"]
    names += [f"{name} {unit}" for name, unit in FIGURES.items()]
    rows = []
    for pair in report.pairs:
        there, pages = pair.pages.get(pair.memory, 0), sum(pair.pages.values())
        row = [f"node {pair.cpus}", f"node {pair.memory}", str(pair.distance or "?")]
        row.append(str(pair.threads))
        row += [_number(pair.median(name)) for name in FIGURES]
        rows.append([*row, f"{there} of {pages}", f"{pair.huge / (pages * PAGE):.0%}"])
    return [*names, "pages there", "huge"], rows


# bench mirror ------------------------------------------------------------------------------------


def mirror_table(report: MirrorReport) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows), a row for the replicas and for each of their limits."""
    return ["what", "GB/s", "least", "most", f"of {COPY_FILE}"], [
        [name, *map(_number, (median(rates), min(rates), max(rates), report.ratio(name)))]
        for name, rates in report.rates.items()
    ]


# --compare ---------------------------------------------------------------------------------------


def compare_table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows), a row for each figure that both reports have."""
    rows = []
    for row in comparison.rows:
        ends = "-" if row.interval is None else "{:.2f} to {:.2f}".format(*row.interval)
        old, new = (f"{value:.2f} {row.unit}" for value in (row.old, row.new))
        baseline = row.baseline or "-"
        rows.append([row.name, old, new, baseline, f"{row.ratio:.2f}", ends, row.verdict])
    return ["figure", "old", "new", "beside", "times as fast", "interval", "so"], rows


# bench dequant -----------------------------------------------------------------------------------


def dequant_table(report: DequantReport) -> tuple[list[str], list[list[str]]]:
    """Return (header, rows), a row for each type."""
    first, *others = _dtypes(report)
    names = ["type", "bits", f"{first} Gw/s", "GB/s"]
    names += [f"x {name}" for name in _compared(report)]
    names += [f"{dtype} Gw/s" for dtype in others]
    if report.threads > 1:
        names += [f"{report.threads} threads Gw/s", "of limit", "two callers"]
    return names, [_dequant_cells(report, row) for row in report.rows]


def _dequant_cells(report: DequantReport, row: TypeRow) -> list[str]:
    """Show a dash where a baseline does not have the type."""
    first, *others = _dtypes(report)
    rate = row.rates[first]
    found = [row.qtype, f"{row.bits_per_weight:.4g}", f"{rate:.2f}"]
    found.append(f"{rate * DTYPES[first].itemsize:.1f}")
    found += [_number(row.ratios.get(name)) for name in _compared(report)]
    found += [_number(row.rates[dtype]) for dtype in others]
    if report.threads > 1:
        several = (row.rates[THREADS], row.ratios[THREADS], row.ratios[CALLERS])
        found += map(_number, several)
    return found


def _dtypes(report: DequantReport) -> list[str]:
    return [name for name in DTYPES if name in report.rows[0].rates]


def _compared(report: DequantReport) -> list[str]:
    return [FILL, PAST, COPY, *report.libraries, GGUF, GGUF_WARM]


def check_plot(path: str) -> None:
    """Refuse a path that could not be drawn. Raises: UsageError, OSError."""
    try:
        from matplotlib.figure import Figure  # noqa: F401 - whether it is there
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'numaload[plot]'") from None
    if _ending(path) not in ("svg", "png"):
        raise UsageError(f"--plot {path}: expected a name that ends in .svg or .png")
    folder = os.path.dirname(os.path.realpath(path))  # a link to a picture stays one
    if os.path.lexists(path) and not os.path.isfile(path):
        raise UsageError(f"--plot {path}: {path} cannot be written to as a file there")
    if not os.access(folder, os.W_OK):
        raise OSError(f"--plot {path}: {folder} cannot be written to")


def plot(report: DequantReport, path: str) -> None:
    """Draw a row per type, the rate of each way to float32. Raises: UsageError, OSError.

    A picture that was there is replaced by a whole one, or stays.
    """
    check_plot(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same report gives the same file.
    with mpl.rc_context({"svg.hashsalt": "numaload", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 0.34 * len(report.rows) + 1.6), layout="constrained")
        _bars(figure.subplots(), report)
        picture, kind = io.BytesIO(), _ending(path)
        metadata = {"Date": None} if kind == "svg" else None
        figure.savefig(picture, format=kind, metadata=metadata)
    where, name = os.path.split(os.path.realpath(path))
    try:
        with userdir.folder(where, None) as folder:
            userdir.write_whole(name, picture.getvalue(), folder)
    except OSError as error:
        raise OSError(f"--plot {path}: {reason(error)}") from error


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def _bars(axes: Any, report: DequantReport) -> None:
    first = _dtypes(report)[0]
    series = {f"numaload, to {first}": first} | {name: name for name in [*report.libraries, GGUF]}
    height = 0.8 / len(series)
    for i, (label, name) in enumerate(series.items()):
        places = [n + (i - (len(series) - 1) / 2) * height for n in range(len(report.rows))]
        rates = [row.rates.get(name, 0) for row in report.rows]
        axes.barh(places, rates, height, label=label, color=COLORS[i % len(COLORS)])
    limit = report.baselines[PAST] / 4
    axes.axvline(limit, color="black", linewidth=1, linestyle=":", label="filling past the caches")
    axes.set_yticks(range(len(report.rows)), [row.qtype for row in report.rows])
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel(f"Gweights/s, one thread, {report.machine['processor']}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=3, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
