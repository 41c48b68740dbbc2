"""One process reads a file into the page cache, others that want it too follow its progress.

::

    /dev/shm/numaload-1000/reading/DEVICE-INODE    held by flock as long as somebody reads the file

In it is who reads and how far it came. Whoever cannot have all the locks it needs keeps none of
them, so nobody waits for somebody who waits. A lock ends with its process, however that ends, and
then one of those that followed has it. The reader takes the file away; what a killed one left is
used again by the next, or cleared by the next verb.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple

from numaload.errors import CancelledError, StoreError, UsageError, reason, warn_once
from numaload.numa.stopping import check_process
from numaload.storage import userdir
from numaload.storage.files import SourceFile
from numaload.storage.reader import Progress

FOLDER = "reading"
NAME = re.compile(r"[0-9a-f]+-[0-9a-f]+")
PAUSE_S = 0.05
STILL_S = 30.0  # without progress, after which it is said whom this waits for
RECORD = struct.Struct("<qQQ")  # process id, bytes done, bytes in all
FLAGS = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_called: ContextVar[bool] = ContextVar("called", default=False)


class Reader(NamedTuple):
    """Who reads a file, and how far it came. ``pid`` is 0 for one that has not said so yet."""

    pid: int = 0
    done: int = 0
    total: int = 0


class Turn:
    """The turn of this process to read.

    ``followed`` is the process that was waited for last, or None; ``by_others`` are the bytes that
    others said they read meanwhile.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.followed: int | None = None
        self.by_others = 0
        self.seen = Reader()  # of who is followed
        self.locks: list[io.FileIO] = []

    def tell(self, done: int, total: int) -> bool:
        """The progress of this process's own reading: to those who follow, then to the caller."""
        self.announce(Reader(os.getpid(), done, total))
        token = _called.set(True)
        try:
            return self.progress is None or self.progress(done, total) is not False
        finally:
            _called.reset(token)

    def announce(self, reader: Reader) -> None:
        for lock in self.locks:
            with suppress(OSError):  # a full tmpfs: then the others see less
                os.pwrite(lock.fileno(), RECORD.pack(*reader), 0)


@contextmanager
def turn(files: Sequence[SourceFile], progress: Progress | None = None) -> Iterator[Turn]:
    """Wait until nobody else of this user reads any of these files; meanwhile others wait for this.

    What is resident is to be asked inside. progress: is told how far the others are, in their
    numbers; returning False cancels. Where the user's folder cannot be used, nobody waits; nor in
    the progress callback of another turn: those who are waited for may wait for that.
    Raises: CancelledError, while it waits.
    """
    mine = Turn(progress)
    if in_turn():
        yield mine
        return
    with ExitStack() as held:
        try:
            _wait(mine, sorted({_name(file) for file in files}), held)
        except KeyboardInterrupt:
            raise _stopped("interrupted", mine.seen) from None
        except OSError as error:
            held.close()
            mine.locks = []
            why = str(error)
            if not isinstance(error, StoreError):
                why = f"{userdir.path()}/{FOLDER}: {reason(error)}"
            warn_once(why, f"{why}; read without knowing who else reads these files")
        pid = os.getpid()
        try:
            yield mine
        finally:
            if os.getpid() != pid:  # forked meanwhile: the locks are the parent's
                held.pop_all()


def in_turn() -> bool:
    """Whether this is called in the progress callback of a turn."""
    return _called.get()


def check_free() -> None:
    """For who waits for others that may read. Raises: UsageError in the callback of a turn."""
    if in_turn():
        raise UsageError(
            "called in the progress callback of prewarm: it waits for others, who may wait until"
            " that has read the same files; call it when that has returned"
        )


def sweep() -> None:
    """Clear what killed readers left."""
    with userdir.within(FOLDER, create=False) as folder:
        for name in userdir.listed(folder) if folder is not None else ():
            with suppress(OSError):
                if NAME.fullmatch(name) and _is_lock(os.lstat(name, dir_fd=folder)):
                    lock, free = _lock(name, folder)
                    if free:
                        _give_back(lock, name, folder)
                    lock.close()


def _is_lock(status: os.stat_result) -> bool:
    return stat.S_ISREG(status.st_mode) and status.st_size <= RECORD.size


def _name(file: SourceFile) -> str:
    return f"{file.opened.device:x}-{file.opened.inode:x}"


def _wait(mine: Turn, names: list[str], held: ExitStack) -> None:
    """Until all locks are this turn's, and in ``held``. Raises: OSError, CancelledError."""
    folder = held.enter_context(userdir.within(FOLDER))
    while True:
        with ExitStack() as locks:
            busy = _take(mine, names, folder, locks)
            if busy is None:
                mine.announce(Reader(os.getpid()))
                held.push(locks.pop_all())
                return
        with busy:
            _follow(mine, busy)


def _take(mine: Turn, names: list[str], folder: int | None, held: ExitStack) -> io.FileIO | None:
    """None where all are locked, in ``held``; else the first that is somebody else's."""
    mine.locks = []
    for name in names:
        lock, free = _lock(name, folder)
        if not free:
            return lock
        held.callback(_give_back, lock, name, folder)
        mine.locks.append(lock)
    return None


def _lock(name: str, folder: int | None) -> tuple[io.FileIO, bool]:
    """The file of this name, and whether it is locked now, by this process."""
    while True:
        # An object that owns the descriptor: Ctrl-C at any moment closes it, and so unlocks it.
        lock = io.FileIO(name, "r+", opener=lambda n, _: os.open(n, FLAGS, 0o600, dir_fd=folder))
        free = _try_lock(lock)
        if os.fstat(lock.fileno()).st_nlink:
            return lock, free
        lock.close()  # whoever was done with it has taken it away


def _try_lock(lock: io.FileIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _give_back(lock: io.FileIO, name: str, folder: int | None) -> None:
    with lock:
        with suppress(OSError):  # the next sweep takes it away
            if os.fstat(lock.fileno()).st_nlink:
                os.unlink(name, dir_fd=folder)
        with suppress(OSError):
            # Closing alone would leave it locked where a child was forked meanwhile.
            fcntl.flock(lock, fcntl.LOCK_UN)


def _follow(mine: Turn, lock: io.FileIO) -> None:
    """Until it is nobody's. Raises: CancelledError where the callback says so."""
    mine.seen, moved, pid = _reader(lock), time.monotonic(), os.getpid()
    while not _try_lock(lock):
        if _look(mine, lock):
            moved = time.monotonic()
        elif time.monotonic() - moved > STILL_S:
            _tell_that_it_waits(mine.seen)
        done, total = mine.seen.done, mine.seen.total
        if mine.progress and total:
            more = mine.progress(done, total)
            check_process(pid)
            if more is False:
                raise _stopped("cancelled", mine.seen)
        time.sleep(PAUSE_S)
    _look(mine, lock)
    fcntl.flock(lock, fcntl.LOCK_UN)


def _look(mine: Turn, lock: io.FileIO) -> bool:
    """Whether the reader came further, or is another one."""
    last, now = mine.seen, _reader(lock)
    mine.seen, mine.followed = now, now.pid or mine.followed
    mine.by_others += max(0, now.done - (last.done if last.pid == now.pid else 0))
    return now != last


def _stopped(how: str, reader: Reader) -> CancelledError:
    message = f"{how} while process {reader.pid} was reading the same files"
    return CancelledError(message, done=reader.done, total=reader.total)


def _reader(lock: io.FileIO) -> Reader:
    record = os.pread(lock.fileno(), RECORD.size, 0)
    return Reader(*RECORD.unpack(record)) if len(record) == RECORD.size else Reader()


def _tell_that_it_waits(reader: Reader) -> None:
    warn_once(
        f"following {reader.pid}",
        f"process {reader.pid}, which reads the same files, has not come further for"
        f" {STILL_S:.0f} s; waiting for it: kill {reader.pid} lets this process read",
    )
