"""Reading files into memory: short reads, signals, leases, memory that others take, page cache."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from commands import KEPT, evict, sparse_model
from numaload.errors import FileChangedError, NodeMemoryError, ReadError
from numaload.files.copy import LOOK_EVERY, copy_files
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.linux.placement import Asked, locate
from numaload.machine import memory

MIB = 1 << 20


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[SourceFile]]:
    """Three of them: one of odd length, an empty one, one of several chunks."""
    opened = []
    for index, nbytes in enumerate((12345, 0, 20 * MIB + 1)):
        path = tmp_path / f"{index}"
        path.write_bytes(os.urandom(nbytes))
        opened.append(SourceFile(str(path)))
    yield opened
    for file in opened:
        file.close()


def same(files: Sequence[SourceFile]) -> bool:
    copies = copy_files(files)
    return all(
        copied.view() == Path(file.path).read_bytes()
        for file, copied in zip(files, copies, strict=True)
    )


def test_copies_are_the_files(files: list[SourceFile]) -> None:
    assert same(files)
    assert same([])


@pytest.mark.parametrize("resident", [True, False])
def test_page_cache_is_as_before(files: list[SourceFile], resident: bool) -> None:
    big = files[2]
    if not resident:
        evict([big.path])
    copy_files(files)
    share = residency(big).resident / big.size
    assert share > KEPT if resident else share < 0.1


def test_page_cache_is_as_before_a_failure(
    files: list[SourceFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    big = files[2]
    evict([big.path])

    def failing(fd: int, views: Sequence[memoryview], at: int) -> int:
        os.pread(big.fd, 4 * MIB, at)  # comes into page cache as by a read that is cut short
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(ReadError, match="Input/output error"):
        copy_files(files)
    assert residency(big).resident < 0.1 * big.size


def test_it_takes_what_the_files_have(files: list[SourceFile]) -> None:
    copies = copy_files(files)
    (found,) = locate([Asked([0], copies)])
    assert found.pages == sum(-(-file.size // 4096) for file in files)
    assert found.on.get(-1, 0) == 0


def test_short_reads(files: list[SourceFile], monkeypatch: pytest.MonkeyPatch) -> None:
    """As network file systems give them."""
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: whole(fd, [views[0][:70_001]], at))
    copies = copy_files(files)
    monkeypatch.undo()
    assert [bytes(c.view()) for c in copies] == [Path(f.path).read_bytes() for f in files]


def test_signals_that_others_handle(files: list[SourceFile]) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: came.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        while len(came) < 20:
            assert same(files)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        time.sleep(0.05)  # one may still be on its way: without a handler that is an error
        signal.signal(signal.SIGALRM, before)


LEASE = """
import fcntl, os, signal, sys, time
fd, asked = os.open(sys.argv[1], os.O_RDWR), []
def give_back(*_):
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    asked.append(fd)
signal.signal(signal.SIGIO, give_back)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("held", flush=True)
while not asked:
    time.sleep(0.01)
"""


def test_a_file_that_a_server_has_a_lease_on(tmp_path: Path) -> None:
    """The kernel asks for it back, and answers EAGAIN meanwhile to those who do not wait."""
    path = tmp_path / "leased"
    path.write_bytes(b"data")
    with subprocess.Popen(
        [sys.executable, "-c", LEASE, str(path)], stdout=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout
        assert job.stdout.readline() == "held\n"
        with SourceFile(str(path)) as file:
            assert file.read_at(0, 4) == b"data"
    assert job.returncode == 0


def test_a_descriptor_that_is_gone_is_a_named_error(files: list[SourceFile]) -> None:
    for file in files:
        file.close()
    with pytest.raises(ReadError, match="Bad file descriptor"):
        files[0].check_unchanged()
    with pytest.raises(ReadError, match="Bad file descriptor"):
        files[0].read_at(0, 1)


def test_a_file_that_is_shorter_is_said_with_the_byte(files: list[SourceFile]) -> None:
    big = files[2]
    os.truncate(big.path, 9 * MIB)
    with pytest.raises(FileChangedError, match="bytes are missing") as caught:
        big.read_at(8 * MIB, 2 * MIB)
    assert caught.value.offset == 9 * MIB


def test_memory_that_others_take_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sparse_model(tmp_path / "big.gguf", LOOK_EVERY + 64 * MIB)
    looks: list[int] = []

    def less_and_less() -> memory.Limit:
        looks.append(0)
        return memory.Limit("this machine", (1 << 40) if len(looks) == 1 else MIB)

    monkeypatch.setattr(memory, "available", less_and_less)
    monkeypatch.setattr(memory, "TRUSTED_S", 0)
    back = "all that was copied is given back"
    with SourceFile(path) as file, pytest.raises(NodeMemoryError, match=back):
        copy_files([file])
    evict([path])
    assert len(looks) == 2
