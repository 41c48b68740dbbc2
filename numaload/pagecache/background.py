"""Prewarm in a process of its own: in the background, or to keep the pages locked after it.

One process is started for what is asked for together; files that one has already are left to it.
It lives until it is done, or is released; ``numaload status`` shows it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numaload.errors import CancelledError, StoreError, warn_once
from numaload.files.reader import Progress
from numaload.files.reading_lock import check_free
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.holder.process import (
    HolderProcess,
    awaited,
    namespace,
    portable,
    start,
    unpacked,
)
from numaload.machine import userdir
from numaload.machine.stopping import check_process
from numaload.pagecache import records
from numaload.pagecache.locking import chosen_of
from numaload.pagecache.records import READING, Record
from numaload.pagecache.report import PrewarmReport

NAME = "numaload-warm"
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
    def of(cls, record: Record) -> PrewarmHolder:
        return cls(record.pid, record.start, list(record.paths), record.lock)

    def progress(self) -> tuple[int, int] | None:
        """Return (bytes read, bytes to be read); None when it has ended. Raises: StoreError."""
        record = self._record()
        return None if record is None else (record.done, record.total)

    def wait(self, progress: Progress | None = None) -> PrewarmReport | None:
        """Wait until it is done: return its report where it keeps pages locked, else None.

        Raises: the error that ended it; StoreError if it was killed; CancelledError where the
        callback says so: that ends the waiting, not the process.
        """
        check_free()
        pid = os.getpid()
        while (record := self._record()) is None or record.state == READING:
            if record is None and not self._process.alive():
                return None
            done, total = (record.done, record.total) if record else (0, 0)
            if progress and total:
                more = progress(done, total)
                check_process(pid)
                if more is False:
                    raise CancelledError("cancelled", done=done, total=total)
            time.sleep(PAUSE_S)
        if record.ended:
            records.remove(record)
            raise unpacked(record.error)
        for note in record.notes:
            warn_once(note, note)
        return PrewarmReport.from_dict(record.report)

    def release(self) -> bool:
        """End it and wait until it is gone; return whether it was there.

        Raises: StoreError if it cannot be ended, and for one of another container, which is only
        forgotten: what locks pages writes itself down again there.
        """
        record = self._record()
        if record is not None and record.foreign:
            records.remove(record)
            raise StoreError(
                f"process {self.pid} of another container or process namespace has it: if that"
                " lives, it goes on; release it there"
            )
        ended = self._process.end()
        if record is not None:
            records.remove(record)
        return ended

    @property
    def _process(self) -> HolderProcess:
        return HolderProcess(self.pid, self.start, namespace())

    def _record(self) -> Record | None:
        same = (self.pid, self.start)
        return next((r for r in records.records() if (r.pid, r.start) == same), None)


@dataclass(frozen=True)
class Request:
    """What a process is to prewarm. options: those of ``prewarm`` that say how."""

    paths: list[str]
    part: tuple[str, str]  # tensors, layers
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
    ) -> Request:
        paths = [os.path.abspath(path) for paths in models for path in paths]
        part = (tensors or "", "" if layers is None else str(layers))
        return cls(list(dict.fromkeys(paths)), part, options, lock)


def prewarm_held(
    request: Request, *, background: bool, progress: Progress | None = None
) -> PrewarmReport:
    """Have a process read, and keep if locked, what none does yet; wait for it if not background.

    Raises: what ``prewarm`` raises; in the background only what is found before reading begins;
    StoreError.
    """
    begin = time.perf_counter()
    if not background:
        check_free()
    inodes = {path: _inode(path) for path in request.paths}
    with _alone():
        having = _having(request, inodes)
        rest = {path: inode for path, inode in inodes.items() if path not in having}
        if rest:
            holder = _start(request, rest)
            if isinstance(holder, PrewarmReport):  # all was there
                return holder
        else:
            holder = PrewarmHolder.of(next(iter(having.values())))
    report = None if background else _waited(holder, progress)
    if report is None or not holder.new:  # what it had read before is no work of this call
        report = _now(request)
    report.holder, report.already_held = holder, {path: r.pid for path, r in having.items()}
    its = {holder.pid, *report.already_held.values()}
    report.locked = sum(r.locked for r in records.records() if r.pid in its and not r.foreign)
    report.seconds = time.perf_counter() - begin
    return report


def _having(request: Request, inodes: dict[str, tuple[int, int]]) -> dict[str, Record]:
    """Return which of these files have a process already that does what is asked for."""
    there = [r for r in records.records() if not (r.ended or r.foreign)]
    return {
        path: record
        for path, inode in inodes.items()
        for record in there
        if record.covers(inode, request.part, lock=request.lock)
    }


def _start(request: Request, files: dict[str, tuple[int, int]]) -> PrewarmHolder | PrewarmReport:
    """Start a process for these files; return it, or its report where nothing was to be done."""
    arguments = {
        "paths": [portable(path) for path in files],
        "files": list(files.values()),
        "part": request.part,
        "lock": request.lock,
        "options": request.options,
    }
    process, told = start(NAME, arguments)
    if told:
        return PrewarmReport.from_dict(told)
    return PrewarmHolder(process.pid, process.start, list(files), request.lock, new=True)


def _inode(path: str) -> tuple[int, int]:
    with SourceFile(path) as file:
        return file.opened.device, file.opened.inode


@contextmanager
def _alone() -> Iterator[None]:
    """Let two who ask for the same at the same time start one process."""
    with userdir.within(records.FOLDER) as folder:
        assert folder is not None  # noqa: S101 - it was made
        userdir.flock(folder, fcntl.LOCK_EX)
        try:
            records.sweep()
            yield
        finally:
            # Closing alone would leave it locked where a child was forked meanwhile.
            userdir.flock(folder, fcntl.LOCK_UN)


def _waited(holder: PrewarmHolder, progress: Progress | None) -> PrewarmReport | None:
    """Wait for it. Ctrl-C, or the callback, ends also the process if it was started for this."""
    process = HolderProcess(holder.pid, holder.start, namespace())
    if holder.new:
        awaited.add(process)
    try:
        return holder.wait(progress)
    except (KeyboardInterrupt, CancelledError) as error:
        done, total = holder.progress() or (0, 0)
        if holder.new:
            holder.release()
        if isinstance(error, CancelledError):
            raise
        raise CancelledError("interrupted", done=done, total=total) from None
    finally:
        awaited.discard(process)


def _now(request: Request) -> PrewarmReport:
    """Report what is resident by now of what another process is at work on."""
    tensors, layers = (part or None for part in request.part)
    size = there = 0
    known = True
    with chosen_of(request.paths, tensors, layers) as (files, ranges):
        for file, its in zip(files, ranges, strict=True):
            for first, stop in its:
                found = residency(file, first, stop)
                size, there = size + stop - first, there + found.resident
                known &= found.known
        paths = [file.path for file in files]
    return PrewarmReport(paths, size, there, resident=there, residency_known=known)
