"""``numaload.stream``: every tensor in the order of the files, the same as one by one."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
import safetensors_builder as sb
from commands import Numaload, evict, wait_for
from numaload import errors
from numaload.demo import write_model
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
from numaload.storage.files import SourceFile
from numaload.storage.residency import residency
from typed_models import Given, blocks, numbers, plain, write

MIB = 1 << 20
DTYPES = ["float32", "float16", "bfloat16"]
INTEGERS = ["I8", "I16", "I32", "I64"]


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Every type that has a kernel, and the others that are numbers; several pieces of one."""
    tensors = {f"{q.name}.weight": blocks(q, (3, 4, 256), seed=q) for q in registry.KERNELS}
    tensors["large"] = blocks(QuantType.Q4_K, (700, 4096))
    tensors |= {name: numbers(name, (5, 7)) for name in [*INTEGERS, "F64"]}
    tensors |= {"scalar": numbers("F32", (1,)), "odd": numbers("F16", (7,))}
    return write(tmp_path / "mixed.gguf", tensors)


def as_bytes(array: Any) -> bytes:
    """Of numpy and torch: NaN is a pattern as well."""
    if isinstance(array, np.ndarray):
        return array.tobytes()
    return bytes(array.contiguous().reshape(-1).view(api_torch().uint8).numpy())


def api_torch() -> Any:
    return pytest.importorskip("torch")


def check(weights: api.Weights, found: dict[str, Any], dtype: str) -> None:
    """``found`` are the tensors with these kernels, as ``dequantize`` has them."""
    for name, array in found.items():
        expected = weights[name].dequantize(dtype)
        assert tuple(array.shape) == expected.shape, name
        assert str(array.dtype).removeprefix("torch.") == dtype, name
        assert as_bytes(array) == expected.tobytes(), name


def floats(weights: api.Weights) -> list[str]:
    return [name for name, tensor in weights.items() if tensor.has_kernel]


# What it yields.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_the_same_as_dequantize(mixed: str, dtype: str, kind: str) -> None:
    wanted = dtype if kind == "numpy" else getattr(api_torch(), dtype)
    with api.open(mixed) as weights:
        found = dict(api.stream(weights, wanted, names=floats(weights)))
        check(weights, found, dtype)
        assert len(found) == len(registry.KERNELS) + 3


def test_dtypes_may_be_numpy_s(mixed: str) -> None:
    with api.open(mixed) as weights:
        for dtype in (np.float16, np.dtype(ml_dtypes.bfloat16)):
            ((_, array),) = api.stream(weights, dtype, names=["large"])
            assert array.dtype == dtype


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_integers_keep_their_type_and_float64_is_converted(mixed: str, kind: str) -> None:
    for dtype in DTYPES:
        wanted = dtype if kind == "numpy" else getattr(api_torch(), dtype)
        with api.open(mixed) as weights:
            found = dict(api.stream(weights, wanted, names=[*INTEGERS, "F64"]))
        for name in INTEGERS:
            assert str(found[name].dtype).endswith(plain(name, (1,)).dtype.name)
            np.testing.assert_array_equal(np.asarray(found[name]), plain(name, (5, 7)))
        assert str(found["F64"].dtype).removeprefix("torch.") == dtype
        as_float32 = found["F64"].astype("f4") if kind == "numpy" else found["F64"].float().numpy()
        np.testing.assert_array_equal(as_float32, plain("F64", (5, 7)))


def test_as_in_the_file(mixed: str) -> None:
    with api.open(mixed) as weights:
        for name, array in api.stream(weights, None):
            tensor = weights[name]
            assert array.tobytes() == bytes(tensor.buffer), name
            if tensor.in_blocks:
                assert array.dtype == np.uint8
                assert array.shape == (*tensor.shape[:-1], tensor.blocks.shape[-1])
            else:
                assert array.shape == tensor.shape
            assert array.flags.writeable


@pytest.mark.filterwarnings("ignore:torch tensors of weights share")
def test_as_in_the_file_for_torch(mixed: str) -> None:
    torch = api_torch()
    with api.open(mixed) as weights:
        for name, found in api.stream(weights, "torch"):
            expected = weights[name].torch()
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(
                found.view(-1).view(torch.uint8), expected.view(-1).view(torch.uint8)
            )
            found.zero_()  # it is the caller's


RARE = {
    "F8_E4M3": ("float8_e4m3fn", True), "F8_E5M2": ("float8_e5m2", True), "BOOL": ("bool", False),
    "C64": ("complex64", False), "U16": ("uint16", False), "U64": ("uint64", False),
}  # fmt: skip


@pytest.mark.parametrize("name", RARE)
@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_types_of_safetensors(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "m.safetensors").write_bytes(sb.model({"t": (name, (3, 5)), "e": (name, (0, 5))}))
    item, converted = RARE[name]
    with api.open(tmp_path / "m.safetensors") as weights:
        raw = bytes(weights["t"].buffer)
        numpy_item = getattr(ml_dtypes, item, None) or np.dtype(item)
        expected = np.frombuffer(raw, numpy_item).reshape(3, 5)
        for dtype in DTYPES:
            wanted = dtype if kind == "numpy" else getattr(api_torch(), dtype)
            found = dict(api.stream(weights, wanted))
            assert tuple(found["e"].shape) == (0, 5)
            assert str(found["t"].dtype).removeprefix("torch.") == (dtype if converted else item)
            one = expected.astype(getattr(ml_dtypes, dtype, dtype)) if converted else expected
            found_floats = np.frombuffer(as_bytes(found["t"]), one.dtype).reshape(3, 5)
            np.testing.assert_array_equal(found_floats, one)  # of NaN any is as good


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float64_that_is_too_large_is_infinite(tmp_path: Path, dtype: str) -> None:
    """Without a word from numpy: the test would end at a warning."""
    raw = np.array([1e300, -1e300, 1.0, np.nan]).tobytes()
    path = write(tmp_path / "m.gguf", {"t": Given(QuantType.F64, (4,), raw)})
    with api.open(path) as weights:
        ((_, found),) = api.stream(weights, dtype)
    np.testing.assert_array_equal(found.astype("f4"), [np.inf, -np.inf, 1, np.nan])


@pytest.mark.parametrize(("name", "shape"), [("F4", (2, 6)), ("F4", (2, 3)), ("F6_E2M3", (4, 2))])
def test_numbers_that_share_bytes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Their bytes are there; what they cannot be turned to is an error, after those before."""
    rows: dict[str, sb.Row] = {"a": ("F32", (2,)), "t": (name, shape)}
    (tmp_path / "m.safetensors").write_bytes(sb.model(rows))
    with api.open(tmp_path / "m.safetensors") as weights:
        found = dict(api.stream(weights, None))
        assert found["t"].dtype == np.uint8
        assert found["t"].tobytes() == bytes(weights["t"].buffer)
        for dtype in DTYPES:
            stream = api.stream(weights, dtype)
            assert next(stream)[0] == "a"
            with pytest.raises(errors.UnsupportedTypeError, match=f"'t': {name}"):
                next(stream)


def test_big_endian(tmp_path: Path) -> None:
    """Numbers are turned round; blocks stay what they are, and cannot be converted."""
    names = ["F32", "F16", "BF16", "F64", *INTEGERS]
    with gb.big_endian():
        tensors = {name: numbers(name, (5, 7), ">") for name in names}
        path = write(tmp_path / "m.gguf", tensors | {"Q8_0": blocks(QuantType.Q8_0, (2, 32))})
    with api.open(path) as weights:
        found = dict(api.stream(weights, None))
        for name in names:
            array = found[name].view("u2") if name == "BF16" else found[name]
            assert array.dtype.isnative
            np.testing.assert_array_equal(array, plain(name, (5, 7)))
        assert found["Q8_0"].tobytes() == bytes(weights["Q8_0"].buffer)
        for dtype in DTYPES:
            stream = api.stream(weights, dtype)
            for _ in names[:3]:
                np.testing.assert_array_equal(next(stream)[1].astype("f4"), plain("F32", (5, 7)))
            assert [next(stream)[0] for _ in names[3:]] == names[3:]
            with pytest.raises(errors.UnsupportedTypeError, match="Q8_0 of a big-endian"):
                next(stream)


def test_big_endian_for_torch(tmp_path: Path) -> None:
    torch = api_torch()
    with gb.big_endian():
        tensors = {name: numbers(name, (5, 7), ">") for name in ["F32", "BF16", "F64", *INTEGERS]}
        path = write(tmp_path / "m.gguf", tensors)
    with api.open(path) as weights:
        for dtype in ("torch", torch.float32):
            for name, found in api.stream(weights, dtype):
                wanted = plain("F32" if name == "BF16" else name, (5, 7))
                np.testing.assert_array_equal(found.double().numpy(), wanted)


# In which order, and which of them.


def test_in_the_order_of_the_bytes_not_of_the_table(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(20)]
    tensors = {name: blocks(QuantType.Q4_0, (4, 32), seed=i) for i, name in enumerate(names)}
    path = write(tmp_path / "m.gguf", tensors, table=sorted(names, reverse=True))
    with api.open(path) as weights:
        assert list(weights) != names
        assert [name for name, _ in api.stream(weights)] == names
        assert [name for name, _ in api.stream(weights, names=["t7", "t3", "t7"])] == ["t3", "t7"]


def test_split_files_one_after_another(model_files: list[str]) -> None:
    with api.open(model_files[-1]) as weights:
        places = [weights[name].place_in_files for name, _ in api.stream(weights, None)]
        assert len(places) == len(weights)
        assert {part for part, _ in places} == set(range(len(model_files)))
        assert places == sorted(places)


def test_nothing(tmp_path: Path, mixed: str) -> None:
    with api.open(write(tmp_path / "m.gguf", {})) as weights:
        assert list(api.stream(weights)) == []
    with api.open(mixed) as weights:
        assert list(api.stream(weights, names=[])) == []


def test_many_small_tensors(tmp_path: Path) -> None:
    """More than may be ready at a time, however little they are."""
    rows: dict[str, sb.Row] = {f"t{i:05d}": ("I16", (3,)) for i in range(5000)}
    (tmp_path / "m.safetensors").write_bytes(sb.model(rows))
    with api.open(tmp_path / "m.safetensors") as weights:
        found = dict(api.stream(weights))
        assert list(found) == sorted(rows)
        assert all(found[name].tobytes() == bytes(weights[name].buffer) for name in rows)


def test_what_cannot_mean_anything_is_an_error_at_once(mixed: str) -> None:
    with api.open(mixed) as weights:
        with pytest.raises(errors.TensorNotFoundError, match=r"no tensor 'larg'; close: large"):
            api.stream(weights, names=["large", "larg"])
        for dtype in ("float64", np.int8, "F32", 7, object()):
            with pytest.raises(errors.UsageError, match="dtype"):
                api.stream(weights, dtype)
        with pytest.raises(errors.UsageError, match="ahead: -1 bytes"):
            api.stream(weights, ahead=-1)


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
        with pytest.raises(errors.ReadError, match=r"changed while in use|ends early"):
            found.update(stream)
        assert 1 <= len(found) < len(weights)
        again = dict(api.stream(before, dtype, names=found))
        assert {name: as_bytes(a) for name, a in found.items()} == {
            name: as_bytes(a) for name, a in again.items()
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


def test_what_was_cancelled_is_never_half_there(tmp_path: Path) -> None:
    """Threads are busy with several tensors: none of these may come as if it were done."""
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
        stream = api.stream(weights, progress=lambda *step: calls.append(step))
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

where = sys.argv[2]
weights = numaload.open(sys.argv[1])
names = list(weights)
expected = {n: a.tobytes() for n, a in numaload.stream(weights, "float16")}
calls = []

def progress(done, total):
    calls.append(done)
    if where == "waiting" and len(calls) == at:  # no piece is done before this one is
        time.sleep(0.02)  # until it really waits
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


# Several, and other memory.


def test_two_at_once_in_one_thread_and_in_two(mixed: str) -> None:
    with api.open(mixed) as weights:
        names = floats(weights)
        pairs = zip(
            api.stream(weights, "float32", names=names, ahead=MIB),
            api.stream(weights, "bfloat16", names=names), strict=True,
        )  # fmt: skip
        first, second = (dict(half) for half in zip(*pairs, strict=True))
        check(weights, first, "float32")
        check(weights, second, "bfloat16")
        found: dict[str, dict[str, Any]] = {}

        def work(dtype: str) -> None:
            found[dtype] = dict(api.stream(weights, dtype, names=names))

        threads = [threading.Thread(target=work, args=(dtype,)) for dtype in DTYPES]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for dtype in DTYPES:
            assert list(found[dtype]) == names
            check(weights, found[dtype], dtype)


def test_dequantizing_something_meanwhile(mixed: str) -> None:
    with api.open(mixed) as weights:
        for name, array in api.stream(weights, names=floats(weights)):
            check(weights, {name: array}, "float32")


@pytest.mark.parametrize("dtype", ["float32", None])
def test_a_replica_and_a_copy(mixed: str, store: Path, dtype: str | None) -> None:
    with api.open(mixed) as weights:
        names = floats(weights)
        expected = {n: as_bytes(a) for n, a in api.stream(weights, dtype, names=names)}
    with api.mirror(mixed, shared=True) as mirror:
        view = mirror.view(mirror.nodes[0])
        assert not view[names[0]].is_file
        found = dict(api.stream(view, dtype, names=names))
        assert {name: as_bytes(array) for name, array in found.items()} == expected
        stream = api.stream(view, dtype, ahead=0, names=["large", "F32.weight"])
        next(stream)
    with pytest.raises(errors.ClosedError):
        next(stream)
    with api.open(mixed, copy=True) as weights:
        halved(mixed)
        found = dict(api.stream(weights, dtype, names=names))
    assert {name: as_bytes(array) for name, array in found.items()} == expected
    for array in found.values():
        array[...] = 0  # the caller's own, also where nothing was converted


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


def resident(path: str) -> int:
    with SourceFile(path) as file:
        return residency(file).resident


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
