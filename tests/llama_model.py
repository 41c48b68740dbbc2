"""A llama that llama.cpp runs: random weights, a vocabulary of ASCII, of any size and type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.samples import random_blocks


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; the defaults make one of 3 MB."""

    width: int = 256
    inner: int = 512
    layers: int = 2
    heads: int = 4
    context: int = 64
    qtype: QuantType = QuantType.F32  # of matrices; norms are float32

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, rows first; () stands for a norm."""
        rows = (len(TOKENS), self.width)
        shapes: dict[str, tuple[int, ...]] = {"token_embd": rows, "output": rows, "output_norm": ()}
        square, up, down = (self.width,) * 2, (self.inner, self.width), (self.width, self.inner)
        block: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attn_q", "attn_k", "attn_v", "attn_output"), square
        )
        block |= {"ffn_gate": up, "ffn_up": up, "ffn_down": down, "attn_norm": (), "ffn_norm": ()}
        for layer in range(self.layers):
            shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
        return shapes


# {type: {byte of a block: scale there}}, so that weights have a mean of 0 and a deviation of 0.03,
# and no token of such a model is nearly certain.
SCALES: dict[QuantType, dict[int, float]] = {
    QuantType.Q4_0: {0: 6.5e-3},
    QuantType.Q8_0: {0: 4e-4},
    QuantType.Q4_K: {0: 1.5e-4, 2: 1.1e-3},
}

# Bytes of ASCII only, as a random model would say others that are no text. Eight divides the number
# of tokens, as it has to for llama.cpp to repack the output.
BYTES = 128
LETTERS = ["\u2581", *"abcdefghijklmnopqrstuvwxyzAB"]
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(BYTES)), *LETTERS]


def _describe(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.width // shape.heads)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    writer.add_token_types([*kinds, *[kind.BYTE] * BYTES, *[kind.NORMAL] * len(LETTERS)])


def _blocks(qtype: QuantType, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    rows, columns = shape
    blocks = random_blocks(qtype, rows, columns, rng)
    each = blocks.reshape(-1, BLOCKS[qtype][1])
    for at, scale in SCALES.get(qtype, {}).items():
        each[:, at : at + 2] = np.array([scale], np.float16).view(np.uint8)
    return blocks


def write_llama(path: Path, shape: Shape | None = None, splits: int = 1) -> list[str]:
    """Write the model and return its files; scales of quantized blocks are small and finite."""
    shape = shape or Shape()
    tensors = shape.tensors
    per_file = -(-len(tensors) // splits) if splits > 1 else 0
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=per_file)
    _describe(writer, shape)
    rng = np.random.default_rng(0)
    for name, dimensions in tensors.items():
        if shape.qtype is QuantType.F32 or not dimensions:
            weights = rng.standard_normal(dimensions or (shape.width,), np.float32) * 0.3
            writer.add_tensor(f"{name}.weight", weights + np.float32(dimensions == ()))
        else:
            blocks = _blocks(shape.qtype, dimensions, rng)
            raw = gguf.GGMLQuantizationType(shape.qtype)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(str(file) for file in path.parent.glob(f"{path.stem}*.gguf"))
