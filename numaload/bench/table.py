"""A report as a table: rows of words for terminals and for Markdown."""

from __future__ import annotations

from collections.abc import Collection

from numaload.bench.contenders import CALLERS, COPY, FILL, GGUF, GGUF_WARM, PAST, THREADS
from numaload.bench.dequant import DequantReport, Row
from numaload.dequantize import DTYPES


def header(report: DequantReport) -> list[str]:
    first, *others = dtypes(report)
    names = ["type", "bits", f"{first} Gw/s", "GB/s"]
    names += [f"x {name}" for name in baselines(report)]
    names += [f"{dtype} Gw/s" for dtype in others]
    if report.threads > 1:
        names += [f"{report.threads} threads Gw/s", "of limit", "two callers"]
    return names


def cells(report: DequantReport, row: Row) -> list[str]:
    """Numbers with two decimals; a dash where a baseline does not have the type."""
    first, *others = dtypes(report)
    rate = row.rates[first]
    found = [row.qtype, f"{row.bits_per_weight:.4g}", f"{rate:.2f}"]
    found.append(f"{rate * DTYPES[first].itemsize:.1f}")
    found += [_number(row.ratios.get(name)) for name in baselines(report)]
    found += [_number(row.rates[dtype]) for dtype in others]
    if report.threads > 1:
        found += [
            _number(row.rates[THREADS]),
            _number(row.ratios[THREADS]),
            _number(row.ratios[CALLERS]),
        ]
    return found


def dtypes(report: DequantReport) -> list[str]:
    return [name for name in DTYPES if name in report.rows[0].rates]


def baselines(report: DequantReport) -> list[str]:
    return [FILL, PAST, COPY, *report.libraries, GGUF, GGUF_WARM]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def markdown(report: DequantReport, columns: Collection[str] = ()) -> str:
    """The same as a Markdown table, of some columns if they are named; numbers to the right."""
    names = header(report)
    lines = [names, ["---"] + ["---:"] * (len(names) - 1)]
    lines += [cells(report, row) for row in report.rows]
    shown = [i for i, name in enumerate(names) if not columns or name in columns]
    return "\n".join(f"| {' | '.join(line[i] for i in shown)} |" for line in lines)
