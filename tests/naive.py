"""The formats once more, one weight at a time and by the book: what the kernels must agree with.

Not a line of this is shared with the kernels; the grids are gguf-py's.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import BLOCKS, QuantType

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def dequantize(qtype: QuantType, src: Bytes) -> Floats:
    """Decode the blocks in src, of any shape, to a flat array."""
    data, size = src.tobytes(), BLOCKS[qtype][1]
    with np.errstate(over="ignore", invalid="ignore"):
        blocks = [DECODE[qtype](data[i : i + size]) for i in range(0, len(data), size)]
    return np.array(blocks, np.float32).reshape(-1)


# numbers in a block ----------------------------------------------------------------------------


def half(low: int, high: int) -> np.float32:
    """A float16 from its two bytes. A NaN becomes quiet and keeps sign and payload."""
    sign, exponent, mantissa = high >> 7, (high >> 2) & 31, (high & 3) << 8 | low
    if exponent == 31:
        quiet = 1 << 22 if mantissa else 0
        return _from_bits(sign << 31 | 0xFF << 23 | quiet | mantissa << 13)
    if exponent == 0:
        magnitude = mantissa * 2.0**-24
    else:
        magnitude = (1024 + mantissa) * 2.0 ** (exponent - 25)
    return np.float32(-magnitude if sign else magnitude)


def _half(block: bytes, at: int) -> np.float32:
    return half(block[at], block[at + 1])


def _word(block: bytes, at: int, size: int) -> int:
    return int.from_bytes(block[at : at + size], "little")


def _field(data: bytes, i: int, width: int) -> int:
    """Number ``i`` of those of 1, 2 or 4 bits in ``data``, of a byte the lowest first."""
    each = 8 // width
    return data[i // each] >> width * (i % each) & (1 << width) - 1


def _nibble(data: bytes, i: int) -> int:
    """Of 16 bytes the low nibbles are numbers 0-15 and the high ones are 16-31."""
    return data[i % 16] >> 4 * (i // 16) & 15


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


def _from_bits(bits: int) -> np.float32:
    value: np.float32 = np.uint32(bits).view(np.float32)
    return value


# floats ----------------------------------------------------------------------------------------


def decode_f32(block: bytes) -> list[np.float32]:
    return [_from_bits(_word(block, 0, 4))]


def decode_f16(block: bytes) -> list[np.float32]:
    return [_half(block, 0)]


def decode_bf16(block: bytes) -> list[np.float32]:
    return [_from_bits(_word(block, 0, 2) << 16)]


# one scale for 32 weights ----------------------------------------------------------------------


def decode_q4_0(block: bytes) -> list[np.float32]:
    d, qs = _half(block, 0), block[2:]
    return [np.float32(_nibble(qs, i) - 8) * d for i in range(32)]


def decode_q4_1(block: bytes) -> list[np.float32]:
    d, m, qs = _half(block, 0), _half(block, 2), block[4:]
    return [np.float32(_nibble(qs, i)) * d + m for i in range(32)]


def decode_q5_0(block: bytes) -> list[np.float32]:
    d, qh, qs = _half(block, 0), block[2:6], block[6:]
    quants = [_nibble(qs, i) + 16 * _field(qh, i, 1) for i in range(32)]
    return [np.float32(q - 16) * d for q in quants]


def decode_q5_1(block: bytes) -> list[np.float32]:
    d, m, qh, qs = _half(block, 0), _half(block, 2), block[4:8], block[8:]
    quants = [_nibble(qs, i) + 16 * _field(qh, i, 1) for i in range(32)]
    return [np.float32(q) * d + m for q in quants]


def decode_q8_0(block: bytes) -> list[np.float32]:
    d = _half(block, 0)
    return [d * np.float32(_signed(byte)) for byte in block[2:]]


# groups with scales of their own ---------------------------------------------------------------


def decode_q2_k(block: bytes) -> list[np.float32]:
    scales, qs, d, dmin = block[:16], block[16:80], _half(block, 80), _half(block, 82)
    weights = []
    for i in range(256):
        scale, minimum = scales[i // 16] % 16, scales[i // 16] // 16
        q = qs[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
        weights.append((d * np.float32(scale)) * np.float32(q) - dmin * np.float32(minimum))
    return weights


def decode_q3_k(block: bytes) -> list[np.float32]:
    hmask, qs, packed, d = block[:32], block[32:96], block[96:108], _half(block, 108)
    weights = []
    for i in range(256):
        group = i // 16
        scale = packed[group % 8] >> 4 * (group // 8) & 15
        scale += 16 * (packed[8 + group % 4] >> 2 * (group // 4) & 3)
        q = qs[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3
        q += 4 * (hmask[i % 32] >> i // 32 & 1)
        weights.append((d * np.float32(scale - 32)) * np.float32(q - 4))
    return weights


def _scale_and_minimum(packed: bytes, group: int) -> tuple[int, int]:
    """Of Q4_K and Q5_K: 6 bits each."""
    if group < 4:
        return packed[group] % 64, packed[group + 4] % 64
    nibbles, for_scale, for_minimum = packed[group + 4], packed[group - 4], packed[group]
    return nibbles % 16 + 16 * (for_scale // 64), nibbles // 16 + 16 * (for_minimum // 64)


def decode_q4_k(block: bytes) -> list[np.float32]:
    d, dmin, packed, qs = _half(block, 0), _half(block, 2), block[4:16], block[16:]
    weights = []
    for i in range(256):
        group = i // 32
        scale, minimum = _scale_and_minimum(packed, group)
        q = qs[32 * (group // 2) + i % 32] >> 4 * (group % 2) & 15
        weights.append((d * np.float32(scale)) * np.float32(q) - dmin * np.float32(minimum))
    return weights


def decode_q5_k(block: bytes) -> list[np.float32]:
    d, dmin, packed = _half(block, 0), _half(block, 2), block[4:16]
    qh, qs = block[16:48], block[48:]
    weights = []
    for i in range(256):
        group = i // 32
        scale, minimum = _scale_and_minimum(packed, group)
        q = qs[32 * (group // 2) + i % 32] >> 4 * (group % 2) & 15
        q += 16 * (qh[i % 32] >> group & 1)
        weights.append((d * np.float32(scale)) * np.float32(q) - dmin * np.float32(minimum))
    return weights


def decode_q6_k(block: bytes) -> list[np.float32]:
    ql, qh, scales, d = block[:128], block[128:192], block[192:208], _half(block, 208)
    weights = []
    for i in range(256):
        upper_half, quarter, column = i // 128, i % 128 // 32, i % 32
        low = ql[64 * upper_half + 32 * (quarter % 2) + column] >> 4 * (quarter // 2) & 15
        high = qh[32 * upper_half + column] >> 2 * quarter & 3
        q = low + 16 * high - 32
        weights.append((d * np.float32(_signed(scales[i // 16]))) * np.float32(q))
    return weights


# groups from a grid ----------------------------------------------------------------------------


@cache
def grid(name: str) -> list[list[int]]:
    """The groups of values of a type of gguf-py; those of IQ1_M are IQ1_S's."""
    known = getattr(gguf.quants, name)
    known.init_grid()
    groups: list[list[int]] = known.grid[0, 0].astype(int).tolist()
    return groups


def _even_sign(seven: int, i: int) -> int:
    """Sign ``i`` of eight of which seven are in the file: the number of minuses is even."""
    minus = seven.bit_count() if i == 7 else seven >> i
    return -1 if minus & 1 else 1


def decode_iq1_s(block: bytes) -> list[np.float32]:
    d, qs = _half(block, 0), block[2:34]
    weights = []
    for i in range(256):
        rest = _word(block, 34 + 2 * (i // 32), 2)
        scale, shift = 2 * (rest >> 12 & 7) + 1, -0.125 if rest >> 15 else 0.125
        index = qs[i // 8] + 256 * (rest >> 3 * (i % 32 // 8) & 7)
        value = grid("IQ1_S")[index][i % 8] + shift
        weights.append((d * np.float32(scale)) * np.float32(value))
    return weights


def decode_iq1_m(block: bytes) -> list[np.float32]:
    qs, qh, scales = block[:32], block[32:48], [_word(block, at, 2) for at in (48, 50, 52, 54)]
    bits = sum((word >> 12) << 4 * i for i, word in enumerate(scales))
    d = half(bits & 255, bits >> 8)
    weights = []
    for i in range(256):
        scale = 2 * (scales[i // 64] >> 3 * (i % 64 // 16) & 7) + 1
        rest = _field(qh, i // 8, 4)
        index, shift = qs[i // 8] + 256 * (rest & 7), -0.125 if rest > 7 else 0.125
        value = grid("IQ1_S")[index][i % 8] + shift
        weights.append((d * np.float32(scale)) * np.float32(value))
    return weights


def decode_iq2_xxs(block: bytes) -> list[np.float32]:
    d = _half(block, 0)
    weights = []
    for i in range(256):
        group, eight = 2 + 8 * (i // 32), i % 32 // 8
        rest = _word(block, group + 4, 4)
        value = grid("IQ2_XXS")[block[group + eight]][i % 8]
        value *= _even_sign(rest >> 7 * eight & 127, i % 8)
        weights.append(d * np.float32((0.5 + (rest >> 28)) / 4) * np.float32(value))
    return weights


def decode_iq2_xs(block: bytes) -> list[np.float32]:
    d, scales = _half(block, 0), block[66:]
    weights = []
    for i in range(256):
        word = _word(block, 2 + 2 * (i // 8), 2)
        value = grid("IQ2_XS")[word % 512][i % 8] * _even_sign(word // 512, i % 8)
        scale = (0.5 + _field(scales, i // 16, 4)) / 4
        weights.append(d * np.float32(scale) * np.float32(value))
    return weights


def decode_iq2_s(block: bytes) -> list[np.float32]:
    d, qs, signs, qh, scales = _half(block, 0), block[2:34], block[34:66], block[66:74], block[74:]
    weights = []
    for i in range(256):
        index = qs[i // 8] + 256 * _field(qh, i // 8, 2)
        value = grid("IQ2_S")[index][i % 8] * (-1 if _field(signs, i, 1) else 1)
        scale = (0.5 + _field(scales, i // 16, 4)) / 4
        weights.append(d * np.float32(scale) * np.float32(value))
    return weights


def decode_iq3_xxs(block: bytes) -> list[np.float32]:
    d, qs = _half(block, 0), block[2:66]
    weights = []
    for i in range(256):
        rest = _word(block, 66 + 4 * (i // 32), 4)
        value = grid("IQ3_XXS")[qs[i // 4]][i % 4]
        value *= _even_sign(rest >> 7 * (i % 32 // 8) & 127, i % 8)
        weights.append(d * np.float32((0.5 + (rest >> 28)) / 2) * np.float32(value))
    return weights


def decode_iq3_s(block: bytes) -> list[np.float32]:
    d, qs, qh, signs = _half(block, 0), block[2:66], block[66:74], block[74:106]
    weights = []
    for i in range(256):
        index = qs[i // 4] + 256 * _field(qh, i // 4, 1)
        value = grid("IQ3_S")[index][i % 4] * (-1 if _field(signs, i, 1) else 1)
        scale = 1 + 2 * _field(block[106:], i // 32, 4)
        weights.append(d * np.float32(scale) * np.float32(value))
    return weights


# four bits that choose a value -----------------------------------------------------------------

NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _e2m1(code: int) -> float:
    """A sign, two bits of exponent, one of mantissa; there is no negative zero."""
    exponent, mantissa = code >> 1 & 3, code & 1
    magnitude = (1 + mantissa / 2) * 2.0 ** (exponent - 1) if exponent else mantissa / 2
    return -magnitude if code > 8 else magnitude


def _ue4m3(byte: int) -> float:
    """Four bits of exponent and three of mantissa; the highest bit does not count."""
    exponent, mantissa = byte >> 3 & 15, byte & 7
    if byte == 0x7F:  # would be NaN; ggml makes it zero
        return 0
    return (1 + mantissa / 8) * 2.0 ** (exponent - 7) if exponent else mantissa * 2.0**-9


def decode_iq4_nl(block: bytes) -> list[np.float32]:
    d, qs = _half(block, 0), block[2:]
    return [d * np.float32(NONLINEAR[_nibble(qs, i)]) for i in range(32)]


def decode_iq4_xs(block: bytes) -> list[np.float32]:
    d, scales_h, scales_l, qs = _half(block, 0), block[2:4], block[4:8], block[8:]
    weights = []
    for i in range(256):
        group = i // 32
        scale = _field(scales_l, group, 4) + 16 * _field(scales_h, group, 2) - 32
        value = NONLINEAR[_nibble(qs[16 * group :], i % 32)]
        weights.append((d * np.float32(scale)) * np.float32(value))
    return weights


def decode_mxfp4(block: bytes) -> list[np.float32]:
    scale, qs = 2.0 ** (block[0] - 127), block[1:]
    return [np.float32(scale * _e2m1(_nibble(qs, i))) for i in range(32)]


def decode_nvfp4(block: bytes) -> list[np.float32]:
    weights = []
    for i in range(64):
        byte = block[4 + 8 * (i // 16) + i % 8]
        value = _e2m1(byte >> 4 * (i % 16 // 8) & 15)
        weights.append(np.float32(_ue4m3(block[i // 16]) * value))
    return weights


# few values ------------------------------------------------------------------------------------


def decode_q1_0(block: bytes) -> list[np.float32]:
    d = _half(block, 0)
    minus_d = _from_bits(int(d.view(np.uint32)) ^ 1 << 31)
    return [d if _field(block[2:], i, 1) else minus_d for i in range(128)]


def decode_q2_0(block: bytes) -> list[np.float32]:
    d = _half(block, 0)
    return [np.float32(_field(block[2:], i, 2) - 1) * d for i in range(64)]


def _trit(byte: int, i: int) -> int:
    """Digit ``i`` after the point, in base 3, of the fraction byte / 256."""
    for _ in range(i):
        byte = byte * 3 % 256
    return byte * 3 // 256


def decode_tq1_0(block: bytes) -> list[np.float32]:
    d = _half(block, 52)
    trits = [_trit(byte, i) for i in range(5) for byte in block[:32]]
    trits += [_trit(byte, i) for i in range(5) for byte in block[32:48]]
    trits += [_trit(byte, i) for i in range(4) for byte in block[48:52]]
    return [np.float32(trit - 1) * d for trit in trits]


def decode_tq2_0(block: bytes) -> list[np.float32]:
    d = _half(block, 64)
    quants = [block[32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3 for i in range(256)]
    return [np.float32(q - 1) * d for q in quants]


# narrowing -------------------------------------------------------------------------------------


def narrow_float16(bits: int) -> int:
    """float16 bits of float32 bits. A NaN becomes quiet and keeps nine upper payload bits."""
    if _is_nan(bits):
        return bits >> 16 & 0x8000 | 0x7E00 | bits >> 13 & 0x1FF
    return _round(bits, mantissa_bits=10, smallest=-24, infinity=0x7C00)


def narrow_bfloat16(bits: int) -> int:
    """bfloat16 bits of float32 bits. A NaN keeps its sign and upper payload bits."""
    if _is_nan(bits):
        return bits >> 16 | 0x0040
    return _round(bits, mantissa_bits=7, smallest=-133, infinity=0x7F80)


def _is_nan(bits: int) -> bool:
    return bits & 0x7FFFFFFF > 0x7F800000


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


DECODE: dict[QuantType, Callable[[bytes], list[np.float32]]] = {
    QuantType[name.removeprefix("decode_").upper()]: function
    for name, function in list(globals().items())
    if name.startswith("decode_")
}
