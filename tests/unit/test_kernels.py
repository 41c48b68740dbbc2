"""Every kernel, bit for bit, against gguf-py, a naive twin and blocks written by hand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import naive
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

ROOT = Path(__file__).parents[2]
QTYPES = list(registry.KERNELS)
# byte offsets of the f16 scales in a block; F16 itself is its own scale
SCALES = {
    QuantType.F16: (0,),
    QuantType.Q8_0: (0,),
    QuantType.Q4_K: (0, 2),
    QuantType.Q6_K: (208,),
}
SPECIAL = {
    "zero": 0x0000,
    "negative-zero": 0x8000,
    "smallest-subnormal": 0x0001,
    "negative-subnormal": 0x83FF,
    "smallest-normal": 0x0400,
    "negative": 0xBC01,
    "huge": 0x7BFF,
    "negative-huge": 0xFBFF,
    "infinity": 0x7C00,
    "negative-infinity": 0xFC00,
    "signaling-nan": 0x7C01,
    "negative-quiet-nan": 0xFE55,
}
WITH_JIT = os.environ.get("NUMBA_DISABLE_JIT", "0") in {"", "0"}
MANY = 1_000_000 if WITH_JIT else 20_000


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20)


def random_blocks(rng: np.random.Generator, qtype: QuantType, n_blocks: int) -> Bytes:
    return rng.integers(0, 256, (n_blocks, BLOCKS[qtype][1]), dtype=np.uint8)


def run(qtype: QuantType, src: Bytes) -> Floats:
    kernel = registry.load(qtype)
    assert kernel is not None
    out = np.full((len(src), BLOCKS[qtype][0]), 7, np.float32)
    with np.errstate(all="ignore"):  # without JIT, numpy warns where a kernel may overflow
        kernel(src, out, 0, len(src))
    return out


def reference(qtype: QuantType, src: Bytes) -> Floats:
    with np.errstate(all="ignore"):
        weights = gguf.quants.dequantize(src.reshape(-1), gguf.GGMLQuantizationType(qtype))
    return np.asarray(weights, np.float32).reshape(len(src), -1)


def assert_same_bits(actual: Floats, expected: Floats) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_random_bytes_as_gguf_py(qtype: QuantType, rng: np.random.Generator) -> None:
    n_weights = 1_048_576 if WITH_JIT else 8_192
    src = random_blocks(rng, qtype, n_weights // BLOCKS[qtype][0])
    expected = reference(qtype, src)
    assert np.isnan(expected).any()
    assert np.isfinite(expected).any()
    assert_same_bits(run(qtype, src), expected)


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_random_bytes_as_naive_twin(qtype: QuantType, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, max(48, 2_048 // BLOCKS[qtype][0]))
    assert_same_bits(run(qtype, src), naive.dequantize(qtype, src))


@pytest.mark.parametrize("scale", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("qtype", SCALES, ids=lambda q: q.name)
def test_special_scales(qtype: QuantType, scale: int, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, 8)
    for block, offset in enumerate(SCALES[qtype]):
        src[2 * block :, offset] = scale & 0xFF
        src[2 * block :, offset + 1] = scale >> 8
    actual = run(qtype, src)
    assert_same_bits(actual, reference(qtype, src))
    assert_same_bits(actual, naive.dequantize(qtype, src))


def test_every_float16() -> None:
    halves = np.arange(65_536, dtype=np.uint16)
    src = halves.view(np.uint8).reshape(-1, 2)
    expected = [naive.half(low, high) for low, high in src.tolist()]
    assert_same_bits(run(QuantType.F16, src)[:, 0], np.array(expected))
    assert_same_bits(run(QuantType.F16, src), reference(QuantType.F16, src))


def test_every_bfloat16() -> None:
    halves = np.arange(65_536, dtype=np.uint16)
    src = halves.view(np.uint8).reshape(-1, 2)
    bits = run(QuantType.BF16, src).view(np.uint32)[:, 0]
    np.testing.assert_array_equal(bits, halves.astype(np.uint32) << 16)


def test_f16_by_hand() -> None:
    src = np.frombuffer(bytes.fromhex("003c 00c0 0100 ff7b 0080 007c 017c"), np.uint8)
    out = run(QuantType.F16, src.reshape(-1, 2))[:, 0]
    assert out[:5].tolist() == [1, -2, 2**-24, 65_504, 0]
    assert out.view(np.uint32)[4:].tolist() == [0x80000000, 0x7F800000, 0x7F802000]


def test_bf16_by_hand() -> None:
    src = np.frombuffer(bytes.fromhex("803f 20c1 0100 807f"), np.uint8)
    out = run(QuantType.BF16, src.reshape(-1, 2))[:, 0]
    assert out.tolist() == [1, -10, 2**-133, np.inf]


def test_q8_0_by_hand() -> None:
    block = bytes.fromhex("0038") + bytes([0x80, 0xFF, 0x00, 0x01, 0x7F]) + bytes(27)
    out = run(QuantType.Q8_0, np.frombuffer(block, np.uint8).reshape(1, 34))
    assert out[0, :6].tolist() == [-64, -0.5, 0, 0.5, 63.5, 0]
    assert out[0, 5:].tolist() == [0] * 27


def test_q4_k_by_hand() -> None:
    # scales 1 2 3 4 17 34 51 63, mins 8 7 6 5 63 51 34 17: every field has its own value
    scales = bytes.fromhex("4182c3c4 c8c78645 f132231f")
    qs = bytearray(b"\x21" * 128)  # 1 in the even groups, 2 in the odd ones
    qs[0], qs[127] = 0xF0, 0x0F
    block = bytes.fromhex("003c 0038") + scales + bytes(qs)  # d = 1, dmin = 0.5
    out = run(QuantType.Q4_K, np.frombuffer(block, np.uint8).reshape(1, 144))
    expected = np.repeat(np.array([-3, 0.5, 0, 5.5, -14.5, 42.5, 34, 117.5], np.float32), 32)
    expected[[0, 32]] = [-4, 26.5]  # q = 0 and 15
    expected[[223, 255]] = [748, -8.5]  # q = 15 and 0
    assert out[0].tolist() == expected.tolist()


def test_q6_k_by_hand() -> None:
    ql, qh = bytearray(128), bytearray(64)
    ql[0], qh[0] = 0x21, 0b11_10_01_00
    qh[48] = 0b00_00_00_11
    scales = np.array([1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 127, -128], np.int8)
    block = bytes(ql) + bytes(qh) + scales.tobytes() + bytes.fromhex("0038")  # d = 0.5
    out = run(QuantType.Q6_K, np.frombuffer(block, np.uint8).reshape(1, 210))
    expected = np.repeat(scales.astype(np.float32) * -16, 16)  # q = -32 wherever all bits are 0
    expected[[0, 32, 64, 96]] = [-15.5, -16, 3, 32]  # q = -31, -16, 2, 16
    expected[144] = -40  # q = 16
    assert out[0].tolist() == expected.tolist()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 7), (5, 5), (0, 11), (10, 11)])
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_writes_its_range_only(
    qtype: QuantType, start: int, stop: int, rng: np.random.Generator
) -> None:
    src = random_blocks(rng, qtype, 11)
    expected = np.full((11, BLOCKS[qtype][0]), 7, np.float32)
    expected[start:stop] = reference(qtype, src)[start:stop]
    out = np.full_like(expected, 7)
    kernel = registry.load(qtype)
    assert kernel is not None
    with np.errstate(all="ignore"):
        kernel(src, out, start, stop)
    assert_same_bits(out, expected)


@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_read_only_at_any_address(qtype: QuantType, offset: int, rng: np.random.Generator) -> None:
    blocks = random_blocks(rng, qtype, 64)
    file = np.frombuffer(bytes(offset) + blocks.tobytes(), np.uint8)  # bytes: read-only, as mmap
    src = file[offset:].reshape(blocks.shape)
    assert not src.flags.writeable
    assert_same_bits(run(qtype, src), reference(qtype, blocks))


@pytest.mark.skipif(not WITH_JIT, reason="no compiled code without JIT")
@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_read_only_and_writable_share_code(qtype: QuantType, rng: np.random.Generator) -> None:
    src = random_blocks(rng, qtype, 2)
    run(qtype, src)
    src.flags.writeable = False
    run(qtype, src)
    assert len(getattr(registry.load(qtype), "signatures", ())) == 1


# narrowing -------------------------------------------------------------------------------------

TWINS = {"float16": naive.narrow_float16, "bfloat16": naive.narrow_bfloat16}
NUMPY_QUIETS = np.uint16(0x7C01).view(np.float16).astype(np.float32).view(np.uint32) != 0x7F802000


def narrow(name: str, bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    kernel = registry.load_narrow(name)
    assert kernel is not None
    out = np.full(len(bits), 0x5555, np.uint16)
    with np.errstate(all="ignore"):
        kernel(bits.view(np.float32), out, 0, len(bits))
    return out


def library(name: str, bits: NDArray[np.uint32]) -> NDArray[np.uint16]:
    dtype = np.float16 if name == "float16" else ml_dtypes.bfloat16
    with np.errstate(all="ignore"):
        return np.asarray(bits.view(np.float32).astype(dtype).view(np.uint16))


def comparable(name: str, bits: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Some numpy builds use conversion instructions, which make a float16 NaN quiet."""
    if name == "float16" and NUMPY_QUIETS:
        return bits[~np.isnan(bits.view(np.float32))]
    return bits


def edges(lower_bits: int) -> NDArray[np.uint32]:
    """For each upper part: exact, just above, around and on the tie, just below the next."""
    upper = np.arange(1 << (32 - lower_bits), dtype=np.uint32) << np.uint32(lower_bits)
    tie = 1 << (lower_bits - 1)
    lower = np.array([0, 1, tie - 1, tie, tie + 1, 2 * tie - 1], np.uint32)
    return (upper[:, None] + lower).reshape(-1)


@pytest.mark.parametrize("name", TWINS)
def test_narrow_random_bits_as_library(name: str, rng: np.random.Generator) -> None:
    bits = comparable(name, rng.integers(0, 1 << 32, MANY, dtype=np.uint32))
    np.testing.assert_array_equal(narrow(name, bits), library(name, bits))


@pytest.mark.parametrize(("name", "lower_bits"), [("float16", 13), ("bfloat16", 16)])
def test_narrow_ties_as_library(name: str, lower_bits: int, rng: np.random.Generator) -> None:
    bits = comparable(name, edges(lower_bits))
    if not WITH_JIT:
        bits = rng.choice(bits, MANY)
    np.testing.assert_array_equal(narrow(name, bits), library(name, bits))


@pytest.mark.parametrize("name", TWINS)
def test_narrow_as_naive_twin(name: str, rng: np.random.Generator) -> None:
    some = np.concatenate(
        [
            rng.integers(0, 1 << 32, 2_000, dtype=np.uint32),
            rng.choice(edges(13), 2_000),
            rng.integers(0x33000000, 0x39000000, 1_000, dtype=np.uint32),  # float16 subnormals
            rng.integers(0, 0x00800000, 500, dtype=np.uint32),  # float32 subnormals
            rng.integers(0x7F800000, 0x80000000, 500, dtype=np.uint32),  # NaN
        ]
    )
    bits = np.concatenate([some, some ^ np.uint32(0x80000000)])
    assert narrow(name, bits).tolist() == [TWINS[name](value) for value in bits.tolist()]


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        pytest.param("float16", 0x3F800000, 0x3C00, id="float16-one"),
        pytest.param("float16", 0x3F801000, 0x3C00, id="float16-tie-to-even-below"),
        pytest.param("float16", 0x3F803000, 0x3C02, id="float16-tie-to-even-above"),
        pytest.param("float16", 0x3F801001, 0x3C01, id="float16-over-the-tie"),
        pytest.param("float16", 0x33000000, 0x0000, id="float16-half-the-least"),
        pytest.param("float16", 0x33000001, 0x0001, id="float16-over-half-the-least"),
        pytest.param("float16", 0x387FFFFF, 0x0400, id="float16-carry-out-of-subnormal"),
        pytest.param("float16", 0x80000001, 0x8000, id="float16-negative-underflow"),
        pytest.param("float16", 0x477FEFFF, 0x7BFF, id="float16-largest"),
        pytest.param("float16", 0x477FF000, 0x7C00, id="float16-overflow"),
        pytest.param("float16", 0xFF7FFFFF, 0xFC00, id="float16-negative-overflow"),
        pytest.param("float16", 0xFF800000, 0xFC00, id="float16-infinity"),
        pytest.param("float16", 0x7F800001, 0x7C01, id="float16-nan-low-payload"),
        pytest.param("float16", 0xFFC02000, 0xFE01, id="float16-nan-payload"),
        pytest.param("bfloat16", 0x3F808000, 0x3F80, id="bfloat16-tie-to-even-below"),
        pytest.param("bfloat16", 0x3F818000, 0x3F82, id="bfloat16-tie-to-even-above"),
        pytest.param("bfloat16", 0x00008001, 0x0001, id="bfloat16-subnormal"),
        pytest.param("bfloat16", 0x7F7FFFFF, 0x7F80, id="bfloat16-overflow"),
        pytest.param("bfloat16", 0xFF7FFFFF, 0xFF80, id="bfloat16-negative-overflow"),
        pytest.param("bfloat16", 0x7F800001, 0x7FC0, id="bfloat16-nan"),
        pytest.param("bfloat16", 0xFFFFFFFF, 0xFFC0, id="bfloat16-negative-nan"),
    ],
)
def test_narrow_by_hand(name: str, bits: int, expected: int) -> None:
    assert narrow(name, np.array([bits], np.uint32)).tolist() == [expected]


@pytest.mark.parametrize(("name", "qtype"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_narrow_round_trip(name: str, qtype: str) -> None:
    halves = np.arange(65_536, dtype=np.uint16)
    wide = run(QuantType[qtype], halves.view(np.uint8).reshape(-1, 2))[:, 0]
    back = narrow(name, wide.view(np.uint32))
    kept = ~np.isnan(wide) if name == "bfloat16" else slice(None)
    np.testing.assert_array_equal(back[kept], halves[kept])


@pytest.mark.parametrize("name", TWINS)
def test_narrow_writes_its_range_only(name: str) -> None:
    kernel = registry.load_narrow(name)
    assert kernel is not None
    src = np.linspace(-1, 1, 50, dtype=np.float32)
    src.flags.writeable = False
    out = np.full(50, 0x5555, np.uint16)
    with np.errstate(all="ignore"):
        kernel(src, out, 9, 30)
    assert set(out[:9].tolist()) == set(out[30:].tolist()) == {0x5555}
    np.testing.assert_array_equal(out[9:30], library(name, src.view(np.uint32))[9:30])


# registry --------------------------------------------------------------------------------------


def test_no_kernel_is_none() -> None:
    assert registry.load(QuantType.Q8_K) is None
    assert registry.load_narrow("float64") is None


def test_registry_does_not_import_numba() -> None:
    code = "import sys, numaload.kernels.registry; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("qtype", QTYPES, ids=lambda q: q.name)
def test_diagram_has_the_sizes_of_blocks(qtype: QuantType) -> None:
    text = (ROOT / "kernels" / f"{registry.KERNELS[qtype][0]}.py").read_text(encoding="utf-8")
    title = re.search(
        rf"^# {qtype.name}, (\d+) bytes -> (\d+) weights? .*\n((?:#.*\n)+)", text, re.MULTILINE
    )
    assert title is not None
    assert (int(title[2]), int(title[1])) == BLOCKS[qtype]
    end = 0
    for first, last in re.findall(r"^#   byte (\d+)-(\d+) ", title[3], re.MULTILINE):
        assert int(first) == end
        end = int(last) + 1
    assert end == BLOCKS[qtype][1]


def test_blocks_as_gguf_py() -> None:
    theirs = {q.name: sizes for q, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {q.name: sizes for q, sizes in BLOCKS.items() if q.name in theirs}
    assert len(ours) >= 30
    assert {name for name in ours if theirs[name] != ours[name]} <= {"Q8_1"}
    assert all(int(gguf.GGMLQuantizationType[name]) == int(QuantType[name]) for name in ours)


# without JIT -----------------------------------------------------------------------------------

WITHOUT_JIT = """
import sys, numpy as np
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
np.seterr(all="ignore")
src, out = np.load(sys.argv[1]), {}
for name in src:
    q = QuantType[name]
    out[name] = np.zeros((len(src[name]), BLOCKS[q][0]), np.float32)
    registry.load(q)(src[name], out[name], 0, len(src[name]))
np.savez(sys.argv[2], **out)
"""


def test_interpreted_code_gives_the_same_bits(tmp_path: Path, rng: np.random.Generator) -> None:
    src: dict[str, Bytes] = {q.name: random_blocks(rng, q, 40) for q in QTYPES}
    src_path, out_path = tmp_path / "src.npz", tmp_path / "out.npz"
    with src_path.open("wb") as file:
        save: Callable[..., None] = np.savez
        save(file, **src)
    subprocess.run(
        [sys.executable, "-c", WITHOUT_JIT, str(src_path), str(out_path)],
        check=True,
        cwd=ROOT,
        env={**os.environ, "NUMBA_DISABLE_JIT": "1"},
    )
    with np.load(out_path) as out:
        for qtype in QTYPES:
            assert_same_bits(out[qtype.name], run(qtype, src[qtype.name]))
