"""The task of a holder of page cache: read files, and keep them locked if that is asked for.

It is ready, and answers, when the files and the room for them have been looked at; with its report
where nothing is left to do. Reading, it writes down how far it came. What fails later is left in
its record for the next ``status``.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from numaload.errors import CancelledError, NodeMemoryError, PlacementError
from numaload.holder.process import packed
from numaload.pagecache import locking, records
from numaload.pagecache.locking import Locked, LockingMeanwhile
from numaload.pagecache.prewarm import PrewarmReport, prewarm
from numaload.pagecache.records import FAILED, HELD, Record

if TYPE_CHECKING:
    from numaload.holder.main import Host

WRITE_S = 0.1  # between two records of one reading
ROUNDS = 3  # of reading again what went before it was locked


def run(
    host: Host,
    paths: Sequence[str],
    files: Sequence[tuple[int, int]],
    part: tuple[str, str],
    lock: bool,
    options: dict[str, Any],
) -> None:
    """Read these files, and lock them until SIGTERM. files: (device, inode) of each."""
    record = Record(
        *host.process, paths=tuple(paths), files=tuple((a, b) for a, b in files),
        part=(part[0], part[1]), lock=lock, since=time.time(),
    )  # fmt: skip
    task = _Task(host, record, options)
    warnings.showwarning = task.note
    warnings.simplefilter("always")
    try:
        with host.interruptible():
            locked = task.work()
        if locked is not None:  # as long as this name is there
            host.keep(task)
    except (CancelledError, KeyboardInterrupt):  # SIGTERM, or nobody waited for the answer
        pass
    except Exception as error:
        if host.answered:
            task.update(state=FAILED, error=packed(error))
            task.tend()
            return
        task.forget()
        raise
    task.forget()


class _Task:
    def __init__(self, host: Host, record: Record, options: dict[str, Any]) -> None:
        self.host, self.record, self.options = host, record, options
        self.written = 0.0  # when its record was, on the monotonic clock
        self.tensors, self.layers = (part or None for part in record.part)

    def work(self) -> Locked | None:
        """Read, and lock; return what is to be kept, if anything is."""
        if not self.record.lock:
            report = self._prewarm()
            if self.host.answered:
                _check_done(report)
            else:
                self.host.answer(**report.to_dict())
            return None
        force = self.options["force"]
        locked = locking.lock(self.record.paths, self.tensors, self.layers, force=force)
        with LockingMeanwhile(locked):
            report = self._prewarm()
        self._answer()
        self._lock_all(locked, report)
        return locked

    def _prewarm(self) -> PrewarmReport:
        return prewarm(
            list(self.record.paths), tensors=self.tensors, layers=self.layers,
            progress=self._progress, **self.options,
        )  # fmt: skip

    def _lock_all(self, locked: Locked, report: PrewarmReport) -> None:
        for _ in range(ROUNDS):
            count = locked.catch_up()
            if count >= locked.size or report.stopped:
                break
            self._prewarm()
        if count < locked.size:
            self.note(f"{count} of {locked.size} bytes are locked: memory is short")
        self.update(state=HELD, locked=count, report=report.to_dict())
        self.tend()

    def _progress(self, done: int, total: int) -> bool:
        self.update(done=done, total=total)
        if not self.host.answered:
            return self._answer()
        if time.monotonic() - self.written > WRITE_S:
            self.tend()
        return not self.host.ended

    def _answer(self) -> bool:
        """Tell that it is ready; return whether anybody waited for that.

        Raises: OSError where nothing can be written down.
        """
        if not self.host.answered:
            records.write(self.record)
            try:
                self.host.answer()
            except BrokenPipeError:
                self.host.ended = True
        return not self.host.ended

    def update(self, **fields: Any) -> None:
        self.record = replace(self.record, **fields)

    def note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.update(notes=(*self.record.notes, str(message)))

    def tend(self) -> None:
        """Write the record: anew, and again where somebody removed it."""
        self.written = time.monotonic()
        with suppress(OSError):  # a full tmpfs
            records.write(self.record)

    def forget(self) -> None:
        with suppress(OSError):
            records.remove(self.record)


def _check_done(report: PrewarmReport) -> None:
    """Make an error of what is lacking: nobody sees the report of a process in the background."""
    if report.stopped:
        read = f"stopped at {report.resident} of {report.size} bytes"
        raise NodeMemoryError(f"{read}: {report.stopped}", needed=report.size, free=report.resident)
    if report.nodes and report.elsewhere:
        raise PlacementError(
            f"{report.elsewhere} of {report.size} bytes are on other nodes than asked for:"
            " --move moves them",
            dict.fromkeys(report.nodes, report.on_nodes),
        )
