"""The store where something is wrong: damage, races, errors in the middle."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import running, sparse_model
from numaload.errors import NumaloadWarning, ReplicaNotFoundError, StoreError
from numaload.files import known
from numaload.files.known import Model
from numaload.files.source import Identity
from numaload.holder.process import HolderProcess
from numaload.machine import userdir
from numaload.replicas import reclaim
from numaload.replicas import store as stores
from numaload.replicas.arena import store_memory
from numaload.replicas.layout import Layout
from numaload.replicas.lease import Lease
from numaload.replicas.mirror import MirrorOptions, mirror_shared
from numaload.replicas.plan import MirrorPlan

pytestmark = pytest.mark.usefixtures("store", "nothing_said")


def entry_at(store: Path, model: str) -> Path:
    """The folder of a replica in the store."""
    api.mirror(model, shared=True).close()
    (entry,) = stores.entries()
    return store / entry.name


def second(entry: Path) -> Path:
    """Where another entry of the same model may be."""
    return entry.with_suffix(".00000000")


def with_model(**changes: Any) -> Callable[[dict[str, Any]], object]:
    return lambda row: row["model"].update(changes)


def first_identity(*numbers: Any) -> Callable[[dict[str, Any]], object]:
    return lambda row: row["model"]["identities"][0].__setitem__(slice(0, 5), numbers)


SIZE = -1  # stands for the size of the file


def _sized(row: dict[str, Any], found: Any) -> list[Any]:
    """Of the first file what is given, of the second all of it."""
    size, other = (identity[2] for identity in row["model"]["identities"])
    if isinstance(found, list):
        found = [[size if n == SIZE else n for n in one] for one in found]
    return [found, [[other, 0]]]


def with_stripes(found: Any = None) -> Callable[[dict[str, Any]], object]:
    return lambda row: row.update(policy="stripe", stripes=_sized(row, found) if found else [])


def with_parts(found: Any) -> Callable[[dict[str, Any]], object]:
    def change(row: dict[str, Any]) -> None:
        sizes = [identity[2] for identity in row["model"]["identities"]]
        row.update(policy="mixed", copied=[found, [[0, sizes[1]]]])

    return change


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda row: row.update(version=1),
    "another chunk size": lambda row: row.update(chunk=1 << 20),
    "no checksums": lambda row: row.pop("checksums"),
    "a checksum less": lambda row: row["checksums"][0].pop(),
    "an unknown policy": lambda row: row.update(policy="best"),
    "a policy as a list": lambda row: row.update(policy=["mirror"]),
    "turns of a mirror": lambda row: row.update(turns=[0]),
    "turns of other nodes": lambda row: row.update(policy="interleave", turns=[0, 1]),
    "turns without end": lambda row: row.update(policy="interleave", turns=[10**400]),
    "no turns": lambda row: row.update(policy="interleave"),
    "stripes that end early": with_stripes([[4096, 0]]),
    "stripes that end late": with_stripes([[1 << 60, 0]]),
    "stripes within pages": with_stripes([[100, 0], [SIZE, 0]]),
    "stripes backwards": with_stripes([[8192, 0], [4096, 0], [SIZE, 0]]),
    "stripes of other nodes": with_stripes([[SIZE, 7]]),
    "stripes of one number": with_stripes([[SIZE]]),
    "stripes as text": with_stripes("text"),
    "stripes of no file": with_stripes(),
    "parts beyond the file": with_parts([[0, 1 << 60]]),
    "parts within pages": with_parts([[1, 4096]]),
    "parts backwards": with_parts([[8192, 12288], [0, 4096]]),
    "parts that overlap": with_parts([[0, 8192], [4096, 12288]]),
    "empty parts": with_parts([[4096, 4096]]),
    "negative parts": with_parts([[-4096, 4096]]),
    "parts with other checksums": with_parts([[0, 4096], [4096, 8192]]),
    "a file's checksums less": lambda row: row["checksums"].pop(),
    "nodes as text": lambda row: row.update(groups=["../../x"]),
    "negative nodes": lambda row: row.update(groups=[[-1]]),
    "no nodes": lambda row: row.update(groups=[]),
    "a replica on no node": lambda row: row.update(groups=[[]]),
    "a holder that is none": lambda row: row.update(holder={"pid": 1}),
    "a holder as text": lambda row: row.update(holder="1", pid_namespace="x"),
    "created never": lambda row: row.update(created="never"),
    "created after all calendars": lambda row: row.update(created=1e18),
    "created at no time": lambda row: row.update(created=float("nan")),
    "built for ever": lambda row: row.update(seconds=float("inf")),
    "a number beyond floats": lambda row: row.update(seconds=10**400),
    "a replica twice": lambda row: row.update(groups=[[0], [0]]),
    "a node beyond all": lambda row: row.update(groups=[[10**400]]),
    "a process beyond all": lambda row: row.update(
        holder={"pid": 10**400, "start": 1, "files": []}, pid_namespace="x"
    ),
    "a path that is not absolute": with_model(paths=["a", "b"]),
    "a NUL in a path": with_model(paths=["/\0", "/b"]),
    "a path that no file has": with_model(paths=["/\ud800", "/b"]),
    "another model's content": first_identity(1, 1, 1, 1, 1),
    "a path upwards": with_model(paths=["/models/..", "/models/b"]),
    "a folder": with_model(paths=["/models/", "/models/b"]),
    "paths of other types": with_model(paths=[1, 2]),
    "fewer paths": with_model(paths=["/models/a"]),
    "no identities": with_model(identities=[], paths=[]),
    "identities of other types": with_model(identities=[["x"], None]),
    "a negative size": first_identity(1, 1, -1, 1, 1),
    "a size as text": first_identity(1, 1, "1", 1, 1),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_manifest_is_left_out_and_said(
    store: Path, model: str, damage: Callable[[dict[str, Any]], object]
) -> None:
    good = entry_at(store, model)
    bad = second(good)
    bad.mkdir()
    (bad / "manifest.json").write_bytes((good / "manifest.json").read_bytes())
    assert len(stores.entries()) == 2  # it is read before it is damaged
    row = json.loads((bad / "manifest.json").read_bytes())
    damage(row)
    (bad / "manifest.json").write_text(json.dumps(row))
    with pytest.warns(NumaloadWarning, match=r"\.00000000: this entry cannot be read"):
        assert len(stores.entries()) == 1
    assert reclaim.release_damaged() == ([str(bad)], [])
    assert not bad.exists()
    assert len(stores.entries()) == 1


def test_a_number_of_any_length_keeps_no_memory(store: Path, model: str) -> None:
    api.mirror(model, shared=True, hold=True).close()
    (entry,) = stores.entries()
    manifest = store / entry.name / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"chunk": ', f'"chunk": {"9" * 5000}'))
    with pytest.warns(NumaloadWarning, match="this entry cannot be read"):
        assert stores.entries() == []
    assert reclaim.release_damaged() == ([str(store / entry.name)], [])
    assert entry.holder is not None
    assert not running(entry.holder.pid)
    assert not list(store.rglob("*.gguf"))


@pytest.mark.parametrize("kind", ["empty", "no JSON", "deep", "a FIFO", "a file", "a link"])
def test_what_is_no_entry_is_left_out_and_stays(store: Path, model: str, kind: str) -> None:
    bad, elsewhere = second(entry_at(store, model)), store.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    if kind == "a file":
        bad.touch()
    elif kind == "a link":
        bad.symlink_to(elsewhere)
    else:
        bad.mkdir()
    if kind in ("no JSON", "deep"):
        (bad / "manifest.json").write_text({"no JSON": "{", "deep": "[" * 100_000}[kind])
    if kind == "a FIFO":
        os.mkfifo(bad / "manifest.json")
    with pytest.warns(NumaloadWarning, match="numaload release"):
        assert len(stores.entries()) == 1
    gone = kind == "empty"  # as a killed builder may leave it
    assert reclaim.release_damaged() == (([str(bad)], []) if gone else ([], [str(bad)]))
    assert os.path.lexists(bad) != gone
    assert (elsewhere / "kept").exists()


def test_an_entry_that_is_released_before_it_is_used(
    store: Path, model: str, descriptors: Callable[[], int]
) -> None:
    entry_at(store, model)
    (entry,) = stores.entries()
    lease, before = Lease(entry), descriptors()
    assert [done.in_use for done in reclaim.release([entry])] == [True]
    with pytest.raises(ReplicaNotFoundError, match="released or removed"):
        lease.map((0,))
    with pytest.raises(ReplicaNotFoundError, match="released or removed"):
        Lease(entry)
    assert reclaim.release([entry]) == []  # a second process was as fast
    assert descriptors() == before


def a_folder(replica: Path) -> None:
    replica.unlink()
    replica.mkdir()


def cut(replica: Path) -> None:
    mode = replica.stat().st_mode  # its owner, who is not root, may not write to it
    replica.chmod(0o600)
    os.truncate(replica, 5)
    replica.chmod(mode)


BROKEN: dict[str, tuple[Callable[[Path], object], HolderProcess | None]] = {
    "has 5 bytes, expected": (cut, None),
    "is not a file of this user's": (a_folder, None),
    "is not what process 1 was given to hold": (Path.stat, HolderProcess(1, 0, "")),
}


@pytest.mark.parametrize("said", BROKEN)
def test_a_replica_that_is_another_file_now_is_named(store: Path, model: str, said: str) -> None:
    entry_at(store, model)
    (entry,) = stores.entries()
    path, (change, holder) = entry.path(entry.groups[0], 0), BROKEN[said]
    change(Path(path))
    with pytest.raises(StoreError, match=f"^replica {re.escape(path)} {said}") as caught:
        Lease(replace(entry, holder=holder)).map(entry.groups[0])
    assert str(caught.value).endswith(f"numaload release {entry.model.paths[0]}")


def test_replicas_released_while_they_are_mirrored(store: Path, model: str, tmp_path: Path) -> None:
    """They are built again; if that happens twice it is said. Here between plan and attaching."""
    machine, paths = api.topology(), [model, sparse_model(tmp_path / "m.gguf", 1 << 20)]
    options = MirrorOptions(machine.groups(machine.all, "node"))
    opened = [api.open(path) for path in paths]

    def mirror(*chosen: int) -> None:
        names = [opened[i].paths[0] for i in chosen]

        def release(_: MirrorPlan) -> None:
            name = names.pop(0) if names else ""
            reclaim.release([e for e in stores.entries() if e.model.paths[0] == name])

        for one in mirror_shared(opened, machine, options, None, release):
            one.close()

    mirror()
    with pytest.warns(NumaloadWarning, match="mirroring once more"):
        mirror(0)
    assert len(stores.entries()) == 2
    with pytest.raises(ReplicaNotFoundError, match=r"were released or removed while.*twice"):
        mirror(0, 1)
    for weights in opened:
        weights.close()


def test_a_relative_store_stays_where_it_was(
    store: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.parent)
    monkeypatch.setenv("NUMALOAD_STORE", f"below-{tmp_path.name}")
    api.mirror(model, shared=True).close()
    (entry,) = stores.entries()
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    api.attach(model).close()
    assert os.path.exists(entry.path(entry.groups[0], 0))
    monkeypatch.setenv("NUMALOAD_STORE", "elsewhere")
    with pytest.raises(StoreError, match="NUMALOAD_STORE=elsewhere: No such file"):
        api.attach(model)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    row = json.loads((folder / "manifest.json").read_bytes())
    change(row)
    (folder / "manifest.json").write_text(json.dumps(row))


def held_by(pid: int, namespace: str) -> Callable[[dict[str, Any]], object]:
    holder = {"pid": pid, "start": 1, "files": []}
    return lambda row: row.update(holder=holder, pid_namespace=namespace)


def test_another_container_s_replicas_stop_nobody(store: Path, model: str) -> None:
    """They cannot be reached or ended from here, and neither block building nor other releases."""
    rewrite(entry_at(store, model), held_by(1, "pid:[1]"))
    (entry,) = stores.entries()
    assert stores.find(entry.model) == {}
    api.mirror(model, shared=True).close()
    assert len(stores.entries()) == 2  # the sweep left it alone
    done = reclaim.release(stores.entries())
    assert ["another container" in one.error for one in done] == [True, False]
    assert stores.entries() == []


def test_replicas_of_a_dead_holder_are_not_there(store: Path, model: str) -> None:
    rewrite(entry_at(store, model), held_by(1 << 22, os.readlink("/proc/self/ns/pid")))
    (entry,) = stores.entries()
    assert stores.find(entry.model) == {}
    with pytest.raises(ReplicaNotFoundError):
        api.attach(model)
    with pytest.warns(NumaloadWarning, match=f"process {1 << 22}, which held"):
        reclaim.sweep()
    assert stores.entries() == []


def test_what_was_placed_only_is_not_what_strict_asks_for(store: Path, model: str) -> None:
    rewrite(entry_at(store, model), lambda row: row.update(bound=False))
    with pytest.raises(StoreError, match="mirrored already, placed, not bound; release it first"):
        api.mirror(model, shared=True, strict=True)
    with api.attach(model) as mirror:
        assert mirror.report.unbound == mirror.nodes


def test_a_replica_that_may_not_be_opened_is_a_named_error(store: Path, model: str) -> None:
    folder = entry_at(store, model)
    replica = next(iter(folder.glob("node*/*")))
    replica.unlink()
    replica.symlink_to("/etc/passwd")
    with pytest.raises(StoreError, match=r"cannot be opened: .*: Too many levels"):
        api.attach(model)


def test_the_lock_does_not_stay_with_a_forked_child(store: Path) -> None:
    with reclaim.building():
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with reclaim.building() as folder:  # would wait for ever
            assert folder
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lease_that_is_dropped_ends(store: Path, model: str) -> None:
    entry_at(store, model)
    (entry,) = stores.entries()
    Lease(entry)
    assert [done.in_use for done in reclaim.release([entry])] == [False]


def test_attaching_what_cannot_be_mapped_leaves_no_lease(
    store: Path, model: str, descriptors: Callable[[], int]
) -> None:
    folder = entry_at(store, model)
    next(iter(folder.glob("node*/*"))).unlink()
    before = descriptors()
    with pytest.raises(ReplicaNotFoundError) as caught:
        api.attach(model)
    assert descriptors() == before, caught
    assert "lacks files, which were removed: release it, then mirror again" in str(caught.value)
    (done,) = reclaim.release(stores.entries())
    assert not done.in_use


@pytest.mark.parametrize("call", ["link", "rename", "write"])
def test_publishing_that_fails_leaves_nothing(
    store: Path,
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    descriptors: Callable[[], int],
) -> None:
    done, before = [], descriptors()

    def fail(*arguments: Any, **_: Any) -> None:
        done.append(arguments)
        raise OSError(28, "No space left on device")

    where: Any = {"link": os, "rename": os, "write": userdir}[call]
    monkeypatch.setattr(where, {"write": "write_whole"}.get(call, call), fail)
    with pytest.raises(OSError, match="No space left"):
        api.mirror(model, shared=True)
    monkeypatch.undo()
    assert done
    assert sorted(os.listdir(store)) == ["lock", userdir.MARKER]
    assert descriptors() == before


def test_small_files_are_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    folder = os.open(tmp_path, os.O_RDONLY)
    try:
        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(OSError, match="No space left"):
            userdir.write_whole("x", b"data", folder)
        assert list(tmp_path.iterdir()) == []
        monkeypatch.undo()
        userdir.write_whole("x", b"data", folder)
        assert userdir.read_owned("x", folder) == b"data"
    finally:
        os.close(folder)


def test_an_arena_that_is_dropped_keeps_no_nameless_file(descriptors: Callable[[], int]) -> None:
    with userdir.opened() as folder:
        assert folder is not None
        before = descriptors()
        arena = store_memory(folder)(1 << 20, Layout((0,)), 0)
        assert descriptors() == before + 1
        del arena
        assert descriptors() == before


def test_only_a_tmpfs_can_hold_replicas(
    store: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where, expected in (("/proc", "is on proc, expected a tmpfs"), (store.parent, None)):
        if expected is None:
            userdir.check_tmpfs(str(where))
        else:
            with pytest.raises(StoreError, match=expected):
                userdir.check_tmpfs(str(where))

    def refuse(_: str) -> None:
        raise StoreError("no tmpfs")

    monkeypatch.setattr(userdir, "check_tmpfs", refuse)
    with pytest.raises(StoreError, match="no tmpfs"):
        api.mirror(model, shared=True)


def test_a_link_is_refused_with_a_slash_behind_it_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    link = tmp_path / f"numaload-{os.geteuid()}"
    link.symlink_to(tmp_path / "target")
    monkeypatch.setenv("NUMALOAD_STORE", f"{link}/")
    with pytest.raises(StoreError, match="expected a folder of yours"), userdir.opened():
        pass


def a_model(path: str, size: int) -> Model:
    return Model((path,), (Identity(1, ord(path[-1]), size, 1, 1),))


def test_damaged_records_of_known_models_are_left_out_and_said(store: Path) -> None:
    known.remember(a_model("/a", 1))
    good = json.loads(next((store / "known").iterdir()).read_bytes())
    first = json.dumps(good["identities"][0])
    numbers = ["9" * 5000, "1" + "0" * 400, "Infinity", "NaN", '"1"', "true", "[" * 100_000]
    texts = ["", "{}", "[]", "[" * 100_000, " " * (userdir.MOST + 1)]
    texts += [
        json.dumps(good | {"paths": paths}) for paths in ([1], [], ["a"], ["/\0"], ["/\ud800"])
    ]
    texts += [json.dumps(good).replace(first, first.replace("[1,", f"[{n},")) for n in numbers]
    folder = store / "known"
    for i, text in enumerate(texts):
        (folder / f"{i:032x}.json").write_text(text)
    (folder / f"{'a' * 32}.json").mkdir()
    os.mkfifo(folder / f"{'b' * 32}.json")
    (folder / f"{'c' * 32}.json").symlink_to("/dev/zero")
    with pytest.warns(NumaloadWarning, match="no record that can be read") as warned:
        assert known.recall() == [a_model("/a", 1)]
    assert len(warned) == len(texts) + 3


def test_of_a_file_that_changed_the_last_record_counts(store: Path) -> None:
    models = [a_model("/a", 1), a_model("/b", 1), a_model("/a", 2)]
    for second, model in enumerate(models):
        known.remember(model)
        latest = max((store / "known").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        os.utime(latest, (second, second))
    assert known.recall() == [models[2], models[1]]


def test_records_of_known_models_do_not_pile_up(store: Path) -> None:
    for i in range(known.KEPT + 5):
        known.remember(a_model(f"/{i}/a", i))
        known.remember(a_model(f"/{i}/a", i + 1))
    assert len(os.listdir(store / "known")) == known.KEPT
    assert known.recall()[0] == a_model(f"/{i}/a", i + 1)
    known.forget([f"/{i}/a"])
    assert len(known.recall()) == known.KEPT - 1


def test_a_clock_set_back_does_not_drop_the_record_just_written(store: Path) -> None:
    for i in range(known.KEPT):
        known.remember(a_model(f"/{i}/a", i))
    for record in (store / "known").iterdir():
        os.utime(record, (1e10, 1e10))
    known.remember(a_model("/b", 1))
    assert a_model("/b", 1) in known.recall()
    assert len(os.listdir(store / "known")) == known.KEPT


def test_what_became_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"data")
    model = known.identify([str(path)])
    assert model.state() == "unchanged"
    path.write_bytes(b"other")
    assert model.state() == "changed"
    path.unlink()
    assert model.state() == "gone"
    path.mkdir()
    assert model.state() == "unreadable"
