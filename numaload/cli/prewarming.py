"""``numaload prewarm``, and its processes that go on: in ``status`` and ``release``."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from numaload.cli.output import (
    byte_count,
    complain,
    count,
    duration,
    files_of,
    note,
    on_nodes,
    print_json,
    progress_bar,
    rate,
    say,
    size,
)

if TYPE_CHECKING:
    from numaload.pagecache.records import Record
    from numaload.pagecache.report import PrewarmReport

NOTES = 5  # of a process that are shown as text
OWNER_ONLY = "what was in RAM before is unknown: the kernel tells only the file's owner"
Names = Mapping[str, Collection[str]]  # {FILE: all paths that it may be known by}; empty: all

OPTIONS: dict[str, dict[str, Any]] = {
    "--nodes": {"metavar": "LIST", "help": "nodes that the page cache is to land on"},
    "--policy": {"choices": ["bind", "interleave"], "help": "bind unless given"},
    "--move": {"action": "store_true", "help": "move there what is in RAM on other nodes"},
    "--tensors": {"metavar": "REGEX", "help": "only tensors in whose names this is found"},
    "--layers": {"metavar": "LIST", "help": "only these layers, as 0-9,12"},
    "--way": {"choices": ["mapped", "buffered"], "help": "how to read, instead of the plan's way"},
    "--threads": {"type": int, "metavar": "N", "help": "reading threads, instead of the plan's"},
    "--chunk": {"type": byte_count, "metavar": "SIZE", "help": "bytes a read, as 8M"},
    "--order": {"choices": ["file", "stripes"], "help": "stripes: a part for each thread"},
    "--max-rate": {"type": byte_count, "metavar": "SIZE", "help": "bytes a second, as 200M"},
    "--force": {
        "action": "store_true",
        "help": "begin what does not fit in memory; it stops before it pushes itself out",
    },
    "--background": {"action": "store_true", "help": "return at once, another process reads"},
    "--lock": {"action": "store_true", "help": "another process keeps it in RAM until release"},
}


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("prewarm", help="read files into the page cache, in parallel")
    parser.add_argument("files", metavar="FILE", nargs="+")
    for option, settings in OPTIONS.items():
        parser.add_argument(option, **settings)
    parser.set_defaults(run=prewarm)


def prewarm(options: argparse.Namespace) -> int:
    from numaload.pagecache.prewarm import prewarm as warm

    names = [option.removeprefix("--").replace("-", "_") for option in OPTIONS]
    given = {name: getattr(options, name) for name in names}
    with progress_bar("prewarm", quiet=options.json) as progress:
        report = warm(options.files, **given, progress=progress, announce=_announce)
    goes_on = options.background and report.holder is not None
    if options.json:
        print_json(report.to_dict())
    else:
        if not goes_on:
            tell(report)
        _tell_started(report, background=goes_on)
    return 0 if report.done or goes_on else 1


def _announce(plan: Any) -> None:
    note(f"plan: {plan}")


def tell(report: PrewarmReport) -> None:
    tensors = "" if report.tensors is None else f"{count(report.tensors, 'tensor')} of "
    say(f"{tensors}{files_of(report.paths)}: {_did(report)}")
    if report.plan and report.plan.tried:
        say(f"read: {report.plan}")
    if report.nodes:
        where = ", ".join(f"node {n}: {size(b)}" for n, b in report.on_nodes.items())
        asked = f"asked for {on_nodes(report.nodes)} ({report.policy})"
        say(f"{asked}; the kernel says {where or 'none of it is in RAM'}")
    if report.read_by_others:
        say(f"process {report.followed} read {size(report.read_by_others)} meanwhile")
    for line in _lacks(report):
        note(line)


def _did(report: PrewarmReport) -> str:
    if report.read:
        threads = count(report.threads, "thread")
        speed = f"{rate(report.read, report.seconds)}, {threads}"
        read = f"{size(report.read)} read in {report.seconds:.2f} s ({speed})"
        if not report.residency_known:
            return f"{read}; {OWNER_ONLY}"
        there = f"{size(report.resident_before)} of {size(report.size)} were in RAM"
        return f"{read}; {there} before" if report.resident_before else read
    if report.resident_before == report.size:
        return f"already in RAM ({size(report.size)})"
    return f"{size(report.resident)} of {size(report.size)} in RAM"


def _lacks(report: PrewarmReport) -> Iterator[str]:
    if report.moved:
        yield f"{size(report.moved)} were moved between nodes"
    for why, nbytes in report.unmoved.items():
        yield f"{size(nbytes)} cannot be moved: {why} (others map it, or that node is full)"
    if report.elsewhere:
        yield (
            f"{size(report.elsewhere)} are on other nodes: page cache stays where it was first"
            " read; --move moves it, or numaload evict FILE and prewarm again"
        )
    if report.stopped:
        yield f"stopped at {size(report.resident)} of {size(report.size)}: {report.stopped}"
    elif report.resident < report.size and report.residency_known:
        of = f"{size(report.resident)} of {size(report.size)}"
        yield f"only {of} are in RAM now: memory is short"
    if report.holder and report.holder.lock and report.locked < report.size:
        yield f"only {size(report.locked)} of {size(report.size)} are locked: memory is short"


def _tell_started(report: PrewarmReport, *, background: bool) -> None:
    """Say which process goes on after ``prewarm --background`` or ``--lock``."""
    held: dict[int, list[str]] = {}
    for path, pid in report.already_held.items():
        held.setdefault(pid, []).append(path)
    for pid, paths in held.items():
        note(f"{files_of(paths)}: process {pid} has it already; no other one is started")
    if report.holder is None or not report.holder.new:
        return
    from numaload.machine.logout import killed_note

    pid, first = report.holder.pid, report.paths[0]
    what = f"{files_of(report.paths)}: process {pid}"
    if background:
        then = " and locks it" if report.holder.lock else ""
        how_far = f"to see how far: numaload status {first}"
        say(f"{what} reads {size(report.size)} in the background{then}; {how_far}")
    else:
        say(f"{what} keeps {size(report.locked)} locked until: numaload release {first}")
    ends = killed_note(verb=f"prewarm {'--lock' if report.holder.lock else '--background'} FILE")
    if ends:
        note(ends)


class Released(NamedTuple):
    """Processes that release ended. ``files``: those of the files asked for that had a process."""

    rows: list[dict[str, Any]]
    files: set[str]

    @property
    def failed(self) -> bool:
        return any(row["failed"] for row in self.rows)


def look(wanted: Names) -> list[dict[str, Any]]:
    """Return what the processes do. An error is told once, and its record removed with that."""
    from numaload.pagecache import records

    records.sweep()
    rows = []
    for record, _ in _chosen(records.records(), wanted):
        if record.state in (records.FAILED, records.KILLED):
            records.remove(record)
        rows.append(_row(record))
    return rows


def _chosen(found: Iterable[Record], wanted: Names) -> list[tuple[Record, set[str]]]:
    """Return the records to tell of, each with the files asked for that it has."""
    rows = [(record, _matched(record, wanted)) for record in found]
    return [(record, files) for record, files in rows if files or not wanted]


def _matched(record: Record, wanted: Names) -> set[str]:
    """Return the files asked for that the record has. Links are followed once, and for the rest."""
    from numaload.files.source import real_path

    files = {file for file, names in wanted.items() if not set(names).isdisjoint(record.paths)}
    if len(files) < len(wanted):
        real = set(map(real_path, set(record.paths)))
        files |= {file for file, names in wanted.items() if not real.isdisjoint(names)}
    return files


def _row(record: Record) -> dict[str, Any]:
    return {
        "pid": record.pid,
        "paths": list(record.paths),
        "state": record.state,
        "lock": record.lock,
        "read": record.done,
        "to_read": record.total,
        "locked": record.locked,
        "age_s": max(0.0, time.time() - record.since),
        "changed": _changed(record),
        "foreign": record.foreign,
        "notes": list(record.notes),
        "error": record.error.get("text"),
    }


def _changed(record: Record) -> bool:
    """Return whether one of the names means another file now, or none."""
    return any(
        not _is(path, inode) for path, inode in zip(record.paths, record.files, strict=False)
    )


def _is(path: str, inode: tuple[int, int]) -> bool:
    """Return whether a name still means this file; also where its server does not answer."""
    from numaload.errors import NumaloadError
    from numaload.files.source import reach

    try:
        reach(path)
        status = os.stat(path)
    except NumaloadError:
        return True
    except (OSError, ValueError):
        return False
    return (status.st_dev, status.st_ino) == inode


def show(rows: Iterable[dict[str, Any]]) -> None:
    rows = list(rows)
    if rows:
        say("prewarming:")
    for row in rows:
        if row["error"]:
            complain(f"{row['paths'][0]}: {row['error']}")
        say(f"  process {row['pid']}: {files_of(row['paths'])}: {_does(row)}")
        for text in row["notes"][:NOTES]:
            note(text)
        if len(row["notes"]) > NOTES:
            note(f"and {count(len(row['notes']) - NOTES, 'more note')}")


def _does(row: dict[str, Any]) -> str:
    share = 100 * row["read"] // row["to_read"] if row["to_read"] else 0
    then = ", keeps it locked after that" if row["lock"] else ""
    said = {
        "reading": f"reading, {share} % of {size(row['to_read'])}{then}",
        "held": f"locked {size(row['locked'])}",
        "failed": "failed",
        "killed": "was killed",
        "ended": "had ended by itself",
    }[row["state"]]
    changed = ", the file CHANGED or is gone since: release it" if row["changed"] else ""
    foreign = ", of another container" if row["foreign"] else ""
    return f"{said}, started {duration(row['age_s'])} ago{foreign}{changed}"


def release(wanted: Names) -> Released:
    """End the processes, and forget those that failed. One that cannot be ended stops no other."""
    from numaload.errors import StoreError
    from numaload.pagecache import records
    from numaload.pagecache.background import PrewarmHolder

    records.sweep()
    done = Released([], set())
    for record, files in _chosen(records.records(), wanted):
        done.files.update(files)
        row = _row(record) | {"failed": False}
        try:
            if record.state in (records.FAILED, records.KILLED):
                records.remove(record)
            elif not PrewarmHolder.of(record).release():
                row["state"] = "ended"
        except StoreError as error:
            row |= {"error": str(error), "failed": True}
        done.rows.append(row)
    return done


def tell_released(done: Released) -> None:
    for row in done.rows:
        what = files_of(row["paths"])
        if row["failed"]:
            complain(f"{what}: {row['error']}")
        elif row["error"]:
            say(f"forgot the failed prewarming of {what}: {row['error']}")
        else:
            say(f"ended process {row['pid']}, which had {what}: {_does(row)}")
