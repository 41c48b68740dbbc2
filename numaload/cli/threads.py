"""``numaload status --threads PID``: which thread of a process may run where, and what fights."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from numaload.cli.output import print_json, print_table, say

if TYPE_CHECKING:
    from numaload.doctor.findings import ThreadReport
    from numaload.doctor.pools import Pool


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        metavar="PID",
        type=int,
        help="which thread of this process may run where, and which get in each other's way",
    )


def show(options: argparse.Namespace) -> int:
    from numaload.doctor.findings import inspect_threads
    from numaload.errors import UsageError

    if options.files:
        raise UsageError("--threads is about a process: it takes no FILE")
    seen = inspect_threads(options.threads)
    if options.json:
        print_json(seen)
        return 0
    print_report(seen)
    return 0


def print_report(seen: ThreadReport) -> None:
    header = ["threads", "name", "CPUs", "node", "last on", "have work", "CPU time", "waited"]
    print_table(header, [_row(seen, pool) for pool in seen.pools])
    for finding in seen.findings:
        say(f"{finding.kind}: {finding.text}")
        say(f"  to mend it: {finding.fix}")
    if not seen.findings:
        say("nothing gets in each other's way")


def _row(seen: ThreadReport, pool: Pool) -> list[Any]:
    from numaload.numa.lists import format_list

    row = pool.to_dict()
    own = f", {pool.each} each" if pool.each < len(pool.cpus) else ""
    return [
        len(pool.threads),
        str(pool),
        f"{format_list(pool.cpus) or 'unknown'}{own}",
        format_list(pool.nodes) or "unknown",
        format_list(row["last_on"]) or "unknown",
        len(seen.runnable.intersection(row["tids"])),
        f"{row['cpu_s']:.1f} s",
        f"{row['waited_s']:.1f} s",
    ]
