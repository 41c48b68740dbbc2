"""``Tensor.torch``: weights as torch tensors, in place where nothing is to be converted."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
import safetensors_builder as sb
from commands import LIMIT_S
from numaload import errors
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
from typed_models import PLAIN, Given, blocks, numbers, plain, write

torch = pytest.importorskip("torch")

SAID = "share read-only memory"
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{SAID}")
DTYPES = ["float32", "float16", "bfloat16"]
TYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64",
    "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
}  # fmt: skip


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[api.Weights]:
    tensors = {f"{q.name}.weight": blocks(q, (3, 4, 256), seed=q) for q in registry.KERNELS}
    tensors |= {name: numbers(name, (5, 7)) for name in PLAIN}
    tensors["large"] = blocks(QuantType.Q6_K, (700, 4096))
    tensors["one"] = numbers("F16", (1,))
    with api.open(write(tmp_path / "m.gguf", tensors)) as opened:
        yield opened


def values(tensor: Any) -> Any:
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view("u2")
    return tensor.numpy()


def bits(found: Any) -> bytes:
    """Of numpy's arrays and torch's tensors."""
    if isinstance(found, np.ndarray):
        return found.tobytes()
    return bytes(found.contiguous().view(-1).view(torch.uint8).numpy())


def same_bits(tensor: Any, other: Any) -> bool:
    return bits(tensor) == bits(other)


# In place.


@pytest.mark.parametrize("name", TYPES)
def test_numbers_in_place(weights: api.Weights, name: str) -> None:
    found = weights[name].torch()
    assert found.dtype == getattr(torch, TYPES[name])
    assert found.data_ptr() == weights[name].address
    assert found.is_contiguous()
    np.testing.assert_array_equal(values(found), plain(name, (5, 7)))


def test_blocks_in_place(weights: api.Weights) -> None:
    for name, tensor in weights.items():
        if not tensor.in_blocks:
            continue
        found = tensor.torch()
        assert found.dtype == torch.uint8
        assert tuple(found.shape) == (*tensor.shape[:-1], tensor.blocks.shape[-1])
        assert found.data_ptr() == tensor.address
        assert same_bits(found, tensor.blocks), name


def test_read_only_memory_is_said_once(
    tmp_path: Path, weights: api.Weights, nothing_said: None
) -> None:
    """By numaload, with the way out; torch has nothing to add."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for tensor in weights.values():
            tensor.torch()
        with api.open(write(tmp_path / "other.gguf", {"a": numbers("F32", (3,))})) as others:
            others["a"].torch()
    (one,) = said
    assert one.category is errors.NumaloadWarning
    assert "clone()" in str(one.message)
    assert "ends the process" in str(one.message)


def test_what_has_its_own_memory_is_not_spoken_of(weights: api.Weights, nothing_said: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights["Q4_K.weight"].torch("float32").zero_()


WRITES = """
import sys, warnings
warnings.simplefilter("ignore")
import numaload
numaload.open(sys.argv[1])["F32"].torch().zero_()
"""


def test_it_is_read_only(weights: api.Weights) -> None:
    """The file is never written to; what the warning says is what happens."""
    before = Path(weights.paths[0]).read_bytes()
    words = [sys.executable, "-c", WRITES, weights.paths[0]]
    done = subprocess.run(words, capture_output=True, check=False, timeout=LIMIT_S)
    assert done.returncode < 0
    assert Path(weights.paths[0]).read_bytes() == before


def test_views_outlive_the_weights(weights: api.Weights) -> None:
    tensor = weights["F32"]
    found, large = tensor.torch(), weights["large"].torch()
    expected = weights["large"].blocks.copy()
    weights.close()
    np.testing.assert_array_equal(found.numpy(), plain("F32", (5, 7)))
    assert same_bits(large, expected)
    for arguments in ((), ("float32",), ("float64",)):
        with pytest.raises(errors.ClosedError, match="were closed"):
            tensor.torch(*arguments)


def test_from_a_replica_and_a_copy(weights: api.Weights, store: Path) -> None:
    path = weights.paths[0]
    with api.mirror(path, shared=True) as mirror:
        view = mirror.view(mirror.nodes[0])
        kept = view["F32"].torch()
        assert kept.data_ptr() == view["F32"].address != weights["F32"].address
        assert same_bits(view["large"].torch("float32"), weights["large"].dequantize())
    with api.open(path, copy=True) as copied:
        found = copied["F32"].torch()
        assert found.data_ptr() == copied["F32"].address
    for tensor in (kept, found):
        np.testing.assert_array_equal(tensor.numpy(), plain("F32", (5, 7)))


# Converted.


@pytest.mark.parametrize("dtype", DTYPES)
def test_converted_as_dequantize_does(weights: api.Weights, dtype: str) -> None:
    wanted = getattr(torch, dtype)
    numpy_s = [] if dtype == "bfloat16" else [np.dtype(dtype), np.dtype(dtype).type]
    for name, tensor in weights.items():
        if not tensor.has_kernel:
            continue
        expected = tensor.dequantize(dtype)
        for given in (dtype, wanted, *numpy_s):
            found = tensor.torch(given)
            assert (found.dtype, tuple(found.shape)) == (wanted, tensor.shape)
            assert same_bits(found, expected), name
            assert found.data_ptr() != tensor.address
            found.zero_()  # memory of its own


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32", "int64", "int8"])
def test_to_any_other_dtype(weights: api.Weights, name: str, dtype: str) -> None:
    """As torch does it, and never the file's own memory, also where it is that already."""
    found = weights[name].torch(dtype)
    assert torch.equal(found, weights[name].torch().to(getattr(torch, dtype)))
    assert found.data_ptr() != weights[name].address
    found.zero_()
    np.testing.assert_array_equal(values(weights[name].torch()), plain(name, (5, 7)))


def test_blocks_to_any_other_dtype(weights: api.Weights) -> None:
    tensor = weights["Q8_0.weight"]
    for dtype in ("float64", "float8_e4m3fn", "int64"):
        wanted = getattr(torch, dtype)
        assert same_bits(tensor.torch(dtype), tensor.torch("float32").to(wanted))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_the_default_device_is_not_asked(weights: api.Weights, dtype: str | None) -> None:
    """Whoever makes modules on meta has weights on the CPU all the same."""
    with torch.device("meta"):
        assert weights["F32"].torch(dtype).device.type == "cpu"


@pytest.mark.parametrize("dtype", [None, "float32", "float64"])
def test_devices(weights: api.Weights, dtype: str | None) -> None:
    for name in ("F32", "I32", "Q4_K.weight"):
        here = weights[name].torch(dtype)
        for device in ("cpu", torch.device("cpu")):
            assert same_bits(weights[name].torch(dtype, device), here)
        meta = weights[name].torch(dtype, device="meta")
        assert meta.device.type == "meta"
        assert (meta.dtype, meta.shape) == (here.dtype, here.shape)


# Shapes and places.


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (1, 1, 1, 1, 2)])
@pytest.mark.parametrize("kind", ["F32", "F16", "I64", "BOOL"])
def test_scalars_and_nothing(
    tmp_path: Path, kind: str, shape: tuple[int, ...], dtype: str | None
) -> None:
    (tmp_path / "m.safetensors").write_bytes(sb.model({"t": (kind, shape)}))
    with api.open(tmp_path / "m.safetensors") as weights:
        found = weights["t"].torch(dtype)
        assert tuple(found.shape) == shape
        if dtype is None:
            assert same_bits(found, np.frombuffer(weights["t"].buffer, np.uint8))
        else:
            assert found.dtype == getattr(torch, dtype)


@pytest.mark.parametrize("kind", ["F64", "F32", "F16", "BF16", "I64", "C64", "U8"])
def test_unaligned_numbers_are_copied(tmp_path: Path, kind: str) -> None:
    """Writers of safetensors need not align: torch expects it."""
    rows: dict[str, sb.Row] = {"a": ("U8", (3,)), "t": (kind, (5, 2))}
    (tmp_path / "m.safetensors").write_bytes(sb.model(rows))
    with api.open(tmp_path / "m.safetensors") as weights:
        found = weights["t"].torch()
        assert (found.data_ptr() == weights["t"].address) == (kind == "U8")
        assert found.data_ptr() % found.element_size() == 0
        assert same_bits(found, np.frombuffer(weights["t"].buffer, np.uint8))


# What cannot be.


def test_big_endian(tmp_path: Path) -> None:
    """Not in place; converted, all but blocks."""
    with gb.big_endian():
        tensors = {name: numbers(name, (5, 7), ">") for name in TYPES}
        tensors["Q8_0"] = blocks(QuantType.Q8_0, (2, 32))
        path = write(tmp_path / "m.gguf", tensors)
    with api.open(path) as weights:
        for name, own in TYPES.items():
            with pytest.raises(errors.UnsupportedTypeError, match=f"'{name}': .*big-endian"):
                weights[name].torch()
            for dtype in ("float32", "bfloat16", "float64", "int32", own):
                here = torch.from_numpy(plain("F32" if name == "BF16" else name, (5, 7)))
                assert torch.equal(weights[name].torch(dtype), here.to(getattr(torch, dtype)))
        assert same_bits(weights["Q8_0"].torch(), weights["Q8_0"].blocks)
        with pytest.raises(errors.UnsupportedTypeError, match="Q8_0 of a big-endian"):
            weights["Q8_0"].torch("float32")


def test_types_that_are_unknown_or_have_no_floats(tmp_path: Path) -> None:
    tensors = {
        "fork": Given(133, (2, 32), b""),
        "Q8_K": blocks(QuantType.Q8_K, (2, 256)),
    }
    with api.open(write(tmp_path / "m.gguf", tensors)) as weights:
        for arguments in ((), ("float32",), ("float64",)):
            with pytest.raises(errors.UnknownQuantTypeError, match=r"'fork' .*ik_llama"):
                weights["fork"].torch(*arguments)
        assert weights["Q8_K"].torch().shape == (2, 292)
        with pytest.raises(errors.UnsupportedTypeError, match="Q8_K"):
            weights["Q8_K"].torch("float32")


def test_types_that_torch_does_not_have(tmp_path: Path) -> None:
    rows: dict[str, sb.Row] = {"six": ("F6_E2M3", (4, 2)), "odd": ("F4", (2, 3))}
    (tmp_path / "m.safetensors").write_bytes(sb.model(rows))
    with api.open(tmp_path / "m.safetensors") as weights:
        for name in rows:
            for dtype in (None, "float32"):
                with pytest.raises(errors.UnsupportedTypeError, match=f"'{name}'.*buffer has"):
                    weights[name].torch(dtype)


def test_four_bits_cannot_be_converted_by_torch(tmp_path: Path) -> None:
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no type for it")
    (tmp_path / "m.safetensors").write_bytes(sb.model({"four": ("F4", (2, 6))}))
    with api.open(tmp_path / "m.safetensors") as weights:
        assert weights["four"].torch().shape == (2, 3)
        with pytest.raises(errors.UnsupportedTypeError, match=r"'four': torch cannot turn"):
            weights["four"].torch("float32")


def test_what_is_no_dtype(weights: api.Weights) -> None:
    with pytest.raises(errors.UnsupportedTypeError, match=r"torch .* has no dtype 'float7'"):
        weights["F32"].torch("float7")
    with pytest.raises(errors.UsageError, match="expected a name or a dtype"):
        weights["F32"].torch(object())


ABSENT = """
import sys
sys.modules["torch"] = None
import numaload
from numaload.errors import UsageError
weights = numaload.open(sys.argv[1])
for ask in (
    weights["F32"].torch,
    lambda: weights["Q4_K.weight"].torch("float32"),
    lambda: numaload.stream(weights, "torch"),
):
    try:
        ask()
        raise SystemExit("no error")
    except UsageError as error:
        assert "pip install 'numaload[torch]'" in str(error), error
weights["Q4_K.weight"].dequantize()
print(len(list(numaload.stream(weights))))
"""


def test_without_torch(weights: api.Weights) -> None:
    words = [sys.executable, "-c", ABSENT, weights.paths[0]]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(len(weights))]
