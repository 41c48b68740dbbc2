"""A model of transformers from a GGUF file: read here, in parallel, loaded by transformers itself.

Its ``from_pretrained`` gets a state dict of new tensors, which become the parameters: what
transformers does with weights, buffers, devices and adapters is its own.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from copy import deepcopy
from math import prod
from typing import Any

import torch
import transformers

from numaload.backends.gguf_config import config_of
from numaload.backends.gguf_layouts import Names, Share
from numaload.dtypes import KERNEL_DTYPES, dtype_name
from numaload.errors import StateDictError, UsageError, listed, printable
from numaload.files.reader import Progress
from numaload.machine import memory
from numaload.pipeline import Target, fill
from numaload.torch_memory import array_of, empty, float_dtype
from numaload.weights import Tensor, Weights, open_weights


def from_pretrained(
    model: str | os.PathLike[str] | Weights,
    *,
    config: Any = None,
    dtype: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Any:
    """Return a model of transformers with the weights of a GGUF file, dequantized.

    model: a path, any file of a split one, or opened weights, also of a replica.
    config: transformers' configuration; by default it is made from the file's metadata.
    dtype: of the parameters; by default the configuration's, or torch's default. What transformers
    keeps in float32 is made in float32.
    progress(bytes of the files done, in all): False cancels.
    options: of the class's own ``from_pretrained``: device_map, attn_implementation...
    Raises: UsageError for an architecture or a metadata key that is not known here; StateDictError
    for parameters and tensors that do not fit each other; what ``numaload.open`` raises;
    NodeMemoryError, UnsupportedTypeError, ReadError, FileChangedError, CancelledError.
    """
    if "state_dict" in options:
        raise UsageError("state_dict: the weights are those of the file")
    dtype = options.pop("torch_dtype", dtype)  # as transformers called it before version 5
    if config is not None and not isinstance(config, transformers.PretrainedConfig):
        how = "transformers.AutoConfig.from_pretrained(folder)"
        raise UsageError(f"config: expected what {how} returns, found {config!r}")
    with nullcontext(model) if isinstance(model, Weights) else open_weights(model) as weights:
        config = config_of(weights) if config is None else config
        if dtype is None or dtype == "auto":
            dtype = config.dtype or torch.get_default_dtype()
        kind, dtype = _class_of(config), float_dtype(dtype)
        if dtype_name(dtype) not in KERNEL_DTYPES:
            raise UsageError(f"dtype {dtype}: expected {', '.join(KERNEL_DTYPES)}")
        try:
            with torch.device("meta"):
                plan = _Plan(kind(deepcopy(config)), weights, config)
        except (StateDictError, UsageError):
            raise
        except Exception as error:  # each class has its own
            text = f"{kind.__name__} cannot be made of its configuration: {printable(error)}"
            raise UsageError(f"{weights.paths[0]}: {text}") from error
        state, path = plan.filled(dtype, progress), weights.paths[0]
    asked = options.pop("output_loading_info", False)
    options |= {"config": config, "state_dict": state, "dtype": dtype, "output_loading_info": True}
    loaded, info = kind.from_pretrained(None, **options)
    lost = {name: found for name, found in info.items() if found}
    if lost:
        raise StateDictError(f"{path}: transformers says of its weights: {lost}")
    loaded.name_or_path = loaded.config.name_or_path = path
    return (loaded, info) if asked else loaded


def _class_of(config: Any) -> Any:
    """Return the class that the configuration names, or transformers has for it."""
    known = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    found = getattr(transformers, (config.architectures or [""])[0], known)
    if found is None:
        raise UsageError(f"config: transformers has no language model for {type(config).__name__}")
    return found


class _Plan:
    """Decide which tensors every parameter is made of. Raises: StateDictError."""

    def __init__(self, empty_model: Any, weights: Weights, config: Any) -> None:
        self.model, self.weights, self.names = empty_model, weights, Names(weights, config)
        self.tensors: dict[str, Any] = {}  # of the model, on meta
        self.shares: dict[str, list[Share]] = {}
        tied: dict[int, list[str]] = {}
        for key, tensor in empty_model.state_dict(keep_vars=True).items():
            tied.setdefault(id(tensor), []).append(key)
            self.tensors[key] = tensor
        self.used: set[str] = set()
        missing = [keys[0] for keys in tied.values() if not self._find(keys)]
        if not any(key.endswith("lm_head.weight") for key in self.tensors):
            self.used.add("output.weight")  # of a class that the caller named, without a head
        unused = [n for n in weights if n not in self.used and not self.names.needless(n)]
        kinds = {"made of no tensor": missing, "of no parameter": unused}
        errors = [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
        errors += filter(None, map(self._mismatch, self.shares))
        if errors:
            lines = "".join(f"\n\t{error}" for error in errors)
            raise StateDictError(
                f"{type(empty_model).__name__} from {printable(weights.paths[0])}: give the config="
                f" of the original model, or its file:{lines}",
                missing=missing,
                unexpected=unused,
            )

    def _find(self, keys: list[str]) -> bool:
        """Note the shares of the first tied name whose tensors are all there."""
        for key in keys:
            shares = self.names.shares(key)
            if shares and all(share.name in self.weights for share in shares):
                tensors = [self.weights[share.name] for share in shares]
                self.used.update(n for one in tensors for n in (one.name, *one.scale_names))
                if self.shares.keys().isdisjoint(keys):
                    self.shares[key] = shares
        return not self.shares.keys().isdisjoint(keys)

    def _mismatch(self, key: str) -> str:
        """Say why a tensor does not fit, or "". Dims of 1 make no difference: GGUF drops some."""
        parameter = self.tensors[key]
        for share in self.shares[key]:
            shape = self.weights[share.name].shape
            try:
                place = share.view(parameter)
            except (RuntimeError, IndexError) as error:  # of torch: the sizes do not divide so
                return f"{key} of {tuple(parameter.shape)} from {shape}: {error}"
            whole = place if share.first is None else parameter
            kinds = (_squeezed(whole.shape), _squeezed(parameter.shape))
            if whole.numel() != prod(shape) or _squeezed(shape) not in kinds:
                return f"{key} is {tuple(parameter.shape)}, {share.name} in the file {shape}"
        return ""

    def filled(self, dtype: Any, progress: Progress | None) -> dict[str, Any]:
        """Return the parameters, in new memory."""
        dtypes = {key: self._dtype(key, dtype) for key in self.shares}
        nbytes = sum(self.tensors[key].numel() * one.itemsize for key, one in dtypes.items())
        memory.require(nbytes, "the parameters", "nothing was loaded: free memory")
        state = {key: empty(self.tensors[key].shape, one) for key, one in dtypes.items()}
        targets = [
            _target(self.weights[share.name], share, state[key])
            for key, shares in self.shares.items()
            for share in shares
        ]
        fill(sorted(targets, key=lambda target: target.order), progress=progress)
        for key, shares in self.shares.items():
            for share in shares:
                if share.undo:
                    share.undo(state[key])
        return state

    def _dtype(self, key: str, dtype: Any) -> Any:
        """Return what to make: float32 is rounded by transformers, once, if it wants less."""
        kept = [getattr(self.model, f"_keep_in_fp32_modules{end}", ()) for end in ("", "_strict")]
        named = any(name in key for names in kept for name in names or ())
        return torch.float32 if named or self.tensors[key].ndim < 2 else dtype


def _target(tensor: Tensor, share: Share, parameter: Any) -> Target:
    tensor.check_type()
    place = array_of(share.view(parameter))
    return Target(tensor, place, dtype_name(parameter.dtype), share.first or 0)


def _squeezed(shape: Any) -> list[int]:
    return [dim for dim in shape if dim != 1]
