"""The point "Dequantize: F32, F16, BF16, Q8_0, Q4_K, Q6_K by our numba kernels on pinned workers,
bit-exact; every other type through gguf-py's dequantize, announced once; to float32, float16,
bfloat16; whole tensor, row range, one expert; out=".

The oracle is gguf-py, then numpy's and ml_dtypes' rounding.
"""

from __future__ import annotations

import array
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gguf_builder as gb
import numaload
from numaload import QuantType, errors
from numaload.errors import (
    NumaloadWarning,
    UnknownQuantTypeError,
    UnsupportedTypeError,
    UsageError,
)
from numaload.numa.workers import Workers

OURS = ["F32", "F16", "BF16", "Q8_0", "Q4_K", "Q6_K"]
DETOUR = ["Q5_K", "IQ4_XS", "Q2_K", "Q4_0", "MXFP4"]
DTYPES: dict[str, Any] = {
    "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
}  # fmt: skip
EXPERTS, ROWS, COLUMNS = 3, 100, 1024  # enough for several workers and several pieces
PARTS: dict[str, tuple[dict[str, Any], tuple[slice | int, ...]]] = {
    "whole": ({}, ()),
    "expert": ({"expert": 1}, (1,)),
    "rows-of-expert": ({"expert": 2, "rows": (17, 60)}, (2, slice(17, 60))),
    "no-rows": ({"expert": 0, "rows": (4, 4)}, (0, slice(4, 4))),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[numaload.Weights]:
    shape = (EXPERTS, ROWS, COLUMNS)
    tensors = {
        name: (QuantType[name], gb.random_blocks(QuantType[name], shape, seed))
        for seed, name in enumerate(OURS + DETOUR)
    }
    (path,) = gb.write_good(tmp_path_factory.mktemp("types") / "types.gguf", tensors)
    with numaload.open(path) as opened:
        yield opened


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())


@pytest.fixture(scope="module")
def floats(weights: numaload.Weights) -> dict[str, NDArray[np.float32]]:
    with np.errstate(all="ignore"):
        return {
            name: gguf.quants.dequantize(
                tensor.blocks, gguf.GGMLQuantizationType(tensor.qtype)
            ).reshape(tensor.shape)
            for name, tensor in weights.items()
        }


def call(tensor: numaload.Tensor, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumaloadWarning)
        return tensor.dequantize(*arguments, **options)


def rounded(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[dtype])


def assert_same(actual: NDArray[Any], expected: NDArray[Any]) -> None:
    """Bit for bit. Of a NaN that was rounded only that it is one: casts differ in its payload."""
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = np.uint32 if actual.dtype.itemsize == 4 else np.uint16
    same = actual.view(bits) == expected.view(bits)
    if bits == np.uint16:
        with np.errstate(invalid="ignore"):  # to look at a signaling NaN may raise the flag
            same |= np.isnan(actual) & np.isnan(expected)
    assert same.all(), f"{np.count_nonzero(~same)} of {same.size} differ"


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS + DETOUR)
def test_as_gguf_py(
    weights: numaload.Weights,
    floats: dict[str, NDArray[np.float32]],
    name: str,
    dtype: str,
    part: str,
) -> None:
    options, index = PARTS[part]
    expected = rounded(floats[name][index], dtype)
    assert_same(call(weights[name], dtype, **options), expected)
    out = np.zeros(expected.shape, expected.dtype)
    assert call(weights[name], dtype, out, **options) is out
    assert_same(out, expected)


def test_the_blocks_are_not_all_special(floats: dict[str, NDArray[np.float32]]) -> None:
    for values in floats.values():
        assert np.isfinite(values).mean() > 0.5


def test_rows_count_through_experts(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]]
) -> None:
    expected = floats["Q4_K"].reshape(-1, COLUMNS)[90:210]
    assert_same(weights["Q4_K"].dequantize(rows=slice(90, 210)), expected)


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
def test_out_of_torch(
    weights: numaload.Weights, floats: dict[str, NDArray[np.float32]], dtype: str
) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    out = torch.zeros((ROWS, COLUMNS), dtype=kind)
    assert weights["Q4_K"].dequantize(kind, out=out, expert=1) is out
    expected = torch.from_numpy(floats["Q4_K"][1].copy()).to(kind)
    assert torch.equal(out.nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize(
    "out",
    [np.zeros((ROWS, COLUMNS)), np.zeros(3, np.float32), np.zeros((COLUMNS, ROWS), np.float32).T],
    ids=["item-size", "count", "order"],
)
def test_out_that_does_not_fit(weights: numaload.Weights, out: Any) -> None:
    with pytest.raises(UsageError, match=r"^out "):
        weights["Q8_0"].dequantize(out=out, expert=0)


@pytest.mark.parametrize("name", DETOUR)
def test_the_detour_is_announced_once(weights: numaload.Weights, name: str) -> None:
    with pytest.warns(NumaloadWarning, match=f"{name} has no kernel here yet") as caught:
        weights[name].dequantize(rows=(0, 2))
    assert len(caught) == 1
    weights[name].dequantize("float16", rows=(0, 2))  # a warning would be an error here


@pytest.mark.parametrize("name", OURS)
def test_our_kernels_take_no_detour(
    weights: numaload.Weights, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf.quants, "dequantize", None)
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
    weights["Q4_K"].dequantize("bfloat16")
    assert len(names) > 1
    assert all(name.startswith("numaload") for name in names)


@pytest.mark.parametrize("name", ["Q1_0", "Q2_0", "I32", "F64", "unknown"])
def test_types_that_cannot_be(tmp_path: Path, name: str) -> None:
    """By hand: the gguf package cannot write all of them. The other tensor stays usable."""
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
