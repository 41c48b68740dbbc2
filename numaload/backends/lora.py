"""GGUF LoRA adapters, as llama.cpp's convert_lora_to_gguf.py writes them, put into PEFT.

::

    with open_adapter("adapter.gguf") as adapter:
        config = LoraConfig(**adapter.lora_config(model))
        state = adapter.state_dict(model=model)  # for peft.set_peft_model_state_dict

Safetensors adapters are loaded by peft and diffusers themselves: docs/lora.md.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from math import isfinite
from typing import Any, NamedTuple

from numaload.backends.gguf_layouts import MOST_LAYERS, PERMUTED, rows_of_heads, tensor_names
from numaload.dtypes import NAMES, dtype_name, kernel_dtype
from numaload.errors import (
    AdapterError,
    NotCopyable,
    UnsupportedTypeError,
    UsageError,
    printable,
)
from numaload.files.reader import Progress
from numaload.formats import gguf
from numaload.torch_memory import empty, float_dtype, of_bytes, torch_dtype
from numaload.weights import Tensor, Weights, open_weights

NameMap = Mapping[str, str] | Callable[[str], str | None]
View = Callable[[Any], Any]

PREFIX = "base_model.model."  # of every name in PEFT's files
HALF = re.compile(r"(?s)(?P<module>.+?)(\.weight)?\.lora_(?P<which>[ab])")
EMBEDDING = "token_embd"
MOST_TOKENS = 4096  # of the sequence that activates an aLoRA
# What llama.cpp's conversion of the architectures in PERMUTED only renames, attention heads aside.
RENAMED = re.compile(
    r"token_embd|output|blk\.(?P<layer>\d{1,6})\.(attn_(q|k|v|output|q_a|q_b|kv_a_mqa)"
    r"|ffn_(gate|up|down)(_shexp)?)"
)
ELSEWHERE = (
    "this is safetensors: peft (PeftModel.from_pretrained(model, FOLDER)) and diffusers"
    " (pipe.load_lora_weights(PATH)) load such adapters, after numaload.prewarm faster;"
    " only GGUF adapters are translated here"
)


class Pair(NamedTuple):
    """Both tensors of one module: ``scaling * B @ A`` is added to its weight.

    a: (rank, columns), of the token embedding (rows, rank), b: (rows, rank); of stacked experts
    with one dim more before these. alpha is None where the file has none, or 0.
    """

    a: Tensor
    b: Tensor
    rank: int
    alpha: float | None

    @property
    def scaling(self) -> float:
        """Return the factor of B @ A. Source: llama-adapter.h of llama.cpp, get_scale."""
        return self.alpha / self.rank if self.alpha else 1.0


class Adapter(NotCopyable):
    """A GGUF adapter that was opened; close it, or leave its ``with``, when it is loaded.

    pairs: {module as in the file, "blk.0.attn_q": Pair}. rank: that of most pairs. alpha: None
    where nothing is scaled. base_model: a name, or None.
    Raises: AdapterError for what is no LoRA adapter, and for tensors that are halves of no pair.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights, self.path = weights, weights.paths[0]
        if not isinstance(weights.parts[0].header, gguf.Header):
            raise AdapterError(ELSEWHERE, path=self.path)
        for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
            found = weights.metadata.get(key)
            if found != expected:
                what = "nothing" if found is None else repr(found)
                raise AdapterError(f"{key}: expected {expected!r}, found {what}", path=self.path)
        alpha = weights.metadata.get("adapter.lora.alpha", 0.0)
        if type(alpha) not in (int, float) or not isfinite(alpha):
            message = f"adapter.lora.alpha is {alpha!r}, expected a number"
            raise AdapterError(message, path=self.path)
        base = weights.metadata.get("general.base_model.0.name")
        self.alpha: float | None = alpha or None
        self.base_model = base if isinstance(base, str) else None
        self.architecture = str(weights.metadata.get("general.architecture", ""))
        self.pairs = dict(self._found())
        self.rank = Counter(pair.rank for pair in self.pairs.values()).most_common(1)[0][0]

    def _found(self) -> Iterator[tuple[str, Pair]]:
        halves: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.weights.items():
            match = HALF.fullmatch(name)
            if match is None:
                message = f"tensor {name!r} is no half of a LoRA pair: nothing here applies it"
                raise AdapterError(message, path=self.path)
            if halves.setdefault(match["module"], {}).setdefault(match["which"], tensor) != tensor:
                message = f"{match['module']!r} has two tensors for {match['which']}"
                raise AdapterError(message, path=self.path)
        if not halves:
            raise AdapterError("no LoRA adapter: it has no tensors", path=self.path)
        for module, half in halves.items():
            if len(half) < 2:
                (tensor,) = half.values()
                raise AdapterError(f"{tensor.name!r} has no other half", path=self.path)
            yield module, self._pair(module, half["a"], half["b"])

    def _pair(self, module: str, a: Tensor, b: Tensor) -> Pair:
        rank = a.shape[-1:] if module == EMBEDDING else a.shape[-2:-1]
        if len(a.shape) != len(b.shape) or rank != b.shape[-1:] or not rank[0]:
            message = f"{a.name!r} of shape {a.shape} and {b.name!r} of {b.shape} share no rank"
            raise AdapterError(message, path=self.path)
        return Pair(a, b, rank[0], self.alpha)

    def lora_config(self, model: Any = None, name_map: NameMap | None = None) -> dict[str, Any]:
        """Return the arguments for ``peft.LoraConfig``. model, name_map, errors: see state_dict."""
        modules = self._modules(model, name_map)
        # PEFT looks for the first pattern that matches the end of a module's name, or all of it.
        ranks = {
            f"^{re.escape(modules[module])}": pair.rank
            for module, pair in self.pairs.items()
            if pair.rank != self.rank
        }
        found = {
            "r": self.rank,
            "lora_alpha": self.alpha or self.rank,
            "target_modules": list(modules.values()),
            "rank_pattern": ranks,
            "alpha_pattern": {} if self.alpha else dict(ranks),
            "base_model_name_or_path": self.base_model,
            "inference_mode": True,
        }
        return found | self._activation()

    def _activation(self) -> dict[str, Any]:
        """Return what makes it an aLoRA, which counts only after a sequence of tokens."""
        key = "adapter.alora.invocation_tokens"
        tokens = self.weights.metadata.get(key)
        if tokens is None:
            return {}
        if not hasattr(tokens, "tolist") or not 0 < len(tokens) <= MOST_TOKENS:
            raise AdapterError(f"{key}: expected 1 to {MOST_TOKENS} numbers", path=self.path)
        return {"alora_invocation_tokens": tokens.tolist(), "task_type": "CAUSAL_LM"}

    def state_dict(
        self,
        dtype: Any = None,
        *,
        model: Any = None,
        name_map: NameMap | None = None,
        heads: tuple[int, int] | None = None,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Load all tensors in parallel into memory of their own; return them by PEFT's names.

        dtype: torch's, or a name; None keeps the file's, and makes float32 of quantized blocks.
        model: the torch module that the adapter is for, wrapped by PEFT or not: names are
        translated to those that it has. name_map does without: {module of the file: module of the
        model}, or a function. Architectures that are not known here need it: their tensors are
        taken to be only renamed, but for what heads says.
        heads: attention heads of queries and of keys whose rows llama.cpp permuted; by default
        what the model's config says where it does so.
        progress(bytes of the file done, in all): returning False cancels.
        Raises: UsageError where one of these is needed or does not fit, UnsupportedTypeError,
        NodeMemoryError before anything is read; ReadError, FileChangedError, CancelledError.
        """
        wanted = None if dtype is None else float_dtype(dtype)
        parts = list(self._parts(self._modules(model, name_map), heads, model))
        kinds = {name: _made(tensor, dtype) for name, tensor, _ in parts}
        # All at once, which hundreds of small tensors are not: what needs no change stays there.
        copied = self.weights.copied(progress)
        result = {
            name: _viewed(_values(copied[tensor.name], kinds[name]), view)
            for name, tensor, view in parts
        }
        return result if wanted is None else {name: one.to(wanted) for name, one in result.items()}

    def _parts(
        self, modules: Mapping[str, str], heads: tuple[int, int] | None, model: Any
    ) -> Iterator[tuple[str, Tensor, View]]:
        """Yield PEFT's name, the tensor, and a view of the result in the tensor's order."""
        for module, pair in self.pairs.items():
            name, embedding = f"{PREFIX}{modules[module]}.lora_", module == EMBEDDING
            a, b = ("embedding_A", "embedding_B") if embedding else ("A.weight", "B.weight")
            yield name + a, pair.a, _transposed if embedding else _same
            permuted = self._permuted(module, heads, model)
            yield name + b, pair.b, partial(_rows_of_heads, permuted) if permuted else _same

    def _permuted(self, module: str, heads: tuple[int, int] | None, model: Any) -> int:
        """Return how many heads of B have rows that llama.cpp permuted; 0: none."""
        which = {"attn_q": 0, "attn_k": 1}.get(module.rpartition(".")[2])
        permuted = PERMUTED.get(self.architecture)
        if which is None or permuted is False:
            return 0
        heads = heads or (_heads_of(model) if permuted else None)
        if heads is None:
            may = "permutes" if permuted else "may permute"
            raise UsageError(
                f"{module!r} of {self.architecture}: llama.cpp {may} the rows of attention heads,"
                " and the adapter does not say how many there are; give model=, or heads=(queries,"
                " keys), (0, 0) where none are permuted"
            )
        return heads[which]

    def _modules(self, model: Any, name_map: NameMap | None) -> dict[str, str]:
        """Return {module of the file: module of the model}."""
        for pair in self.pairs.values():
            if len(pair.a.shape) != 2:
                raise UnsupportedTypeError(
                    f"{pair.a.name!r}: PEFT has no names for adapters of stacked experts;"
                    " pairs has them as they are"
                )
        if name_map is None:
            found = dict(self._translated(model))
        else:
            get = name_map if callable(name_map) else name_map.get
            found = {module: get(module) or "" for module in self.pairs}
            if "" in found.values():
                absent = next(module for module, name in found.items() if not name)
                raise UsageError(f"name_map gives no module for {absent!r} of the adapter")
        name, count = Counter(found.values()).most_common(1)[0]
        if count > 1:
            raise UsageError(f"{self.path}: two modules of the adapter would both become {name!r}")
        return found

    def _translated(self, model: Any) -> Iterator[tuple[str, str]]:
        matches = {module: RENAMED.fullmatch(module) for module in self.pairs}
        unknown = next((module for module, match in matches.items() if match is None), None)
        if self.architecture not in PERMUTED or unknown:
            raise UsageError(
                f"{unknown or next(iter(matches))!r} of {self.architecture}: what llama.cpp's"
                " conversion does to it is not known here; if it is only renamed, give name_map="
            )
        if model is None:
            raise UsageError(f"{self.path}: names depend on the model; give model=, or name_map=")
        layers = 1 + max(int(match["layer"] or 0) for match in matches.values() if match)
        known, names = _module_names(model), _names(self.architecture, layers)
        for module in self.pairs:
            tried = names.get(module, [])
            fitting = [name for name in tried if name in known]
            if len(fitting) != 1:
                raise UsageError(
                    f"{module!r} of the adapter: of {', '.join(tried[:4])} ... the model should"
                    f" have one, and has {len(fitting)}; give name_map="
                )
            yield module, fitting[0]

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        about = f"{len(self.pairs)} modules, rank {self.rank}, alpha {self.alpha}"
        return printable(f"<Adapter {self.path}: {about}>")


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open a GGUF LoRA adapter: its header only.

    Raises: AdapterError for what is no such adapter; what ``numaload.open`` does.
    """
    weights = open_weights(path)
    try:
        return Adapter(weights)
    except BaseException:
        weights.close()
        raise


def _made(tensor: Tensor, dtype: Any) -> str:
    """Return the dtype that is made of it first."""
    tensor.check_type()
    if not tensor.has_kernel:
        raise UnsupportedTypeError(f"tensor {tensor.name!r}: {tensor.type_name} is no float here")
    own = NAMES.get(tensor.type_name, "float32")  # of blocks
    return own if dtype is None else kernel_dtype(dtype_name(dtype))


def _values(tensor: Tensor, dtype: str) -> Any:
    """Return a tensor of the copied file, in its place there if it has that dtype."""
    if NAMES.get(tensor.type_name) != dtype or tensor.byte_order == "big":
        return tensor.torch(dtype)
    return of_bytes(tensor.memory(), torch_dtype(dtype, tensor.name), tensor.shape)


def _viewed(values: Any, view: View) -> Any:
    """Return what these values are when that view is taken of it."""
    if view is _same:
        return values
    result = empty(values.shape[::-1] if view is _transposed else values.shape, values.dtype)
    place = view(result)
    place.copy_(values.view(place.shape))
    return result


def _same(result: Any) -> Any:
    return result


def _transposed(result: Any) -> Any:
    return result.T


def _rows_of_heads(heads: int, result: Any) -> Any:
    rows = result.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise UsageError(f"{rows} rows do not divide into {heads} attention heads of two halves")
    return rows_of_heads(heads, result)


def _heads_of(model: Any) -> tuple[int, int] | None:
    config = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    return queries, getattr(config, "num_key_value_heads", None) or queries


def _module_names(model: Any) -> set[str]:
    """Return the names of a model's modules, without what PEFT adds when it wraps a model."""
    names = (name for name, _ in model.named_modules())
    return {name.removeprefix(PREFIX).removesuffix(".base_layer") for name in names}


@lru_cache(maxsize=8)
def _names(architecture: str, layers: int) -> dict[str, list[str]]:
    """Return {module of a GGUF file: modules in gguf-py's map for it}."""
    if layers > MOST_LAYERS:
        raise AdapterError(f"found layer {layers - 1}: at most {MOST_LAYERS} layers are read")
    found: dict[str, list[str]] = {}
    for module, (_, tensor) in tensor_names(architecture, layers).mapping.items():
        if module != tensor:
            found.setdefault(tensor, []).append(module)
    return found
