"""Weights whose scales are in a tensor of their own: these decode the numbers alone.

Safetensors checkpoints keep them so. `loops.py` multiplies by the scales.
"""

from __future__ import annotations

import numpy as np

from numaload.kernels.lanes import (
    Array,
    helper,
    i64,
    interleave,
    load,
    lookup,
    put,
    wide,
    widen_f16,
)

# Upper bytes of the float16 that floats of 4 bits are: sign, two bits of exponent, one of mantissa.
# Their lower bytes are 0. Source: OCP Microscaling Formats (MX) 1.0, 5.3.3.
_POSITIVE = np.array([0, 0x38, 0x3C, 0x3E, 0x40, 0x42, 0x44, 0x46], np.uint8)
E2M1 = np.concatenate([_POSITIVE, _POSITIVE | 0x80])
DOUBLED = np.where(E2M1 & 0x7F, E2M1 + 4, E2M1).astype(np.uint8)


@helper
def nibbles(src: Array, at: int) -> Array:
    """Make 16 bytes of the halves of 8, the lower one first."""
    q = i64(src, at)
    return interleave(q & 0x0F0F0F0F0F0F0F0F, (q >> 4) & 0x0F0F0F0F0F0F0F0F)


# E4M3, 32 bytes -> 32 weights               OCP 8-bit Floating Point (OFP8) 1.0: E4M3
#   byte 0-31   qs     u8     sign, 4 bits of exponent less 7, 3 of mantissa; 0x7F and 0xFF are NaN
def e4m3(src: Array, at: int, w: Array, to: int) -> None:
    for part in range(2):
        byte = wide(load(src, at + 16 * part))
        size = byte & 0x7F
        # A float16 has its exponent less 15: all are 256 times as large, but for the NaN.
        nan = ((size + 1) & 0x80) * 0xF8
        half = (byte & 0x80) << 8 | size << 7 | nan
        put(w, to + 16 * part, widen_f16(half) * np.float32(256))


# E2M1, 16 bytes -> 32 weights               OCP Microscaling Formats (MX) 1.0: E2M1
#   byte 0-15   qs     u4     32 floats, the first of two low
def e2m1(src: Array, at: int, w: Array, to: int) -> None:
    for part in range(2):
        q = nibbles(src, at + 8 * part)
        put(w, to + 16 * part, widen_f16(wide(lookup(E2M1, q)) << 8))


# E2M1_DOUBLED, 16 bytes -> 32 weights       OCP Microscaling Formats (MX) 1.0: E2M1
#   byte 0-15   qs     u4     32 floats, the first of two low
#
# Twice as large, since half of the largest scale, 2^128, is a float32.
def e2m1_doubled(src: Array, at: int, w: Array, to: int) -> None:
    for part in range(2):
        q = nibbles(src, at + 8 * part)
        put(w, to + 16 * part, widen_f16(wide(lookup(DOUBLED, q)) << 8))
