"""``numaload.stream``: every tensor in the order of the files, the same as one by one."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
import safetensors_builder as sb
from numaload import errors
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
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
        with pytest.raises(errors.UsageError, match=r"what numaload\.open returns"):
            api.stream(weights.paths[0])  # type: ignore[arg-type]
        with pytest.raises(errors.UsageError, match="ahead: -1 bytes"):
            api.stream(weights, ahead=-1)


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
        os.truncate(mixed, 1000)
        found = dict(api.stream(weights, dtype, names=names))
    assert {name: as_bytes(array) for name, array in found.items()} == expected
    for array in found.values():
        array[...] = 0  # the caller's own, also where nothing was converted
