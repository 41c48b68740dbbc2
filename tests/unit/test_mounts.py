"""Which mount a path is on, devices that are listed nowhere included."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from numaload.errors import StoreError
from numaload.numa.mounts import Mount, mount_of
from numaload.storage import userdir

ROW = "{id} 1 {device} / {point} rw,relatime shared:1 - {kind} source {options}\n"


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
    assert mount_of(str(tmp_path), root) == Mount(device, folder, "tmpfs", "rw,size=64k", "source")


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
