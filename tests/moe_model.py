"""GGUF files with a mixture of experts, as kt-kernel's llamafile back end takes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.samples import random_blocks

MIXED = (QuantType.Q4_K, QuantType.Q4_K, QuantType.Q6_K)  # gate, up, down
PLAIN = (QuantType.Q8_0,) * 3
NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class Shape:
    """Sizes that are no powers of two: hidden 768, inner 1280, which is five units of 256."""

    experts: int = 8
    used: int = 2  # experts per token
    hidden: int = 768
    inner: int = 1280
    layers: int = 1
    types: tuple[QuantType, QuantType, QuantType] = MIXED
    first: int = 0  # layer

    def nbytes(self) -> int:
        """Of all experts of one layer."""
        sizes = (BLOCKS[qtype] for qtype in self.types)
        weights = self.experts * self.hidden * self.inner
        return sum(weights // block_size * type_size for block_size, type_size in sizes)

    def tensor_shapes(self) -> dict[str, tuple[int, int, int]]:
        rows = (self.experts, self.inner, self.hidden)
        return {"gate": rows, "up": rows, "down": (self.experts, self.hidden, self.inner)}


SHAPES = {
    "mixed-8": Shape(),
    "mixed-5": Shape(experts=5, used=3),
    "plain-8": Shape(used=3, types=PLAIN),
    "plain-5": Shape(experts=5, types=PLAIN),
    "mixed-thirds": Shape(
        hidden=512, inner=1536
    ),  # kt-kernel wants it to be a multiple of the parts
}


def write_moe(path: Path, shape: Shape, seed: int = 0) -> str:
    """A model of these experts and little else; quants are random, scales are small."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    writer.add_embedding_length(shape.hidden)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.used)
    writer.add_expert_feed_forward_length(shape.inner)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "</s>", "a"])
    for layer in range(shape.first, shape.first + shape.layers):
        for which, (name, (experts, rows, columns)) in enumerate(shape.tensor_shapes().items()):
            qtype = shape.types[which]
            blocks = random_blocks(qtype, experts * rows, columns, rng)
            writer.add_tensor(
                f"blk.{layer}.ffn_{name}_exps.weight",
                blocks.reshape(experts, rows, -1),
                raw_dtype=gguf.GGMLQuantizationType[qtype.name],
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)
