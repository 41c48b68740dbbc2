"""Block types of 256 weights whose group scales are quantized too, by one scale per block.

Q4_K: w = (d * scale) * q - (dmin * min), 4.5 bits per weight.
Q6_K: w = (d * scale) * q, 6.5625 bits per weight.
"""

from __future__ import annotations

import numpy as np
from numba import njit, types
from numpy.typing import NDArray

BYTES = types.Array(types.uint8, 2, "C", readonly=True)  # readonly accepts writable arrays too
BLOCKS = types.void(BYTES, types.float32[:, ::1], types.intp, types.intp)


@njit(nogil=True, cache=True, fastmath=False)
def _scale(low: np.uint8, high: np.uint8) -> np.float32:
    # f16 to float32 by bits, as floats.py explains; a file calls no kernel of another file,
    # because the compiled code on disk would not notice when the other one changes.
    mag = np.uint32(low) | (np.uint32(high) & np.uint32(0x7F)) << np.uint32(8)
    bits = np.uint32((mag << np.uint32(13)) + np.uint32(0x38000000))
    if mag >= np.uint32(0x7C00):
        bits = np.uint32(bits + np.uint32(0x38000000))
    if mag < np.uint32(0x0400):
        small = np.uint32(mag | np.uint32(0x3F000000)).view(np.float32) - np.float32(0.5)
        bits = np.float32(small).view(np.uint32)
    sign = (np.uint32(high) & np.uint32(0x80)) << np.uint32(24)
    return np.uint32(bits | sign).view(np.float32)


@njit(nogil=True, cache=True, fastmath=False)
def _scale_and_min(scales: NDArray[np.uint8], group: int) -> tuple[np.float32, np.float32]:
    # 8 scales and 8 mins of 6 bits in 12 bytes. Groups 0-3: the low 6 bits of bytes 0-3 and 4-7.
    # Groups 4-7: a nibble each of bytes 8-11, under the two spare bits of bytes 0-3 and 4-7.
    if group < 4:
        scale = scales[group] & np.uint8(0x3F)
        least = scales[group + 4] & np.uint8(0x3F)
    else:
        nibbles = scales[group + 4]
        scale = (nibbles & np.uint8(0x0F)) | (scales[group - 4] & np.uint8(0xC0)) >> np.uint8(2)
        least = (nibbles >> np.uint8(4)) | (scales[group] & np.uint8(0xC0)) >> np.uint8(2)
    return np.float32(scale), np.float32(least)


# Q4_K, 144 bytes -> 256 weights             ggml-common.h: block_q4_K
#   byte 0-1      d       f16    scale of the group scales
#   byte 2-3      dmin    f16    scale of the group mins
#   byte 4-15     scales  u6     8 scales and 8 mins, one of each per 32 weights
#   byte 16-143   qs      u4     256 quants; 32 bytes hold a group low, the next group high
@njit([BLOCKS], nogil=True, cache=True, fastmath=False)
def dequantize_q4_k(
    src: NDArray[np.uint8], out: NDArray[np.float32], start: int, stop: int
) -> None:
    """Blocks [start, stop) of src (n_blocks, 144) into out (n_blocks, 256)."""
    for block in range(start, stop):
        d = _scale(src[block, 0], src[block, 1])
        dmin = _scale(src[block, 2], src[block, 3])
        scales = src[block, 4:16]
        qs = src[block, 16:]
        weights = out[block]
        for pair in range(4):
            scale, least = _scale_and_min(scales, 2 * pair)
            d_low, min_low = d * scale, dmin * least
            scale, least = _scale_and_min(scales, 2 * pair + 1)
            d_high, min_high = d * scale, dmin * least
            for i in range(32):
                q = qs[32 * pair + i]
                weights[64 * pair + i] = d_low * np.float32(q & np.uint8(0x0F)) - min_low
                weights[64 * pair + 32 + i] = d_high * np.float32(q >> np.uint8(4)) - min_high


# Q6_K, 210 bytes -> 256 weights             ggml-common.h: block_q6_K
#   byte 0-127    ql      u4     low nibbles; of each 128 weights 64 bytes, 0-63 low, 64-127 high
#   byte 128-191  qh      u2     upper bits; of each 128 weights 32 bytes, 32 weights per bit pair
#   byte 192-207  scales  i8     one per 16 weights
#   byte 208-209  d       f16    scale of the group scales
@njit([BLOCKS], nogil=True, cache=True, fastmath=False)
def dequantize_q6_k(
    src: NDArray[np.uint8], out: NDArray[np.float32], start: int, stop: int
) -> None:
    """Blocks [start, stop) of src (n_blocks, 210) into out (n_blocks, 256)."""
    for block in range(start, stop):
        d = _scale(src[block, 208], src[block, 209])
        for half in range(2):
            ql = src[block, 64 * half : 64 * half + 64]
            qh = src[block, 128 + 32 * half : 160 + 32 * half]
            scales = src[block, 192 + 8 * half : 200 + 8 * half]
            weights = out[block, 128 * half : 128 * half + 128]
            for part in range(2):
                d0 = d * np.float32(np.int8(scales[part]))
                d1 = d * np.float32(np.int8(scales[part + 2]))
                d2 = d * np.float32(np.int8(scales[part + 4]))
                d3 = d * np.float32(np.int8(scales[part + 6]))
                for i in range(16 * part, 16 * part + 16):
                    low, high, upper = ql[i], ql[i + 32], qh[i]
                    q0 = (low & np.uint8(0x0F)) | (upper & np.uint8(0x03)) << np.uint8(4)
                    q1 = (high & np.uint8(0x0F)) | (upper & np.uint8(0x0C)) << np.uint8(2)
                    q2 = (low >> np.uint8(4)) | (upper & np.uint8(0x30))
                    q3 = (high >> np.uint8(4)) | (upper & np.uint8(0xC0)) >> np.uint8(2)
                    weights[i] = d0 * np.float32(np.int8(q0) - np.int8(32))
                    weights[i + 32] = d1 * np.float32(np.int8(q1) - np.int8(32))
                    weights[i + 64] = d2 * np.float32(np.int8(q2) - np.int8(32))
                    weights[i + 96] = d3 * np.float32(np.int8(q3) - np.int8(32))
