"""Prewarming in a process of its own: in the background, or to keep the pages locked after it.

One process for what is asked for together; files that one has already are left to it. It belongs
to no terminal and lives until it is done, or is released; ``numaload status`` shows it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numaload
from numaload.errors import CancelledError, StoreError, warn_once
from numaload.numa.stopping import check_process
from numaload.pagecache import holder_main, records
from numaload.pagecache.locking import chosen_of
from numaload.pagecache.records import FAILED, KILLED, NAME, READING, Record
from numaload.pagecache.report import PrewarmReport
from numaload.replicas.holder import ask, end_holder, portable
from numaload.storage import following, userdir
from numaload.storage.device import Device
from numaload.storage.files import SourceFile
from numaload.storage.plan import ReadPlan, Tried, Way
from numaload.storage.reader import Progress
from numaload.storage.residency import residency

PAUSE_S = 0.05


@dataclass(frozen=True)
class PrewarmHolder:
    """A process that reads files into the page cache, or keeps them locked there.

    It is known by ``pid`` and ``start`` (clock ticks since boot). ``new``: it was started for this.
    """

    pid: int
    start: int
    paths: list[str]
    lock: bool
    new: bool = False

    @classmethod
    def of(cls, record: Record, *, new: bool = False) -> PrewarmHolder:
        return cls(record.pid, record.start, list(record.paths), record.lock, new)

    def record(self) -> Record | None:
        """What it does; None when it has ended, and nothing failed."""
        same = (self.pid, self.start)
        return next((r for r in records.records() if (r.pid, r.start) == same), None)

    def progress(self) -> tuple[int, int] | None:
        """(bytes read, bytes to be read); None when it has ended. Raises: StoreError."""
        record = self.record()
        return None if record is None else (record.done, record.total)

    def wait(self, progress: Progress | None = None) -> PrewarmReport | None:
        """Until it is done: its report where it keeps pages locked, else None.

        Raises: the error that ended it; StoreError if it was killed; CancelledError where the
        callback says so: that ends the waiting, not the process.
        """
        following.check_free()
        pid = os.getpid()
        while (record := self.record()) is None or record.state == READING:
            if record is None and not self._alive():
                return None
            done, total = (record.done, record.total) if record else (0, 0)
            if progress and total:
                more = progress(done, total)
                check_process(pid)
                if more is False:
                    raise CancelledError("cancelled", done=done, total=total)
            time.sleep(PAUSE_S)
        if record.state in (FAILED, KILLED):
            records.remove(record)
            raise records.unpacked(record.error)
        for note in record.notes:
            warn_once(note, note)
        return _report(record.report)

    def release(self) -> bool:
        """End it, wait until it is gone; whether it was there.

        Raises: StoreError if it cannot be ended, and for one of another container, which is only
        forgotten: what locks pages writes itself down again there.
        """
        record = self.record()
        foreign = record is not None and record.foreign
        ended = not foreign and end_holder(self.pid, self.start, NAME)
        if record is not None:
            records.remove(record)
        if foreign:
            raise StoreError(
                f"process {self.pid} of another container or process namespace has it: if that"
                " lives, it goes on; release it there"
            )
        return ended

    def _alive(self) -> bool:
        return records.alive(self.pid, self.start)


def holders() -> list[PrewarmHolder]:
    """All of this user's that live, oldest first. Raises: StoreError."""
    return [PrewarmHolder.of(r) for r in records.records() if r.state not in (FAILED, KILLED)]


class Wanted(NamedTuple):
    """What is asked for. options: those of ``prewarm`` that say how. part: tensors, layers."""

    paths: list[str]
    part: tuple[str, str]
    options: dict[str, Any]
    lock: bool

    @classmethod
    def of(
        cls,
        models: Sequence[Sequence[str]],
        tensors: str | None,
        layers: str | int | None,
        options: dict[str, Any],
        *,
        lock: bool,
    ) -> Wanted:
        paths = [os.path.abspath(path) for paths in models for path in paths]
        part = (tensors or "", "" if layers is None else str(layers))
        return cls(list(dict.fromkeys(paths)), part, options, lock)


def prewarm_held(
    wanted: Wanted, *, background: bool, progress: Progress | None = None
) -> PrewarmReport:
    """Have a process read, and keep if locked, what none does yet; wait for it if not background.

    Raises: what ``prewarm`` raises; in the background only what is found before reading begins;
    StoreError.
    """
    begin = time.perf_counter()
    if not background:
        following.check_free()
    kept, said = _ensure(wanted)
    if kept is None:  # all was there
        return _report(said)
    report = None if background else _waited(kept, progress)
    if report is None or not kept.new:  # what it had read before is no work of this call
        report = _now(wanted)
    its = {kept.pid, *said.values()}
    report.holder, report.already_held = kept, said
    report.locked = sum(r.locked for r in records.records() if r.pid in its and not r.foreign)
    report.seconds = time.perf_counter() - begin
    return report


def _ensure(wanted: Wanted) -> tuple[PrewarmHolder | None, dict[str, Any]]:
    """The process that has it, and {path: process} of what was held already.

    Or None and the report, where nothing is to be done.
    """
    inodes = {path: _inode(path) for path in wanted.paths}
    with _alone():
        there = [r for r in records.records() if r.state not in (FAILED, KILLED) and not r.foreign]
        having = {
            path: record
            for path, inode in inodes.items()
            for record in there
            if record.covers(inode, wanted.part, lock=wanted.lock)
        }
        rest = [path for path in inodes if path not in having]
        held = {path: record.pid for path, record in having.items()}
        if not rest:
            return PrewarmHolder.of(next(iter(having.values()))), held
        return _start(wanted._replace(paths=rest), [inodes[path] for path in rest], held)


def _start(
    wanted: Wanted, files: list[tuple[int, int]], held: dict[str, int]
) -> tuple[PrewarmHolder | None, dict[str, Any]]:
    # An editable installation is found by a hook that the other process does not have.
    ours = os.path.dirname(numaload.__path__[0])
    row = {
        "path": [portable(os.path.abspath(folder)) for folder in (ours, *sys.path)],
        "store": portable(userdir.path()),
        "paths": [portable(path) for path in wanted.paths],
        "files": files,
        "part": wanted.part,
        "lock": wanted.lock,
        "options": wanted.options,
    }
    line = json.dumps(row).encode() + b"\n"
    told = ask(holder_main.__file__, line, what=f"prewarming of {wanted.paths[0]}")
    if told["error"] is not None:
        raise records.unpacked(told["error"])
    if told["report"] is not None:
        return None, told["report"]
    return PrewarmHolder(told["pid"], told["start"], wanted.paths, wanted.lock, new=True), held


def _inode(path: str) -> tuple[int, int]:
    with SourceFile(path) as file:
        return file.opened.device, file.opened.inode


@contextmanager
def _alone() -> Iterator[None]:
    """So that two who ask for the same at the same time start one process."""
    with userdir.within(records.FOLDER) as folder:
        assert folder is not None  # noqa: S101 - it was made
        userdir.flock(folder, fcntl.LOCK_EX)
        try:
            records.sweep()
            yield
        finally:
            # Closing alone would leave it locked where a child was forked meanwhile.
            userdir.flock(folder, fcntl.LOCK_UN)


def _waited(kept: PrewarmHolder, progress: Progress | None) -> PrewarmReport | None:
    """Ctrl-C, or the callback, ends also the process if it was started for this."""
    last = [0, 0]

    def look(done: int, total: int) -> bool:
        last[:] = done, total
        return progress is None or progress(done, total) is not False

    try:
        return kept.wait(look)
    except (KeyboardInterrupt, CancelledError) as error:
        if kept.new:
            kept.release()
        if isinstance(error, CancelledError):
            raise
        raise CancelledError("interrupted", done=last[0], total=last[1]) from None


def _now(wanted: Wanted) -> PrewarmReport:
    """What is resident by now of what another process is at work on."""
    tensors, layers = (part or None for part in wanted.part)
    size = there = 0
    known = True
    with chosen_of(wanted.paths, tensors, layers) as (files, runs):
        for file, its in zip(files, runs, strict=True):
            for start, stop in its:
                found = residency(file, start, stop)
                size, there = size + stop - start, there + found.resident
                known &= found.known
        paths = [file.path for file in files]
    return PrewarmReport(paths, size, there, resident=there, residency_known=known)


def _report(data: dict[str, Any]) -> PrewarmReport:
    """As the other process's ``to_dict`` had it."""
    names = {field.name for field in fields(PrewarmReport)}
    try:
        report = PrewarmReport(**{key: data[key] for key in names & data.keys()})
        report.on_nodes = {int(node): nbytes for node, nbytes in report.on_nodes.items()}
        report.plan = _plan(data["plan"]) if data["plan"] else None
    except userdir.UNREADABLE as error:
        raise StoreError(f"a report that cannot be read: {error}") from error
    return report


def _plan(data: dict[str, Any]) -> ReadPlan:
    tried = [Tried(Way(t["name"], t["threads"], t["chunk"]), t["rate"]) for t in data["tried"]]
    ways = tuple(Way(**way) for way in data["candidates"])
    device = Device(**data["device"])
    return ReadPlan(data["sink"], device, ways, data["why"], data["order"], tuple(tried))
