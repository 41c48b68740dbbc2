"""Processes that prewarm in the background or keep pages locked: in ``status`` and ``release``."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from numaload.cli.output import complain, note, say, size

NOTES = 5  # of a process that are shown as text
Wanted = Mapping[str, Collection[str]]  # {FILE: all paths that it may be known by}; empty: all


class Released(NamedTuple):
    """``files``: of those asked for, which had a process."""

    rows: list[dict[str, Any]]
    files: set[str]

    @property
    def failed(self) -> bool:
        return any(row["failed"] for row in self.rows)


def look(wanted: Wanted) -> list[dict[str, Any]]:
    """What they do. An error is told once: its record is taken away with that."""
    from numaload.pagecache import records
    from numaload.storage import following

    following.sweep()
    records.sweep()
    rows = []
    for record, _ in _chosen(records.records(), wanted):
        if record.state in (records.FAILED, records.KILLED):
            records.remove(record)
        rows.append(_row(record))
    return rows


def _chosen(found: Iterable[Any], wanted: Wanted) -> list[tuple[Any, set[str]]]:
    """Return the records to tell of, each with the files asked for that it has."""
    rows = [(record, _matched(record, wanted)) for record in found]
    return [(record, files) for record, files in rows if files or not wanted]


def _matched(record: Any, wanted: Wanted) -> set[str]:
    """Return the files asked for that the record has. Links are followed once, and for the rest."""
    from numaload.storage.files import real_path

    files = {file for file, names in wanted.items() if not set(names).isdisjoint(record.paths)}
    if len(files) < len(wanted):
        real = set(map(real_path, set(record.paths)))
        files |= {file for file, names in wanted.items() if not real.isdisjoint(names)}
    return files


def _row(record: Any) -> dict[str, Any]:
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


def _changed(record: Any) -> bool:
    """Whether another file, or none, has one of the names now."""
    return any(
        not _is(path, inode) for path, inode in zip(record.paths, record.files, strict=False)
    )


def _is(path: str, inode: tuple[int, int]) -> bool:
    """Also where its server does not answer: then nothing is known."""
    from numaload.errors import NumaloadError
    from numaload.storage.files import reached

    try:
        with reached(path):
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
        say(f"  process {row['pid']}: {_what(row)}: {_does(row)}")
        for text in row["notes"][:NOTES]:
            note(text)
        if len(row["notes"]) > NOTES:
            note(f"and {len(row['notes']) - NOTES} more notes")


def _what(row: dict[str, Any]) -> str:
    more = f" and {len(row['paths']) - 1} more" if len(row["paths"]) > 1 else ""
    return f"{row['paths'][0]}{more}"


def _does(row: dict[str, Any]) -> str:
    share = 100 * row["read"] // row["to_read"] if row["to_read"] else 0
    then = ", keeps it locked" if row["lock"] else ""
    said = {
        "reading": f"reading, {share} % of {size(row['to_read'])}{then}",
        "held": f"locked {size(row['locked'])}",
        "failed": "failed",
        "killed": "was killed",
    }[row["state"]]
    changed = ", the file CHANGED or is gone since: release it" if row["changed"] else ""
    foreign = ", of another container" if row["foreign"] else ""
    return f"{said}, since {row['age_s']:.0f} s{foreign}{changed}"


def release(wanted: Wanted) -> Released:
    """End them, and forget what failed. Those that cannot be ended stop no other."""
    from numaload.errors import StoreError
    from numaload.pagecache import records
    from numaload.pagecache.holder import PrewarmHolder
    from numaload.storage import following

    following.sweep()
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
        if row["failed"]:
            complain(f"{_what(row)}: {row['error']}")
        elif row["error"]:
            say(f"forgot the failed prewarming of {_what(row)}: {row['error']}")
        else:
            say(f"ended process {row['pid']}, prewarming {_what(row)}: {_does(row)}")


def tell_started(report: Any, *, background: bool) -> None:
    """After ``prewarm --background`` or ``--lock``: who goes on."""
    for path, pid in report.already_held.items():
        note(f"{path}: process {pid} has it already; no other one is started")
    if report.holder is None or not report.holder.new:
        return
    from numaload.storage.logout import killed_note

    pid = report.holder.pid
    if background:
        then = " and locks them" if report.holder.lock else ""
        say(f"process {pid} reads {size(report.size)} in the background{then}: numaload status")
    else:
        say(f"process {pid} keeps {size(report.locked)} locked until numaload release")
    ends = killed_note(verb=f"prewarm {'--lock' if report.holder.lock else '--background'} FILE")
    if ends:
        note(ends)
