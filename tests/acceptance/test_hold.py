"""Replicas that stay: held by a process, neither limited by the tmpfs nor gone with its files."""

from __future__ import annotations

import mmap
import os
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import numaload as api
from commands import Numaload, running, used_bytes, wait_for
from numaload.machine.userdir import MARKER

MIB = 1 << 20
NAME = "blk.0.attn_q.weight"
ATTACH = """
import json, sys, numaload
with numaload.attach(sys.argv[1]) as m:
    print(json.dumps({"right": m.verify().right, "kind": m.report.kind,
                      "sum": int(m.local()["blk.0.attn_q.weight"].blocks.sum())}))
"""


def pids_in(store: Path) -> set[int]:
    """Of the processes that the links in the store lead to."""
    links = [os.readlink(path) for path in store.glob("*/node*/*") if path.is_symlink()]
    return {int(match[1]) for link in links if (match := re.match(r"/proc/(\d+)/fd/\d+$", link))}


def status_of(numaload: Numaload) -> dict[str, Any]:
    (entry,) = numaload.json("status")["replicas"]
    return dict(entry)


def paths_of(entry: dict[str, Any]) -> list[str]:
    return [path for paths in entry["replicas"].values() for path in paths]


def left_over(store: Path) -> list[str]:
    return [name for name in os.listdir(store) if name not in (MARKER, "lock", "known", "pools")]


@pytest.fixture(autouse=True)
def nobody_is_left(store: Path) -> Iterator[None]:
    """A holder whose store goes for good would wait for it to come back."""
    yield
    for pid in pids_in(store):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def held(numaload: Numaload, model: str) -> int:
    """The process that holds the model's replicas."""
    (report,) = numaload.json("mirror", model, "--hold")
    assert report["placed"]
    (pid,) = report["holders"]
    return int(pid)


def test_held_replicas_are_the_files_themselves(
    numaload: Numaload, held: int, model_files: list[str]
) -> None:
    entry = status_of(numaload)
    paths = paths_of(entry)
    assert [os.path.basename(p) for p in paths] == [os.path.basename(p) for p in model_files]
    for replica, source in zip(paths, model_files, strict=True):
        assert os.readlink(replica).startswith(f"/proc/{held}/fd/")
        assert Path(replica).read_bytes() == Path(source).read_bytes()
        assert stat.S_IMODE(os.stat(replica).st_mode) == 0o400
    with api.open(paths[1]) as weights:
        assert weights.paths == paths


def test_other_engines_open_them_by_their_names(
    numaload: Numaload, held: int, model_files: list[str]
) -> None:
    for path, source in zip(paths_of(status_of(numaload)), model_files, strict=True):
        found, expected = gguf.GGUFReader(path).tensors, gguf.GGUFReader(source).tensors
        assert [t.name for t in found] == [t.name for t in expected]
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one.data, other.data)
        fd = os.open(path, os.O_RDONLY)
        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped:
            assert mapped[:4] == b"GGUF"
        os.close(fd)


def test_another_process_attaches_verifies_and_releases(
    numaload: Numaload, held: int, model: str
) -> None:
    said = numaload("status").stdout
    assert f"held by process {held}" in said
    assert status_of(numaload)["holder"] == held
    found = numaload.python(ATTACH, model)
    with api.open(model) as weights:
        expected = int(weights[NAME].blocks.sum())
    assert found == {"right": True, "kind": "shared", "sum": expected}
    assert "all checksums right" in numaload("verify", model).stdout
    assert "released" in numaload("release", model).stdout
    assert not running(held)
    assert left_over(numaload.store) == []
    assert "no replica" in numaload("verify", model, status=1).stderr


def test_the_memory_is_not_the_tmpfs_s(numaload: Numaload, model: str) -> None:
    before = used_bytes(numaload.store)
    numaload("mirror", model, "--hold")
    assert used_bytes(numaload.store) - before < MIB


def test_the_holder_is_small_and_of_no_session_of_ours(held: int) -> None:
    status = Path(f"/proc/{held}/status").read_text()
    assert "Name:\tnumaload-hold\n" in status
    assert int(status.partition("VmRSS:")[2].split()[0]) << 10 < 20 * MIB
    assert os.getsid(held) != os.getsid(0)
    os.kill(held, signal.SIGHUP)
    os.kill(held, signal.SIGINT)
    assert running(held)


def test_what_was_emptied_comes_back(numaload: Numaload, held: int, model: str) -> None:
    """As at the logout of an ordinary user: all of it goes, by whatever name."""
    before = paths_of(status_of(numaload))
    shutil.rmtree(numaload.store)
    wait_for(lambda: all(map(os.path.exists, before)), "the replicas to be published again", 60)
    entry = status_of(numaload)
    assert (entry["holder"], paths_of(entry)) == (held, before)
    assert numaload.python(ATTACH, model)["right"]
    assert stat.S_IMODE(os.stat(numaload.store).st_mode) == 0o700
    assert "there already" in numaload("mirror", model, "--hold").stdout
    numaload("release")
    assert not running(held)
    assert left_over(numaload.store) == []


@pytest.mark.parametrize(
    ("verb", "nothing"), [("status", "replicas: none"), ("store", "nothing is in the store")]
)
def test_a_killed_holder_is_said_and_its_entry_cleared(
    numaload: Numaload, held: int, model: str, verb: str, nothing: str
) -> None:
    os.kill(held, signal.SIGKILL)
    wait_for(lambda: not running(held), "the holder to die")
    done = numaload(verb)
    assert f"process {held}" in done.stderr
    assert "is gone" in done.stderr
    assert nothing in done.stdout
    assert left_over(numaload.store) == []
    (report,) = numaload.json("mirror", model, "--hold")
    assert report["built"]
    assert report["holders"] != [held]
    assert numaload.python(ATTACH, model)["right"]


def test_a_killed_holder_hurts_nobody_who_has_attached(
    numaload: Numaload, held: int, model: str
) -> None:
    with api.attach(model) as mirror:
        total = int(mirror.local()[NAME].blocks.sum())
        os.kill(held, signal.SIGKILL)
        wait_for(lambda: not running(held), "the holder to die")
        assert int(mirror.local()[NAME].blocks.sum()) == total
        assert mirror.verify().right
    with pytest.raises(api.errors.ReplicaNotFoundError):
        api.attach(model)


def test_releasing_what_is_in_use_says_so_and_hurts_nobody(
    numaload: Numaload, held: int, model: str
) -> None:
    with api.attach(model) as mirror:
        total = int(mirror.local()[NAME].blocks.sum())
        assert "still in use" in numaload("release").stdout
        assert not running(held)
        assert int(mirror.local()[NAME].blocks.sum()) == total
    assert "nothing was in the store" in numaload("release").stdout


def test_held_and_not_held_side_by_side(
    numaload: Numaload, model: str, model_files: list[str], tmp_path: Path
) -> None:
    numaload("mirror", model)
    done = numaload("mirror", model, "--hold", status=1)
    assert "without a holder; release it first: numaload release" in done.stderr
    others = [shutil.copy(path, str(tmp_path)) for path in model_files]
    numaload("mirror", others[0], "--hold")
    assert "there already" in numaload("mirror", others[0]).stdout
    holders = {row["paths"][0]: row["holder"] for row in numaload.json("status")["replicas"]}
    assert holders[model_files[0]] is None
    pid = int(holders[others[0]])
    assert "released" in numaload("release", others[0]).stdout
    assert not running(pid)
    assert status_of(numaload)["paths"] == model_files


def test_two_at_once_build_once_and_one_holds(numaload: Numaload, model: str) -> None:
    jobs = [numaload.start("mirror", model, "--hold") for _ in range(2)]
    outputs = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], outputs
    assert len(pids_in(numaload.store)) == 1
    pid = status_of(numaload)["holder"]
    assert all(f"held by process {pid}" in out for out, _ in outputs)


def test_a_store_on_a_small_tmpfs_is_no_limit(
    numaload: Numaload, model: str, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=4M,mode=700", "small", str(small)]
    if subprocess.run(words, check=False, capture_output=True).returncode != 0:
        pytest.skip("a small tmpfs cannot be mounted here: root is needed")
    there = Numaload(small / f"numaload-{os.geteuid()}")
    try:
        refused = there("mirror", model, status=1).stderr
        assert "does NOT fit" in refused
        assert f"remount,size=1G {small}" in refused
        assert "--hold" in refused
        there("mirror", model, "--hold")
        assert used_bytes(small) < MIB
        assert there.python(ATTACH, model)["right"]
        pid = status_of(there)["holder"]
        there("release")
        assert not running(pid)
    finally:
        for pid in pids_in(there.store):
            os.kill(pid, signal.SIGKILL)
        subprocess.run(["umount", str(small)], check=True)


def test_from_python(store: Path, model: str) -> None:
    with api.mirror(model, shared=True, hold=True) as mirror:
        (pid,) = mirror.report.holders
        assert mirror.verify().right
    assert running(pid)
    with api.attach(model) as attached:
        assert attached.report.holders == [pid]
    with pytest.raises(api.errors.UsageError, match="shared"):
        api.mirror(model, hold=True)
