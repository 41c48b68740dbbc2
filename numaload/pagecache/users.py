"""Which processes map a file, and so keep its pages: as far as this user may look."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from numaload.numa.placement import parse_smaps
from numaload.storage.files import Identity, SourceFile, real_path

# Of a line of /proc/PID/maps: address, rights, offset, device, inode, and the rest is the name.
LINE = re.compile(r"([0-9a-f]+)-[0-9a-f]+ \S+ \S+ ([0-9a-f]+):([0-9a-f]+) (\d+) *(.*)")
UNSEEN = "unseen"


@dataclass(frozen=True)
class User:
    """``resident``: bytes of the file that this process has mapped.

    locked: of them, by mlock; of a page that several map the kernel counts a share to each.
    """

    pid: int
    command: str
    resident: int
    locked: int


def users_of(file: SourceFile) -> tuple[list[User], int]:
    """Those that map it, and how many processes, at least, could not be looked at."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdecimal())
    name = real_path(file.path)
    seen = [_look(pid, file.opened, name) for pid in pids]
    hidden = not os.path.exists("/proc/1")  # mounted with hidepid=2: all of other users
    return [user for user in seen if isinstance(user, User)], seen.count(UNSEEN) + hidden


def _look(pid: int, file: Identity, name: str) -> User | str | None:
    try:
        areas = set(_areas(pid, file, name))
        return _user(pid, areas) if areas else None
    except PermissionError:
        return UNSEEN
    except OSError:
        return None  # it ended


def _areas(pid: int, file: Identity, name: str) -> Iterator[int]:
    """First addresses. Some file systems show another device here than stat: there, by name."""
    device = (os.major(file.device), os.minor(file.device))
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            words = LINE.match(line)
            if words is None or int(words[4]) != file.inode:
                continue
            if (int(words[2], 16), int(words[3], 16)) == device or words[5] == name:
                yield int(words[1], 16)


def _user(pid: int, areas: set[int]) -> User:
    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as text:
        command = text.read().strip()
    counts = []
    for row in ("Rss:", "Locked:"):
        with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
            counts.append(sum(n for start, n in parse_smaps(lines, (row,)) if start in areas))
    return User(pid, command, *counts)
