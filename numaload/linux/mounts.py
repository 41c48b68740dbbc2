"""Find the mount that a path is on, and whether its answers come from a network.

The table is /proc/self/mountinfo, proc_pid_mountinfo(5). A network is found in it without asking
that network anything: looking up a name there could wait for ever.
"""

from __future__ import annotations

import os
import re
import time
from functools import cached_property
from typing import NamedTuple

from numaload.errors import printable
from numaload.linux.sysfs import SysFiles

OCTAL = re.compile(r"\\([0-7]{3})")  # how blanks in names are written
# Of what a FUSE server answers, nobody knows where it comes from. 9p and virtiofs are not here:
# what answers there is the machine around this one.
NETWORKS = {
    "afs", "beegfs", "ceph", "cifs", "coda", "curvefs", "davfs", "fhgfs", "fuse", "gfs", "gfs2",
    "glusterfs", "gpfs", "kafs", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs",
    "pvfs2", "smb", "smb2", "smb3", "smbfs", "weka", "wekafs",
}  # fmt: skip
# Of containers, and everything in them; of the machine around this one.
LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.vmhgfs-fuse"}
# They show folders of this machine otherwise. Those may be on a network, so they count as one.
OVER_FOLDERS = {
    "fuse.bindfs", "fuse.cryfs", "fuse.encfs", "fuse.gocryptfs", "fuse.mergerfs", "fuse.unionfs",
}  # fmt: skip
MAX_LINKS = 40  # as the kernel
FRESH_S = 0.02  # a table read so recently is used again: one opening asks several times


class Mount(NamedTuple):
    """A row of the mount table. ``source``: /dev/sda1, server:/export, the name of a FUSE server.

    ``id`` and ``parent`` say which mount it is mounted on. ``options`` are those of the whole file
    system, ``flags`` of this mount alone; ``root`` is the folder of the file system that is shown.
    """

    device: str  # "major:minor"
    point: str
    kind: str  # of file system
    options: str = ""
    source: str = ""
    id: str = ""
    parent: str = ""
    root: str = "/"
    flags: str = ""  # ro,nosuid

    def __str__(self) -> str:
        source = self.source or "its server"
        return printable(f"{source} ({self.kind}, mounted at {self.point})")


def is_network(kind: str) -> bool:
    """Return whether a file system of this kind gets its answers from elsewhere."""
    return kind in NETWORKS or (kind.startswith("fuse.") and kind not in LOCAL_FUSE)


def has_networks(proc_root: str = "/proc") -> bool:
    """Return whether any network file system is mounted."""
    return _table(proc_root).has_networks


def network_of(path: str, proc_root: str = "/proc") -> Mount | None:
    """Return the network file system that ``path`` leads to, or into; None on this machine.

    Links are followed up to there and no further. None as well where nothing is known.
    """
    table = _table(proc_root)
    if not table.has_networks:
        return None  # nearly everywhere
    try:
        return table.walk.first_network(os.path.join(os.getcwd(), path))
    except OSError:  # the working directory is gone, and with it what is named from there
        return None


def mount_with(device: int, proc_root: str = "/proc") -> Mount | None:
    """Return the mount with this st_dev; None if it is listed nowhere, as parts of btrfs."""
    number = _major_minor(device)
    return next((mount for mount in _table(proc_root).mounts if mount.device == number), None)


def mount_of(path: str, proc_root: str = "/proc", device: str | None = None) -> Mount | None:
    """Return the mount that ``path`` is on; of several of one file system the nearest.

    device: "major:minor" of the path, where that is known already.
    The subvolumes of some file systems (btrfs) have devices that are listed nowhere: then it is the
    mount nearest above the path. None where nothing is known. Raises: OSError.
    """
    if device is None:
        device = _major_minor(os.stat(path).st_dev)
    name, found = real(path), _table(proc_root).mounts
    listed = [mount for mount in found if mount.device == device]
    above = [mount for mount in listed or found if below(name, mount.point)]
    # Of mounts on one point the last is on top.
    return max(reversed(above or listed), key=lambda mount: len(mount.point), default=None)


def real(path: str) -> str:
    """Return the name without links; as it is given where one of them cannot be read."""
    try:
        return os.path.realpath(path)
    except OSError:  # of reading a link that was there just before
        return os.path.abspath(path)


def below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _major_minor(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


class _Table:
    """All mounts, in the kernel's order, parsed from ``text``."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.mounts = [mount for line in text.split("\n") if (mount := _parse(line))]
        self.has_networks = any(is_network(mount.kind) for mount in self.mounts)

    @cached_property
    def walk(self) -> _Walk:
        return _Walk(self.mounts)


def _parse(line: str) -> Mount | None:
    """Parse ``36 35 98:0 /root /mount/point options [optional...] - type source options``."""
    left, _, right = line.partition(" - ")
    words, rest = left.split(" "), right.split(" ")
    if len(words) < 6 or len(rest) < 2:
        return None
    options = rest[2] if len(rest) > 2 else ""
    root, point, source = map(unescaped, (words[3], words[4], rest[1]))
    return Mount(words[2], point, rest[0], options, source, words[0], words[1], root, words[5])


def unescaped(name: str) -> str:
    """Return a name of the kernel's tables as it is."""
    return OCTAL.sub(lambda match: chr(int(match[1], 8)), name)


_last: tuple[float, _Table] = (-FRESH_S, _Table(""))  # of /proc: when it was read


def _table(proc_root: str) -> _Table:
    global _last  # noqa: PLW0603 - one table a process; threads replace it whole
    read_at, table = _last
    now = time.monotonic()
    if proc_root == "/proc" and now - read_at < FRESH_S:
        return table
    text = SysFiles().text(f"{proc_root}/self/mountinfo") or ""
    if text != table.text:
        table = _Table(text)
    if proc_root == "/proc":
        _last = now, table
    return table


class _Walk:
    """Goes along a path name by name, as the kernel does: a mount may be below another."""

    def __init__(self, mounts: list[Mount]) -> None:
        ids = {mount.id for mount in mounts}
        roots = [m for m in mounts if m.point == "/" and m.parent not in ids - {m.id}]
        self.children = {(mount.parent, mount.point): mount for mount in mounts}
        self.root = self._top(roots[0], "/") if roots else None

    def _top(self, mount: Mount, point: str) -> Mount:
        """Return what is seen at ``point``: the last of those mounted there on one another."""
        seen = {mount.id}
        while (found := self.children.get((mount.id, point))) and found.id not in seen:
            mount = found
            seen.add(mount.id)
        return mount

    def first_network(self, path: str) -> Mount | None:
        if self.root is None:
            return None
        todo = _names(path)
        here = [("", self.root)]  # each folder on the way, and the mount it is on
        links = 0
        while True:
            folder, mount = here[-1]
            if is_network(mount.kind):
                return mount
            if not todo:
                return None
            name = todo.pop()
            if name == "..":
                del here[max(1, len(here) - 1) :]
                continue
            path = f"{folder}/{name}"
            top = self._top(mount, path)
            target = _link(path) if top is mount else None  # nothing is mounted on links
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
    """Return the names of a path in the order in which they are popped."""
    return [name for name in reversed(path.split("/")) if name not in ("", ".")]


def _link(path: str) -> str | None:
    """Read a link in a folder of this machine. None for what is no link, or not there."""
    try:
        return os.readlink(path)
    except (OSError, ValueError):  # ValueError: a NUL in it
        return None
