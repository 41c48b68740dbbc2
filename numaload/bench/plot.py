"""A report as a picture: a row per type, the rate of each way to float32. Needs matplotlib."""

from __future__ import annotations

import os
from typing import Any

from numaload.bench.contenders import GGUF, PAST
from numaload.bench.dequant import DequantReport
from numaload.bench.table import dtypes
from numaload.errors import UsageError

COLORS = ("#1f6feb", "#9a6700", "#6e7781", "#a40e26")


def check(path: str) -> None:
    """Whether ``path`` could be drawn. Raises: UsageError."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UsageError("--plot needs matplotlib: pip install 'numaload[plot]'") from None
    if _ending(path) not in Figure().canvas.get_supported_filetypes():
        raise UsageError(f"--plot {path}: expected a name that ends in .svg or .png")
    folder = os.path.dirname(path) or "."
    if os.path.isdir(path) or not os.access(folder, os.W_OK):
        wrong = path if os.path.isdir(path) else folder
        raise UsageError(f"--plot {path}: {wrong} cannot be written to as a file there")


def draw(report: DequantReport, path: str) -> None:
    """Write ``path``, an .svg, or what else its ending says. Raises: UsageError, OSError."""
    check(path)
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The same report gives the same file.
    with mpl.rc_context({"svg.hashsalt": "numaload", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 0.34 * len(report.rows) + 1.6), layout="constrained")
        _bars(figure.subplots(), report)
        figure.savefig(path, metadata={"Date": None} if _ending(path) == "svg" else None)


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lstrip(".").lower()


def _bars(axes: Any, report: DequantReport) -> None:
    first = dtypes(report)[0]
    series = {f"numaload, to {first}": first}
    series |= {name: name for name in [*report.libraries, GGUF]}
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
