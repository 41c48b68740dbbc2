"""Ways of reading that are threads of this process: each takes the next chunk, in file order."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EINVAL, EOPNOTSUPP
from functools import partial

from numaload.bench.memory import prefaulted
from numaload.bench.read_turn import CHUNK, Done, Run, Turn, Unavailable, whole_pages
from numaload.errors import ReadError
from numaload.numa import syscalls
from numaload.numa.mapping import Mapping, map_file, map_private
from numaload.numa.memory import require
from numaload.numa.syscalls import HUGE, PAGE
from numaload.numa.workers import Workers, finish

STEP = 2 << 20  # bytes that one readahead(2) asks for
Read = Callable[[int, int], int]  # (offset, bytes of the file): bytes that were read


def direct(turn: Turn, count: int, *, huge: bool) -> Run:
    """Into buffers that are there already."""
    fd, make = direct_descriptor(turn), _huge_pages if huge else _small_pages
    return _reading(turn, [_into(turn, fd, make(CHUNK)) for _ in range(count)])


def buffered(turn: Turn, count: int, *, chunk: int = CHUNK, each: bool) -> Run:
    """each: a descriptor for each thread, with a read-ahead of its own."""
    fds = [turn.open() for _ in range(count)] if each else [turn.open()] * count
    return _reading(turn, [_into(turn, fd, _huge_pages(chunk)) for fd in fds], chunk)


def into_memory(turn: Turn, count: int, *, past_cache: bool) -> Run:
    """Into memory that nobody has touched: a thread makes its chunk's pages, then fills them."""
    fd = direct_descriptor(turn) if past_cache else turn.open()
    require(turn.nbytes, "memory to read the file into", "measure with a smaller file")
    memory = map_private(whole_pages(turn.nbytes))
    turn.callback(memory.close)
    view = memory.view(write=True)

    def read(offset: int, nbytes: int) -> int:
        length = whole_pages(nbytes)
        syscalls.madvise(memory.address + offset, length, syscalls.MADV_POPULATE_WRITE)
        return turn.fill(fd, view[offset : offset + length], offset, nbytes)

    return _reading(turn, [read] * count)


def populate(turn: Turn, count: int) -> Run:
    """Alone in one call, as everybody does it; several threads take chunks."""
    mapped = _mapped(turn)

    def read(offset: int, nbytes: int) -> int:
        address, length = mapped.address + offset, whole_pages(nbytes)
        failed = syscalls.madvise(address, length, syscalls.MADV_POPULATE_READ)
        if failed == EINVAL:
            raise Unavailable("MADV_POPULATE_READ needs Linux 5.14")
        if failed:
            raise ReadError(os.strerror(failed), path=turn.subject.path, offset=offset)
        return nbytes

    return _reading(turn, [read] * count, turn.nbytes if count == 1 else CHUNK)


def touch_huge(turn: Turn, count: int) -> Run:
    mapped = _mapped(turn)
    if syscalls.madvise(mapped.address, mapped.length, syscalls.MADV_HUGEPAGE):
        raise Unavailable("the kernel has no huge pages for files")
    return _reading(turn, [_touching(turn, mapped.view()) for _ in range(count)])


def read_ahead(turn: Turn, _: int) -> Run:
    """Since Linux 4.20 posix_fadvise(WILLNEED) and readahead(2) are one function."""
    fd, steps = turn.open(), range(0, turn.nbytes, STEP)

    def run() -> Done:
        for offset in steps:
            os.posix_fadvise(fd, offset, STEP, os.POSIX_FADV_WILLNEED)
        last = memoryview(bytearray(1))
        for offset in steps:  # the calls only begin to read
            turn.fill(fd, last, min(offset + STEP, turn.nbytes) - 1, 1)
        return Done(turn.nbytes)

    return run


def will_need(turn: Turn, _: int) -> Run:
    fd = turn.open()

    def run() -> Done:
        os.posix_fadvise(fd, 0, turn.nbytes, os.POSIX_FADV_WILLNEED)
        return Done(turn.nbytes)

    return run


def direct_descriptor(turn: Turn) -> int:
    """Raises: Unavailable where the file system has no direct reads."""
    try:
        fd = turn.open(os.O_DIRECT)
        turn.fill(fd, _small_pages(PAGE), 0, 1)
    except ReadError as error:
        if getattr(error.__cause__, "errno", None) in (EINVAL, EOPNOTSUPP):
            raise Unavailable("no direct reads (O_DIRECT) on this file system") from error
        raise
    return fd


def _reading(turn: Turn, readers: Sequence[Read], chunk: int = CHUNK) -> Run:
    def run() -> Done:
        offsets, stop = iter(range(0, turn.nbytes, chunk)), threading.Event()

        def take(read: Read) -> int:
            done = 0
            for offset in offsets:
                if stop.is_set():
                    break
                done += read(offset, min(chunk, turn.nbytes - offset))
            return done

        workers = Workers(turn.cpus, len(readers), "numaload-bench")
        turn.callback(workers.close)
        return Done(sum(finish([workers.submit(take, read) for read in readers], stop)))

    return run


def _into(turn: Turn, fd: int, buffer: memoryview) -> Read:
    def read(offset: int, nbytes: int) -> int:
        return turn.fill(fd, buffer[: whole_pages(nbytes)], offset, nbytes)

    return read


def _touching(turn: Turn, view: memoryview) -> Read:
    """Bytes go into a pipe: what cannot be read is an error there, and would kill us elsewhere."""
    pipe = os.pipe2(os.O_CLOEXEC)
    for fd in pipe:
        turn.callback(partial(os.close, fd))

    def read(offset: int, nbytes: int) -> int:
        for at in range(offset, offset + nbytes, HUGE):
            try:
                os.write(pipe[1], view[at : at + 1])
            except OSError as error:
                raise ReadError(
                    "cannot be read there", path=turn.subject.path, offset=at
                ) from error
            os.read(pipe[0], 1)
        return nbytes

    return read


def _mapped(turn: Turn) -> Mapping:
    mapped = map_file(turn.subject.file.fd, turn.nbytes)
    turn.callback(mapped.close)
    return mapped


def _huge_pages(nbytes: int) -> memoryview:
    return prefaulted(nbytes).data


def _small_pages(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, nbytes, PAGE):
        memory[offset] = 1
    return memoryview(memory)
