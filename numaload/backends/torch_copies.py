"""The copies that torch's own ``load_state_dict`` makes, written down instead of made.

torch decides everything: names, sizes, hooks, modules that load in a way of their own, the words of
its errors. It is given stand-ins for the tensors of a file, which know only what they stand for.
Where it copies one into a parameter, that is recorded; the values follow when all is known to fit.
Whoever computes with a stand-in, such as a hook for older files, computes with its values.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from numaload.dtypes import NAMES, dtype_name, item_shape, kernel_dtype
from numaload.errors import StateDictError
from numaload.files.reader import Progress
from numaload.pipeline import Target, fill
from numaload.torch_memory import array_of, new, torch_dtype, torch_type, unfit
from numaload.weights import Tensor

# What says or changes what a tensor is, whatever its values are.
PROPERTIES = {
    "device", "dtype", "is_meta", "is_nested", "itemsize", "layout", "names", "ndim",
    "requires_grad", "shape",
}  # fmt: skip
METHODS = {
    "__hash__", "__len__", "dim", "element_size", "is_contiguous", "is_floating_point", "numel",
    "requires_grad_", "size", "stride",
}  # fmt: skip


def _describes(function: Any) -> bool:
    if function.__name__ in ("__get__", "__set__"):
        return getattr(function.__self__, "__name__", "") in PROPERTIES
    return function.__name__ in METHODS


class StandIn(torch.Tensor):  # type: ignore[misc]
    """A tensor on the meta device that stands for one of a file."""

    tensor: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # torch's names
        """Answer what it is; for all else read it."""
        if _describes(func):
            return super().__torch_function__(func, types, args, kwargs)
        args, kwargs = tree_map_only(StandIn, StandIn.values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def values(self, dtype: str = "", progress: Progress | None = None) -> Any:
        """Read the tensor, in parallel, into memory of its own; blocks become float32 by default.

        dtype: where kernels make it; other types stay as in the file.
        Raises: as ``numaload.pipeline.fill``, NodeMemoryError, UnsupportedTypeError.
        """
        tensor, name = self.tensor, kernel_dtype(dtype or dtype_name(self.dtype))
        if not tensor.has_kernel:
            tensor.check_native()
            name = dtype_name(self.dtype)
        made = new(tuple(self.shape), torch_dtype(name, tensor.name), tensor.name)
        raw = None if not tensor.has_kernel else name
        fill([Target(tensor, array_of(made), raw)], progress=progress)
        return made


def stand_in(tensor: Tensor) -> StandIn:
    """Return what stands for this tensor. Raises: UnsupportedTypeError if torch has no type."""
    numbers = tensor.type_name in NAMES and tensor.scales is None
    dtype = torch_type(tensor.type_name) if numbers else torch.float32
    shape = item_shape(tensor.type_name, tensor.shape, tensor.name)
    made: StandIn = torch.empty(shape, dtype=dtype, device="meta").as_subclass(StandIn)
    made.tensor = tensor
    return made


class Recording(TorchFunctionMode):  # type: ignore[misc]
    """While entered, record what is copied whole into one of these tensors; nothing is touched."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__()
        self.tensors = {id(tensor): tensor for tensor in tensors}
        self.copies: dict[int, Any] = {}  # {id of the tensor: what goes there}, the last one counts

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # torch's names
        """Record a copy. Raises: StateDictError if it cannot be made, or is computed with."""
        if func is torch.Tensor.copy_ and self._is_whole(*args[:2]) and not kwargs:
            problem = unfit(args[0])
            if problem:
                raise StateDictError(problem)
            self.copies[id(args[0])] = args[1]
            return args[0]
        if func == torch.Tensor.is_meta.__get__ and id(args[0]) in self.tensors:
            return False  # it gets memory; else torch warns of copies that have no effect
        if not _describes(func):
            self._check_unread((args, kwargs))
        return func(*args, **kwargs or {})

    def _is_whole(self, target: Any, source: Any) -> bool:
        return id(target) in self.tensors and target.shape == source.shape

    def _check_unread(self, arguments: Any) -> None:
        """Check that nobody computes with what is not there yet. Raises: StateDictError."""
        if any(id(one) in self.copies for one in tree_leaves(arguments)):
            raise StateDictError(
                "a hook, or a module's own way of loading, computes with parameters that were just"
                " loaded, which numaload fills last. Nothing was loaded: give torch's own"
                " load_state_dict what numaload.stream(weights, 'torch') yields"
            )
