"""Half-width floats, 16 bits per weight: F16 and BF16 to float32, and float32 back to both.

All of it is integer arithmetic on the bits. Conversion instructions would make a NaN quiet and
are missing on some machines; this way every machine gives the same bits, and loops vectorize.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

BYTES = types.Array(types.uint8, 2, "C", readonly=True)  # readonly accepts writable arrays too
VALUES = types.Array(types.float32, 1, "C", readonly=True)
WIDEN = types.void(BYTES, types.float32[:, ::1], types.intp, types.intp)
NARROW = types.void(VALUES, types.uint16[::1], types.intp, types.intp)


@njit(nogil=True, cache=True, fastmath=False)
def _widen_float16(half: np.uint32) -> np.uint32:
    # A subnormal is mantissa * 2**-24, which is the spacing of float32 in [0.5, 1): put the
    # mantissa there and take the 0.5 off. No operand is subnormal in float32, so a thread that
    # flushes subnormals to zero gets the same value.
    mag = np.uint32(half & np.uint32(0x7FFF))
    bits = np.uint32((mag << np.uint32(13)) + np.uint32(0x38000000))
    if mag >= np.uint32(0x7C00):
        bits = np.uint32(bits + np.uint32(0x38000000))
    if mag < np.uint32(0x0400):
        small = np.uint32(mag | np.uint32(0x3F000000)).view(np.float32) - np.float32(0.5)
        bits = np.float32(small).view(np.uint32)
    return np.uint32(bits | (half & np.uint32(0x8000)) << np.uint32(16))


@njit(nogil=True, cache=True, fastmath=False)
def _narrow_float16(bits: np.uint32) -> np.uint16:
    mag = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = (mag >> np.uint32(13)) & np.uint32(1)
    # Rounding may carry into the exponent, and from the largest float16 into infinity. The
    # difference wraps where the next branch replaces it.
    half = np.uint32(((mag + np.uint32(0x0FFF) + odd) >> np.uint32(13)) - np.uint32(0x1C000))
    if mag < np.uint32(0x38800000):  # subnormal in float16: the addition rounds at 2**-24
        small = mag.view(np.float32) + np.float32(0.5)
        half = np.uint32(np.float32(small).view(np.uint32) - np.uint32(0x3F000000))
    if mag >= np.uint32(0x47800000):
        half = np.uint32(0x7C00)
    if mag > np.uint32(0x7F800000):
        # NaN: sign and upper ten payload bits stay, signaling stays signaling; a payload that
        # is all in the lower bits becomes 1, else it would read as infinity.
        payload = np.uint32((mag >> np.uint32(13)) & np.uint32(0x03FF))
        half = np.uint32(np.uint32(0x7C00) | max(payload, np.uint32(1)))
    return np.uint16(half | (bits >> np.uint32(16)) & np.uint32(0x8000))


@njit(nogil=True, cache=True, fastmath=False)
def _narrow_bfloat16(bits: np.uint32) -> np.uint16:
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    # Clearing the sign keeps the carry inside 32 bits.
    mag = np.uint32(bits & np.uint32(0x7FFFFFFF))
    upper = np.uint32((mag + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    if mag > np.uint32(0x7F800000):
        upper = np.uint32(0x7FC0)  # NaN: the sign stays, the payload goes
    return np.uint16(upper | (bits >> np.uint32(16)) & np.uint32(0x8000))


# F16, 2 bytes -> 1 weight                   ggml.h: ggml_fp16_t
#   byte 0-1    f16    the weight, low byte first
@njit([WIDEN], nogil=True, cache=True, fastmath=False)
def dequantize_f16(src: NDArray[np.uint8], out: NDArray[np.float32], start: int, stop: int) -> None:
    """Blocks [start, stop) of src (n_blocks, 2) into out (n_blocks, 1); a NaN keeps its payload."""
    # With one axis the distance between weights is a constant, and an index that starts at 0
    # needs no test for negative: without both the loop stays scalar.
    halves = src.reshape(-1)[2 * start : 2 * stop]
    bits = out.reshape(-1).view(np.uint32)[start:stop]
    for i in range(bits.size):
        half = np.uint32(halves[2 * i]) | np.uint32(halves[2 * i + 1]) << np.uint32(8)
        bits[i] = _widen_float16(np.uint32(half))


# BF16, 2 bytes -> 1 weight                  ggml.h: ggml_bf16_t
#   byte 0-1    bf16   the weight: the upper half of a float32, low byte first
@njit([WIDEN], nogil=True, cache=True, fastmath=False)
def dequantize_bf16(
    src: NDArray[np.uint8], out: NDArray[np.float32], start: int, stop: int
) -> None:
    """Blocks [start, stop) of src (n_blocks, 2) into out (n_blocks, 1); a NaN keeps its payload."""
    halves = src.reshape(-1)[2 * start : 2 * stop]
    bits = out.reshape(-1).view(np.uint32)[start:stop]
    for i in range(bits.size):
        half = np.uint32(halves[2 * i]) | np.uint32(halves[2 * i + 1]) << np.uint32(8)
        bits[i] = np.uint32(half << np.uint32(16))


@njit([NARROW], nogil=True, cache=True, fastmath=False)
def narrow_float16(
    src: NDArray[np.float32], out: NDArray[np.uint16], start: int, stop: int
) -> None:
    """Values [start, stop) of src to float16 bits: to nearest even, overflow to infinity."""
    bits = src.view(np.uint32)[start:stop]
    halves = out[start:stop]
    for i in range(halves.size):
        halves[i] = _narrow_float16(bits[i])


@njit([NARROW], nogil=True, cache=True, fastmath=False)
def narrow_bfloat16(
    src: NDArray[np.float32], out: NDArray[np.uint16], start: int, stop: int
) -> None:
    """Values [start, stop) of src to bfloat16 bits: to nearest even, overflow to infinity."""
    bits = src.view(np.uint32)[start:stop]
    halves = out[start:stop]
    for i in range(halves.size):
        halves[i] = _narrow_bfloat16(bits[i])
