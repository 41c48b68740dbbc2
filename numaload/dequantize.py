"""Blocks to floats: the kernel of a qtype, split over pinned workers.

Kernels write float32. For float16 and bfloat16 each worker dequantizes into a small buffer of its
own and rounds from there (to nearest even; too large is inf), so no second full copy is made.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from numaload.errors import UnsupportedTypeError, UsageError, warn_once
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
from numaload.numa.syscalls import memory_at
from numaload.numa.workers import Workers

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
RAW: dict[QuantType, str] = {
    QuantType.F32: "float32",
    QuantType.F16: "float16",
    QuantType.BF16: "bfloat16",
}
SCRATCH = 1 << 16  # weights a worker holds as float32 before rounding: stays in the L2 cache
GRAIN = 1 << 17  # weights; less is not worth another thread

Blocks = NDArray[np.uint8]  # (n_blocks, type_size)
RangeFunction = Callable[[int, int], None]


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """A dtype from its name, or from numpy's, ml_dtypes' or torch's object. Raises: UsageError."""
    name = str(dtype).removeprefix("torch.")
    try:
        if name not in DTYPES and not isinstance(dtype, str):
            name = np.dtype(dtype).name
        return DTYPES[name]
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"dtype {dtype}: expected {', '.join(DTYPES)}") from None


def dequantize_blocks(
    blocks: Blocks,
    qtype: QuantType,
    dtype: np.dtype[Any],
    out: NDArray[Any],
    workers: Workers,
    *,
    name: str = "",
    byte_order: str = "little",
) -> None:
    """Turn ``blocks`` (n_blocks, type_size) into ``out``, flat, n_blocks * block_size of ``dtype``.

    Bit-exact with ggml's to_float; types without a kernel go through gguf-py, said once.
    name: of the tensor, for errors. byte_order: of the blocks; F32, F16 and BF16 can be "big".
    Raises: UnsupportedTypeError.
    """
    what = f"tensor {name!r}: {qtype.name}" if name else qtype.name
    block_size, _ = BLOCKS[qtype]
    grain = max(1, GRAIN // block_size)
    swapped = byte_order == "big"
    if swapped and qtype not in RAW:
        raise UnsupportedTypeError(
            f"{what} of a big-endian file cannot be turned to float, only"
            f" {', '.join(one.name for one in RAW)} can: gguf-convert-endian of gguf-py makes a"
            " little-endian file of it"
        )
    if RAW.get(qtype) == dtype.name:
        task = _copy(blocks, out, swapped=swapped)
    else:
        to_float32 = (_swapped if swapped else _kernel)(blocks, qtype, what)
        floats = out.reshape(-1, block_size)
        if dtype.name == "float32":
            task = _direct(to_float32, floats)
        else:
            task = _rounded(to_float32, floats, dtype.name)
    workers.ranges(task, len(blocks), grain)


# A function of (blocks' range, float32 out for just that range).
ToFloat32 = Callable[[int, int, NDArray[np.float32]], None]


def _kernel(blocks: Blocks, qtype: QuantType, what: str) -> ToFloat32:
    if qtype is QuantType.F32:
        return lambda start, stop, out: _widen(blocks[start:stop], out)
    kernel = registry.load(qtype)
    if kernel is None:
        return _by_gguf(blocks, qtype, what)

    def run(start: int, stop: int, out: NDArray[np.float32]) -> None:
        kernel(blocks[start:stop], out, 0, stop - start)

    return run


def _swapped(blocks: Blocks, qtype: QuantType, what: str) -> ToFloat32:
    """Of big-endian floats: pieces of them the other way round, through the same kernels."""
    width = blocks.shape[1]

    def run(start: int, stop: int, out: NDArray[np.float32]) -> None:
        for first in range(start, stop, SCRATCH):
            last = min(first + SCRATCH, stop)
            piece = blocks[first:last].view(f">u{width}").astype(f"<u{width}").view(np.uint8)
            _kernel(piece, qtype, what)(0, last - first, out[first - start : last - start])

    return run


def _by_gguf(blocks: Blocks, qtype: QuantType, what: str) -> ToFloat32:
    import gguf

    try:
        foreign = gguf.GGMLQuantizationType(qtype.value)
        gguf.quants.dequantize(np.zeros_like(blocks, shape=(1, blocks.shape[1])), foreign)
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedTypeError(f"{what} cannot be turned to float: {error}") from error
    warn_once(
        f"gguf-py {qtype.name}",
        f"{qtype.name} has no kernel here yet and goes through gguf-py, 10 to 100 times slower",
    )

    step = max(1, SCRATCH // BLOCKS[qtype][0])

    def run(start: int, stop: int, out: NDArray[np.float32]) -> None:
        for first in range(start, stop, step):
            last = min(first + step, stop)
            # As one row: gguf-py works on 16 rows at a time, and its temporaries are many times
            # the size of these. Infinite scales are the file's business, not worth a warning.
            row = blocks[first:last].reshape(1, -1)
            with np.errstate(all="ignore"):
                floats = gguf.quants.dequantize(row, foreign)
            out[first - start : last - start] = floats.reshape(last - first, -1)

    return run


def _widen(blocks: Blocks, out: NDArray[np.float32]) -> None:
    out[:] = np.ascontiguousarray(blocks).view(np.float32)


def _copy(blocks: Blocks, out: NDArray[Any], *, swapped: bool) -> RangeFunction:
    target = out.view(np.uint8).reshape(blocks.shape)
    if swapped:
        width = blocks.shape[1]
        blocks, target = blocks.view(f">u{width}"), target.view(f"<u{width}")

    def task(start: int, stop: int) -> None:
        np.copyto(target[start:stop], blocks[start:stop])

    return task


def _direct(to_float32: ToFloat32, out: NDArray[np.float32]) -> RangeFunction:
    def task(start: int, stop: int) -> None:
        to_float32(start, stop, out[start:stop])

    return task


def _rounded(to_float32: ToFloat32, out: NDArray[Any], name: str) -> RangeFunction:
    narrow = registry.load_narrow(name)
    assert narrow is not None  # noqa: S101 - DTYPES has no other
    block_size = out.shape[1]
    step = max(1, SCRATCH // block_size)
    bits = out.view(np.uint16)

    def task(start: int, stop: int) -> None:
        scratch = np.empty((min(step, stop - start), block_size), np.float32)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            part = scratch[: last - first]
            to_float32(first, last, part)
            narrow(part.reshape(-1), bits[first:last].reshape(-1), 0, part.size)

    return task


def as_output(out: Any, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """``out`` as a flat writable array of ``size`` elements, sharing its memory.

    Takes numpy arrays, CPU torch tensors and whatever has the buffer protocol, if C-contiguous and
    of the dtype's item size. Raises: UsageError.
    """
    flat = _flat_tensor(out) if hasattr(out, "data_ptr") else _flat_buffer(out)
    if flat.dtype.itemsize != dtype.itemsize:
        raise UsageError(
            f"out has items of {flat.dtype.itemsize} bytes, {dtype} has {dtype.itemsize}"
        )
    if flat.size != size:
        raise UsageError(f"out has {flat.size} elements, expected {size}")
    if not flat.flags.writeable:
        raise UsageError("out is read-only")
    view = flat.view(dtype)
    if not view.flags.aligned or not flat.dtype.isnative:
        raise UsageError(
            f"out is not aligned to {dtype.itemsize} bytes or not of native byte order"
        )
    return view


def _flat_buffer(out: Any) -> NDArray[Any]:
    if isinstance(out, np.ndarray):
        array = np.asarray(out)  # no subclass: np.matrix, for one, is never flat
    else:
        try:
            array = np.frombuffer(out, memoryview(out).format)
        except (TypeError, ValueError, BufferError) as error:
            raise UsageError(f"out: expected a C-contiguous buffer: {error}") from error
    if not array.flags.c_contiguous:
        raise UsageError("out is not C-contiguous")
    return array.reshape(-1)


def _flat_tensor(out: Any) -> NDArray[Any]:
    """A torch tensor, without importing torch: its bfloat16 has no buffer protocol."""
    strided = out.device.type == "cpu" and str(out.layout) == "torch.strided"
    # Without an address: a storage that was resized to nothing under the tensor.
    if not strided or not out.is_contiguous() or (out.numel() and not out.data_ptr()):
        raise UsageError(
            f"out: expected a contiguous tensor in CPU memory, found a {out.layout} one"
            f" on {out.device}"
        )
    memory = memory_at(out.data_ptr(), out.numel() * out.element_size())
    # The array lives no longer than the call that was given the tensor.
    return np.frombuffer(memoryview(memory), f"V{out.element_size()}")
