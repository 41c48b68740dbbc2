"""Point 2, ``evict``: page cache is given back without root, and what stays is explained."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import numaload as api
from commands import KEPT, Numaload, resident
from numaload.files.source import SourceFile
from numaload.linux import syscalls

MIB = 1 << 20
PAGE = mmap.PAGESIZE
KEEP = """
import ctypes, mmap, sys
file = open(sys.argv[1], "rb")
memory = mmap.mmap(file.fileno(), int(sys.argv[2]), prot=mmap.PROT_READ)
sum(memory[::4096])
if sys.argv[3] == "locked":
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    place = libc.mmap(None, len(memory), 1, 1, file.fileno(), 0)
    assert libc.mlock(ctypes.c_void_p(place), ctypes.c_size_t(len(memory))) == 0
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def warm(tmp_path: Path) -> str:
    """A file of 4 MiB and a bit that is in RAM, clean."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.write(os.urandom(4 * MIB + 99))
        os.fsync(file.fileno())
    path.read_bytes()
    return str(path)


Keep = Callable[[str, int, str], "subprocess.Popen[str]"]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Another process that maps the beginning of a file, "mapped" or "locked"."""
    jobs: list[subprocess.Popen[str]] = []

    def start(path: str, nbytes: int, how: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", KEEP, path, str(nbytes), how]
        job = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        jobs.append(job)
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        return job

    yield start
    for job in jobs:
        job.communicate()


@pytest.mark.fast
def test_a_whole_model_is_given_back(numaload: Numaload, model_files: list[str]) -> None:
    api.prewarm(model_files[0])
    done = numaload("evict", model_files[-1])
    assert done.stderr == ""
    assert all(f"{path}: " in done.stdout for path in model_files)
    assert done.stdout.count("given back") == len(model_files)
    assert [resident(path) for path in model_files] == [0] * len(model_files)
    again = numaload.json("evict", model_files[0])
    assert (again["done"], again["given_back"], again["stays"]) == (True, 0, 0)


def test_the_report(warm: str) -> None:
    size = os.path.getsize(warm)
    report = api.evict([warm, Path(warm)])
    (file,) = report.files
    assert (file.path, file.size, file.given_back) == (warm, size, file.before)
    assert KEPT * size < file.before <= size
    assert (report.done, report.known, report.stays, file.why, file.users) == (
        True,
        True,
        0,
        "",
        [],
    )
    assert report.to_dict()["files"][0]["given_back"] == file.before


@pytest.mark.parametrize("deny", ["", "cachestat=ENOSYS"])
def test_dirty_pages_are_written_first(numaload: Numaload, tmp_path: Path, deny: str) -> None:
    """And are all there when they are read again."""
    content, path = os.urandom(3 * MIB), tmp_path / "dirty"
    path.write_bytes(content)
    run = numaload.within(deny=deny) if deny else numaload
    assert "written to storage first" in run("evict", path).stdout
    assert resident(path) == 0
    assert path.read_bytes() == content
    path.unlink()  # some file systems write at once what replaces a file's content
    path.write_bytes(content)
    (row,) = run.json("evict", path)["files"]
    assert row["written"] is None if deny else 0 < row["written"] <= 3 * MIB
    assert resident(path) == 0


def test_what_is_clean_is_not_written(warm: str) -> None:
    with SourceFile(warm) as file:
        told = syscalls.cachestat(file.fd, 0, 0) is not None
    assert api.evict(warm).files[0].written == (0 if told else None)


@pytest.mark.parametrize(("how", "nbytes"), [("mapped", MIB), ("locked", 8 * PAGE)])
def test_what_stays_is_explained(
    numaload: Numaload, warm: str, keep: Keep, how: str, nbytes: int
) -> None:
    job = keep(warm, nbytes, how)
    done = numaload("evict", warm, status=1)
    assert f"error: {warm}: " in done.stderr
    assert "stay in RAM: mapped by process" in done.stderr
    assert f"process {job.pid} (" in done.stderr
    assert ("locked" in done.stderr) == (how == "locked")
    (row,) = numaload.json("evict", warm, status=1)["files"]
    assert nbytes <= row["stays"] == resident(warm) < 4 * MIB
    (user,) = row["users"]
    assert user["pid"] == job.pid
    assert user["resident"] >= nbytes
    assert (user["locked"] > 0) == (how == "locked")
    job.communicate("")
    assert numaload.json("evict", warm)["stays"] == 0


def test_weights_that_are_looked_at_stay(model_files: list[str]) -> None:
    api.evict(model_files[0])
    with api.open(model_files[0]) as weights:
        tensor = weights["blk.0.attn_q.weight"]
        assert len(bytes(tensor.buffer)) == tensor.nbytes
        report = api.evict(weights)
        assert not report.done
        (file,) = [file for file in report.files if file.stays]
        assert file.why == "mapped by this process"
    assert api.evict(model_files[0]).done


def test_a_file_that_lies_in_memory(numaload: Numaload, store: Path) -> None:
    path = store.parent / "file"
    path.write_bytes(bytes(MIB))
    done = numaload("evict", path, status=1)
    assert "the file lies in memory" in done.stderr
    assert resident(path) == MIB


def test_one_file_that_stays_does_not_keep_the_others(
    numaload: Numaload, store: Path, warm: str
) -> None:
    path = store.parent / "file"
    path.write_bytes(bytes(MIB))
    rows = numaload.json("evict", path, warm, status=1)["files"]
    assert [row["stays"] for row in rows] == [MIB, 0]


def test_holes_and_empty_files(tmp_path: Path) -> None:
    empty, sparse = tmp_path / "empty", tmp_path / "sparse"
    empty.touch()
    sparse.touch()
    os.truncate(sparse, 3 * MIB + 1)
    sparse.read_bytes()
    before = resident(sparse)
    report = api.evict([empty, sparse])
    assert report.done
    assert [file.before for file in report.files] == [0, before]
    assert resident(sparse) == 0


def test_bad_input_is_a_named_error(numaload: Numaload, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, said in (("none", "No such file"), ("fifo", "expected a file, found a FIFO")):
        assert said in numaload("evict", tmp_path / name, status=1).stderr
    assert "usage: " in numaload("evict", status=2).stderr


def test_prewarm_names_it() -> None:
    """Where page cache is on the wrong node, this is how to drop it."""
    source = Path(str(api.__file__)).parent / "cli" / "prewarming.py"
    assert "dd if=" not in source.read_text()


@pytest.mark.parametrize("fails", [False, True])
def test_only_what_is_dirty_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """And where storage refuses it, that is said."""
    synced, real = list[int](), os.fdatasync

    def fdatasync(fd: int) -> None:
        synced.append(os.fstat(fd).st_ino)
        if fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    path = tmp_path / "dirty"
    path.write_bytes(bytes(MIB))
    monkeypatch.setattr(os, "fdatasync", fdatasync)
    report = api.evict(path)
    assert synced == [path.stat().st_ino]
    assert report.done is not fails
    assert ("could not be written: Input/output error" in report.files[0].why) == fails
    assert report.files[0].written in ((0,) if fails else (None, MIB))
