"""Four bits that choose one of 16 values: w = scale * VALUES[q].

IQ4_NL, IQ4_XS: values fitted to weights.  MXFP4, NVFP4: floats of 4 bits (E2M1), doubled.
"""

from __future__ import annotations

import numpy as np

from numaload.kernels.lanes import Array, f16, floats, i64, load, lookup, pair, put, u8, u16, u32

# ggml-common.h: kvalues_iq4nl
NONLINEAR = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8
)
# Sign, two bits of exponent, one of mantissa. ggml-common.h: kvalues_mxfp4
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)

# Half of 2**(byte - 127); the first two are subnormal. ggml-impl.h: ggml_e8m0_to_fp32_half
E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _ue4m3() -> Array:
    """Return half of each float with 4 bits of exponent and 3 of mantissa.

    Bit 7 does not count, and 0x7F is 0.

    Source: ggml-impl.h ggml_ue4m3_to_fp32.
    """
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    significand = np.where(exponent == 0, mantissa, 8 + mantissa) / 16
    values = np.ldexp(significand, np.maximum(exponent, 1) - 7)
    return np.where(byte == 0x7F, 0, values).astype(np.float32)


UE4M3 = _ue4m3()


# IQ4_NL, 18 bytes -> 32 weights             ggml-common.h: block_iq4_nl
#   byte 0-1    d      f16    scale
#   byte 2-17   qs     u4     32 quants; weights 0-15 low, 16-31 high
def iq4_nl(src: Array, at: int, w: Array, to: int) -> None:
    d, q = f16(src, at), load(src, at + 2)
    put(w, to, floats(lookup(NONLINEAR, q & 15)) * d)
    put(w, to + 16, floats(lookup(NONLINEAR, q >> 4)) * d)


# IQ4_XS, 136 bytes -> 256 weights           ggml-common.h: block_iq4_xs
#   byte 0-1    d         f16    scale of the group scales
#   byte 2-3    scales_h  u2     upper bits of 8 scales, 32 too large
#   byte 4-7    scales_l  u4     lower bits
#   byte 8-135  qs        u4     256 quants; of each 32 weights 0-15 low, 16-31 high
def iq4_xs(src: Array, at: int, w: Array, to: int) -> None:
    d, upper, lower = f16(src, at), u16(src, at + 2), u32(src, at + 4)
    for group in range(8):
        scale = ((lower >> 4 * group) & 15) | ((upper >> 2 * group) & 3) << 4
        q, dl = load(src, at + 8 + 16 * group), d * np.float32(scale - 32)
        put(w, to + 32 * group, floats(lookup(NONLINEAR, q & 15)) * dl)
        put(w, to + 32 * group + 16, floats(lookup(NONLINEAR, q >> 4)) * dl)


# MXFP4, 17 bytes -> 32 weights              ggml-common.h: block_mxfp4
#   byte 0-0    e      u8     exponent of the scale
#   byte 1-16   qs     u4     32 quants; weights 0-15 low, 16-31 high
def mxfp4(src: Array, at: int, w: Array, to: int) -> None:
    d, q = E8M0[u8(src, at)], load(src, at + 1)
    put(w, to, floats(lookup(E2M1, q & 15)) * d)
    put(w, to + 16, floats(lookup(E2M1, q >> 4)) * d)


# NVFP4, 36 bytes -> 64 weights              ggml-common.h: block_nvfp4
#   byte 0-3    d      u8     scales of 16 weights each, as UE4M3
#   byte 4-35   qs     u4     64 quants; of each 16 weights 0-7 low, 8-15 high
def nvfp4(src: Array, at: int, w: Array, to: int) -> None:
    for group in range(4):
        q = i64(src, at + 4 + 8 * group)
        nibbles = pair(q & 0x0F0F0F0F0F0F0F0F, (q >> 4) & 0x0F0F0F0F0F0F0F0F)
        put(w, to + 16 * group, floats(lookup(E2M1, nibbles)) * UE4M3[u8(src, at + group)])
