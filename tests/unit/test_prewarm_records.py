"""What holders of page cache write down: read with distrust, told and cleared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numaload import errors
from numaload.cli import prewarming
from numaload.errors import NumaloadError, NumaloadWarning, StoreError
from numaload.files import source as files
from numaload.holder.process import namespace, packed, unpacked
from numaload.machine import userdir
from numaload.pagecache import records
from numaload.pagecache.background import PrewarmHolder
from numaload.pagecache.records import Record

Make = Callable[..., Record]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A record of a process that is not there any more."""
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x")
    status = path.stat()

    def one(**fields: Any) -> Record:
        record = Record(
            pid=4_000_000, start=1, namespace=namespace(), paths=(str(path),),
            files=((status.st_dev, status.st_ino),), part=("", ""), lock=False, since=1e9,
        )  # fmt: skip
        return replace(record, **fields)

    return one


def test_what_is_written_is_read(store: Path, make: Make) -> None:
    record = make(
        state="failed", done=1, total=2, notes=("a", "b"), error=packed(StoreError("no")),
        part=("attn", "0-9"), lock=True,
    )  # fmt: skip
    records.write(record)
    assert records.records() == [record]
    for _ in range(2):
        records.remove(record)
        assert records.records() == []
    assert os.listdir(store / "prewarming") == []


def test_of_one_that_is_gone_it_is_said_that_it_was_killed(store: Path, make: Make) -> None:
    records.write(make())
    (record,) = records.records()
    assert record.state == "killed"
    assert not record.process.alive()
    assert "process 4000000, which was reading" in str(unpacked(record.error))
    assert records.records() == [record]  # until it is told


def test_one_of_another_container_is_neither_dead_nor_ended(store: Path, make: Make) -> None:
    record = make(namespace="pid:[1]", state="held")
    records.write(record)
    assert records.records() == [record]
    (row,) = prewarming.look({})
    assert (row["state"], row["foreign"]) == ("held", True)
    with pytest.raises(StoreError, match="of another container"):
        PrewarmHolder.of(record).release()
    assert records.records() == []


def test_one_that_ended_by_itself_meanwhile_is_told(
    store: Path, make: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(make(namespace="pid:[1]", state="held"))  # of which nobody knows whether it lives
    monkeypatch.setattr(PrewarmHolder, "release", lambda _: False)
    prewarming.tell_released(prewarming.release({}))
    assert "had ended by itself" in capsys.readouterr().out


KINDS = ["", "{", "[]", "{}", '{"pid": 1}', "null", "[" * 100_000, '{"pid": ' + "9" * 5000 + "}"]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind[:20])
def test_what_is_no_record_is_left_out_and_said(store: Path, make: Make, kind: str) -> None:
    records.write(make(state="failed"))
    (store / "prewarming" / "1-1.json").write_text(kind)
    with pytest.warns(NumaloadWarning, match="no record that can be read"):
        assert len(records.records()) == 1
    assert len(prewarming.release({}).rows) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"pid": 0}, {"pid": -1}, {"pid": True}, {"start": "1"}, {"done": 1.5}, {"state": "odd"},
        {"state": "killed"}, {"files": [[1]]}, {"files": 1}, {"part": []}, {"error": 5},
        {"more": 1}, {"paths": []}, {"files": []}, {"since": "x"}, {"lock": 1}, {"pid": 10**400},
        {"since": float("inf")}, {"since": float("nan")}, {"since": 10**400}, {"done": 10**400},
        {"paths": ["m.gguf"]}, {"paths": ["/\0"]}, {"paths": ["/\ud800"]}, {"paths": [1]},
        {"files": [[10**400, 1]]}, {"files": [[1, -1]]}, {"error": [1]},
    ],
    ids=lambda wrong: repr(wrong)[:40],
)  # fmt: skip
def test_wrong_fields(make: Make, wrong: dict[str, Any]) -> None:
    data = json.loads(make().to_json()) | wrong
    with pytest.raises(userdir.UNREADABLE):
        Record.from_json(json.dumps(data).encode())


def test_half_written_ones_of_the_dead_are_cleared(store: Path, make: Make) -> None:
    records.write(make(state="failed"))
    folder = store / "prewarming"
    (folder / ".4000000-1.json.cafecafe").touch()
    (folder / ".other").touch()
    records.sweep()
    assert sorted(os.listdir(folder)) == [".other", "4000000-1.json"]


def test_an_error_is_looked_at_once(store: Path, make: Make) -> None:
    records.write(make(state="failed", error=packed(StoreError("why"))))
    assert [row["error"] for row in prewarming.look({})] == ["why"]
    assert prewarming.look({}) == []


def test_only_those_of_the_files_asked_for(store: Path, make: Make, tmp_path: Path) -> None:
    records.write(make(state="failed"))
    assert prewarming.look({"x": {str(tmp_path / "other.gguf")}}) == []
    assert prewarming.release({"x": {str(tmp_path / "other.gguf")}}).files == set()
    assert prewarming.release({"x": {str(tmp_path / "m.gguf")}}).files == {"x"}


def test_a_file_is_found_by_the_real_path_of_a_link(
    store: Path, make: Make, tmp_path: Path
) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "m.gguf")
    records.write(make(state="failed", paths=(str(link),)))
    wanted = {"m": {str(tmp_path / "m.gguf")}, "l": {str(link)}, "x": {str(tmp_path / "x.gguf")}}
    assert prewarming.release(wanted).files == {"m", "l"}


def test_links_of_a_record_are_followed_once_at_most(
    store: Path, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    followed: list[str] = []

    def follow(path: str) -> str:
        followed.append(path)
        return path

    monkeypatch.setattr(files, "real_path", follow)
    record = make(state="failed")
    records.write(record)
    assert prewarming.release({str(i): {f"/{i}"} for i in range(3)}).files == set()
    assert followed == [record.paths[0]]
    assert prewarming.release({"x": {record.paths[0]}}).files == {"x"}
    assert followed == [record.paths[0]]


def test_a_record_of_too_many_paths_is_none(make: Make) -> None:
    most = records.MOST_PATHS
    record = make(paths=("/m",) * most, files=((1, 1),) * most)
    assert Record.from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="more than 16384 paths"):
        Record.from_json(make(paths=("/m",) * (most + 1)).to_json())


def test_only_the_first_notes_are_shown(
    store: Path, make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    records.write(make(state="failed", notes=tuple(f"note {i}" for i in range(1000))))
    prewarming.show(prewarming.look({}))
    said = capsys.readouterr()
    assert (said.out + said.err).count(": note ") == prewarming.NOTES
    assert "and 995 more notes" in said.out + said.err


def test_what_covers_a_file(make: Make) -> None:
    whole, part = make(lock=True), make(part=("attn", ""))
    (inode,) = whole.files
    assert whole.covers(inode, ("attn", "3"), lock=True)
    assert whole.covers(inode, ("", ""), lock=False)
    assert not whole.covers((0, 0), ("", ""), lock=False)
    assert part.covers(inode, ("attn", ""), lock=False)
    assert not part.covers(inode, ("", ""), lock=False)
    assert not part.covers(inode, ("attn", ""), lock=True)


ERRORS = [
    errors.ReadError("no", path="/m", offset=4096),
    errors.SplitError("no", path="/m"),
    errors.NodeMemoryError("no", node=1, needed=2, free=3),
    errors.PlacementError("no", {0: {1: 2}}),
    errors.NumaError("no", call="mlock2", errno=12),
    errors.TensorNotFoundError("blk", ["blk.0", "blk.1"]),
    errors.CancelledError("no", done=1, total=2),
    errors.UsageError("no"),
    StoreError("no"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_survives(error: NumaloadError) -> None:
    again = unpacked(json.loads(json.dumps(packed(error))))
    assert type(again) is type(error)
    assert str(again) == str(error)
    for name in ("path", "offset", "needed", "free", "call", "done", "total"):
        assert getattr(again, name, None) == getattr(error, name, None)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"kind": "OSError"},
        {"kind": "warnings"},
        {"kind": "ReadError", "args": 5},
        {"kind": "TensorNotFoundError", "args": [], "fields": {}},
    ],
    ids=str,
)
def test_an_error_that_is_not_known(data: dict[str, Any]) -> None:
    assert isinstance(unpacked(data), errors.NumaloadError)
    assert str(unpacked(data))


def test_a_record_of_another_process_is_left_out(store: Path, make: Make) -> None:
    records.write(make(state="failed"))
    (path,) = (store / "prewarming").iterdir()
    path.rename(path.with_name("1-1.json"))
    with pytest.warns(NumaloadWarning, match="the record of another process"):
        assert records.records() == []
