"""Weights and Tensor: selections, odd shapes, what lives how long, and files that change."""

from __future__ import annotations

import gc
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
from numaload.demo import write_model
from numaload.errors import (
    ClosedError,
    FileChangedError,
    MetadataKeyError,
    NotGGUFError,
    NumaloadError,
    ReadError,
    SplitError,
    TensorNotFoundError,
    TruncatedError,
    UnknownQuantTypeError,
    UsageError,
)
from numaload.formats.qtypes import QuantType
from numaload.weights import Weights, open_weights

VALUES = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (), "vector": (32,), "matrix": (6, 32), "experts": (2, 3, 32),
    "no-columns": (5, 0), "no-rows": (0, 8), "no-elements": (0,), "no-experts": (0, 3, 8),
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A file for each shape, with one F32 tensor, which begins with VALUES."""
    for name, shape in SHAPES.items():
        row = gb.tensor("t", shape[::-1])
        (tmp_path / f"{name}.gguf").write_bytes(gb.build([], [row], VALUES.tobytes()))
    return tmp_path


def opened(folder: Path, name: str) -> Weights:
    return open_weights(folder / f"{name}.gguf")


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(folder: Path, name: str) -> None:
    shape = SHAPES[name]
    with opened(folder, name) as weights:
        tensor = weights["t"]
        size = int(np.prod(shape))
        columns = shape[-1] if shape else 1
        rows = int(np.prod(shape[:-1]))
        assert (tensor.shape, tensor.dims, tensor.size) == (shape, shape[::-1], size)
        assert (tensor.nbytes, len(tensor.buffer)) == (4 * size, 4 * size)
        assert tensor.blocks.shape == (rows, 4 * columns)
        expected = VALUES.reshape(-1)[:size].reshape(shape)
        np.testing.assert_array_equal(tensor.dequantize(), expected)
        half = tensor.dequantize("float16", rows=(0, rows))
        np.testing.assert_array_equal(half, expected.reshape(rows, columns).astype(np.float16))


@pytest.mark.parametrize(
    "rows",
    [(1, 4), slice(1, 4), range(1, 4), (np.int64(1), np.uint8(4)), slice(1, 4, 1)],
    ids=["tuple", "slice", "range", "numpy", "step"],
)
def test_rows(folder: Path, rows: Any) -> None:
    with opened(folder, "matrix") as weights:
        got = weights["t"].dequantize(rows=rows)
    np.testing.assert_array_equal(got, VALUES.reshape(6, 32)[1:4])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(slice(None), (0, 6)), (slice(None, 2), (0, 2)), (slice(4, None), (4, 6)), ((3, 3), (3, 3))],
    ids=["all", "to", "from", "none"],
)
def test_open_ended_rows(folder: Path, rows: Any, expected: tuple[int, int]) -> None:
    with opened(folder, "experts") as weights:
        got = weights["t"].dequantize(rows=rows)
    np.testing.assert_array_equal(got, VALUES.reshape(6, 32)[slice(*expected)])


@pytest.mark.parametrize(
    "rows",
    [
        (0, 7), (-1, 2), (4, 3), (0, 1, 2), [0, 1], slice(0, 6, 2), slice(0, 6, 0), slice(-2, None),
        range(5, 2, -1), 3,
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_cannot_be(folder: Path, rows: Any) -> None:
    with opened(folder, "matrix") as weights, pytest.raises(UsageError, match="t: rows"):
        weights["t"].dequantize(rows=rows)


@pytest.mark.parametrize("expert", [0, 1, np.int32(1)])
@pytest.mark.parametrize("rows", [None, (1, 3)])
def test_one_expert(folder: Path, expert: int, rows: tuple[int, int] | None) -> None:
    with opened(folder, "experts") as weights:
        got = weights["t"].dequantize(expert=expert, rows=rows)
    np.testing.assert_array_equal(got, VALUES[expert][slice(*rows or (None,))])


@pytest.mark.parametrize(
    ("name", "expert", "rows"),
    [
        ("matrix", 0, None), ("experts", 2, None), ("experts", -1, None), ("no-experts", 0, None),
        ("experts", 1, (0, 4)),
    ],
)  # fmt: skip
def test_experts_that_cannot_be(folder: Path, name: str, expert: int, rows: Any) -> None:
    with opened(folder, name) as weights, pytest.raises(UsageError, match=r"^t: "):
        weights["t"].dequantize(expert=expert, rows=rows)


def test_weights_at_odd_addresses(tmp_path: Path) -> None:
    entry = gb.entry("general.alignment", gb.U32, gb.scalar(gb.U32, 1))
    rows = [gb.tensor("bytes", (2,), QuantType.I8), gb.tensor("t", (32, 6), offset=2)]
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([entry], rows, b"ab" + VALUES.tobytes(), alignment=1))
    with open_weights(path) as weights:
        tensor = weights["t"]
        assert tensor.address % 4
        for dtype in ("float32", "float16"):
            np.testing.assert_array_equal(tensor.dequantize(dtype), VALUES.reshape(6, 32))


def test_blocks_are_the_file_read_only_and_not_copied(folder: Path) -> None:
    with opened(folder, "matrix") as weights:
        tensor = weights["t"]
        blocks = tensor.blocks
        assert blocks.__array_interface__["data"] == (tensor.address, True)
        assert blocks.tobytes() == VALUES.tobytes()
        with pytest.raises(ValueError, match="read-only"):
            blocks[0, 0] = 1
        assert (tensor.node, tensor.path) == (None, weights.paths[0])


def test_arrays_outlive_close(folder: Path) -> None:
    weights = opened(folder, "matrix")
    tensor = weights["t"]
    blocks, floats = tensor.blocks, tensor.dequantize()
    weights.close()
    weights.close()
    del weights
    gc.collect()
    assert blocks.tobytes() == VALUES.tobytes() == floats.tobytes()


def test_arrays_outlive_weights_that_nobody_closed(folder: Path) -> None:
    blocks = opened(folder, "matrix")["t"].blocks
    gc.collect()
    assert blocks.tobytes() == VALUES.tobytes()


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("what", ["address", "blocks", "buffer", "dequantize"])
def test_nothing_is_handed_out_after_close(folder: Path, what: str, used_before: bool) -> None:
    weights = opened(folder, "matrix")
    tensor = weights["t"]
    if used_before:
        assert tensor.address
    weights.close()
    with pytest.raises(ClosedError, match=r"matrix\.gguf were closed"):
        tensor.dequantize() if what == "dequantize" else getattr(tensor, what)
    assert (len(weights), tensor.shape) == (1, (6, 32))  # what was read stays known


def test_metadata_arrays_after_close(tmp_path: Path) -> None:
    entries = [gb.entry(k, gb.ARRAY, gb.array(gb.U8, b"\1")) for k in "ab"]
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build(entries))
    weights = open_weights(path)
    assert weights.metadata["a"] == [1]
    weights.close()
    assert weights.metadata["a"] == [1]
    with pytest.raises(ClosedError, match=r"m\.gguf was closed"):
        weights.metadata["b"].tolist()


@pytest.mark.parametrize("what", ["metadata", "weights"])
@pytest.mark.parametrize("cut", [False, True], ids=["rewritten", "cut"])
def test_a_file_changed_after_opening(tmp_path: Path, what: str, cut: bool) -> None:
    path = tmp_path / "m.gguf"
    entry = gb.entry("a", gb.ARRAY, gb.array(gb.U8, b"\1"))
    path.write_bytes(gb.build([entry], [gb.tensor("t")]))
    os.utime(path, (1, 1))
    with open_weights(path) as weights:
        if cut:
            os.truncate(path, 40)
        else:
            path.write_bytes(path.read_bytes())
        with pytest.raises(FileChangedError, match="changed while in use"):
            weights.metadata["a"].tolist() if what == "metadata" else weights["t"].blocks


def test_threads_share_one_mapping(folder: Path) -> None:
    with opened(folder, "matrix") as weights, ThreadPoolExecutor(8) as threads:
        barrier = Barrier(8)

        def address(_: int) -> int:
            barrier.wait()
            return weights["t"].address

        assert len(set(threads.map(address, range(8)))) == 1


def test_an_unknown_type_spoils_one_tensor_only(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], [gb.tensor("odd", (7,), 99), gb.tensor("t", offset=32)]))
    with open_weights(path) as weights:
        odd = weights["odd"]
        assert (odd.type_name, odd.shape, odd.path) == ("ik_llama.cpp:99", (7,), str(path))
        for use in ("qtype", "blocks", "buffer", "address", "dequantize"):
            with pytest.raises(
                UnknownQuantTypeError, match=r"'odd' cannot be used.*99 is of ik_llama"
            ):
                getattr(odd, use)()
        assert weights["t"].qtype is QuantType.F32
        assert not weights["t"].dequantize().any()


def test_names_that_are_not_there(folder: Path) -> None:
    with opened(folder, "matrix") as weights:
        with pytest.raises(TensorNotFoundError, match="no tensor 'tt'; close: t"):
            weights["tt"]
        assert "tt" not in weights
        assert weights.get("tt") is None
        assert list(weights) == ["t"]


@pytest.mark.parametrize("name", [0, None, ("t",), b"t", 1.5])
def test_a_name_that_is_no_text_is_an_error_that_can_be_shown(folder: Path, name: Any) -> None:
    with open_weights(folder / "matrix.gguf") as weights:
        with pytest.raises(TensorNotFoundError, match=re.escape(f"no tensor {name!r}")):
            weights[name]
        assert name not in weights
        assert weights.get(name) is None
        with pytest.raises(MetadataKeyError, match=re.escape(f"no metadata key {name!r}")):
            weights.metadata[name]


OPENING: dict[str, tuple[dict[str, bytes], str, type[NumaloadError]]] = {
    "absent": ({}, "m.gguf", ReadError),
    "no-gguf": ({"m.gguf": b"hello"}, "m.gguf", NotGGUFError),
    "part-missing": (
        {"m-00001-of-00002.gguf": gb.build([gb.entry("split.count", gb.U16, b"\2\0")])},
        "m-00001-of-00002.gguf",
        SplitError,
    ),
    "part-cut": (
        {
            "m-00001-of-00002.gguf": gb.build([gb.entry("split.count", gb.U16, b"\2\0")]),
            "m-00002-of-00002.gguf": b"GGUF\3\0",
        },
        "m-00001-of-00002.gguf",
        TruncatedError,
    ),
    "name-says-one": (
        {"m-00001-of-00001.gguf": gb.build([gb.entry("split.count", gb.U16, b"\2\0")])},
        "m-00001-of-00001.gguf",
        SplitError,
    ),
}


@pytest.mark.parametrize(("files", "name", "error"), OPENING.values(), ids=OPENING)
def test_a_failed_opening_leaves_no_file_open(
    tmp_path: Path, files: dict[str, bytes], name: str, error: type[NumaloadError]
) -> None:
    for file, raw in files.items():
        (tmp_path / file).write_bytes(raw)
    with pytest.raises(error) as caught:
        open_weights(tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert not [target for target in _open_files() if str(tmp_path) in target]


def test_opening_and_closing_leaves_no_file_open(folder: Path) -> None:
    with opened(folder, "matrix"):
        assert [target for target in _open_files() if str(folder) in target]
    assert not [target for target in _open_files() if str(folder) in target]


def _open_files() -> list[str]:
    # lexists: the listing has a descriptor of its own, which is gone by now.
    links = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def test_paths_as_bytes_and_path_objects(folder: Path) -> None:
    path: Any = os.fsencode(folder / "matrix.gguf")
    with open_weights(path) as weights:
        assert weights.paths == [str(folder / "matrix.gguf")]


def test_memory_that_is_there_is_had_without_waiting(tmp_path: Path) -> None:
    """Whoever holds the lock may run a finalizer that waits for a thread which reads."""
    with open_weights(write_model(str(tmp_path / "m.gguf"), 1 << 20)[0], copy=True) as weights:
        tensor = next(iter(weights.values()))
        with weights._lock, ThreadPoolExecutor(1) as threads:
            assert threads.submit(lambda: tensor.buffer.nbytes).result(30) == tensor.nbytes
