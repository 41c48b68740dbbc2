"""Turns at reading: who waits for whom, and what is left."""

from __future__ import annotations

import os
import threading
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

from commands import wait_for
from numaload.errors import CancelledError, NumaloadWarning
from numaload.storage import following
from numaload.storage.files import SourceFile


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 100)
    return [str(tmp_path / name) for name in "abc"]


class Other(threading.Thread):
    """Takes a turn in another thread, which is another process as far as locks are concerned."""

    def __init__(self, paths: list[str]) -> None:
        super().__init__()
        self.paths, self.seen = paths, list[tuple[int, int]]()
        self.turn: following.Turn | None = None
        self.start()

    def waits(self) -> bool:
        return self.turn is None

    def run(self) -> None:
        with ExitStack() as opened:
            its = [opened.enter_context(SourceFile(path)) for path in self.paths]
            with following.turn(its, lambda *step: self.seen.append(step)) as self.turn:
                pass


def test_a_turn_alone_leaves_nothing(store: Path, files: list[str]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    one, two = SourceFile(files[0]), SourceFile(files[1])
    with one, two, following.turn([one, two, one]) as turn:
        assert turn.followed is None
        assert turn.tell(1, 2)
        assert len(os.listdir(store / "reading")) == 2
    assert os.listdir(store / "reading") == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_others_see_how_far_it_is(store: Path, files: list[str]) -> None:
    with SourceFile(files[0]) as one, following.turn([one]) as turn:
        turn.tell(10, 100)
        other = Other(files)
        wait_for(lambda: (10, 100) in other.seen, "it to see")
        turn.tell(60, 100)
        wait_for(lambda: (60, 100) in other.seen, "it to see more")
        assert other.waits()
        turn.tell(100, 100)
    other.join()
    assert other.turn is not None
    assert other.turn.followed == os.getpid()
    assert other.turn.by_others == 90  # what was read before it came is not counted
    assert os.listdir(store / "reading") == []


def test_who_waits_keeps_nobody_waiting(store: Path, files: list[str]) -> None:
    with SourceFile(files[2]) as one, following.turn([one]):
        waiting = Other(files)
        wait_for(lambda: len(os.listdir(store / "reading")) >= 1, "it to wait")
        free = Other(files[:1])
        free.join(60)
        assert not free.is_alive()
        assert waiting.waits()
    waiting.join()
    assert waiting.turn is not None


@pytest.mark.parametrize("what", ["the file", "the folder"])
def test_what_somebody_removes_stops_nobody(store: Path, files: list[str], what: str) -> None:
    with SourceFile(files[0]) as one, following.turn([one]) as turn:
        for name in os.listdir(store / "reading"):
            (store / "reading" / name).unlink()
        if what == "the folder":
            (store / "reading").rmdir()
        other = Other(files[:1])  # nobody can know of the first any more
        other.join(60)
        assert turn.tell(1, 2)
    assert other.turn is not None
    assert other.turn.followed is None


def test_a_callback_that_stops(store: Path, files: list[str]) -> None:
    one, again = SourceFile(files[0]), SourceFile(files[0])
    with one, again, following.turn([one]) as turn:
        assert not following.Turn(lambda *_: False).tell(1, 2)
        turn.tell(7, 9)
        with pytest.raises(CancelledError) as caught, following.turn([again], lambda *_: False):
            raise AssertionError("it is not its turn")
        assert (caught.value.done, caught.value.total) == (7, 9)
        assert len(os.listdir(store / "reading")) == 1
    assert os.listdir(store / "reading") == []


def test_one_that_stands_still_is_named(
    store: Path, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "STILL_S", 0.0)
    with SourceFile(files[0]) as one, SourceFile(files[0]) as again, following.turn([one]) as turn:
        turn.tell(1, 2)
        looks = iter([True, True, True, False])
        with (
            pytest.warns(NumaloadWarning, match=f"process {os.getpid()}, which reads"),
            pytest.raises(CancelledError),
            following.turn([again], lambda *_: next(looks)),
        ):
            pass


def test_what_a_killed_reader_left_is_used_and_cleared(store: Path, files: list[str]) -> None:
    with SourceFile(files[0]) as one:
        with following.turn([one]):
            name = os.listdir(store / "reading")[0]
        left = store / "reading" / name
        left.write_bytes(following.RECORD.pack(4711, 5, 10))
        with following.turn([one]) as turn:
            assert turn.followed is None
        assert not left.exists()
        left.write_bytes(b"half")
        following.sweep()
        assert not left.exists()


def test_sweeping_takes_no_turn_away(store: Path, files: list[str]) -> None:
    with SourceFile(files[0]) as one, following.turn([one]):
        following.sweep()
        assert len(os.listdir(store / "reading")) == 1


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
            with SourceFile(files[0]) as one, following.turn([one]) as turn:
                assert turn.tell(1, 2)
    assert [str(one.message).count("without knowing") for one in said] == [1]
