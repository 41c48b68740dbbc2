"""Groups of 8 ternary values from a grid, moved by an eighth: w = scale * (GRID[index] +- 0.125).

A scale is d * (2 * s + 1), s of 3 bits.
"""

from __future__ import annotations

import numpy as np

from numaload.kernels.grids import IQ1
from numaload.kernels.lanes import (
    Array,
    as_f16,
    f16,
    floats,
    i64,
    load,
    pair,
    put,
    signed,
    u8,
    u16,
)

# Of 16 weights, the first 8 and the last 8; row 1 moves the first down, row 2 the last, row 3 both.
SHIFTS = np.repeat(np.array([1, 1, -1, 1, 1, -1, -1, -1], np.float32) / 8, 8)


# IQ1_S, 50 bytes -> 256 weights             ggml-common.h: block_iq1_s
#   byte 0-1    d      f16    scale of the group scales
#   byte 2-33   qs     u8     lower 8 bits of 32 indices
#   byte 34-49  qh     u16    of each 32 weights: 4 x 3 upper bits of indices, 3 bits of scale, and
#                             whether they are moved down
def iq1_s(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(8):
        rest = u16(src, at + 34 + 2 * group)
        scale = d * np.float32(2 * ((rest >> 12) & 7) + 1)
        shift = np.float32(0.125) - np.float32(rest >> 15) * np.float32(0.25)
        for i in range(0, 4, 2):
            low = at + 2 + 4 * group + i
            upper = (rest >> 3 * i) << 8
            first = u8(src, low) | (upper & 0x700)
            second = u8(src, low + 1) | ((upper >> 3) & 0x700)
            weights = (floats(signed(pair(IQ1[first], IQ1[second]))) + shift) * scale
            put(w, to + 32 * group + 8 * i, weights)


# IQ1_M, 56 bytes -> 256 weights             ggml-common.h: block_iq1_m
#   byte 0-31   qs      u8    lower 8 bits of 32 indices
#   byte 32-47  qh      u4    of each 8 weights: 3 upper bits of the index, and whether moved down
#   byte 48-55  scales  u16   4 x 3 bits of group scales, one per 16 weights; the upper 4 bits of
#                             all four make up the block's scale, f16
def iq1_m(src: Array, at: int, w: Array, to: int) -> None:
    scales = i64(src, at + 48)
    d = as_f16(
        ((scales >> 12) & 0x000F)
        | ((scales >> 24) & 0x00F0)
        | ((scales >> 36) & 0x0F00)
        | ((scales >> 48) & 0xF000)
    )
    for group in range(16):
        rest = u8(src, at + 32 + group)
        scale = d * np.float32(2 * ((scales >> (16 * (group // 4) + 3 * (group % 4))) & 7) + 1)
        first = u8(src, at + 2 * group) | (rest & 7) << 8
        second = u8(src, at + 2 * group + 1) | ((rest >> 4) & 7) << 8
        shift = load(SHIFTS, 16 * (((rest >> 3) & 1) | ((rest >> 6) & 2)))
        weights = (floats(signed(pair(IQ1[first], IQ1[second]))) + shift) * scale
        put(w, to + 16 * group, weights)
