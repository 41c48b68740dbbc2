"""Which tensors of a GGUF file a parameter of a transformers model is made of, and how.

gguf-py's name maps translate the names. What llama.cpp's conversion changes beyond names is undone
here. Mostly by the place of each share, a view of the parameter in the order of the tensor's
elements: rows of attention heads permuted for rotary embeddings, experts stacked, kv_b_proj in two
tensors, heads of linear attention tiled. Or by changing values: norms stored as weight + 1.
Source: conversion/*.py of llama.cpp, one class for each architecture.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

from numaload.errors import UsageError
from numaload.formats.gguf import Header
from numaload.weights import Weights

View = Callable[[Any], Any]


class Share(NamedTuple):
    """One tensor of the file, or elements of it, and the part of a parameter that it is.

    view: of the whole parameter as a torch tensor, that part in the order of the tensor's elements.
    first: element of the tensor that the part begins with; None: the part is all of the tensor.
    undo: changes the values, in place.
    """

    name: str
    view: View = lambda parameter: parameter
    first: int | None = None
    undo: View | None = None


class Layout(NamedTuple):
    """Say what the conversion of an architecture changes beyond names."""

    permuted: bool = False  # rows of attn_q and attn_k
    norms: str = ""  # pattern of the tensors that are stored as weight + 1
    experts: str = "stacked"  # or "interleaved", "transposed", as the model has them
    tiled: bool = False  # value heads of linear attention


NORMS = r"(.*_norm)\.weight"
LINEAR = Layout(norms=r"((?!.*ssm_norm).*_norm)\.weight", tiled=True)
LAYOUTS = {
    "llama": Layout(permuted=True), "llama4": Layout(experts="transposed"), "qwen2": Layout(),
    "qwen2moe": Layout(), "qwen3": Layout(), "qwen3moe": Layout(), "qwen35": LINEAR,
    "qwen35moe": LINEAR, "deepseek2": Layout(), "gemma": Layout(norms=NORMS),
    "gemma2": Layout(norms=NORMS), "gemma3": Layout(norms=NORMS), "glm4": Layout(),
    "glm4moe": Layout(), "gpt-oss": Layout(experts="interleaved"), "phi3": Layout(),
}  # fmt: skip
# What adapters need to know: of attention and dense networks no more is changed than this.
PERMUTED = {name: layout.permuted for name, layout in LAYOUTS.items()}
# Tensors that no module has: it computes them from its configuration.
COMPUTED = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight")
# gguf-py's maps have hundreds of names for each. Source: LLAMA_MAX_LAYERS of llama.cpp.
MOST_LAYERS = 512
EXPERTS = re.compile(r"(?P<layer>.*)\.experts\.(?P<which>gate_up|down)_proj(?P<bias>_bias)?")
# {fused parameter of transformers: name of each half in GGUF files}
HALVES = {"gate_up": ("gate", "up"), "down": ("down",)}


def check_architecture(weights: Weights) -> str:
    """Return the architecture. Raises: UsageError for one whose layout is not known here."""
    architecture = str(weights.metadata.get("general.architecture"))
    if not isinstance(weights.parts[0].header, Header):
        raise UsageError(
            f"{weights.paths[0]}: no GGUF file: transformers' own from_pretrained loads it, fastest"
            " from the page cache: numaload.prewarm(path)"
        )
    if architecture not in LAYOUTS:
        raise UsageError(
            f"{weights.paths[0]}: architecture {architecture!r}: how llama.cpp lays out its tensors"
            f" is known here for {', '.join(LAYOUTS)}; transformers itself may know it:"
            " from_pretrained(folder, gguf_file=...)"
        )
    return architecture


class Names:
    """The tensors of one GGUF file, by the names of parameters. config: of transformers."""

    def __init__(self, weights: Weights, config: Any) -> None:
        self.weights, self.config = weights, config.get_text_config()
        architecture = check_architecture(weights)
        self.layout = LAYOUTS[architecture]
        self.layers: int = self.config.num_hidden_layers
        if not 0 < self.layers <= MOST_LAYERS:
            raise UsageError(f"num_hidden_layers: expected 1 to {MOST_LAYERS}, found {self.layers}")
        self.names = tensor_names(architecture, self.layers)

    def shares(self, key: str) -> list[Share]:
        """Return what a parameter of this name is made of; empty if gguf-py has no such name."""
        experts = EXPERTS.fullmatch(key)
        if experts:
            return list(self._experts(**experts.groupdict()))
        name = self._name(key)
        if name.endswith(".attn_kv_b.weight") and name not in self.weights:
            return self._kv_b(name)
        if self.layout.tiled and ".linear_attn." in key:
            return list(self._linear(key, name))
        if self.layout.norms and re.fullmatch(self.layout.norms, name):
            return [Share(name, undo=lambda values: values.sub_(1))]
        kind = name.split(".")[-2:-1]
        if self.layout.permuted and kind in (["attn_q"], ["attn_k"]):
            keys = self.config.num_key_value_heads
            heads = keys if kind == ["attn_k"] else self.config.num_attention_heads
            return [Share(name, partial(rows_of_heads, heads))]
        return [Share(name)] if name else []

    def needless(self, name: str) -> bool:
        """Return whether no model has this tensor: transformers has no multi-token prediction."""
        block = re.match(r"blk\.(\d+)\.", name)
        return bool(COMPUTED.fullmatch(name) or (block and int(block[1]) >= self.layers))

    def _name(self, key: str) -> str:
        """Return the GGUF name of a parameter, or ""."""
        stem, _, suffix = key.rpartition(".")
        if suffix == "e_score_correction_bias":
            stem, suffix = f"{stem}.e_score_correction", "bias"
        elif suffix == "dt_bias":
            stem, suffix = f"{stem}.dt_proj", "bias"
        elif suffix not in ("weight", "bias"):
            stem, suffix = key, "" if suffix == "A_log" else "weight"  # attention sinks
        found = self.names.get_name(stem)
        return f"{found}.{suffix}".removesuffix(".") if found else ""

    def _experts(self, layer: str, which: str, bias: str | None) -> Iterator[Share]:
        down = self.names.get_name(f"{layer}.experts.down_proj") or ""
        suffix = ".bias" if bias else ".weight"
        fused = down.replace("ffn_down_exps", "ffn_gate_up_exps") + suffix
        if which == "gate_up" and fused in self.weights and self.layout.experts == "stacked":
            yield Share(fused)
            return
        halves = HALVES[which]
        for half, part in enumerate(halves):
            name = down.replace("ffn_down_exps", f"ffn_{part}_exps") + suffix
            yield Share(name, partial(_experts_half, self.layout.experts, half, len(halves)))

    def _kv_b(self, name: str) -> list[Share]:
        """Return the two shares of kv_b_proj: since April 2025 llama.cpp keeps it as two tensors.

        attn_k_b, transposed: (heads, kv_lora_rank, qk_nope), attn_v_b: (heads, v, kv_lora_rank).
        """
        names = [name.replace("attn_kv_b", part) for part in ("attn_k_b", "attn_v_b")]
        config = self.config
        sizes = (config.num_attention_heads, config.qk_nope_head_dim, config.v_head_dim)
        return [Share(one, partial(_part_of_kv_b, i, sizes)) for i, one in enumerate(names)]

    def _linear(self, key: str, name: str) -> Iterator[Share]:
        """Yield the shares of linear attention: value heads grouped by key head are tiled in files.

        Source: _LinearAttentionVReorderBase of llama.cpp's conversion/qwen.py.
        """
        config = self.config
        keys, size = config.linear_num_key_heads, config.linear_value_head_dim
        each = config.linear_num_value_heads // keys
        part = key.rpartition(".linear_attn.")[2].split(".")[0]
        if part in ("in_proj_qkv", "conv1d"):  # queries and keys before the values
            rows = 2 * config.linear_key_head_dim * keys
            columns = config.hidden_size if part == "in_proj_qkv" else config.linear_conv_kernel_dim
            yield Share(name, lambda parameter: parameter[:rows], 0)
            yield Share(
                name, lambda parameter: _tiled(keys, each, size, parameter[rows:]), rows * columns
            )
        elif part == "out_proj":
            yield Share(name, partial(_tiled, keys, each, size, dim=1))
        elif part in ("in_proj_z", "in_proj_a", "in_proj_b", "dt_bias", "A_log"):
            rows = size if part == "in_proj_z" else 1
            undo = (lambda values: values.neg_().log_()) if part == "A_log" else None
            yield Share(name, partial(_tiled, keys, each, rows), undo=undo)
        elif name:
            yield Share(name)


@lru_cache(maxsize=8)
def tensor_names(architecture: str, blocks: int) -> Any:
    """Return gguf-py's name map. architecture: one that gguf-py has."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, blocks)


def rows_of_heads(heads: int, parameter: Any) -> Any:
    """View rows of heads, (2, half), as llama.cpp's LlamaModel.permute orders them: (half, 2)."""
    rows = parameter.shape[0] // heads // 2
    return parameter.view(heads, 2, rows, *parameter.shape[1:]).swapaxes(1, 2)


def _tiled(keys: int, each: int, size: int, parameter: Any, dim: int = 0) -> Any:
    """View value heads, (key heads, value heads of each), as files have them: the other way."""
    return parameter.unflatten(dim, (keys, each, size)).swapaxes(dim, dim + 1)


def _experts_half(layout: str, half: int, halves: int, parameter: Any) -> Any:
    """View experts, or a half of each, as (experts, out, in), or (experts, out) for biases."""
    if layout == "stacked":
        return parameter.chunk(halves, 1)[half]
    turned = parameter.swapaxes(1, -1)
    return turned[:, half::halves] if layout == "interleaved" else turned.chunk(halves, 1)[half]


def _part_of_kv_b(part: int, sizes: tuple[int, int, int], parameter: Any) -> Any:
    """View the keys' part or the values'. sizes: heads, rows of keys (qk_nope), rows of values."""
    heads, keys, values = sizes
    split = parameter.view(heads, keys + values, parameter.shape[-1])
    return split[:, keys:] if part else split[:, :keys].swapaxes(1, 2)
