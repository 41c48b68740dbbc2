"""Weights of few values without a table: w = d * q, q of 1, 1.6 or 2 bits.

Q1_0: q is -1 or 1.  TQ1_0, TQ2_0: q is -1, 0 or 1.  Q2_0: q is -1 to 2.
"""

from __future__ import annotations

import numpy as np

from numaload.kernels.lanes import (
    Array,
    f16,
    floats,
    load,
    pair,
    pairs_of_bits,
    plus_or_minus,
    put,
    signed,
    u16,
    u32,
    wide,
)

POWERS_OF_3 = np.repeat(np.array([1, 3, 9, 27], np.uint16), 4)


# Q1_0, 18 bytes -> 128 weights              ggml-common.h: block_q1_0
#   byte 0-1    d      f16    scale
#   byte 2-17   qs     u1     128 signs, 1 is plus
def q1_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(8):
        put(w, to + 16 * group, plus_or_minus(u16(src, at + 2 + 2 * group), d))


# Q2_0, 18 bytes -> 64 weights               ggml-common.h: block_q2_0
#   byte 0-1    d      f16    scale
#   byte 2-17   qs     u2     64 quants, 1 too large
def q2_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(4):
        quants = pairs_of_bits(u32(src, at + 2 + 4 * group))
        put(w, to + 16 * group, floats(signed(quants - 1)) * d)


# TQ1_0, 54 bytes -> 256 weights             ggml-common.h: block_tq1_0
#   byte 0-31   qs     5 trits of weights 0-159: the first trits of all bytes, the second ...
#   byte 32-47  qs     5 trits of weights 160-239
#   byte 48-51  qh     4 trits of weights 240-255
#   byte 52-53  d      f16    scale
#
# A byte is a fraction of 256. Three times that: what is above 255 is a trit, 1 too large; the rest
# is the fraction that holds the other trits.
def tq1_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at + 52)
    for part in range(3):
        step = 16 if part == 2 else 32
        rest = wide(load(src, at + 16 * part))
        first = to + 16 * part + (128 if part == 2 else 0)
        for trit in range(5):
            three = rest * 3
            put(w, first + step * trit, (floats(three >> 8) - np.float32(1)) * d)
            rest = three & 255
    last = u32(src, at + 48)
    rest = (wide(pair(last | last << 32, last | last << 32)) * load(POWERS_OF_3, 0)) & 255
    put(w, to + 240, (floats((rest * 3) >> 8) - np.float32(1)) * d)


# TQ2_0, 66 bytes -> 256 weights             ggml-common.h: block_tq2_0
#   byte 0-63   qs     u2     256 quants, 1 too large; of each 128 weights 32 bytes, 32 per bit pair
#   byte 64-65  d      f16    scale
def tq2_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at + 64)
    for half in range(2):
        for part in range(2):
            q = load(src, at + 32 * half + 16 * part)
            for bits in range(4):
                weights = floats(signed(((q >> 2 * bits) & 3) - 1)) * d
                put(w, to + 128 * half + 32 * bits + 16 * part, weights)
