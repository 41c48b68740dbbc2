"""The process that asks network file systems: a script on the standard library alone.

Whoever asks one may have to wait for ever. This process can be killed then, the one that started it
goes on. It reads questions from its standard input and answers each with lines of numbers, of which
the first is 0, or an errno. Paths are written in hex; the memory is a memfd, whose descriptor is
the argument.

    open PATH              0 FD and STATUS; FD is -1 for no regular file, which is not opened
    stat FD                0 FD and STATUS
    look PATH              0, as soon as there is an answer for this name
    real PATH              0 and the path without links, in hex
    read FD OFFSET NBYTES  into the memory: 0 COUNT for every MiB, the last 0 where the file ends
    drop FD OFFSET NBYTES  0: gives page cache back
    resident FD START STOP FOLDER  0 KNOWN and START STOP of each absent range; FOLDER has numaload
    placed FD START SIZE FOLDER FIRST LAST...  0 and NODE BYTES of each node, but of these ranges
    close FD               no answer

STATUS is st_mode, st_dev, st_ino, st_size, st_mtime_ns, st_ctime_ns, st_uid.

It ends with its standard input, also in the middle of a read: with the process that has the other
end, however that ended. And after a minute without a question.
"""

from __future__ import annotations

import _thread
import mmap
import os
import select
import signal
import stat
import sys
from collections.abc import Callable
from typing import Any

NAME = "numaload-net"  # of the process: at most 15 characters
MEMORY = 8 << 20  # bytes read at a time
PIECE = 1 << 20  # bytes after which it is said that they are there
IDLE_MS = 60_000

area = memoryview(b"")  # that is read into


def say(*numbers: object) -> None:
    os.write(1, " ".join(map(str, numbers)).encode() + b"\n")


def told(path: str) -> bytes:
    return bytes.fromhex(path)


def open_(path: str) -> None:
    name = told(path)
    found = os.stat(name)
    if not stat.S_ISREG(found.st_mode):  # some devices do something when they are opened
        say(0, -1, *status(found))
        return
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        fd = os.open(name, flags | os.O_NONBLOCK)
    except BlockingIOError:  # somebody has a lease on it
        fd = os.open(name, flags)
    os.set_blocking(fd, True)
    say(0, fd, *status(os.fstat(fd)))


def status(of: os.stat_result) -> tuple[int, ...]:
    return (
        of.st_mode, of.st_dev, of.st_ino, of.st_size, of.st_mtime_ns, of.st_ctime_ns, of.st_uid
    )  # fmt: skip


def stat_(fd: str) -> None:
    say(0, fd, *status(os.fstat(int(fd))))


def look(path: str) -> None:
    os.stat(told(path))
    say(0)


def real(path: str) -> None:
    say(0, os.path.realpath(told(path)).hex())


def read(fd: str, offset: str, nbytes: str) -> None:
    done, all_ = 0, int(nbytes)
    while done < all_:
        piece = area[done : min(done + PIECE, all_)]
        count = os.preadv(int(fd), [piece], int(offset) + done)
        say(0, count)
        if not count:
            return
        done += count


def drop(fd: str, offset: str, nbytes: str) -> None:
    os.posix_fadvise(int(fd), int(offset), int(nbytes), os.POSIX_FADV_DONTNEED)
    say(0)


def close(fd: str) -> None:
    os.close(int(fd))


class File:
    """What numaload's own functions ask of a file."""

    is_network, far = False, None

    def __init__(self, fd: str, size: int) -> None:
        self.fd, self.size = int(fd), size


def numaload(folder: str) -> Any:
    """Its module that knows page cache. Imported when asked for: the rest needs nothing of it."""
    path = os.fsdecode(told(folder))
    if path not in sys.path:
        sys.path.append(path)
    from numaload.storage import residency

    return residency


def resident(fd: str, start: str, stop: str, folder: str) -> None:
    size = os.fstat(int(fd)).st_size
    found = numaload(folder).residency(File(fd, size), int(start), int(stop))
    say(0, int(found.known), *(edge for run in found.absent for edge in run))


def placed(fd: str, start: str, size: str, folder: str, *edges: str) -> None:
    module, numbers = numaload(folder), list(map(int, edges))
    absent = tuple(zip(numbers[::2], numbers[1::2], strict=True))
    found = module.Residency(int(size), absent, True, int(start))
    on = module.cached_on(File(fd, os.fstat(int(fd)).st_size), found)
    say(0, *(number for row in on.items() for number in row))


ANSWERS: dict[str, Callable[..., None]] = {
    "open": open_, "stat": stat_, "look": look, "real": real, "read": read, "drop": drop,
    "close": close, "resident": resident, "placed": placed,
}  # fmt: skip


def answer(line: str) -> None:
    what, *rest = line.split(" ")
    try:
        ANSWERS[what](*rest)
    except OSError as error:
        say(error.errno or 5)


def watch() -> None:
    """The main thread may be inside a read that nothing else ends."""
    ends = select.poll()
    ends.register(0, 0)
    ends.poll()
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    global area  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    memory = int(sys.argv[1])
    area = memoryview(mmap.mmap(memory, MEMORY))
    os.close(memory)
    _thread.start_new_thread(watch, ())
    say(0, os.getpid())
    asked = select.poll()
    asked.register(0, select.POLLIN)
    left = b""
    while asked.poll(IDLE_MS) and (some := os.read(0, 1 << 16)):
        *lines, left = (left + some).split(b"\n")
        for line in lines:
            answer(line.decode())
    os._exit(0)


if __name__ == "__main__":
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(NAME)
    except OSError:  # no matter
        pass
    main()
