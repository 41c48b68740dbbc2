"""Have one process at a time read a file into the page cache.

::

    /dev/shm/numaload-1000/reading/locks    a slot for each file: its lock, and who took that last

Whoever has the lock looks again at what is in RAM, and reads the rest. Those that cannot have all
the locks they need keep none of them, so nobody waits for somebody who waits. Locks end with their
process, however that ends. A slot is found by the file's numbers: two files may share one, and
then one waits without need.
"""

from __future__ import annotations

import fcntl
import io
import os
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from numaload import trace
from numaload.errors import CancelledError, StoreError, UsageError, reason, warn_once
from numaload.files.reader import Progress
from numaload.files.source import SourceFile
from numaload.machine import userdir
from numaload.machine.stopping import check_process, stopping

FOLDER, NAME = "reading", "locks"
SLOTS = 1 << 16
PAUSE_S = 0.05
SAY_S = 30.0  # without the locks, after which it is said whom this waits for
FLOCK = struct.Struct("hhqqi4x")  # struct flock: type, whence, start, length, process id
PID = struct.Struct("<i")
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_holding: ContextVar[bool] = ContextVar("holding", default=False)


@contextmanager
def reading_lock(
    files: Sequence[SourceFile], progress: Progress | None = None, total: int = 0
) -> Iterator[int | None]:
    """Wait until nobody else of this user reads any of these files; meanwhile others wait for this.

    Yields the process that was waited for last, or None. What is resident is to be asked inside.
    progress(0, total) is called while it waits; returning False cancels. Where the user's folder
    cannot be used, nobody waits; nor in the progress callback of one that has the lock: those who
    are waited for may wait for that.
    Raises: CancelledError, while it waits.
    """
    if holding():
        yield None
        return
    with _lock_file() as file:
        waiting = _Waiting(file, files, progress, total)
        try:
            begin = time.monotonic()
            with trace.span("wait"):
                while not _taken(waiting):
                    waiting.pause(time.monotonic() - begin)
        except KeyboardInterrupt:
            raise waiting.cancelled("interrupted") from None
        token = _holding.set(True)
        try:
            yield waiting.waited_for
        finally:
            _holding.reset(token)


def holding() -> bool:
    """Return whether this is called in the progress callback of one that has a lock."""
    return _holding.get()


def check_free() -> None:
    """Check that waiting for readers cannot deadlock. Raises: UsageError in a reader's callback."""
    if holding():
        raise UsageError(
            "called in the progress callback of prewarm: it waits for others, who may wait until"
            " that has read the same files; call it when that has returned"
        )


@contextmanager
def _lock_file() -> Iterator[io.FileIO | None]:
    """Open the file with the locks; None where that cannot be, which is said."""
    pid, file = os.getpid(), None
    try:
        with userdir.within(FOLDER) as folder:
            # An object that owns the descriptor: Ctrl-C at any moment closes it, and so unlocks it.
            file = io.FileIO(
                NAME, "r+", opener=lambda name, _: os.open(name, FLAGS, 0o600, dir_fd=folder)
            )
        _set(file, fcntl.F_UNLCK, 0, SLOTS)  # or there are no such locks here
    except OSError as error:
        _say_without(error)
        if file is not None:
            file.close()
    if file is None or file.closed:
        yield None
        return
    with file:
        try:
            yield file
        finally:
            if os.getpid() == pid:  # else forked meanwhile: the locks are the parent's
                # Closing alone would leave them locked where a child was forked meanwhile.
                with suppress(OSError):
                    _set(file, fcntl.F_UNLCK, 0, SLOTS)


def _taken(waiting: _Waiting) -> bool:
    """Return whether the locks are held, or locking is impossible: then nobody is waited for."""
    try:
        return waiting.take_all()
    except OSError as error:
        _say_without(error)
        return True


def _say_without(error: OSError) -> None:
    why = str(error)
    if not isinstance(error, StoreError):
        why = f"{userdir.path()}/{FOLDER}: {reason(error)}"
    warn_once(why, f"{why}; read without knowing who else reads these files")


class _Waiting:
    """Waits for the locks of some files. ``waited_for``: the process that had one of them."""

    def __init__(
        self,
        file: io.FileIO | None,
        files: Sequence[SourceFile],
        progress: Progress | None,
        total: int,
    ) -> None:
        self.file, self.slots = file, list({_slot(one) for one in files})
        self.progress, self.total = progress, total
        self.waited_for: int | None = None

    def take_all(self) -> bool:
        """Lock all slots, or none where somebody has one of them: that comes first next time."""
        if self.file is None:
            return True
        for i, slot in enumerate(self.slots):
            if not _set(self.file, fcntl.F_WRLCK, slot, 1):
                _set(self.file, fcntl.F_UNLCK, 0, SLOTS)
                self.slots.insert(0, self.slots.pop(i))
                self.waited_for = self._reader(slot) or self.waited_for
                return False
        for slot in self.slots:
            with suppress(OSError):  # a full tmpfs: then the others know less
                os.pwrite(self.file.fileno(), PID.pack(os.getpid()), slot * PID.size)
        return True

    def _reader(self, slot: int) -> int:
        """Return who took this slot last, 0 where that is not known."""
        assert self.file is not None  # noqa: S101 - somebody has a lock in it
        record = os.pread(self.file.fileno(), PID.size, slot * PID.size)
        return int(PID.unpack(record)[0]) if len(record) == PID.size else 0

    def pause(self, waited: float) -> None:
        """Say whom this waits for. Raises: CancelledError where the callback says so."""
        if waited > SAY_S:
            warn_once(
                f"waiting for {self.waited_for}",
                f"waited {waited:.0f} s for process {self.waited_for}, which reads the same files;"
                f" waiting on: kill {self.waited_for} lets this process read",
            )
        more = True
        if self.progress is not None:
            pid = os.getpid()
            more = self.progress(0, self.total)
            check_process(pid)
        if more is False or stopping():
            raise self.cancelled("cancelled")
        time.sleep(PAUSE_S)

    def cancelled(self, how: str) -> CancelledError:
        message = f"{how} while process {self.waited_for} was reading the same files"
        return CancelledError(message, total=self.total)


def _slot(file: SourceFile) -> int:
    return (file.opened.inode + 7919 * file.opened.device) % SLOTS


def _set(file: io.FileIO, kind: int, start: int, length: int) -> bool:
    """Lock or unlock these slots for this opening of the file; False if somebody has one."""
    try:
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except BlockingIOError:
        return False
    return True
