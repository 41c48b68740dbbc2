"""The ways to read a range of a file: into the page cache, or into memory of this process.

All of them give every byte or raise: ReadError, FileChangedError.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from errno import EINVAL, EOPNOTSUPP

from numaload.errors import NotCopyable, ReadError, reason, warn_once
from numaload.files.plan import DIRECT, MAPPED
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.linux.syscalls import HUGE, PAGE

STEP = 1 << 20  # bytes that a throw-away buffer takes: they stay in a core's cache
TOUCHES = 512  # bytes of a mapping that are taken in one call: a pipe holds 65536
NOT_DIRECT = (EINVAL, EOPNOTSUPP)


class IntoCache(NotCopyable):
    """Brings ranges into the page cache, for one thread.

    exact: no more than these; otherwise the kernel reads up to 16 MiB beyond them.
    """

    __slots__ = ("_pipe",)  # not in __dict__: who copies that does not own it
    _pipe: tuple[int, int] | None

    def __init__(self, *, exact: bool = False) -> None:
        self._advice = [mmap.MADV_HUGEPAGE, *([mmap.MADV_RANDOM] if exact else [])]
        self._buffer = memoryview(b"")
        self._pipe = None

    def read(self, file: SourceFile, start: int, stop: int, way: str) -> None:
        if way == MAPPED and not file.is_network:
            self._touch(file, start, stop)
            left = residency(file, start, stop).absent
        else:
            left = ((start, stop),)
        for first, last in left:
            self._read(file, first, last)

    def _touch(self, file: SourceFile, start: int, stop: int) -> None:
        """Touch a byte of every 2 MiB of a mapping that wants huge pages.

        The kernel reads 4 MiB for each, into huge folios where the file system can, without
        copying, and whatever the device's read-ahead is set to. The byte goes into a pipe: where
        it cannot be read that call fails, while touching it would kill this process.
        """
        first = start // PAGE * PAGE
        reader, writer = self._ends(file)
        try:
            area = mmap.mmap(file.fd, stop - first, mmap.MAP_SHARED, mmap.PROT_READ, offset=first)
        except (OSError, ValueError):  # cut short, or cannot be mapped: reading it tells
            return
        with area, memoryview(area) as view, suppress(OSError):
            for advice in self._advice:
                area.madvise(advice)
            # In one call: a thread that comes back to Python waits for others.
            for begin in range(0, len(view), HUGE * TOUCHES):
                its = [view[at : at + 1] for at in range(begin, len(view), HUGE)[:TOUCHES]]
                try:
                    os.read(reader, os.writev(writer, its))
                finally:
                    for byte in its:
                        byte.release()

    def _ends(self, file: SourceFile) -> tuple[int, int]:
        """Return the pipe's ends. Raises: ReadError where no more may be opened."""
        if self._pipe is None:
            try:
                self._pipe = os.pipe2(os.O_CLOEXEC)
            except OSError as error:
                raise ReadError(reason(error), path=file.path) from error
        return self._pipe

    def _read(self, file: SourceFile, start: int, stop: int) -> None:
        self._buffer = self._buffer or memoryview(bytearray(STEP))
        for at in range(start, stop, STEP):
            file.read_into(self._buffer[: min(STEP, stop - at)], at)

    def close(self) -> None:
        pipe, self._pipe = getattr(self, "_pipe", None), None
        for fd in pipe or ():
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class IntoMemory(NotCopyable):
    """Reads ranges of one file into memory that begins on a page, as every mapping does.

    Threads may share it. quiet: where direct reads cannot be had, that is nothing to be said.
    """

    __slots__ = ("_fd",)
    _fd: int

    def __init__(self, file: SourceFile, *, direct: bool, quiet: bool = False) -> None:
        self.file, self._fd, self._direct, self._quiet = file, -1, False, quiet
        self.is_refused = False  # by the file system, which has no direct reads
        if direct and file.size >= PAGE and not file.is_network:
            self._open()

    @property
    def is_direct(self) -> bool:
        """Return whether whole pages are read past the page cache: some file systems refuse."""
        return self._direct

    def _open(self) -> None:
        """Open a second descriptor: O_DIRECT belongs to one, and others use the file's own."""
        try:
            flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
            self._fd = os.open(f"/proc/self/fd/{self.file.fd}", flags)
            self._direct = True
        except OSError as error:
            self._refuse(error)

    def _refuse(self, error: OSError) -> None:
        self._direct = False  # the descriptor stays: other threads may be reading from it
        self.is_refused = error.errno in NOT_DIRECT
        if self._quiet:
            return
        warn_once(
            "direct",
            f"{self.file.path}: no direct reads here ({error.strerror}): it is read through the"
            " page cache, which costs a copy",
        )

    def read(self, view: memoryview, offset: int, way: str) -> None:
        """Fill ``view`` from ``offset``. Past the page cache only whole pages are read."""
        done = 0
        if way == DIRECT and self._direct and offset % PAGE == 0:
            # Released at once: in the traceback of an error they would keep all of the memory.
            with view[: len(view) // PAGE * PAGE] as pages:
                done = self._read_direct(pages, offset)
        if done < len(view):
            with view[done:] as rest:
                self.file.read_into(rest, offset + done)

    def _read_direct(self, view: memoryview, offset: int) -> int:
        """Return the bytes that were read. The rest is read the other way, which names errors."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done:]], offset + done)
            except OSError as error:
                if error.errno in NOT_DIRECT:
                    self._refuse(error)
                return done
            done += count // PAGE * PAGE
            if count == 0 or count % PAGE:
                return done
        return done

    def close(self) -> None:
        fd, self._fd, self._direct = getattr(self, "_fd", -1), -1, False
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()
