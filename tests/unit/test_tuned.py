"""Records of tuned plans: used while nothing changed, and never trusted."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from errno import EMFILE, ENOSPC
from pathlib import Path
from typing import Any

import pytest

from numaload.errors import NumaloadWarning, ReadError, StoreError
from numaload.files import tuned
from numaload.files.plan import BUFFERED, CACHE, DIRECT, MAPPED, MEMORY, Forced, ReadMethod, Tuned
from numaload.files.source import SourceFile
from numaload.files.tuned import forget, keep, plan_reading, records
from numaload.machine import cachedir
from numaload.machine.devices import device_of

GIB = 1 << 30
USER = 12345  # nobody that exists
WAYS = {CACHE: ReadMethod(BUFFERED, 7, 2 << 20), MEMORY: ReadMethod(DIRECT, 5, 4 << 20)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_said: None) -> Path:
    """The folder that records go to; it is not there yet."""
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuned"


@pytest.fixture
def file(tmp_path: Path) -> Iterator[SourceFile]:
    (tmp_path / "model").write_bytes(b"weights")
    with SourceFile(str(tmp_path / "model")) as opened:
        yield opened


@pytest.fixture
def record(file: SourceFile) -> Path:
    """What was kept of the device that the file lies on."""
    plans = {sink: Tuned(way, 1.44, "") for sink, way in WAYS.items()}
    return Path(keep(file, device_of(file.path), plans))


def edit(record: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(record.read_text())
    change(data)
    record.write_text(json.dumps(data))


def foreign(record: Path) -> None:
    """Have it be of another host, and out of date on this one."""
    edit(record, lambda data: data.update(host="other"))
    edit(record, lambda data: data["conditions"].update(kernel="5.10"))


def said(ask: Callable[[], object]) -> list[str]:
    """What is warned of, the second time as well."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            ask()
    assert all(one.category is NumaloadWarning for one in caught)
    return [str(one.message) for one in caught]


def is_used(file: SourceFile) -> bool:
    return plan_reading(CACHE, file, GIB).way == WAYS[CACHE]


@pytest.mark.parametrize("sink", [CACHE, MEMORY])
def test_a_tuned_plan_is_the_only_candidate_and_named(
    file: SourceFile, record: Path, sink: str
) -> None:
    plan = plan_reading(sink, file, GIB)
    assert plan.candidates == (WAYS[sink],)
    assert plan.why.startswith(f"{device_of(file.path)}; tuned 2")
    assert plan.why.endswith(": 1.4 times the default")
    assert record.stat().st_mode & 0o777 == 0o600


def test_what_is_forced_comes_first(file: SourceFile, record: Path) -> None:
    for forced in (Forced(MAPPED), Forced(threads=3), Forced(chunk=1 << 20), Forced(order="file")):
        plan = plan_reading(CACHE, file, GIB, forced=forced)
        assert "tuned" not in plan.why
        assert plan.why.endswith("as asked for")


def test_a_tuned_way_that_cannot_be_had_is_not_used(file: SourceFile, record: Path) -> None:
    edit(record, lambda data: data["plans"][CACHE].update(name=MAPPED))
    plan = plan_reading(CACHE, file, GIB, seen=False)
    assert plan.way.name == BUFFERED
    assert "tuned" not in plan.why


def test_a_default_that_nothing_beats_is_said(file: SourceFile, record: Path) -> None:
    edit(record, lambda data: data["plans"][CACHE].update(gain=1))
    assert "nothing beats the default" in plan_reading(CACHE, file, GIB).why


def test_where_nothing_is_read_no_record_is_looked_for(
    file: SourceFile, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "records", lambda: pytest.fail("looked"))
    plan_reading(CACHE, file, 0)
    plan_reading(CACHE, file, GIB, forced=Forced(threads=2))


@pytest.mark.parametrize(
    "what", ["device", "file system", "kernel", "numaload", "processors", "read-ahead"]
)
def test_a_plan_is_dropped_when_something_changed(
    file: SourceFile, record: Path, what: str
) -> None:
    """Which is said once; the record goes with the next tuning."""
    edit(record, lambda data: data["conditions"].update({what: "\x1b[2Jold"}))
    stale = record.rename(record.with_name(f"{1:032x}.json"))
    (text,) = said(lambda: is_used(file))
    assert f"is not used: {what} is " in text
    assert r", was \x1b[2Jold; run numaload tune FILE again" in text
    assert not is_used(file)
    keep(file, device_of(file.path), {CACHE: Tuned(WAYS[CACHE], 1.2, "")})
    assert is_used(file)
    assert not stale.exists()


def test_a_plan_of_another_machine_that_shares_the_home_is_left_alone(
    file: SourceFile, record: Path
) -> None:
    foreign(record)
    other = record.rename(record.with_name(f"{1:032x}.json"))
    assert said(lambda: is_used(file)) == []
    assert not is_used(file)
    keep(file, device_of(file.path), {})
    assert other.exists()


def plan_of(**change: Any) -> Callable[[Path], None]:
    return lambda record: edit(record, lambda data: data["plans"][CACHE].update(change))


def linked(record: Path) -> None:
    record.symlink_to(record.rename(record.parent / "elsewhere"))


def replaced(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(record: Path) -> None:
        record.unlink()
        make(record)

    return change


BAD: dict[str, Callable[[Path], object]] = {
    "empty": lambda record: record.write_bytes(b""),
    "no-text": lambda record: record.write_bytes(b"\xff\xfe\0"),
    "a-list": lambda record: record.write_text("[]"),
    "nested": lambda record: record.write_text("[" * 16000),
    "huge": lambda record: edit(record, lambda data: data.update(more="x" * tuned.LARGEST)),
    "no-plans": lambda record: edit(record, lambda data: data.pop("plans")),
    "conditions": lambda record: edit(record, lambda data: data.update(conditions={"kernel": 6})),
    "time": lambda record: edit(record, lambda data: data.update(when=1 << 40)),
    "sink": lambda record: edit(record, lambda data: data["plans"].update(gpu={})),
    "way": plan_of(name="io_uring"),
    "way-of-the-other-sink": plan_of(name=DIRECT),
    "threads": plan_of(threads=10**9),
    "no-threads": plan_of(threads=0),
    "threads-as-text": plan_of(threads="4"),
    "threads-as-bool": plan_of(threads=True),
    "chunk": plan_of(chunk=1000),
    "huge-chunk": plan_of(chunk=1 << 40),
    "gain": plan_of(gain=float("nan")),
    "endless-gain": plan_of(gain=float("inf")),
    "a-link": linked,
    "a-pipe": replaced(os.mkfifo),
    "a-folder": replaced(Path.mkdir),
    "open-to-others": lambda record: record.chmod(0o620),
}  # fmt: skip


@pytest.mark.parametrize("make", BAD.values(), ids=BAD)
def test_what_is_no_record_is_said_once_and_left_out(
    file: SourceFile, record: Path, make: Callable[[Path], object]
) -> None:
    make(record)
    (text,) = said(lambda: is_used(file))
    assert text.startswith(f"{record}: no tuned plan that can be used (")
    assert not is_used(file)
    assert records() == []


@pytest.mark.parametrize("name", ["open-to-others", "a-link", "a-pipe"])
def test_a_record_that_others_may_write_to_says_so(
    file: SourceFile, record: Path, name: str
) -> None:
    BAD[name](record)
    (text,) = said(lambda: is_used(file))
    assert "(it is no file that only this user may write to)" in text


def test_a_record_of_somebody_else_is_not_used(file: SourceFile, record: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file to somebody else")
    os.chown(record, USER, USER)
    assert len(said(lambda: is_used(file))) == 1
    assert not is_used(file)


def test_a_folder_that_others_may_write_to_is_not_used(file: SourceFile, record: Path) -> None:
    record.parent.chmod(0o777)
    (text,) = said(lambda: is_used(file))
    assert "is not a folder that only this user may write to" in text
    assert not is_used(file)
    with pytest.raises(StoreError, match="set NUMALOAD_CACHE_DIR"):
        tuned.check_kept()


def test_where_nothing_can_be_kept_nothing_is_looked_for(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", "relative")
    assert said(lambda: is_used(file)) == []
    with pytest.raises(StoreError, match="which is no full path"):
        tuned.check_kept()


def test_whether_plans_can_be_kept_is_tried(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is there may be read-only, or its disk full."""
    tuned.check_kept()
    assert list(record.parent.iterdir()) == [record]

    def full(folder: int, name: str, content: bytes) -> None:
        raise OSError(ENOSPC, os.strerror(ENOSPC), name)

    monkeypatch.setattr(cachedir, "write", full)
    with pytest.raises(StoreError, match="No space left"):
        tuned.check_kept()


def test_records_are_bounded(file: SourceFile, record: Path) -> None:
    for i in range(tuned.KEPT + 6):
        other = record.with_name(f"{i:032x}.json")
        other.write_bytes(record.read_bytes())
        foreign(other)
        edit(other, lambda data, i=i: data.update(when=i))  # type: ignore[misc]
    keep(file, device_of(file.path), {})
    left = {path.name for path in record.parent.iterdir()}
    assert left == {record.name, *(f"{i:032x}.json" for i in range(7, tuned.KEPT + 6))}


def test_forgetting_removes_the_device_s_plans_or_all(file: SourceFile, record: Path) -> None:
    other = record.with_name(f"{1:032x}.json")
    other.write_bytes(record.read_bytes())
    foreign(other)
    assert [one.name for one in forget(file)[0]] == [record.name]
    assert [one.name for one in forget()[0]] == [other.name]
    assert forget() == ([], 0)
    assert list(record.parent.iterdir()) == []


def test_a_plan_measured_under_equal_conditions_is_of_any_host(
    file: SourceFile, record: Path
) -> None:
    edit(record, lambda data: data.update(host="other"))
    other = record.rename(record.with_name(f"{1:032x}.json"))
    assert is_used(file)
    keep(file, device_of(file.path), {})
    assert not other.exists()
    edit(record, lambda data: data.update(host="other"))
    assert [one.name for one in forget(file)[0]] == [record.name]


def test_forgetting_all_removes_what_is_damaged_and_counts_it(record: Path) -> None:
    record.write_text("{")
    removed = []
    assert said(lambda: removed.append(forget())) == []
    assert removed == [([], 1), ([], 0)]
    assert not record.exists()


def test_forgetting_a_device_s_plan_counts_what_is_damaged_and_leaves_it(
    file: SourceFile, record: Path
) -> None:
    junk = record.with_name(f"{1:032x}.json")
    junk.write_text("junk")
    with pytest.warns(NumaloadWarning, match=f"^{junk}: no tuned plan that can be used"):
        removed, damaged = forget(file)
    assert ([one.name for one in removed], damaged) == ([record.name], 1)
    assert list(record.parent.iterdir()) == [junk]


def test_what_cannot_be_removed_is_said_once(record: Path) -> None:
    record.parent.chmod(0o777)
    with pytest.raises(StoreError, match=r"^tuned plans cannot be removed: /.* only this user"):
        forget()


@pytest.mark.parametrize("call", ["opened", "read"])
def test_no_more_open_files_is_no_fault_of_a_record(
    record: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(EMFILE, os.strerror(EMFILE))

    monkeypatch.setattr(cachedir, call, refuse)
    with pytest.raises(ReadError, match=f"^{record.parent}: .*ulimit -n"):
        records()
