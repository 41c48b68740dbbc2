"""Which mount a path is on. Source: /proc/self/mountinfo, proc(5)."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

OCTAL = re.compile(r"\\([0-7]{3})")  # how blanks in names are written


class Mount(NamedTuple):
    device: str  # "major:minor"
    point: str
    kind: str  # of file system
    options: str


def mount_of(path: str, root: str = "/") -> Mount | None:
    """The mount that ``path`` is on; of several of one file system that which is nearest.

    The subvolumes of some file systems (btrfs) have devices that are listed nowhere: then it is the
    mount nearest above the path. None where nothing is known.
    """
    device, real = os.stat(path).st_dev, os.path.realpath(path)
    wanted, found = f"{os.major(device)}:{os.minor(device)}", _mounts(root)
    listed = [mount for mount in found if mount.device == wanted]
    above = [mount for mount in listed or found if below(real, mount.point)]
    return max(above or listed, key=lambda mount: len(mount.point), default=None)


def below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _mounts(root: str) -> list[Mount]:
    try:
        with open(f"{root}/proc/self/mountinfo", encoding="utf-8", errors="replace") as file:
            rows = [line.split() for line in file]
    except OSError:
        return []
    # "36 35 98:0 /root /mount/point options [optional...] - type source options"
    found = []
    for row in rows:
        point = OCTAL.sub(lambda match: chr(int(match[1], 8)), row[4])
        kind, _, options = row[row.index("-", 6) + 1 :][:3]
        found.append(Mount(row[2], point, kind, options))
    return found
