"""LoRA adapters: what they are, and their tensors in parallel, as PEFT names them.

::

    with open_adapter("adapter") as adapter:  # a PEFT folder, a safetensors file, a GGUF file
        config = LoraConfig(**adapter.lora_config())
        state = adapter.state_dict()  # for peft.set_peft_model_state_dict
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from numaload.backends import lora_config as configs
from numaload.backends import lora_names as names
from numaload.backends.lora_config import Said
from numaload.backends.lora_fill import Load, load_all
from numaload.backends.lora_names import GGUF, PEFT, PREFIX, Modules, NameMap
from numaload.backends.lora_pairs import Pair, Pairs, some
from numaload.dtypes import dtype_name
from numaload.errors import (
    AdapterError,
    NotCopyable,
    UnsupportedTypeError,
    UsageError,
    printable,
    warn_once,
)
from numaload.files.reader import Progress
from numaload.files.source import absolute
from numaload.formats import gguf
from numaload.torch_memory import torch_dtype
from numaload.weights import Weights, open_weights

WEIGHTS = "adapter_model.safetensors"


class Adapter(NotCopyable):
    """A LoRA adapter that was opened; close it, or leave its ``with``, when it is loaded.

    kind: "peft", "kohya", "diffusers" or "gguf". pairs: {module as in the file: Pair}.
    others: names of tensors that are halves of no pair (saved modules, magnitudes, norms).
    config: all of adapter_config.json, if there is one. base_model: a name or path, or None.
    """

    def __init__(self, weights: Weights, said: Said) -> None:
        self.weights, self.config, self.base_model = weights, said.config, said.base_model
        self._said, self.path = said, weights.paths[0]
        self.kind, self.pairs, self.others = Pairs(weights, said).found()
        ranks = Counter(pair.rank for pair in self.pairs.values())
        alphas = Counter(pair.alpha for pair in self.pairs.values())
        self.rank = said.rank or ranks.most_common(1)[0][0]
        self.alpha = said.alpha if said.alpha is not None else alphas.most_common(1)[0][0]

    @property
    def scaling(self) -> float:
        """Return the factor of B @ A, for all pairs that have no factor of their own."""
        return configs.scaling(self.alpha, self.rank, rslora=self._said.rslora)

    @property
    def target_modules(self) -> list[str]:
        """Return the configured modules, else the last words of the modules that have a pair."""
        return sorted(self._said.target_modules or {m.rpartition(".")[2] for m in self.pairs})

    @property
    def architecture(self) -> str:
        """Return the model's architecture as a GGUF file names it."""
        return str(self.weights.metadata.get("general.architecture", ""))

    def lora_config(self, model: Any = None, name_map: NameMap | None = None) -> dict[str, Any]:
        """Return the arguments for ``peft.LoraConfig``. model, name_map: as in ``state_dict``."""
        passed = {key: self.config[key] for key in configs.PASSED if key in self.config}
        fixed = {"r": self.rank, "lora_alpha": self.alpha or self.rank, "inference_mode": True}
        if self.config:
            patterns = {
                key: self.config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")
            }
            return passed | fixed | patterns
        modules = self._modules(model, name_map)
        pairs = {modules[name]: pair for name, pair in self.pairs.items()}
        return fixed | {
            "target_modules": list(pairs),
            "rank_pattern": {m: p.rank for m, p in pairs.items() if p.rank != self.rank},
            "alpha_pattern": {m: p.alpha or p.rank for m, p in pairs.items() if self._differs(p)},
            "base_model_name_or_path": self.base_model,
        }

    def _differs(self, pair: Pair) -> bool:
        return (pair.alpha or pair.rank) != (self.alpha or self.rank)

    def state_dict(
        self,
        dtype: Any = None,
        *,
        model: Any = None,
        name_map: NameMap | None = None,
        heads: tuple[int, int] | None = None,
        copy: bool = True,
        progress: Progress | None = None,
    ) -> dict[str, Any]:
        """Load all tensors in parallel into memory of their own; return them by PEFT's names.

        dtype: torch's, or a name; None keeps the file's, and makes float32 of quantized blocks.
        model: the torch module that the adapter is for, wrapped by PEFT or not. kohya's names, and
        those of most GGUF architectures, tell the module only together with it. name_map does
        without: {module of the file: module of the model}, or a function.
        heads: attention heads of queries and of keys, where llama.cpp permuted their rows; by
        default what the model's config says.
        copy False: what is wanted as it is in the file is mapped from there, not loaded: read-only,
        and writing to it ends the process.
        progress(bytes of the file done, in all): returning False cancels.
        Raises: UsageError where one of these is needed, AdapterError, UnsupportedTypeError,
        NodeMemoryError before anything is read; ReadError, FileChangedError, CancelledError.
        """
        wanted = None if dtype is None else torch_dtype(dtype_name(dtype), self.path)
        modules = self._modules(model, name_map)
        loads = list(self._loads(modules, heads or _heads(model)))
        if len({load.name for load in loads}) != len(loads):
            twice = Counter(load.name for load in loads).most_common(1)[0][0]
            raise AdapterError(f"two tensors would both become {twice!r}", path=self.path)
        return load_all(self.weights, loads, wanted, progress, copy=copy)

    def _modules(self, model: Any, name_map: NameMap | None) -> dict[str, str]:
        modules = Modules(self.kind, self.architecture, model, name_map)
        layers = names.layers_of(self.pairs)
        found = {module: modules.translate(module, layers) for module in self.pairs}
        if len(set(found.values())) != len(found):
            twice = Counter(found.values()).most_common(1)[0][0]
            raise UsageError(f"{self.path}: two modules of the adapter would both become {twice!r}")
        return found

    def _loads(self, modules: Mapping[str, str], heads: tuple[int, int] | None) -> Iterator[Load]:
        for module, pair in self.pairs.items():
            if self.kind == GGUF and max(len(pair.a.shape), len(pair.b.shape)) > 2:
                raise UnsupportedTypeError(
                    f"{pair.a.name!r}: experts of GGUF adapters are not translated to PEFT's names;"
                    " pairs has them as they are"
                )
            a, b = ("embedding_A", "embedding_B") if pair.embedding else ("A.weight", "B.weight")
            name = f"{PREFIX}{modules[module]}.lora_"
            turned = pair.embedding and self.kind == GGUF
            shape, view = (pair.a.shape[::-1], _transposed) if turned else (None, None)
            yield Load(name + a, pair.a, shape, view)
            permuted = self.kind == GGUF and names.heads_of(module, self.architecture, heads)
            yield Load(
                name + b, pair.b, None, partial(_rows_of_heads, permuted) if permuted else None
            )
        if self.kind == PEFT:
            for name in self.others:
                yield Load(PREFIX + name.removeprefix(PREFIX), self.weights[name])
        elif self.others:
            warn_once(
                f"lora-others-{self.path}",
                f"{self.path}: {len(self.others)} tensors belong to no LoRA pair and are left out:"
                f" {some(self.others)}",
            )

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return printable(
            f"<Adapter {self.path}: {self.kind}, {len(self.pairs)} modules, rank {self.rank},"
            f" alpha {self.alpha}>"
        )


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open a LoRA adapter: headers and configuration only.

    path: a PEFT folder, its weights or other safetensors files of LoRA pairs, or a GGUF adapter.
    Raises: AdapterError for what is no adapter or cannot be one; what ``numaload.open`` does.
    """
    given = absolute(os.fsdecode(path))
    inside = os.path.join(given, WEIGHTS)
    weights = open_weights(inside if os.path.exists(inside) else given)
    try:
        return Adapter(weights, _said(weights, given))
    except BaseException:
        weights.close()
        raise


def _said(weights: Weights, given: str) -> Said:
    if isinstance(weights.parts[0].header, gguf.Header):
        return configs.from_metadata(weights.metadata, weights.paths[0])
    beside = configs.config_beside(given)
    return Said() if beside is None else configs.from_file(beside)


def _transposed(result: Any) -> Any:
    return result.T


def _rows_of_heads(heads: int, result: Any) -> Any:
    """View the rows of heads, (half, 2) in llama.cpp, as transformers has them: (2, half)."""
    rows, rank = result.shape
    if rows % (2 * heads):
        raise UsageError(f"{rows} rows do not divide into {heads} attention heads of two halves")
    return result.view(heads, 2, -1, rank).swapaxes(1, 2)


def _heads(model: Any) -> tuple[int, int] | None:
    config = getattr(model, "config", None)
    queries = getattr(config, "num_attention_heads", None)
    if not isinstance(queries, int):
        return None
    return queries, getattr(config, "num_key_value_heads", None) or queries
