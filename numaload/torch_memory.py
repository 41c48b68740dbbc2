"""Torch tensors over memory that numaload mapped, and memory in huge pages for new ones.

torch is an optional dependency: it is imported by whoever asks for a tensor.
"""

from __future__ import annotations

import warnings
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from numaload.errors import UnsupportedTypeError, UsageError, warn_once
from numaload.numa.mapping import map_private
from numaload.numa.syscalls import HUGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# {type of GGUF or safetensors: name in torch}, where one element is one number (or two of 4 bits).
NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip
INSTALL = "pip install 'numaload[torch]'"
READ_ONLY = (
    "torch tensors of weights share read-only memory with them: writing to one ends the process;"
    " tensor.clone(), or torch(dtype), gives one that can be written to"
)
# What numpy can hand to torch; the others travel as bytes.
_PACKED = {"float4_e2m1fn_x2": 2}  # elements in one item of torch


def import_torch() -> Any:
    """Raises: UsageError with the line that installs it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"torch is needed for this and not installed: {INSTALL}") from error
    return torch


def dtype_name(dtype: Any) -> str:
    """What torch calls it: of a name, of torch's dtypes, numpy's or ml_dtypes'."""
    if isinstance(dtype, str):
        return dtype.removeprefix("torch.")
    name = str(dtype)
    if name.startswith("torch."):
        return name.removeprefix("torch.")
    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        raise UsageError(
            f"dtype {dtype!r}: expected a name, or a dtype of torch or numpy"
        ) from None


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
    return tensor.view(dtype).reshape(_items(shape, type_name))


def _items(shape: Sequence[int], type_name: str | None) -> tuple[int, ...]:
    per_item = _PACKED.get(NAMES.get(type_name or "", ""), 1)
    if per_item == 1 or not shape:
        return tuple(shape)
    return (*shape[:-1], shape[-1] // per_item)


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
