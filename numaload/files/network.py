"""Ask network file systems in threads that can be given up.

The kernel does not release a thread that waits for a silent server. So each call that may wait for
one is made in another thread, and whoever wants the answer can stop waiting: at a time limit, at
Ctrl-C, when nobody wants the result any more. Then the thread is abandoned. Its buffer and its
descriptor stay its own until the kernel lets it go. It reads into that buffer, never into the
caller's memory: memory that is given back after an error may belong to somebody else when the
answer comes.

These threads are begun by ``_thread``, which keeps no list of them: no exit waits for them, and no
lock is taken, so that the garbage collector may start one. A forked child has none and starts its
own.
"""

from __future__ import annotations

import _thread
import math
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from errno import EBADF
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, TypeVar

from numaload.errors import (
    CancelledError,
    NotCopyable,
    NumaError,
    StalledError,
    UsageError,
    warn_once,
)
from numaload.linux import syscalls
from numaload.linux.mounts import Mount
from numaload.machine.stopping import renewed, stopping

VARIABLE = "NUMALOAD_IO_TIMEOUT"
NAME = "numaload-net"  # of the threads, in ps -L and top
PIECE = 1 << 20  # bytes read at a time: each has the whole time limit
TICK_S = 0.1  # between two looks at whether anyone still waits for the answer
SAY_S = 10.0  # without an answer, after which it is said what is waited for
IDLE_S = 5.0  # after which a thread ends that nobody asks

T = TypeVar("T")
Policy = tuple[int, tuple[int, ...]]  # mode and nodes

limit: ContextVar[float | None] = ContextVar("io_timeout", default=None)
_local = threading.local()


def checked(seconds: float | str, name: str) -> float:
    """Return a time limit as a number. Raises: UsageError where it is none."""
    try:
        number = float(seconds)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"{name}: {seconds!r}, expected a number of seconds above 0")
    return number


def limit_now() -> float | None:
    """Return the limit that a call or NUMALOAD_IO_TIMEOUT sets. Raises: UsageError."""
    asked, text = limit.get(), os.environ.get(VARIABLE)
    return checked(text, VARIABLE) if asked is None and text else asked


class Descriptor(NotCopyable):
    """An open file. It is closed when its owner closed it and no thread is inside a call with it.

    Otherwise its number could be used again, and that thread would go on with another file.
    """

    __slots__ = ("_lock", "_users", "fd")

    def __init__(self, fd: int) -> None:
        self.fd, self._users = fd, 1  # the owner
        self._lock = renewed(threading.RLock())  # garbage that is collected inside may be the owner

    def enter(self) -> None:
        """Count one more user. Raises: OSError once it is closed."""
        with self._lock:
            if self.fd < 0 or not self._users:
                raise OSError(EBADF, os.strerror(EBADF))
            self._users += 1

    def leave(self) -> None:
        """End one use; the last one closes the file. The owner's use ends when it closes."""
        with self._lock:
            self._users -= 1
            fd = -1 if self._users else self.take()
        _close(fd)

    def take(self) -> int:
        """Give the file to the caller, who closes it."""
        fd, self.fd = self.fd, -1
        return fd

    def __del__(self) -> None:
        _close(self.take())


def _close(fd: int) -> None:
    """Have a thread close it: some servers are asked then too, and nobody needs the answer."""
    if fd < 0:
        return
    try:
        _begin(_Task(os.close, (fd,)))
    except RuntimeError:  # no thread can be started
        os.close(fd)


class NetworkPath(NamedTuple):
    """A name on a network, and for how many ``seconds`` an answer is waited for; None: for ever."""

    path: str
    mount: Mount
    seconds: float | None

    def ask(
        self,
        function: Callable[..., T],
        *arguments: object,
        offset: int | None = None,
        keep: Descriptor | None = None,
    ) -> T:
        """Call ``function`` in a thread that is abandoned when this one stops waiting for it.

        ``function`` may write only to its arguments, which must not be used again if this raises.
        offset: of the file, for errors. keep: a file that must stay open meanwhile.
        Raises: what ``function`` raises, StalledError, CancelledError.
        """
        if getattr(_local, "asks", False):  # a question within a question
            return function(*arguments)
        task = _Task(function, arguments, keep, os.sched_getaffinity(0), _policy())
        try:
            _begin(task)
        except RuntimeError as error:  # no thread can be started
            task.leave()
            warn_once(
                "network threads",
                f"{self.path}: read by the thread that asks, which then cannot be stopped while"
                f" {self.mount} does not answer: {error}",
            )
            return function(*arguments)
        begin = time.monotonic()
        try:
            while not task.ended.acquire(timeout=TICK_S):
                self._check(time.monotonic() - begin, offset)
            answer: T = task.result()
            return answer
        finally:
            del task  # an error's traceback would keep what is answered later, such as a file

    def read(self, source: Descriptor, view: memoryview, offset: int) -> int:
        """Fill the beginning of ``view``; return how many bytes that are, 0 at the file's end."""
        part = view[:PIECE]
        buffer = getattr(_local, "buffer", None) or bytearray(PIECE)
        _local.buffer = None  # the thread's, until it has answered
        count = self.ask(_read, source.fd, buffer, len(part), offset, offset=offset, keep=source)
        syscalls.copy_bytes(part[:count], buffer)
        _local.buffer = buffer
        return count

    def _check(self, waited: float, offset: int | None) -> None:
        """Check whether to wait on. Raises: StalledError; CancelledError if nobody wants it."""
        if stopping():
            raise CancelledError("interrupted")
        if self.seconds is not None and waited >= self.seconds:
            raise StalledError(
                f"no answer for {self.seconds:g} s from {self.mount}",
                path=self.path,
                offset=offset,
                advice=": see whether it is reachable, wait longer with --io-timeout SECONDS, or"
                f" give it up: umount -f -l {self.mount.point}",
                seconds=self.seconds,
                server=self.mount.source,
                mount=self.mount.point,
            )
        if waited >= SAY_S:
            warn_once(
                f"waiting {self.mount.point}",
                f"{self.path}: waiting for {self.mount}, which has not answered for"
                f" {waited:.0f} s; to give up after SECONDS: --io-timeout SECONDS, or"
                f" {VARIABLE}=SECONDS; Ctrl-C ends it now",
            )


def _read(fd: int, buffer: bytearray, nbytes: int, offset: int) -> int:
    return os.preadv(fd, [memoryview(buffer)[:nbytes]], offset)


class _Task:
    """A call, and what came of it once ``ended`` can be taken."""

    __slots__ = ("answer", "call", "cpus", "ended", "error", "keep", "policy")

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[object, ...],
        keep: Descriptor | None = None,
        cpus: set[int] | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.call: tuple[Callable[..., Any], tuple[object, ...]] | None = (function, arguments)
        if keep is not None:
            keep.enter()
        self.keep = keep
        self.cpus, self.policy = cpus, policy  # of whoever asks; None: any will do
        self.answer: Any = None
        self.error: BaseException | None = None
        self.ended = _thread.allocate_lock()
        self.ended.acquire()

    def run(self) -> None:
        assert self.call is not None  # noqa: S101 - it is run once
        function, arguments = self.call
        self.call = None
        try:
            self.answer = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.error = error
        self.leave()

    def leave(self) -> None:
        if self.keep is not None:
            self.keep.leave()
            self.keep = None

    def result(self) -> Any:
        error, self.error = self.error, None
        if error is not None:
            try:
                raise error
            finally:
                error = None  # or its traceback would hold itself
        return self.answer


class _Threads:
    """Tasks for whichever thread is idle. Each token in ``idle`` stands for a thread that is."""

    def __init__(self) -> None:
        self.tasks: SimpleQueue[_Task] = SimpleQueue()
        self.idle: SimpleQueue[None] = SimpleQueue()

    def serve(self) -> None:
        _local.asks = True
        syscalls.name_thread(NAME)
        cpus, policy = os.sched_getaffinity(0), _policy()
        while True:
            try:
                task = self.tasks.get(timeout=IDLE_S)
            except Empty:
                try:
                    self.idle.get_nowait()
                except Empty:  # somebody took the token: a task is on its way
                    continue
                return
            # Page cache lands where it would if the thread that asks had read.
            if task.cpus and task.cpus != cpus:
                with suppress(OSError):
                    os.sched_setaffinity(0, task.cpus)
                cpus = task.cpus
            if task.policy and task.policy != policy:
                with suppress(NumaError):
                    syscalls.set_mempolicy(*task.policy)
                policy = task.policy
            task.run()
            self.idle.put(None)  # before the next question can come
            task.ended.release()
            del task  # and what it kept


def _policy() -> Policy | None:
    """Return where this thread's memory lands; None where the kernel does not say."""
    try:
        mode, nodes = syscalls.get_mempolicy()
    except NumaError:
        return None
    return mode, tuple(nodes)


_threads = _Threads()


def _begin(task: _Task) -> None:
    """Hand a task to a thread. Raises: RuntimeError where none can be started."""
    threads = _threads
    try:
        threads.idle.get_nowait()
    except Empty:
        _thread.start_new_thread(threads.serve, ())
    threads.tasks.put(task)


def _forget() -> None:
    """Leave the parent's threads, and what they were asked, to the parent."""
    global _threads  # noqa: PLW0603 - there is one process
    _threads = _Threads()


os.register_at_fork(after_in_child=_forget)
