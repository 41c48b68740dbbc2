"""Block types of 256 weights in groups, whose scales are quantized too, by one scale per block.

Q2_K, Q4_K, Q5_K: w = (d * scale) * q - (dmin * min).  Q3_K, Q6_K: w = (d * scale) * q.
"""

from __future__ import annotations

from numaload.kernels.lanes import (
    Array,
    f16,
    floats,
    helper,
    i64,
    lane,
    load,
    pair,
    put,
    signed,
    u32,
)


# Q2_K, 84 bytes -> 256 weights              ggml-common.h: block_q2_K
#   byte 0-15     scales  u4     of 16 groups of 16: scale low, min high
#   byte 16-79    qs      u2     256 quants; of each 128 weights 32 bytes, 32 weights per bit pair
#   byte 80-81    d       f16    scale of the group scales
#   byte 82-83    dmin    f16    scale of the group mins
def q2_k(src: Array, at: int, w: Array, to: int) -> None:
    packed = load(src, at)
    scales = floats(packed & 15) * f16(src, at + 80)
    mins = floats(packed >> 4) * f16(src, at + 82)
    for half in range(2):
        for part in range(2):
            q = load(src, at + 16 + 32 * half + 16 * part)
            for bits in range(4):
                group = 8 * half + 2 * bits + part
                weights = floats((q >> 2 * bits) & 3) * lane(scales, group) - lane(mins, group)
                put(w, to + 16 * group, weights)


@helper
def six_bit_scales(src: Array, at: int) -> Array:
    """Unpack the scales of Q3_K: 16 of 6 bits in 12 bytes, 32 too large.

    The low four bits: nibbles of bytes 0-7. The upper two: the bit pairs of bytes 8-11, four groups
    for each pair.
    """
    low, upper = i64(src, at), u32(src, at + 8)
    upper_0 = (upper & 0x03030303) | ((upper >> 2) & 0x03030303) << 32
    upper_8 = ((upper >> 4) & 0x03030303) | ((upper >> 6) & 0x03030303) << 32
    scales_0 = (low & 0x0F0F0F0F0F0F0F0F) | upper_0 << 4
    scales_8 = ((low >> 4) & 0x0F0F0F0F0F0F0F0F) | upper_8 << 4
    return signed(pair(scales_0, scales_8) - 32)


# Q3_K, 110 bytes -> 256 weights             ggml-common.h: block_q3_K
#   byte 0-31     hmask   u1     bit 2 of the quants; 32 weights per bit
#   byte 32-95    qs      u2     256 quants, 4 too large; of each 128 weights 32 bytes, 32 per pair
#   byte 96-107   scales  u6     of 16 groups of 16
#   byte 108-109  d       f16    scale of the group scales
def q3_k(src: Array, at: int, w: Array, to: int) -> None:
    scales = floats(six_bit_scales(src, at + 96)) * f16(src, at + 108)
    for half in range(2):
        for part in range(2):
            q = load(src, at + 32 + 32 * half + 16 * part)
            upper = load(src, at + 16 * part) >> 4 * half
            for bits in range(4):
                group = 8 * half + 2 * bits + part
                quants = ((q >> 2 * bits) & 3) | ((upper >> bits) & 1) << 2
                put(w, to + 16 * group, floats(signed(quants - 4)) * lane(scales, group))


@helper
def scales_and_mins(src: Array, at: int) -> Array:
    """Unpack Q4_K and Q5_K: 8 scales, then 8 mins, of 6 bits in 12 bytes.

    Groups 0-3: the low 6 bits of bytes 0-3 and 4-7. Groups 4-7: a nibble each of bytes 8-11, under
    the two spare bits of bytes 0-3 and 4-7.
    """
    low, upper = i64(src, at), u32(src, at + 8)
    scales = (low & 0x3F3F3F3F) | ((upper & 0x0F0F0F0F) | ((low >> 2) & 0x30303030)) << 32
    mins = ((low >> 32) & 0x3F3F3F3F) | (
        ((upper >> 4) & 0x0F0F0F0F) | ((low >> 34) & 0x30303030)
    ) << 32
    return pair(scales, mins)


# Q4_K, 144 bytes -> 256 weights             ggml-common.h: block_q4_K
#   byte 0-1      d       f16    scale of the group scales
#   byte 2-3      dmin    f16    scale of the group mins
#   byte 4-15     scales  u6     8 scales and 8 mins, one of each per 32 weights
#   byte 16-143   qs      u4     256 quants; 32 bytes hold a group low, the next group high
def q4_k(src: Array, at: int, w: Array, to: int) -> None:
    packed = floats(scales_and_mins(src, at + 4))
    scales, mins = packed * f16(src, at), packed * f16(src, at + 2)
    for group in range(0, 8, 2):
        for part in range(2):
            q = load(src, at + 16 + 16 * group + 16 * part)
            low = floats(q & 15) * lane(scales, group) - lane(mins, 8 + group)
            high = floats(q >> 4) * lane(scales, group + 1) - lane(mins, 9 + group)
            put(w, to + 32 * group + 16 * part, low)
            put(w, to + 32 * group + 16 * part + 32, high)


# Q5_K, 176 bytes -> 256 weights             ggml-common.h: block_q5_K
#   byte 0-1      d       f16    scale of the group scales
#   byte 2-3      dmin    f16    scale of the group mins
#   byte 4-15     scales  u6     8 scales and 8 mins, one of each per 32 weights
#   byte 16-47    qh      u1     bit 4 of the quants; a bit for each group
#   byte 48-175   qs      u4     256 quants; 32 bytes hold a group low, the next group high
def q5_k(src: Array, at: int, w: Array, to: int) -> None:
    packed = floats(scales_and_mins(src, at + 4))
    scales, mins = packed * f16(src, at), packed * f16(src, at + 2)
    for group in range(0, 8, 2):
        for part in range(2):
            upper = load(src, at + 16 + 16 * part) >> group
            q = load(src, at + 48 + 16 * group + 16 * part)
            low = floats((q & 15) | (upper & 1) << 4)
            high = floats((q >> 4) | (upper & 2) << 3)
            to_low = to + 32 * group + 16 * part
            put(w, to_low, low * lane(scales, group) - lane(mins, 8 + group))
            put(w, to_low + 32, high * lane(scales, group + 1) - lane(mins, 9 + group))


# Q6_K, 210 bytes -> 256 weights             ggml-common.h: block_q6_K
#   byte 0-127    ql      u4     low nibbles; of each 128 weights 64 bytes, 0-63 low, 64-127 high
#   byte 128-191  qh      u2     upper bits; of each 128 weights 32 bytes, 32 weights per bit pair
#   byte 192-207  scales  i8     one per 16 weights
#   byte 208-209  d       f16    scale of the group scales
def q6_k(src: Array, at: int, w: Array, to: int) -> None:
    scales = floats(signed(load(src, at + 192))) * f16(src, at + 208)
    for half in range(2):
        for part in range(2):
            first = load(src, at + 64 * half + 16 * part)
            second = load(src, at + 64 * half + 16 * part + 32)
            upper = load(src, at + 128 + 32 * half + 16 * part)
            q0 = (first & 15) | (upper & 0x03) << 4
            q1 = (second & 15) | (upper & 0x0C) << 2
            q2 = (first >> 4) | (upper & 0x30)
            q3 = (second >> 4) | (upper & 0xC0) >> 2
            group = 8 * half + part
            put(w, to + 16 * group, floats(signed(q0 - 32)) * lane(scales, group))
            put(w, to + 16 * group + 32, floats(signed(q1 - 32)) * lane(scales, group + 2))
            put(w, to + 16 * group + 64, floats(signed(q2 - 32)) * lane(scales, group + 4))
            put(w, to + 16 * group + 96, floats(signed(q3 - 32)) * lane(scales, group + 6))
