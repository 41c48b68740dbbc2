"""Processes that ask network file systems, so that this one never waits where it cannot be stopped.

One for each thread that reads at a time, used again by the next, for all files. They end when the
last network file is closed, when idle, and with this process, however that ends.
"""

from __future__ import annotations

import atexit
import io
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from numaload.errors import CancelledError, NumaError, StalledError, warn_once
from numaload.numa import syscalls
from numaload.numa.netmounts import Network
from numaload.numa.stopping import stopping
from numaload.storage import netreader_main
from numaload.storage.netreader_main import MEMORY

TICK_S = 0.1  # between two looks at whether anyone still waits for the answer
SAY_S = 10.0  # without an answer, after which it is said what is waited for
REAP_S = 0.5  # what a killed process may take to end: one that the kernel holds takes longer
IDLE_S = 5.0
START_S = 60.0


class CannotAskError(Exception):
    """No process can be started for it."""


class EndedError(Exception):
    """The process ended before it had answered."""


class RefusedError(Exception):
    """Its answer is an errno."""

    def __init__(self, errno: int) -> None:
        super().__init__(os.strerror(errno))
        self.errno = errno


class Wait(NamedTuple):
    """What is waited for. ``seconds``: how long at most; None for as long as it takes."""

    path: str
    network: Network
    seconds: float | None
    offset: int | None = None

    def patient(self) -> Wait:
        """For what no server has a part in: on a busy machine, Python takes its time to start."""
        return self._replace(seconds=None if self.seconds is None else max(self.seconds, START_S))

    def check(self, waited: float) -> None:
        """Raises: StalledError; CancelledError where this thread's work is no longer wanted."""
        if stopping():
            raise CancelledError("interrupted")
        if self.seconds is not None and waited >= self.seconds:
            raise StalledError(
                f"no answer for {self.seconds:g} s from {self.network}",
                path=self.path,
                offset=self.offset,
                advice=": see whether it is reachable, wait longer with --io-timeout SECONDS, or"
                f" give it up: umount -f -l {self.network.point}",
                seconds=self.seconds,
                server=self.network.source,
                mount=self.network.point,
            )
        if waited >= SAY_S:
            warn_once(
                f"waiting {self.network.point}",
                f"{self.path}: waiting for {self.network}, which has not answered for"
                f" {waited:.0f} s; to give up after SECONDS: --io-timeout SECONDS, or"
                " NUMALOAD_IO_TIMEOUT=SECONDS; Ctrl-C ends it now",
            )


class Reader:
    """One process. Used by one thread at a time; ``files`` are the descriptors it has, by file."""

    def __init__(self) -> None:
        self.files: dict[int, int] = {}
        self.policy, self.cpus = _policy(), os.sched_getaffinity(0)
        self.since, self.dead, self.fresh = time.monotonic(), False, True
        self.got = b""
        try:
            self._start()
        except (OSError, AttributeError) as error:  # AttributeError: no memfd_create
            raise CannotAskError(str(error)) from error
        self.pid = self.job.pid
        self.answers, self.asked = select.poll(), select.poll()
        self.answers.register(self.out, select.POLLIN)
        self.asked.register(self.into, select.POLLOUT)

    def _start(self) -> None:
        if not sys.executable:
            raise OSError("sys.executable does not name this Python")
        self.memory = io.FileIO(os.memfd_create("numaload-net"), "r+")
        fd = self.memory.fileno()
        os.ftruncate(fd, MEMORY)
        script = os.path.abspath(netreader_main.__file__)
        self.job = subprocess.Popen(
            [sys.executable, "-I", "-S", script, str(fd)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0, pass_fds=(fd,), cwd="/",
            start_new_session=True,
        )  # fmt: skip
        assert self.job.stdin is not None  # noqa: S101 - both are pipes
        assert self.job.stdout is not None  # noqa: S101
        self.into, self.out = self.job.stdin.fileno(), self.job.stdout.fileno()
        os.set_blocking(self.into, False)

    def greet(self, wait: Wait) -> None:
        """Raises: CannotAskError where what was started is not what was meant."""
        try:
            if self.answer(wait.patient()) == [self.pid]:
                return
            why = "it answers with another process id"
        except (EndedError, RefusedError, ValueError):
            why = f"status {self.job.poll()}"
        end([self])
        raise CannotAskError(f"{sys.executable} did not start ({why})")

    def follow(self) -> None:
        """Run where this thread runs, so that page cache lands where it would without it."""
        cpus = os.sched_getaffinity(0)
        if cpus != self.cpus:
            with suppress(OSError):
                os.sched_setaffinity(self.pid, cpus)
            self.cpus = cpus

    def ask(self, wait: Wait, *words: object) -> list[int]:
        """The numbers of its answer. Raises: RefusedError, EndedError, StalledError."""
        self.tell(wait, *words)
        return self.answer(wait)

    def tell(self, wait: Wait, *words: object) -> None:
        line = memoryview(" ".join(map(str, words)).encode() + b"\n")
        begin = time.monotonic()
        while line:
            if not self.asked.poll(TICK_S * 1000):
                wait.check(time.monotonic() - begin)
            line = line[self._write(line) :]

    def _write(self, line: memoryview) -> int:
        try:
            return os.write(self.into, line)
        except BlockingIOError:
            return 0
        except BrokenPipeError as error:
            raise EndedError from error

    def answer(self, wait: Wait) -> list[int]:
        return list(map(int, self.words(wait)))

    def words(self, wait: Wait) -> list[bytes]:
        begin = time.monotonic()
        while b"\n" not in self.got:
            if self.answers.poll(TICK_S * 1000):
                some = os.read(self.out, 1 << 16)
                if not some:
                    raise EndedError
                self.got += some
            else:
                wait.check(time.monotonic() - begin)
        line, _, self.got = self.got.partition(b"\n")
        error, *rest = line.split(b" ")
        if error != b"0":
            raise RefusedError(int(error))
        return rest

    def name(self, wait: Wait, *words: object) -> str:
        """An answer that is a path."""
        self.tell(wait, *words)
        return os.fsdecode(bytes.fromhex(self.words(wait)[0].decode()))

    def copy(self, view: memoryview, start: int) -> None:
        """Out of the memory, into which it has read."""
        while view:
            count = os.preadv(self.memory.fileno(), [view], start)
            view, start = view[count:], start + count

    def close(self, file: int) -> None:
        fd = self.files.pop(file)
        with suppress(OSError):  # it is ended, or will be soon
            os.write(self.into, b"close %d\n" % fd)

    def forget(self) -> None:
        """Close this end of it."""
        self.dead = True
        for pipe in (self.job.stdin, self.job.stdout):
            if pipe is not None:
                pipe.close()
        self.memory.close()


def _policy() -> Any:
    """Of this thread's memory; processes that it starts have the same, those started before not."""
    try:
        mode, nodes = syscalls.get_mempolicy()
    except NumaError:
        return None
    return mode, tuple(nodes)


def end(readers: list[Reader]) -> None:
    """Kill them and wait for that, but not for ever: the kernel may hold one back."""
    _held[:] = [job for job in _held if job.poll() is None]
    for reader in readers:
        reader.job.kill()
        reader.forget()
    until = time.monotonic() + REAP_S
    for reader in readers:
        if not _ended(reader.job, max(0.0, until - time.monotonic())):
            _held.append(reader.job)
            warn_once(
                "held",
                f"process {reader.pid} ({netreader_main.NAME}) does not end when killed: the kernel"
                " holds it until its file system answers; nothing here waits for it any more",
            )


def _ended(job: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        job.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


_held: list[subprocess.Popen[bytes]] = []  # killed, and not gone yet


class Pool:
    """The processes of this process. ``wanted``: files that are open; without one, none stays."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.lock = threading.RLock()  # garbage that is collected inside may close files
        self.idle: list[Reader] = []
        self.busy: set[Reader] = set()
        self.wanted: set[int] = set()

    @contextmanager
    def reader(self, wait: Wait) -> Iterator[Reader]:
        """One for this thread alone. It is ended if anything is raised but its own answer.

        Raises: CannotAskError, StalledError, CancelledError.
        """
        policy = _policy()
        with self._using(self._take(lambda one: one.policy == policy) or Reader()) as reader:
            if reader.fresh:
                reader.greet(wait)
            reader.follow()
            yield reader

    @contextmanager
    def reader_of(self, file: int) -> Iterator[Reader | None]:
        """One that has this file open already, if there is one that is idle."""
        found = self._take(lambda one: file in one.files)
        if found is None:
            yield None
            return
        with self._using(found):
            yield found

    @contextmanager
    def _using(self, reader: Reader) -> Iterator[Reader]:
        with self.lock:
            self.busy.add(reader)
        try:
            yield reader
        except BaseException as error:
            if not (isinstance(error, RefusedError) or reader.dead):
                end([reader])
            raise
        finally:
            self._give_back(reader)

    def _take(self, fits: Callable[[Reader], bool]) -> Reader | None:
        with self.lock:
            for reader in reversed(self.idle):
                if fits(reader) and not reader.dead:
                    self.idle.remove(reader)
                    return reader
        return None

    def _give_back(self, reader: Reader) -> None:
        reader.fresh, reader.since = False, time.monotonic()
        with self.lock:
            self.busy.discard(reader)
            if not reader.dead:
                self.idle.append(reader)
            over = self._over()
        end(over)

    def _over(self) -> list[Reader]:
        """Those that are not needed any more, taken out. Descriptors that are not, either."""
        since = time.monotonic() - IDLE_S
        over = [one for one in self.idle if one.since < since or not self.wanted]
        self.idle = [one for one in self.idle if one not in over]
        for reader in self.idle:
            for file in reader.files.keys() - self.wanted:
                reader.close(file)
        return over

    def open(self, file: int) -> None:
        with self.lock:
            self.wanted.add(file)

    def close(self, file: int) -> None:
        with self.lock:
            self.wanted.discard(file)
            over = self._over()
        end(over)

    def end(self) -> None:
        with self.lock:
            self.wanted.clear()
            over = self._over()
        end(over)
        for job in _held:
            job.returncode = -signal.SIGKILL  # Python would warn of it

    def forget(self) -> None:
        """In a forked child: they are its parent's, and shall end with that."""
        for reader in (*self.idle, *self.busy):
            reader.job.returncode = 0  # not this process's to wait for
            reader.forget()
        wanted = self.wanted
        self._clear()  # the lock too: a thread that is not here may have had it
        self.wanted = wanted


pool = Pool()
atexit.register(pool.end)
os.register_at_fork(after_in_child=pool.forget)
