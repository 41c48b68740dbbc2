"""Block types with one scale for 32 weights: w = d * q. Q8_0: 8.5 bits per weight."""

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


# Q8_0, 34 bytes -> 32 weights               ggml-common.h: block_q8_0
#   byte 0-1    d      f16    scale
#   byte 2-33   qs     i8     32 quants
@njit([BLOCKS], nogil=True, cache=True, fastmath=False)
def dequantize_q8_0(
    src: NDArray[np.uint8], out: NDArray[np.float32], start: int, stop: int
) -> None:
    """Blocks [start, stop) of src (n_blocks, 34) into out (n_blocks, 32): w = d * q."""
    for block in range(start, stop):
        d = _scale(src[block, 0], src[block, 1])
        qs = src[block, 2:]
        weights = out[block]
        # The length is always 32, but a trip count known when compiling makes LLVM unroll the
        # loop to 32 scalar steps before it looks for vectors: three times slower.
        for i in range(weights.size):
            weights[i] = d * np.float32(np.int8(qs[i]))
