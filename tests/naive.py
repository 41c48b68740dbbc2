"""The formats once more, one weight at a time and by the book: what the kernels must agree with."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import QuantType

Floats = NDArray[np.float32]


def dequantize(qtype: QuantType, src: NDArray[np.uint8]) -> Floats:
    """Decode src (n_blocks, type_size) to (n_blocks, block_size)."""
    decode = DECODE[qtype]
    with np.errstate(over="ignore", invalid="ignore"):
        return np.array([decode(block.tobytes()) for block in src], np.float32)


def half(low: int, high: int) -> np.float32:
    """A float16 from its two bytes. A NaN keeps sign and payload."""
    sign, exponent, mantissa = high >> 7, (high >> 2) & 31, (high & 3) << 8 | low
    if exponent == 31:
        return _from_bits(sign << 31 | 0xFF << 23 | mantissa << 13)
    if exponent == 0:
        magnitude = mantissa * 2.0**-24
    else:
        magnitude = (1024 + mantissa) * 2.0 ** (exponent - 25)
    return np.float32(-magnitude if sign else magnitude)


def decode_f16(block: bytes) -> list[np.float32]:
    return [half(block[0], block[1])]


def decode_bf16(block: bytes) -> list[np.float32]:
    return [_from_bits(block[1] << 24 | block[0] << 16)]


def decode_q8_0(block: bytes) -> list[np.float32]:
    d = half(block[0], block[1])
    return [d * np.float32(_signed(byte)) for byte in block[2:]]


def decode_q4_k(block: bytes) -> list[np.float32]:
    d, dmin = half(block[0], block[1]), half(block[2], block[3])
    packed, qs = block[4:16], block[16:]
    weights = []
    for i in range(256):
        group = i // 32
        if group < 4:
            scale, minimum = packed[group] % 64, packed[group + 4] % 64
        else:
            scale = packed[group + 4] % 16 + 16 * (packed[group - 4] // 64)
            minimum = packed[group + 4] // 16 + 16 * (packed[group] // 64)
        byte = qs[32 * (group // 2) + i % 32]
        q = byte // 16 if group % 2 else byte % 16
        weights.append((d * np.float32(scale)) * np.float32(q) - dmin * np.float32(minimum))
    return weights


def decode_q6_k(block: bytes) -> list[np.float32]:
    ql, qh, scales, d = block[:128], block[128:192], block[192:208], half(block[208], block[209])
    weights = []
    for i in range(256):
        upper_half, quarter, column = i // 128, i % 128 // 32, i % 32
        low = ql[64 * upper_half + 32 * (quarter % 2) + column] >> 4 * (quarter // 2) & 15
        high = qh[32 * upper_half + column] >> 2 * quarter & 3
        q = low + 16 * high - 32
        weights.append((d * np.float32(_signed(scales[i // 16]))) * np.float32(q))
    return weights


def narrow_float16(bits: int) -> int:
    """float16 bits of float32 bits. A NaN keeps its upper ten payload bits, at least 1."""
    if _is_nan(bits):
        return bits >> 16 & 0x8000 | 0x7C00 | (bits >> 13 & 0x3FF or 1)
    return _round(bits, mantissa_bits=10, smallest=-24, infinity=0x7C00)


def narrow_bfloat16(bits: int) -> int:
    """bfloat16 bits of float32 bits. A NaN keeps its sign only."""
    if _is_nan(bits):
        return bits >> 16 & 0x8000 | 0x7FC0
    return _round(bits, mantissa_bits=7, smallest=-133, infinity=0x7F80)


def _round(bits: int, mantissa_bits: int, smallest: int, infinity: int) -> int:
    """To nearest even, over exact fractions; 2**smallest is the least subnormal of the target."""
    sign, exponent, mantissa = bits >> 31, bits >> 23 & 0xFF, bits & 0x7FFFFF
    if exponent == 0xFF:
        return sign << 15 | infinity
    value = Fraction(mantissa + (1 << 23 if exponent else 0)) * Fraction(2) ** (
        max(exponent, 1) - 150
    )
    spacing = max(exponent - 127 - mantissa_bits, smallest)
    steps = round(value / Fraction(2) ** spacing)  # Fraction rounds ties to even
    return sign << 15 | min(steps + (spacing - smallest << mantissa_bits), infinity)


def _from_bits(bits: int) -> np.float32:
    value: np.float32 = np.uint32(bits).view(np.float32)
    return value


def _is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


DECODE: dict[QuantType, Callable[[bytes], list[np.float32]]] = {
    QuantType.F16: decode_f16,
    QuantType.BF16: decode_bf16,
    QuantType.Q8_0: decode_q8_0,
    QuantType.Q4_K: decode_q4_k,
    QuantType.Q6_K: decode_q6_k,
}
