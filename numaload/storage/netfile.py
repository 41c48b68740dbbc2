"""A file of a network file system, as the processes that ask it see it, and how long is waited."""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import NamedTuple, TypeVar

from numaload.errors import (
    CancelledError,
    FileChangedError,
    NotCopyable,
    ReadError,
    StalledError,
    UsageError,
)
from numaload.errors import reason as why
from numaload.numa.netmounts import Network
from numaload.numa.stopping import renewed
from numaload.storage.netreader import CannotAskError, EndedError, Reader, RefusedError, Wait, pool
from numaload.storage.netreader_main import MEMORY

VARIABLE = "NUMALOAD_IO_TIMEOUT"
DROP_S = 1.0  # giving page cache back is not worth more
NAME_S = 5.0  # nor is the other name of a file
ENDED = "the process that reads network files ended; something killed it: read again"
PACKAGES = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

T = TypeVar("T")
Run = tuple[int, int]  # (start, stop) in bytes of a file
_keys = itertools.count(1)
_asked_for: ContextVar[float | None] = ContextVar("io_timeout", default=None)


@contextmanager
def asked_for(seconds: float, files: Iterable[NetworkFile] = ()) -> Iterator[None]:
    """See ``io_timeout`` of files.py. Raises: UsageError."""
    checked = _checked(seconds, "io_timeout")
    token, before = _asked_for.set(checked), [(file, file.wait) for file in files]
    try:
        for file, wait in before:
            file.wait = wait._replace(seconds=checked)
        yield
    finally:
        _asked_for.reset(token)
        for file, wait in before:
            file.wait = wait


def seconds_now() -> float | None:
    """What is asked for, by a call or by NUMALOAD_IO_TIMEOUT. Raises: UsageError."""
    asked = _asked_for.get()
    text = os.environ.get(VARIABLE)
    return _checked(text, VARIABLE) if asked is None and text else asked


def _checked(seconds: float | str, name: str) -> float:
    try:
        number = float(seconds)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise UsageError(f"{name}: {seconds!r}, expected seconds, more than 0")
    return number


class Status(NamedTuple):
    """What stat(2) says of it."""

    st_mode: int
    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int
    st_uid: int


class NetworkFile(NotCopyable):
    """Threads may share it. Every call may raise StalledError, CancelledError and ReadError."""

    def __init__(self, path: str, network: Network) -> None:
        if "\0" in path:
            raise ValueError("embedded null byte")  # as os.open has it
        # Processes have another working directory.
        self.path = path if os.path.isabs(path) else os.path.join(os.getcwd(), path)
        self.wait = Wait(path, network, seconds_now())
        self.key, self.inode = next(_keys), (0, 0)
        self._here, self._lock = -1, renewed(threading.RLock())

    def open(self) -> Status:
        """Raises also: OSError as open(2) does, CannotAskError."""
        pool.open(self.key)
        try:
            status = self.ask(self._open_in)
        except RefusedError as error:
            raise OSError(error.errno, os.strerror(error.errno)) from None
        self.inode = status.st_dev, status.st_ino
        return status

    def _open_in(self, reader: Reader) -> Status:
        """Raises: RefusedError."""
        fd, *rest = reader.ask(self.wait, "open", os.fsencode(self.path).hex())
        if fd >= 0:
            reader.files[self.key] = fd
        return Status(*rest)

    def _fd(self, reader: Reader) -> int:
        """Its descriptor there. Raises: RefusedError, FileChangedError."""
        if self.key not in reader.files:
            status = self._open_in(reader)
            if (status.st_dev, status.st_ino) != self.inode:
                raise FileChangedError("replaced while in use", path=self.wait.path)
        return reader.files[self.key]

    def ask(self, question: Callable[[Reader], T], wait: Wait | None = None) -> T:
        """Once more where a process that was idle had ended. Raises: RefusedError."""
        wait = wait or self.wait
        while True:
            fresh = False
            try:
                with pool.reader(wait) as reader:
                    fresh = reader.fresh
                    return question(reader)
            except EndedError:
                if fresh:
                    raise ReadError(ENDED, path=wait.path, offset=wait.offset) from None

    def _answer(self, question: Callable[[Reader], T], offset: int | None = None) -> T:
        """With errors as everybody knows them."""
        wait = self.wait._replace(offset=offset)
        try:
            return self.ask(question, wait)
        except RefusedError as error:
            text = why(OSError(error.errno, str(error)))
            raise ReadError(text, path=wait.path, offset=offset) from None
        except CannotAskError as error:
            raise ReadError(f"nothing can be started to read it: {error}", path=wait.path) from None

    def status(self) -> Status:
        def question(reader: Reader) -> Status:
            return Status(*reader.ask(self.wait, "stat", self._fd(reader))[1:])

        return self._answer(question)

    def read(self, view: memoryview, offset: int) -> int:
        """Fill ``view``; how many bytes there were. Less is the file's end, or before an error."""
        part = view[:MEMORY]
        return self._answer(lambda reader: self._read(reader, part, offset), offset)

    def _read(self, reader: Reader, view: memoryview, offset: int) -> int:
        done, wait = 0, self.wait._replace(offset=offset)
        reader.tell(wait, "read", self._fd(reader), offset, len(view))
        while done < len(view):
            try:
                (count,) = reader.answer(wait._replace(offset=offset + done))
            except RefusedError:
                if done:
                    return done  # whoever goes on from there gets it again
                raise
            if not count:
                break
            reader.copy(view[done : done + count], done)
            done += count
        return done

    def drop(self, offset: int, nbytes: int) -> None:
        """Give page cache back where a process is there that can: else it stays."""
        wait = self.wait._replace(seconds=DROP_S)
        given_up = suppress(StalledError, CancelledError, RefusedError, EndedError)
        with given_up, pool.reader_of(self.key) as reader:
            if reader is not None:
                reader.ask(wait, "drop", reader.files[self.key], offset, nbytes)

    def resident(self, start: int, stop: int) -> tuple[bool, list[Run]]:
        """As storage.residency tells it there: whether it is known, and what is absent."""
        wait, words = self.wait.patient(), [start, stop, _hex(PACKAGES)]  # it imports numaload
        known, *edges = self._answer(lambda r: r.ask(wait, "resident", self._fd(r), *words))
        return bool(known), _pairs(edges)

    def placed(self, start: int, size: int, absent: Iterable[Run]) -> dict[int, int]:
        """{node: bytes} of its page cache; ``absent`` is not looked at."""
        wait = self.wait.patient()
        words = [start, size, _hex(PACKAGES), *(edge for run in absent for edge in run)]
        rows = self._answer(lambda r: r.ask(wait, "placed", self._fd(r), *words))
        return dict(_pairs(rows))

    def descriptor(self, opener: Callable[[str], int]) -> int:
        """One of this process, opened by ``opener`` when it is first asked for."""
        with self._lock:
            if self._here < 0:
                self.status()  # it answers, just now
                try:
                    self._here = opener(self.path)
                    found = os.fstat(self._here)
                except OSError as error:
                    raise ReadError(why(error), path=self.wait.path) from error
                if (found.st_dev, found.st_ino) != self.inode:
                    raise FileChangedError("replaced while in use", path=self.wait.path)
            return self._here

    def leave(self) -> int:
        """Without waiting for anything; what is left to do is done by the next who reads."""
        pool.wanted.discard(self.key)
        here, self._here = self._here, -1
        return here

    def close(self) -> None:
        here = self.leave()
        pool.close(self.key)
        if here >= 0:
            os.close(here)


def _hex(path: str) -> str:
    return os.fsencode(path).hex()


def _pairs(numbers: list[int]) -> list[Run]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


@contextmanager
def looked_up(path: str, network: Network) -> Iterator[None]:
    """Inside, there was an answer for this name: see ``reached`` of files.py."""
    file = NetworkFile(path, network)
    pool.open(file.key)
    try:
        with suppress(RefusedError, CannotAskError):
            file.ask(lambda reader: reader.ask(file.wait, "look", _hex(file.path)))
        yield
    finally:
        file.close()


def name_of(path: str, network: Network) -> str:
    """See ``real_path`` of files.py."""
    file = NetworkFile(path, network)
    wait = file.wait._replace(seconds=min(NAME_S, file.wait.seconds or NAME_S))
    with suppress(StalledError, RefusedError, CannotAskError):
        return file.ask(lambda reader: reader.name(wait, "real", _hex(file.path)), wait)
    return os.path.abspath(path)
