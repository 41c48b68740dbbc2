"""GPUs and the disks under files, on constructed /sys trees: never a guess, never a crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from machines import GB200, Pci, Roots, write_block, write_proc
from numaload.errors import NumaloadWarning, ReadError
from numaload.machine import devices
from numaload.machine.devices import FileDevice, disk_of, gpus

NVME = "pci0000:00/0000:05:00.0/nvme/nvme0"
SATA = "pci0000:80/0000:80:17.0/ata1/host0/target0:0:0/0:0:0:0/block/sda"
SUBSYSTEM = "virtual/nvme-subsystem/nvme-subsys0"


def seen(root: Path, numbers: tuple[int, int] = (259, 0), path: str = "/models/m") -> FileDevice:
    roots: Roots = {"sys_root": str(root / "sys"), "proc_root": str(root / "proc")}
    return disk_of(path, **roots, numbers=numbers)


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def where(found: FileDevice) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    return found.device, found.disks, found.nodes


def test_nvme_controllers_know_their_node(tmp_path: Path) -> None:
    write_block(tmp_path, "259:0", f"{NVME}/nvme0n1", {"../numa_node": "1"})
    assert where(seen(tmp_path)) == ("nvme0n1", ("nvme0n1",), (1,))
    assert seen(tmp_path).why == ""


def test_a_partition_is_on_its_disk(tmp_path: Path) -> None:
    write_block(tmp_path, "8:0", SATA)
    write_block(tmp_path, "8:2", f"{SATA}/sda2", {"partition": "2"})
    put(tmp_path / "sys/devices/pci0000:80/0000:80:17.0/numa_node", 1)
    assert where(seen(tmp_path, (8, 2))) == ("sda2", ("sda",), (1,))
    assert where(seen(tmp_path, (8, 0))) == ("sda", ("sda",), (1,))


def test_the_nearest_node_that_is_known(tmp_path: Path) -> None:
    write_block(tmp_path, "259:0", f"{NVME}/nvme0n1", {"../numa_node": "-1"})
    assert where(seen(tmp_path)) == ("nvme0n1", ("nvme0n1",), ())
    assert seen(tmp_path).why == "the firmware does not say"
    put(tmp_path / "sys/devices/pci0000:00/0000:05:00.0/numa_node", 0)
    assert seen(tmp_path).nodes == (0,)


def test_device_mapper_over_md_over_partitions(tmp_path: Path) -> None:
    """A volume on a mirror on two disks of two nodes: it is on both."""
    put(tmp_path / f"sys/devices/{NVME}/numa_node", 3)
    put(tmp_path / "sys/devices/pci0000:80/0000:80:17.0/numa_node", 0)
    write_block(tmp_path, "259:1", f"{NVME}/nvme0n1/nvme0n1p1", {"partition": "1"})
    write_block(tmp_path, "8:1", f"{SATA}/sda1", {"partition": "1"})
    parts = (f"{NVME}/nvme0n1/nvme0n1p1", f"{SATA}/sda1")
    write_block(tmp_path, "9:0", "virtual/block/md0", slaves=parts)
    write_block(tmp_path, "253:0", "virtual/block/dm-0", slaves=["virtual/block/md0"])
    assert where(seen(tmp_path, (253, 0))) == ("dm-0", ("nvme0n1", "sda"), (0, 3))


def test_nvme_multipath_is_on_all_controllers(tmp_path: Path) -> None:
    write_block(tmp_path, "259:0", f"{SUBSYSTEM}/nvme0n1")
    for name, node in (("nvme0", 0), ("nvme1", 1)):
        controller = tmp_path / f"sys/devices/pci0000:00/0000:0{node + 5}:00.0/nvme/{name}"
        put(controller / "numa_node", node)
        (tmp_path / f"sys/devices/{SUBSYSTEM}/{name}").symlink_to(controller)
    assert where(seen(tmp_path)) == ("nvme0n1", ("nvme0n1",), (0, 1))


def test_virtual_devices_are_on_no_node(tmp_path: Path) -> None:
    write_block(tmp_path, "7:0", "virtual/block/loop0")
    assert seen(tmp_path, (7, 0)).why == "a virtual device"


def test_devices_made_of_each_other_end(tmp_path: Path) -> None:
    write_block(tmp_path, "253:0", "virtual/block/dm-0", slaves=["virtual/block/dm-1"])
    write_block(tmp_path, "253:1", "virtual/block/dm-1", slaves=["virtual/block/dm-0"])
    assert seen(tmp_path, (253, 0)).nodes == ()


def test_no_such_device_in_sys(tmp_path: Path) -> None:
    found = seen(tmp_path, (8, 1))
    assert (found.device, found.nodes) == ("8:1", ())
    assert found.why.endswith("/sys/dev/block/8:1 is not there")


MOUNTS = """\
22 1 259:0 / / rw,relatime shared:1 - ext4 /dev/nvme0n1p2 rw
30 22 0:45 / /models rw shared:9 - nfs4 host:/models rw,nconnect=8
31 22 0:50 / /models/with\\040blank rw - tmpfs tmpfs rw
32 22 0:60 /@home /home rw - btrfs /dev/sda1 rw
33 22 0:70 / /home/over rw - overlay overlay rw
no line of mountinfo
"""
FILE_SYSTEMS = {
    "/models/m.gguf": ((0, 45), "nfs4"),
    "/models/with blank/m.gguf": ((0, 50), "tmpfs"),
    "/home/user/m.gguf": ((0, 61), "btrfs"),  # its files have other numbers than its mounts
    "/home/over/m.gguf": ((0, 70), "overlay"),
    "/modelsque/m.gguf": ((259, 0), "ext4"),
    "/models/hidden/m.gguf": ((259, 0), "ext4"),  # below what was mounted over it later
}


@pytest.mark.parametrize("path", FILE_SYSTEMS)
def test_file_systems(path: str, tmp_path: Path) -> None:
    write_block(tmp_path, "259:0", f"{NVME}/nvme0n1", {"../numa_node": "1"})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTS)
    numbers, kind = FILE_SYSTEMS[path]
    found = seen(tmp_path, numbers, path)
    assert found.file_system == kind
    assert found.why == ("" if numbers[0] else f"no block device: {kind}")


def test_btrfs_is_on_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files have a number of no disk; the mount tells the one."""
    write_block(tmp_path, "259:0", f"{NVME}/nvme0n1", {"../numa_node": "1"})
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(devices, "_below", lambda mount: (259, 0) if mount else None)
    assert where(seen(tmp_path, (0, 61), "/home/user/m.gguf")) == ("nvme0n1", ("nvme0n1",), (1,))


def test_without_mountinfo_the_file_system_is_unknown(tmp_path: Path) -> None:
    assert seen(tmp_path, (0, 45)).why == "no block device: unknown"


def test_files_here(tmp_path: Path) -> None:
    (tmp_path / "model").touch()
    assert disk_of(str(tmp_path / "model")).file_system != "unknown"
    assert disk_of("/dev/shm").why == "no block device: tmpfs"  # noqa: S108
    with pytest.raises(ReadError, match="absent: No such file"):
        disk_of(str(tmp_path / "absent"))
    with pytest.raises(ReadError, match="null"):
        disk_of("a\0b")


def card(root: Path, device: Pci, address: str = "0000:01:00.0") -> Roots:
    roots = write_proc(root, 1000)
    device.write(address, root)
    return roots


@pytest.mark.parametrize(
    ("code", "kind"),
    [("0x030000", "VGA"), ("0x030200", "3D"), ("0x038000", "display"), ("0x120000", "accelerator"),
     ("0x030100", "display"), ("0x120100", "accelerator")],
)  # fmt: skip
def test_kinds_of_gpus(code: str, kind: str, tmp_path: Path) -> None:
    (found,) = gpus(**card(tmp_path, Pci(code, 1, "8-15", "nvidia")))
    assert (found.address, found.kind, found.id) == ("0000:01:00.0", kind, "10de:2330")
    assert (found.node, found.cpus, found.driver) == (1, frozenset(range(8, 16)), "nvidia")
    assert found.to_dict()["cpus"] == list(range(8, 16))


@pytest.mark.parametrize("code", ["0x020000", "0x010802", "0x060400", "", "garbage"])
def test_other_devices_are_no_gpus(code: str, tmp_path: Path) -> None:
    assert gpus(**card(tmp_path, Pci(code, 0))) == []


@pytest.mark.parametrize("node", [-1, None])
def test_a_node_that_is_not_said_is_unknown(node: int | None, tmp_path: Path) -> None:
    (found,) = gpus(**card(tmp_path, Pci("0x030000", node)))
    assert found.node is None
    assert (found.driver, found.memory_node) == ("", None)


def test_odd_files_of_a_gpu(tmp_path: Path) -> None:
    roots = card(tmp_path, Pci("0x030000", 0, "all of them"))
    folder = tmp_path / "sys/devices/pci0000:00/0000:01:00.0"
    (folder / "numa_node").write_text("zero\n")
    (folder / "vendor").unlink()
    (folder / "device").unlink()
    (folder / "device").mkdir()
    with pytest.warns(NumaloadWarning) as said:
        (found,) = gpus(**roots)
    assert (found.id, found.node, found.cpus) == ("unknown:unknown", None, frozenset())
    assert sorted(str(w.message).removeprefix(f"{tmp_path}/sys/bus/") for w in said) == [
        "pci/devices/0000:01:00.0/device: Is a directory: taken as absent",
        "pci/devices/0000:01:00.0/local_cpulist: 'all of them' is no list of ids: taken as absent",
    ]


def test_memory_of_a_gpu_that_is_no_node_yet(tmp_path: Path) -> None:
    roots = GB200.write(tmp_path)
    status = tmp_path / "proc/driver/nvidia/gpus/0008:01:00.0/numa_status"
    assert [gpu.memory_node for gpu in gpus(**roots)] == [2, 10]
    for text in ("Node: 7\n", "Node: -1\n", "Node:\n", "", "Node: 0/\n"):
        status.write_text(text)
        assert [gpu.memory_node for gpu in gpus(**roots)] == [None, 10]


def test_no_pci_here(tmp_path: Path) -> None:
    assert gpus(str(tmp_path), str(tmp_path)) == []


def test_gpus_here_are_those_of_the_kernel() -> None:
    base = Path("/sys/bus/pci/devices")
    classes = {p.parent.name: p.read_text()[:4] for p in base.glob("*/class")}
    expected = sorted(address for address, code in classes.items() if code in ("0x03", "0x12"))
    assert [gpu.address for gpu in gpus()] == expected
    assert all(
        gpu.node is None or os.path.isdir(f"/sys/bus/node/devices/node{gpu.node}") for gpu in gpus()
    )
