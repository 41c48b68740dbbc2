"""One block of each type, written down with what it means.

In them every field has a number of its own, so that no two can be taken for each other, and every
bit matters; a few that cannot are named.
"""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

import naive
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The nibbles 0 to 15 as low ones, and as high ones the other way round.
RAMP = "f0 e1 d2 c3 b4 a5 96 87 78 69 5a 4b 3c 2d 1e 0f"
# f16: 0038 is 0.5, 003c is 1, 003e is 1.5. "55*30": 30 times. Fields in the order of the file.
BY_HAND = {
    QuantType.F32: """
        0000803f 000020c1 01000000 0000807f 00000080
        = 1 -10 1.4e-45 inf -0
    """,
    QuantType.F16: """
        003c 00c0 0100 ff7b 0080 007c
        = 1 -2 5.9604645e-08 65504 -0 inf
    """,
    QuantType.BF16: """
        803f 20c1 0100 80ff 0080
        = 1 -10 9.1835e-41 -inf -0
    """,
    QuantType.Q4_0: f"""
        0038 {RAMP}
        = -4 -3.5 -3 -2.5 -2 -1.5 -1 -0.5 0 0.5 1 1.5 2 2.5 3 3.5
        3.5 3 2.5 2 1.5 1 0.5 0 -0.5 -1 -1.5 -2 -2.5 -3 -3.5 -4
    """,
    # d = 0.5, m = -10
    QuantType.Q4_1: f"""
        0038 00c9 {RAMP}
        = -10 -9.5 -9 -8.5 -8 -7.5 -7 -6.5 -6 -5.5 -5 -4.5 -4 -3.5 -3 -2.5
        -2.5 -3 -3.5 -4 -4.5 -5 -5.5 -6 -6.5 -7 -7.5 -8 -8.5 -9 -9.5 -10
    """,
    # bit 4 of weights 0-3, 12-15, 16-17, 20-21, 26-27 and 30-31
    QuantType.Q5_0: f"""
        0038 0ff033cc {RAMP}
        = 0 0.5 1 1.5 -6 -5.5 -5 -4.5 -4 -3.5 -3 -2.5 6 6.5 7 7.5
        7.5 7 -1.5 -2 5.5 5 -3.5 -4 -4.5 -5 2.5 2 -6.5 -7 0.5 0
    """,
    QuantType.Q5_1: f"""
        0038 00c9 0ff033cc {RAMP}
        = -2 -1.5 -1 -0.5 -8 -7.5 -7 -6.5 -6 -5.5 -5 -4.5 4 4.5 5 5.5
        5.5 5 -3.5 -4 3.5 3 -5.5 -6 -6.5 -7 0.5 0 -8.5 -9 -1.5 -2
    """,
    QuantType.Q8_0: """
        0038 80 ff 00 01 7f 02*26 85
        = -64 -0.5 0 0.5 63.5 1*26 -61.5
    """,
    # scales 1 to 15 and 15, mins 15 to 0, q = 1 but for four columns; d = 1, dmin = 0.5
    QuantType.Q2_K: """
        f1 e2 d3 c4 b5 a6 97 88 79 6a 5b 4c 3d 2e 1f 0f e4 55*30 e4 1b 55*30 1b 003c 0038
        = -7.5 -6.5*15 -5*15 -7 -3.5*16 -2*16 4.5 -0.5*15 1*15 7 16.5 2.5*15 4*15 20
        23.5 5.5*15 7*15 27 19.5 8.5*15 10*15 22 11.5*16 13*16 -0.5 14.5*15 15*15 0
    """,
    # scales, less 32: 1 2 3 4 5 6 7 8 -1 -2 -3 -4 -15 -31 31 15; d = 0.5
    QuantType.Q3_K: """
        0f ff*30 aa e4 55*30 e4 1b 55*30 1b f1e2d3c4 1516f7f8 5a1ada9a 0038
        = 0 0.5*15 1*15 -4 1.5*16 2*16 5 2.5*15 3*15 -6 10.5 3.5*15 4*15 12
        0.5 -0.5*15 -1*15 1 3 -1.5*15 -2*15 -4 22.5 -7.5*15 -15.5*15 46.5 -62 15.5*15 7.5*15 0
    """,
    # scales 1 2 3 4 17 34 51 63, mins 8 7 6 5 63 51 34 17; d = 1, dmin = 0.5
    QuantType.Q4_K: """
        003c 0038 4182c3c4 c8c78645 f132231f f0 21*126 0f
        = -4 -3*31 26.5 0.5*31 0*32 5.5*32 -14.5*32 42.5*32 34*31 748 117.5*31 -8.5
    """,
    # the same scales; bit 4 of the first column in groups 0 2 4 6, of the last one in group 7
    QuantType.Q5_K: """
        003c 0038 4182c3c4 c8c78645 f132231f 55 00*30 80 f0 21*30 43 21*64 65 21*30 0f
        = 12 -3*30 -1 26.5 0.5*30 4.5 48 0*31 5.5*32 257.5 -14.5*31 42.5*32 1054 34*30 748
        369.5 117.5*30 999.5
    """,
    # scales 1 -1 2 -2 to 7 -7, then 127 -128; q = -32 wherever all bits are 0; d = 0.5
    QuantType.Q6_K: """
        21 00*127 e4 00*47 03 00*15 01ff02fe03fd04fc05fb06fa07f97f80 0038
        = -15.5 -16*15 16*16 -16 -32*15 32*16 3 -48*15 48*16 32 -64*15 64*16 -80*16
        -40 80*15 -96*16 96*16 -112*16 112*16 -2032*16 2048*16
    """,
    # Index 0 is eight times -1. Scales 1 3 to 15; groups 1 2 5 7 are moved down.
    QuantType.IQ1_S: """
        003c 01 00*30 ff 0800 0090 00a0 0030 0040 00d0 0060 00fe
        = 1.125 -0.875*8 0.125 1.125 0.125 1.125 -0.875 0.125 -0.875*17 -3.375*32 -5.625*32
        -6.125*32 -7.875*32 -12.375*32 -11.375*32 -16.875*24 13.125*8
    """,
    # d = 5a80 = 208; scales 1 3 to 15, then down again
    QuantType.IQ1_M: """
        01 00*30 ff 10 08 80 00*5 88 00*6 f0 8806 ac8f 77a9 5350
        = 234 -182*8 26 234 26 234 -182 26 -182 -702*8 -546*8 -910*8 -1170*8 -1274*16 -1638*16
        -2002*16 -2366*16 -2730*16 -3510*16 -2366*16 -2002*16 -1638*16 -1274*16 -910*16 -546*16
        -182*8 182*8
    """,
    # Index 0 is eight times 8, and so in all of IQ2. Scales 0.375 0.625 to 2.125.
    QuantType.IQ2_XXS: """
        003c 00010000 00400010 00*4 00000020 00*4 00000030 00*4 00000040 00*4 00000050
        00*4 00000060 00*4 00000070 000000ff 4000e08f
        = 3*8 16.125 3*7 -3 3*6 -3 3*8 5*32 7*32 9*32 11*32 13*32 15*32 17*6 -17*2 17*16
        -17 -53.125 -17*2 -53.125 -91.375*3
    """,
    # scales 0.125 0.375 to 3.875
    QuantType.IQ2_XS: """
        003c ff01 0002 0000*28 0001 00fe 10 32 54 76 98 ba dc fe
        = 5.375*8 -1 1*6 -1 3*16 5*16 7*16 9*16 11*16 13*16 15*16 17*16 19*16 21*16 23*16 25*16
        27*16 29*16 166.625 96.875 31*5 96.875 -31*8
    """,
    QuantType.IQ2_S: """
        003c 01 00*30 ff 00 81 00*28 40 00 10 00*6 c0 10 32 54 76 98 ba dc fe
        = 5.375 1*7 -1 1*6 -1 9.375*5 3 9.375 3*9 5*16 7*16 9*16 11*16 13*16 15*16 17*16 19*16
        21*16 23*16 25*16 27*16 29*16 31*6 -31 31 166.625*8
    """,
    # Index 0 is four times 4. Scales 0.75 1.25 to 4.25.
    QuantType.IQ3_XXS: """
        003c 01 00*62 ff 01000010 00000020 00000030 00000040 00000050 00000060 00000070 0000e08f
        = -15 3*6 -3 3*24 5*32 7*32 9*32 11*32 13*32 15*32 17*24 -17*5 -119 -221 -263.5
    """,
    # Index 0 is four times 1. Scales 3 5 to 17.
    QuantType.IQ3_S: """
        003c 01 00*62 ff 02 00*6 80 81 00*30 40 21 43 65 87
        = -9 3*3 21 15 27 -15 3*24 5*32 7*32 9*32 11*32 13*32 15*32 17*30 -255 255
    """,
    QuantType.IQ4_NL: f"""
        003c {RAMP}
        = -127 -104 -83 -65 -49 -35 -22 -10 1 13 25 38 53 69 89 113
        113 89 69 53 38 25 13 1 -10 -22 -35 -49 -65 -83 -104 -127
    """,
    # scales -31 -22 -1 1 2 18 31 -12; nibbles 8 and 9 are 1 and 13
    QuantType.IQ4_XS: """
        003c 907e a11f224f f0 98*14 07 98*96 3c 98*14 e5
        = 3937 -31*14 310 -3503 -403*14 3937 -22*16 -286*16 -1*16 -13*16 1*16 13*16 2*16 26*16
        18*16 234*16 31*16 403*16 -636 -12*14 420 780 -156*14 -1068
    """,
    # 2**2; the values are doubled, so twice 0 1 2 3 4 6 8 12
    QuantType.MXFP4: f"""
        81 {RAMP}
        = 0 2 4 6 8 12 16 24 0 -2 -4 -6 -8 -12 -16 -24 -24 -16 -12 -8 -6 -4 -2 0 24 16 12 8 6 4 2 0
    """,
    # scales 1, 2, 3 and 2**-9, of 0 0.5 1 1.5 2 3 4 6
    QuantType.NVFP4: f"""
        38 40 44 01 {RAMP} 0f 1e 2d 3c 4b 5a 69 78 87 96 a5 b4 c3 d2 e1 f0
        = 0 0.5 1 1.5 2 3 4 6 -6 -4 -3 -2 -1.5 -1 -0.5 0
        0 -1 -2 -3 -4 -6 -8 -12 12 8 6 4 3 2 1 0
        -18 -12 -9 -6 -4.5 -3 -1.5 0 0 1.5 3 4.5 6 9 12 18
        0.01171875 0.0078125 0.005859375 0.00390625 0.0029296875 0.001953125 0.0009765625 0
        0 -0.0009765625 -0.001953125 -0.0029296875 -0.00390625 -0.005859375 -0.0078125
        -0.01171875
    """,
    QuantType.Q1_0: """
        003e 01 02 04 08 10 20 40 80 fe fd fb f7 ef df bf 7f
        = 1.5 -1.5*8 1.5 -1.5*8 1.5 -1.5*8 1.5 -1.5*8 1.5 -1.5*8 1.5 -1.5*8 1.5 -1.5*8 1.5
        -1.5 1.5*8 -1.5 1.5*8 -1.5 1.5*8 -1.5 1.5*8 -1.5 1.5*8 -1.5 1.5*8 -1.5 1.5*8 -1.5
    """,
    QuantType.Q2_0: """
        003e e4 1b 27 d8 c6 39 9c 63 b1 78 4e b1 00 ff 55 aa
        = -1.5 0 1.5 3 3 1.5 0 -1.5 3 0 1.5 -1.5 -1.5 1.5 0 3
        1.5 0 -1.5 3 0 1.5 3 -1.5 -1.5 3 0 1.5 3 -1.5 1.5 0
        0 -1.5 3 1.5 -1.5 1.5 3 0 1.5 3 -1.5 0 0 -1.5 3 1.5 -1.5*4 3*4 0*4 1.5*4
    """,
    # 80 is five times 0, 7f is four times. 31: -0+0- with 0 last but one; d = 1.5
    QuantType.TQ1_0: """
        31 80*30 d0 f7 80*14 16 30 7f 7f bb 003e
        = -1.5 0*30 1.5 0*32 1.5 0*30 -1.5*2 0*30 1.5 0*31 1.5*2 0*14 -1.5 1.5 0*14 -1.5 1.5 0*14
        1.5 -1.5 0*14 -1.5*2 0*14 1.5 -1.5 0*2 1.5 0*3 -1.5 1.5 0*3 -1.5 0*2 1.5
    """,
    QuantType.TQ2_0: """
        e4 55*30 1b b1 55*30 4e 003e
        = -1.5 0*30 3 0*31 1.5*2 0*31 3 0*30 -1.5 0*31 1.5 -1.5 0*30 3*2 0*30 -1.5 1.5 0*31
    """,
}
# {qtype: (byte, bit) that change nothing in this block}
IDLE_BITS: dict[QuantType, set[tuple[int, int]]] = {
    QuantType.MXFP4: {(1, 3), (8, 7), (9, 3), (16, 7)},  # the sign of a zero: there is one zero
    QuantType.NVFP4: {
        *((byte, 7) for byte in range(4)),  # scales have no sign
        *((byte, 3) for byte in (4, 12, 27, 35)),  # zeros again
        *((byte, 7) for byte in (11, 19, 20, 28)),
    },
    QuantType.TQ1_0: {(48, 0), (48, 1)},  # 81 states in a byte
}
each_type = pytest.mark.parametrize("qtype", BY_HAND, ids=lambda q: q.name)


def repeated(text: str) -> list[str]:
    """The words of a text, "word*3" three times."""
    pairs = [word.partition("*") for word in text.split()]
    return [word for word, _, count in pairs for _ in range(int(count or 1))]


def by_hand(qtype: QuantType) -> tuple[Bytes, Floats]:
    """(bytes, weights), zeros to a whole step of the kernel behind those of floats."""
    block, weights = map(repeated, BY_HAND[qtype].split("="))
    step, nbytes = registry.step(qtype)
    src, expected = np.zeros(nbytes, np.uint8), np.zeros(step, np.float32)
    given = np.frombuffer(bytes.fromhex("".join(block)), np.uint8)
    src[: given.size], expected[: len(weights)] = given, [float(weight) for weight in weights]
    assert given.size == nbytes or BLOCKS[qtype][0] == 1
    assert len(weights) == given.size // BLOCKS[qtype][1] * BLOCKS[qtype][0]
    return src, expected


def decode(qtype: QuantType, src: Bytes) -> Floats:
    kernel = registry.load(qtype, "float32")
    assert kernel is not None
    step, nbytes = registry.step(qtype)
    out = np.full(src.size // nbytes * step, 7, np.float32)
    kernel(src, out, False)
    return out


def test_every_type_has_a_block() -> None:
    assert set(BY_HAND) == set(registry.KERNELS)


@pytest.mark.slow  # all kernels are compiled, the first time
@each_type
def test_block_by_hand(qtype: QuantType) -> None:
    src, expected = by_hand(qtype)
    np.testing.assert_array_equal(decode(qtype, src).view(np.uint32), expected.view(np.uint32))


@each_type
def test_naive_twin_by_hand(qtype: QuantType) -> None:
    src, expected = by_hand(qtype)
    actual = naive.dequantize(qtype, src)
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.slow  # all kernels are compiled, the first time
@each_type
def test_every_bit_matters(qtype: QuantType) -> None:
    src, expected = by_hand(qtype)
    n_bits = 8 * src.size
    flipped = np.tile(src, (n_bits, 1))
    bits = np.packbits(np.eye(n_bits, dtype=np.uint8), axis=1, bitorder="little")
    weights = decode(qtype, flipped ^ bits).reshape(n_bits, -1)
    same = (weights.view(np.uint32) == expected.view(np.uint32)).all(axis=1)
    assert {divmod(int(i), 8) for i in np.flatnonzero(same)} == IDLE_BITS.get(qtype, set())
