"""``numaload bench``: measurements, each beside its baselines in the same run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from numaload.cli.output import (
    byte_count,
    complain,
    files_of,
    note,
    on_nodes,
    print_json,
    print_table,
    say,
    show_step,
    size,
)

if TYPE_CHECKING:
    from numaload.bench.bandwidth import BandwidthReport
    from numaload.bench.compare import Comparison
    from numaload.bench.dequant import DequantReport
    from numaload.bench.mirror import MirrorReport
    from numaload.bench.read import ReadReport

NO_PARAMETERS = {"bench", "run", "json", "compare", "plot", "list"}  # of what is measured


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "bench", help="measure this machine: bench bandwidth, dequant, mirror, read"
    )
    benches = parser.add_subparsers(metavar="WHAT", required=True)
    for name, (add, rounds) in {
        "bandwidth": (_add_bandwidth, 15),
        "dequant": (_add_dequant, 15),
        "mirror": (_add_mirror, 15),
        "read": (_add_read, 3),
    }.items():
        its = add(benches)
        its.add_argument(
            "--rounds", metavar="N", type=int, default=rounds, help=f"{rounds} unless given"
        )
        its.add_argument("--json", action="store_true", help="print the API's report")
        its.add_argument(
            "--compare",
            metavar="OLD.json",
            help="compare with what --json printed: what may be noise is no difference. Exit status"
            " 1 if something is slower",
        )
        its.set_defaults(bench=name)


def _words(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def _finish(
    options: argparse.Namespace, measure: Callable[[], Any], tell: Callable[[Any], None]
) -> tuple[Any, int]:
    """Measure, print the report and how it compares; return the report and the exit status.

    What is to be compared with is read first: measuring takes minutes.
    """
    parameters = _parameters(options)
    old = None
    if options.compare is not None:
        from numaload.bench.compare import check_same, compare, load_report
        from numaload.bench.machine import processor

        old = load_report(options.compare)
        check_same(options.compare, old, options.bench, parameters, processor())
    try:
        report = measure()
    finally:
        show_step("")
    comparison = None if old is None else compare(old, report.machine, report.series)
    if options.json:
        data = report.to_dict() | {"bench": options.bench, "parameters": parameters}
        print_json(data if comparison is None else data | {"comparison": comparison.to_dict()})
    else:
        say(", ".join(f"{what} {found}" for what, found in report.machine.items()))
        tell(report)
        if comparison is not None:
            _tell_comparison(options.compare, comparison)
    return report, int(comparison is not None and comparison.slower)


def _parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked to be measured, so that another report can be told from it."""
    found = {name: value for name, value in vars(options).items() if name not in NO_PARAMETERS}
    if found.get("file") is not None:
        file = found["file"] = os.path.abspath(found["file"])
        found["bytes"] = os.path.getsize(file) if os.path.isfile(file) else None
        if options.bench == "mirror":  # of all files, whichever of them is named
            from numaload.weights import open_weights

            with open_weights(file) as weights:
                sizes = [part.file.size for part in weights.parts]
            found |= {"bytes": sum(sizes), "files": len(sizes)}
    return found


def _tell_comparison(path: str, comparison: Comparison) -> None:
    from numaload.bench.table import compare_table

    say(f"compared with {path}:")
    for what, (then, now) in comparison.machine.items():
        say(f"not the same: {what} {then} there, {now} here")
    for name in comparison.left_out:
        say(f"not compared, only one report has it in this unit: {name}")
    print_table(*compare_table(comparison), figures=True)
    say(comparison.summary)


# bench bandwidth ---------------------------------------------------------------------------------


def _add_bandwidth(benches: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(
        "bandwidth",
        help="how fast each node's CPUs read, write and reach each node's memory",
        description="Measures every pair of nodes: one thread pinned to each CPU of the one, memory"
        " bound to the other, which the kernel counts page by page. latency: of one thread that"
        " follows a random chain of addresses. A node without CPUs is memory only, one without"
        " memory is CPUs only.",
    )
    parser.add_argument("--nodes", metavar="LIST", help="memory of these, and the CPUs beside it")
    parser.add_argument(
        "--size", metavar="SIZE", type=byte_count,
        help="bytes of each node, twice: 4 times its caches, at least 256M, unless given",
    )  # fmt: skip
    parser.set_defaults(run=bandwidth)
    return parser


def bandwidth(options: argparse.Namespace) -> int:
    from numaload.bench.bandwidth import measure

    step = None if options.json else show_step
    report, status = _finish(
        options, lambda: measure(options.nodes, options.size, options.rounds, step), _tell_bandwidth
    )
    for text in report.notes:
        note(text)
    return status


def _tell_bandwidth(report: BandwidthReport) -> None:
    from numaload.bench.table import bandwidth_table

    say(f"{size(report.size)} on each node, medians of {report.rounds} rounds in shuffled turns")
    print_table(*bandwidth_table(report), figures=True)
    for node, figures in report.published.items():
        units = {name: "ns" if name.endswith("latency") else "MB/s" for name in figures}
        words = ", ".join(f"{name} {value} {units[name]}" for name, value in figures.items())
        say(f"node {node} by its firmware: {words}")


# bench mirror ------------------------------------------------------------------------------------


def _add_mirror(benches: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(
        "mirror",
        help="how fast replicas are built from a model in RAM, beside plain copies",
        description="Builds private replicas of a model on all nodes, with checksums and proof of"
        " placement, beside what limits it: a copy of the files into anonymous memory by one thread"
        " and by all CPUs, cp to the tmpfs, and clearing memory. GB/s of memory filled.",
    )
    parser.add_argument("file", metavar="FILE", help="a model, or one of its files")
    parser.set_defaults(run=mirror)
    return parser


def mirror(options: argparse.Namespace) -> int:
    from numaload.bench.mirror import measure

    step = None if options.json else show_step
    report, status = _finish(
        options, lambda: measure(options.file, options.rounds, step), _tell_mirror
    )
    for text in report.notes:
        note(text)
    return status


def _tell_mirror(report: MirrorReport) -> None:
    from numaload.bench.table import mirror_table

    bound = "bound" if report.bound else "not bound"
    say(
        f"{files_of(report.paths)}: {size(report.nbytes)}, replicas on {on_nodes(report.nodes)},"
        f" {bound}, medians of {report.rounds} rounds in shuffled turns"
    )
    print_table(*mirror_table(report), figures=True)


# bench dequant -----------------------------------------------------------------------------------


def _add_dequant(benches: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(
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
    parser.add_argument(
        "--ggml",
        metavar="[NAME=]PATH",
        action="append",
        help="a libggml-base.so to compare with; that of an installed llama-cpp-python if none",
    )
    parser.add_argument("--plot", metavar="FILE", help="also draw it: .svg, .png (extra: plot)")
    parser.set_defaults(run=dequant)
    return parser


def dequant(options: argparse.Namespace) -> int:
    from numaload.bench import table
    from numaload.bench.dequant import measure

    if options.plot is not None:
        table.check_plot(options.plot)  # before minutes of measuring
    report, status = _finish(
        options,
        lambda: measure(
            _words(options.qtype), _words(options.dtype), options.threads, options.rounds,
            _libraries(options.ggml), None if options.json else show_step,
        ),
        _tell_dequant,
    )  # fmt: skip
    if options.plot is not None:
        table.plot(report, options.plot)
    for row in report.rows:
        for name in (name for name, same in row.same.items() if not same):
            complain(f"{row.qtype}: {name} is not the same, bit for bit")
    return status if report.same else 1


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

    for name, path in report.libraries.items():
        say(f"{name}: {path}")
    say(
        f"{report.weights >> 20} Mi weights, medians of {report.rounds} rounds in turns;"
        f" GB/s written: {', '.join(f'{n} {v:.1f}' for n, v in report.baselines.items())}"
    )
    print_table(*dequant_table(report), figures=True)


# bench read --------------------------------------------------------------------------------------


def _add_read(benches: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = benches.add_parser(
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
    parser.add_argument("--cold", action="store_true", help="only cold")
    parser.add_argument("--warm", action="store_true", help="only warm")
    parser.add_argument(
        "--pairs", metavar="N", type=int, default=0,
        help="then numaload and the fastest other way in turns, N times: the median of the ratios"
        " and its 95 %% interval",
    )  # fmt: skip
    parser.set_defaults(run=read)
    return parser


def read(options: argparse.Namespace) -> int:
    from numaload.errors import UsageError

    if options.list:
        _list(options)
        return 0
    if options.file is None:
        raise UsageError("FILE is missing: which file is to be read?")
    from numaload.bench.read import STATES, measure

    asked = [state for state in STATES if getattr(options, state)]
    threads = _counts(options.threads)
    _, status = _finish(
        options,
        lambda: measure(
            options.file, _words(options.ways), states=asked or STATES, threads=threads,
            rounds=options.rounds, pairs=options.pairs,
            progress=None if options.json else show_step,
        ),
        _tell_read,
    )  # fmt: skip
    return status


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

    say(f"{report.path}: {size(report.size)}, medians of {report.rounds} rounds in shuffled turns")
    for header, rows in read_tables(report):
        print_table(header, rows, figures=True)
    for line in conclusions(report):
        say(line)
    for text in report.notes:
        note(text)
    for way, why in report.left_out.items():
        note(f"{way} is not measured: {why}")
