"""Random weights of any type: random quants, and scales as small as those of real models."""

from __future__ import annotations

from typing import Any

from numaload.formats.qtypes import BLOCKS, FLOATS, QuantType

# {type: bytes of a block where its float16 scales are}: random bytes there would be inf or NaN.
SCALES: dict[str, tuple[int, ...]] = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,),
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,),
}  # fmt: skip
# Types without them: {byte of a block: (bits to keep, bits to set)}. IQ1_M's scale is in four
# nibbles, the last has sign and exponent; MXFP4's is an exponent; all of NVFP4's are finite.
MASKS: dict[str, dict[int, tuple[int, int]]] = {
    "IQ1_M": {55: (0x0F, 0x10)},
    "MXFP4": {0: (0x07, 0x70)},
}


def random_blocks(qtype: QuantType, rows: int, columns: int, rng: Any) -> Any:
    """Make (rows, bytes per row) uint8 of any type that can be turned to float, weights finite."""
    import numpy as np

    block_size, type_size = BLOCKS[qtype]
    if qtype in FLOATS:
        return _floats(qtype, (rng.standard_normal((rows, columns)) * 0.02).astype(np.float32))
    blocks = rng.integers(0, 256, (rows * (columns // block_size), type_size), dtype=np.uint8)
    for at in SCALES.get(qtype.name, ()):
        scale = (rng.random(len(blocks)) * 0.01).astype(np.float16)
        blocks[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    for at, (keep, add) in MASKS.get(qtype.name, {}).items():
        blocks[:, at] = blocks[:, at] & keep | add
    return blocks.reshape(rows, -1)


def _floats(qtype: QuantType, values: Any) -> Any:
    import numpy as np

    if qtype is QuantType.F16:
        values = values.astype(np.float16)
    elif qtype is QuantType.BF16:
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.view(np.uint8)
