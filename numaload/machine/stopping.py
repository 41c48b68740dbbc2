"""Cancelling and progress: whether a thread's work is still wanted, and how far it came."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar
from weakref import WeakSet

from numaload.errors import CancelledError, UsageError

L = TypeVar("L")

_local = threading.local()
_locks: WeakSet[Any] = WeakSet()


class CancelToken:
    """Tell all threads of one piece of work that nobody wants it any more.

    A thread works for it inside ``with token``: what waits there, for a network or for other
    threads, gives up once it is cancelled. Any number of threads may be inside.
    """

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancelled(self) -> bool:
        return self._event.is_set()

    def cancel(self) -> None:
        self._event.set()

    def wait(self, seconds: float) -> bool:
        """Wait so long, or until it is cancelled; return whether it is."""
        return self._event.wait(seconds)

    def __enter__(self) -> CancelToken:
        _local.tokens = (*getattr(_local, "tokens", ()), self)
        return self

    def __exit__(self, *_: object) -> None:
        _local.tokens = _local.tokens[:-1]


def stopping() -> bool:
    """Return whether nobody wants what this thread does now any more."""
    return any(token.cancelled() for token in getattr(_local, "tokens", ()))


def at_work() -> bool:
    """Return whether this thread works for another one: it must not wait for others that do.

    Garbage is collected in any thread: also what would wait for that thread's own work.
    """
    return bool(getattr(_local, "tokens", ()))


def renewed(lock: L) -> L:
    """Return the same lock, open in forked children: whoever held it is not there."""
    _locks.add(lock)
    return lock


def _renew() -> None:
    for lock in list(_locks):
        lock._at_fork_reinit()  # noqa: SLF001 - as the standard library's logging does


os.register_at_fork(after_in_child=_renew)


def check_process(pid: int) -> None:
    """Check the process. Raises: UsageError in a forked child of the one that began it."""
    if os.getpid() != pid:
        raise UsageError(
            f"this was begun by process {pid}, whose threads its forked child {os.getpid()} does"
            " not have: begin it again in the child, or before the end of it start no child that"
            " goes on with it"
        )


class Steps:
    """Count bytes that threads have done, and tell the callback of the thread that waits.

    It is called there with no lock held, so it may call anything.
    """

    def __init__(self, total: int, progress: Callable[[int, int], Any] | None) -> None:
        self.total, self.progress, self.done = total, progress, 0
        self.pid, self._teller = os.getpid(), threading.get_ident()
        self._lock = threading.Lock()
        # Numbers of bytes, and futures that have ended: what their waiter waits for.
        self.news: SimpleQueue[Any] = SimpleQueue()
        self.told = threading.Semaphore(0)

    def begin(self) -> None:
        if self.progress:
            self.progress(0, self.total)
            check_process(self.pid)

    def add(self, nbytes: int) -> None:
        with self._lock:
            self.done += nbytes
            done, later = self.done, threading.get_ident() != self._teller
            if self.progress and later:
                self.news.put(done)
        if not later:
            self.tell(done)

    def tell(self, done: int) -> None:
        """Tell the callback. Raises: CancelledError where it says so, and what it raises."""
        if self.progress and self.progress(done, self.total) is False:
            raise CancelledError("cancelled", done=done, total=self.total)
        check_process(self.pid)
        check_wanted(self)
        self.told.release()


def check_wanted(steps: Steps | None) -> None:
    """Check that somebody wants what this thread waits for. Raises: CancelledError."""
    if stopping():
        done, total = (steps.done, steps.total) if steps else (0, 0)
        raise CancelledError("cancelled", done=done, total=total)
