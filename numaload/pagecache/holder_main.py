"""The process that prewarms in the background, and keeps pages locked: started by holder.py.

It gets one line of JSON on its standard input, and answers with one line once the files and the
room for them have been looked at:

    {"path": sys.path, "store": path, "paths": [...], "files": [[device, inode], ...],
     "part": [tensors, layers], "lock": true, "options": {...}}
    {"pid": 4711, "start": 815, "error": null, "report": null}

or with an error, or with the report where nothing had to be read nor is to be locked; then it ends.
Reading, it writes down how far it came (records.py). Done, it ends, or keeps what it has locked
until SIGTERM, with a look once a second whether its record is still there.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numaload.pagecache.locking import Locked
    from numaload.pagecache.records import Record
    from numaload.pagecache.report import PrewarmReport

WRITE_S = 0.1  # between two records of one reading
INTERVAL_S = 1.0
ROUNDS = 3  # of reading again what went before it was locked


class Holder:
    """``row``: what was asked for. It answers once."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row = row
        self.answered, self.ended, self.saved, self.written = False, False, True, 0.0
        self.record = _record(row)
        signal.signal(signal.SIGTERM, self._end)
        warnings.showwarning = self._note
        warnings.simplefilter("always")

    def run(self) -> int:
        """Until it is done, or ended by SIGTERM; its exit status."""
        from numaload.errors import CancelledError

        status = 0
        try:
            locked = self._work()  # as long as this name is there
            if locked is not None:
                self._keep()
        except (CancelledError, KeyboardInterrupt):  # SIGTERM, or nobody waited for the answer
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, it is told
            if self._fail(error):
                return 1
            status = 1
        self._forget()
        return status

    def _work(self) -> Locked | None:
        """Read, and lock; None where nothing is to be kept."""
        from numaload.pagecache.locking import LockingMeanwhile, lock

        if not self.row["lock"]:
            report = self._prewarm()
            if self.answered:
                _check_done(report)
            self._answer(report=report.to_dict())
            return None
        tensors, layers = self._part()
        locked = lock(self.row["paths"], tensors, layers, force=self.row["options"]["force"])
        with LockingMeanwhile(locked):
            report = self._prewarm()
        self._answer()
        self._lock_all(locked, report)
        return locked

    def _part(self) -> list[str | None]:
        return [part or None for part in self.row["part"]]

    def _prewarm(self) -> PrewarmReport:
        from numaload.pagecache.prewarm import prewarm

        tensors, layers = self._part()
        options = {"tensors": tensors, "layers": layers} | self.row["options"]
        return prewarm(self.row["paths"], progress=self._progress, **options)

    def _lock_all(self, locked: Locked, report: PrewarmReport) -> None:
        for _ in range(ROUNDS):
            count = locked.catch_up()
            if count >= locked.size or report.stopped:
                break
            self._prewarm()
        if count < locked.size:
            self._note(f"{count} of {locked.size} bytes are locked: memory is short")
        told = report.to_dict()
        self.record = replace(self.record, state="held", locked=count, report=told)
        self._write()

    def _progress(self, done: int, total: int) -> bool:
        self.record = replace(self.record, done=done, total=total)
        if not self.answered:
            self._answer()
        elif time.monotonic() - self.written > WRITE_S:
            self._write()
        return not self.ended

    def _write(self) -> None:
        from numaload.pagecache import records

        self.written, self.saved = time.monotonic(), False
        with suppress(OSError):  # a full tmpfs
            records.write(self.record)
            self.saved = True

    def _answer(self, error: Any = None, report: Any = None) -> None:
        """Once; from then on nobody listens. Raises: OSError where nothing can be written down."""
        from numaload.pagecache import records

        if self.answered:
            return
        if error is None and report is None:
            records.write(self.record)
        self.answered = True
        told = {"pid": self.record.pid, "start": self.record.start, "error": error}
        try:
            os.write(1, json.dumps(told | {"report": report}, default=str).encode() + b"\n")
        except BrokenPipeError:
            self.ended = True
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)

    def _fail(self, error: Exception) -> bool:
        """Tell it who waits, or leave it to the next status; whether it is left."""
        from numaload.errors import NumaloadError, StoreError
        from numaload.pagecache.records import FAILED, packed

        if not isinstance(error, NumaloadError):
            error = StoreError(f"{type(error).__name__}: {error}")
        if not self.answered:
            self._answer(error=packed(error))
            return False
        self.record = replace(self.record, state=FAILED, error=packed(error))
        self._write()
        return True

    def _keep(self) -> None:
        """Until SIGTERM, which is waited for here alone."""
        from numaload.pagecache import records

        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        while not self.ended and signal.sigtimedwait({signal.SIGTERM}, INTERVAL_S) is None:
            with suppress(OSError):
                if not (self.saved and records.is_there(self.record)):
                    self._write()

    def _forget(self) -> None:
        from numaload.pagecache import records

        with suppress(OSError):
            records.remove(self.record)

    def _end(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.ended = True
        raise KeyboardInterrupt

    def _note(self, message: Warning | str, *_: Any, **__: Any) -> None:
        self.record = replace(self.record, notes=(*self.record.notes, str(message)))


def _record(row: dict[str, Any]) -> Record:
    """Begin the record of this process. Raises: OSError where others could not find it by it."""
    from numaload.pagecache.records import NAME, Record
    from numaload.replicas.holder import namespace
    from numaload.replicas.holder_main import started, take_name

    take_name(NAME)
    return Record(
        pid=os.getpid(),
        start=started(os.getpid()),
        namespace=namespace(),
        paths=tuple(row["paths"]),
        files=tuple((device, inode) for device, inode in row["files"]),
        part=(row["part"][0], row["part"][1]),
        lock=row["lock"],
        since=time.time(),
    )


def _check_done(report: PrewarmReport) -> None:
    """Nobody sees the report of a process in the background: what is lacking is an error."""
    from numaload.errors import NodeMemoryError, PlacementError

    if report.stopped:
        read = f"stopped at {report.resident} of {report.size} bytes"
        raise NodeMemoryError(f"{read}: {report.stopped}", needed=report.size, free=report.resident)
    if report.nodes and report.elsewhere:
        raise PlacementError(
            f"{report.elsewhere} of {report.size} bytes are on other nodes than asked for:"
            " --move moves them",
            dict.fromkeys(report.nodes, report.on_nodes),
        )


def main() -> int:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    with open(0, "rb", closefd=False) as file:
        line = file.readline()
    if not line.endswith(b"\n"):  # who asked has gone
        return 1
    # A child of init's: nobody has to wait for it, and no shell has it among its jobs.
    if os.fork():
        return 0
    row = json.loads(line)
    sys.path[:] = row["path"]
    os.environ["NUMALOAD_STORE"] = row["store"]
    try:
        holder = Holder(row)
    except OSError as error:
        from numaload.errors import StoreError, reason
        from numaload.pagecache.records import packed

        told = packed(StoreError(f"{error.filename or '/proc'}: {reason(error)}"))
        os.write(1, json.dumps({"pid": 0, "start": 0, "error": told, "report": None}).encode())
        return 1
    return holder.run()


if __name__ == "__main__":
    sys.exit(main())
