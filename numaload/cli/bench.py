"""``numaload bench``: measurements, each beside its baselines in the same run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from numaload.cli.output import complain, note, print_json, print_table, say, show_step, size

if TYPE_CHECKING:
    from numaload.bench.dequant import DequantReport
    from numaload.bench.read import ReadReport


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("bench", help="measure this machine: bench dequant, bench read")
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    _add_dequant(benches)
    _add_read(benches)


def _words(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def _say_machine(machine: dict[str, str]) -> None:
    show_step("")
    say(", ".join(f"{what} {found}" for what, found in machine.items()))


# bench dequant -----------------------------------------------------------------------------------


def _add_dequant(benches: Any) -> None:
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


def dequant(options: argparse.Namespace) -> int:
    from numaload.bench import table
    from numaload.bench.dequant import measure

    if options.plot is not None:
        table.check_plot(options.plot)  # before minutes of measuring
    report = measure(
        _words(options.qtype), _words(options.dtype), options.threads, options.rounds,
        _libraries(options.ggml), None if options.json else show_step,
    )  # fmt: skip
    if options.json:
        print_json(report.to_dict())
    else:
        _tell_dequant(report)
    if options.plot is not None:
        table.plot(report, options.plot)
    for row in report.rows:
        for name in (name for name, same in row.same.items() if not same):
            complain(f"{row.qtype}: {name} is not the same, bit for bit")
    return 0 if report.same else 1


def _libraries(given: list[str] | None) -> dict[str, str]:
    from numaload.bench.baselines import installed
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


def _tell_dequant(report: DequantReport) -> None:
    from numaload.bench.table import dequant_table

    _say_machine(report.machine)
    for name, path in report.libraries.items():
        say(f"{name}: {path}")
    say(
        f"{report.weights >> 20} Mi weights, medians of {report.rounds} rounds in turns;"
        f" GB/s written: {', '.join(f'{n} {v:.1f}' for n, v in report.baselines.items())}"
    )
    print_table(*dequant_table(report), figures=True)


# bench read --------------------------------------------------------------------------------------


def _add_read(benches: Any) -> None:
    parser = benches.add_parser(
        "read",
        help="all ways of reading a file, cold and warm, and which one numaload chooses",
        description="Reads a file in every way there is, in shuffled turns; medians of the rounds,"
        " least and most. Cold: its page cache is given back before each timing, and that is"
        " checked. of best: beside the fastest way to the same place; of ceiling: beside direct"
        " reads into memory of the file's size that was prepared before. in cache: how much of the"
        " file is there afterwards, where that is not all. The file is read and never written.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="any regular file")
    parser.add_argument("--ways", metavar="LIST", help="ways, with commas; see --list")
    parser.add_argument("--list", action="store_true", help="print the ways, and measure nothing")
    parser.add_argument("--threads", metavar="LIST", help="1,4 for instance, instead of --list's")
    parser.add_argument("--rounds", metavar="N", type=int, default=3, help="3 unless given")
    parser.add_argument("--cold", action="store_true", help="only cold")
    parser.add_argument("--warm", action="store_true", help="only warm")
    parser.add_argument(
        "--pairs", metavar="N", type=int, default=0,
        help="then numaload and the fastest other way in turns, N times: the median of the ratios"
        " and its 95 %% interval",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=read)


def read(options: argparse.Namespace) -> int:
    from numaload.errors import UsageError

    if options.list:
        _list(options)
        return 0
    if options.file is None:
        raise UsageError("FILE is missing: which file is to be read?")
    from numaload.bench.read import STATES, measure

    asked = [state for state in STATES if getattr(options, state)]
    report = measure(
        options.file, _words(options.ways), states=asked or STATES,
        threads=_counts(options.threads), rounds=options.rounds, pairs=options.pairs,
        progress=None if options.json else show_step,
    )  # fmt: skip
    if options.json:
        print_json(report)
    else:
        _tell_read(report)
    return 0


def _counts(text: str | None) -> list[int]:
    from numaload.errors import UsageError

    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UsageError(f"--threads {text}: expected numbers with commas") from None


def _list(options: argparse.Namespace) -> None:
    from numaload.bench.ways import METHODS

    names = ("way", "into", "threads", "what")
    rows = [(m.name, m.sink, ",".join(map(str, m.counts)) or "-", m.what) for m in METHODS]
    if options.json:
        print_json([dict(zip(names, row, strict=True)) for row in rows])
    else:
        print_table([*names[:-1], "what it measures"], rows)


def _tell_read(report: ReadReport) -> None:
    from numaload.bench.table import conclusions, read_tables

    _say_machine(report.machine)
    say(f"{report.path}: {size(report.size)}, medians of {report.rounds} rounds in shuffled turns")
    for header, rows in read_tables(report):
        print_table(header, rows, figures=True)
    for line in conclusions(report):
        say(line)
    for text in report.notes:
        note(text)
    for way, why in report.left_out.items():
        note(f"{way} is not measured: {why}")
