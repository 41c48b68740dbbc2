"""Torch tensors over memory that numaload mapped, and memory in huge pages for new ones.

torch is an optional dependency: it is imported by whoever asks for a tensor.
"""

from __future__ import annotations

import warnings
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from numaload.dtypes import ITEMS, NAMES
from numaload.errors import UnsupportedTypeError, UsageError, warn_once
from numaload.numa.mapping import map_private
from numaload.numa.syscalls import HUGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

INSTALL = "pip install 'numaload[torch]'"
READ_ONLY = (
    "torch tensors of weights share read-only memory with them: writing to one ends the process;"
    " tensor.clone(), or torch(dtype), gives one that can be written to"
)


def import_torch() -> Any:
    """Raises: UsageError with the line that installs it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"torch is needed for this and not installed: {INSTALL}") from error
    return torch


def torch_dtype(name: str, what: str) -> Any:
    """torch's dtype of that name. Raises: UnsupportedTypeError."""
    torch = import_torch()
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedTypeError(f"{what}: torch {torch.__version__} has no dtype {name!r}")
    return found


def torch_type(type_name: str, what: str) -> Any:
    """torch's dtype of a type that is not made of blocks. Raises: UnsupportedTypeError."""
    if type_name not in NAMES:
        raise UnsupportedTypeError(f"{what}: torch has no type for {type_name}")
    return torch_dtype(NAMES[type_name], what)


def view(buffer: memoryview, type_name: str | None, shape: Sequence[int], what: str) -> Any:
    """A tensor of ``shape`` over these bytes, zero-copy; uint8 where type_name is None.

    Where the bytes are not aligned to the type, which torch does not expect, they are copied.
    """
    torch = import_torch()
    flat = np.frombuffer(buffer, np.uint8)
    dtype = torch.uint8 if type_name is None else torch_type(type_name, what)
    if flat.size and flat.__array_interface__["data"][0] % dtype.itemsize:
        flat = flat.copy()
    elif not flat.flags.writeable:
        warn_once("torch-read-only", READ_ONLY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own word on it, which names no tensor and no way
        tensor = torch.from_numpy(flat)
    items = ITEMS.get(type_name or "", 1)
    wanted = (*shape[:-1], shape[-1] // items) if items > 1 and shape else tuple(shape)
    return tensor.view(dtype).reshape(wanted)


def empty(shape: Sequence[int], dtype: Any) -> Any:
    """An uninitialized CPU tensor; large ones in huge pages, which are much faster to fill.

    Their memory is given back when the last tensor over it is gone.
    """
    torch = import_torch()
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < HUGE:
        return torch.empty(tuple(shape), dtype=dtype)
    flat = np.frombuffer(map_private(nbytes).view(write=True), np.uint8)
    return torch.from_numpy(flat).view(dtype).reshape(tuple(shape))


def array_of(tensor: Any) -> NDArray[Any]:
    """A CPU tensor as a numpy array over the same memory and strides; bfloat16 as uint16."""
    torch = import_torch()
    plain = tensor.detach()
    if plain.dtype in (torch.bfloat16, torch.float16):
        plain = plain.view(torch.int16)
        return plain.numpy().view(np.uint16)  # type: ignore[no-any-return]
    return plain.numpy()  # type: ignore[no-any-return]
