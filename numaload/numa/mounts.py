"""Which mount a path is on. Source: /proc/self/mountinfo, proc_pid_mountinfo(5)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

from numaload.numa.sysfs import Reader

OCTAL = re.compile(r"\\([0-7]{3})")  # how blanks in names are written


class Mount(NamedTuple):
    device: str  # "major:minor"
    point: str
    kind: str  # of file system
    options: str
    source: str = (
        ""  # /dev/sda1, server:/export; what it is means something to the file system only
    )


def mount_of(path: str, proc_root: str = "/proc", device: str | None = None) -> Mount | None:
    """The mount that ``path`` is on; of several of one file system that which is nearest.

    device: "major:minor" of the path, where that is known already.
    The subvolumes of some file systems (btrfs) have devices that are listed nowhere: then it is the
    mount nearest above the path. None where nothing is known. Raises: OSError.
    """
    if device is None:
        number = os.stat(path).st_dev
        device = f"{os.major(number)}:{os.minor(number)}"
    name, found = real(path), list(_mounts(proc_root))
    listed = [mount for mount in found if mount.device == device]
    above = [mount for mount in listed or found if below(name, mount.point)]
    # Of mounts on one point the last is on top.
    return max(reversed(above or listed), key=lambda mount: len(mount.point), default=None)


def real(path: str) -> str:
    """The name without links; as it is given where one of them cannot be read."""
    try:
        return os.path.realpath(path)
    except OSError:  # of reading a link that was there just before
        return os.path.abspath(path)


def below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts(proc_root: str) -> Iterator[Mount]:
    """``36 35 98:0 /root /mount/point options [optional...] - type source options``."""
    for line in (Reader().text(f"{proc_root}/self/mountinfo") or "").split("\n"):
        left, _, right = line.partition(" - ")
        words, rest = left.split(" "), right.split(" ")
        if len(words) >= 6 and len(rest) >= 3:
            yield Mount(words[2], _plain(words[4]), rest[0], rest[2], _plain(rest[1]))


def _plain(name: str) -> str:
    return OCTAL.sub(lambda match: chr(int(match[1], 8)), name)
