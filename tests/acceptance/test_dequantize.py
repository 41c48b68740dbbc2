"""All 28 types that ggml can turn to float, bit for bit, to float32, float16 and bfloat16: whole
tensors, row ranges, experts, single blocks, from unaligned files, on any number of threads.

The oracle is gguf-py (the naive twin for the two types that it lacks), then numpy's and ml_dtypes'
rounding.
"""

from __future__ import annotations

import array
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gguf_builder as gb
import naive
import numaload
from numaload import QuantType, dequantize
from numaload.errors import UnknownQuantTypeError, UnsupportedTypeError, UsageError
from numaload.formats.qtypes import BLOCKS
from numaload.kernels import registry
from numaload.machine.workers import Workers

QUANTIZED = [
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q8_0",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
    "IQ1_S",
    "IQ1_M",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
    "IQ4_NL",
    "IQ4_XS",
    "TQ1_0",
    "TQ2_0",
    "MXFP4",
    "NVFP4",
    "Q1_0",
    "Q2_0",
]
FLOATS = ["F32", "F16", "BF16"]
NAMES = FLOATS + QUANTIZED
NOT_IN_GGUF_PY = {"Q1_0", "Q2_0"}
DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip
STAYS = {("F32", "float32"), ("F16", "float16"), ("BF16", "bfloat16")}
EXPERTS, ROWS, COLUMNS = 2, 9, 1024
PARTS: dict[str, tuple[dict[str, Any], tuple[slice | int, ...]]] = {
    "whole": ({}, ()),
    "expert": ({"expert": 1}, (1,)),
    "rows-of-expert": ({"expert": 1, "rows": (3, 8)}, (1, slice(3, 8))),
    "one-row": ({"expert": 0, "rows": (8, 9)}, (0, slice(8, 9))),
    "no-rows": ({"expert": 0, "rows": (4, 4)}, (0, slice(4, 4))),
}
THREADS = [1, 2, 5]


def write_all(path: Path) -> Path:
    """By hand: alignment 1, so that blocks begin at any address, and types gguf-py cannot write."""
    rows, data = [], b""
    for seed, name in enumerate(NAMES):
        block_size, type_size = BLOCKS[QuantType[name]]
        rng = np.random.default_rng(seed)
        for label, count in ((name, EXPERTS * ROWS * COLUMNS), (f"{name}.one", block_size)):
            dims = (COLUMNS, ROWS, EXPERTS) if label == name else (count,)
            data += bytes(-len(data) % 2 ^ 1)  # the next begins at an odd offset
            rows.append(gb.tensor(label, dims, QuantType[name], offset=len(data)))
            data += rng.bytes(count // block_size * type_size)
    entries = [gb.u32("general.alignment", 1)]
    # An entry of a key of 4 letters is even, one of 5 is odd: the data shall begin at an even byte.
    even = len(gb.build(entries, rows, b"", alignment=1)) % 2 == 0
    entries.append(gb.u32("even" if even else "fifth", 0))
    path.write_bytes(gb.build(entries, rows, data, alignment=1))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[numaload.Weights]:
    with numaload.open(write_all(tmp_path_factory.mktemp("types") / "types.gguf")) as opened:
        yield opened


def floats_of(tensor: numaload.Tensor) -> NDArray[np.float32]:
    """What the oracle says."""
    blocks, name = tensor.blocks, tensor.qtype.name
    if name in NOT_IN_GGUF_PY:
        _, type_size = BLOCKS[tensor.qtype]
        values = naive.dequantize(tensor.qtype, blocks.reshape(-1, type_size))
    else:
        with np.errstate(all="ignore"):
            values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
    return np.asarray(values, np.float32).reshape(tensor.shape)


@pytest.fixture(scope="module")
def floats(weights: numaload.Weights) -> dict[str, NDArray[np.float32]]:
    return {name: floats_of(tensor) for name, tensor in weights.items()}


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[dtype])


def assert_same(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bit for bit. Of a NaN only that it is one: what is in it depends on compilers and casts."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = np.uint32 if actual.dtype.itemsize == 4 else np.uint16
    same = actual.view(bits) == expected.view(bits)
    with np.errstate(invalid="ignore"):  # to look at a signaling NaN may raise the flag
        same |= np.isnan(actual) & np.isnan(expected)
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ"


@pytest.fixture(params=["cached", "past-caches"])
def stores(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small outputs and large ones are stored in different ways."""
    monkeypatch.setattr(dequantize, "LARGE", 0 if request.param == "past-caches" else 1 << 60)


@pytest.mark.usefixtures("stores")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", NAMES)
def test_every_type_dtype_range_and_thread_count(
    weights: numaload.Weights,
    floats: dict[str, NDArray[np.float32]],
    name: str,
    part: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dequantize, "GRAIN", 1024)  # so that there is work for all threads
    options, index = PARTS[part]
    for threads in THREADS:
        workers = Workers(numaload.topology().cpus, threads)
        monkeypatch.setattr(numaload.Weights, "workers", lambda *_, found=workers: found)
        for dtype in DTYPES:
            expected = rounded(floats[name][index], dtype)
            assert_same(weights[name].dequantize(dtype, **options), expected)
            out = np.zeros(expected.shape, expected.dtype)
            assert weights[name].dequantize(dtype, out, **options) is out
            assert_same(out, expected)
        workers.close()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_single_block(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]], name: str, dtype: str
) -> None:
    """Of F32, F16 and BF16 a single weight."""
    tensor = weights[f"{name}.one"]
    assert tensor.size == BLOCKS[tensor.qtype][0]
    assert_same(tensor.dequantize(dtype), rounded(floats[tensor.name], dtype))


@pytest.mark.parametrize(("name", "dtype"), STAYS, ids="-".join)
def test_what_is_asked_for_as_it_is_stays_bit_for_bit(
    weights: numaload.Weights, name: str, dtype: str
) -> None:
    got = weights[name].dequantize(dtype)
    assert got.tobytes() == weights[name].blocks.tobytes()


def test_the_files_blocks_are_unaligned_and_not_all_special(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]]
) -> None:
    assert all(weights[name].address % 2 for name in NAMES)
    assert not any(weights[name].blocks.flags.writeable for name in NAMES)
    for name in QUANTIZED:
        assert np.isfinite(floats[name]).mean() > 0.5


def test_rows_count_through_experts(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]]
) -> None:
    expected = floats["Q4_K"].reshape(-1, COLUMNS)[7:13]
    assert_same(weights["Q4_K"].dequantize(rows=slice(7, 13)), expected)


@pytest.mark.parametrize(
    "out",
    [
        np.zeros((ROWS, COLUMNS), np.uint16),
        np.zeros(ROWS * COLUMNS, ml_dtypes.bfloat16),
        array.array("H", bytes(2 * ROWS * COLUMNS)),
        memoryview(bytearray(2 * ROWS * COLUMNS)).cast("H"),
    ],
    ids=["uint16", "flat", "array.array", "memoryview"],
)
def test_out_of_any_kind(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]], out: Any
) -> None:
    assert weights["Q6_K"].dequantize("bfloat16", out=out, expert=0) is out
    got = np.asarray(out).view(ml_dtypes.bfloat16).reshape(ROWS, COLUMNS)
    assert_same(got, rounded(floats["Q6_K"][0], "bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["Q4_K", "IQ2_XS", "MXFP4"])
def test_out_of_torch(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]], name: str, dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    out = torch.zeros((ROWS, COLUMNS), dtype=kind)
    assert weights[name].dequantize(kind, out=out, expert=1) is out
    expected = torch.from_numpy(floats[name][1].copy()).to(kind)
    assert torch.equal(out.nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize(
    "out",
    [np.zeros((ROWS, COLUMNS)), np.zeros(3, np.float32), np.zeros((COLUMNS, ROWS), np.float32).T],
    ids=["item-size", "count", "order"],
)
def test_out_that_does_not_fit(weights: numaload.Weights, out: Any) -> None:
    with pytest.raises(UsageError, match=r"^out "):
        weights["Q8_0"].dequantize(out=out, expert=0)


@pytest.mark.usefixtures("stores")
def test_nothing_is_written_beside_out(weights: numaload.Weights) -> None:
    for name in NAMES:
        for dtype, kind in DTYPES.items():
            around = np.full(ROWS * COLUMNS + 14, 7, kind)
            weights[name].dequantize(dtype, out=around[7:-7], expert=0)
            assert (around[:7] == 7).all()
            assert (around[-7:] == 7).all()


def test_gguf_py_is_not_used(weights: numaload.Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.quants, "dequantize", None)
    for name in NAMES:
        for dtype in DTYPES:
            weights[name].dequantize(dtype, rows=(0, 2))


def test_the_work_is_done_by_pinned_workers(
    weights: numaload.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    ranges = Workers.ranges

    def watched(self: Workers, function: Any, *arguments: Any) -> None:
        def task(start: int, stop: int) -> None:
            names.append(threading.current_thread().name)
            function(start, stop)

        ranges(self, task, *arguments)

    monkeypatch.setattr(Workers, "ranges", watched)
    monkeypatch.setattr(dequantize, "GRAIN", 1024)
    weights["Q4_K"].dequantize("bfloat16")
    assert len(names) > 1
    assert all(name.startswith("numaload") for name in names)


def test_threads_of_the_caller_may_ask_at_once(
    weights: numaload.Weights,
    floats: dict[str, NDArray[np.float32]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For the same tensor and for others, the first use of a kernel among them."""
    monkeypatch.setattr(registry, "_loaded", {})
    wrong: list[str] = []

    def ask(name: str) -> None:
        for _ in range(20):
            for dtype in DTYPES:
                got = weights[name].dequantize(dtype, expert=1)
                try:
                    assert_same(got, rounded(floats[name][1], dtype))
                except AssertionError as error:
                    wrong.append(f"{name} {dtype}: {error}")

    names = ["Q4_K", "Q4_K", "IQ3_S", "Q5_1", "Q4_K", "F16"]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


WITHOUT_JIT = """
import sys, numpy as np, numaload
with numaload.open(sys.argv[1]) as weights:
    found = {
        f"{name} {dtype}": weights[name].dequantize(dtype, rows=(0, 2)).view(np.uint8)
        for name in weights if not name.endswith(".one")
        for dtype in ("float32", "float16", "bfloat16")
    }
assert "numba" not in sys.modules and "llvmlite" not in sys.modules
np.savez(sys.argv[2], **found)
"""


def test_the_same_without_jit(
    weights: numaload.Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    found = tmp_path / "found.npz"
    words = [sys.executable, "-c", WITHOUT_JIT, weights.paths[0], str(found)]
    subprocess.run(words, check=True, timeout=300)
    monkeypatch.delenv("NUMBA_DISABLE_JIT")
    with np.load(found) as without:
        assert len(without.files) == len(NAMES) * len(DTYPES)
        for label in without.files:
            name, dtype = label.split()
            expected = weights[name].dequantize(dtype, rows=(0, 2))
            assert_same(without[label].view(expected.dtype), expected)


@pytest.mark.parametrize("name", ["I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "unknown"])
def test_types_that_cannot_be(tmp_path: Path, name: str) -> None:
    """The other tensor stays usable."""
    type_id = 133 if name == "unknown" else QuantType[name]
    path = tmp_path / "m.gguf"
    rows = [gb.tensor("odd", (256,), type_id), gb.tensor("t", (2,), offset=2048)]
    path.write_bytes(gb.build([], rows, bytes(2048) + np.array([1, 2], np.float32).tobytes()))
    error = UnknownQuantTypeError if name == "unknown" else UnsupportedTypeError
    with numaload.open(path) as opened:
        words = "type 133 is of ik_llama.cpp" if name == "unknown" else f"{name} cannot be turned"
        with pytest.raises(error, match=f"tensor 'odd'.*{words}"):
            opened["odd"].dequantize()
        assert opened["t"].dequantize().tolist() == [1, 2]
