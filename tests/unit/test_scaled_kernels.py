"""Kernels that take their scales from another array, against plain numpy."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import scaled_models as sm
from numaload.dequantize import Conversion, dequantize_blocks
from numaload.errors import UsageError
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
from numaload.machine.topology import topology
from numaload.machine.workers import pool

STEPS = 300  # more than fit into the scratch at once, and no multiple of it
NVFP4 = "nvfp4_by_64"

pytestmark = pytest.mark.slow  # kernels are compiled, the first time

each_code = pytest.mark.parametrize("code", registry.SCALED)
each_dtype = pytest.mark.parametrize("dtype", registry.DTYPES)


class Given:
    """Scales that are there, of rows of ``columns``."""

    def __init__(self, scales: sm.Floats, columns: int, group: int) -> None:
        self.scales, self.columns, self.group = scales, columns, group

    def take(self, first: int, count: int) -> sm.Floats:
        return self.scales[first // self.group : (first + count) // self.group]


def numbers(code: str, blocks: sm.Bytes) -> sm.Floats:
    """What the blocks hold before they are multiplied."""
    if code == NVFP4:  # the same as without scales, which its own tests compare
        out = np.empty(len(blocks) * 64, np.float32)
        kernel = registry.load(QuantType.NVFP4, "float32")
        assert kernel is not None
        kernel(blocks.reshape(-1), out, False)
        return out
    flat = blocks.reshape(-1)
    if code.startswith("e4m3"):
        return sm.E4M3[flat]
    return sm.nibbles(flat) * np.float32(2 if "doubled" in code else 1)


def made(code: str) -> tuple[sm.Bytes, sm.Floats, sm.Floats]:
    """Blocks, scales, and what they are."""
    scaled, rng = registry.SCALED[code], np.random.default_rng(3)
    blocks = rng.integers(0, 256, (STEPS, scaled.nbytes), dtype=np.uint8)
    blocks[:8] = np.arange(8 * scaled.nbytes).reshape(8, -1) % 256  # every byte
    scales = sm.special(rng, STEPS * scaled.weights // scaled.group)
    expected = sm.product(numbers(code, blocks), scales.repeat(scaled.group))
    return blocks, scales, expected


@each_code
@each_dtype
@pytest.mark.parametrize("past_caches", [False, True])
def test_equals_the_formula(code: str, dtype: str, past_caches: bool) -> None:
    blocks, scales, expected = made(code)
    kernel = registry.load(code, dtype)
    assert kernel is not None
    bits = np.zeros(expected.size, np.float32 if dtype == "float32" else np.uint16)
    kernel(blocks.reshape(-1), bits, past_caches, scales)
    sm.check_same(bits.view(sm.DTYPES[dtype]), sm.rounded(expected, dtype))


@each_code
def test_reads_its_blocks_from_a_file(tmp_path: Path, code: str) -> None:
    if registry.interpreted():
        pytest.skip("kernels in Python do not read")
    blocks, scales, expected = made(code)
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100 + blocks.tobytes())
    scaled = registry.SCALED[code]
    given = Given(scales, 64, scaled.group)
    convert = Conversion(code, sm.DTYPES["bfloat16"], scales=given)
    out = np.zeros(expected.size, sm.DTYPES["bfloat16"])
    skip = 4 * scaled.weights  # begin somewhere: scales must be of the same weights
    with path.open("rb") as file:
        for part in (scaled.nbytes, 3 * scaled.nbytes + 5, blocks.size):
            out[:] = 7
            scratch = np.zeros(part, np.uint8)
            fd, start = file.fileno(), 100 + 4 * scaled.nbytes
            done = convert.read(fd, start, out[skip:], scratch, False, skip)
            assert done == out.size - skip
            sm.check_same(out[skip:], sm.rounded(expected, "bfloat16")[skip:])
    assert os.path.getsize(path) == 100 + blocks.size


def dequantized(code: str, scales: Any, blocks: sm.Bytes) -> NDArray[Any]:
    out = np.zeros(STEPS * registry.SCALED[code].weights, np.float32)
    dequantize_blocks(blocks, code, out.dtype, out, pool(topology()), scales=scales)
    return out


def test_what_compiled_code_trusts_is_checked() -> None:
    code = "e4m3_by_32"
    blocks, scales, expected = made(code)
    flat = blocks.reshape(-1, 1)
    sm.check_same(dequantized(code, Given(scales, 64, 32), flat), expected)
    wrong = [
        Given(scales[:-1], 64, 32),  # too few
        Given(scales.astype(np.float64), 64, 32),
        Given(scales, 64, 64),  # of other groups
        None,
    ]
    for given in wrong:
        with pytest.raises(UsageError, match="scales"):
            dequantized(code, given, flat)
    with pytest.raises(UsageError, match="expected"):
        dequantized(code, Given(scales, 64, 32), flat[:-1])
    with pytest.raises(UsageError, match="scales"):
        Conversion(QuantType.NVFP4, sm.DTYPES["float32"], scales=Given(scales, 64, 64))


def test_unknown_codes_have_no_kernel() -> None:
    assert registry.load("e5m2_by_32", "float32") is None
    assert registry.load("e4m3_by_32", "float64") is None
