"""Where GPUs are, and the disks that files lie on: their NUMA nodes, as far as firmware says.

A node of -1 in /sys means that the firmware does not say, which is common: it is unknown here and
never node 0. Sources: Documentation/ABI/testing/sysfs-bus-pci, sysfs-block; proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from numaload.errors import ReadError
from numaload.linux.mounts import mount_of, real
from numaload.linux.sysfs import Reader, number_in

# PCI classes and subclasses of what computes or draws (PCI Code and ID Assignment, 03h and 12h).
KINDS = {"0x0300": "VGA", "0x0302": "3D", "0x0380": "display", "0x1200": "accelerator"}
CLASSES = {"0x03": "display", "0x12": "accelerator"}
SILENT = "the firmware does not say"
NVME = re.compile(r"nvme[0-9]+")


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


def gpus(sys_root: str = "/sys", proc_root: str = "/proc") -> list[Gpu]:
    """Return all GPUs and accelerators on PCI, integrated and baseboard ones too, by address."""
    files, base = Reader(), f"{sys_root}/bus/pci/devices"
    found = []
    for address in files.names(base):
        folder = f"{base}/{address}"
        code = files.text(f"{folder}/class") or ""
        if code[:4] in CLASSES:
            found.append(_gpu(files, folder, KINDS.get(code[:6], CLASSES[code[:4]])))
    status = f"{proc_root}/driver/nvidia/gpus"
    nodes = f"{sys_root}/devices/system/node"
    cards = [
        Gpu(*row, _memory_node(files, f"{status}/{row[0]}/numa_status", nodes)) for row in found
    ]
    files.report()
    return cards


def _gpu(
    files: Reader, folder: str, kind: str
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


def _memory_node(files: Reader, status: str, nodes: str) -> int | None:
    """Read the NVIDIA driver's ``Node: 250``; it is no node before it was brought online."""
    for line in (files.text(status) or "").splitlines():
        name, _, value = line.partition(":")
        node = number_in(value.strip())
        if name.strip() == "Node" and os.path.isdir(f"{nodes}/node{node}"):
            return node
    return None


def _node_in(files: Reader, folder: str) -> int | None:
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
    files = Reader()
    major, minor = numbers or _numbers(path)
    mount = mount_of(path, proc_root, f"{major}:{minor}")
    kind = mount.kind if mount else "unknown"
    if major == 0:  # nfs, btrfs, overlay, tmpfs
        return FileDevice(path, kind, "", (), (), f"no block device: {kind}")
    link = f"{sys_root}/dev/block/{major}:{minor}"
    start, top = real(link), real(sys_root)
    if not os.path.isdir(start):
        return FileDevice(path, kind, f"{major}:{minor}", (), (), f"{link} is not there")
    disks = sorted(disks_under(files, start))
    nodes = {node for disk in disks for node in _nodes_of(files, disk, top)}
    files.report()
    why = SILENT
    if all(disk.startswith(f"{top}/devices/virtual/") for disk in disks):
        why = "a virtual device"
    names = tuple(os.path.basename(disk) for disk in disks)
    return FileDevice(
        path, kind, os.path.basename(start), names, tuple(sorted(nodes)), "" if nodes else why
    )


def _numbers(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise ReadError(getattr(error, "strerror", None) or str(error), path=path) from error
    device = status.st_rdev if stat.S_ISBLK(status.st_mode) else status.st_dev
    return os.major(device), os.minor(device)


def disks_under(files: Reader, start: str) -> set[str]:
    """Return the folders of the whole disks below partitions, device mapper and md."""
    found: set[str] = set()
    seen: set[str] = set()
    todo = [start]
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
    return found


def _nodes_of(files: Reader, disk: str, top: str) -> Iterator[int]:
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
