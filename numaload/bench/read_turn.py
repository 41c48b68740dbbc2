"""What a way of reading works on, for one timing, and what it says that it did."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

from numaload.errors import FileChangedError, ReadError, reason
from numaload.numa.syscalls import PAGE
from numaload.numa.topology import topology
from numaload.storage.files import SourceFile

CHUNK = 8 << 20  # bytes a read, where a way does not say otherwise


class Unavailable(Exception):  # noqa: N818 - no error of the user's: this way is left out
    """A way that does not exist here; the text says why, and how to have it."""


class Done(NamedTuple):
    """nbytes: of the file that were read. cpu: seconds, where another process spent them."""

    nbytes: int
    cpu: float | None = None
    plan: Any = None


Run = Callable[[], Done]  # what is timed


class Subject(NamedTuple):
    """The first ``file.size`` bytes of a file. files: of the model that it belongs to, if any."""

    file: SourceFile
    path: str
    whole: bool
    files: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return self.file.size


class Turn(ExitStack):
    """One timing. What it opens, maps and starts goes when it ends, after the clock stopped."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.subject, self.nbytes = subject, subject.nbytes
        self.cpus = topology().cpus

    def open(self, flags: int = 0) -> int:
        """Another descriptor of the same file, whatever its name leads to by now."""
        path = f"/proc/self/fd/{self.subject.file.fd}"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            raise ReadError(reason(error), path=self.subject.path) from error
        self.callback(os.close, fd)
        return fd

    def fill(self, fd: int, view: memoryview, offset: int, nbytes: int) -> int:
        """At least ``nbytes`` into ``view``, which may take more: direct reads are of whole pages.

        Raises: ReadError, FileChangedError.
        """
        done = 0
        while done < nbytes:
            try:
                count = os.preadv(fd, [view[done:]], offset + done)
            except OSError as error:
                at = offset + done
                raise ReadError(reason(error), path=self.subject.path, offset=at) from error
            if count == 0:
                raise FileChangedError(
                    f"ends early: {nbytes - done} bytes are missing",
                    path=self.subject.path,
                    offset=offset + done,
                )
            done += count
        return nbytes


def whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE
