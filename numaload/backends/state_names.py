"""Which tensors of a file a parameter of a module is made of, by their names.

GGUF files have llama.cpp's names and layouts: gguf-py's name maps translate the names, and what
convert_hf_to_gguf.py of llama.cpp changes beyond names is undone by the view of each share:
rows of attention heads permuted for rotary embeddings, experts stacked, kv_b_proj of deepseek2 in
two, its first half transposed. Safetensors files have a module's own names, but for experts that
transformers 5 fused after the files were written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

from numaload.errors import UsageError
from numaload.weights import Weights

View = Callable[[Any], Any]
NameMap = Mapping[str, str] | Callable[[str], str | None]


class Share(NamedTuple):
    """One tensor of the file, or one of its experts, and the part of a parameter that it is.

    view: of the whole parameter as a torch tensor, that part in the order of the tensor's elements.
    """

    name: str
    view: View
    expert: int | None = None


def whole(parameter: Any) -> Any:
    return parameter


# Architectures whose layout is known here, and whether llama.cpp permutes rows of attn_q, attn_k.
PERMUTED = {
    "llama": True, "qwen2": False, "qwen2moe": False, "qwen3": False, "qwen3moe": False,
    "deepseek2": False,
}  # fmt: skip
# Tensors of GGUF files that no module has: it computes them from its configuration.
COMPUTED = re.compile(r"(blk\.\d+\.)?rope_(freqs|factors_long|factors_short)\.weight")
# gguf-py's maps have hundreds of names for each. Source: LLAMA_MAX_LAYERS of llama.cpp.
MOST_LAYERS = 512
EXPERTS = re.compile(r"(?P<layer>.*)\.experts\.(?P<which>gate_up|down)_proj")
EXPERT = re.compile(
    r"(?P<layer>.*)\.experts\.(?P<number>\d+)\.(?P<which>gate|up|down)_proj\.weight"
)
# {fused parameter of transformers 5: (name of each half in files of one tensor per expert)}
HALVES = {"gate_up": ("gate", "up"), "down": ("down",)}


def shares_of(weights: Weights, keys: Mapping[str, Any], name_map: NameMap | None) -> Shares:
    """Return a function that finds every key's tensors. keys: {name in the module: its tensor}.

    Raises: UsageError for a GGUF architecture whose layout is not known here.
    """
    if name_map is not None:
        return partial(_by_map, name_map)
    if any(key in weights for key in keys) or "general.architecture" not in weights.metadata:
        return partial(_by_own_name, weights)
    return _Gguf(weights).shares


Shares = Callable[[str, Any], list[Share]]


def _by_map(name_map: NameMap, key: str, _: Any) -> list[Share]:
    found = name_map(key) if callable(name_map) else name_map.get(key, key)
    return [] if found is None else [Share(found, whole)]


def _by_own_name(weights: Weights, key: str, parameter: Any) -> list[Share]:
    experts = EXPERTS.fullmatch(key)
    if key in weights or experts is None or parameter.ndim != 3:
        return [Share(key, whole)]
    stem, halves = f"{experts['layer']}.experts", HALVES[experts["which"]]
    return [
        Share(
            f"{stem}.{number}.{name}_proj.weight",
            partial(_part_of_expert, number, half, len(halves)),
        )
        for number in range(parameter.shape[0])
        for half, name in enumerate(halves)
    ]


def _part_of_expert(expert: int, half: int, halves: int, parameter: Any) -> Any:
    return parameter[expert].chunk(halves)[half]


class _Gguf:
    """Names of one GGUF model."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.metadata = weights, weights.metadata
        self.architecture = str(self.metadata["general.architecture"])
        if self.architecture not in PERMUTED:
            raise UsageError(
                f"{weights.paths[0]}: architecture {self.architecture!r}: how llama.cpp lays out"
                f" its tensors is known here for {', '.join(PERMUTED)}; give name_map= (a dict of"
                " module key to tensor name, or a function) for one whose tensors are only renamed"
            )
        self.names = _tensor_names(self.architecture, self._number("block_count", most=MOST_LAYERS))

    def shares(self, key: str, parameter: Any) -> list[Share]:
        stem, dot, suffix = key.rpartition(".")
        if suffix == "e_score_correction_bias":
            return self._renamed(f"{stem}.e_score_correction", ".bias")
        experts, expert = EXPERTS.fullmatch(key), EXPERT.fullmatch(key)
        if experts and parameter.ndim == 3:
            return list(self._fused(experts["layer"], experts["which"]))
        if expert:
            return self._one_expert(expert)
        if suffix in ("weight", "bias"):
            return self._renamed(stem, dot + suffix)
        return self._renamed(key, "")

    def _renamed(self, stem: str, suffix: str) -> list[Share]:
        found = self.names.get_name(stem)
        name = f"{found}{suffix}" if found else ""
        if name.endswith(".attn_kv_b.weight") and name not in self.weights:
            return self._kv_b(name)
        kind = name.split(".")[-2:-1]
        if PERMUTED[self.architecture] and kind in (["attn_q"], ["attn_k"]):
            heads = self._number("attention.head_count")
            if kind == ["attn_k"]:
                heads = self._number("attention.head_count_kv", heads)
            return [Share(name, partial(_unpermuted, heads))]
        return [Share(name, whole)] if name else []

    def _fused(self, layer: str, which: str) -> Iterator[Share]:
        down = self.names.get_name(f"{layer}.experts.down_proj") or ""
        for half, part in enumerate(HALVES[which]):
            name = down.replace("ffn_down_exps", f"ffn_{part}_exps") + ".weight"
            yield Share(name, partial(_half_of_experts, half, len(HALVES[which])))

    def _one_expert(self, found: re.Match[str]) -> list[Share]:
        down = self.names.get_name(f"{found['layer']}.experts.down_proj") or ""
        name = down.replace("ffn_down_exps", f"ffn_{found['which']}_exps") + ".weight"
        return [Share(name, whole, int(found["number"]))]

    def _kv_b(self, name: str) -> list[Share]:
        """Return the two shares of kv_b_proj: since April 2025 llama.cpp keeps it as two tensors.

        attn_k_b, transposed: (heads, kv_lora_rank, qk_nope), attn_v_b: (heads, v, kv_lora_rank).
        """
        names = [name.replace("attn_kv_b", part) for part in ("attn_k_b", "attn_v_b")]
        if not all(one in self.weights and len(self.weights[one].shape) == 3 for one in names):
            return [Share(name, whole)]
        keys, values = (self.weights[one].shape for one in names)
        sizes = (keys[0], keys[2], values[1])
        return [Share(one, partial(_part_of_kv_b, i, sizes)) for i, one in enumerate(names)]

    def _number(self, key: str, default: int | None = None, most: int = 1 << 20) -> int:
        full = f"{self.architecture}.{key}"
        value = self.metadata.get(full, default)
        if type(value) is not int or not 0 < value <= most:
            found = "nothing" if value is None else repr(value)
            raise UsageError(
                f"{self.weights.paths[0]}: {full}: expected a number, 1 to {most}, found {found}"
            )
        return value


@lru_cache(maxsize=8)
def _tensor_names(architecture: str, blocks: int) -> Any:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    return get_tensor_name_map(arch, blocks)


def _unpermuted(heads: int, parameter: Any) -> Any:
    """View rows of heads, (2, half), as llama.cpp's LlamaModel.permute orders them: (half, 2)."""
    rows = parameter.shape[0] // heads // 2
    return parameter.view(heads, 2, rows, *parameter.shape[1:]).swapaxes(1, 2)


def _half_of_experts(half: int, halves: int, parameter: Any) -> Any:
    return parameter.chunk(halves, 1)[half]


def _part_of_kv_b(part: int, sizes: tuple[int, int, int], parameter: Any) -> Any:
    """View the keys' part or the values'. sizes: heads, rows of keys (qk_nope), rows of values."""
    heads, keys, values = sizes
    split = parameter.view(heads, keys + values, parameter.shape[-1])
    return split[:, keys:] if part else split[:, :keys].swapaxes(1, 2)
