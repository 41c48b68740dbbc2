"""Disks of a guest that can be made to fail: device-mapper by its ioctls, and where files lie.

Structures and numbers: linux/dm-ioctl.h, linux/fiemap.h. Everything here needs root.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from commands import evict
from witness import PAGE

SECTOR = 512
CONTROL = "/dev/mapper/control"
VERSION = (4, 0, 0)
HEADER = struct.Struct("3IIIIiIII Q128s129s7x")  # struct dm_ioctl
TARGET = struct.Struct("QQiI16s")  # struct dm_target_spec; its arguments follow
CREATE, REMOVE, SUSPEND, LOAD = 3, 4, 6, 9
SUSPENDED = 1 << 1  # rather than resumed
SKIP_LOCKFS = 1 << 10  # a file system on a broken disk cannot be frozen first

FIEMAP, FIEMAP_EXTENT = struct.Struct("QQ4I"), struct.Struct("5Q4I")
FS_IOC_FIEMAP = 0xC020660B
BLKFLSBUF = 0x1261
# Ordinary users, who may start a guest and are root in it, do not have it in their PATH.
MKFS = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Segment(NamedTuple):
    """Sectors of a mapped disk, and the target that serves them."""

    start: int
    length: int
    target: str
    arguments: str = ""


def disk_of(serial: str) -> str | None:
    """The file in /dev of a disk, by its serial number."""
    for block in Path("/sys/block").iterdir():
        for path in (block / "serial", block / "device/serial"):
            if path.exists() and path.read_text().strip() == serial:
                return f"/dev/{block.name}"
    return None


class MappedDisk:
    """A device-mapper disk over a whole disk: as that is, failing in places, or slow."""

    def __init__(self, name: str, disk: str) -> None:
        self.name, self.disk = name, disk
        with open(disk, "rb") as file:
            self.sectors = file.seek(0, os.SEEK_END) // SECTOR
        device = self._call(CREATE)
        self.path = f"/dev/dm-{(device & 0xFF) | (device >> 12 & 0xFFF00)}"
        self.work()

    def work(self) -> None:
        self.load([self._linear(0, self.sectors)])

    def fail(self, start: int = 0, nbytes: int | None = None) -> None:
        """Reads and writes of these bytes give EIO; ``start`` and ``nbytes`` in whole sectors."""
        first = start // SECTOR
        last = self.sectors if nbytes is None else first + nbytes // SECTOR
        segments = [
            self._linear(0, first),
            Segment(first, last - first, "error"),
            self._linear(last, self.sectors),
        ]
        self.load([segment for segment in segments if segment.length])

    def delay(self, milliseconds: int) -> None:
        """Every request takes this long."""
        self.load([Segment(0, self.sectors, "delay", f"{self.disk} 0 {milliseconds}")])

    def hold(self) -> None:
        """Requests that are under way end, others wait until it shall ``work`` or ``fail``."""
        self._call(SUSPEND, flags=SUSPENDED | SKIP_LOCKFS)

    def load(self, table: Sequence[Segment]) -> None:
        """Exchange the table, also under a mounted file system."""
        self._call(LOAD, b"".join(map(_packed, table)), len(table))
        self._call(SUSPEND, flags=SKIP_LOCKFS)  # without DM_SUSPEND_FLAG it resumes, with the new

    def forget(self) -> None:
        """Drop what of the disk itself is in RAM, such as a file system's directories."""
        with open(self.path, "rb") as file:
            fcntl.ioctl(file, BLKFLSBUF)

    def sectors_read(self) -> int:
        return int(Path(f"/sys/block/{Path(self.path).name}/stat").read_text().split()[2])

    def remove(self) -> None:
        self._call(REMOVE)

    def _linear(self, first: int, last: int) -> Segment:
        return Segment(first, last - first, "linear", f"{self.disk} {first}")

    def _call(self, command: int, data: bytes = b"", targets: int = 0, flags: int = 0) -> int:
        """The device number that the kernel answers with."""
        size = HEADER.size + len(data)
        name = self.name.encode()
        header = HEADER.pack(*VERSION, size, HEADER.size, targets, 0, flags, 0, 0, 0, name, b"")
        buffer = bytearray(header + data)
        fd = os.open(CONTROL, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, 3 << 30 | HEADER.size << 16 | 0xFD << 8 | command, buffer)
        finally:
            os.close(fd)
        return int(HEADER.unpack_from(buffer)[10])


def _packed(segment: Segment) -> bytes:
    arguments = segment.arguments.encode() + b"\0"
    arguments += b"\0" * (-len(arguments) % 8)
    following = TARGET.size + len(arguments)
    head = TARGET.pack(segment.start, segment.length, 0, following, segment.target.encode())
    return head + arguments


def place_on_disk(path: str, offset: int) -> int:
    """The byte of the disk that holds this byte of the file."""
    request = bytearray(FIEMAP.pack(offset, 1, 0, 0, 1, 0) + bytes(FIEMAP_EXTENT.size))
    with open(path, "rb") as file:
        fcntl.ioctl(file, FS_IOC_FIEMAP, request)
    logical, physical, *_ = FIEMAP_EXTENT.unpack_from(request, FIEMAP.size)
    return int(physical + offset - logical)


class Volume(NamedTuple):
    """A model on a file system whose disk fails as told."""

    disk: MappedDisk
    mount: Path
    files: list[str]

    @property
    def model(self) -> str:
        return self.files[0]

    def break_file(self, path: str, start: int, nbytes: int = PAGE) -> None:
        """No byte of these of this file can be read any more; nothing of it is in RAM."""
        evict(self.files)
        self.disk.fail(place_on_disk(path, start), nbytes)

    def break_all(self) -> None:
        self._forget()
        self.disk.fail()

    def repair(self, originals: list[str]) -> None:
        """As it was in the beginning, and nothing of it in RAM."""
        self.disk.work()
        for path, original in zip(self.files, originals, strict=True):
            if os.path.getsize(path) != os.path.getsize(original):
                shutil.copyfile(original, path)
        self._forget()

    def _forget(self) -> None:
        evict(self.files)
        Path("/proc/sys/vm/drop_caches").write_text("3")  # names and inodes too
        self.disk.forget()


def shell(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def mounted(disk: MappedDisk, folder: Path, originals: list[str]) -> Volume:
    # Without a journal nothing but our reads touches the failing blocks.
    shell(MKFS, "-q", "-F", "-m", "0", "-O", "^has_journal", disk.path)
    folder.mkdir(exist_ok=True)
    shell("mount", "-o", "noatime", disk.path, folder)
    files = [str(folder / os.path.basename(path)) for path in originals]
    for path, original in zip(files, originals, strict=True):
        shutil.copyfile(original, path)
    os.sync()
    return Volume(disk, folder, files)


def need_disk(serial: str) -> str:
    disk = disk_of(serial)
    if os.environ.get("NUMALOAD_GUEST") != "storage" or os.geteuid() != 0:
        pytest.skip("needs the guest named storage, and root in it")
    if MKFS is None:
        pytest.skip("needs mkfs.ext4: sudo apt-get install -y e2fsprogs")
    assert disk, f"no disk {serial} in this guest: numa-vm --disk"
    assert os.path.exists(CONTROL), "no device-mapper in this guest: numa-vm --modules dm-mod"
    return disk
