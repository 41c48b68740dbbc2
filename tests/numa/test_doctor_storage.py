"""``numaload doctor`` on a slow disk, and on files that come by NFS: the kernel's own server.

Needs a guest with both: scripts/numa-vm --disk 256M --modules dm-mod,dm-delay,ext4,nfs,nfsv4,nfsd
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from blockdevices import MappedDisk, Volume, mounted, need_disk, shell
from commands import Numaload, evict, resident
from nfs_server import ELSEWHERE, HERE, exported

MIB = 1 << 20
SLOW_MS = 20  # for a request, as a hard disk that seeks
SMALL = 4096  # bytes of a request
STORAGE = ("NL101", "NL102", "NL103", "NL104", "NL105", "NL106", "NL107", "NL109")


def storage(told: Any) -> dict[str, dict[str, Any]]:
    """What is wrong with the storage, most expensive first, and nothing of it is not known."""
    assert [one for one in told["unknown"] if one["id"] in STORAGE] == []
    return {one["id"]: one for one in told["findings"] if one["id"] in STORAGE}


@pytest.fixture
def volume(model_files: list[str], tmp_path: Path) -> Iterator[Volume]:
    disk = MappedDisk("slow", need_disk("disk0"))
    volume = mounted(disk, tmp_path / "volume", model_files)
    yield volume
    shell("umount", volume.mount)
    disk.remove()


def test_a_slow_disk_that_is_read_too_little_ahead(volume: Volume, numaload: Numaload) -> None:
    queue = Path(f"/sys/block/{Path(volume.disk.path).name}/queue/read_ahead_kb")
    volume.disk.delay(SLOW_MS)
    queue.write_text("16\n")  # which another table of the disk would take back
    evict(volume.files)
    before = numaload.doctor(volume.model)
    finding = before["findings"][0]
    assert finding["id"] == "NL102"
    assert finding["seen"].startswith(f"{queue} is 16, expected 4096 or more: ")
    assert finding["price"]["seconds"] > 10
    assert finding["root"]

    subprocess.run(["sh", "-c", finding["fix"]], check=True)
    after = numaload.doctor(volume.model)
    assert "NL102" not in storage(after)
    assert after["speeds"]["mapped"] > 4 * before["speeds"]["mapped"]
    assert after["load_s"] < before["load_s"] - finding["price"]["seconds"] / 2

    subprocess.run(["sh", "-c", finding["undo"]], check=True)
    assert queue.read_text() == "16\n"
    assert resident(volume.files) == 0


@pytest.fixture(scope="module")
def exporting(model_files: list[str]) -> Iterator[Path]:
    """A folder that can be exported, with the model."""
    need_disk("disk0")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    for path in model_files:
        shutil.copy(path, folder)
    yield folder
    shutil.rmtree(folder)


def seen_by_nfs(numaload: Numaload, point: Path) -> dict[str, dict[str, Any]]:
    """What the doctor finds of the model in this mount; what of it is in RAM stays so."""
    files = sorted(map(str, point.iterdir()))
    with open(files[0], "rb") as file:
        file.read(MIB)
    before = resident(files)
    assert MIB <= before < sum(map(os.path.getsize, files)) / 2
    told = numaload.doctor(files[0])
    assert resident(files) == before
    assert told["speeds"]["disk"]
    return storage(told)


def test_small_requests_to_another_machine(
    exporting: Path, numaload: Numaload, tmp_path: Path
) -> None:
    point = tmp_path / "nfs"
    with exported(exporting, point, f"rsize={SMALL}", ELSEWHERE):
        found = seen_by_nfs(numaload, point)
    finding = found["NL103"]
    assert (
        finding["seen"]
        == f"{ELSEWHERE}:/ (nfs4, mounted at {point}) has rsize=4096, expected 1048576"
    )
    assert finding["price"]["seconds"] > 0.1
    assert "NL106" in found
    assert "NL105" not in found
    words = shlex.split(finding["fix"])
    assert words[:6] == ["umount", str(point), "&&", "mount", "-t", "nfs4"]
    assert words[-2:] == [f"{ELSEWHERE}:/", str(point)]
    # mount.nfs, which few machines have, adds the addresses, as this does.
    with exported(exporting, point, words[words.index("-o") + 1], ELSEWHERE):
        assert "NL103" not in seen_by_nfs(numaload, point)


def test_a_server_on_this_machine(exporting: Path, numaload: Numaload, tmp_path: Path) -> None:
    """Larger requests would not help: the program that serves it is what takes the time."""
    point = tmp_path / "nfs"
    with exported(exporting, point, f"rsize={SMALL}", HERE):
        found = seen_by_nfs(numaload, point)
    seen = found["NL105"]["seen"]
    assert seen.startswith(f"{HERE}:/ (nfs4, mounted at {point}) is served")
    assert "by this machine: " in seen
    assert found["NL105"]["price"]["seconds"] > 0.5
    assert found.keys() <= {"NL105", "NL102"}
