"""The vocabulary of kernels: what is compiled must mean what its numpy bodies say.

A case is a decode function like those of the families: it puts what the words give, as float32 that
hold it exactly. It runs as Python and compiled over the same bytes.
"""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import naive
from numaload.formats.qtypes import QuantType
from numaload.kernels import lanes, registry
from numaload.kernels.jit.target import target
from numaload.kernels.lanes import (
    ahead,
    as_f16,
    f16,
    fence,
    floats,
    i64,
    interleave,
    join,
    lane,
    load,
    load_f32,
    load_u16,
    lookup,
    narrow_bf16,
    narrow_f16,
    narrow_normal_bf16,
    pair,
    pairs_of_bits,
    plus_or_minus,
    put,
    quad,
    scratch,
    signed,
    spread,
    stream,
    u8,
    u16,
    u32,
    wide,
    widen_bf16,
    widen_f16,
)
from numaload.kernels.loops import NARROW, STEP, Narrow, Parts, build_loop

Array = NDArray[Any]
Bits = NDArray[np.uint32]

ROOT = Path(__file__).parents[2]
WITH_JIT = not registry.interpreted()
MANY = 1_000_000
pytestmark = pytest.mark.slow  # every word is compiled, for several processors
compiles = pytest.mark.skipif(not WITH_JIT, reason="nothing is compiled without JIT")
on_x86 = pytest.mark.skipif(
    not llvm.get_process_triple().startswith("x86_64"), reason="names instructions of x86-64"
)
on_glibc_x86 = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="knows where glibc of x86-64 keeps the mode",
)


# running ---------------------------------------------------------------------------------------


@cache
def compiled(parts: Parts, dtype: str) -> Callable[[int, int, int, int], None]:
    from numaload.kernels.jit.compile import compile_kernel
    from numaload.kernels.jit.objects import Function

    return Function(compile_kernel("case", dtype, parts), "case")


def output(parts: Parts, dtype: str, src: Array) -> Array:
    item = np.float32 if dtype == "float32" else np.uint16
    return np.zeros(src.size // parts.nbytes * parts.weights, item)


def run(parts: Parts, dtype: str, src: Array, past_caches: int = 0) -> Array:
    """Compiled."""
    out, n_blocks = output(parts, dtype, src), src.size // parts.nbytes
    compiled(parts, dtype)(src.ctypes.data, out.ctypes.data, n_blocks, past_caches)
    return out


def interpret(parts: Parts, dtype: str, src: Array) -> Array:
    out, n_blocks = output(parts, dtype, src), src.size // parts.nbytes
    with np.errstate(all="ignore"):
        build_loop(parts, lambda function: function)(src, out, n_blocks, 0)
    return out


# cases -----------------------------------------------------------------------------------------

BYTES = np.random.default_rng(1).integers(0, 256, 48, dtype=np.uint8)
SIGNED = BYTES.view(np.int8)
WORDS = np.random.default_rng(2).integers(0, 1 << 16, 48, dtype=np.uint16)
SINGLES = np.random.default_rng(3).normal(size=48).astype(np.float32)


def numbers(src: Array, at: int, w: Array, to: int) -> None:
    put(w, to, floats(pair(u8(src, at), u8(src, at + 31))))
    put(w, to + 16, floats(pair(u16(src, at + 1), u16(src, at + 30))))
    put(w, to + 32, floats(pair(u32(src, at + 3), u32(src, at + 28))))
    put(w, to + 48, floats(pair(i64(src, at + 5), i64(src, at + 24))))
    put(w, to + 64, floats(pair(u8(src, at) << 50, u16(src, at + 1) << 40)))  # of 64 bits
    put(w, to + 80, floats(pair(u32(src, at) - (1 << 32), -u16(src, at))))
    put(w, to + 96, floats(pair(i64(src, at) >> 9, i64(src, at + 8) >> 63)))  # and signed
    put(w, to + 112, floats(quad(u8(src, at), u16(src, at), u32(src, at), i64(src, at) >> 3)))


def of_constant_arrays(src: Array, at: int, w: Array, to: int) -> None:
    i = u8(src, at) & 31
    put(w, to, floats(pair(u8(BYTES, i), u16(BYTES, i))))
    put(w, to + 16, floats(interleave(u32(BYTES, i), i64(BYTES, i))))
    put(w, to + 32, floats(load(BYTES, i)))
    put(w, to + 48, floats(load(SIGNED, i)))
    put(w, to + 64, floats(load(WORDS, i)))
    put(w, to + 80, load(SINGLES, i))
    put(w, to + 96, floats(lookup(BYTES, load(src, at) & 15)))
    put(w, to + 112, floats(lookup(SIGNED, load(src, at) >> 4)))


def memory(src: Array, at: int, w: Array, to: int) -> None:
    put(w, to, floats(load(src, at)))
    put(w, to + 16, floats(load_u16(src, at + 1)))
    put(w, to + 32, load_f32(src, at + 3))
    put(w, to + 48, floats(pair(ahead(src, at), ahead(src, at + 1))))
    room = scratch()
    put(room, 1, load_f32(src, at + 1))
    put(room, lanes.CHUNK - 16, load_f32(src, at + 2))
    stream(w, to + 64, load(room, 1))
    fence()
    put(w, to + 80, load(room, lanes.CHUNK - 16))
    put(w, to + 96, join(floats(load(src, at + 7)), floats(load(src, at + 9))))


def from_bits(src: Array, at: int, w: Array, to: int) -> None:
    put(w, to, floats(spread(u16(src, at))))
    put(w, to + 16, floats(spread(i64(src, at))))
    put(w, to + 32, floats(spread(i64(src, at) >> 40)))
    put(w, to + 48, floats(pairs_of_bits(u32(src, at + 4))))
    put(w, to + 64, floats(pairs_of_bits(i64(src, at + 8))))
    put(w, to + 80, plus_or_minus(u16(src, at), load_f32(src, at)))
    put(w, to + 96, plus_or_minus(i64(src, at), f16(src, at)))
    put(w, to + 112, plus_or_minus(u32(src, at) >> 8, f16(src, at + 2)))


def to_lanes(src: Array, at: int, w: Array, to: int) -> None:
    eight, f = load(src, at), load_f32(src, at + 16)
    i = u8(src, at) & 15
    put(w, to, floats(eight))
    put(w, to + 16, floats(signed(eight)))
    put(w, to + 32, floats(wide(eight)))
    put(w, to + 48, floats(wide(eight) * 255))
    put(w, to + 64, f * lane(f, 0))
    put(w, to + 80, f * lane(f, 15))
    put(w, to + 96, f * lane(f, i))
    put(w, to + 112, floats(eight + u8(src, at + 3)))


def halves(src: Array, at: int, w: Array, to: int) -> None:
    put(w, to, f16(src, at))
    put(w, to + 16, as_f16(u16(src, at + 1)))
    put(w, to + 32, as_f16(i64(src, at + 1)))  # what is above 16 bits does not count
    put(w, to + 48, widen_f16(load_u16(src, at)))
    put(w, to + 64, widen_bf16(load_u16(src, at)))
    put(w, to + 80, floats(narrow_f16(load_f32(src, at))))
    put(w, to + 96, floats(narrow_bf16(load_f32(src, at))))
    put(w, to + 112, floats(narrow_bf16(widen_f16(load_u16(src, at)))))


def of_uint8(src: Array, at: int, w: Array, to: int) -> None:
    a, b, n = load(src, at), load(src, at + 16), u8(src, at + 32) & 7
    put(w, to, floats(a & b))
    put(w, to + 16, floats(a | b))
    put(w, to + 32, floats(a ^ b))
    put(w, to + 48, floats(a << (b & 7)))
    put(w, to + 64, floats(a >> (b & 7)))
    put(w, to + 80, floats(a + b))
    put(w, to + 96, floats(a - b))
    put(w, to + 112, floats(a * b))
    put(w, to + 128, floats(a & n))
    put(w, to + 144, floats(a | n))
    put(w, to + 160, floats(a ^ n))
    put(w, to + 176, floats(a << n))
    put(w, to + 192, floats(a >> n))
    put(w, to + 208, floats(a + n))
    put(w, to + 224, floats(a - n))
    put(w, to + 240, floats(a * n))


def of_int8(src: Array, at: int, w: Array, to: int) -> None:
    a, b, n = signed(load(src, at)), signed(load(src, at + 16)), u8(src, at + 32) & 7
    put(w, to, floats(a & b))
    put(w, to + 16, floats(a | b))
    put(w, to + 32, floats(a ^ b))
    put(w, to + 48, floats(a << (b & 7)))
    put(w, to + 64, floats(a + b))
    put(w, to + 80, floats(a - b))
    put(w, to + 96, floats(a * b))
    put(w, to + 112, floats(a & n))
    put(w, to + 128, floats(a | n))
    put(w, to + 144, floats(a >> n) + floats(a >> (b & 7)))  # the sign comes along
    put(w, to + 160, floats(a << n))
    put(w, to + 176, floats(a + n))
    put(w, to + 192, floats(a - n))
    put(w, to + 208, floats(a * n))
    put(w, to + 224, floats(a - 32))
    put(w, to + 240, floats(a * -3))


def of_uint16(src: Array, at: int, w: Array, to: int) -> None:
    a, b, n = load_u16(src, at), load_u16(src, at + 1), u8(src, at) & 15
    put(w, to, floats(a & b))
    put(w, to + 16, floats(a | b))
    put(w, to + 32, floats(a ^ b))
    put(w, to + 48, floats(a << (b & 15)))
    put(w, to + 64, floats(a >> (b & 15)))
    put(w, to + 80, floats(a + b))
    put(w, to + 96, floats(a - b))
    put(w, to + 112, floats(a * b))
    put(w, to + 128, floats(a & 0xFF0F))
    put(w, to + 144, floats(a | 0x8001))
    put(w, to + 160, floats(a ^ n))
    put(w, to + 176, floats(a << n))
    put(w, to + 192, floats(a >> n))
    put(w, to + 208, floats(a + 40_000))
    put(w, to + 224, floats(a - 1))
    put(w, to + 240, floats(a * 3))


def of_float32(src: Array, at: int, w: Array, to: int) -> None:
    a, b, n = load_f32(src, at), load_f32(src, at + 64), u8(src, at)
    put(w, to, a + b)
    put(w, to + 16, a - b)
    put(w, to + 32, a * b)
    put(w, to + 48, a + np.float32(n))
    put(w, to + 64, a - lane(b, 1))
    put(w, to + 80, a * np.float32(0.125))
    put(w, to + 96, a * b - a)  # two roundings: no fused multiply-add
    put(w, to + 112, b * np.float32(n) + b)


class Case(NamedTuple):
    decode: Callable[..., None]
    weights: int
    nbytes: int  # odd: in 64 blocks each has an address of its own modulo 64


CASES = {
    case.decode.__name__: case
    for case in (
        Case(numbers, 128, 33),
        Case(of_constant_arrays, 128, 17),
        Case(memory, 128, 67),
        Case(from_bits, 128, 65),
        Case(to_lanes, 128, 81),
        Case(halves, 128, 65),
        Case(of_uint8, 256, 33),
        Case(of_int8, 256, 33),
        Case(of_uint16, 256, 33),
        Case(of_float32, 128, 129),
    )
}
# A NaN of two: which one comes out is the compiler's choice.
WITH_TWO_NAN = {"to_lanes", "of_float32"}


def bits_of(case: str, weights: Array) -> Bits:
    bits = weights.view(np.uint32)
    return (
        np.where(np.isnan(weights), np.uint32(0x7FC00000), bits) if case in WITH_TWO_NAN else bits
    )


@compiles
@pytest.mark.parametrize("name", CASES)
def test_compiled_as_interpreted(name: str) -> None:
    decode, weights, nbytes = CASES[name]
    parts = Parts(decode, join, weights, nbytes, floats=False)
    src = np.random.default_rng(4).integers(0, 256, 640 * nbytes, dtype=np.uint8)
    src[: 8 * nbytes], src[8 * nbytes : 16 * nbytes] = 0, 0xFF
    actual, expected = (
        bits_of(name, way(parts, "float32", src)).reshape(-1, weights // 16, 16)
        for way in (run, interpret)
    )
    for i in range(weights // 16):
        np.testing.assert_array_equal(actual[:, i], expected[:, i], f"what is put as number {i}")


def words() -> set[str]:
    """The functions of the vocabulary."""
    found = inspect.getmembers(lanes, inspect.isfunction)
    return {name for name, word in found if word.__module__ == lanes.__name__} - {"helper"}


def test_every_word_is_compared() -> None:
    used = {name for case in CASES.values() for name in case.decode.__code__.co_names}
    stored = {"narrow_normal_bf16"}  # as 32, which no case does: test_narrow_what_is_normal
    assert words() == used & words() | stored


def no_word(eight: Array) -> Array:
    return eight + 1


REFUSED: dict[str, Callable[[Array, int], Any]] = {
    "not-lowered": lambda src, at: floats(no_word(load(src, at))),
    "uint8-and-uint16": lambda src, at: floats(load(src, at) & load_u16(src, at)),
    "uint8-plus-float": lambda src, at: floats(load(src, at) + np.float32(1)),
    "float-plus-int": lambda src, at: load_f32(src, at) + 1,
    "float-and-float": lambda src, at: load_f32(src, at) & load_f32(src, at),
    "one-of-bytes": lambda src, at: load_f32(src, at) * lane(load(src, at), 0),
    "number-first": lambda src, at: floats(1 - load(src, at)),
}


@compiles
@pytest.mark.parametrize("read", REFUSED.values(), ids=REFUSED)
def test_what_has_no_instructions_is_refused(read: Callable[[Array, int], Any]) -> None:
    from numba.core.errors import TypingError

    parts = Parts(read, join, STEP, 4 * STEP, floats=True)
    no_word.__module__ = lanes.__name__
    with pytest.raises(TypingError):
        compiled(parts, "float32")


# halves ----------------------------------------------------------------------------------------

EVERY_HALF = np.arange(65_536, dtype=np.uint16)


@cache
def widened(qtype: QuantType) -> Bits:
    return naive.dequantize(qtype, EVERY_HALF.view(np.uint8)).view(np.uint32)


@pytest.mark.parametrize(
    ("word", "qtype"), [(widen_f16, QuantType.F16), (widen_bf16, QuantType.BF16)]
)
def test_every_half_widened(word: Callable[[Array], Array], qtype: QuantType) -> None:
    np.testing.assert_array_equal(word(EVERY_HALF).view(np.uint32), widened(qtype))


READS: dict[str, tuple[Callable[[Array, int], Array], QuantType]] = {
    "f16": (lambda src, at: widen_f16(load_u16(src, at)), QuantType.F16),
    "bf16": (lambda src, at: widen_bf16(load_u16(src, at)), QuantType.BF16),
}


def widened_compiled(name: str) -> Bits:
    parts = Parts(READS[name][0], join, STEP, 2 * STEP, floats=True)
    return run(parts, "float32", EVERY_HALF.view(np.uint8)).view(np.uint32)


@compiles
@pytest.mark.parametrize("name", READS)
def test_every_half_widened_by_compiled_code(name: str) -> None:
    np.testing.assert_array_equal(widened_compiled(name), widened(READS[name][1]))


def scales(src: Array, at: int, w: Array, to: int) -> None:
    put(w, to, f16(src, at))
    put(w, to + 16, as_f16(u16(src, at)))


@compiles
def test_every_half_as_a_scale() -> None:
    parts = Parts(scales, join, 32, 2, floats=False)
    bits = run(parts, "float32", EVERY_HALF.view(np.uint8)).view(np.uint32).reshape(-1, 32)
    np.testing.assert_array_equal(bits, np.repeat(widened(QuantType.F16)[:, None], 32, axis=1))


TWINS = {"float16": naive.narrow_float16, "bfloat16": naive.narrow_bfloat16}
NARROWING = {"float16": narrow_f16, "bfloat16": narrow_bf16}
LIBRARY = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LOWER_BITS = {"float16": 13, "bfloat16": 16}  # what narrowing rounds away
each_narrow = pytest.mark.parametrize("dtype", TWINS)
each_way = pytest.mark.parametrize("way", ["numpy", pytest.param("compiled", marks=compiles)])


def narrow(way: str, dtype: str, bits: Bits, by: Narrow | None = None) -> Array:
    if way == "numpy":
        narrowed: Array = NARROWING[dtype](bits.view(np.float32))
        return narrowed
    whole = np.zeros(-(-bits.size // STEP) * STEP, np.uint32)
    whole[: bits.size] = bits
    parts = Parts(load_f32, by or NARROW[dtype], STEP, 4 * STEP, floats=True)
    return run(parts, dtype, whole.view(np.uint8))[: bits.size]


def assert_as_library(way: str, dtype: str, bits: Bits) -> None:
    """But for NaN, of which libraries keep what they like; those are compared with the twin."""
    bits = bits[~np.isnan(bits.view(np.float32))]
    with np.errstate(all="ignore"):
        expected = np.asarray(bits.view(np.float32).astype(LIBRARY[dtype])).view(np.uint16)
    np.testing.assert_array_equal(narrow(way, dtype, bits), expected)


def edges(lower_bits: int) -> Bits:
    """For each upper part: exact, just above, around and on the tie, just below the next."""
    upper = np.arange(1 << (32 - lower_bits), dtype=np.uint32) << np.uint32(lower_bits)
    tie = 1 << (lower_bits - 1)
    lower = np.array([0, 1, tie - 1, tie, tie + 1, 2 * tie - 1], np.uint32)
    return np.asarray((upper[:, None] + lower).reshape(-1), np.uint32)


def all_kinds() -> Bits:
    rng = np.random.default_rng(5)
    some = np.concatenate(
        [
            rng.integers(0, 1 << 32, 2_000, dtype=np.uint32),
            rng.choice(edges(13), 2_000),
            rng.integers(0x33000000, 0x39000000, 1_000, dtype=np.uint32),  # float16 subnormals
            rng.integers(0, 0x00800000, 500, dtype=np.uint32),  # float32 subnormals
            rng.integers(0x7F800000, 0x80000000, 500, dtype=np.uint32),  # NaN
        ]
    )
    return np.concatenate([some, some ^ np.uint32(0x80000000)])


@each_way
@each_narrow
def test_narrow_random_bits(dtype: str, way: str) -> None:
    bits = np.random.default_rng(6).integers(0, 1 << 32, MANY, dtype=np.uint32)
    assert_as_library(way, dtype, bits)
    np.testing.assert_array_equal(narrow(way, dtype, bits), narrow("numpy", dtype, bits))


@each_way
@each_narrow
def test_narrow_ties(dtype: str, way: str) -> None:
    assert_as_library(way, dtype, edges(LOWER_BITS[dtype]))


@each_way
@each_narrow
def test_narrow_as_naive_twin(dtype: str, way: str) -> None:
    bits = all_kinds()
    expected = [TWINS[dtype](value) for value in bits.tolist()]
    assert narrow(way, dtype, bits).tolist() == expected


@compiles
def test_narrow_what_is_normal() -> None:
    bits = np.concatenate([all_kinds(), edges(16)])
    exponents, mantissas = bits & 0x7F800000, bits & 0x007FFFFF
    bits = bits[(exponents != 0) | (mantissas == 0)]
    found = narrow("compiled", "bfloat16", bits, narrow_normal_bf16)
    np.testing.assert_array_equal(found, narrow("numpy", "bfloat16", bits))


@each_way
@each_narrow
def test_narrow_round_trip(dtype: str, way: str) -> None:
    qtype = {"float16": QuantType.F16, "bfloat16": QuantType.BF16}[dtype]
    back = narrow(way, dtype, widened(qtype))
    kept = ~np.isnan(widened(qtype).view(np.float32))
    np.testing.assert_array_equal(back[kept], EVERY_HALF[kept])


BY_HAND = [
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
    pytest.param("float16", 0x7F800001, 0x7E00, id="float16-nan-low-payload"),
    pytest.param("float16", 0x7FA02000, 0x7F01, id="float16-nan-becomes-quiet"),
    pytest.param("float16", 0xFFC02000, 0xFE01, id="float16-nan-payload"),
    pytest.param("bfloat16", 0x3F808000, 0x3F80, id="bfloat16-tie-to-even-below"),
    pytest.param("bfloat16", 0x3F818000, 0x3F82, id="bfloat16-tie-to-even-above"),
    pytest.param("bfloat16", 0x00008001, 0x0001, id="bfloat16-subnormal"),
    pytest.param("bfloat16", 0x7F7FFFFF, 0x7F80, id="bfloat16-overflow"),
    pytest.param("bfloat16", 0xFF7FFFFF, 0xFF80, id="bfloat16-negative-overflow"),
    pytest.param("bfloat16", 0x7F800001, 0x7FC0, id="bfloat16-nan-becomes-quiet"),
    pytest.param("bfloat16", 0xFFFFFFFF, 0xFFFF, id="bfloat16-negative-nan"),
]


@each_way
@pytest.mark.parametrize(("dtype", "bits", "expected"), BY_HAND)
def test_narrow_by_hand(dtype: str, bits: int, expected: int, way: str) -> None:
    assert narrow(way, dtype, np.array([bits], np.uint32)).tolist() == [expected]


# A thread may have subnormals taken for zero (torch.set_flush_denormal does it): halves must not
# depend on it. glibc has the register MXCSR in its fenv_t.
MXCSR, FLUSH = 28, 0x8040


@contextmanager
def flushing() -> Iterator[None]:
    library = ctypes.CDLL("libm.so.6")
    before = ctypes.create_string_buffer(32)
    library.fegetenv(before)
    changed = ctypes.create_string_buffer(before.raw, 32)
    control = ctypes.c_uint32.from_buffer(changed, MXCSR)
    control.value |= FLUSH
    library.fesetenv(changed)
    try:
        yield
    finally:
        library.fesetenv(before)


@compiles
@on_glibc_x86
def test_halves_of_threads_that_flush_subnormals() -> None:
    bits = all_kinds()
    expected = [narrow("compiled", dtype, bits) for dtype in TWINS]
    with flushing():
        least = np.float32(1.1754944e-38) * np.float32(0.5)
        narrowed = [narrow("compiled", dtype, bits) for dtype in TWINS]
        widened_too = [widened_compiled(name) for name in READS]
    assert least == 0
    np.testing.assert_array_equal(narrowed, expected)
    np.testing.assert_array_equal(widened_too, [widened(qtype) for _, qtype in READS.values()])


# stores ----------------------------------------------------------------------------------------

COPIES: dict[str, tuple[Callable[[Array, int], Array], Any]] = {
    "float32": (load_f32, np.float32),
    "float16": (load_u16, np.uint16),
}


@pytest.mark.parametrize("dtype", COPIES)
def test_ahead_is_the_way_to_the_next_cache_line(dtype: str) -> None:
    item = COPIES[dtype][1]
    area = np.zeros(256, item)
    for i in range(64):
        there = area[i + ahead(area, i) :].ctypes.data
        assert there % lanes.LINE == 0
        assert 0 <= there - area[i:].ctypes.data < lanes.LINE


@compiles
@pytest.mark.parametrize("offset", range(32))
@pytest.mark.parametrize("dtype", COPIES)
def test_stream_from_every_alignment(dtype: str, offset: int) -> None:
    read, item = COPIES[dtype]
    size = np.dtype(item).itemsize
    parts = Parts(read, join, STEP, size * STEP, floats=True)
    src = np.arange(5 * STEP, dtype=item)
    area = np.zeros(10 * STEP, item)
    first = ahead(area, 0) + STEP + offset
    out = area[first : first + src.size]
    compiled(parts, dtype)(src.ctypes.data, out.ctypes.data, 5, 1)
    np.testing.assert_array_equal(out, src)
    assert not area[:first].any()
    assert not area[first + src.size :].any()


# instructions ----------------------------------------------------------------------------------


# {processor: (LLVM's name of it, features of which the kernels choose instructions)}
PROCESSORS = {
    "sse2": ("x86-64", "+sse2"),
    "avx2": ("haswell", "+ssse3,+f16c"),
    "zen5": ("znver5", "+ssse3,+f16c,+avx512bf16"),
    "ice-lake": ("icelake-server", "+ssse3,+f16c"),
    "sapphire-rapids": ("sapphirerapids", "+ssse3,+f16c,+avx512bf16"),
}
# {(type, dtype): {instruction: the feature that has it}}: all dtypes, and what is stored from the
# scratch.
CHOSEN = {
    ("F16", "float32"): {"vcvtph2ps": "f16c"},
    ("F32", "float16"): {"vcvtps2ph": "f16c"},
    ("F32", "bfloat16"): {},
    ("IQ4_NL", "float16"): {"vcvtph2ps": "f16c", "vcvtps2ph": "f16c", "pshufb": "ssse3"},
    ("IQ4_NL", "bfloat16"): {"vcvtne2ps2bf16": "avx512bf16"},
}
# What would emit object code makes it legible.
ASSEMBLE = """
import json, sys
from numaload.formats.qtypes import QuantType
from numaload.kernels import registry
from numaload.kernels.jit import compile as compiler
from numaload.kernels.jit.target import machine
class Printer:
    def emit_object(self, module):
        return machine().emit_assembly(module).encode()
compiler.machine = Printer
for qtype, dtype in json.loads(sys.argv[1]):
    parts = registry._parts(QuantType[qtype], dtype)
    print(json.dumps(compiler.compile_kernel("case", dtype, parts).decode()))
"""


@cache
def assembly(processor: str) -> dict[tuple[str, str], str]:
    """{(type, dtype): instructions} for that processor, by a process that numba takes for one."""
    jobs = list(CHOSEN)
    cpu, features = PROCESSORS[processor]
    done = subprocess.run(
        [sys.executable, "-c", ASSEMBLE, json.dumps(jobs)], stdout=subprocess.PIPE, check=True,
        env=os.environ | {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features}, cwd=ROOT,
    )  # fmt: skip
    return dict(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


@compiles
@on_x86
@pytest.mark.parametrize("processor", PROCESSORS)
def test_stores_pass_the_caches(processor: str) -> None:
    # No result shows it, and a compiler may drop the hint.
    for job in CHOSEN:
        assert "movnt" in assembly(processor)[job], job
        assert "sfence" in assembly(processor)[job], job


@compiles
@on_x86
@pytest.mark.parametrize("processor", PROCESSORS)
def test_uses_what_the_processor_has(processor: str) -> None:
    for job, chosen in CHOSEN.items():
        for instruction, feature in chosen.items():
            has = f"+{feature}" in PROCESSORS[processor][1]
            assert (instruction in assembly(processor)[job]) == has, (job, instruction)


@on_x86
@pytest.mark.parametrize(
    ("asked", "last"),
    [
        (None, "-avx512fp16"),
        ("", "-avx512fp16"),
        ("+avx512fp16,+avx10.1", "+avx10.1"),
        ("-avx512fp16,+avx10.1", "-avx512fp16"),  # which the latter would bring back
    ],
)
def test_native_halves_only_where_they_are_asked_for(
    asked: str | None, last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CPU_FEATURES", raising=False)
    if asked is not None:
        monkeypatch.setenv("NUMBA_CPU_FEATURES", asked)
    assert target.__wrapped__().features.split(",")[-1] == last


# Those whose instructions the kernels choose; the rest is LLVM's choice for either processor.
AGAIN = "(constant_arrays or half or halves or narrow) and not numpy and not native"


@compiles
@on_x86
def test_all_this_without_special_instructions(tmp_path: Path) -> None:
    # x86-64 converts no halves and looks up no bytes: the same functions of other instructions.
    variables = {
        "NUMBA_CPU_NAME": "x86-64",
        "NUMBA_CPU_FEATURES": "",
        "NUMALOAD_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", AGAIN, __file__],
        capture_output=True, text=True, cwd=ROOT, env=os.environ | variables, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
