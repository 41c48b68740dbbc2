"""``numaload bench``: measurements, each beside its baselines in the same run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from numaload.cli import bench_read
from numaload.cli.output import complain, note, print_json, print_table, say, show_step

if TYPE_CHECKING:
    from numaload.bench.dequant import DequantReport


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("bench", help="measure this machine: bench dequant, bench read")
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    parser = benches.add_parser(
        "dequant",
        help="kernels, a line per type, beside filling, memcpy, gguf-py and ggml",
        description="Measures kernels on random weights that it makes. Gw/s: 10^9 weights a second."
        " 'x NAME': how many times as fast as NAME, to float32, on one thread. fill: plain stores;"
        " past caches: stores that bypass them. Results are compared with those of the others, of"
        " one thread, and with rounding by numpy; exit status 1 if a bit differs.",
    )
    parser.add_argument("--qtype", metavar="LIST", help="types, with commas; all unless given")
    parser.add_argument("--dtype", metavar="LIST", help="besides float32; all unless given")
    parser.add_argument("--threads", metavar="N", type=int, default=1, help="also on N threads")
    parser.add_argument("--rounds", metavar="N", type=int, default=7, help="7 unless given")
    parser.add_argument(
        "--ggml",
        metavar="[NAME=]PATH",
        action="append",
        help="a libggml-base.so to compare with; that of an installed llama-cpp-python if none",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .svg, .png (extra: plot)")
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=dequant)
    bench_read.add_to(benches)


def dequant(options: argparse.Namespace) -> int:
    from numaload.bench.dequant import measure

    if options.plot is not None:
        from numaload.bench import plot

        plot.check(options.plot)  # before minutes of measuring
    report = measure(
        _words(options.qtype), _words(options.dtype), options.threads, options.rounds,
        _libraries(options.ggml), None if options.json else show_step,
    )  # fmt: skip
    if options.json:
        print_json(report.to_dict())
    else:
        _tell(report)
    if options.plot is not None:
        plot.draw(report, options.plot)
    for row in report.rows:
        for name in (name for name, same in row.same.items() if not same):
            complain(f"{row.qtype}: {name} is not the same, bit for bit")
    return 0 if report.same else 1


def _words(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def _libraries(given: list[str] | None) -> dict[str, str]:
    from numaload.bench.ggml import installed
    from numaload.errors import UsageError

    found: dict[str, str] = {}
    for text in given or []:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = "ggml", text
        if name in found:
            raise UsageError(f"--ggml {text}: one is named {name} already; NAME=PATH names it")
        found[name] = path
    default = installed()
    if not found and default:
        found["ggml"] = default
    if not found:
        note("ggml is not measured: pip install llama-cpp-python, or --ggml PATH")
    return found


def _tell(report: DequantReport) -> None:
    from numaload.bench import table
    from numaload.bench.wanted import findings

    show_step("")
    say(", ".join(f"{what} {found}" for what, found in report.machine.items()))
    for name, path in report.libraries.items():
        say(f"{name}: {path}")
    say(
        f"{report.weights >> 20} Mi weights, medians of {report.rounds} rounds in turns;"
        f" GB/s written: {', '.join(f'{n} {v:.1f}' for n, v in report.baselines.items())}"
    )
    rows = [table.cells(report, row) for row in report.rows]
    print_table(table.header(report), rows, figures=True)
    for finding in findings(report):
        say(finding)
