"""Weights that are floats in the file: no blocks; these read 16 of them."""

from __future__ import annotations

from numaload.kernels.lanes import Array, load_f32, load_u16, widen_bf16, widen_f16


# F32, 4 bytes -> 1 weight                   IEEE 754 binary32
#   byte 0-3    f32    the weight
def f32(src: Array, at: int) -> Array:
    return load_f32(src, at)


# F16, 2 bytes -> 1 weight                   ggml.h: ggml_fp16_t
#   byte 0-1    f16    the weight
def f16(src: Array, at: int) -> Array:
    return widen_f16(load_u16(src, at))


# BF16, 2 bytes -> 1 weight                  ggml.h: ggml_bf16_t
#   byte 0-1    bf16   the weight: the upper half of a float32
def bf16(src: Array, at: int) -> Array:
    return widen_bf16(load_u16(src, at))
