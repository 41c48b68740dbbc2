"""Which paths lie on file systems whose answers come from elsewhere, and may stay away.

Found without asking that file system anything: looking up a name there could wait for ever. Source:
/proc/self/mountinfo, proc_pid_mountinfo(5), where each line says which mount it is mounted on.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from numaload.errors import printable
from numaload.numa.mounts import OCTAL
from numaload.numa.sysfs import Reader

# Of what a FUSE server answers, nobody knows where it comes from. 9p and virtiofs are not here:
# what answers there is the machine around this one.
KINDS = {
    "afs", "beegfs", "ceph", "cifs", "coda", "curvefs", "davfs", "fhgfs", "fuse", "gfs", "gfs2",
    "glusterfs", "gpfs", "kafs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs",
    "pvfs2", "smb", "smb2", "smb3", "smbfs", "weka", "wekafs",
}  # fmt: skip
# Of containers, and everything in them; of the machine around this one.
LOCAL = {"fuse.fuse-overlayfs", "fuse.vmhgfs-fuse"}
MAX_LINKS = 40  # as the kernel


class Network(NamedTuple):
    """A mounted file system, of a network where not said otherwise.

    ``source``: server:/export, //server/share, the name of a FUSE server.
    """

    kind: str
    source: str
    point: str
    device: str  # "major:minor"

    def __str__(self) -> str:
        source = self.source or "its server"
        return printable(f"{source} ({self.kind}, mounted at {self.point})")


class _Row(NamedTuple):
    id: str
    parent: str
    mount: Network


def is_network(kind: str) -> bool:
    """Whether a file system of this kind gets its answers from elsewhere."""
    return kind in KINDS or (kind.startswith("fuse.") and kind not in LOCAL)


def any_mounted(proc_root: str = "/proc") -> bool:
    return _any(_lines(proc_root))


def _any(lines: list[str]) -> bool:
    return any(is_network(line.partition(" - ")[2].partition(" ")[0]) for line in lines)


def network_of(path: str, proc_root: str = "/proc") -> Network | None:
    """The network file system that ``path`` leads to, or into, or None for one of this machine.

    Links are followed up to there and no further. None as well where nothing is known.
    """
    lines = _lines(proc_root)
    if not _any(lines):
        return None  # nearly everywhere
    try:
        return _Walk(_rows(lines)).follow(os.path.join(os.getcwd(), path))
    except OSError:  # the working directory is gone, and with it what is named from there
        return None


def mount_on(device: int, proc_root: str = "/proc") -> Network | None:
    """What has this st_dev, network or not; None if it is listed nowhere, as parts of btrfs."""
    number = f"{os.major(device)}:{os.minor(device)}"
    rows = _rows(_lines(proc_root))
    return next((row.mount for row in rows if row.mount.device == number), None)


def _lines(proc_root: str) -> list[str]:
    return (Reader().text(f"{proc_root}/self/mountinfo") or "").split("\n")


def _rows(lines: list[str]) -> list[_Row]:
    """``36 35 98:0 /root /mount/point options [optional...] - type source options``."""
    rows = []
    for line in lines:
        left, _, right = line.partition(" - ")
        words, rest = left.split(" "), right.split(" ")
        if len(words) >= 6 and len(rest) >= 2:
            mount = Network(rest[0], _plain(rest[1]), _plain(words[4]), words[2])
            rows.append(_Row(words[0], words[1], mount))
    return rows


def _plain(name: str) -> str:
    return OCTAL.sub(lambda match: chr(int(match[1], 8)), name)


class _Walk:
    """Along a path, one name after another, as the kernel does: a mount may be below another."""

    def __init__(self, rows: list[_Row]) -> None:
        ids = {row.id for row in rows}
        self.on = {(row.parent, row.mount.point): row for row in rows}
        roots = [r for r in rows if r.mount.point == "/" and r.parent not in ids - {r.id}]
        self.root = self._top(roots[0], "/") if roots else None

    def _top(self, row: _Row, point: str) -> _Row:
        """What is seen at ``point``: the last of those that are mounted there on one another."""
        seen = {row.id}
        while (found := self.on.get((row.id, point))) and found.id not in seen:
            row = found
            seen.add(row.id)
        return row

    def follow(self, path: str) -> Network | None:
        if self.root is None:
            return None
        todo = _names(path)
        here = [("", self.root)]  # each folder on the way, and the mount it is on
        links = 0
        while True:
            folder, row = here[-1]
            if is_network(row.mount.kind):
                return row.mount
            if not todo:
                return None
            name = todo.pop()
            if name == "..":
                del here[max(1, len(here) - 1) :]
                continue
            path = f"{folder}/{name}"
            top = self._top(row, path)
            target = _link(path) if top is row else None  # nothing is mounted on links
            if target is None:
                here.append((path, top))
                continue
            links += 1
            if links > MAX_LINKS:
                return None  # opening it will say so
            todo += _names(target)
            if target.startswith("/"):
                del here[1:]


def _names(path: str) -> list[str]:
    """In the order in which they are popped."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _link(path: str) -> str | None:
    """Asked of a folder of this machine. None for what is no link, or not there."""
    try:
        return os.readlink(path)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None
