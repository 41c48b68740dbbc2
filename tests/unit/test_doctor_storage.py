"""What the doctor finds in storage, on constructed machines; each finding with its remedy."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import gguf_builder as gb
import safetensors_builder as sb
from commands import evict, resident
from doctor_systems import FAST, GIB, NVME, constructed, looked
from machines import ONE
from numaload.cli.doctor import remedy
from numaload.doctor import disks, reading, speeds, storage
from numaload.doctor.check import Check, Finding, Unknown
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import QUICK, DiskUse, System
from numaload.errors import FormatError, ReadError, SplitError
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.linux.mounts import Mount
from numaload.machine.devices import Device, FileDevice

MIB = 1 << 20
SIZE = 30 * 10**9
PATH = "/models/model.gguf"
CHECKS = (*reading.CHECKS, *disks.CHECKS, *storage.CHECKS)
QUEUE = "/sys/block/nvme0n1/queue"
PCI = "/sys/class/nvme/nvme0/device"
# A machine with one NVMe SSD that has nothing to mend.
HEALTHY: dict[str, str] = {
    f"{QUEUE}/read_ahead_kb": "4096\n",
    f"{QUEUE}/rotational": "0\n",
    f"{QUEUE}/scheduler": "[none] mq-deadline kyber bfq\n",
    f"{PCI}/current_link_speed": "16.0 GT/s PCIe\n",
    f"{PCI}/current_link_width": "4\n",
    f"{PCI}/max_link_speed": "16.0 GT/s PCIe\n",
    f"{PCI}/max_link_width": "4\n",
    f"{PCI}/power_state": "D0\n",
    "/proc/diskstats": " 259 0 nvme0n1 1 0 8 1 0 0 0 0 0 1 1\n",
}
SLOW = Speeds(disk=3.0e9, mapped=1.0e9, warm=12e9)  # loses 20 s of these bytes
NFS_OPTIONS = "rw,vers=4.2,rsize={rsize},namlen=255,hard,proto=tcp{more},addr=10.0.0.2"
SERVER = Device("network", "server:/m", "nfs4")
BDI = "/sys/class/bdi/0:45/read_ahead_kb"


def nfs(rsize: int = MIB, more: str = "", source: str = "server:/m") -> Mount:
    return Mount("0:45", "/models", "nfs4", NFS_OPTIONS.format(rsize=rsize, more=more), source)


def system(root: Path, files: dict[str, str] | None = None, **said: Any) -> System:
    return constructed(root, ONE, HEALTHY | (files or {}), **{"size": SIZE} | said)


def on_nfs(root: Path, mount: Mount | None = None, **said: Any) -> System:
    return system(
        root,
        {BDI: "15360\n"} | said.pop("files", {}),
        **{
            "mount": mount or nfs(),
            "device": SERVER,
            "disks": FileDevice(PATH, "nfs4", "", (), (), "no block device: nfs4"),
            "speeds": Speeds(disk=1.0e9, mapped=0.9e9, warm=12e9),
        }
        | said,
    )


def found(check: type[Check], where: System) -> Finding:
    finding = looked(check, where)
    assert finding is not None
    assert len(finding.title) < 60
    return finding


def seconds(finding: Finding) -> float:
    assert finding.price is not None
    return round(finding.price.seconds, 1)


def test_nothing_is_found_on_a_healthy_machine(tmp_path: Path) -> None:
    for check in CHECKS:
        assert looked(check, system(tmp_path)) is None, check.id


def test_without_a_file_nothing_is_looked_at(tmp_path: Path) -> None:
    for check in CHECKS:
        assert not check(constructed(tmp_path, ONE)).available(), check.id


KINDS = ("nvme", "hdd", "raid", "network", "share", "unknown", "memory")


@pytest.mark.parametrize("text", [None, "", "words\0\x1b[31m", "-1", "9" * 30])
def test_hidden_and_odd_files_are_unknown_at_most(tmp_path: Path, text: str | None) -> None:
    files = dict.fromkeys(HEALTHY, text) if text is not None else {}
    where = constructed(tmp_path, ONE, files, size=SIZE)
    for kind in KINDS:
        where.device = Device(kind, "nvme0n1", "nfs4" if kind == "network" else "ext4", 1)
        odd = Mount("259:0", "/models", where.device.file_system, "=,rsize=x,addr", "")
        slow = Speeds(disk=0.05e9, mapped=0.01e9)
        for where.mount, where.speeds in ((None, SLOW), (odd, slow), (odd, Speeds()), (odd, FAST)):
            for check in CHECKS:
                with suppress(Unknown):
                    looked(check, where)


def test_slow_mapping(tmp_path: Path) -> None:
    finding = found(reading.Mapped, system(tmp_path, speeds=SLOW))
    assert "1.00 GB/s, the disk gives 3.00 GB/s; 27.9 GiB are not in RAM" in finding.seen
    assert (seconds(finding), finding.price and finding.price.how) == (20.0, "measured")
    assert finding.fix == f"numaload prewarm {PATH}"
    assert finding.undo == f"numaload evict {PATH}"


@pytest.mark.parametrize(
    "said",
    [
        {"absent": 0},
        {"speeds": Speeds(disk=3.0e9)},
        {"speeds": Speeds(disk=3.0e9, mapped=2.5e9)},
        {"size": 10**8},  # that would save less than half a second
    ],
)
def test_a_mapping_that_costs_nothing(tmp_path: Path, said: dict[str, Any]) -> None:
    assert looked(reading.Mapped, system(tmp_path, **{"speeds": SLOW} | said)) is None


def test_a_small_read_ahead_claims_the_seconds_of_a_slow_mapping(tmp_path: Path) -> None:
    where = system(tmp_path, {f"{QUEUE}/read_ahead_kb": "128\n"}, speeds=SLOW)
    finding = found(reading.ReadAhead, where)
    assert f"{QUEUE}/read_ahead_kb is 128, expected 4096" in finding.seen
    assert seconds(finding) == 20.0
    assert finding.fix == f"echo 4096 > {QUEUE}/read_ahead_kb"
    assert finding.undo == f"echo 128 > {QUEUE}/read_ahead_kb"
    assert finding.root
    assert looked(reading.Mapped, where) is None


@pytest.mark.parametrize(
    ("device", "place", "wanted"),
    [
        (Device("hdd", "sda1", "ext4", 1), "/sys/block/sda/queue/read_ahead_kb", 1024),
        (Device("raid", "md0", "xfs", 4), "/sys/block/md0/queue/read_ahead_kb", 4096),
        (Device("network", "s:/m", "nfs4"), BDI, 15360),
        (Device("share", "models", "virtiofs"), BDI, 4096),
        (Device("share", "models", "9p"), "/sys/class/bdi/9p-3/read_ahead_kb", 4096),
        (Device("nvme", "nvme0n1", "btrfs", 1), "/sys/fs/btrfs/ab-12/bdi/read_ahead_kb", 4096),
        (Device("hdd", "sdb1", "fuseblk", 1), "/sys/class/bdi/0:45-fuseblk/read_ahead_kb", 1024),
    ],
)
def test_which_read_ahead_counts(tmp_path: Path, device: Device, place: str, wanted: int) -> None:
    where = on_bdi(tmp_path, device, {place: "128\n"})
    assert found(reading.ReadAhead, where).fix == f"echo {wanted} > {place}"


def on_bdi(root: Path, device: Device, files: dict[str, str]) -> System:
    below = "nvme0n1p2" if device.file_system == "btrfs" else ""
    others = {
        "/sys/fs/btrfs/ab-12/devices/nvme0n1p2/x": "",
        "/sys/fs/btrfs/cd-34/devices/sdc/x": "",
        "/sys/fs/btrfs/features/x": "",
        "/sys/class/bdi/0:46/x": "",
        "/sys/class/bdi/btrfs-1/x": "",
    }
    return system(
        root,
        others | files,
        device=device,
        disks=FileDevice(PATH, device.file_system, below, (), (), "no block device"),
        mount=nfs()._replace(kind=device.file_system),
        speeds=SLOW,
    )


def test_a_read_ahead_of_one_of_several_is_unknown(tmp_path: Path) -> None:
    names = ("cifs-1", "cifs-2")
    files = {f"/sys/class/bdi/{name}/read_ahead_kb": "128\n" for name in names}
    with pytest.raises(Unknown, match="2 of /sys/class/bdi may be that of cifs, expected 1"):
        looked(reading.ReadAhead, on_bdi(tmp_path, Device("share", "//s/m", "cifs"), files))


def test_a_read_ahead_that_is_hidden_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="0 of /sys/class/bdi may be that of ext4"):
        looked(reading.ReadAhead, constructed(tmp_path, ONE, size=SIZE, speeds=SLOW, mount=nfs()))


def test_small_requests_of_nfs(tmp_path: Path) -> None:
    finding = found(reading.SmallReads, on_nfs(tmp_path, nfs(65536)))
    assert "server:/m (nfs4, mounted at /models) has rsize=65536" in finding.seen
    assert seconds(finding) == 21.5
    tiny = found(reading.SmallReads, on_nfs(tmp_path, nfs(4096)))
    assert seconds(tiny) == 22.5  # no more than three quarters of what the reading takes
    assert finding.fix == (
        "umount /models && mount -t nfs4 -o rw,vers=4.2,rsize=1048576,hard,proto=tcp,nconnect=8"
        " server:/m /models  # after all mounts of this server are unmounted"
    )
    assert finding.undo == (
        "umount /models && mount -t nfs4 -o rw,vers=4.2,rsize=65536,hard,proto=tcp"
        " server:/m /models"
    )


def test_one_connection_of_nfs(tmp_path: Path) -> None:
    finding = found(reading.OneConnection, on_nfs(tmp_path))
    assert "one connection to the server, which gives 1.00 GB/s" in finding.seen
    assert seconds(finding) == 9.0
    assert "nconnect=8 server:/m /models" in finding.fix
    assert "nconnect" not in finding.undo


def test_two_remedies_of_a_mount_do_not_take_each_other_back(tmp_path: Path) -> None:
    where = on_nfs(tmp_path, nfs(65536))
    fixes = {found(check, where).fix for check in (reading.SmallReads, reading.OneConnection)}
    assert len(fixes) == 1
    assert "rsize=1048576,hard,proto=tcp,nconnect=8 server:/m" in fixes.pop()


@pytest.mark.parametrize(
    ("flags", "root", "source", "options", "name"),
    [
        (
            "ro,nosuid,nodev,noexec,relatime", "/ai/my models", "filer:/export",
            "ro,nosuid,nodev,noexec", "'filer:/export/ai/my models'",
        ),
        ("rw,noatime", "/ai", "filer:/", "rw,noatime", "filer:/ai"),
    ],
)  # fmt: skip
def test_a_mount_is_mounted_again_as_it_was(
    tmp_path: Path, flags: str, root: str, source: str, options: str, name: str
) -> None:
    mount = nfs(65536, ",nconnect=1", source)._replace(flags=flags, root=root)
    finding = found(reading.SmallReads, on_nfs(tmp_path, mount))
    for command, rsize in ((finding.fix, MIB), (finding.undo, 65536)):
        assert command == (
            f"umount /models && mount -t nfs4 -o {options},vers=4.2,rsize={rsize},hard,proto=tcp,"
            f"nconnect=1 {name} /models"
        )


@pytest.mark.parametrize("said", [{"root": "/ai//deleted"}, {"point": PATH}])
def test_a_bind_mount_that_has_no_name_gets_no_command(
    tmp_path: Path, said: dict[str, str]
) -> None:
    finding = found(reading.SmallReads, on_nfs(tmp_path, nfs(65536)._replace(**said)))
    assert finding.fix.startswith("give rsize=1048576,nconnect=8 to the mount of server:/m")
    assert remedy(finding.fix, root=True)[1] == finding.undo == ""


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        (nfs(more=",nconnect=4"), {}),
        (nfs(), {"size": 10**8}),
        (nfs(), {"speeds": Speeds(disk=0.11e9)}),  # what the network gives
        (nfs(source="localhost:/m")._replace(options="rw,rsize=4096"), {}),
        (Mount("0:45", "/models", "ceph", "rw", "server:/m"), {}),
    ],
)
def test_mounts_that_want_no_other_options(
    tmp_path: Path, mount: Mount, said: dict[str, Any]
) -> None:
    for check in (reading.SmallReads, reading.OneConnection):
        assert looked(check, on_nfs(tmp_path, mount, **said)) is None


def test_a_mount_that_hides_its_options_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="rsize"):
        looked(reading.SmallReads, on_nfs(tmp_path, nfs()._replace(options="rw")))


def test_a_network_leaves_out_what_its_options_cost(tmp_path: Path) -> None:
    """What a local disk would save, less the seconds that other findings claim."""
    finding = found(reading.FarAway, on_nfs(tmp_path))
    assert "0.90 GB/s; a local NVMe disk typically gives 3.00 GB/s" in finding.seen
    assert seconds(finding) == round(SIZE / 0.9e9 - SIZE / 3e9 - 9.0, 1)
    assert finding.fix.startswith(
        f"mkdir -p ~/models && mkdir ~/models/model-copy && cp {PATH} ~/models/model-copy/  # "
    )
    assert finding.undo == "rm -r ~/models/model-copy"
    slow: dict[str, Any] = {"speeds": Speeds(disk=1.0e9, mapped=0.1e9), "files": {BDI: "128\n"}}
    both = on_nfs(tmp_path, **slow)
    assert seconds(found(reading.ReadAhead, both)) == 270.0
    assert seconds(found(reading.FarAway, both)) == 300 - 10 - 270.0 - 9.0
    assert looked(reading.Mapped, both) is None


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def run(text: str) -> int:
    return subprocess.run(["sh", "-c", remedy(text, root=False)[1]], check=False).returncode


HUB_FOLDER = "hub/models--org--it's  # a/snapshots/0123"


@pytest.mark.parametrize(
    ("names", "others", "copied"),
    [
        (["home/models/model.gguf"], ["home/models/config.json"], "model-copy"),
        (["nfs/it's: a  # b & c.gguf"], [], "it's: a  # b & c-copy"),
        (["nfs/..gguf"], [], "gguf-copy"),
        ([f"nfs/q-0000{i}-of-00002.gguf" for i in (1, 2)], ["nfs/q-00001-of-00009.gguf"], "q-copy"),
        (["nfs/my m/model.safetensors"], ["nfs/my m/config.json", "nfs/my m/x.bin"], "my m-copy"),
        ([f"{HUB_FOLDER}/model.safetensors"], [f"{HUB_FOLDER}/merges.txt"], "org--it's  # a-copy"),
    ],
)
def test_a_copy_overwrites_nothing_and_undoing_removes_nothing_else(
    tmp_path: Path, home: Path, names: list[str], others: list[str], copied: str
) -> None:
    for name in (*names, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    paths = [str(tmp_path / name) for name in names]
    where = on_nfs(tmp_path / "machine", files={})
    where.path, where.files = paths[0], [SourceFile(path) for path in paths]
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    first = found(reading.FarAway, where)
    assert run(first.fix) == 0
    there = home / "models" / copied
    wanted = [*names, *(o for o in others if o.endswith(("json", "txt")) and "home" not in o)]
    assert {p.name: p.read_text() for p in there.iterdir()} == {
        os.path.basename(name): name for name in wanted
    }
    assert run(first.fix) != 0  # it is there
    second = found(reading.FarAway, where)
    assert run(second.fix) == 0
    assert sorted(p.name for p in there.parent.iterdir() if p.is_dir()) == [copied, f"{copied}1"]
    assert [run(second.undo), run(first.undo)] == [0, 0]
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before
    for file in where.files:
        file.close()


@pytest.mark.parametrize("check", [reading.FarAway, reading.HubMount])
def test_a_home_on_a_network_gets_no_copy(tmp_path: Path, home: Path, check: type[Check]) -> None:
    row = f"20 1 8:1 / / rw - ext4 /dev/sda1 rw\n30 20 0:45 / {home} rw - nfs4 server:/home rw\n"
    hub = nfs(source="localhost:/m")._replace(options="rw")
    mount = hub if check is reading.HubMount else nfs()
    where = on_nfs(tmp_path / "root", mount, files={"/proc/self/mountinfo": row})
    finding = found(check, where)
    assert finding.fix.startswith("copy it to a local disk with 27.9 GiB free, which ~ is not on")
    assert finding.undo == ""


@pytest.mark.parametrize(
    ("kind", "device", "options", "said"),
    [
        ("nfs4", "network", "rw", "asks another machine for"),
        ("fuse.foo", "network", "rw", "(FUSE), which may have it from this machine or from an"),
        ("9p", "share", "rw,trans=virtio", "asks the machine around this one for"),
        ("9p", "share", "rw,aname=drvfs;path=C:\\;uid=0", "asks Windows for"),
        ("fuse.mergerfs", "network", "rw", ""),
        ("fuse.gocryptfs", "network", "rw", ""),
    ],
)
def test_who_has_the_file_is_not_asserted_where_nobody_knows(
    tmp_path: Path, kind: str, device: str, options: str, said: str
) -> None:
    lies_on = Device(device, "x", kind)
    assert ("network" in str(lies_on)) == (kind == "nfs4")
    finding = looked(
        reading.FarAway,
        on_nfs(tmp_path, Mount("0:45", "/models", kind, options, "x"), device=lies_on),
    )
    assert (said in finding.why) if finding and said else (finding is None and not said)


@pytest.mark.parametrize("kind", ["9p", "virtiofs"])
def test_a_share_is_slower_than_a_disk(tmp_path: Path, kind: str) -> None:
    where = on_nfs(
        tmp_path, Mount("0:45", "/m", kind, "", "m"), device=Device("share", "m", kind),
        speeds=Speeds(mapped=0.2e9),
    )  # fmt: skip
    assert seconds(found(reading.FarAway, where)) == 140.0
    assert looked(reading.FarAway, on_nfs(tmp_path, speeds=FAST)) is None


@pytest.mark.parametrize(
    "mount",
    [
        nfs(source="127.0.0.1:/")._replace(options="rw,vers=3,rsize=1048576,addr=127.0.0.1"),
        nfs(source="localhost:/")._replace(options="rw"),
        Mount("0:45", "/models", "fuse", "rw", "hf-mount"),
        Mount("0:45", "/models", "fuse.rclone", "rw", "remote:"),
    ],
)
def test_a_mount_of_the_hub(tmp_path: Path, mount: Mount) -> None:
    where = on_nfs(tmp_path, mount)
    finding = found(reading.HubMount, where)
    assert mount.source in finding.seen
    assert seconds(finding) == round(SIZE / 0.9e9 - SIZE / 3e9, 1)
    assert f"cp {PATH} ~/models/model-copy/" in finding.fix
    assert finding.fix.endswith(
        "; or: hf download ORG/NAME model.gguf --local-dir ~/models/model-copy"
    )
    for other in (reading.FarAway, reading.SmallReads, reading.OneConnection, reading.Mapped):
        assert looked(other, where) is None


def test_a_hub_mount_of_which_nothing_is_known(tmp_path: Path) -> None:
    mount = Mount("0:45", "/models", "fuse", "rw", "hf-mount")
    assert found(reading.HubMount, on_nfs(tmp_path, mount, speeds=Speeds())).price is None
    for said in ({"speeds": FAST}, {"absent": 0, "speeds": Speeds()}, {"mount": nfs()}):
        assert looked(reading.HubMount, on_nfs(tmp_path, **{"mount": mount} | said)) is None


def test_a_hard_disk(tmp_path: Path) -> None:
    disk: dict[str, Any] = {"device": Device("hdd", "sda1", "ext4", 1, rotational=True)}
    where = system(tmp_path, **disk, speeds=Speeds(disk=0.15e9, mapped=0.14e9))
    finding = found(disks.HardDisk, where)
    assert "hard disk (sda1, ext4) gives 0.15 GB/s" in finding.seen
    assert seconds(finding) == 140.0
    assert finding.fix == "move it to an SSD with 27.9 GiB free"  # RAM has no room for it
    assert not finding.undo
    roomy = system(tmp_path, **disk, speeds=where.speeds, meminfo={"MemAvailable": SIZE})
    assert found(disks.HardDisk, roomy).fix.endswith(f"numaload mirror {PATH}")
    assert found(disks.HardDisk, roomy).undo == f"numaload release {PATH}"
    busy = system(
        tmp_path, **disk, speeds=Speeds(disk=0.15e9), disk_use=DiskUse(10e6, 0.5)
    )  # half of its time is claimed by those who use it
    assert seconds(found(disks.Busy, busy)) == 100.0
    assert seconds(found(disks.HardDisk, busy)) == 40.0


@pytest.mark.parametrize("said", [{"absent": 0}, {"speeds": Speeds()}, {"device": NVME}])
def test_a_hard_disk_that_costs_nothing(tmp_path: Path, said: dict[str, Any]) -> None:
    disk: dict[str, Any] = {
        "device": Device("hdd", "sda", "ext4", 1),
        "speeds": Speeds(disk=0.15e9),
    }
    assert looked(disks.HardDisk, system(tmp_path, **disk | said)) is None


def test_a_busy_disk(tmp_path: Path) -> None:
    finding = found(disks.Busy, system(tmp_path, disk_use=DiskUse(1.0e9, 0.9)))
    assert "1.00 GB/s, and keep it busy 90% of the time" in finding.seen
    assert seconds(finding) == 2.5  # a quarter of 10 s
    assert "iotop" in finding.fix
    quiet = DiskUse(0.1e9, 1.0)  # an SSD that is asked often has not much to do
    assert looked(disks.Busy, system(tmp_path, disk_use=quiet)) is None


def test_what_disks_do_for_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = system(tmp_path)
    del where.disk_use
    row = " 259 0 nvme0n1 1 0 {} 1 0 0 {} 0 0 {} 1\n"

    def time_passes(seconds: float) -> None:
        (tmp_path / "proc/diskstats").write_text(row.format(2008, 4000, 51))

    monkeypatch.setattr("numaload.doctor.system.time.sleep", time_passes)
    ticks = iter([1.0, 1.1])
    monkeypatch.setattr("numaload.doctor.system.time.perf_counter", lambda: next(ticks))
    assert where.disk_use.rate == pytest.approx(6000 * 512 / 0.1)
    assert where.disk_use.busy == pytest.approx(0.5)


@pytest.mark.parametrize("text", ["", "words", " 8 0 sda 1 0 8 1 0 0 0 0 0 1 1\n"])
def test_disks_of_which_nothing_is_told(tmp_path: Path, text: str) -> None:
    where = system(tmp_path, {"/proc/diskstats": text})
    del where.disk_use
    with pytest.raises(Unknown):
        looked(disks.Busy, where)


def punched(path: Path, size: int = 12 * MIB) -> Path:
    """A model of three tensors of 4 MiB; the second is a hole."""
    rows = [gb.tensor(name, (MIB,), offset=4 * MIB * at) for at, name in enumerate("abc")]
    raw = gb.build([], rows, os.urandom(size))
    with path.open("wb") as file:
        file.write(raw[: -8 * MIB])
        file.seek(4 * MIB, os.SEEK_CUR)
        file.write(raw[-4 * MIB :])
    return path


def test_a_file_with_a_hole(tmp_path: Path) -> None:
    where = System(str(punched(tmp_path / "m.gguf")))
    finding = found(storage.NotWhole, where)
    assert "4.0 MiB from byte" in finding.seen
    assert finding.seen.endswith("in tensors b")
    assert finding.price is None
    assert finding.fix.endswith(f"sha256sum {tmp_path}/m.gguf")
    where.close()


def test_a_damaged_file_of_the_hub_s_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "/c/models--org--some--name/snapshots/abc/q4"
    broken = FormatError("ends early", path=f"{folder}/m-00002-of-00002.gguf")
    where = system(tmp_path, _opened=(None, broken))
    where.path = f"{folder}/m-00001-of-00002.gguf"
    finding = found(storage.NotWhole, where)
    assert finding.seen == str(broken)
    again = "hf download org/some--name q4/m-00002-of-00002.gguf --revision abc"
    assert finding.fix == f"{again} --cache-dir /c --force-download"
    lacking = SplitError("1 of 2 missing", path=where.path, missing=[broken.path or ""])
    where = system(tmp_path, _opened=(None, lacking))
    where.path = lacking.path
    assert found(storage.NotWhole, where).fix == finding.fix
    for name, value in (("HF_HOME", ""), ("XDG_CACHE_HOME", ""), ("HF_HUB_CACHE", "/c")):
        monkeypatch.setenv(name, value)
    assert found(storage.NotWhole, where).fix == f"{again} --force-download"
    monkeypatch.setenv("HF_HUB_CACHE", "")
    monkeypatch.setenv("HOME", "/h")
    for variables, cache in (
        ({}, "/h/.cache/huggingface/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
        ({"HF_HOME": "~/hf"}, "/h/hf/hub"),
    ):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert "--cache-dir" not in storage._again(f"{cache}/models--o--n/snapshots/abc/m.gguf")


def test_what_could_not_be_measured_is_unknown(tmp_path: Path) -> None:
    hidden = system(tmp_path, speeds=Speeds(why_not="the kernel tells its owner only"))
    for check in (reading.Mapped, reading.ReadAhead, disks.Busy, disks.Encrypted):
        with pytest.raises(Unknown, match="its owner only"):
            looked(check, hidden)


LAYERS = {
    "/sys/block/dm-0/queue/read_ahead_kb": "4096\n",
    "/sys/block/dm-0/dm/uuid": "CRYPT-LUKS2-0a-secret\n",
    "/sys/block/dm-0/dm/name": "se cret\n",
    "/sys/block/dm-0/queue/discard_max_bytes": "0\n",
    "/sys/block/dm-0/slaves/md0/x": "",
    "/sys/block/md0/md/degraded": "0\n",
    "/sys/block/md0/slaves/nvme0n1p3/x": "",
}
CRYPT: dict[str, Any] = {
    "device": Device("nvme", "dm-0", "ext4", 1),
    "disks": FileDevice(PATH, "ext4", "dm-0", ("nvme0n1",), (0,), ""),
    "speeds": Speeds(disk=0.5e9, mapped=0.5e9, warm=12e9),
}


def test_slow_decryption(tmp_path: Path) -> None:
    finding = found(disks.Encrypted, system(tmp_path, LAYERS, **CRYPT))
    assert "with se cret (dm-crypt) gives 0.50 GB/s, such disks some 2.00 GB/s" in finding.seen
    assert seconds(finding) == 45.0
    assert "--perf-no_read_workqueue --perf-no_write_workqueue 'se cret'" in finding.fix
    assert "cryptsetup status NAME" in finding.fix
    assert finding.undo == "cryptsetup refresh 'se cret'"
    trims = LAYERS | {"/sys/block/dm-0/queue/discard_max_bytes": "2199023255040\n"}
    finding = found(disks.Encrypted, system(tmp_path / "trims", trims, **CRYPT))
    assert finding.fix.startswith("cryptsetup refresh --allow-discards --perf-no_read_workqueue ")
    assert finding.undo == "cryptsetup refresh --allow-discards 'se cret'"
    assert looked(disks.Encrypted, system(tmp_path, LAYERS, **CRYPT | {"speeds": FAST})) is None
    (tmp_path / "sys/block/dm-0/dm/uuid").write_text("LVM-1\n")
    assert looked(disks.Encrypted, system(tmp_path, **CRYPT)) is None


SSD = {"queue/rotational": "0", "device/vendor": "ATA"}


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (("sda", "sdb"), SSD | {"queue/rotational": "1"}),  # hard disks in an array
        (("sda", "sdb"), SSD),  # a mirror of SATA SSDs
        (("nvme1n1",), {"device/model": "Amazon Elastic Block Store"}),
        (("mmcblk0",), {"queue/rotational": "0"}),
        ((), {}),
    ],
)
def test_disks_that_give_no_more_are_not_slowed_by_encryption(
    tmp_path: Path, names: tuple[str, ...], files: dict[str, str]
) -> None:
    tree = {f"/sys/block/{name}/{at}": f"{text}\n" for name in names for at, text in files.items()}
    said = CRYPT | {"disks": FileDevice(PATH, "ext4", "dm-0", names, (), "")}
    assert looked(disks.Encrypted, system(tmp_path, LAYERS | tree, **said)) is None


def test_encryption_that_is_hidden_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(Unknown):
        looked(disks.Encrypted, system(tmp_path, **CRYPT))


def test_a_degraded_array_claims_first(tmp_path: Path) -> None:
    where = system(tmp_path, LAYERS | {"/sys/block/md0/md/degraded": "1\n"}, **CRYPT)
    finding = found(disks.Degraded, where)
    assert finding.seen == "/sys/block/md0/md/degraded is 1"
    assert seconds(finding) == 30.0
    assert "mdadm --manage /dev/md0 --add" in finding.fix
    assert seconds(found(disks.Encrypted, where)) == 15.0
    assert looked(disks.Degraded, system(tmp_path, LAYERS, **CRYPT)) is None


LOOP = {
    "/sys/block/loop3/queue/x": "",
    "/sys/block/loop3/loop/dio": "0\n",
    "/sys/block/loop3/loop/backing_file": "/images/models.img\n",
}


def test_a_loop_device_without_direct_reads(tmp_path: Path) -> None:
    below = FileDevice(PATH, "ext4", "loop3", ("loop3",), (), "a virtual device")
    said: dict[str, Any] = {"device": Device("unknown", "loop3", "ext4", 1), "disks": below}
    finding = found(disks.Loop, system(tmp_path, LOOP, **said))
    assert finding.seen == "loop3 reads /images/models.img without direct I/O"
    assert seconds(finding) == 2.5  # a copy at 12 GB/s
    assert finding.fix == "losetup --direct-io=on /dev/loop3"
    assert finding.undo == "losetup --direct-io=off /dev/loop3"
    assert looked(disks.Loop, system(tmp_path, LOOP, size=1 << 20, **said)) is None
    direct = LOOP | {"/sys/block/loop3/loop/dio": "1\n"}
    assert looked(disks.Loop, system(tmp_path, direct, **said)) is None


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    silent = Speeds(why_not="m.gguf: no answer for 15 s from server:/m", stalled_s=15.0)
    finding = found(reading.Silent, on_nfs(tmp_path, speeds=silent))
    assert "no answer for 15 s" in finding.seen
    assert finding.price is None
    assert finding.fix.endswith("umount -f -l /models")
    assert finding.root
    refused = Speeds(why_not="its file system maps no files")
    assert looked(reading.Silent, on_nfs(tmp_path, speeds=refused)) is None


@pytest.mark.parametrize(
    ("files", "seen", "fix"),
    [
        ({f"{PCI}/current_link_width": "2\n"}, "16 GT/s x2 of 16 GT/s x4", "seat the SSD"),
        ({f"{PCI}/current_link_speed": "8.0 GT/s PCIe\n"}, "8 GT/s x4 of", "seat the SSD"),
        (
            {f"{PCI}/current_link_speed": "8.0 GT/s PCIe\n", f"{PCI}/power_state": "D3hot\n"},
            "; unproven, as the device sleeps",
            "seat the SSD",
        ),
        (
            {
                f"{PCI}/current_link_speed": "8.0 GT/s PCIe\n",
                f"{PCI}/../max_link_speed": "8.0 GT/s PCIe\n",
                f"{PCI}/../max_link_width": "16\n",
            },
            "its slot gives no more",
            "no setting mends it",
        ),
    ],
)
def test_a_link_that_is_too_slow(
    tmp_path: Path, files: dict[str, str], seen: str, fix: str
) -> None:
    finding = found(disks.SlowLink, system(tmp_path, files))
    assert seen in finding.seen
    assert seconds(finding) == 5.0
    assert finding.fix.startswith(fix)
    assert finding.root == ("dmesg" in finding.fix)
    assert not finding.undo


def test_a_link_that_is_not_what_limits(tmp_path: Path) -> None:
    narrow = {f"{PCI}/current_link_width": "2\n"}
    where = system(tmp_path, narrow, speeds=Speeds(disk=1.0e9))
    assert looked(disks.SlowLink, where) is None
    with pytest.raises(Unknown, match="is no link"):
        looked(disks.SlowLink, system(tmp_path, {f"{PCI}/current_link_speed": "Unknown\n"}))


def whole(path: Path) -> System:
    rows: dict[str, sb.Row] = {"a": ("U8", (20 * MIB,)), "b": ("U8", (5000,))}
    path.write_bytes(sb.build(sb.table(rows), os.urandom(20 * MIB + 5000)))
    evict([str(path)])
    return System(str(path), deep=True)


def test_every_byte_is_read_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    where = whole(path)
    assert looked(storage.Unreadable, where) is None
    where.close()
    assert resident(path) == 0
    assert not storage.Unreadable(System(str(path))).available()


def test_a_part_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = whole(tmp_path / "m.safetensors")

    def read(_: object, view: memoryview, offset: int, way: str) -> None:
        if offset:
            raise ReadError("Input/output error", path="m", offset=offset + 4096)

    monkeypatch.setattr("numaload.files.ways.IntoMemory.read", read)
    finding = found(storage.Unreadable, where)
    monkeypatch.undo()
    assert f"bytes {16 * MIB} to" in finding.seen
    assert "cannot be read (m: Input/output error at byte 16781312), in tensors" in finding.seen
    assert finding.seen.endswith("in tensors a, b")
    assert "sha256sum" in finding.fix
    where.close()


def test_checksums_of_the_store_and_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = tmp_path / "blobs" / ("0" * 64)
    blob.parent.mkdir()
    link = tmp_path / "m.safetensors"
    link.symlink_to(blob)
    where = whole(link)
    assert f"the hub's is {'0' * 64}" in found(storage.Unreadable, where).seen
    size = blob.stat().st_size
    sums = [[(0, 16 * MIB, 1), (16 * MIB, size, 2)]]
    monkeypatch.setattr(storage, "_stored_sums", lambda *_: sums)
    seen = found(storage.Unreadable, where).seen
    assert f"bytes 0 to {16 * MIB} differ from what replicas were built from" in seen
    assert "SHA-256" not in seen
    where.close()


def test_how_small_and_large_sizes_are_written() -> None:
    assert storage.size_of(3 * MIB) == "3.0 MiB"
    assert storage.size_of(3 * GIB) == "3.0 GiB"


def test_a_scheduler_for_hard_disks(tmp_path: Path) -> None:
    place = f"{QUEUE}/scheduler"
    finding = found(disks.Scheduler, system(tmp_path, {place: "none mq-deadline [bfq]\n"}))
    assert finding.seen == f"{place} is bfq"
    assert (finding.fix, finding.undo) == (f"echo none > {place}", f"echo bfq > {place}")
    assert finding.root
    for text in ("[none] bfq", "[mq-deadline] none bfq"):
        assert looked(disks.Scheduler, system(tmp_path, {place: text})) is None
    (tmp_path / place.lstrip("/")).unlink()
    with pytest.raises(Unknown):
        disks.Scheduler(
            constructed(tmp_path / "other", ONE, {f"{QUEUE}/x": ""}, size=SIZE)
        ).measure()


def test_a_file_system_without_direct_reads(tmp_path: Path) -> None:
    finding = found(disks.NotDirect, system(tmp_path, speeds=FAST._replace(direct=False)))
    assert finding.seen == "ext4 refuses O_DIRECT for this file"
    assert seconds(finding) == pytest.approx(SIZE / 12e9, abs=0.1)
    assert looked(disks.NotDirect, system(tmp_path)) is None


def test_getting_memory_is_not_the_disk_s_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an emulated machine it took all of it, and one short read was all that was measured."""
    left: list[float] = []
    buffer = speeds._buffer

    @contextmanager
    def slow() -> Iterator[memoryview]:
        with buffer() as view:
            time.sleep(0.1)
            yield view

    def alone(
        _meter: object, _source: object, _chunks: object, _view: object, until: float
    ) -> None:
        left.append(until - time.perf_counter())

    monkeypatch.setattr(speeds, "_buffer", slow)
    monkeypatch.setattr(speeds._Meter, "_alone", alone)
    (tmp_path / "file").write_bytes(bytes(MIB))
    with SourceFile(str(tmp_path / "file")) as file:
        meter = speeds._Meter(file, residency(file), NVME, QUICK)
        meter._disk([(0, MIB)])
    assert left[0] == pytest.approx(speeds.SHARES["disk"] * QUICK.seconds, abs=0.05)
