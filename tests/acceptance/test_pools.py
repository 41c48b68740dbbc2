"""The store as a cache: pools with budgets, who uses what, what goes for room, and folders.

On one node, with small models; nodes of their own are tested in tests/numa.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import Numaload, sparse_model, wait_for
from numaload.cli import replicas
from numaload.cli.main import _parser
from numaload.cli.output import LONGEST_S
from numaload.errors import (
    ClosedError,
    NodeMemoryError,
    NumaloadWarning,
    ReplicaNotFoundError,
    StoreError,
    UsageError,
)
from numaload.machine import userdir
from numaload.replicas import catalogue, pools, reclaim
from numaload.replicas import store as stored

pytestmark = pytest.mark.usefixtures("nothing_said")

MIB = 1 << 20
HOLD_OPEN = "import sys; file = open(sys.argv[1], 'rb'); print(1, flush=True); sys.stdin.read()"
LEASE = """
import sys, numaload
mirror = numaload.attach(sys.argv[1])
print(1, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Models a to d of 4, 4, 8 and 4 MiB."""
    return [
        sparse_model(tmp_path / f"{name}.gguf", size * MIB)
        for name, size in zip("abcd", (4, 4, 8, 4), strict=True)
    ]


def mirrored(path: str, pool: str = "lora", **options: Any) -> None:
    api.mirror(path, nodes="local", shared=True, pool=pool, **options).close()


def there() -> list[str]:
    return sorted(Path(entry.model.paths[0]).stem for entry in stored.entries())


def unused_for(path: str, seconds: float) -> None:
    """Have it look as if nobody had used it for so long."""
    (entry,) = (e for e in stored.entries() if e.model.paths == (path,))
    then = time.time() - seconds
    os.utime(f"{userdir.path()}/{entry.name}", (then, then))


def running(program: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "1\n"
    return process


# Pools, budgets, and what goes


@pytest.mark.usefixtures("store")
def test_for_room_the_longest_unused_and_largest_goes_first(models: list[str]) -> None:
    a, b, c, d = models
    mirrored(a)
    mirrored(b)
    mirrored(c)
    mirrored(d, pool="base")
    for path, idle in ((a, 100), (b, 900), (c, 300), (d, 9000)):
        unused_for(path, idle)
    catalogue.budget("lora", 17 * MIB)  # for what is there; c has the greatest idle time x size: 8
    new = sparse_model(Path(a).parent / "new.gguf", 4 * MIB)
    with pytest.warns(NumaloadWarning, match=f"b.gguf: its replicas went: room for {new}"):
        mirrored(new)
    assert there() == ["a", "c", "d", "new"]  # 900 s x 4 MiB is more than 300 s x 8 MiB
    (gone,) = catalogue.table().gone
    assert (gone.path, gone.pool, gone.why) == (b, "lora", f"room for {new}")
    assert gone.nbytes >= 4 * MIB
    assert gone.idle_s >= 900


@pytest.mark.usefixtures("store")
def test_nothing_goes_if_all_that_may_go_is_not_enough(models: list[str]) -> None:
    a, b, c, _ = models
    mirrored(a)
    mirrored(b, keep=True)
    catalogue.budget("lora", 9 * MIB)
    with pytest.raises(NodeMemoryError, match=r"pool lora on node 0.*b\.gguf is kept") as caught:
        mirrored(c)
    assert "numaload store budget" in str(caught.value)
    assert there() == ["a", "b"]
    assert catalogue.table().gone == []


@pytest.mark.usefixtures("store")
def test_in_a_pool_over_its_budget_enough_goes(models: list[str]) -> None:
    a, b, c, d = models
    mirrored(a)
    mirrored(c)
    unused_for(c, 1000)
    catalogue.budget("lora", 5 * MIB)  # there are 12: c alone would be enough for d without that
    with pytest.warns(NumaloadWarning, match="its replicas went: room for"):
        mirrored(d)
    assert there() == ["d"]
    mirrored(b, keep=True, pool="")
    catalogue.budget("base", 3 * MIB)
    with pytest.raises(NodeMemoryError, match="has 0 bytes") as caught:
        mirrored(a, pool="")
    assert caught.value.free == 0


@pytest.mark.parametrize("program", [LEASE, HOLD_OPEN], ids=["lease", "unknown program"])
def test_what_is_used_does_not_go(store: Path, models: list[str], program: str) -> None:
    a, b, _, _ = models
    mirrored(a)
    with api.attach(a) as mirror:
        (replica,) = mirror.paths(mirror.nodes[0])
    catalogue.budget("lora", 5 * MIB)
    with running(program, a if program == LEASE else replica) as user:
        unused_for(a, 1000)
        (row,) = catalogue.table().rows
        assert row.users == [f"{Path(f'/proc/{user.pid}/comm').read_text().strip()} ({user.pid})"]
        with pytest.raises(NodeMemoryError, match=rf"a\.gguf is used by .*\({user.pid}\)"):
            mirrored(b)
        assert there() == ["a"]
        assert catalogue.collect(idle_s=0.0) == []
        user.communicate()
    assert catalogue.table().rows[0].idle_s < 900  # it was seen
    with pytest.warns(NumaloadWarning, match="room for"):
        mirrored(b)
    assert there() == ["b"]


def test_releasing_says_that_an_unknown_program_still_uses_it(
    store: Path, models: list[str]
) -> None:
    mirrored(models[0])
    mirrored(models[1])
    with api.attach(models[0]) as mirror:
        (replica,) = mirror.paths(mirror.nodes[0])
    with running(HOLD_OPEN, replica) as user:
        done = reclaim.release(stored.entries())
        user.communicate()
    assert [one.in_use for one in done] == [True, False]
    assert there() == []


def test_a_killed_process_has_no_lease(store: Path, models: list[str]) -> None:
    mirrored(models[0])
    with running(LEASE, models[0]) as user:
        user.kill()
    assert catalogue.table().rows[0].users == []


@pytest.mark.usefixtures("store")
def test_what_cannot_be_asked_for_its_users_counts_as_used(
    models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored(models[0])
    (entry,) = stored.entries()
    assert reclaim.uses([entry])[entry.name].users == []

    def refused(*_: object) -> bool:
        raise StoreError("flock: Input/output error")

    monkeypatch.setattr(userdir, "flock", refused)
    assert reclaim.uses([entry])[entry.name].users == ["a process that cannot be seen"]


@pytest.mark.usefixtures("store")
def test_pool_and_keep_can_be_said_later(models: list[str]) -> None:
    mirrored(models[0], pool="")
    (row,) = catalogue.table().rows
    assert (row.pool, row.keep) == ("base", False)
    mirrored(models[0], pool="lora", keep=True)
    (row,) = catalogue.table().rows
    assert (row.pool, row.keep) == ("lora", True)
    mirrored(models[0], pool="")  # says nothing of either
    (row,) = catalogue.table().rows
    assert (row.pool, row.keep) == ("lora", True)


@pytest.mark.usefixtures("store")
def test_what_is_there_moves_only_into_a_pool_that_has_room(models: list[str]) -> None:
    a, b, *_ = models
    mirrored(a, pool="base")
    mirrored(b)
    catalogue.budget("lora", 5 * MIB)
    catalogue.budget("small", 2 * MIB)
    with pytest.raises(NodeMemoryError, match="pool small on node 0: needs"):
        mirrored(a, pool="small")
    assert [row.pool for row in catalogue.table().rows] == ["base", "lora"]
    with pytest.warns(NumaloadWarning, match=f"b.gguf: its replicas went: room for {a}"):
        mirrored(a)
    assert [row.pool for row in catalogue.table().rows] == ["lora"]
    mirrored(a)  # it is there, and needs nothing more


def test_what_was_said_later_survives_an_emptied_folder(
    numaload: Numaload, models: list[str]
) -> None:
    """A holder publishes its entry again as it was last seen."""
    numaload("mirror", models[0], "--hold")
    numaload("mirror", models[0], "--hold", "--pool", "lora", "--keep")
    (row,) = numaload.json("store")["rows"]
    assert (row["pool"], row["keep"], row["users"]) == ("lora", True, [])
    time.sleep(2)  # it looks once a second
    for folder in numaload.store.glob("*.*"):
        shutil.rmtree(folder)
    wait_for(lambda: len(numaload.json("store")["rows"]) == 1, "the entry")
    (row,) = numaload.json("store")["rows"]
    assert (row["pool"], row["keep"]) == ("lora", True)
    numaload("release")


@pytest.mark.usefixtures("store")
def test_collecting(models: list[str]) -> None:
    a, b, c, d = models
    mirrored(a)
    mirrored(b)
    mirrored(c, keep=True)
    mirrored(d, pool="mine")
    assert catalogue.collect() == []
    unused_for(b, 500)
    with pytest.warns(NumaloadWarning):
        (gone,) = catalogue.collect(idle_s=400)
    assert gone.entry.model.paths == (b,)
    catalogue.budget("lora", "0")
    with pytest.warns(NumaloadWarning) as warned:
        catalogue.collect(pool="lora")
    said = [str(one.message) for one in warned]
    assert f"{a}: its replicas went: pool lora was over its budget" in said
    assert any(re.search(rf"over its budget; {c} is kept$", text) for text in said)
    assert there() == ["c", "d"]
    catalogue.budget("lora", None)
    assert catalogue.table().budgets == {}
    for never in (-1, float("nan"), "1"):
        with pytest.raises(UsageError, match="0 or more"):
            catalogue.collect(idle_s=never)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "option", "read"),
    [
        (("gc", "--idle", "2592000"), "idle", 2592000),
        (("gc", "--idle", "0"), "idle", 0),
        (("gc", "--io-timeout", "1e300"), "io_timeout", LONGEST_S),
        (("path", "m", "--io-timeout", "3"), "io_timeout", 3),
        (("budget", "--io-timeout", "3"), "io_timeout", 3),
        (("--io-timeout", "3", "path", "m"), "io_timeout", 3),
        (("gc",), "io_timeout", None),
    ],
)
def test_seconds_of_the_store_s_parts(words: tuple[str, ...], option: str, read: object) -> None:
    assert getattr(_parser(["store"]).parse_args(["store", *words]), option) == read


def test_an_idle_time_below_0_is_refused(numaload: Numaload) -> None:
    said = numaload("store", "gc", "--idle", "-1", status=2).stderr
    assert "expected a number of seconds, 0 or more, found '-1'" in said


def test_the_budget_of_one_pool_is_shown(numaload: Numaload) -> None:
    assert numaload("store", "budget", "lora").stdout == "pool lora: no budget\n"
    numaload("store", "budget", "base", "2G")
    numaload("store", "budget", "lora", "1G")
    assert numaload("store", "budget", "lora").stdout == "pool lora: at most 1.0 GiB of each node\n"


def test_what_keeps_a_pool_over_its_budget_is_named(numaload: Numaload, models: list[str]) -> None:
    a = models[0]
    numaload("mirror", a, "--pool", "lora", "--keep", "--nodes", "local")
    numaload("store", "budget", "lora", "1M")
    for part in ([], ["gc"]):
        said = numaload("store", *part).stderr
        assert re.search(rf"pool lora on node 0: 31\d+ bytes over its budget; {a} is kept", said)


@pytest.mark.parametrize("pool", [None, 5, "my pool"])
def test_what_is_no_name_of_a_pool(models: list[str], pool: Any) -> None:
    calls: list[Callable[[], object]] = [
        lambda: catalogue.budget(pool, "5"),
        lambda: catalogue.collect(pool=pool),
        lambda: api.mirror(models[0], shared=True, pool=pool),
    ]
    for call in calls if pool is not None else calls[:2]:
        with pytest.raises(UsageError, match="expected letters, digits"):
            call()


@pytest.mark.parametrize("place", ["", "typo/deeper"])
def test_a_place_that_no_store_can_be_in_is_named(tmp_path: Path, place: str) -> None:
    numaload = Numaload(tmp_path / place)  # not on a tmpfs, or below what is not there
    for words in (["store"], ["status"], ["release"], ["store", "budget"], ["store", "gc"]):
        assert f"error: {tmp_path}" in numaload(*words, status=1).stderr


def test_budgets_of_nodes_in_percent() -> None:
    budget = pools.Budget.parse("25%")
    assert (budget.of(1000), str(budget)) == (250, "25%")
    assert pools.Budget.parse("1.5G").of(1) == 3 << 29
    for written in ("1T", "800000T", "0.000001%", "33.333333%", "100%", "0", str(10**18 - 100)):
        budget = pools.Budget.parse(written)
        assert pools.Budget.parse(str(budget)) == budget
    for wrong in ("", "-1", "101%", "G", "1e9", "x" * 1000, "1 2", "1000000T", str(10**18 - 1)):
        with pytest.raises(UsageError, match=r"expected (bytes|less than 10)"):
            pools.Budget.parse(wrong)
    for name in ("", "../x", "a b", "x" * 33, "\x1b[31m"):
        with pytest.raises(UsageError, match="expected letters"):
            pools.checked(name)


@pytest.mark.usefixtures("store")
def test_a_budget_that_cannot_be_read_takes_no_other_with_it() -> None:
    catalogue.budget("lora", "20G")
    catalogue.budget("base", 2 << 40)
    file = Path(userdir.path(), pools.FOLDER, pools.BUDGETS)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bad": "1e9"}))
    with pytest.warns(NumaloadWarning, match=r"budgets.json: budget '1e9'.*left out"):
        catalogue.budget("more", "1G")
    found = {pool: str(budget) for pool, budget in pools.budgets().items()}
    assert found == {"lora": str(20 << 30), "base": str(2 << 40), "more": str(1 << 30)}


@pytest.mark.parametrize("written", [b"", b"[]", b'{"lora": 5e999}', b'{"../x": "1G"}', b"\xff"])
@pytest.mark.usefixtures("store")
def test_records_that_cannot_be_read(models: list[str], written: bytes) -> None:
    catalogue.budget("lora", "0")
    folder = Path(userdir.path(), pools.FOLDER)
    for name in (pools.BUDGETS, pools.JOURNAL):
        (folder / name).write_bytes(written)
    with pytest.warns(NumaloadWarning, match="no record that can be read|left out"):
        mirrored(models[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumaloadWarning)
        table = catalogue.table()
        reclaim.release(stored.entries())
    assert (table.budgets, table.gone) == ({}, [])
    assert len(catalogue.table().gone) == 1  # a journal is begun again


@pytest.mark.usefixtures("store")
def test_the_journal_is_bounded_and_shows_releases(models: list[str]) -> None:
    for _ in range(pools.ROWS + 3):
        entry = next(iter(stored.entries()), None)
        if entry is None:
            mirrored(models[0])
            (entry,) = stored.entries()
        pools.note(entry, "x" * 2000, 5)
    reclaim.release(stored.entries())
    gone = catalogue.table().gone
    assert len(gone) == pools.ROWS
    assert (gone[0].why, len(gone[1].why)) == ("released", 1000)


# The command line


def test_store_says_what_is_there_and_why_others_went(
    numaload: Numaload, models: list[str]
) -> None:
    a, b, *_ = models
    assert "nothing is in the store" in numaload("store").stdout
    numaload("mirror", a, "--pool", "lora")
    numaload("mirror", b, "--pool", "lora", "--keep")
    with running_lease(numaload, a) as user:
        shown = numaload("store").stdout
        assert f"({user.pid})" in shown
        user.communicate()
    assert "kept" in shown
    assert "node 0: 4.0 MiB" in shown
    assert (
        "pool lora: at most 1.0 GiB of each node"
        in numaload("store", "budget", "lora", "1G").stdout
    )
    assert numaload.json("store", "budget") == {"lora": str(1 << 30)}
    assert "lora" not in numaload("store", "budget", "lora", "none").stdout
    numaload("store", "budget", "lora", "lots", status=2)
    numaload("mirror", a, "--pool", "no/pool", status=2)
    numaload("store", "budget", "lora", "0")
    done = numaload("store", "gc")
    assert "1 model went" in done.stdout
    assert f"{a}: its replicas went: pool lora was over its budget" in done.stderr
    assert f"{a} (4.0 MiB, pool lora" in numaload("store").stdout
    found = numaload.json("store")
    assert [row["paths"] for row in found["rows"]] == [[b]]
    assert found["gone"][0]["path"] == a


def running_lease(numaload: Numaload, path: str) -> subprocess.Popen[str]:
    return running(LEASE, path)


def test_plan_names_what_would_go(numaload: Numaload, models: list[str]) -> None:
    a, b, *_ = models
    numaload("mirror", a, "--pool", "lora")
    numaload("store", "budget", "lora", "5M")
    plan = numaload("plan", b, "--pool", "lora")
    assert f"yes, once these go for room: {a}" in plan.stdout
    numaload("plan", b)  # the other pool has no budget
    assert [row["paths"] for row in numaload.json("store")["rows"]] == [[a]]


def test_ten_that_ask_at_once_build_once(numaload: Numaload, models: list[str]) -> None:
    c = models[2]
    asking = [numaload.start("mirror", c, "--json") for _ in range(10)]
    reports = [json.loads(process.communicate()[0])[0] for process in asking]
    assert all(process.returncode == 0 for process in asking)
    assert sorted(report["copied"] > 0 for report in reports) == [False] * 9 + [True]
    assert all(report["placed"] for report in reports)
    assert len(numaload.json("store")["rows"]) == 1


# Files that change


@pytest.mark.usefixtures("store")
def test_a_changed_file_is_mirrored_beside_its_old_replica(models: list[str]) -> None:
    a = models[0]
    mirrored(a, keep=True)
    with api.attach(a) as old:
        before = bytes(old.local()["big.weight"].buffer[:16])
        with open(a, "r+b") as file:
            file.seek(-16, os.SEEK_END)
            file.write(b"changed" * 2)
        with pytest.raises(ReplicaNotFoundError, match="changed since it was mirrored"):
            api.attach(a)
        mirrored(a, pool="")
        assert len(stored.entries()) == 2
        assert bytes(old.local()["big.weight"].buffer[:16]) == before
        with api.open(a, replica="local") as new:
            assert b"changed" in bytes(new["big.weight"].buffer[-16:])
    with pytest.warns(NumaloadWarning, match="its replicas went: the file changed"):
        assert len(catalogue.table().rows) == 1  # it goes when somebody looks
    (entry,) = stored.entries()
    assert (entry.pool, entry.keep) == ("lora", True)  # as the old one
    os.utime(a)
    assert catalogue.collect() == []  # nothing replaces it, and it is kept
    assert stored.entries() == [entry]


def test_a_change_that_times_do_not_tell_is_found_by_its_checksum(
    numaload: Numaload, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = models[0]
    numaload("mirror", a)
    assert numaload.json("verify", a, "--checksum")[0]["differs"] == []
    (entry,) = stored.entries()
    manifest = Path(userdir.path(), entry.name, "manifest.json")
    row = json.loads(manifest.read_bytes())
    row["checksums"][0][0] = "0" * 16  # as if the file had had other bytes
    manifest.write_text(json.dumps(row))
    done = numaload("verify", a, "--checksum", status=1)
    assert f"{a}: 1 chunk of the file differ from its replica" in done.stderr


# A replica for any program


def test_a_folder_for_any_program(numaload: Numaload, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    path = sparse_model(source / "m.gguf", MIB)
    (source / "config.json").write_text("{}")
    (source / "tokenizer").mkdir()
    (source / ".cache").mkdir()
    numaload("mirror", path)
    folder = Path(numaload("store", "path", path).stdout.strip())
    assert sorted(os.listdir(folder)) == ["config.json", "m.gguf", "tokenizer"]
    assert not (folder / "m.gguf").is_symlink()
    assert (folder / "m.gguf").read_bytes() == Path(path).read_bytes()
    assert (folder / "config.json").read_text() == "{}"
    (source / "config.json").unlink()
    (source / "added.json").write_text("[]")
    assert numaload.json("store", "path", path, "--node", 0)["folder"] == str(folder)
    assert sorted(os.listdir(folder)) == ["added.json", "m.gguf", "tokenizer"]
    numaload("store", "path", path, "--node", 7, status=2)
    numaload("release")
    assert not folder.exists()
    assert list(numaload.store.rglob("*.gguf")) == []
    assert (source / "added.json").exists()
    numaload("store", "path", path, status=1)


def test_each_who_asks_has_its_own_folder_and_names(
    numaload: Numaload, models: list[str], tmp_path: Path
) -> None:
    """As in the hub's cache: files of several folders that are one file."""
    paths = [tmp_path / "1" / "m.gguf", tmp_path / "2" / "m.gguf", tmp_path / "2" / "other.gguf"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        (path.parent / "config.json").write_text(path.parent.name)
    paths[0].symlink_to(models[0])
    paths[1].symlink_to("../1/m.gguf")
    os.link(models[0], paths[2])
    for hold in ((), ("--hold",)):
        numaload("mirror", paths[0], *hold)
        folders = [
            Path(numaload("store", "path", path).stdout.strip()) for path in (*paths, *paths)
        ]
        assert folders[:3] == folders[3:]
        assert len(set(folders)) == 3
        for path, folder in zip(paths, folders, strict=False):
            assert (folder / "config.json").read_text() == path.parent.name
            assert (folder / path.name).samefile(folders[0] / "m.gguf")
            assert not (folder / path.name).samefile(models[0])
        said = numaload("exec", paths[2], "--", "cat", "{folder}/config.json").stdout
        assert said == "2"
        assert "warning" not in numaload("release").stderr
        assert list(numaload.store.glob("*.*")) == []
    assert paths[2].samefile(models[0])


def test_a_folder_has_the_files_of_where_the_model_is_now(
    store: Path, models: list[str], tmp_path: Path
) -> None:
    before, now = tmp_path / "before", tmp_path / "now"
    before.mkdir()
    os.rename(models[0], before / "m.gguf")
    (before / "config.json").write_text("{}")
    mirrored(str(before / "m.gguf"))
    catalogue.folder(before / "m.gguf")
    os.rename(before, now)
    folder = Path(catalogue.folder(now / "m.gguf"))
    assert (folder / "config.json").read_text() == "{}"
    reclaim.release(stored.entries())  # also links that lead nowhere
    assert list(store.glob("*.*")) == []


def test_links_to_any_folder_go_with_the_entry(store: Path, models: list[str]) -> None:
    mirrored(models[0])
    (folder,) = store.glob("*.*/node0")
    (folder / "config.json").symlink_to("/elsewhere/config.json")
    reclaim.release(stored.entries())
    assert list(store.glob("*.*")) == []


def test_links_that_others_made_stay(store: Path, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", MIB)
    with api.mirror(path, nodes="local", shared=True) as mirror:
        folder = Path(mirror.folder(mirror.nodes[0]))
    (folder / "own").symlink_to("/etc/hostname")
    with pytest.warns(NumaloadWarning, match="stays: some of it"):
        reclaim.release(stored.entries())
    assert os.listdir(next(store.glob(".*/node0"))) == ["own"]


def test_no_folder_for_files_of_several(store: Path, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", MIB)
    with api.mirror(path) as private:  # on one node: the file itself
        assert private.folder(private.nodes[0]) == str(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.txt").touch()
    with api.mirror(path, nodes="local", shared=True) as mirror, pytest.MonkeyPatch.context() as p:
        p.setattr("numaload.replicas.folders.MOST_LINKS", 2)
        with pytest.raises(StoreError, match="4 files, expected at most 2"):
            mirror.folder(mirror.nodes[0])


def test_a_folder_that_somebody_released_is_named(store: Path, models: list[str]) -> None:
    with api.mirror(models[0], nodes="local", shared=True) as mirror:
        reclaim.release(stored.entries())
        with pytest.raises(ReplicaNotFoundError, match="was released since it was attached"):
            mirror.folder(mirror.nodes[0])


def test_open_reads_the_nearest_replica(store: Path, models: list[str]) -> None:
    a = models[0]
    with pytest.raises(ReplicaNotFoundError, match="no replica"):
        api.open(a, replica="local")
    mirrored(a)
    for replica in ("local", 0):
        with api.open(a, replica=replica) as weights:
            assert weights.node == 0
            assert not weights["big.weight"].is_file
            assert catalogue.table().rows[0].users
            tensor = weights["big.weight"]
        with pytest.raises(ClosedError):
            tensor.dequantize()
        assert catalogue.table().rows[0].users == []
    with api.open(a) as weights:
        assert weights["big.weight"].is_file
    odd: tuple[Any, ...] = ("near", 1.0, True)
    for wrong in odd:
        with pytest.raises(UsageError, match="expected 'local' or a node"):
            api.open(a, replica=wrong)
    with pytest.raises(UsageError, match="give replica or copy"):
        api.open(a, replica="local", copy=True)
    with pytest.raises(UsageError, match="no replica on node 5"):
        api.open(a, replica=5)
    assert catalogue.table().rows[0].users == []


@pytest.mark.usefixtures("store")
def test_the_kernel_is_asked_when_the_report_is_looked_at(models: list[str]) -> None:
    mirrored(models[0])
    with api.attach(models[0]) as mirror:
        assert mirror.report.placed
        assert mirror.report.placements[0].pages > 0
    assert mirror.report.placed  # was asked
    mirror = api.attach(models[0])
    mirror.close()
    with pytest.raises(ClosedError, match="before the kernel was asked"):
        mirror.report  # noqa: B018


# Watching


def test_watching_keeps_a_model_mirrored(numaload: Numaload, models: list[str]) -> None:
    a = models[0]
    assert "not ready" in numaload("status", "--ready", a, status=1).stdout
    with numaload.start("mirror", a, "--watch", "0.2") as watching:
        wait_for(lambda: ready(numaload, a), "the replica")
        (row,) = numaload.json("store")["rows"]
        assert row["users"]
        with open(a, "r+b") as file:
            file.truncate(os.path.getsize(a))
            file.seek(-8, os.SEEK_END)
            file.write(b"replaced")
        wait_for(lambda: ready(numaload, a), "the replica of the changed file")
        wait_for(lambda: len(numaload.json("store")["rows"]) == 1, "the end of the old replica")
        numaload("release", a)
        wait_for(lambda: ready(numaload, a), "the replica once more")
        watching.send_signal(signal.SIGTERM)
        assert watching.wait() != 0
    found = json.loads(numaload("status", "--ready", a, "--json").stdout)
    assert found == {"ready": True, "why": {}}


@contextmanager
def watching(numaload: Numaload, *words: object) -> Iterator[subprocess.Popen[str]]:
    """It is ended whatever the test finds."""
    with numaload.start("mirror", *words, "--watch", "0.1", "--json") as watching:
        try:
            yield watching
        finally:
            watching.kill()


def next_report(watching: subprocess.Popen[str]) -> Any:
    assert watching.stdout is not None
    (report,) = json.loads(watching.stdout.readline())
    return report


def test_watching_what_patterns_place_and_a_file_that_is_removed(
    numaload: Numaload, models: list[str]
) -> None:
    a = models[0]
    with watching(numaload, a, "--place", ".*=mirror") as process:
        assert next_report(process)["policy"] == "mixed"
        numaload("release", a)
        assert next_report(process)["copied"] > 0
        next(numaload.store.rglob("*.parts")).unlink()
        assert next_report(process)["copied"] > 0
        process.kill()
        said = process.communicate()[1]
    assert f"{a}: a damaged replica is built again: " in said
    assert "placed by patterns" not in said


def test_watching_all_models_in_a_pool_that_has_no_room_for_two(
    numaload: Numaload, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = models[0]
    numaload("prewarm", a)
    numaload("store", "budget", "base", "5M")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    with watching(numaload) as process:
        next_report(process)
        with open(a, "r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"replaced")
        assert next_report(process)["copied"] > 0
        process.kill()
        said = process.communicate()[1]
    assert f"{a}: its replicas went: room for {a}" in said
    assert said.count("NOTIFY_SOCKET=") == 1
    (row,) = numaload.json("store")["rows"]
    assert row["source"] == "unchanged"


@pytest.mark.usefixtures("store")
def test_watching_says_once_that_it_does_not_fit(
    models: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue.budget("base", "1M")
    options, plans = _parser(["mirror"]).parse_args(["mirror", models[0], "--watch"]), [""]
    for _ in range(3):
        with pytest.raises(NodeMemoryError):
            replicas._mirrored_again(options, models[:1], [], plans)
    assert capsys.readouterr().err.count("plan: pool base on node 0: does NOT fit") == 1


def cut(path: Path) -> None:
    mode = path.stat().st_mode  # of another mode it is somebody's own file, and stays
    path.chmod(0o600)
    os.truncate(path, 1000)
    path.chmod(mode)


@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_a_damaged_replica_is_not_ready_and_is_built_again(
    numaload: Numaload, models: list[str], damage: Callable[[Path], None]
) -> None:
    a = models[0]
    numaload("mirror", a)
    with watching(numaload, a) as process:
        next_report(process)
        damage(next(numaload.store.rglob("a.gguf")))
        assert next_report(process)["copied"] > 0
    damage(next(numaload.store.rglob("a.gguf")))
    assert not ready(numaload, a)
    assert "to build on" in numaload("plan", a, "--policy", "mirror").stdout
    assert f"{a}: a damaged replica is built again: " in numaload("mirror", a).stderr
    assert ready(numaload, a)
    assert "damaged: " in numaload("store").stdout


def test_a_watched_file_that_is_missing_stops_no_other(
    numaload: Numaload, models: list[str], tmp_path: Path
) -> None:
    a, b = models[:2]
    away = shutil.move(b, tmp_path / "away")
    with watching(numaload, a, b) as process:
        next_report(process)
        numaload("release", a)
        assert next_report(process)["paths"] == [a]
        shutil.move(away, b)
        wait_for(lambda: ready(numaload, b), "the replica of the file that came back")
        process.kill()
        assert process.communicate()[1].count(f"{b}: No such file or directory") == 1


def test_a_released_replica_of_a_missing_file_is_not_built_for_ever(
    numaload: Numaload, models: list[str]
) -> None:
    a, b = models[:2]
    with watching(numaload, a, b) as process:
        assert process.stdout is not None
        assert len(json.loads(process.stdout.readline())) == 2
        os.unlink(b)
        (entry,) = [path.parents[1] for path in numaload.store.rglob("b.gguf")]
        shutil.rmtree(entry)
        os.utime(a)  # looked at again, and mirrored as it is now
        assert next_report(process)["paths"] == [a]
        time.sleep(1)  # ten looks more
        process.kill()
        assert not process.stdout.read()


@pytest.mark.parametrize(
    ("words", "status"),
    [(["--pool", "my pool"], 2), (["--nodes", "99"], 2), (["--place", "x=mirror"], 2)],
)
def test_watching_what_no_waiting_mends_ends(
    numaload: Numaload, models: list[str], words: list[str], status: int
) -> None:
    numaload("mirror", models[0], "--watch", "0.1", *words, status=status)


def test_watching_with_no_store_ends(models: list[str], tmp_path: Path) -> None:
    no_tmpfs = Numaload(tmp_path)
    done = no_tmpfs("mirror", models[0], "--watch", "0.1", status=1)
    assert "expected a tmpfs" in done.stderr


def test_what_is_watched_is_in_use(numaload: Numaload, models: list[str]) -> None:
    """However the watcher ends; idle time counts from when it was last there."""
    with watching(numaload, models[0]) as process:
        next_report(process)
        (folder,) = [path.parents[1] for path in numaload.store.rglob("a.gguf")]
        os.utime(folder, (1, 1))
        wait_for(lambda: folder.stat().st_mtime > 1, "a look at the replica")


def test_watching_nothing_ends(numaload: Numaload) -> None:
    assert "no models known since boot" in numaload("mirror", "--watch", status=2).stderr


def ready(numaload: Numaload, path: str) -> bool:
    done = subprocess.run(
        numaload.command("status", "--ready", path), env=numaload.environment, check=False,
        capture_output=True,
    )  # fmt: skip
    return done.returncode == 0
