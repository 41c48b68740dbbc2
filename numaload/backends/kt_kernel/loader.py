"""kt-kernel's GGUFLoader over numaload's weights: parsed in milliseconds, zero-copy.

The contract is ``kt_kernel/utils/loader.py`` of kt-kernel 0.7.0 to 0.7.2: the same members, keys
and value types. It differs only where the original fails: on arrays without elements (it cannot
open such a file), u8 values (it takes them for text), and types that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload import torch_memory
from numaload.errors import MetadataError, TensorNotFoundError, printable
from numaload.formats.metadata import CODES, TYPE_NAMES, Metadata, MetadataArray
from numaload.weights import Tensor, Weights

# Words of Hugging Face's names, and GGUF's. Order counts: a line sees what earlier ones made.
RENAMED = """
lm_head.                               output.
model.embed_tokens.                    token_embd.
model.norm.                            output_norm.
model.layers.                          blk.
.input_layernorm                       .attn_norm
.mlp.down_proj                         .ffn_down
.mlp.gate_proj                         .ffn_gate
.mlp.up_proj                           .ffn_up
.post_attention_layernorm              .ffn_norm
.self_attn.q_proj                      .attn_q
.self_attn.k_proj                      .attn_k
.self_attn.v_proj                      .attn_v
.self_attn.o_proj                      .attn_output
.self_attn.qkv_proj                    .attn_qkv
.self_attn.kv_a_proj_with_mqa          .attn_kv_a_mqa
.self_attn.kv_a_layernorm              .attn_kv_a_norm
.self_attn.kv_b_proj                   .attn_kv_b
.self_attn.q_a_proj                    .attn_q_a
.self_attn.q_a_layernorm               .attn_q_a_norm
.self_attn.q_b_proj                    .attn_q_b
.self_attn.q_norm                      .attn_q_norm
.self_attn.k_norm                      .attn_k_norm
.shared_expert.                        .shared_experts.
.shared_expert_                        .shared_experts_
.gate_up_proj.                         .up_proj
.mlp.shared_experts.down_proj          .ffn_down_shexp
.mlp.gate.e_score_correction_bias      .exp_probs_b.bias
.mlp.gate                              .ffn_gate_inp
.mlp.shared_experts.gate_proj          .ffn_gate_shexp
.mlp.shared_experts.up_proj            .ffn_up_shexp
.mlp.shared_experts_gate               .ffn_gate_inp_shexp
.mlp.experts
.block_sparse_moe.gate.                .ffn_gate_inp.
.block_sparse_moe.experts
.feed_forward.experts
.feed_forward.router                   .ffn_gate_inp
.feed_forward.shared_experts.down_proj .ffn_down_shexp
.feed_forward.shared_experts.gate_proj .ffn_gate_shexp
.feed_forward.shared_experts.up_proj   .ffn_up_shexp
"""
RENAMES = [(words[0], "".join(words[1:])) for words in map(str.split, RENAMED.strip().split("\n"))]
NUMBERS = {TYPE_NAMES[type_id]: code for type_id, code in CODES.items()}  # {"u32": "I", ...}
GATES = "blk.{}.ffn_gate_exps.weight"  # (experts, inner dimension, hidden size)
# {key of get_model_config: (metadata keys, of which the first that exists counts; axis of GATES)}
CONFIG: dict[str, tuple[tuple[str, ...], int | None]] = {
    "num_experts": (
        ("expert_count", "expert.count", "moe.expert_count", "expert_feed_forward_length"), 0,
    ),
    "num_experts_per_tok": (
        ("expert_used_count", "expert.used_count", "moe.num_experts_per_tok"), None,
    ),
    "hidden_size": (("embedding_length", "embed_length", "hidden_size"), 2),
    "moe_intermediate_size": (
        ("expert_feed_forward_length", "feed_forward_length", "ffn_length", "intermediate_size"), 1,
    ),
}  # fmt: skip


def translate_name_to_gguf(name: str) -> str:
    """Translate a tensor's name from Hugging Face's to GGUF's; leave GGUF's as they are."""
    for theirs, ours in RENAMES:
        name = name.replace(theirs, ours)
    return name


class Loader:
    """Give tensors and metadata of one or several models, as kt-kernel asks for them.

    ``tensor_info``: {GGUF name: {"shape": numpy order, "dtype": gguf's type, "offset": bytes from
    the start of the file, "n_elements"}}; ``metadata``: text as str, numbers as arrays of one
    element, arrays as their first element; ``tensor_file_map``: {GGUF name: path};
    ``file_data_map``: {path: the whole file, uint8}. Of files that share a name, the last one's.
    """

    def __init__(self, models: Sequence[Weights]) -> None:
        self._tensors = {name: tensor for model in models for name, tensor in model.items()}
        self._models = models
        self.tensor_info = {name: _info(tensor) for name, tensor in self._tensors.items()}
        self.tensor_file_map = {name: tensor.path for name, tensor in self._tensors.items()}

    @cached_property
    def metadata(self) -> dict[str, Any]:
        """Read the metadata when first asked: kt-kernel does not, and vocabularies are long."""
        return {key: value for model in self._models for key, value in _metadata(model)}

    @property
    def file_data_map(self) -> dict[str, NDArray[Any]]:
        return {
            path: np.frombuffer(model.image(part), np.uint8)
            for model in self._models
            for part, path in enumerate(model.paths)
        }

    def has_tensor(self, name: str) -> bool:
        return translate_name_to_gguf(name) in self._tensors

    def get_ggml_type(self, name: str) -> Any:
        """Return gguf's type of a tensor. Raises: TensorNotFoundError, a KeyError."""
        return self.tensor_info[self._find(name).name]["dtype"]

    def get_undequanted_tensor_and_ggml_type(self, name: str) -> tuple[Any, Any]:
        """Return the blocks as a flat uint8 torch tensor, zero-copy, read-only, and their type.

        A Handle's loader keeps the memory until its release, since kt-kernel keeps the address
        alone. Raises: TensorNotFoundError, UnknownQuantTypeError, ClosedError, UnsupportedTypeError
        for blocks whose factor is in another tensor.
        """
        tensor = self._find(name)
        tensor.check_alone()
        blocks = self.blocks_of(tensor)
        data = torch_memory.of_bytes(blocks, torch_memory.torch_type("U8"), (tensor.nbytes,))
        return data, self.tensor_info[tensor.name]["dtype"]

    def blocks_of(self, tensor: Tensor) -> memoryview:
        """Return the memory that is handed out for a tensor."""
        return tensor.memory()

    def get_model_config(self, layer_idx: int = 0) -> dict[str, int | None]:
        """Return sizes of the experts, by the metadata, else the layer's gate tensor, else None."""
        arch = self.metadata.get("general.architecture", "unknown")
        shape = self.tensor_info.get(GATES.format(layer_idx), {"shape": []})["shape"]
        return {
            what: self._size([f"{arch}.{key}" for key in keys], axis, shape)
            for what, (keys, axis) in CONFIG.items()
        }

    def _size(self, keys: list[str], axis: int | None, shape: Sequence[int]) -> int | None:
        key = next((key for key in keys if key in self.metadata), None)
        if key is not None:
            value = self.metadata[key]
            try:
                return int(value if isinstance(value, str) else value[0])
            except (ValueError, OverflowError, IndexError) as error:
                message = f"{key} is {value!r}, expected a number"
                raise MetadataError(message, path=self._models[0].paths[0]) from error
        return int(shape[axis]) if axis is not None and len(shape) >= 3 else None

    def print_metadata(self, filter_keywords: Sequence[str] | None = None) -> None:
        """Print the metadata whose key contains one of these words, or all of it."""
        words = [word.lower() for word in filter_keywords or [""]]
        for key, value in sorted(self.metadata.items()):
            if any(word in key.lower() for word in words):
                print(f"  {printable(key)}: {printable(value)}")  # noqa: T201 - what it is for

    def _find(self, name: str) -> Tensor:
        translated = translate_name_to_gguf(name)
        if translated not in self._tensors:
            raise TensorNotFoundError(translated, self._tensors)
        return self._tensors[translated]


def _info(tensor: Tensor) -> dict[str, Any]:
    return {
        "shape": [np.uint64(size) for size in tensor.shape],
        "dtype": _dtype(tensor),
        "offset": tensor.offset,
        "n_elements": tensor.size,
    }


def _dtype(tensor: Tensor) -> Any:
    """Return gguf's enum, which has a name; the bare id where this gguf does not know the type."""
    import gguf

    type_id = getattr(tensor._info, "type_id", None)  # noqa: SLF001
    return gguf.GGMLQuantizationType.__members__.get(tensor.type_name, type_id)


def _metadata(model: Weights) -> Iterator[tuple[str, Any]]:
    """List the metadata of all files as gguf-py's reader does: the header's counts first."""
    for part in model.parts:
        header = part.header
        yield "GGUF.version", np.array([header.version], np.uint32)
        yield "GGUF.tensor_count", np.array([len(header.tensors)], np.uint64)
        yield "GGUF.kv_count", np.array([len(header.metadata)], np.uint64)
        for key in header.metadata:
            yield key, _first(header.metadata, key)


def _first(metadata: Metadata, key: str) -> Any:
    """Return text as str, a number as an array of one, an array as its first element."""
    value, type_name = metadata[key], metadata.type_name(key)
    if isinstance(value, MetadataArray):
        if not len(value):
            return np.empty(0)
        value, type_name = value[0], value.type_name
    code = NUMBERS.get(type_name)
    return value if code is None else np.array([value], code)
