"""What ``dtype=`` and ``out=`` take and refuse, and what goes which way to floats."""

from __future__ import annotations

import array
import ctypes
import subprocess
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from numaload.dequantize import DTYPES, Conversion, as_output, dequantize_blocks, dtype_of
from numaload.errors import UnsupportedTypeError, UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.machine.topology import topology
from numaload.machine.workers import pool

F32, F16, BF16 = DTYPES.values()
SIZE = 6


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("float32", "float32"),
        ("bfloat16", "bfloat16"),
        (np.float16, "float16"),
        (np.dtype("f4"), "float32"),
        (ml_dtypes.bfloat16, "bfloat16"),
        (np.dtype(ml_dtypes.bfloat16), "bfloat16"),
        ("torch.float16", "float16"),
    ],
    ids=str,
)
def test_dtypes(given: Any, name: str) -> None:
    assert dtype_of(given) is DTYPES[name]


@pytest.mark.parametrize(
    "given", ["float64", "f4", "", np.int32, int, None, object(), {"names": 1}, 3], ids=repr
)
def test_dtypes_that_are_not_made(given: Any) -> None:
    with pytest.raises(UsageError, match="expected float32, float16, bfloat16"):
        dtype_of(given)


OUTPUTS: dict[str, tuple[Any, np.dtype[Any]]] = {
    "float32": (np.zeros(SIZE, np.float32), F32),
    "two-dims": (np.zeros((2, 3), np.float32), F32),
    "three-dims": (np.zeros((1, 2, 3), np.float16), F16),
    "bfloat16": (np.zeros(SIZE, ml_dtypes.bfloat16), BF16),
    "bfloat16-as-uint16": (np.zeros((3, 2), np.uint16), BF16),
    "float32-as-int32": (np.zeros(SIZE, np.int32), F32),
    "both-orders": (np.zeros((1, SIZE), np.float32, order="F"), F32),
    "part-of-an-array": (np.zeros((4, 3), np.float32)[1:3], F32),
    "matrix": (np.zeros((2, 3), np.float32).view(np.matrix), F32),
    "memoryview": (memoryview(bytearray(4 * SIZE)).cast("f"), F32),
    "memoryview-two-dims": (memoryview(bytearray(4 * SIZE)).cast("f", [2, 3]), F32),
    "memoryview-of-halves": (np.zeros((2, 3), np.float16).data, F16),
    "array.array": (array.array("f", [0] * SIZE), F32),
    "array.array-of-shorts": (array.array("H", [0] * SIZE), BF16),
    "ctypes": ((ctypes.c_float * SIZE)(), F32),
    "ctypes-two-dims": ((ctypes.c_uint16 * 3 * 2)(), F16),
}


@pytest.mark.parametrize(("out", "dtype"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(out: Any, dtype: np.dtype[Any]) -> None:
    flat = as_output(out, dtype, SIZE)
    assert (flat.shape, flat.dtype) == ((SIZE,), dtype)
    flat[:] = np.arange(SIZE)
    written = np.frombuffer(bytes(memoryview(_bits(out))), dtype)
    np.testing.assert_array_equal(written, np.arange(SIZE))


def _bits(out: Any) -> Any:
    """ml_dtypes' own arrays export no buffer."""
    return np.asarray(out).view(np.uint8) if isinstance(out, np.ndarray) else out


def _read_only(flat: Any) -> Any:
    flat.flags.writeable = False
    return flat


REFUSED: dict[str, tuple[Any, str]] = {
    "float64": (np.zeros(SIZE), "out has items of 8 bytes, float32 has 4"),
    "bytearray": (bytearray(4 * SIZE), "items of 1 bytes"),
    "memoryview-of-bytes": (memoryview(bytearray(4 * SIZE)), "items of 1 bytes"),
    "too-few": (np.zeros(SIZE - 1, np.float32), "out has 5 elements, expected 6"),
    "too-many": (np.zeros((2, SIZE), np.float32), "out has 12 elements, expected 6"),
    "fortran": (np.zeros((2, 3), np.float32, order="F"), "not C-contiguous"),
    "every-second": (np.zeros(2 * SIZE, np.float32)[::2], "not C-contiguous"),
    "reversed": (np.zeros(SIZE, np.float32)[::-1], "not C-contiguous"),
    "overlapping": (as_strided(np.zeros(1, np.float32), (SIZE,), (0,)), "not C-contiguous"),
    "broadcast": (np.broadcast_to(np.zeros(1, np.float32), (SIZE,)), "not C-contiguous"),
    "strided-memoryview": (memoryview(array.array("f", [0] * 12))[::2], "C-contiguous buffer"),
    "read-only": (_read_only(np.zeros(SIZE, np.float32)), "read-only"),
    "read-only-memoryview": (memoryview(bytes(4 * SIZE)).cast("f"), "read-only"),
    "unaligned": (memoryview(bytearray(4 * SIZE + 1))[1:].cast("f"), "not aligned"),
    "big-endian": (np.zeros(SIZE, ">f4"), "byte order"),
    "list": ([0.0] * SIZE, "expected a C-contiguous buffer"),
    "number": (7, "expected a C-contiguous buffer"),
    "str": ("out", "expected a C-contiguous buffer"),
}


@pytest.mark.parametrize(("out", "words"), REFUSED.values(), ids=REFUSED)
def test_outputs_that_are_refused(out: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        as_output(out, F32, SIZE)


def test_an_empty_output() -> None:
    for out in (np.zeros((0, 4), np.float32), array.array("f")):
        assert as_output(out, F32, 0).size == 0


@pytest.mark.parametrize("name", DTYPES)
def test_torch_outputs(name: str) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, name)
    assert dtype_of(dtype) is DTYPES[name]
    out = torch.zeros((2, 3), dtype=dtype)
    as_output(out, DTYPES[name], SIZE)[:] = np.arange(SIZE)
    assert out.tolist() == [[0, 1, 2], [3, 4, 5]]
    part = torch.zeros((4, 3), dtype=dtype)[2:]
    as_output(part, DTYPES[name], SIZE)[:] = np.arange(SIZE)
    assert part.tolist() == out.tolist()
    assert as_output(torch.zeros(0, dtype=dtype), DTYPES[name], 0).size == 0


def test_torch_outputs_that_are_refused() -> None:
    torch = pytest.importorskip("torch")
    emptied = torch.zeros(SIZE)
    emptied.untyped_storage().resize_(0)
    refused = {
        "items of 8 bytes": torch.zeros(SIZE, dtype=torch.float64),
        "5 elements": torch.zeros(SIZE - 1),
        "contiguous tensor in CPU memory, found a torch.strided one on cpu": torch.zeros(3, 2).T,
        "found a torch.sparse_coo one": torch.zeros(2, 3).to_sparse(),
        "torch.strided one on meta": torch.zeros(SIZE, device="meta"),
        "tensor in CPU memory": emptied,
    }
    for words, out in refused.items():
        with pytest.raises(UsageError, match=words):
            as_output(out, F32, SIZE)


def run(qtype: QuantType, blocks: Any, dtype: np.dtype[Any]) -> Any:
    out = np.empty(len(blocks) * BLOCKS[qtype][0], dtype)
    dequantize_blocks(blocks, qtype, dtype, out, pool(topology()))
    return out


def test_float16_overflows_to_infinity() -> None:
    values = np.array([65504, 65519, 65520, -1e38, np.inf, np.nan], np.float32)
    out = run(QuantType.F32, values.view(np.uint8).reshape(-1, 4), F16)
    np.testing.assert_array_equal(out, [65504, 65504, np.inf, -np.inf, np.inf, np.nan])


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"])
def test_types_without_floats(name: str) -> None:
    blocks = np.zeros((1, BLOCKS[QuantType[name]][1]), np.uint8)
    with pytest.raises(UnsupportedTypeError, match=f"{name} cannot be turned to float"):
        run(QuantType[name], blocks, F32)


@pytest.mark.parametrize(
    ("blocks", "weights"),
    [((4, 144), 256), ((1, 144), 255), ((1, 143), 256), ((144,), 256)],
    ids=str,
)
def test_blocks_that_do_not_fit_the_output(blocks: tuple[int, ...], weights: int) -> None:
    out = np.empty(weights, F32)
    with pytest.raises(UsageError, match=r"Q4_K: blocks .* expected \(n, 144\) for n \* 256"):
        dequantize_blocks(np.zeros(blocks, "u1"), QuantType.Q4_K, F32, out, pool(topology()))


def test_an_output_keeps_its_tensor() -> None:
    """Nobody else may hold it while threads write there."""
    torch = pytest.importorskip("torch")
    tensor = torch.zeros(SIZE)
    alive = weakref.ref(tensor)
    array = as_output(tensor, F32, SIZE)
    del tensor
    assert alive() is not None
    del array
    assert alive() is None


BIG = {
    "F32": np.array([1.5, -2e-40, 3e38, np.inf, np.nan], ">f4"),
    "F16": np.array([1.5, -6e-8, 65504, -np.inf, np.nan], ">f2"),
    "BF16": np.array([1.5, -2e-40, 3e38, np.inf, np.nan], ml_dtypes.bfloat16).view("<u2"),
}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", BIG)
def test_big_endian_floats(name: str, dtype: np.dtype[Any]) -> None:
    """Bit for bit what the same numbers give the other way round, over several pieces."""
    qtype = QuantType[name]
    big = np.tile(BIG[name].astype(BIG[name].dtype.newbyteorder(">")), 60_000)
    little = big.astype(big.dtype.newbyteorder("<"))
    outs = []
    for order, values in (("big", big), ("little", little)):
        blocks = values.view(np.uint8).reshape(len(values), -1)
        outs.append(np.empty(len(values), dtype))
        dequantize_blocks(blocks, qtype, dtype, outs[-1], pool(topology()), byte_order=order)
    assert outs[0].tobytes() == outs[1].tobytes()
    assert outs[0][0] == 1.5


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q4_0", "I16", "F64"])
def test_big_endian_blocks_without_floats(name: str) -> None:
    qtype = QuantType[name]
    blocks, out = np.zeros((1, BLOCKS[qtype][1]), np.uint8), np.empty(BLOCKS[qtype][0], F32)
    words = rf"^tensor 'odd': {name} of a big-endian file .*, only F32, F16, BF16 can: gguf-convert"
    with pytest.raises(UnsupportedTypeError, match=words):
        dequantize_blocks(blocks, qtype, F32, out, pool(topology()), name="odd", byte_order="big")


def test_infinite_scales_warn_of_nothing() -> None:
    """ggml does not either; the test fails at any warning."""
    blocks = np.full((3, 18), 0x7C, np.uint8)
    assert not np.isfinite(run(QuantType.Q4_0, blocks, F16)).any()


def test_widening_float32_needs_no_other_package() -> None:
    program = (
        "import sys, numpy as np; from numaload.dequantize import *\n"
        "from numaload import QuantType\n"
        "from numaload.machine.workers import Workers\n"
        "import os; w = Workers(os.sched_getaffinity(0), 1); out = np.empty(1, 'float16')\n"
        "dequantize_blocks(np.zeros((1, 4), 'u1'), QuantType.F32, out.dtype, out, w)\n"
        "assert 'gguf' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("offset", [0, 16, 32, 64])
def test_memory_across_lines_of_the_caches_is_written_through_them(offset: int) -> None:
    """Past them that took 13 times as long; the floats are the same."""
    convert = Conversion(QuantType.F16, BF16)
    asked = []

    def run(blocks: Any, floats: Any, past_caches: bool, scales: Any = None) -> None:
        asked.append(past_caches)
        floats[:] = 7

    convert._run = run
    memory = np.zeros(4096, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    out = memory[start : start + 2048].view(BF16)
    convert(np.zeros(2048, np.uint8), out, True)
    assert asked == [offset % 64 == 0]
    assert (out.view(np.uint16) == 7).all()
