"""``numaload bench read``: every way of reading a file, and which one numaload chooses."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from numaload.cli.output import note, print_json, print_table, say, show_step, size

if TYPE_CHECKING:
    from numaload.bench.read_report import ReadReport


def add_to(benches: Any) -> None:
    parser = benches.add_parser(
        "read",
        help="all ways of reading a file, cold and warm, and which one numaload chooses",
        description="Reads a file in every way there is, in shuffled turns; medians of the rounds,"
        " least and most. Cold: its page cache is given back before each timing, and that is"
        " checked. of best: beside the fastest way to the same place; of ceiling: beside direct"
        " reads into huge pages that are used again. in cache: how much of the file is there"
        " afterwards, where that is not all. The file is read and never written.",
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
    from numaload.bench.read import measure
    from numaload.bench.read_report import STATES

    asked = [state for state in STATES if getattr(options, state)]
    report = measure(
        options.file, _words(options.ways), states=asked or STATES,
        threads=_counts(options.threads), rounds=options.rounds, pairs=options.pairs,
        progress=None if options.json else show_step,
    )  # fmt: skip
    if options.json:
        print_json(report)
    else:
        _tell(report)
    return 0


def _words(text: str | None) -> list[str]:
    return [] if text is None else text.split(",")


def _counts(text: str | None) -> list[int]:
    from numaload.errors import UsageError

    try:
        return [int(word) for word in _words(text)]
    except ValueError:
        raise UsageError(f"--threads {text}: expected numbers with commas") from None


def _list(options: argparse.Namespace) -> None:
    from numaload.bench.read_ways import FAMILIES

    rows = [
        [family.name, family.sink, ",".join(map(str, family.counts)) or "-", family.what]
        for family in FAMILIES
    ]
    if options.json:
        print_json(
            [dict(zip(("way", "into", "threads", "what"), row, strict=True)) for row in rows]
        )
    else:
        print_table(["way", "into", "threads", "what it measures"], rows)


def _tell(report: ReadReport) -> None:
    from numaload.bench.read_table import conclusions, tables
    from numaload.bench.read_wanted import findings

    show_step("")
    say(", ".join(f"{what} {found}" for what, found in report.machine.items()))
    say(f"{report.path}: {size(report.size)}, medians of {report.rounds} rounds in shuffled turns")
    for header, rows in tables(report):
        print_table(header, rows, figures=True)
    for line in conclusions(report):
        say(line)
    for finding in findings(report):
        say(finding)
    for text in report.notes:
        note(text)
    for way, why in report.left_out.items():
        note(f"{way} is not measured: {why}")
