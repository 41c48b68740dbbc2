"""The file changes under us: what numaload reads itself ends in a named error and a clean state."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import LIMIT_S, Numaload, evict, sparse_model
from numaload import errors
from numaload.errors import (
    FileChangedError,
    FormatError,
    ReadError,
    ReplicaNotFoundError,
    SplitError,
)
from numaload.machine.userdir import MARKER

MIB = 1 << 20
TENSOR = "blk.0.attn_q.weight"
TOKENS = "tokenizer.ggml.tokens"


def replace(path: str) -> None:
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def rewrite(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))


def extend(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


CHANGES: dict[str, Callable[[str], Any]] = {
    "truncated": lambda path: os.truncate(path, 4096),
    "emptied": lambda path: os.truncate(path, 0),
    "replaced": replace,
    "rewritten": rewrite,
    "extended": extend,
    "touched": os.utime,
    "forbidden": lambda path: os.chmod(path, 0),
    "deleted": os.unlink,
}
every_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@pytest.fixture
def own_model(model_files: list[str], tmp_path: Path) -> list[str]:
    """A copy that a test may change."""
    return [shutil.copy(path, str(tmp_path)) for path in model_files]


def left_over(store: Path) -> list[str]:
    return [name for name in os.listdir(store) if name not in (MARKER, "lock", "known", "pools")]


def private_bytes() -> int:
    """Anonymous memory of this process that is in RAM."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return int(line.split()[1]) << 10


@every_change
def test_between_opening_and_looking(own_model: list[str], change: Callable[[str], Any]) -> None:
    with api.open(own_model[0]) as weights:
        assert weights[TENSOR].nbytes
        change(own_model[0])
        with pytest.raises(FileChangedError, match="changed while in use"):
            list(weights.metadata[TOKENS])
        with pytest.raises(FileChangedError, match="changed while in use"):
            weights[TENSOR].blocks  # noqa: B018
        with pytest.raises(FileChangedError):
            weights[TENSOR].dequantize()


@every_change
def test_a_copy_is_not_hurt(
    own_model: list[str], model_files: list[str], change: Callable[[str], Any]
) -> None:
    with api.open(own_model[0], copy=True) as weights:
        for path in own_model:
            change(path)
        with api.open(model_files[0]) as expected:
            assert list(weights.metadata[TOKENS]) == list(expected.metadata[TOKENS])
            assert dict(weights) == {name: weights[name] for name in expected}
            for name, tensor in expected.items():
                assert weights[name].buffer == tensor.buffer
            floats = weights[TENSOR].dequantize()
            assert (floats == expected[TENSOR].dequantize()).all()
        assert weights[TENSOR].node is None
        assert weights[TENSOR].path == own_model[0]
        kept, address = weights[TENSOR].blocks, weights[TENSOR].address
        assert kept.__array_interface__["data"][0] == address
    assert kept.any()
    with pytest.raises(api.errors.ClosedError):
        weights[TENSOR].blocks  # noqa: B018


def once(change: Callable[[str], Any], path: str, *, first: bool) -> Callable[[int, int], None]:
    """A progress callback that changes the file at its first call, or after the first bytes."""
    done: list[int] = []

    def progress(count: int, _: int) -> None:
        if not done and (first or count):
            done.append(count)
            change(path)

    return progress


@every_change
@pytest.mark.parametrize("first", [True, False], ids=["at once", "half-way"])
def test_while_it_is_copied(
    own_model: list[str], change: Callable[[str], Any], first: bool, descriptors: Callable[[], int]
) -> None:
    before, fds, progress = private_bytes(), descriptors(), once(change, own_model[1], first=first)
    with pytest.raises(FileChangedError, match=own_model[1]):
        api.open(own_model[0], copy=True, progress=progress)
    assert private_bytes() - before < 16 * MIB
    assert descriptors() == fds


@every_change
@pytest.mark.parametrize("first", [True, False], ids=["after the plan", "half-way"])
def test_while_it_is_mirrored(
    store: Path,
    own_model: list[str],
    change: Callable[[str], Any],
    first: bool,
    descriptors: Callable[[], int],
) -> None:
    fds, progress = descriptors(), once(change, own_model[1], first=first)
    with pytest.raises(FileChangedError, match=own_model[1]):
        api.mirror(own_model[0], shared=True, progress=progress)
    assert left_over(store) == []
    assert descriptors() == fds
    assert used_in(store) < MIB


def used_in(store: Path) -> int:
    """Bytes of everything below the store that has a name."""
    return sum(path.stat().st_blocks * 512 for path in store.rglob("*"))


@every_change
def test_between_opening_and_mirroring(
    store: Path, own_model: list[str], change: Callable[[str], Any]
) -> None:
    with api.open(own_model[0]) as weights:
        change(own_model[1])
        with pytest.raises(FileChangedError, match=own_model[1]):
            api.mirror(weights, shared=True)
    assert left_over(store) == []


@every_change
def test_between_mirroring_and_attaching(
    numaload: Numaload, own_model: list[str], change: Callable[[str], Any]
) -> None:
    api.mirror(own_model[0], shared=True).close()
    (entry,) = left_over(numaload.store)
    change(own_model[1])
    with pytest.raises((ReplicaNotFoundError, ReadError, FormatError), match=own_model[1][:-20]):
        api.attach(own_model[0])
    done = numaload("verify", own_model[1])  # the replica is what it was
    assert "all checksums right" in done.stdout
    assert "verified is the replica as it was built" in done.stderr
    assert numaload("status", own_model[1]).stdout
    assert left_over(numaload.store) == [entry]
    numaload("release", own_model[1])
    assert left_over(numaload.store) == []


def test_an_attached_replica_is_not_hurt(store: Path, own_model: list[str]) -> None:
    api.mirror(own_model[0], shared=True).close()
    with api.attach(own_model[0]) as mirror:
        expected = int(mirror.local()[TENSOR].blocks.sum())
        for path in own_model:
            os.truncate(path, 0)
        assert int(mirror.local()[TENSOR].blocks.sum()) == expected
        assert mirror.verify().right


def test_a_file_cut_while_it_is_prewarmed(store: Path, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "big.gguf", 512 * MIB)
    evict([path])

    def progress(done: int, _: int) -> None:
        if done >= 128 * MIB:
            os.truncate(path, 64 * MIB)

    with pytest.raises(FileChangedError, match=r"ends early: \d+ bytes are missing"):
        api.prewarm(path, progress=progress)
    assert not (store / "known").exists()  # what was not read is not what a bare mirror builds
    with pytest.raises(FormatError):
        api.mirror(path, shared=True)


@every_change
def test_while_it_is_prewarmed(
    store: Path, own_model: list[str], change: Callable[[str], Any], descriptors: Callable[[], int]
) -> None:
    """Page cache follows a file that is written to: only bytes that are gone are an error."""
    evict(own_model)
    fds = descriptors()
    lost: dict[str, type[errors.NumaloadError]]
    lost = {"truncated": FileChangedError, "emptied": FileChangedError, "deleted": SplitError}
    expected = next((lost[name] for name in lost if CHANGES[name] is change), None)

    def progress(done: int, _: int) -> None:
        if not done:
            change(own_model[1])

    if expected:
        with pytest.raises(expected, match=own_model[1]):
            api.prewarm(own_model[0], progress=progress)
    else:
        assert api.prewarm(own_model[0], progress=progress).paths == own_model
    assert descriptors() == fds


def test_a_copy_that_is_mirrored_is_read_from_the_files(store: Path, own_model: list[str]) -> None:
    with api.open(own_model[0], copy=True) as weights:
        with api.mirror(weights, shared=True) as mirror:
            view = mirror.local()
            assert view[TENSOR].node is not None
            assert view[TENSOR].buffer == weights[TENSOR].buffer
            assert list(view.metadata[TOKENS]) == list(weights.metadata[TOKENS])
        rewrite(own_model[0])
        with pytest.raises(FileChangedError):
            numaload_again(weights)


def numaload_again(weights: api.Weights) -> None:
    from numaload.replicas import reclaim
    from numaload.replicas import store as stores

    reclaim.release(stores.entries())
    api.mirror(weights, shared=True)


def test_a_copy_that_does_not_fit_is_refused_with_numbers(tmp_path: Path) -> None:
    from numaload.machine.memory import available

    free = available().free
    path = sparse_model(tmp_path / "huge.gguf", 2 * free)
    before = private_bytes()
    with pytest.raises(api.errors.NodeMemoryError, match="nothing was copied") as caught:
        api.open(path, copy=True)
    assert caught.value.needed >= 2 * free > caught.value.free > 0
    assert private_bytes() - before < MIB


def test_a_copy_can_be_cancelled(own_model: list[str], descriptors: Callable[[], int]) -> None:
    before, fds = private_bytes(), descriptors()
    with pytest.raises(api.errors.CancelledError) as caught:
        api.open(own_model[0], copy=True, progress=lambda done, _: not done)
    assert 0 < caught.value.done < caught.value.total
    assert private_bytes() - before < 16 * MIB
    assert descriptors() == fds


LOOK = """
import json, os, sys, numaload
path, copy = sys.argv[1], sys.argv[2] == "copy"
tensor = numaload.open(path, copy=copy)["blk.0.ffn_down.weight"]
blocks, before = tensor.blocks, int(tensor.blocks[-1].sum())
os.truncate(path, 4096)
print(json.dumps(before == int(blocks[-1].sum())))
"""


@pytest.mark.parametrize("how", ["map", "copy"])
def test_views_of_a_mapped_file_that_is_cut_kill_and_copies_do_not(
    own_model: list[str], how: str
) -> None:
    """What README says of mapped files: the kernel sends SIGBUS to whoever touches lost pages."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, own_model[0], how], capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if how == "map":
        assert done.returncode == -signal.SIGBUS
    else:
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) is True
