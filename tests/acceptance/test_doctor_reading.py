"""``numaload doctor FILE`` reads a little of a real model and leaves RAM as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import safetensors_builder as sb
from commands import KEPT, Numaload, evict, resident
from doctor_systems import constructed
from machines import ONE
from numaload.doctor import disks, reading, storage
from numaload.doctor import speeds as measuring
from numaload.doctor.diagnosis import Diagnosis, diagnose, examine
from numaload.doctor.speeds import Speeds, measure_speeds
from numaload.doctor.system import QUICK, System
from numaload.errors import NumaError, StalledError
from numaload.files.plan import BUFFERED
from numaload.files.residency import length, overlaps, residency
from numaload.files.source import SourceFile
from numaload.files.ways import IntoMemory
from numaload.linux.mounts import mount_of
from numaload.machine.devices import device_of
from numaload.weights.opening import open_weights

pytestmark = [
    pytest.mark.fast,
    pytest.mark.filterwarnings("ignore:.*are on no disk and read as zeros"),
]
MIB = 1 << 20
CHECKS = (*reading.CHECKS, *disks.CHECKS, *storage.CHECKS)
MOST_BYTES, MOST_S = 256 * 10**6, 1.0
SLOW_MACHINE_S = 2.0  # more, where others use disk and CPUs at the same time


@pytest.fixture
def files(model_files: list[str], tmp_path: Path) -> list[str]:
    """Files of this test alone, on a disk and cold."""
    own = [shutil.copy(path, str(tmp_path)) for path in model_files]
    evict(own)
    return own


def state(paths: list[str]) -> list[list[tuple[int, int]]]:
    """What of each file is not in RAM."""
    found = []
    for path in paths:
        with SourceFile(path) as file:
            found.append(list(residency(file).absent))
    return found


def check_unchanged(paths: list[str], before: list[list[tuple[int, int]]]) -> None:
    """Nothing came into RAM, and nothing went but what some machines page out at any time."""
    for was, now, path in zip(before, state(paths), paths, strict=True):
        for start, stop in was:
            assert list(overlaps(now, start, stop)) == [(start, stop)], path
        size = os.path.getsize(path)
        assert size - length(now) >= KEPT * (size - length(was)), path


def warmed(path: str, how: str) -> None:
    size = os.path.getsize(path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead of these
    if how == "warm":
        os.pread(fd, size, 0)
    elif how == "half":
        os.pread(fd, size // 3, size // 3)
    elif how == "pieces":
        for at in range(0, size, 3 * MIB):
            os.pread(fd, MIB, at)
    os.close(fd)


def read_little(found: Diagnosis) -> None:
    assert found.speeds.nbytes <= MOST_BYTES
    assert found.speeds.seconds <= MOST_S + SLOW_MACHINE_S


@pytest.mark.parametrize("how", ["cold", "half", "pieces", "warm"])
def test_what_is_in_ram_is_as_it_was(files: list[str], how: str, numaload: Numaload) -> None:
    warmed(files[0], how)
    before = state(files)
    found = diagnose(files[0])
    check_unchanged(files, before)
    read_little(found)
    assert found.speeds.why_not == ""
    assert found.size == sum(map(os.path.getsize, files))
    assert found.resident is not None
    assert found.load_s is not None
    assert found.speeds.disk
    told = json.loads(numaload.start("doctor", files[0], "--json").communicate()[0])
    check_unchanged(files, before)
    assert told["size"] == found.size


def test_ctrl_c_while_a_header_is_read_leaves_nothing_in_ram(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(path: str, **limits: Any) -> None:
        open_weights(path, **limits).close()
        raise KeyboardInterrupt

    monkeypatch.setattr("numaload.doctor.system.open_weights", interrupted)
    with pytest.raises(KeyboardInterrupt):
        diagnose(files[0])
    assert [resident(path) for path in files] == [0, 0]


def test_ctrl_c_while_every_byte_is_read_leaves_nothing_in_ram(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = IntoMemory.read

    def interrupted(source: IntoMemory, view: memoryview, start: int, _: str) -> None:
        reads(source, view, start, BUFFERED)
        raise KeyboardInterrupt

    monkeypatch.setattr(IntoMemory, "read", interrupted)
    with SourceFile(files[0]) as file, pytest.raises(KeyboardInterrupt):
        next(measuring.pieces(file, [], device_of(file.path)))
    assert resident(files[0]) == 0


def test_what_is_all_in_ram_is_not_read_from_the_disk(files: list[str]) -> None:
    for path in files:
        warmed(path, "warm")
    if any(state(files)):
        pytest.skip("this machine pages out what is idle")
    found = diagnose(files[0])
    assert (found.speeds.disk, found.speeds.mapped) == (None, None)
    assert found.speeds.warm


def test_safetensors_of_several_files(tmp_path: Path) -> None:
    paths = []
    for i in (1, 2, 3):
        rows: dict[str, sb.Row] = {f"w{i}": ("U8", (4 * MIB,))}
        shard = tmp_path / f"model-{i:05d}-of-00003.safetensors"
        shard.write_bytes(sb.build(sb.table(rows), os.urandom(4 * MIB)))
        paths.append(str(shard))
    evict(paths)
    for path, deep in ((paths[1], False), (paths[1], True), (str(tmp_path), False)):
        found = diagnose(path, deep=deep)
        assert found.size == sum(map(os.path.getsize, paths))
        assert found.speeds.disk
        assert "NL109" not in ids(found)
        assert "NL117" not in ids(found)
        assert [resident(each) for each in paths] == [0, 0, 0]


def ids(found: Diagnosis) -> list[str]:
    return [finding.id for finding in found.findings]


def test_a_hole_is_not_measured_and_is_found(tmp_path: Path) -> None:
    """Reading it would say that the disk is as fast as memory."""
    path = tmp_path / "m.safetensors"
    rows: dict[str, sb.Row] = {"a": ("U8", (64 * MIB,))}
    with path.open("wb") as file:
        file.write(sb.build(sb.table(rows), b""))
        file.truncate(file.tell() + 64 * MIB)
    evict([str(path)])
    found = diagnose(path)
    assert "NL109" in ids(found)
    assert found.speeds.disk is None
    assert "hole" in found.speeds.why_not
    assert found.load_s is None
    assert resident(path) == 0


def test_a_file_that_was_cut(files: list[str], numaload: Numaload) -> None:
    os.truncate(files[1], os.path.getsize(files[1]) // 2)
    evict(files)
    done = numaload("doctor", files[1], status=1)
    assert "NL109" in done.stdout
    assert "sha256sum" in done.stdout
    assert [resident(path) for path in files] == [0, 0]
    os.unlink(files[0])
    assert "NL109" in numaload("doctor", files[1], status=1).stdout


def test_what_is_no_file(tmp_path: Path, numaload: Numaload) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        done = numaload("doctor", path, status=3)
        assert "numaload: error:" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [1, 4095, 4096, 5000, 300_000])
def test_files_of_a_few_pages(tmp_path: Path, size: int) -> None:
    path = tmp_path / "small"
    path.write_bytes(os.urandom(size))
    evict([str(path)])
    found = measured(str(path))
    assert bool(found.disk or found.mapped) == (size >= 4096)
    assert bool(found.why_not) == (size < 4096)
    assert resident(path) == 0


def measured(path: str, **options: Any) -> Speeds:
    with SourceFile(path) as file:
        return measure_speeds([file], [residency(file)], device_of(path, **options), QUICK)


def test_a_file_system_that_maps_no_files(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise NumaError("mmap: its file system maps no files", errno=errno.ENODEV)

    monkeypatch.setattr(measuring, "map_file", refused)
    found = measured(files[0])
    assert found.disk
    assert found.mapped is None
    assert "maps no files" in found.why_not


def test_a_page_that_cannot_be_read(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is cut while it is measured: that is an error, not a signal."""
    touch = measuring._Meter._touch

    def cut(self: Any, view: memoryview, start: int, stop: int, ends: Any) -> None:
        os.truncate(files[0], start + 8192)
        touch(self, view, start, stop, ends)

    monkeypatch.setattr(measuring._Meter, "_touch", cut)
    found = measured(files[0])
    assert found.disk
    assert found.mapped is None
    assert "this page cannot be read at byte" in found.why_not


def test_a_server_that_falls_silent(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: object) -> None:
        raise StalledError("no answer for 15 s from server:/m", path=files[0], seconds=15.0)

    monkeypatch.setattr("numaload.files.ways.IntoMemory.read", silent)
    found = measured(files[0])
    assert (found.stalled_s, found.disk, found.mapped) == (15.0, None, None)
    assert "no answer" in found.why_not


def test_files_of_others_are_not_measured(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with SourceFile(files[0]) as file:
        hidden = residency(file)._replace(known=False)
        found = measure_speeds([file], [hidden], device_of(files[0]), QUICK)
    assert found == Speeds(why_not=measuring.HIDDEN)


ROW = "30 22 0:45 / /models rw - nfs4 {source} rw,rsize={rsize}{more}\n"
ROOT = "22 1 259:0 / / rw - ext4 /dev/nvme0n1 rw\n"


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (ROW.format(source="server:/m", rsize=1048576, more=",nconnect=8"), {"NL106"}),
        (ROW.format(source="server:/m", rsize=65536, more=",nconnect=8"), {"NL103", "NL106"}),
        (ROW.format(source="server:/m", rsize=1048576, more=""), {"NL104", "NL106"}),
        (ROW.format(source="server:/m", rsize=65536, more=""), {"NL103", "NL104", "NL106"}),
        (ROW.format(source="localhost:/", rsize=65536, more=",addr=127.0.0.1"), {"NL105"}),
        ("30 22 0:45 / /models rw - fuse hf-mount rw\n", {"NL105"}),
        ("30 22 0:45 / /models rw - virtiofs models rw\n", {"NL106"}),
    ],
)
def test_the_mount_table_decides(tmp_path: Path, row: str, expected: set[str]) -> None:
    table = {"/proc/self/mountinfo": ROOT + row}
    system = constructed(
        tmp_path, ONE, table, size=30 * 10**9, speeds=Speeds(disk=0.5e9, mapped=0.4e9, warm=9e9)
    )
    path = "/models/m.gguf"
    system.mount = mount_of(path, system.proc, "0:45")
    system.device = device_of(
        path, network="virtiofs" not in row, sys_root=system.sys, proc_root=system.proc,
        numbers=(0, 45),
    )  # fmt: skip
    found = examine(system, CHECKS)
    assert set(ids(found)) == expected
    prices = [finding.price for finding in found.findings]
    assert all(price is not None and price.how == "estimated" for price in prices)
    assert sum(price.seconds for price in prices if price) <= 30e9 / 0.4e9


def test_the_whole_look_is_short(files: list[str]) -> None:
    system = System(files[0])
    system.speeds = Speeds(disk=1e9, mapped=1e9, warm=9e9)  # measured already
    found = examine(system, CHECKS)
    system.close()
    assert found.seconds < MOST_S
