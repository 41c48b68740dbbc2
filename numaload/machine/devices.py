"""GPUs, and what files lie on: on which NUMA nodes that is, and how its storage wants to be read.

A node of -1 in /sys means that the firmware does not say, which is common: it is unknown here and
never node 0. Sources: Documentation/ABI/testing/sysfs-bus-pci and sysfs-nvme,
Documentation/ABI/stable/sysfs-block; proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from numaload.errors import ReadError, printable, reason
from numaload.linux.mounts import Mount, mount_of, network_of, real
from numaload.linux.sysfs import SysFiles, number_in

# PCI classes and subclasses of what computes or draws (PCI Code and ID Assignment, 03h and 12h).
PCI_KINDS = {"0x0300": "VGA", "0x0302": "3D", "0x0380": "display", "0x1200": "accelerator"}
PCI_CLASSES = {"0x03": "display", "0x12": "accelerator"}
SILENT = "the firmware does not say"
NVME = re.compile(r"nvme[0-9]+")
# What each is called, in the words of `docs/storage.md`.
KINDS = {
    "nvme": "NVMe",
    "ssd": "SATA or SAS SSD",
    "card": "SD card or eMMC",
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
    (re.compile(r"mmcblk\d"), "card"),
)
# What hypervisors call the SCSI disks that they make up: they say "rotational" of any storage.
MADE_UP = re.compile(r"qemu|vmware|msft|virtual|google|vbox|xen|parallels", re.IGNORECASE)
# And the NVMe disks behind which they have a network: those of AWS, Alibaba, Google and Azure.
MADE_UP_NVME = re.compile(r"elastic block stor|nvme_card-pd|msft nvme accelerator", re.IGNORECASE)
FABRICS = frozenset({"tcp", "rdma", "fc"})  # transports of NVMe that are a network
# What tells a disk or partition from others, also after a restart; first what says most.
IDENTITIES = (
    "partition", "dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial",
    "device/cid", "dm/name", "loop/backing_file", "device/model",
)  # fmt: skip
# Mount options that reading depends on, of NFS, SMB, 9p, FUSE, btrfs and XFS.
READ_OPTIONS = frozenset((
    "vers", "proto", "rsize", "nconnect", "cache", "msize", "max_read", "rasize", "compress",
    "compress-force", "dax",
))  # fmt: skip
LAYERS = re.compile(r"(?:^|,)(?:upperdir|lowerdir)=([^,]*)")


@dataclass(frozen=True)
class Gpu:
    """A PCI device that draws or computes. ``node`` is None where the firmware does not say."""

    address: str  # 0000:3b:00.0
    kind: str
    id: str  # vendor:device, hexadecimal
    driver: str  # empty: none is bound to it
    node: int | None
    cpus: frozenset[int]  # near it; all of them where the node is unknown
    memory_node: int | None = None  # where its own memory is a node, as on coherent machines

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cpus": sorted(self.cpus)}


@dataclass(frozen=True)
class FileDevice:
    """What a file lies on. ``nodes``: of its disks, several where it is striped over them."""

    path: str
    file_system: str
    device: str  # nvme0n1p2, dm-0; empty: no block device
    disks: tuple[str, ...]
    nodes: tuple[int, ...]
    why: str  # why no node is known, or empty

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
        fuse = self.kind == "network" and self.file_system.startswith("fuse")
        # Of what a FUSE server answers, nobody knows where it comes from.
        return printable(f"{'FUSE file system' if fuse else KINDS[self.kind]} ({where})")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Storage(NamedTuple):
    """What a measured plan belongs to. ``device``: its disks' serial numbers, or server:/export."""

    device: str
    file_system: str  # with the mount options that reading depends on
    mount: str


def gpus(sys_root: str = "/sys", proc_root: str = "/proc") -> list[Gpu]:
    """Return all GPUs and accelerators on PCI, integrated ones too, sorted by PCI address."""
    files, base = SysFiles(), f"{sys_root}/bus/pci/devices"
    found = []
    for address in files.names(base):
        folder = f"{base}/{address}"
        code = files.text(f"{folder}/class") or ""
        if code[:4] in PCI_CLASSES:
            found.append(_gpu(files, folder, PCI_KINDS.get(code[:6], PCI_CLASSES[code[:4]])))
    status = f"{proc_root}/driver/nvidia/gpus"
    nodes = f"{sys_root}/devices/system/node"
    cards = [
        Gpu(*row, _memory_node(files, f"{status}/{row[0]}/numa_status", nodes)) for row in found
    ]
    files.report()
    return cards


def _gpu(
    files: SysFiles, folder: str, kind: str
) -> tuple[str, str, str, str, int | None, frozenset[int]]:
    ids = [files.text(f"{folder}/{name}") or "unknown" for name in ("vendor", "device")]
    driver = real(f"{folder}/driver")
    return (
        os.path.basename(folder),
        kind,
        ":".join(word.removeprefix("0x") for word in ids),
        os.path.basename(driver) if os.path.isdir(driver) else "",
        _node_in(files, folder),
        frozenset(files.ids(f"{folder}/local_cpulist") or ()),
    )


def _memory_node(files: SysFiles, status: str, nodes: str) -> int | None:
    """Read the NVIDIA driver's ``Node: 250``; it is no node before it was brought online."""
    for line in (files.text(status) or "").splitlines():
        name, _, value = line.partition(":")
        node = number_in(value.strip())
        if name.strip() == "Node" and os.path.isdir(f"{nodes}/node{node}"):
            return node
    return None


def _node_in(files: SysFiles, folder: str) -> int | None:
    node = files.number(f"{folder}/numa_node")
    return node if node is not None and node >= 0 else None


def disk_of(
    path: str,
    sys_root: str = "/sys",
    proc_root: str = "/proc",
    numbers: tuple[int, int] | None = None,
) -> FileDevice:
    """Return the disks under a file or a block device, and the nodes they are attached to.

    Through partitions, device mapper, md and NVMe multipath. numbers: major and minor, to use
    recorded roots. Raises: ReadError where there is no such file; nothing for odd /sys trees.
    """
    major, minor = numbers or _numbers(path)
    mount = mount_of(path, proc_root, f"{major}:{minor}")
    kind = mount.kind if mount else "unknown"
    files, top = SysFiles(), real(sys_root)
    below = (major, minor) if major else _below(mount)
    block = _block(files, *below, sys_root) if below else _Block("", "", "")
    if not (major or block.folder):  # nfs, tmpfs, and btrfs or overlay whose disk is hidden
        return FileDevice(path, kind, "", (), (), f"no block device: {kind}")
    if not block.folder:
        return FileDevice(path, kind, block.name, (), (), f"{block.link} is not there")
    nodes = {node for disk in block.disks for node in _nodes_of(files, disk, top)}
    files.report()
    why = SILENT
    if all(disk.startswith(f"{top}/devices/virtual/") for disk in block.disks):
        why = "a virtual device"
    names = tuple(os.path.basename(disk) for disk in block.disks)
    return FileDevice(path, kind, block.name, names, tuple(sorted(nodes)), "" if nodes else why)


def _nodes_of(files: SysFiles, disk: str, top: str) -> Iterator[int]:
    """Yield the nearest node above the disk, or above each of its NVMe controllers."""
    above = os.path.dirname(disk)
    starts = [disk]
    if os.path.basename(os.path.dirname(above)) == "nvme-subsystem":  # multipath
        names = (name for name in files.names(above) if NVME.fullmatch(name))
        starts = [real(f"{above}/{name}") for name in names]
    for start in starts:
        folder = start
        while folder.startswith(f"{top}/"):
            node = _node_in(files, folder)
            if node is not None:
                yield node
                break
            folder = os.path.dirname(folder)


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
    return _of_disks(kind, major, minor, sys_root)


def storage_of(
    path: str,
    device: Device,
    *,
    sys_root: str = "/sys",
    proc_root: str = "/proc",
    numbers: tuple[int, int],
) -> Storage:
    """Return how to know again what ``device_of`` found, whatever the kernel calls it then."""
    server = network_of(path, proc_root) if device.kind == "network" else None
    mount = server or mount_of(path, proc_root, f"{numbers[0]}:{numbers[1]}")
    options = (mount.options if mount else "").split(",")
    kept = [one for one in options if one.partition("=")[0] in READ_OPTIONS]
    name = device.name
    if device.disks:
        files = SysFiles()
        block = _block(files, *(numbers if numbers[0] else _below(mount) or numbers), sys_root)
        folders = dict.fromkeys((block.folder, *block.disks))
        name = "; ".join(_identity(files, folder) for folder in folders)
    file_system = ",".join((device.file_system, *sorted(kept)))
    return Storage(name, file_system, mount.point if mount else "")


def _identity(files: SysFiles, block: str) -> str:
    texts = (files.text(f"{block}/{one}") for one in IDENTITIES)
    name = next(filter(None, texts), os.path.basename(block))
    return f"{name}, {files.text(f'{block}/size')} sectors"


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


def _of_disks(file_system: str, major: int, minor: int, sys_root: str) -> Device:
    files = SysFiles()
    block = _block(files, major, minor, sys_root)
    if not block.disks:
        return Device("unknown", block.name, file_system)
    kinds = {kind_of(files, disk) for disk in block.disks}
    # Partitions have no queue of their own.
    queues = [f"{folder}/queue" for folder in dict.fromkeys((block.folder, *block.disks))]
    ahead = next(filter(None, (files.number(f"{queue}/read_ahead_kb") for queue in queues)), 0)
    files.report()
    return Device(
        "raid" if len(block.disks) > 1 else kinds.pop(),
        block.name,
        file_system,
        len(block.disks),
        any(files.number(f"{queue}/rotational") == 1 for queue in queues),
        ahead << 10,
    )


def kind_of(files: SysFiles, block: str) -> str:
    """Return the kind, of ``KINDS``, of a whole disk by its folder in /sys."""
    name = os.path.basename(block)
    kind = next((kind for pattern, kind in NAMES if pattern.match(name)), None)
    if kind == "nvme":
        transport = files.text(f"{block}/device/transport")
        made_up = MADE_UP_NVME.search(files.text(f"{block}/device/model") or "")
        return "remote" if transport in FABRICS else "virtual" if made_up else kind
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


def _numbers(path: str) -> tuple[int, int]:
    """Return major and minor of the block device, or of what the file lies on."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else str(error)
        raise ReadError(why, path=path) from error
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    return os.major(device), os.minor(device)


class _Block(NamedTuple):
    """A block device. ``disks``: folders of the whole disks below it; none in a circle."""

    link: str  # /sys/dev/block/8:1
    folder: str  # that it leads to; empty: it is not there
    name: str  # sda1, or else 8:1
    disks: tuple[str, ...] = ()


def _block(files: SysFiles, major: int, minor: int, sys_root: str) -> _Block:
    """Walk down from a block device through partitions, device mapper and md."""
    link = f"{sys_root}/dev/block/{major}:{minor}"
    folder = real(link)
    if not os.path.isdir(folder):
        return _Block(link, "", f"{major}:{minor}")
    found: set[str] = set()
    seen: set[str] = set()
    todo = [folder]
    while todo:
        here = todo.pop()
        if here in seen:
            continue
        seen.add(here)
        slaves = [real(f"{here}/slaves/{n}") for n in files.names(f"{here}/slaves")]
        if os.path.isfile(f"{here}/partition"):
            todo.append(os.path.dirname(here))
        elif slaves:
            todo += slaves
        else:
            found.add(here)
    return _Block(link, folder, os.path.basename(folder), tuple(sorted(found)))
