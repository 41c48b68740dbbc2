"""The tensors of an adapter, put together to pairs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import islice
from math import isfinite
from typing import Any, NamedTuple, NoReturn

from numaload.backends import lora_config as configs
from numaload.backends import lora_names as names
from numaload.backends.lora_config import Said
from numaload.backends.lora_names import GGUF, Half
from numaload.errors import AdapterError
from numaload.weights import Tensor, Weights

SHOWN = 3  # names in an error
MOST_COMPARED = 1 << 20  # modules with patterns, each with each


class Pair(NamedTuple):
    """Both tensors of one module: ``scaling * B @ A`` is added to its weight.

    a: (rank, columns), b: (rows, rank); of convolutions with dims after these, of experts in GGUF
    files with one before them; of embeddings in GGUF files a is (columns, rank).
    alpha is None where the file says nothing.
    """

    a: Tensor
    b: Tensor
    rank: int
    alpha: float | None
    rslora: bool
    embedding: bool

    @property
    def scaling(self) -> float:
        return configs.scaling(self.alpha, self.rank, rslora=self.rslora)


def some(found: Iterable[str]) -> str:
    first = list(islice(found, SHOWN + 1))
    return ", ".join(first[:SHOWN]) + ", ..." * (len(first) > SHOWN)


def _matching(pattern: Mapping[str, Any], module: str, otherwise: Any) -> Any:
    """Return the value of the first key that matches the end of a module's name, as PEFT does.

    Keys that are regular expressions are not understood.
    """
    own = (value for key, value in pattern.items() if f".{module}".endswith(f".{key}"))
    return next(own, otherwise)


class Pairs:
    """Put the halves of a file together."""

    def __init__(self, weights: Weights, said: Said) -> None:
        self.weights, self.said, self.path = weights, said, weights.paths[0]
        self.halves: dict[str, dict[str, tuple[Half, Tensor]]] = {}
        self.others: dict[str, None] = {}
        for name, tensor in weights.items():
            half = names.half_of(name)
            if half is None:
                self.others[name] = None
            elif half.which in self.halves.setdefault(half.module, {}):
                self.fail(f"{half.module!r} has two tensors for {half.which.upper()}")
            else:
                self.halves[half.module][half.which] = half, tensor

    def fail(self, message: str) -> NoReturn:
        raise AdapterError(message, path=self.path)

    def found(self) -> tuple[str, dict[str, Pair], list[str]]:
        other = next((name for name in self.others if names.OTHERS.search(name)), None)
        if other is not None:
            self.fail(f"not only LoRA pairs: {other!r} is of another decomposition (LyCORIS)")
        if not self.halves:
            self.fail(
                f"not a LoRA adapter: none of its {len(self.weights)} tensors is half of a pair:"
                f" {some(self.others)}"
            )
        patterns = len(self.said.rank_pattern) + len(self.said.alpha_pattern)
        if patterns * len(self.halves) > MOST_COMPARED:
            self.fail(f"{patterns} patterns for {len(self.halves)} modules are too many")
        pairs = {module: self._pair(module, halves) for module, halves in self.halves.items()}
        kinds = Counter(half.kind for halves in self.halves.values() for half, _ in halves.values())
        return kinds.most_common(1)[0][0], pairs, list(self.others)

    def _pair(self, module: str, halves: dict[str, tuple[Half, Tensor]]) -> Pair:
        if len(halves) < 2:
            ((half, tensor),) = halves.values()
            self.fail(f"{tensor.name!r} has no other half")
        (half, a), (_, b) = halves["a"], halves["b"]
        rank = self._rank(half, a, b)
        alpha = self._own_alpha(module)
        if alpha is None:
            alpha = _matching(self.said.alpha_pattern, module, self.said.alpha)
        expected = _matching(self.said.rank_pattern, module, self.said.rank)
        if expected not in (None, rank) and not half.embedding and not self.said.rank_pattern:
            self.fail(f"{a.name!r} has rank {rank}, but the configuration says {expected}")
        return Pair(a, b, rank, alpha, self.said.rslora, half.embedding)

    def _rank(self, half: Half, a: Tensor, b: Tensor) -> int:
        """Return the dim that both halves share."""
        if half.kind == GGUF:
            first, second = (a.shape[-1:] if half.embedding else a.shape[-2:-1]), b.shape[-1:]
        else:
            first, second = a.shape[:1], b.shape[1:2]
        if len(a.shape) < 2 or first != second or not 0 < first[0] < configs.MAX_RANK:
            self.fail(f"{a.name!r} of shape {a.shape} and {b.name!r} of {b.shape} share no rank")
        return first[0]

    def _own_alpha(self, module: str) -> float | None:
        """Return the alpha that kohya's tools write as a tensor of one number; None without one."""
        name = module + names.ALPHA
        if name not in self.weights:
            return None
        del self.others[name]
        tensor = self.weights[name]
        if tensor.size != 1 or not tensor.has_kernel:
            self.fail(f"{name!r}: expected one float, found {tensor.type_name} {tensor.shape}")
        alpha = float(tensor.dequantize().reshape(-1)[0])
        if not isfinite(alpha):
            self.fail(f"{name!r} is {alpha}, expected a number")
        return alpha
