"""Locks of files that are being read: who waits for whom, and what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from commands import wait_for
from numaload.errors import CancelledError, NumaloadWarning, UsageError
from numaload.files import reading_lock as module
from numaload.files.reading_lock import check_free, holding, reading_lock
from numaload.files.source import SourceFile


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 100)
    return [str(tmp_path / name) for name in "abc"]


class Other(threading.Thread):
    """Takes the locks in another thread, which is another process as far as they are concerned."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        self.paths, self.told = paths, list[tuple[int, int]]()
        self.waited_for: int | None = None
        self.had = False
        self.start()

    def run(self) -> None:
        with ExitStack() as opened:
            its = [opened.enter_context(SourceFile(path)) for path in self.paths]
            with reading_lock(its, lambda *step: self.told.append(step), 7) as self.waited_for:
                self.had = True


def test_a_lock_alone_waits_for_nobody_and_leaves_nothing(
    store: Path, files: list[str], descriptors: Callable[[], int]
) -> None:
    before = descriptors()
    one, two = SourceFile(files[0]), SourceFile(files[1])
    with one, two, reading_lock([one, two, one]) as waited_for:
        assert waited_for is None
        assert holding()
    assert not holding()
    assert os.listdir(store / "reading") == ["locks"]
    assert descriptors() == before


def test_others_wait_and_know_for_whom(store: Path, files: list[str]) -> None:
    with SourceFile(files[0]) as one, reading_lock([one]):
        other = Other(files)
        wait_for(lambda: len(other.told) > 1, "it to wait")
        assert set(other.told) == {(0, 7)}
        assert other.is_alive()
    other.join()
    assert other.had
    assert other.waited_for == os.getpid()


def test_who_waits_keeps_nobody_waiting(store: Path, files: list[str]) -> None:
    with SourceFile(files[2]) as one, reading_lock([one]):
        waiting = Other(files)
        wait_for(lambda: waiting.told != [], "it to wait")
        free = Other(files[:1])
        free.join(60)
        assert not free.is_alive()
        assert waiting.is_alive()
    waiting.join()
    assert waiting.had


@pytest.mark.parametrize("what", ["the file", "the folder"])
def test_what_somebody_removes_stops_nobody(store: Path, files: list[str], what: str) -> None:
    with SourceFile(files[0]) as one, reading_lock([one]):
        (store / "reading" / "locks").unlink()
        if what == "the folder":
            (store / "reading").rmdir()
        other = Other(files[:1])  # nobody can know of the first any more
        other.join(60)
        assert other.had
    assert other.waited_for is None


def test_a_callback_that_stops(store: Path, files: list[str]) -> None:
    one, again = SourceFile(files[0]), SourceFile(files[0])
    with one, again, reading_lock([one]):
        waiting = Stops(again)
        waiting.join()
        assert isinstance(waiting.error, CancelledError)
        assert (waiting.error.done, waiting.error.total) == (0, 9)
        assert f"cancelled while process {os.getpid()} was" in str(waiting.error)


class Stops(threading.Thread):
    """Waits for a file until its progress callback ends that."""

    def __init__(self, file: SourceFile, looks: int = 1) -> None:
        super().__init__()
        self.file, self.left = file, looks
        self.error: BaseException | None = None
        self.start()

    def look(self, *_: int) -> bool:
        self.left -= 1
        return self.left > 0

    def run(self) -> None:
        try:
            with reading_lock([self.file], self.look, 9):
                pass
        except CancelledError as error:
            self.error = error


def test_inside_a_callback_nobody_waits(store: Path, files: list[str]) -> None:
    """Those who are waited for may wait for the one that called it."""
    check_free()
    with SourceFile(files[0]) as one, SourceFile(files[0]) as again, reading_lock([one]):
        with reading_lock([again]) as waited_for:
            assert waited_for is None
        with pytest.raises(UsageError, match="progress callback"):
            check_free()
    check_free()


def test_who_is_waited_for_long_is_named(
    store: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAY_S", 0.0)
    monkeypatch.setattr("numaload.errors._said", set())
    said = pytest.warns(NumaloadWarning, match=f"for process {os.getpid()}, which reads")
    with SourceFile(files[0]) as one, SourceFile(files[0]) as again, reading_lock([one]), said:
        Stops(again, looks=3).join()


READER = """
import sys, time
from numaload.files.source import SourceFile
from numaload.files.reading_lock import reading_lock
with SourceFile(sys.argv[1]) as file, reading_lock([file]):
    print("has it", flush=True)
    time.sleep(1000)
"""


def test_a_killed_reader_frees_the_others(store: Path, files: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", READER, files[0]], stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "has it\n"
        other = Other(files)
        wait_for(lambda: other.told != [], "it to wait")
        reader.kill()
        other.join()
    assert other.waited_for == reader.pid


FORKED = """
import os, sys, time
from numaload.files.source import SourceFile
from numaload.files.reading_lock import reading_lock
with SourceFile(sys.argv[1]) as file, reading_lock([file]):
    if (child := os.fork()) == 0:
        sys.exit(0)  # out of the block: the lock is the parent's
    assert os.waitpid(child, 0)[1] == 0
    print("has it", flush=True)
    if os.fork() == 0:
        time.sleep(1000)
print("gave it back", flush=True)
sys.stdin.read()
"""


def test_a_forked_child_neither_frees_nor_keeps_it(store: Path, files: list[str]) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", FORKED, files[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as reader:  # fmt: skip
        assert reader.stdout is not None
        assert reader.stdout.readline() == "has it\n"
        assert reader.stdout.readline() == "gave it back\n"
        other = Other(files)
        other.join()
        os.killpg(reader.pid, 9)
    assert other.had


def test_a_folder_that_cannot_be_used_is_said_once(
    store: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numaload.errors._said", set())
    store.mkdir()
    (store / "reading").touch()
    store.chmod(0o700)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with SourceFile(files[0]) as one, reading_lock([one]) as waited_for:
                assert waited_for is None
    assert [str(one.message).count("without knowing") for one in said] == [1]


def test_an_error_of_a_callback_is_its_own(store: Path, files: list[str]) -> None:
    def fails(*_: int) -> None:
        raise BrokenPipeError

    raised: list[BaseException] = []

    def waits() -> None:
        try:
            with reading_lock([again], fails):
                pass
        except BrokenPipeError as error:
            raised.append(error)

    with SourceFile(files[0]) as one, SourceFile(files[0]) as again, reading_lock([one]):
        thread = threading.Thread(target=waits)
        thread.start()
        thread.join()
    assert len(raised) == 1
