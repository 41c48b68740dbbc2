"""Kernels that read their blocks themselves give what those that are given them do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from numaload.dequantize import DTYPES, Conversion
from numaload.formats.qtypes import QuantType
from numaload.kernels.registry import KERNELS, step
from numaload.samples import random_blocks

BEFORE = 1000  # bytes of the file that are none of the tensor's


@pytest.mark.slow  # all kernels are compiled, the first time
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("qtype", KERNELS, ids=lambda q: q.name)
def test_the_same_floats(tmp_path: Path, qtype: QuantType, dtype: str) -> None:
    blocks = random_blocks(
        qtype, 7, 1280 if step(qtype)[0] < 256 else 2048, np.random.default_rng(1)
    )
    blocks = np.ascontiguousarray(blocks).view(np.uint8).reshape(-1)
    path = tmp_path / "file"
    path.write_bytes(b"x" * BEFORE + blocks.tobytes() + b"y" * 100)
    convert = Conversion(qtype, DTYPES[dtype])
    assert convert.reads
    floats = blocks.size // convert.step_bytes * convert.step
    expected, found = np.zeros((2, floats), DTYPES[dtype])
    convert(blocks, expected, False)
    bits = f"u{found.itemsize}"
    with path.open("rb") as file:
        # A part of one step, of several and some bytes, and of all.
        for part in (convert.step_bytes, 3 * convert.step_bytes + 5, blocks.size + 4096):
            for past_caches in (False, True):
                found[:] = 7
                scratch = np.zeros(part, np.uint8)
                done = convert.read(file.fileno(), BEFORE, found, scratch, past_caches)
                assert done == floats
                np.testing.assert_array_equal(found.view(bits), expected.view(bits))


@pytest.fixture
def convert() -> Conversion:
    return Conversion(QuantType.Q8_0, DTYPES["float32"])


def test_what_is_missing_is_not_done(tmp_path: Path, convert: Conversion) -> None:
    """Told as done is what was there, in whole parts; nothing is written beyond."""
    blocks = random_blocks(QuantType.Q8_0, 1, 32 * 100, np.random.default_rng(2)).reshape(-1)
    path = tmp_path / "file"
    path.write_bytes(blocks.tobytes()[: 34 * 50 + 3])
    out = np.full(32 * 100, 7, np.float32)
    scratch = np.zeros(34 * 8, np.uint8)
    with path.open("rb") as file:
        done = convert.read(file.fileno(), 0, out, scratch, False)
    assert done == 32 * 48
    assert (out[done:] == 7).all()
    assert not (out[:done] == 7).any()


def test_a_descriptor_that_cannot_be_read(tmp_path: Path, convert: Conversion) -> None:
    out = np.full(32 * 4, 7, np.float32)
    scratch = np.zeros(4096, np.uint8)
    write_only = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    for fd in (-1, write_only):
        assert convert.read(fd, 0, out, scratch, False) == 0
    os.close(write_only)
    assert (out == 7).all()


def test_what_is_no_whole_step_is_left(tmp_path: Path, convert: Conversion) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(34 * 10))
    with path.open("rb") as file:
        for size, expected in ((31, 0), (0, 0), (95, 64)):
            out = np.full(size, 7, np.float32)
            assert convert.read(file.fileno(), 0, out, np.zeros(64, np.uint8), False) == expected
            assert (out[expected:] == 7).all()


def test_big_endian_files_are_read_by_python(tmp_path: Path) -> None:
    swapped = Conversion(QuantType.F16, DTYPES["float32"], byte_order="big")
    assert not swapped.reads
    assert swapped.read(-1, 0, np.zeros(64, np.float32), np.zeros(64, np.uint8), False) == 0
