"""Groups of values from a grid, moved by an eighth (IQ1) or with signs of their own (IQ2, IQ3).

IQ1_S, IQ1_M: 8 ternary values for an index, w = scale * (GRID[index] +- 0.125).
IQ2_XXS, IQ2_XS, IQ2_S: 8 magnitudes for an index, IQ3_XXS, IQ3_S: 4, w = scale * (+-) GRID[index].
A scale is d * (2 * s + 1) (IQ1, s of 3 bits), d * (0.5 + s) / 4 (IQ2), d * (0.5 + s) / 2 (IQ3_XXS)
or d * (1 + 2 * s) (IQ3_S).
"""

from __future__ import annotations

import numpy as np

from numaload.kernels.grids import IQ1, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS
from numaload.kernels.lanes import (
    Array,
    as_f16,
    f16,
    floats,
    helper,
    i64,
    load,
    pair,
    put,
    quad,
    signed,
    spread,
    u8,
    u16,
    u32,
)

# Of 16 weights, the first 8 and the last 8; row 1 moves the first down, row 2 the last, row 3 both.
SHIFTS = np.repeat(np.array([1, 1, -1, 1, 1, -1, -1, -1], np.float32) / 8, 8)
# Signs of 8 weights in 7 bits: the number of minuses is even. ggml-common.h: ksigns_iq2xs
EVEN_SIGNS = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)


@helper
def even_signs(packed: int) -> int:
    """Return the signs of 16 weights from 2 times 7 bits."""
    return u8(EVEN_SIGNS, packed & 127) | u8(EVEN_SIGNS, (packed >> 7) & 127) << 8


@helper
def with_signs(magnitudes: Array, signs: int) -> Array:
    """Return 16 weights as float32 from bytes, minus where a bit of ``signs`` is set."""
    minus = spread(signs)
    return floats(signed((magnitudes ^ minus) - minus))


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


# IQ2_XXS, 66 bytes -> 256 weights           ggml-common.h: block_iq2_xxs
#   byte 0-1    d      f16    scale of the group scales
#   byte 2-65   qs     u32    of each 32 weights: 4 indices of 8 bits; then 4 x 7 bits of signs and,
#                             in the upper 4 bits, the scale
def iq2_xxs(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(8):
        qs = at + 2 + 8 * group
        rest = u32(src, qs + 4)
        scale = d * (np.float32(0.5) + np.float32(rest >> 28)) * np.float32(0.25)
        for i in range(0, 4, 2):
            grid = pair(IQ2_XXS[u8(src, qs + i)], IQ2_XXS[u8(src, qs + i + 1)])
            put(w, to + 32 * group + 8 * i, with_signs(grid, even_signs(rest >> 7 * i)) * scale)


# IQ2_XS, 74 bytes -> 256 weights            ggml-common.h: block_iq2_xs
#   byte 0-1    d       f16   scale of the group scales
#   byte 2-65   qs      u16   of each 8 weights: 9 bits of index, 7 bits of signs
#   byte 66-73  scales  u4    one per 16 weights, low first
def iq2_xs(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(16):
        first, second = u16(src, at + 2 + 4 * group), u16(src, at + 4 + 4 * group)
        nibble = (u8(src, at + 66 + group // 2) >> 4 * (group % 2)) & 15
        scale = d * (np.float32(0.5) + np.float32(nibble)) * np.float32(0.25)
        grid = pair(IQ2_XS[first & 511], IQ2_XS[second & 511])
        signs = even_signs((first >> 9) | (second >> 9) << 7)
        put(w, to + 16 * group, with_signs(grid, signs) * scale)


# IQ2_S, 82 bytes -> 256 weights             ggml-common.h: block_iq2_s
#   byte 0-1    d       f16   scale of the group scales
#   byte 2-33   qs      u8    lower 8 bits of 32 indices
#   byte 34-65  signs   u1    one per weight
#   byte 66-73  qh      u2    upper bits of 32 indices
#   byte 74-81  scales  u4    one per 16 weights, low first
def iq2_s(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(16):
        low = at + 2 + 2 * group
        upper = (u8(src, at + 66 + group // 2) >> 4 * (group % 2)) << 8
        nibble = (u8(src, at + 74 + group // 2) >> 4 * (group % 2)) & 15
        scale = d * (np.float32(0.5) + np.float32(nibble)) * np.float32(0.25)
        first = u8(src, low) | (upper & 0x300)
        second = u8(src, low + 1) | ((upper >> 2) & 0x300)
        grid = pair(IQ2_S[first], IQ2_S[second])
        put(w, to + 16 * group, with_signs(grid, u16(src, low + 32)) * scale)


# IQ3_XXS, 98 bytes -> 256 weights           ggml-common.h: block_iq3_xxs
#   byte 0-1    d      f16    scale of the group scales
#   byte 2-65   qs     u8     64 indices
#   byte 66-97  rest   u32    of each 32 weights: 4 x 7 bits of signs; in the upper 4 bits the scale
def iq3_xxs(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(8):
        rest = u32(src, at + 66 + 4 * group)
        scale = d * (np.float32(0.5) + np.float32(rest >> 28)) * np.float32(0.5)
        for i in range(2):
            qs = at + 2 + 8 * group + 4 * i
            grid = quad(
                IQ3_XXS[u8(src, qs)], IQ3_XXS[u8(src, qs + 1)],
                IQ3_XXS[u8(src, qs + 2)], IQ3_XXS[u8(src, qs + 3)],
            )  # fmt: skip
            put(w, to + 32 * group + 16 * i, with_signs(grid, even_signs(rest >> 14 * i)) * scale)


# IQ3_S, 110 bytes -> 256 weights            ggml-common.h: block_iq3_s
#   byte 0-1      d       f16   scale of the group scales
#   byte 2-65     qs      u8    lower 8 bits of 64 indices
#   byte 66-73    qh      u1    upper bit of 64 indices
#   byte 74-105   signs   u1    one per weight
#   byte 106-109  scales  u4    one per 32 weights, low first
def iq3_s(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    for group in range(8):
        nibble = (u8(src, at + 106 + group // 2) >> 4 * (group % 2)) & 15
        scale = d * np.float32(1 + 2 * nibble)
        upper = u8(src, at + 66 + group) << 8
        for i in range(2):
            qs = at + 2 + 8 * group + 4 * i
            grid = quad(
                IQ3_S[u8(src, qs) | ((upper >> 4 * i) & 0x100)],
                IQ3_S[u8(src, qs + 1) | ((upper >> 4 * i + 1) & 0x100)],
                IQ3_S[u8(src, qs + 2) | ((upper >> 4 * i + 2) & 0x100)],
                IQ3_S[u8(src, qs + 3) | ((upper >> 4 * i + 3) & 0x100)],
            )
            signs = u16(src, at + 74 + 4 * group + 2 * i)
            put(w, to + 32 * group + 16 * i, with_signs(grid, signs) * scale)
