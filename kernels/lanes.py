"""The vocabulary that kernels are written in: 16 values at a time.

Every function here means the same twice. Called from Python it is numpy on arrays of 16 values:
that is how kernels run without JIT, and how to try one in a debugger. Compiled, `jit/lowering.py`
turns each into LLVM vector instructions, which the processor's own width then carries out: one
AVX-512 register, two of AVX2, four of SSE2 or NEON.

Lanes are uint8, int8, uint16 or float32, and have the operators ``& | ^ << >> + - *`` with lanes of
their own kind, or with a number, which takes their type and must fit it; results wrap. Numbers are
int (64 bits, signed) and float32. ``src`` and ``dst`` are flat arrays here, pointers when compiled:
no bounds are checked. Little-endian, as GGUF is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

LANES = 16
CHUNK = 256  # weights that are decoded before they are stored: a block or some, 1 KiB
LINE = 64  # bytes of a cache line

Function = TypeVar("Function", bound=Callable[..., Any])
Array = NDArray[Any]
HELPERS: list[Callable[..., Any]] = []


def helper(function: Function) -> Function:
    """Mark a function that kernels call, besides those below."""
    HELPERS.append(function)
    return function


# numbers ---------------------------------------------------------------------------------------


def u8(src: Array, at: int) -> int:
    """Read the byte at ``at``."""
    return int(src[at])


def u16(src: Array, at: int) -> int:
    """Read the two bytes at ``at``, which may be odd."""
    return int.from_bytes(src[at : at + 2].tobytes(), "little")


def u32(src: Array, at: int) -> int:
    """Read the four bytes at ``at``."""
    return int.from_bytes(src[at : at + 4].tobytes(), "little")


def i64(src: Array, at: int) -> int:
    """Read the eight bytes at ``at``, signed: users cut off what is above their width."""
    return int.from_bytes(src[at : at + 8].tobytes(), "little", signed=True)


# lanes from memory and to memory ---------------------------------------------------------------


def load(src: Array, at: int) -> Array:
    """Read 16 items of ``src``, the first is number ``at``; bytes may be at any address."""
    return src[at : at + LANES]


def load_u16(src: Array, at: int) -> Array:
    """Read 16 uint16 that begin at byte ``at``."""
    return src[at : at + 2 * LANES].view(np.uint16)


def load_f32(src: Array, at: int) -> Array:
    """Read 16 float32 that begin at byte ``at``."""
    return src[at : at + 4 * LANES].view(np.float32)


def join(low: Array, high: Array) -> Array:
    """Join two times 16 lanes, to be stored together."""
    return np.concatenate([low, high])


def put(dst: Array, at: int, lanes: Array) -> None:
    """Store 16 or 32 items, the first as number ``at``."""
    dst[at : at + len(lanes)] = lanes


def stream(dst: Array, at: int, lanes: Array) -> None:
    """Store past the caches what nobody reads soon; a cache line begins at ``at``."""
    put(dst, at, lanes)


def fence() -> None:
    """Have what was streamed in memory before what follows."""


def ahead(dst: Array, at: int) -> int:
    """Count the items from number ``at`` of ``dst`` to the next cache line."""
    return (-dst[at:].ctypes.data % LINE) // dst.itemsize


def scratch() -> Array:
    """Take room for CHUNK float32 from the stack, for one call."""
    return np.zeros(CHUNK, np.float32)


# lanes from numbers ----------------------------------------------------------------------------


def pair(low: int, high: int) -> Array:
    """Make 16 bytes from the 8 of ``low`` and the 8 of ``high``."""
    mask = (1 << 64) - 1
    return np.array([int(low) & mask, int(high) & mask], np.uint64).view(np.uint8)


def interleave(low: int, high: int) -> Array:
    """Make 16 bytes of the 8 of ``low`` and the 8 of ``high``, of each in turn."""
    return pair(low, high).reshape(2, LANES // 2).T.reshape(-1)


def quad(a: int, b: int, c: int, d: int) -> Array:
    """Make 16 bytes from four times the low 4."""
    mask = (1 << 32) - 1
    return np.array([int(n) & mask for n in (a, b, c, d)], np.uint32).view(np.uint8)


def spread(bits: int) -> Array:
    """Make 16 bytes, 0xFF where bit i of ``bits`` is set, else 0; higher bits do not count."""
    return np.where(bits >> np.arange(LANES) & 1, 0xFF, 0).astype(np.uint8)


def pairs_of_bits(bits: int) -> Array:
    """Make 16 bytes: bits 0-1 of ``bits``, bits 2-3, and so on."""
    return (bits >> np.arange(0, 2 * LANES, 2) & 3).astype(np.uint8)


def plus_or_minus(bits: int, value: Array) -> Array:
    """Make 16 float32: ``value`` where bit i is set, ``-value`` where not."""
    return np.where(bits >> np.arange(LANES) & 1, value, -value)


def f16(src: Array, at: int) -> Array:
    """Read the float16 at byte ``at``, as 16 float32. A NaN becomes quiet, as in ggml."""
    return as_f16(u16(src, at))


def as_f16(bits: int) -> Array:
    """Make 16 float32 of the float16 that has these bits. A NaN becomes quiet, as in ggml."""
    return widen_f16(np.full(LANES, bits & 0xFFFF, np.uint16))


# lanes to lanes --------------------------------------------------------------------------------


def signed(lanes: Array) -> Array:
    """Take the same bits of uint8 as int8."""
    return lanes.view(np.int8)


def wide(lanes: Array) -> Array:
    """Widen uint8 to uint16."""
    return lanes.astype(np.uint16)


def floats(lanes: Array) -> Array:
    """Convert integers of 8 or 16 bits to float32."""
    return lanes.astype(np.float32)


def lookup(table: Array, lanes: Array) -> Array:
    """Look up ``table[lanes]`` of 16 items of 8 bits; lanes are 0 to 15."""
    return table[lanes]


def lane(lanes: Array, i: int) -> Any:
    """Take one of 16 float32, as a number."""
    return lanes[i]


# halves ----------------------------------------------------------------------------------------


def widen_f16(lanes: Array) -> Array:
    """Convert float16 bits (uint16) to float32; a NaN becomes quiet."""
    wide_bits = lanes.view(np.float16).astype(np.float32).view(np.uint32)
    nan = (lanes & 0x7FFF) > 0x7C00
    return np.where(nan, wide_bits | np.uint32(0x00400000), wide_bits).view(np.float32)


def widen_bf16(lanes: Array) -> Array:
    """Convert bfloat16 bits (uint16) to float32: they are its upper halves."""
    return (lanes.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_f16(lanes: Array) -> Array:
    """Convert float32 to float16 bits (uint16), to nearest even, overflow to infinity.

    A NaN becomes quiet and keeps its sign and upper payload bits, as conversion instructions do it.
    """
    bits = lanes.view(np.uint32)
    with np.errstate(all="ignore"):
        half = lanes.astype(np.float16).view(np.uint16)
    nan = (bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x01FF).astype(np.uint16)
    return np.where(np.isnan(lanes), nan, half)


def narrow_bf16(lanes: Array) -> Array:
    """Convert float32 to bfloat16 bits (uint16), to nearest even, overflow to infinity.

    A NaN becomes quiet and keeps its sign and upper payload bits, as in ggml.
    """
    bits = lanes.view(np.uint32)
    half = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    nan = bits >> 16 | 0x0040
    return np.where(np.isnan(lanes), nan, half).astype(np.uint16)


def narrow_normal_bf16(low: Array, high: Array) -> Array:
    """Convert 32 float32 as ``narrow_bf16`` does; none may be subnormal: processors flush those."""
    return join(narrow_bf16(low), narrow_bf16(high))
