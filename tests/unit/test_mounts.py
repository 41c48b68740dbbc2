"""Which mount a path is on, and which paths lead to a network, from recorded mounts."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from numaload.errors import StoreError
from numaload.linux import mounts
from numaload.linux.mounts import (
    Mount,
    has_networks,
    is_network,
    mount_of,
    mount_with,
    network_of,
)
from numaload.machine import userdir

ROW = "{id} 1 {device} /a\\040b {point} rw,relatime shared:1 - {kind} source {options}\n"


def write(root: Path, *mounts: tuple[str, str, str]) -> str:
    (root / "proc/self").mkdir(parents=True)
    rows = [
        ROW.format(id=20 + i, device=device, point=point, kind=kind, options="rw,size=64k")
        for i, (device, point, kind) in enumerate(mounts)
    ]
    (root / "proc/self/mountinfo").write_text("".join(rows))
    return str(root / "proc")


def device_of(path: Path) -> str:
    device = os.stat(path).st_dev
    return f"{os.major(device)}:{os.minor(device)}"


def test_by_device_and_nearest_above(tmp_path: Path) -> None:
    device, folder = device_of(tmp_path), os.path.realpath(tmp_path)
    root = write(
        tmp_path / "root",
        (device, "/", "ext4"), (device, folder, "tmpfs"), ("0:999", f"{folder}/x", "nfs"),
    )  # fmt: skip
    expected = Mount(
        device,
        folder,
        "tmpfs",
        "rw,size=64k",
        "source",
        "21",
        "1",
        root="/a b",
        flags="rw,relatime",
    )
    assert mount_of(str(tmp_path), root) == expected


def test_a_device_that_is_listed_nowhere(tmp_path: Path) -> None:
    """As of the subvolumes of btrfs: what is mounted nearest above counts."""
    parent = os.path.realpath(tmp_path.parent)
    root = write(tmp_path / "root", ("0:998", "/", "ext4"), ("0:999", parent, "btrfs"))
    found = mount_of(str(tmp_path), root)
    assert found is not None
    assert found.kind == "btrfs"


def test_names_with_blanks(tmp_path: Path) -> None:
    folder = tmp_path / "with blank"
    folder.mkdir()
    written = os.path.realpath(folder).replace(" ", "\\040")
    root = write(tmp_path / "root", ("0:999", written, "tmpfs"))
    found = mount_of(str(folder), root)
    assert found is not None
    assert found.point == os.path.realpath(folder)


def test_nothing_is_known_without_mountinfo(tmp_path: Path) -> None:
    assert mount_of(str(tmp_path), str(tmp_path / "none")) is None


def test_a_store_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mount = Mount("0:1", "/", "btrfs", "")
    monkeypatch.setattr(userdir, "mount_of", lambda _: mount)
    with pytest.raises(StoreError, match="is on btrfs, expected a tmpfs"):
        userdir.check_tmpfs(str(tmp_path))


NFS = "server:/models"


class Machine:
    """Folders below one of this test's, and what is mounted there."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        self.proc = self.root / "proc"
        (self.proc / "self").mkdir(parents=True)
        self.rows = ["20 1 8:1 / / rw - ext4 /dev/sda1 rw"]
        self.write()

    def write(self) -> None:
        (self.proc / "self/mountinfo").write_bytes(("\n".join(self.rows) + "\n").encode())

    def mount(self, number: int, on: int, point: str, kind: str, source: str = NFS) -> None:
        where = str(self.root / point).replace(" ", "\\040")
        self.rows.append(f"{number} {on} 0:{number} / {where} rw shared:1 - {kind} {source} rw")
        self.write()

    def ask(self, path: str) -> str | None:
        """Source of the network file system that this path leads to."""
        found = network_of(str(self.root / path), str(self.proc))
        return found.source if found else None


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "smb3", "ceph", "fuse", "fuse.sshfs"])
def test_kinds_of_networks(machine: Machine, kind: str) -> None:
    machine.mount(30, 20, "net", kind)
    assert machine.ask("net/a/b") == NFS
    assert machine.ask("net") == NFS
    assert machine.ask("other") is None
    assert machine.ask("nets/a") is None
    assert has_networks(str(machine.proc))


@pytest.mark.parametrize(
    "kind", ["ext4", "9p", "virtiofs", "fuseblk", "fuse.fuse-overlayfs", "fusectl", "tmpfs"]
)
def test_kinds_of_this_machine(machine: Machine, kind: str) -> None:
    machine.mount(30, 20, "net", kind)
    assert not is_network(kind)
    assert machine.ask("net/a") is None
    assert not has_networks(str(machine.proc))


def test_links_are_followed(machine: Machine) -> None:
    machine.mount(30, 20, "net", "nfs")
    (machine.root / "here").mkdir()
    (machine.root / "here/there").symlink_to("../net/models")
    (machine.root / "again").symlink_to(machine.root / "here/there")
    (machine.root / "round").symlink_to("round")
    (machine.root / "net").mkdir()
    assert machine.ask("again/m.gguf") == NFS
    assert machine.ask("here/../net/m.gguf") == NFS
    assert machine.ask("here/./there") == NFS
    assert machine.ask("round/m.gguf") is None
    assert machine.ask("here/../../../../../../../../../..") is None


def test_nothing_on_the_network_is_looked_at(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.mount(30, 20, "net", "nfs")
    asked: list[str] = []
    real = os.readlink

    def readlink(path: str) -> str:
        asked.append(path)
        return real(path)

    monkeypatch.setattr(os, "readlink", readlink)
    assert machine.ask("net/a/b/c") == NFS
    assert asked
    assert not [path for path in asked if path.startswith(str(machine.root / "net"))]


def test_what_is_mounted_below_another_is_not_seen(machine: Machine) -> None:
    machine.mount(30, 20, "a/net", "nfs")
    assert machine.ask("a/net/x") == NFS
    machine.mount(31, 20, "a", "ext4", "/dev/sdb")
    assert machine.ask("a/net/x") is None
    machine.mount(32, 31, "a/net", "nfs", "other:/x")
    machine.mount(33, 32, "a/net", "nfs", "last:/x")
    assert machine.ask("a/net/x") == "last:/x"


def test_a_disk_inside_of_a_network(machine: Machine) -> None:
    """Its names are looked up on the way there."""
    machine.mount(30, 20, "net", "nfs")
    machine.mount(31, 30, "net/disk", "ext4", "/dev/sdb")
    assert machine.ask("net/disk/x") == NFS


def test_names_with_blanks_of_networks(machine: Machine) -> None:
    machine.mount(30, 20, "a b", "nfs", "server:/a\\040b")
    assert machine.ask("a b/x") == "server:/a b"


def test_by_device(machine: Machine) -> None:
    machine.mount(30, 20, "net", "nfs")
    found = mount_with(os.makedev(0, 30), str(machine.proc))
    assert found is not None
    assert str(found) == f"{NFS} (nfs, mounted at {machine.root}/net)"
    assert mount_with(os.makedev(0, 31), str(machine.proc)) is None


def test_no_network_is_known(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.mount(30, 20, "net", "nfs")
    assert network_of(f"{machine.root}/net/\0", str(machine.proc)) is not None
    assert network_of(f"{machine.root}/\0", str(machine.proc)) is None
    assert network_of("/x", "/nowhere") is None
    gone = machine.root / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert network_of("x", str(machine.proc)) is None


@pytest.mark.parametrize("end", ["\r", "\x0b", "\x1c", "\x85", "\u2028"])
def test_a_row_ends_where_the_kernel_ends_it(machine: Machine, end: str) -> None:
    """At a newline alone: in names the kernel escapes that, blanks and backslashes, no others."""
    machine.mount(30, 20, f"net{end}work", "nfs")
    assert machine.ask(f"net{end}work/a") == NFS
    assert has_networks(str(machine.proc))


def test_a_table_is_read_anew_when_it_is_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is mounted while the process runs is seen, and one opening reads the table once."""
    now, read = [100.0], list[str]()
    text = ["20 1 8:1 / / rw - ext4 /dev/sda1 rw"]

    class Files:
        def text(self, path: str) -> str:
            read.append(path)
            return text[0]

    monkeypatch.setattr(mounts, "SysFiles", Files)
    monkeypatch.setattr(mounts, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(mounts, "_last", (0.0, mounts._Table("")))
    assert network_of("/net/x") is None
    text[0] += "\n30 20 0:30 / /net rw - nfs server:/x rw"
    assert network_of("/net/x") is None
    assert read == ["/proc/self/mountinfo"]
    now[0] += 2 * mounts.FRESH_S
    found = network_of("/net/x")
    assert found is not None
    assert found.source == "server:/x"
    assert len(read) == 2
