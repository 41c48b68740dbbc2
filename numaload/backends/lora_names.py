"""What the tensors of a LoRA adapter are called, and which module of a model they belong to.

A pair adds B @ A, scaled, to the weight of a module. Written down are, for A::

    PEFT        base_model.model.MODULE.lora_A.weight, MODULE.lora_embedding_A
    kohya       lora_unet_MODULE_WITH_UNDERSCORES.lora_down.weight, beside it .alpha
    diffusers   MODULE.lora.down.weight, MODULE.lora_linear_layer.down.weight,
                PARENT.processor.to_q_lora.down.weight
    GGUF        TENSOR.weight.lora_a, as convert_lora_to_gguf.py of llama.cpp writes it
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from numaload.backends.gguf_layouts import MOST_LAYERS, PERMUTED
from numaload.errors import AdapterError, UsageError

NameMap = Mapping[str, str] | Callable[[str], str | None]

PEFT, KOHYA, DIFFUSERS, GGUF = "peft", "kohya", "diffusers", "gguf"
# {end of a tensor's name: (whose it is, which half)}
ENDINGS: dict[str, tuple[str, str]] = {
    ".lora_A.weight": (PEFT, "a"), ".lora_B.weight": (PEFT, "b"),
    ".lora_A.default.weight": (PEFT, "a"), ".lora_B.default.weight": (PEFT, "b"),
    ".lora_embedding_A": (PEFT, "a"), ".lora_embedding_B": (PEFT, "b"),
    ".lora_embedding_A.default": (PEFT, "a"), ".lora_embedding_B.default": (PEFT, "b"),
    ".lora_down.weight": (KOHYA, "a"), ".lora_up.weight": (KOHYA, "b"),
    ".lora.down.weight": (DIFFUSERS, "a"), ".lora.up.weight": (DIFFUSERS, "b"),
    ".lora_linear_layer.down.weight": (DIFFUSERS, "a"),
    ".lora_linear_layer.up.weight": (DIFFUSERS, "b"),
    "_lora.down.weight": (DIFFUSERS, "a"), "_lora.up.weight": (DIFFUSERS, "b"),
    ".lora_a": (GGUF, "a"), ".lora_b": (GGUF, "b"),
}  # fmt: skip
PREFIX = "base_model.model."
ALPHA = ".alpha"
# Other decompositions than LoRA's that are kept under such names.
OTHERS = re.compile(r"\.(hada_|lokr_|lora_mid|oft_|boft_|glora_|diff(_b)?$)")
KOHYA_PREFIX = re.compile(r"lora_[a-z0-9]+_")
# Modules of transformers, where gguf-py's map has several for a tensor.
DENSE = re.compile(r"model\.embed_tokens|lm_head|model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj\w*")
LAYER = re.compile(r"blk\.(\d{1,6})\.")


class Half(NamedTuple):
    """One tensor of a pair."""

    kind: str
    module: str  # as the file has it, without PEFT's prefix
    which: str  # "a" or "b"
    embedding: bool


def half_of(name: str) -> Half | None:
    """Return which half of which pair a tensor is; None where it is no half."""
    ending = next((end for end in ENDINGS if name.endswith(end)), None)
    if ending is None:
        return None
    kind, which = ENDINGS[ending]
    module = name.removesuffix(ending).removeprefix(PREFIX)
    embedding = "embedding" in ending
    if kind == GGUF:
        module = module.removesuffix(".weight")
        embedding = module == "token_embd"
    if ending.startswith("_lora"):
        # Attention processors of diffusers: attn1.processor.to_out_lora is of attn1.to_out.0.
        module = module.replace(".processor.", ".")
        module += ".0" * module.endswith(".to_out")
    return Half(kind, module, which, embedding)


class Modules:
    """Translate the modules that a file names to those of a model.

    model: a torch module; without it names are translated as far as they tell. name_map: {module
    of the file: module of the model} or a function, used instead of everything else.
    """

    def __init__(
        self, kind: str, architecture: str, model: Any = None, name_map: NameMap | None = None
    ) -> None:
        self.kind, self.architecture, self.name_map = kind, architecture, name_map
        self.known = None if model is None else _module_names(model)
        self.flat = {name.replace(".", "_"): name for name in self.known or ()}

    def translate(self, module: str, layers: int) -> str:
        """Return the model's name of a module. Raises: UsageError that says what is needed."""
        if self.name_map is not None:
            mapped = self.name_map
            found = mapped(module) if callable(mapped) else mapped.get(module)
            if found is None:
                raise UsageError(f"name_map gives no module for {module!r} of the adapter")
            return found
        if self.kind == PEFT:
            return module  # where the model has another name for it, PEFT converts it
        candidates = list(self._candidates(module, layers))
        if self.known is None:
            return self._likely(module, candidates)
        found = next((name for name in candidates if name in self.known), None)
        if found is None:
            tried = ", ".join(candidates[:4]) or "no name"
            raise UsageError(
                f"the model has no module for {module!r} of the adapter; tried: {tried}"
            )
        return found

    def _candidates(self, module: str, layers: int) -> Iterable[str]:
        if self.kind == GGUF:
            return _transformers_names(self.architecture, layers).get(module, ())
        short = KOHYA_PREFIX.sub("", module, count=1)
        flat = (self.flat[name] for name in (module, short) if name in self.flat)
        return (module, module.partition(".")[2] or module, *flat)

    def _likely(self, module: str, candidates: list[str]) -> str:
        """Choose a candidate without a model to look at. Raises: UsageError where several fit."""
        if self.kind == GGUF:
            dense = [name for name in candidates if DENSE.fullmatch(name)]
            if not dense or self.architecture not in PERMUTED:
                raise UsageError(
                    f"{module!r} of {self.architecture}: which module it belongs to depends on"
                    " the model; give model=, or name_map="
                )
            return dense[0]
        if self.kind == KOHYA and "." not in module:
            raise UsageError(
                f"{module!r} could be several modules: kohya's names have _ for every dot;"
                " give model=, or name_map="
            )
        return module


def _module_names(model: Any) -> set[str]:
    """Return the names of a model's modules, without what PEFT adds when it wraps a model."""
    names = (name for name, _ in model.named_modules())
    return {name.removeprefix(PREFIX).removesuffix(".base_layer") for name in names}


@lru_cache(maxsize=8)
def _transformers_names(architecture: str, layers: int) -> dict[str, list[str]]:
    """Return {tensor of a GGUF file, without .weight: modules in gguf-py's map for it}."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    if layers > MOST_LAYERS:
        raise AdapterError(f"found layer {layers - 1}: at most {MOST_LAYERS} layers are read")
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    if arch is None:
        raise UsageError(f"architecture {architecture!r} is unknown to gguf-py; give name_map=")
    found: dict[str, list[str]] = {}
    for module, (_, tensor) in get_tensor_name_map(arch, layers).mapping.items():
        if module != tensor:
            found.setdefault(tensor, []).append(module)
    return found


def heads_of(module: str, architecture: str, heads: tuple[int, int] | None) -> int:
    """Return how many heads of B have rows that llama.cpp permuted; 0: none. Raises: UsageError."""
    which = {"attn_q": 0, "attn_k": 1}.get(module.rpartition(".")[2])
    if which is None or not PERMUTED.get(architecture):
        return 0
    if heads is None:
        raise UsageError(
            f"{module!r} of {architecture}: llama.cpp permutes the rows of attention heads, and the"
            " adapter does not say how many there are; give model=, or heads=(queries, keys)"
        )
    return heads[which]


def layers_of(modules: Iterable[str]) -> int:
    """Count layers: one more than the highest number of a layer in a GGUF file."""
    found = [int(match[1]) for match in map(LAYER.match, modules) if match]
    return 1 + max(found, default=0)
