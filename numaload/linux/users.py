"""Find the processes that use files: that have them open, or mapped.

Of processes of other users the kernel tells root alone, of those in another process namespace
nobody outside it. Source: proc_pid_maps(5), proc_pid_fd(5).
"""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator
from contextlib import suppress
from typing import NamedTuple

from numaload.errors import check_limits

FileId = tuple[int, int]  # (st_dev, st_ino)
# A line of /proc/PID/maps: address, rights, offset, device, inode, and the rest is the name.
LINE = re.compile(r"([0-9a-f]+)-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")


class Area(NamedTuple):
    """A mapping of a file in a process."""

    file: FileId
    address: int
    name: str


class User(NamedTuple):
    """A process that uses files. command: its name."""

    pid: int
    command: str

    def __str__(self) -> str:
        return f"{self.command} ({self.pid})"


def pids() -> list[int]:
    return sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())


def areas(pid: int) -> Iterator[Area]:
    """Yield the mappings of files in a process. Raises: OSError."""
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            words = LINE.match(line)
            if words is not None and words[4] != "0":
                device = os.makedev(int(words[2], 16), int(words[3], 16))
                yield Area((device, int(words[4])), int(words[1], 16), words[5])


def command(pid: int) -> str:
    """Return the name of a process; "" where it ended."""
    with suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as text:
        return text.read().strip()
    return ""


def users_of(files: Container[FileId]) -> dict[FileId, list[User]]:
    """Return who uses these files, this process as well, as far as the kernel tells.

    Raises: ReadError where this process may open no more files.
    """
    found: dict[FileId, list[User]] = {}
    for pid in pids():
        for file in _seen(pid, files):
            found.setdefault(file, []).append(User(pid, command(pid)))
    return found


def _seen(pid: int, files: Container[FileId]) -> set[FileId]:
    try:
        return set(_used(pid, files))
    except OSError as error:  # it ended, or is another user's
        check_limits(error, f"/proc/{pid}")
        return set()


def _used(pid: int, files: Container[FileId]) -> Iterator[FileId]:
    for name in os.listdir(f"/proc/{pid}/fd"):
        with suppress(OSError):  # it was closed
            status = os.stat(f"/proc/{pid}/fd/{name}")
            if (status.st_dev, status.st_ino) in files:
                yield status.st_dev, status.st_ino
    yield from (area.file for area in areas(pid) if area.file in files)
