"""A small model with experts and attention of llama, as classic ktransformers' loaders find it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

import gguf_builder as gb
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.samples import random_blocks

EXPERTS, INNER, HIDDEN = 3, 256, 512
GATE, UP, DOWN = (f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
Q, K = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
NORM = "blk.0.attn_norm.weight"


def blocks_of(qtype: QuantType, *shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Of finite floats, so that they can be compared."""
    block_size, type_size = BLOCKS[qtype]
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    raw: np.ndarray[Any, np.dtype[np.uint8]]
    raw = random_blocks(qtype, rows, columns, np.random.default_rng(seed))
    return raw.reshape(*shape[:-1], columns // block_size * type_size)


TENSORS: dict[str, tuple[QuantType, Any]] = {
    GATE: (QuantType.Q4_K, blocks_of(QuantType.Q4_K, EXPERTS, INNER, HIDDEN)),
    UP: (QuantType.Q8_0, blocks_of(QuantType.Q8_0, EXPERTS, INNER, HIDDEN)),
    DOWN: (QuantType.Q6_K, blocks_of(QuantType.Q6_K, EXPERTS, HIDDEN, INNER)),
    Q: (QuantType.F32, np.arange(16 * 8, dtype=np.float32).reshape(16, 8)),
    K: (QuantType.F16, np.arange(8 * 8, dtype=np.float16).reshape(8, 8).view(np.uint8)),
    NORM: (QuantType.BF16, np.arange(8, dtype=np.uint16).view(np.uint8)),
    "blk.0.attn_q.bias": (QuantType.F32, np.arange(16, dtype=np.float32)),
}
HEADS = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


def write_model(folder: Path) -> Path:
    """The model in two files, and another in a folder below that comes later; the folder."""
    (folder / "more").mkdir(parents=True)
    gb.write_good(folder / "m.gguf", TENSORS, HEADS, per_file=4)
    late = {"late.weight": (QuantType.F32, np.ones(4, np.float32))}
    gb.write_good(folder / "more/z.gguf", late, {"llama.block_count": 7})
    return folder


def floats(name: str) -> Any:
    """What gguf-py makes of a tensor, as one of torch."""
    import torch

    qtype, blocks = TENSORS[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(qtype)))
