"""What a file lies on: the kind of its storage, which decides how it is read.

Sources: Documentation/ABI/stable/sysfs-block, Documentation/ABI/testing/sysfs-nvme,
proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from typing import Any

from numaload.errors import ReadError, printable, reason
from numaload.linux.mounts import Mount, mount_of, network_of, real
from numaload.linux.sysfs import Reader
from numaload.machine.devices import disks_under

# What each is called, in the words of `docs/storage.md`.
KINDS = {
    "nvme": "NVMe",
    "ssd": "SATA or SAS SSD",
    "hdd": "hard disk",
    "virtual": "disk of a virtual machine",
    "raid": "several disks (md, device mapper)",
    "remote": "block device of a network",
    "network": "network file system",
    "share": "folder of the machine around this one",
    "memory": "memory",
    "unknown": "unknown",
}
MEMORY = frozenset({"tmpfs", "ramfs", "hugetlbfs", "devtmpfs"})
SHARES = frozenset({"9p", "virtiofs", "vboxsf", "fuse.vmhgfs-fuse"})
# By name of the disk, in this order; "sd" is decided by what the disk says of itself.
NAMES = (
    (re.compile(r"nvme\d+"), "nvme"),
    (re.compile(r"(xv|v)d[a-z]"), "virtual"),
    (re.compile(r"nbd\d|rbd\d|drbd\d"), "remote"),
    (re.compile(r"(z?ram|pmem|dax)\d"), "memory"),
    (re.compile(r"mmcblk\d"), "ssd"),
)
# What hypervisors call the SCSI disks that they make up: they say "rotational" of any storage.
MADE_UP = re.compile(r"qemu|vmware|msft|virtual|google|vbox|xen|parallels", re.IGNORECASE)
FABRICS = frozenset({"tcp", "rdma", "fc"})  # transports of NVMe that are a network
LAYERS = re.compile(r"(?:^|,)(?:upperdir|lowerdir)=([^,]*)")


@dataclass(frozen=True)
class Device:
    """``kind``: of ``KINDS``. ``name``: vda, dm-0, or the server's export; of ``disks`` disks."""

    kind: str
    name: str
    file_system: str
    disks: int = 0
    rotational: bool = False  # of one disk at least; virtual disks say so whatever they are
    read_ahead: int = 0  # bytes that the kernel reads ahead of buffered reads

    def __str__(self) -> str:
        several = f", {self.disks} disks" if self.disks > 1 else ""
        where = f"{self.name or self.file_system}, {self.file_system}{several}"
        return printable(f"{KINDS[self.kind]} ({where})")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def device_of(
    path: str,
    *,
    network: bool = False,
    sys_root: str = "/sys",
    proc_root: str = "/proc",
    numbers: tuple[int, int] | None = None,
) -> Device:
    """Return what a file lies on. Raises: ReadError where there is no such file.

    network: already known to be on a network file system. numbers: major and minor, where they
    are known, as of an opened file.
    """
    server = network_of(path, proc_root) if network else None
    if server is not None:  # which is not asked anything
        return Device("network", server.source, server.kind)
    major, minor = numbers or _numbers(path)
    mount = mount_of(path, proc_root, f"{major}:{minor}")
    kind = mount.kind if mount else "unknown"
    name = mount.source if mount else ""
    if network:
        return Device("network", name, kind)
    for which, kinds in (("memory", MEMORY), ("share", SHARES)):
        if kind in kinds:
            return Device(which, name, kind)
    if major == 0:  # btrfs, overlay: what is below them has a number
        below = _below(mount)
        if below is None:
            return Device("unknown", name, kind)
        major, minor = below
    return _of_disks(kind, (major, minor), sys_root)


def _numbers(path: str) -> tuple[int, int]:
    try:
        number = os.stat(path).st_dev
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ReadError(why, path=path) from error
    return os.major(number), os.minor(number)


def _below(mount: Mount | None) -> tuple[int, int] | None:
    """Return the numbers of the disk under a mount without its own; None where that is hidden."""
    if mount is None:
        return None
    try:
        if mount.source.startswith("/dev/"):
            number = os.stat(mount.source).st_rdev
            return os.major(number), os.minor(number)
        for folders in LAYERS.findall(mount.options):
            number = os.stat(folders.split(":")[0]).st_dev
            if os.major(number):
                return os.major(number), os.minor(number)
    except (OSError, ValueError):  # of the machine outside this container
        return None
    return None


def _of_disks(file_system: str, numbers: tuple[int, int], sys_root: str) -> Device:
    files = Reader()
    start = real(f"{sys_root}/dev/block/{numbers[0]}:{numbers[1]}")
    if not os.path.isdir(start):
        return Device("unknown", f"{numbers[0]}:{numbers[1]}", file_system)
    disks = sorted(disks_under(files, start))
    kinds = {_kind(files, disk) for disk in disks}
    # Partitions have no queue of their own.
    queues = [f"{folder}/queue" for folder in (start, *disks)]
    ahead = next(filter(None, (files.number(f"{queue}/read_ahead_kb") for queue in queues)), 0)
    files.report()
    return Device(
        "raid" if len(disks) > 1 else kinds.pop(),
        os.path.basename(start),
        file_system,
        len(disks),
        any(files.number(f"{queue}/rotational") == 1 for queue in queues),
        ahead << 10,
    )


def _kind(files: Reader, block: str) -> str:
    name = os.path.basename(block)
    kind = next((kind for pattern, kind in NAMES if pattern.match(name)), None)
    if kind == "nvme":
        transport = files.text(f"{block}/device/transport")
        return "remote" if transport in FABRICS else kind
    if kind is not None:
        return kind
    if not name.startswith("sd"):
        return "unknown"
    if "/session" in real(block):  # of iSCSI
        return "remote"
    said = f"{files.text(f'{block}/device/vendor')} {files.text(f'{block}/device/model')}"
    if MADE_UP.search(said):
        return "virtual"
    return "hdd" if files.number(f"{block}/queue/rotational") == 1 else "ssd"
