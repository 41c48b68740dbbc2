"""``numaload tune`` on a disk whose every request waits, beside one whose requests do not.

Needs a guest with both: scripts/numa-vm --disk 256M --disk 128M:nvme --modules dm-mod,dm-delay,ext4
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from blockdevices import MappedDisk, mounted, need_disk, shell
from commands import Numaload, evict, resident

MIB = 1 << 20
SLOW_MS = 50  # for a request, as a storage far away


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[str]]:
    """One on the slow disk, and one on the other."""
    disks = [
        MappedDisk(name, need_disk(disk)) for name, disk in (("slow", "disk0"), ("b", "disk1"))
    ]
    made = []
    for disk, nbytes in zip(disks, (196 * MIB, 8 * MIB), strict=True):
        volume = mounted(disk, tmp_path / disk.name, [])
        made.append(str(volume.mount / "model"))
        Path(made[-1]).write_bytes(bytes(range(256)) * (nbytes // 256))
    evict(made)
    disks[0].delay(SLOW_MS)
    yield made
    disks[0].work()
    for disk in disks:
        shell("umount", tmp_path / disk.name)
        disk.remove()


def test_a_plan_tuned_for_one_disk_is_used_there_alone(
    files: list[str], numaload: Numaload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is faster depends on what else runs: emulation makes all of it slow."""
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    slow, other = files
    report = numaload.json("tune", slow)
    assert resident(slow) == 0
    found = report["sinks"]["page cache"]
    is_default = all(found[key] == value for key, value in found["default"].items())
    assert (found["gain"] > 1) != is_default
    plan = numaload.json("prewarm", slow)["plan"]
    if found["too_slow"]:
        assert "tuned" not in plan["why"]
    else:
        assert (plan["way"], plan["threads"]) == (found["name"], found["threads"])
        assert "; tuned 2" in plan["why"]
    done = numaload("prewarm", other)
    assert "plan: " in done.stderr
    assert "tuned" not in done.stderr
