"""``numaload.stream``: how it ends, early or badly, and what it takes of memory and page cache."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numaload as api
from commands import Numaload, evict, resident, wait_for
from numaload import errors
from numaload.demo import write_model
from numaload.formats.qtypes import QuantType
from typed_models import Given, blocks, write

MIB = 1 << 20
DTYPES = ["float32", "float16", "bfloat16"]


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    tensors = {
        "large": blocks(QuantType.Q4_K, (700, 4096)),
        "small": blocks(QuantType.Q8_0, (3, 32)),
    }
    return write(tmp_path / "mixed.gguf", tensors)


# What goes wrong on the way.


@pytest.mark.parametrize("dtype", [*DTYPES, None])
@pytest.mark.parametrize("type_id", [QuantType.Q8_K, 31, 133, 4242])
def test_what_cannot_be_converted_is_an_error_in_its_turn(
    tmp_path: Path, type_id: int, dtype: str | None
) -> None:
    tensors = {name: blocks(QuantType.Q4_K, (4, 256)) for name in ("a", "b")}
    tensors["bad"] = Given(type_id, (2, 256), bytes(2 * 292))
    tensors["after"] = tensors["a"]
    with api.open(write(tmp_path / "m.gguf", tensors)) as weights:
        found: list[str] = []
        kind = errors.UnknownQuantTypeError if type_id > 30 else errors.UnsupportedTypeError
        if type_id == QuantType.Q8_K and dtype is None:
            assert [name for name, _ in api.stream(weights, None)] == list(tensors)
            return
        with pytest.raises(kind, match="'bad'"):
            found.extend(name for name, _ in api.stream(weights, dtype))
        assert found == ["a", "b"]
        names = [name for name, _ in api.stream(weights, dtype, names=["a", "after"])]
        assert names == ["a", "after"]


def rewritten(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def halved(path: str) -> None:
    os.truncate(path, os.path.getsize(path) // 2)


@pytest.mark.parametrize("harm", [halved, rewritten])
@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("ahead", [0, 4 * MIB])
def test_a_file_that_changes_meanwhile(
    tmp_path: Path, harm: Callable[[str], None], dtype: str | None, ahead: int
) -> None:
    """An error, and not the end of the process, as it is for those who map files."""
    (path,) = write_model(str(tmp_path / "m.gguf"), 12 * MIB)
    with api.open(path) as weights, api.open(path, copy=True) as before:
        stream = api.stream(weights, dtype, ahead=ahead)
        found = dict([next(stream)])
        harm(path)
        with pytest.raises(errors.ReadError, match=r"changed while in use|ends early") as caught:
            found.update(stream)
        assert 1 <= len(found) < len(weights)
        assert caught.value.tensor in weights
        assert caught.value.tensor not in found
        assert f"in tensor {caught.value.tensor!r}" in str(caught.value)
        again = dict(api.stream(before, dtype, names=found))
        assert {name: a.tobytes() for name, a in found.items()} == {
            name: a.tobytes() for name, a in again.items()
        }


def test_closed_weights(mixed: str) -> None:
    weights = api.open(mixed)
    stream = api.stream(weights, ahead=0)
    name, array = next(stream)
    copied = array.copy()
    weights.close()
    with pytest.raises(errors.ClosedError, match="were closed"):
        next(stream)
    assert array.tobytes() == copied.tobytes()
    for dtype in ("float32", None):
        with pytest.raises(errors.ClosedError, match="were closed"):
            next(api.stream(weights, dtype, names=[name]))


def many(folder: Path, count: int = 24) -> str:
    """Each of them some pieces of work for one thread, so that several are under way."""
    tensors = {f"t{i:02d}": blocks(QuantType.Q1_0, (1700, 1024), seed=i) for i in range(count)}
    return write(folder / "many.gguf", tensors)


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with api.open(many(tmp_path)) as weights:
        names = list(weights)[3:]
        total = sum(weights[name].nbytes for name in names)
        for _ in api.stream(weights, names=names, progress=lambda *step: seen.append(step)):
            pass
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_what_was_cancelled_is_never_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads are busy with several tensors: none of these may come as if it were done."""
    monkeypatch.setattr(import_module("numaload.pipeline.fill"), "PART", 2 << 20)  # several of each
    with api.open(many(tmp_path)) as weights:
        expected = [tensor.dequantize().view("u4") for tensor in weights.values()]
        for last in range(3, 40):
            calls = itertools.count()

            def enough(done: int, total: int, calls: Any = calls, last: int = last) -> bool:
                return bool(next(calls) != last)  # once is enough

            found: list[Any] = []
            with pytest.raises(errors.CancelledError) as caught:
                found.extend(array for _, array in api.stream(weights, progress=enough))
            assert len(found) < len(weights)
            for array, one in zip(found, expected, strict=False):
                np.testing.assert_array_equal(array.view("u4"), one)
            assert 0 < caught.value.done < caught.value.total


def test_an_error_of_the_callback_comes_through(mixed: str) -> None:
    def fails(done: int, total: int) -> None:
        if done:
            raise ZeroDivisionError

    with api.open(mixed) as weights, pytest.raises(ZeroDivisionError):
        list(api.stream(weights, None, progress=fails))


# Nothing is left behind.


def no_reader() -> bool:
    return all(thread.name != "numaload-ahead" for thread in threading.enumerate())


@pytest.mark.parametrize("how", ["break", "close", "raise", "forgotten"])
def test_nothing_runs_on_after_an_early_end(tmp_path: Path, how: str) -> None:
    calls = []
    with api.open(many(tmp_path)) as weights:
        # Not all of it at once, or threads may be done before this is.
        stream = api.stream(weights, ahead=32 * MIB, progress=lambda *step: calls.append(step))
        next(stream)
        if how == "raise":
            with pytest.raises(RuntimeError):
                stream.throw(RuntimeError())
        elif how == "close":
            stream.close()
        elif how == "break":
            for _ in stream:
                break
        del stream
        gc.collect()
        done, total = calls[-1]
        assert done < total
        assert no_reader()
        workers = weights.workers()
        for future in [workers.submit(int) for _ in range(4 * workers.count)]:
            future.result()
        assert calls[-1] == (done, total)


def test_one_that_was_never_begun_does_nothing(mixed: str) -> None:
    calls: list[Any] = []
    with api.open(mixed) as weights:
        stream = api.stream(weights, progress=lambda *step: calls.append(step))
        assert no_reader()
        stream.close()
    assert calls == []


INTERRUPTED = """
import json, os, signal, sys, threading, time
import numaload

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
where = sys.argv[2]
weights = numaload.open(sys.argv[1])
names = list(weights)
expected = {n: a.tobytes() for n, a in numaload.stream(weights, "float16")}
calls = []

def progress(done, total):
    calls.append(done)
    if where == "waiting" and len(calls) == at:  # called by who waits
        os.kill(os.getpid(), signal.SIGINT)

def ready():
    # A thread of the pool that hangs would never answer.
    futures = [weights.workers().submit(int) for _ in range(8)]
    return [future.result() for future in futures] == [0] * 8

for at in range(3, 23):
    found = {}
    calls.clear()
    stream = numaload.stream(weights, "float16", ahead=4 << 20, progress=progress)
    try:
        for name, array in stream:
            found[name] = array
            if where == "working" and len(found) == at:
                signal.raise_signal(signal.SIGINT)
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        stream.close()
    count = len(calls)
    assert all(thread.name != "numaload-ahead" for thread in threading.enumerate())
    assert ready() and len(calls) == count < 70
    assert list(found) == names[:len(found)]
    assert all(array.tobytes() == expected[name] for name, array in found.items())
print(json.dumps(len(list(numaload.stream(weights, "float16")))))
"""


@pytest.mark.parametrize("where", ["working", "waiting"])
def test_ctrl_c(tmp_path: Path, numaload: Numaload, where: str) -> None:
    """Wherever it comes: what is there is right, nothing goes on, and all can begin again."""
    assert numaload.python(INTERRUPTED, many(tmp_path), where) == 24


# Memory, and the page cache.


@pytest.mark.parametrize("dtype", ["float32", None])
@pytest.mark.parametrize("ahead", [0, 64 * MIB])
def test_what_is_held_stays_and_what_is_dropped_is_used_again(
    tmp_path: Path, dtype: str | None, ahead: int
) -> None:
    one = blocks(QuantType.Q8_0, (768, 4096))
    tensors = {f"t{i}": one._replace(raw=one.raw[34 * i :] + one.raw[: 34 * i]) for i in range(24)}
    with api.open(write(tmp_path / "m.gguf", tensors)) as weights:
        held = dict(api.stream(weights, dtype, ahead=ahead))
        for name, array in held.items():
            expected = weights[name].dequantize() if dtype else np.asarray(weights[name].buffer)
            assert array.tobytes() == expected.tobytes(), name
        assert len({array.ctypes.data for array in held.values()}) == len(held)
        del held
        places = []
        for _, array in api.stream(weights, dtype, ahead=ahead):
            places.append(array.ctypes.data)
            del array  # before the next is asked for
        if ahead:
            assert len(set(places)) < len(places)


MEMORY = """
import json, resource, sys
import numpy as np, numaload

MIB = 1 << 20
path, ahead, allowed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
dtype = {"None": None}.get(sys.argv[4], sys.argv[4])
weights = numaload.open(path)
small = [name for name in weights if weights[name].nbytes < MIB]
small += {tensor.qtype: name for name, tensor in weights.items()}.values()
warm = {name: None for name, _ in numaload.stream(weights, dtype, ahead=0, names=small)}
with open("/proc/self/status") as file:
    data = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, data + allowed))
total = sum(array.nbytes for _, array in numaload.stream(weights, dtype, ahead=ahead))
try:
    np.zeros(allowed + 8 * MIB, np.uint8)
    refused = False
except MemoryError:
    refused = True
print(json.dumps({"total": total, "refused": refused}))
"""
LARGEST, REST = (
    16 * MIB,
    16 * MIB,
)  # bytes of one tensor as float32; of thread stacks, and what blocks


@pytest.mark.parametrize("dtype", ["float32", "None"])
@pytest.mark.parametrize("ahead", [0, 32 * MIB])
def test_memory_is_bounded(tmp_path: Path, numaload: Numaload, dtype: str, ahead: int) -> None:
    """By what may be ready, as much that is kept for later, and two tensors of the caller's."""
    (path,) = write_model(str(tmp_path / "m.gguf"), 200 * MIB)
    allowed = 2 * ahead + 2 * LARGEST + REST
    found = numaload.python(MEMORY, path, ahead, allowed, dtype)
    assert found["refused"], "the limit was none: the test says nothing"
    assert found["total"] > 2 * allowed or dtype == "None"
    assert found["total"] > 190 * MIB


def test_cold_files_are_read_ahead(tmp_path: Path) -> None:
    """As far as asked for, by the kernel's own count, and not without being asked."""
    (path,) = write_model(str(tmp_path / "m.gguf"), 160 * MIB)
    ahead, slack = 32 * MIB, 24 * MIB  # the kernel reads ahead too, and a tensor may be large
    evict([path])
    with api.open(path) as weights:
        if resident(path) > 16 * MIB:
            pytest.skip("this file system keeps what is to be cold")
        stream = api.stream(weights, None, ahead=ahead)
        next(stream)
        wait_for(lambda: resident(path) >= ahead - MIB, "reading ahead")
        taken = 0
        for name, _ in stream:
            taken += weights[name].nbytes
            # What is ready was read, and as much again may be there of what comes after.
            assert resident(path) <= taken + 2 * ahead + slack
            if taken > 64 * MIB:
                break
        del stream
        assert no_reader()
        evict([path])
        stream = api.stream(weights, None, ahead=0)
        next(stream)
        assert resident(path) <= 2 * slack
        assert no_reader()
