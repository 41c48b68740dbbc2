"""``numaload tune``: measure how a device is read fastest, keep that as its plan, or forget it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from numaload.cli.output import count, note, print_json, print_table, say, show_step, size

if TYPE_CHECKING:
    from numaload.bench.tune import TunedSink, TuneReport

NOTHING = "no tuned plan was kept"


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "tune",
        help="measure how a device is read fastest, and keep that as its plan",
        description="Reads parts of FILE that are not in RAM, in about a minute at most, and gives"
        " them back. prewarm, mirror and copies use the plan on this device until device, file"
        " system, kernel, processors or numaload change.",
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="a large file on that device")
    parser.add_argument(
        "--forget", action="store_true", help="remove the plan of FILE's device, or all plans"
    )
    parser.set_defaults(run=tune)


def tune(options: argparse.Namespace) -> int:
    from numaload.errors import UsageError

    if options.forget:
        return _forget(options)
    if options.file is None:
        raise UsageError("FILE is missing: tune a large file on the device that is to be read")
    from numaload.bench.tune import measure

    note(f"tune: reads parts of {options.file} for a minute at most, and gives them back")
    step = (lambda _: None) if options.json else show_step
    try:
        report = measure(options.file, step)
    finally:
        step("")
    if options.json:
        print_json(report)
    else:
        _tell(report)
    return 0


def _tell(report: TuneReport) -> None:
    say(f"{report.path} on {report.device}: {size(report.nbytes)} read in {report.seconds:.0f} s")
    for sink, found in report.sinks.items():
        say(f"{sink}: {found.way}: {_compared(found)}")
        print_table(["  way", "GB/s", "of best", "turns"], list(_rows(found)), figures=True)
    if report.record:
        say(f"kept as {report.record}; to undo: numaload tune --forget {report.path}")


def _compared(found: TunedSink) -> str:
    from numaload.bench.tune import SECONDS

    if found.too_slow:
        return f"too slow to tell within {SECONDS:.0f} s; later reads go on trying"
    if found.way == found.default:
        return "the default; nothing was faster beyond noise"
    slower = f"{100 * (1 - 1 / found.gain):.0f} % slower"
    return f"{found.gain:.2f} times the default, {found.default}, which is {slower}"


def _rows(found: TunedSink) -> Iterator[tuple[str, str, str, str]]:
    """Write medians; the fastest first."""
    from statistics import median

    rates = {way: median(its) for way, its in found.rates.items()}
    for way in sorted(rates, key=lambda way: rates[way], reverse=True):
        share = f"{rates[way] / max(rates.values()):.2f}"
        yield f"  {way}", f"{rates[way] / 1e9:.3g}", share, f"{len(found.rates[way])}"


def _forget(options: argparse.Namespace) -> int:
    from numaload.files.source import SourceFile
    from numaload.files.tuned import forget

    if options.file is None:
        removed, damaged = forget()
    else:
        with SourceFile(options.file) as file:
            removed, damaged = forget(file)
    if options.json:
        print_json({"removed": [one.to_dict() for one in removed], "damaged": damaged})
        return 0
    for one in removed:
        ways = "; ".join(f"{sink}: {plan.way}" for sink, plan in one.plans.items())
        say(f"removed: tuned {one.date} for {one.mount} ({one.conditions.get('device')}): {ways}")
    if damaged and options.file is None:  # or else they stay, and a warning names each
        say(f"removed: {count(damaged, 'damaged record')}")
    elif not removed:
        say(NOTHING)
    return 0
