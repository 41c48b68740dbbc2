"""Torch tensors over memory that numaload mapped, and memory in huge pages for new ones.

torch is an optional dependency: it is imported by whoever asks for a tensor.
"""

from __future__ import annotations

from contextlib import contextmanager
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

from numaload.dtypes import NAMES, dtype_name
from numaload.errors import UnsupportedTypeError, UsageError, printable, warn_once
from numaload.linux.mapping import map_private
from numaload.linux.syscalls import HUGE
from numaload.machine import memory
from numaload.machine.buffers import result

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from numpy.typing import NDArray

INSTALL = "pip install 'numaload[torch]'"
READ_ONLY = (
    "torch tensors of weights share read-only memory with them: writing to one ends the process;"
    " tensor.clone(), or torch(dtype), gives one that can be written to"
)


def import_torch() -> Any:
    """Import torch. Raises: UsageError with the line that installs it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"torch is needed for this and not installed: {INSTALL}") from error
    return torch


def torch_dtype(name: str, what: str) -> Any:
    """Return torch's dtype of that name. Raises: UnsupportedTypeError."""
    torch = import_torch()
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise UnsupportedTypeError(f"{what}: torch {torch.__version__} has no dtype {name!r}")
    return found


def float_dtype(dtype: Any) -> Any:
    """Return torch's floating-point dtype. Raises: UsageError for others, UnsupportedTypeError."""
    wanted = torch_dtype(dtype_name(dtype), "dtype")
    if not wanted.is_floating_point:
        raise UsageError(f"dtype {dtype}: expected a floating-point dtype")
    return wanted


@lru_cache(maxsize=64)
def torch_type(type_name: str) -> Any:
    """Return torch's dtype of a type without blocks. Raises: UnsupportedTypeError."""
    if type_name not in NAMES:
        raise UnsupportedTypeError(f"torch has no type for {type_name}; buffer has the bytes")
    return torch_dtype(NAMES[type_name], type_name)


def mapped(buffer: memoryview, dtype: Any, shape: Sequence[int]) -> Any:
    """Return a tensor over mapped memory, for users: they are told that it is read-only."""
    warn_once("torch-read-only", READ_ONLY)
    return of_bytes(buffer, dtype, shape)


def converted(tensor: Any, device: Any, dtype: Any, what: str, *, copy: bool = True) -> Any:
    """Return ``tensor`` with another dtype, on another device.

    Raises: UnsupportedTypeError where torch has no way to it, NodeMemoryError.
    """
    # On other devices torch may stage it here.
    nbytes = tensor.numel() * dtype.itemsize if copy or tensor.dtype != dtype else 0
    try:
        with promise(nbytes, what):
            return tensor.to(device, dtype, copy=copy)
    except NotImplementedError as error:
        raise UnsupportedTypeError(
            f"tensor {what!r}: torch cannot turn {tensor.dtype} into {dtype}: {error}"
        ) from error


def of_bytes(buffer: Any, dtype: Any, shape: Sequence[int]) -> Any:
    """Return a tensor over all bytes of a buffer, zero-copy, which keeps the buffer alive.

    Its storage is these bytes and no others: that is what torch.save, pickle and deepcopy take.
    buffer: claims to be writable, since torch warns of others. Where it is not aligned to the
    type, which torch does not expect, it is copied.
    """
    torch = import_torch()
    if not buffer.nbytes:  # of nothing torch makes no view
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    found = torch.frombuffer(buffer, dtype=dtype)
    if found.data_ptr() % dtype.itemsize:
        found = torch.frombuffer(buffer, dtype=torch.uint8).clone().view(dtype)
    return found.view(shape)


def require(nbytes: int, what: str) -> None:
    """Look whether there is memory for a tensor. Raises: NodeMemoryError."""
    promise(nbytes, what).end()


def promise(nbytes: int, what: str) -> memory.Promise:
    """Look for it, and count it until it is filled. Raises: NodeMemoryError."""
    less = "dequantize() fewer rows, or take a smaller dtype"
    return memory.promise(nbytes, f"tensor {what!r}", less)


def new(shape: Sequence[int], dtype: Any, what: str) -> Any:
    """Return an uninitialized tensor if there is memory for it. Raises: NodeMemoryError."""
    require(prod(shape) * dtype.itemsize, what)
    return empty(shape, dtype)


@contextmanager
def made(shape: Sequence[int], dtype: Any, what: str, nodes: Collection[int] = ()) -> Iterator[Any]:
    """Make a CPU tensor, to be filled inside. nodes: where, if it is large.

    Raises: NodeMemoryError.
    """
    with result(prod(shape) * dtype.itemsize, f"tensor {what!r}", nodes) as lent:
        yield empty(shape, dtype) if lent is None else of_bytes(lent, dtype, shape)


def empty(shape: Sequence[int], dtype: Any) -> Any:
    """Return an uninitialized CPU tensor; large ones in huge pages, which are faster to fill.

    Their memory is given back when the last tensor over it is gone.
    """
    torch = import_torch()
    nbytes = prod(shape) * dtype.itemsize
    if nbytes < HUGE:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    return of_bytes(map_private(nbytes).view(write=True), dtype, shape)


def array_of(tensor: Any) -> NDArray[Any]:
    """Return a CPU tensor as a numpy array over the same memory and strides.

    float32 as such, all others as unsigned integers of their size.
    Raises: UsageError for a tensor without memory: torch's array of it has none either.
    """
    torch = import_torch()
    plain = tensor.detach()
    if not _has_memory(plain):
        raise UsageError(f"a tensor of shape {tuple(plain.shape)} has no memory of its size")
    if plain.dtype == torch.float32:
        return plain.numpy()  # type: ignore[no-any-return]
    signed = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = plain.dtype.itemsize
    return plain.view(signed[size]).numpy().view(f"u{size}")  # type: ignore[no-any-return]


def _has_memory(tensor: Any) -> bool:
    """Return whether the storage, which may be resized under a strided tensor, holds all of it."""
    if not tensor.numel():
        return True
    dims = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in dims)
    room: int = tensor.untyped_storage().nbytes()
    return bool(tensor.data_ptr()) and (last + 1) * tensor.element_size() <= room


def unfit(tensor: Any) -> str:
    """Return why values cannot be written to a tensor, empty where they can."""
    torch = import_torch()
    if torch.nn.parameter.is_lazy(tensor):
        return "it is not initialized: its shape is not known yet"
    if hasattr(tensor, "fake_mode") or torch._is_functional_tensor(tensor):  # noqa: SLF001
        return "it is a fake or functional tensor, made for tracing"
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
        return f"it is no plain dense tensor ({tensor.layout}, {tensor.dtype})"
    if tensor.is_neg() or tensor.is_conj():
        return "it is a negated or conjugated view of other values"
    replaced = tensor.device.type == "meta"  # by one with memory of its own
    if not replaced and not _has_memory(tensor):
        return "its storage is empty, or smaller than it"
    overlap = not replaced and _overlaps(tensor)
    return "its elements overlap in memory, as those of expand() do" if overlap else ""


def _overlaps(tensor: Any) -> bool:
    """Return whether elements may share memory."""
    reach = 0  # of the dims with smaller strides, in elements
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return bool(tensor.numel())
            reach += (size - 1) * stride
    return False


def checked_device(device: Any) -> Any:
    """Return torch's, with an index: "cuda" is "cuda:0". Raises: UsageError."""
    try:
        found = import_torch().empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError, ValueError, ImportError) as error:
        raise UsageError(f"device {printable(repr(device))}: {printable(error)}") from error
    if found.type == "meta":
        raise UsageError(f"device {printable(repr(device))}: the meta device holds no values")
    return found
