"""The tensor types of GGUF and the size of their blocks.

Source: ggml.h ``enum ggml_type`` and the ``type_traits`` table of ggml.c.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple


class QuantType(IntEnum):
    """Ids as in a GGUF file. Ids 4, 5, 31-33 and 36-38 were removed from ggml."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# {qtype: (block_size in elements, type_size in bytes)}
BLOCKS: dict[QuantType, tuple[int, int]] = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.Q4_0: (32, 18),
    QuantType.Q4_1: (32, 20),
    QuantType.Q5_0: (32, 22),
    QuantType.Q5_1: (32, 24),
    QuantType.Q8_0: (32, 34),
    QuantType.Q8_1: (32, 36),  # gguf-py says 40, from before ggml halved its two scales
    QuantType.Q2_K: (256, 84),
    QuantType.Q3_K: (256, 110),
    QuantType.Q4_K: (256, 144),
    QuantType.Q5_K: (256, 176),
    QuantType.Q6_K: (256, 210),
    QuantType.Q8_K: (256, 292),
    QuantType.IQ2_XXS: (256, 66),
    QuantType.IQ2_XS: (256, 74),
    QuantType.IQ3_XXS: (256, 98),
    QuantType.IQ1_S: (256, 50),
    QuantType.IQ4_NL: (32, 18),
    QuantType.IQ3_S: (256, 110),
    QuantType.IQ2_S: (256, 82),
    QuantType.IQ4_XS: (256, 136),
    QuantType.I8: (1, 1),
    QuantType.I16: (1, 2),
    QuantType.I32: (1, 4),
    QuantType.I64: (1, 8),
    QuantType.F64: (1, 8),
    QuantType.IQ1_M: (256, 56),
    QuantType.BF16: (1, 2),
    QuantType.TQ1_0: (256, 54),
    QuantType.TQ2_0: (256, 66),
    QuantType.MXFP4: (32, 17),
    QuantType.NVFP4: (64, 36),
    QuantType.Q1_0: (128, 18),
    QuantType.Q2_0: (64, 18),
}


# Floats without blocks: what kernels read in either byte order.
FLOATS = (QuantType.F32, QuantType.F16, QuantType.BF16)


class ForeignType(NamedTuple):
    """Type ids that are no QuantType: their blocks have a size and a meaning unknown here."""

    ids: range
    family: str  # a word for tables
    why: str  # follows "type 31 is "


OTHER = "take a file that llama.cpp reads"
PRISM_Q2_0, PRISM_KEYS = 142, "prism.hadamard."
PRISM_BLOCK = (128, 34)  # weights and bytes of one
ROTATED = "whose weights are in a basis of their own (prism.hadamard): its llama.cpp computes them"
# The first row that has the id counts. Sources: the comments in ggml.h of llama.cpp, and ggml.h of
# ik_llama.cpp, whose ids of its own overlap with a removed one, and of Prism's llama.cpp.
FOREIGN = (
    ForeignType(range(4, 6), "removed", "Q4_2 or Q4_3, removed from ggml in 2023"),
    ForeignType(
        range(31, 34),
        "removed",
        "a Q4_0 repacked for ARM (Q4_0_4_4, Q4_0_4_8, Q4_0_8_8), removed from ggml in 2024:"
        " take the Q4_0 file",
    ),
    ForeignType(
        range(36, 37), "removed", "IQ4_NL_4_4, removed from ggml in 2024, or I2_S of ik_llama.cpp"
    ),
    ForeignType(range(37, 39), "removed", "IQ4_NL_4_8 or IQ4_NL_8_8, removed from ggml in 2024"),
    ForeignType(range(64, 69), "TurboQuant", f"of TurboQuant; {OTHER}"),
    ForeignType(range(100, 108), "ROCmFPX", f"of ROCmFPX; {OTHER}"),
    ForeignType(
        range(PRISM_Q2_0, PRISM_Q2_0 + 1),
        "Prism",
        f"PQ2_0 of Prism, in older files of theirs type 42, {ROTATED}; or IQ2_TN of ik_llama.cpp",
    ),
    ForeignType(range(143, 144), "Prism", f"PTQ1_0 of Prism, {ROTATED}; or IQ1_TN of ik_llama.cpp"),
    ForeignType(
        range(144, 145), "ik_llama.cpp or Prism", f"IQ4_KS of ik_llama.cpp, or of Prism; {OTHER}"
    ),
    ForeignType(range(97, 100), "ik_llama.cpp", f"of ik_llama.cpp; {OTHER}"),
    ForeignType(range(133, 159), "ik_llama.cpp", f"of ik_llama.cpp; {OTHER}"),
    ForeignType(range(202, 400), "ik_llama.cpp", f"of ik_llama.cpp, its rows interleaved; {OTHER}"),
)


def foreign_type(type_id: int) -> ForeignType:
    """Return which project uses a type id that QuantType does not have."""
    nobody = ForeignType(range(type_id, type_id + 1), "unknown", "unknown to this numaload")
    return next((row for row in FOREIGN if type_id in row.ids), nobody)
