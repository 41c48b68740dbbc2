"""Write spans to a file that Perfetto opens: an array in the Chrome trace event format.

Any number of processes add to one file, an event a line. Each replaces the closing bracket, under
flock(2), so that the file is whole JSON between two of them.

Source: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import atexit
import json
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock
from typing import Any

from numaload.errors import printable, reason, warn_once

MOST = 10_000  # events kept in memory
TAIL = 1 << 16  # bytes: more than an event has
LOCK_S, PAUSE_S = 5.0, 0.01  # adding takes milliseconds
HEAD, END = b'[\n{"name":"process_name","ph":"M",', b"\n]\n"

Waiting = tuple[dict[str, Any], str]  # an event, and the name of its thread


class TraceFile:
    """The trace file of this process, and of its forked children, which have events of their own.

    It never stops the work: what goes wrong with the file is a warning.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        # Appending and taking are atomic: no lock, which a fork or a signal handler might find
        # closed.
        self._waiting: deque[Waiting] = deque()
        self._names: dict[int, str] = {}  # of threads, as written
        self._begun = self._refused = False
        atexit.register(self.write)
        os.register_at_fork(after_in_child=self._forget)

    def _forget(self) -> None:
        self._waiting.clear()  # the parent's, which writes them itself
        self._names.clear()
        self._begun = False

    def add(self, event: dict[str, Any]) -> None:
        """Keep it until there are many. The first is written at once: errors are said early."""
        if self._refused:
            return
        self._waiting.append((event, threading.current_thread().name))
        if not self._begun or len(self._waiting) >= MOST:
            self._begun = True
            self.write()

    def write(self) -> None:
        """Add to the file what has not been written yet."""
        events = list(self._taken())
        if not events or self._refused:
            return
        try:
            with _locked(self.path) as fd:
                if os.fstat(fd).st_size == 0:  # somebody has removed it to begin anew
                    self._names.clear()
                _append(fd, list(self._lines(events)))
        except BlockingIOError:
            text = f"another process has had it locked for {LOCK_S:.0f} s"
            self._warn("locked", f"{text}: {len(events)} spans are lost")
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path, or no trace
            self._refused = True
            why = reason(error) if isinstance(error, OSError) else str(error)
            self._warn("file", f"{why}: no trace is written")

    def _warn(self, key: str, text: str) -> None:
        warn_once(f"trace {key}", f"NUMALOAD_TRACE: {printable(self.path, 1000)}: {text}")

    def _taken(self) -> Iterator[Waiting]:
        """Take the events that wait. Another thread may do so too."""
        with suppress(IndexError):
            while True:
                yield self._waiting.popleft()

    def _lines(self, events: Iterable[Waiting]) -> Iterator[bytes]:
        """Write events; new names of the process and of threads come before them."""
        if not self._names:
            yield self._named("process_name", 0, _process_name())
        for event, thread in events:
            if self._names.get(event["tid"]) != thread:
                yield self._named("thread_name", event["tid"], thread)
            yield _packed(event)

    def _named(self, what: str, tid: int, name: str) -> bytes:
        self._names[tid] = name
        args = {"name": printable(name)}
        return _packed({"name": what, "ph": "M", "pid": os.getpid(), "tid": tid, "args": args})


def _packed(event: dict[str, Any]) -> bytes:
    return json.dumps(event, separators=(",", ":")).encode()


def _process_name() -> str:
    """Return the kernel's name of this process, and its script, or of ours the verb."""
    script = [os.path.basename(sys.argv[0])] if sys.argv else []
    name = "python"
    with suppress(OSError), open("/proc/self/comm", encoding="utf-8", errors="replace") as file:
        name = file.read().strip()
    return " ".join([name, *(sys.argv[1:2] if script == [name] == ["numaload"] else script)])


@contextmanager
def _locked(path: str) -> Iterator[int]:
    """Open the file, made where it is not there. Raises: OSError, BlockingIOError, ValueError."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):  # some devices do something when opened
            raise ValueError("expected a regular file")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    try:
        end = time.monotonic() + LOCK_S
        while True:
            try:
                flock(fd, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise
                time.sleep(PAUSE_S)
        yield fd
    finally:
        with suppress(OSError):
            flock(fd, LOCK_UN)  # a child forked meanwhile has the descriptor, and so the lock, too
        os.close(fd)


def _append(fd: int, lines: list[bytes]) -> None:
    """Add events where the array ends, or change nothing. Raises: OSError, ValueError."""
    at = _end_of_events(fd)
    data = (b"[\n" if at == 0 else b",\n") + b",\n".join(lines) + END
    try:
        done = 0
        while done < len(data):
            done += os.pwrite(fd, data[done:], at + done)
        os.ftruncate(fd, at + len(data))
    except BaseException:
        if at:
            os.pwrite(fd, END, at)  # first: where nothing can be written, nothing has changed
        os.ftruncate(fd, at + len(END) if at else 0)
        raise


def _end_of_events(fd: int) -> int:
    """Return where the last whole event ends. Raises: ValueError if it is no trace of this form."""
    size = os.fstat(fd).st_size
    if size == 0:
        return 0
    start = max(0, size - TAIL)
    tail = os.pread(fd, TAIL, start)
    # A process that was killed while it added may have left half an event.
    last = tail.rfind(END if tail.endswith(END) else b"},\n")
    if os.pread(fd, len(HEAD), 0) != HEAD or last < 0:
        raise ValueError("something else than a trace of numaload is in it, which is left alone")
    return start + last + (0 if tail.endswith(END) else 1)
