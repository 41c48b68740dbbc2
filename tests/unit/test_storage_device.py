"""What a file lies on, on constructed /sys trees: the kinds that decide how it is read."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from machines import write_block
from numaload.errors import ReadError
from numaload.files.plan import CANDIDATES, FITTING
from numaload.machine.devices import KINDS, Device, Storage, device_of, storage_of

PCI = "pci0000:00/0000:00:1f.0"
SCSI = f"{PCI}/ata1/host0/target0:0:0/0:0:0:0"
ROW = "20 1 {numbers} / / rw,relatime shared:1 - {kind} {source} {options}\n"


def seen(
    root: Path,
    numbers: str = "8:0",
    kind: str = "ext4",
    source: str = "/dev/somewhere",
    options: str = "rw",
) -> Device:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    row = ROW.format(numbers=numbers, kind=kind, source=source, options=options)
    (root / "proc/self/mountinfo").write_text(row)
    major, minor = map(int, numbers.split(":"))
    return device_of(
        "/models/m",
        sys_root=str(root / "sys"),
        proc_root=str(root / "proc"),
        numbers=(major, minor),
    )


def known(root: Path, numbers: str, kind: str = "ext4", options: str = "rw") -> Storage:
    """What a plan that was measured there belongs to."""
    device = seen(root, numbers, kind, options=options)
    major, minor = map(int, numbers.split(":"))
    roots = {"sys_root": str(root / "sys"), "proc_root": str(root / "proc")}
    return storage_of("/models/m", device, numbers=(major, minor), **roots)


DISKS: dict[str, tuple[str, dict[str, str], str]] = {
    "nvme": ("nvme/nvme0/nvme0n1", {"queue/rotational": "0"}, "nvme"),
    "nvme over tcp": ("nvme/nvme0/nvme0n1", {"device/transport": "tcp"}, "remote"),
    "sata ssd": ("block/sda", {"queue/rotational": "0", "device/vendor": "ATA"}, "ssd"),
    "hard disk": ("block/sda", {"queue/rotational": "1", "device/vendor": "ATA"}, "hdd"),
    "scsi of qemu": ("block/sda", {"queue/rotational": "1", "device/vendor": "QEMU"}, "virtual"),
    "iscsi": ("session1/target1:0:0/1:0:0:0/block/sda", {"queue/rotational": "0"}, "remote"),
    "virtio": ("virtio0/block/vda", {"queue/rotational": "1"}, "virtual"),
    "xen": ("block/xvda", {"queue/rotational": "0"}, "virtual"),
    "nbd": ("block/nbd0", {"queue/rotational": "0"}, "remote"),
    "rbd": ("block/rbd1", {"queue/rotational": "0"}, "remote"),
    "card": ("block/mmcblk0", {"queue/rotational": "0"}, "card"),
    "nvme of a cloud": (
        "nvme/nvme1/nvme1n1",
        {"queue/rotational": "0", "device/model": "Amazon Elastic Block Store"},
        "virtual",
    ),
    "pmem": ("block/pmem0", {"queue/rotational": "0"}, "memory"),
    "new": ("block/zz9", {"queue/rotational": "0"}, "unknown"),
}


@pytest.mark.parametrize("which", DISKS)
def test_kinds_of_disks(tmp_path: Path, which: str) -> None:
    place, files, kind = DISKS[which]
    write_block(tmp_path, "8:0", f"{PCI}/{place}", files | {"queue/read_ahead_kb": "128"})
    found = seen(tmp_path)
    assert (found.kind, found.disks, found.read_ahead) == (kind, 1, 128 << 10)
    assert found.name == place.rpartition("/")[2]
    assert found.rotational == (files.get("queue/rotational") == "1")


def test_a_partition_has_its_disk_s_queue(tmp_path: Path) -> None:
    write_block(tmp_path, "8:0", f"{SCSI}/block/sda", {"queue/rotational": "1"})
    write_block(tmp_path, "8:2", f"{SCSI}/block/sda/sda2", {"partition": "2"})
    found = seen(tmp_path, "8:2")
    assert (found.kind, found.name, found.rotational) == ("hdd", "sda2", True)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("eui.0025", {"wwid": "eui.0025", "device/model": "M"}),
        ("naa.5", {"device/wwid": "naa.5", "device/model": "M"}),
        ("S1", {"serial": "S1"}),
        ("LVM-x", {"dm/uuid": "LVM-x", "dm/name": "models"}),
        ("models", {"dm/uuid": "", "dm/name": "models"}),
        ("M", {"device/model": "M"}),
    ],
)
def test_a_disk_is_known_again_under_another_name(
    tmp_path: Path, name: str, files: dict[str, str]
) -> None:
    found = []
    for i in range(2):
        place = f"{PCI}/nvme/nvme{i}/nvme{i}n1"
        write_block(tmp_path / str(i), f"259:{i}", place, files | {"size": "4096"})
        found.append(known(tmp_path / str(i), f"259:{i}"))
    assert found[0] == found[1]
    assert found[0].device == f"{name}, 4096 sectors"


def test_partitions_and_raids_are_known_by_their_disks_too(tmp_path: Path) -> None:
    disk = f"{SCSI}/block/sda"
    write_block(tmp_path, "8:0", disk, {"serial": "S1", "size": "9"})
    write_block(tmp_path, "8:1", f"{disk}/sda1", {"partition": "1", "size": "3"})
    write_block(tmp_path, "8:2", f"{disk}/sda2", {"partition": "2", "size": "3"})
    write_block(tmp_path, "9:0", "virtual/block/md0", {"md/uuid": "U", "size": "5"}, [disk])
    first, second = (known(tmp_path, numbers).device for numbers in ("8:1", "8:2"))
    assert first == "1, 3 sectors; S1, 9 sectors"
    assert second == "2, 3 sectors; S1, 9 sectors"
    assert known(tmp_path, "9:0").device == "U, 5 sectors; S1, 9 sectors"


def test_mount_options_that_reading_depends_on_are_told(tmp_path: Path) -> None:
    found = known(tmp_path, "0:40", "9p", "rw,trans=virtio,msize=512000,cache=loose,addr=::1")
    assert found == Storage("/dev/somewhere", "9p,cache=loose,msize=512000", "/")


def test_several_disks_are_a_raid(tmp_path: Path) -> None:
    slaves = []
    for i in range(3):
        place = f"{PCI}/nvme/nvme{i}/nvme{i}n1"
        write_block(tmp_path, f"259:{i}", place, {"queue/rotational": "0"})
        slaves.append(tmp_path / "sys/devices" / place)
    write_block(tmp_path, "9:0", "virtual/block/md0", {"queue/rotational": "0"})
    for slave in slaves:
        link = tmp_path / "sys/devices/virtual/block/md0/slaves" / slave.name
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(slave)
    found = seen(tmp_path, "9:0")
    assert (found.kind, found.name, found.disks) == ("raid", "md0", 3)
    assert "3 disks" in str(found)


def test_devices_in_a_circle_have_no_disk(tmp_path: Path) -> None:
    dm = ["virtual/block/dm-0", "virtual/block/dm-1"]
    for i in range(2):
        write_block(tmp_path, f"252:{i}", dm[i], slaves=[dm[1 - i]])
    found = seen(tmp_path, "252:0")
    assert (found.kind, found.name) == ("unknown", "dm-0")


@pytest.mark.parametrize(
    ("kind", "expected"), [("tmpfs", "memory"), ("9p", "share"), ("virtiofs", "share")]
)
def test_file_systems_without_disks(tmp_path: Path, kind: str, expected: str) -> None:
    assert seen(tmp_path, "0:40", kind, "here").kind == expected


def test_what_hides_its_disk_is_unknown(tmp_path: Path) -> None:
    for kind in ("btrfs", "overlay", "zfs"):
        found = seen(tmp_path, "0:41", kind, "/dev/not-there", "rw,lowerdir=/no/such/folder")
        assert (found.kind, found.file_system) == ("unknown", kind)
    assert seen(tmp_path, "8:77").kind == "unknown"


def test_an_overlay_is_what_is_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the folder that it is made of, if this process sees it."""
    write_block(tmp_path, "259:0", f"{PCI}/nvme/nvme0/nvme0n1", {"queue/rotational": "0"})
    real = os.stat

    def on_nvme(path: Any, *options: Any, **more: Any) -> Any:
        found = real(path, *options, **more)
        if str(path) != str(tmp_path):
            return found
        return SimpleNamespace(st_dev=os.makedev(259, 0))

    monkeypatch.setattr(os, "stat", on_nvme)
    found = seen(tmp_path, "0:42", "overlay", "overlay", f"rw,upperdir={tmp_path},workdir=/w")
    monkeypatch.undo()
    assert (found.kind, found.file_system) == ("nvme", "overlay")


def test_network_file_systems_are_told(tmp_path: Path) -> None:
    here = device_of(str(tmp_path), network=True)
    assert here.kind == "network"


def test_no_such_file(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "a\0b"):
        with pytest.raises(ReadError):
            device_of(path)


def test_this_machine_s_own(tmp_path: Path) -> None:
    found = device_of(str(tmp_path))
    assert found.kind in KINDS
    assert found.file_system in str(found)
    assert device_of("/dev/shm").kind == "memory"  # noqa: S108


def test_every_kind_has_ways_for_every_sink() -> None:
    assert set(CANDIDATES) == set(KINDS)
    for sinks in CANDIDATES.values():
        for sink, ways in sinks.items():
            assert ways
            assert {way.name for way in ways} <= set(FITTING[sink])
