"""Point 6 where the storage itself fails: bad blocks, slow disks, disks that go away.

Needs a guest with disks: scripts/numa-vm --disk 256M --disk 128M:nvme:node=1 --modules
dm-mod,dm-delay,ext4,fuse,nfs
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import numaload as api
from blockdevices import SECTOR, MappedDisk, Volume, disk_of, mounted, need_disk, shell
from commands import LIMIT_S, Numaload, evict, resident, used_bytes, wait_for
from numaload.demo import write_model
from numaload.files.residency import cached_on, residency
from numaload.files.source import SourceFile
from witness import PAGE

MIB = 1 << 20
EIO = os.strerror(errno.EIO)
SLOW_MS = 100  # for a request, of which one read of 8 MiB makes 64
NAME = "blk.0.attn_q.weight"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, model_files: list[str]) -> Iterator[Volume]:
    disk = MappedDisk("faulty", need_disk("disk0"))
    volume = mounted(disk, tmp_path_factory.mktemp("volume"), model_files)
    yield volume
    shell("umount", volume.mount)
    disk.remove()


@pytest.fixture
def volume(ready: Volume, model_files: list[str]) -> Iterator[Volume]:
    ready.repair(model_files)
    yield ready
    ready.repair(model_files)


def failed(numaload: Numaload, *words: object) -> str:
    """A verb that fails in good order: exit status 1, one error, nothing left in the store."""
    before = used_bytes(numaload.store.parent)
    text = numaload(*words, status=1).stderr
    assert "Traceback" not in text
    assert entries(numaload) == []
    assert used_bytes(numaload.store.parent) - before < MIB
    (line,) = [line for line in text.splitlines() if line.startswith("numaload: error:")]
    return line


def entries(numaload: Numaload) -> list[str]:
    """What the store holds but for lock, marker, the list of models used, and empty folders."""
    names = (str(path.relative_to(numaload.store)) for path in numaload.store.rglob("*"))
    usual = ("lock", "reading", "reading/locks", "prewarming", "numaload-store")
    return [name for name in names if name not in usual and not name.startswith("known")]


def works_again(numaload: Numaload, volume: Volume, originals: list[str]) -> None:
    volume.repair(originals)
    (report,) = numaload.json("mirror", volume.model)
    assert report["placed"]
    assert numaload.json("verify")[0]["right"]
    numaload("release")


@pytest.mark.parametrize("verb", ["inspect", "prewarm", "plan", "mirror"])
def test_a_bad_first_block_is_named(volume: Volume, numaload: Numaload, verb: str) -> None:
    volume.break_file(volume.model, 0)
    assert f"{volume.model}: {EIO} at byte 0" in failed(numaload, verb, volume.model)


def bad_place(volume: Volume) -> tuple[str, int]:
    """A page in the middle of the second file, of which others are read before and after."""
    path = volume.files[1]
    return path, os.path.getsize(path) // 2 // PAGE * PAGE


def test_prewarm_names_a_bad_block_in_the_middle(
    volume: Volume, numaload: Numaload, model_files: list[str]
) -> None:
    path, offset = bad_place(volume)
    volume.break_file(path, offset)
    assert f"{path}: {EIO} at byte {offset}" in failed(numaload, "prewarm", volume.model)
    volume.repair(model_files)
    assert numaload.json("prewarm", volume.model)["done"]


def test_mirror_takes_everything_back_at_a_bad_block(
    volume: Volume, numaload: Numaload, model_files: list[str]
) -> None:
    path, offset = bad_place(volume)
    volume.break_file(path, offset)
    numaload("plan", volume.model)  # headers are elsewhere: what that reads may stay
    before = resident(volume.files)
    assert f"{path}: {EIO} at byte {offset}" in failed(numaload, "mirror", volume.model)
    assert resident(volume.files) - before < MIB // 4
    works_again(numaload, volume, model_files)


@pytest.mark.parametrize("shared", [False, True])
def test_errors_of_the_api_tell_where(volume: Volume, store: Path, *, shared: bool) -> None:
    path, offset = bad_place(volume)
    volume.break_file(path, offset)
    calls: list[Callable[[], object]] = [
        lambda: api.prewarm(volume.model),
        lambda: api.mirror(volume.model, shared=shared),
    ]
    used, before = used_bytes(store.parent), anonymous_bytes()
    for call in calls:
        with pytest.raises(api.errors.ReadError) as caught:
            call()
        assert (caught.value.path, caught.value.offset) == (path, offset)
    assert used_bytes(store.parent) - used < MIB
    assert anonymous_bytes() - before < 20 * MIB  # the model has 36, twice that was to be built


def anonymous_bytes() -> int:
    text = Path("/proc/self/status").read_text()
    return 1024 * int(text.partition("RssAnon:")[2].split()[0])


def test_a_short_read_is_continued_up_to_the_error(volume: Volume) -> None:
    """Before bad blocks the kernel gives what it has, then the error."""
    path, offset = bad_place(volume)
    original = Path(path).read_bytes()
    volume.break_file(path, offset)
    with SourceFile(path) as file:
        assert os.preadv(file.fd, [bytearray(3 * PAGE)], offset - 2 * PAGE) == 2 * PAGE
        assert file.read_at(offset - 9 * PAGE, 9 * PAGE) == original[offset - 9 * PAGE : offset]
        with pytest.raises(api.errors.ReadError) as caught:
            file.read_at(offset - 9 * PAGE, 20 * PAGE)
        assert caught.value.offset == offset
        assert file.read_at(offset + PAGE, PAGE) == original[offset + PAGE : offset + 2 * PAGE]


def test_status_of_a_file_with_bad_blocks(
    volume: Volume, numaload: Numaload, nodes: list[int]
) -> None:
    """It looks at page cache through a mapping, and lives: what is in RAM can be touched."""
    path, offset = bad_place(volume)
    volume.break_file(path, offset)
    failed(numaload, "prewarm", volume.model)
    rows = {row["path"]: row for row in numaload.json("status", volume.model)["page_cache"]}
    assert 0 < rows[path]["resident"] < rows[path]["size"]
    for row in rows.values():
        assert sum(row["on_nodes"].values()) >= row["resident"]
        assert set(map(int, row["on_nodes"])) <= set(nodes)


def test_page_cache_lost_before_it_is_counted(volume: Volume) -> None:
    """Found in RAM, dropped since, and its blocks are bad: mapping that would kill, or hang."""
    path, offset = bad_place(volume)
    with SourceFile(path) as file:
        file.read_at(0, file.size)
        found = residency(file)
        assert found.resident == file.size
        volume.break_file(path, offset)
        with pytest.raises(api.errors.ReadError):
            file.read_at(offset - MIB, 2 * MIB)
        left = residency(file).resident
        assert 0 < left < file.size
        assert sum(cached_on(file, found).values()) == left


def test_a_mapped_view_of_a_bad_block_kills_who_touches_it(volume: Volume) -> None:
    """That is what a mapping is, and why docs say so. The process that holds it must know."""
    with api.open(volume.model) as weights:
        tensor = weights[NAME]
        start = -(-tensor.offset // PAGE) * PAGE
        volume.break_file(tensor.path, start)
        view = tensor.buffer
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGBUS, signal.SIG_DFL)  # without a dump of pytest's
            os._exit(view[start - tensor.offset] & 0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS
        view.release()


def test_a_replica_outlives_its_disk(
    volume: Volume, numaload: Numaload, model_files: list[str]
) -> None:
    numaload("mirror", volume.model)
    volume.break_all()
    (entry,) = numaload.json("status")["replicas"]
    assert entry["source"] in ("unreadable", "gone")
    (row,) = numaload.json("verify")
    assert row["right"]
    replica = entry["replicas"][min(entry["replicas"])][0]
    assert Path(replica).read_bytes() == Path(model_files[0]).read_bytes()
    numaload("release")


@pytest.mark.parametrize("verb", ["inspect", "prewarm", "mirror"])
def test_a_dead_disk_is_no_missing_file(volume: Volume, numaload: Numaload, verb: str) -> None:
    """Not even names can be looked up then: the error is the disk's, not that files are missing."""
    volume.break_all()
    line = failed(numaload, verb, volume.model)
    assert volume.model in line
    assert EIO in line


def reading(volume: Volume, numaload: Numaload, verb: str) -> subprocess.Popen[str]:
    """A verb in the midst of reading weights from a slow disk."""
    volume.disk.delay(SLOW_MS)
    sectors, used = volume.disk.sectors_read(), used_bytes(numaload.store.parent)

    def begun() -> bool:
        if verb == "mirror":  # before there are pages, headers are read
            return used_bytes(numaload.store.parent) - used > MIB
        return volume.disk.sectors_read() - sectors > 3 * MIB // SECTOR

    job = numaload.start(verb, volume.model)
    wait_for(begun, "the reading to begin")
    assert job.poll() is None
    return job


def ended(job: subprocess.Popen[str]) -> tuple[int, str]:
    _, text = job.communicate(timeout=LIMIT_S)
    assert "Traceback" not in text
    return job.returncode, text


@pytest.mark.parametrize("verb", ["prewarm", "mirror"])
def test_interrupted_while_the_disk_is_slow(volume: Volume, numaload: Numaload, verb: str) -> None:
    before = used_bytes(numaload.store.parent)
    job = reading(volume, numaload, verb)
    job.send_signal(signal.SIGINT)
    status, text = ended(job)
    assert status == 130
    assert "interrupted" in text
    assert used_bytes(numaload.store.parent) - before < MIB
    assert entries(numaload) == []


def twice(job: subprocess.Popen[str]) -> None:
    for _ in range(2):
        job.send_signal(signal.SIGINT)
        time.sleep(0.1)


def test_interrupted_twice_while_the_disk_stands_still(
    volume: Volume, numaload: Numaload, model_files: list[str]
) -> None:
    """What waits for the page cache can be ended; this does not wait for the disk."""
    job = reading(volume, numaload, "prewarm")
    volume.disk.hold()
    try:
        twice(job)
        status, text = ended(job)
    finally:
        volume.disk.work()
    assert status == 130
    assert "interrupted" in text
    works_again(numaload, volume, model_files)


def test_past_the_page_cache_nothing_ends_what_waits(
    volume: Volume, numaload: Numaload, model_files: list[str]
) -> None:
    """The kernel writes to that memory: it keeps the process until the disk has answered."""
    before = used_bytes(numaload.store.parent)
    job = reading(volume, numaload, "mirror")
    volume.disk.hold()
    try:
        twice(job)
    finally:
        volume.disk.work()
    status, text = ended(job)
    assert status == 130
    assert "interrupted" in text
    assert used_bytes(numaload.store.parent) - before < MIB
    works_again(numaload, volume, model_files)


@pytest.mark.parametrize("verb", ["prewarm", "mirror"])
def test_the_disk_dies_while_it_is_read(volume: Volume, numaload: Numaload, verb: str) -> None:
    before = used_bytes(numaload.store.parent)
    job = reading(volume, numaload, verb)
    volume.disk.fail()
    status, text = ended(job)
    assert status == 1
    assert EIO in text
    assert used_bytes(numaload.store.parent) - before < MIB


@pytest.mark.parametrize("verb", ["prewarm", "mirror"])
def test_the_file_is_cut_while_it_is_read(volume: Volume, numaload: Numaload, verb: str) -> None:
    before = used_bytes(numaload.store.parent)
    job = reading(volume, numaload, verb)
    os.truncate(volume.files[1], PAGE)
    volume.disk.work()
    status, text = ended(job)
    assert status == 1
    assert volume.files[1] in text
    assert used_bytes(numaload.store.parent) - before < MIB
    assert entries(numaload) == []


def test_a_disk_s_node(nodes: list[int]) -> None:
    found = Path("/sys/block", Path(need_disk("disk1")).name).resolve()
    files = [p / "numa_node" for p in found.parents if (p / "numa_node").exists()]
    assert int(files[0].read_text()) == nodes[1]


def test_a_disk_is_unplugged_and_comes_back(
    numaload: Numaload, model_files: list[str], tmp_path: Path
) -> None:
    name = Path(need_disk("disk1")).name
    device = next(
        p for p in Path(f"/sys/block/{name}").resolve().parents if (p / "remove").exists()
    )
    disk = MappedDisk("unplugged", f"/dev/{name}")
    volume = mounted(disk, tmp_path / "volume", model_files)
    evict(volume.files)
    job = reading(volume, numaload, "mirror")
    (device / "remove").write_text("1")
    status, text = ended(job)
    assert status == 1
    assert EIO in text
    assert entries(numaload) == []
    shell("umount", volume.mount)
    disk.remove()
    Path("/sys/bus/pci/rescan").write_text("1")
    wait_for(lambda: disk_of("disk1") is not None, "the disk to come back")
    found = disk_of("disk1")
    assert found
    disk = MappedDisk("plugged", found)
    try:
        shell("mount", disk.path, volume.mount)
        works_again(numaload, volume._replace(disk=disk), model_files)
        shell("umount", volume.mount)
    finally:
        disk.remove()


def test_file_systems_for_later() -> None:
    need_disk("disk0")
    names = Path("/proc/filesystems").read_text().split()
    assert {"ext4", "fuse", "nfs"} <= set(names)
    os.close(os.open("/dev/fuse", os.O_RDWR))


def test_mirror_on_all_nodes_reads_the_file_once(
    volume: Volume, numaload: Numaload, nodes: list[int]
) -> None:
    """What is read twice is the MiB that tells whose replica it is, and the file system's own."""
    (path,) = write_model(str(volume.mount / "large.gguf"), 112 * MIB)
    size = os.path.getsize(path)
    evict([path])
    before = volume.disk.sectors_read()
    (report,) = numaload.json("mirror", path, "--nodes", "all")
    read = (volume.disk.sectors_read() - before) * SECTOR
    assert report["placed"]
    assert report["copied"] == len(nodes) * size
    assert size <= read <= 1.02 * size
    assert report["plan"]["way"] == "direct"
    assert resident(path) < size / 4
    numaload("release")
    os.unlink(path)


@pytest.mark.parametrize("way", ["mapped", "buffered"])
def test_page_cache_in_huge_reads_is_all_there(
    volume: Volume, numaload: Numaload, way: str
) -> None:
    """Also where the file system has no huge folios, as ext4 here."""
    evict(volume.files)
    report = numaload.json("prewarm", volume.model, "--way", way)
    assert report["done"]
    assert report["plan"]["way"] == way
    assert resident(volume.files) == sum(map(os.path.getsize, volume.files))
