"""Block types of 32 weights with one scale, and perhaps a minimum, in the file as float16.

Q4_0, Q5_0, Q8_0: w = d * q.  Q4_1, Q5_1: w = d * q + m.
"""

from __future__ import annotations

from numaload.kernels.lanes import Array, f16, floats, load, put, signed, spread, u32


# Q4_0, 18 bytes -> 32 weights               ggml-common.h: block_q4_0
#   byte 0-1    d      f16    scale
#   byte 2-17   qs     u4     32 quants, 8 too large; weights 0-15 low, 16-31 high
def q4_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    q = load(src, at + 2)
    put(w, to, floats(signed((q & 15) - 8)) * d)
    put(w, to + 16, floats(signed((q >> 4) - 8)) * d)


# Q4_1, 20 bytes -> 32 weights               ggml-common.h: block_q4_1
#   byte 0-1    d      f16    scale
#   byte 2-3    m      f16    minimum
#   byte 4-19   qs     u4     32 quants; weights 0-15 low, 16-31 high
def q4_1(src: Array, at: int, w: Array, to: int) -> None:
    d, m = f16(src, at), f16(src, at + 2)
    q = load(src, at + 4)
    put(w, to, floats(q & 15) * d + m)
    put(w, to + 16, floats(q >> 4) * d + m)


# Q5_0, 22 bytes -> 32 weights               ggml-common.h: block_q5_0
#   byte 0-1    d      f16    scale
#   byte 2-5    qh     u1     bit 4 of 32 quants
#   byte 6-21   qs     u4     32 quants, 16 too large; weights 0-15 low, 16-31 high
def q5_0(src: Array, at: int, w: Array, to: int) -> None:
    d, high = f16(src, at), u32(src, at + 2)
    q = load(src, at + 6)
    put(w, to, floats(signed(((q & 15) | (spread(high) & 16)) - 16)) * d)
    put(w, to + 16, floats(signed(((q >> 4) | (spread(high >> 16) & 16)) - 16)) * d)


# Q5_1, 24 bytes -> 32 weights               ggml-common.h: block_q5_1
#   byte 0-1    d      f16    scale
#   byte 2-3    m      f16    minimum
#   byte 4-7    qh     u1     bit 4 of 32 quants
#   byte 8-23   qs     u4     32 quants; weights 0-15 low, 16-31 high
def q5_1(src: Array, at: int, w: Array, to: int) -> None:
    d, m, high = f16(src, at), f16(src, at + 2), u32(src, at + 4)
    q = load(src, at + 8)
    put(w, to, floats((q & 15) | (spread(high) & 16)) * d + m)
    put(w, to + 16, floats((q >> 4) | (spread(high >> 16) & 16)) * d + m)


# Q8_0, 34 bytes -> 32 weights               ggml-common.h: block_q8_0
#   byte 0-1    d      f16    scale
#   byte 2-33   qs     i8     32 quants
def q8_0(src: Array, at: int, w: Array, to: int) -> None:
    d = f16(src, at)
    put(w, to, floats(signed(load(src, at + 2))) * d)
    put(w, to + 16, floats(signed(load(src, at + 18))) * d)
