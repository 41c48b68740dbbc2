"""Blocks to floats: the kernel of a qtype and dtype, its range split over pinned workers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import gcd, prod
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from numaload import trace
from numaload.errors import NodeMemoryError, UnsupportedTypeError, UsageError, warn_once
from numaload.formats.qtypes import BLOCKS, FLOATS
from numaload.kernels import registry
from numaload.linux.mapping import MORE_ADDRESSES
from numaload.linux.syscalls import memory_at
from numaload.machine.buffers import result
from numaload.machine.workers import Workers

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
GRAIN = 1 << 17  # weights; less is not worth another thread
PIECE = 1 << 16  # weights of a big-endian file that a worker turns round at a time
SCALED_PIECE = 1 << 20  # weights whose scales, given in a tensor of their own, are made at a time
# Bytes of floats that are made before they are put where they go, if that is not contiguous.
SCATTERED = 1 << 20
LINES = 32  # rows whose floats, transposed, are whole lines of the caches
# Bytes of output: from here on it goes past the caches. It would push out what is in them, and be
# gone itself before somebody reads the beginning.
LARGE = 8 << 20
LINE = 64  # bytes of a line of the caches

Blocks = NDArray[np.uint8]  # (n_blocks, type_size)


def dtype_of(dtype: Any) -> np.dtype[Any]:
    """Return the dtype of a name, or of an object of numpy, ml_dtypes or torch.

    Raises: UsageError.
    """
    name = str(dtype).removeprefix("torch.")
    try:
        if name not in DTYPES and not isinstance(dtype, str):
            name = np.dtype(dtype).name
        return DTYPES[name]
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"dtype {dtype}: expected {', '.join(DTYPES)}") from None


class GivenScales(Protocol):
    """Scales that are not in the blocks. columns: weights of a row."""

    columns: int

    def take(self, first: int, count: int) -> NDArray[np.float32]:
        """Return those of ``count`` weights from number ``first`` of the tensor, in file order."""


def block_of(code: registry.Code) -> tuple[int, int]:
    """Return (weights, bytes) of the smallest part that stands for itself."""
    if not isinstance(code, str):
        return BLOCKS[code]
    weights, nbytes = registry.step(code)
    return weights // gcd(weights, nbytes), nbytes // gcd(weights, nbytes)


class Conversion:
    """Blocks of one type to floats of one dtype, in the calling thread: calls may overlap.

    name: of the tensor, for errors. byte_order: of the blocks; F32, F16 and BF16 can be "big".
    scales: what the numbers in the blocks are multiplied by, in float32: of kernels that take some.
    Raises: UnsupportedTypeError, UsageError.
    """

    def __init__(
        self,
        code: registry.Code,
        dtype: np.dtype[Any],
        *,
        name: str = "",
        byte_order: str = "little",
        scales: GivenScales | None = None,
    ) -> None:
        shown = code if isinstance(code, str) else code.name
        self.what = f"tensor {name!r}: {shown}" if name else shown
        swapped = byte_order == "big"
        if swapped and code not in FLOATS:
            raise UnsupportedTypeError(
                f"{self.what} of a big-endian file cannot be turned to float, only"
                f" {', '.join(one.name for one in FLOATS)} can: gguf-convert-endian of gguf-py"
                " makes a little-endian file of it"
            )
        if isinstance(code, str) != (scales is not None):
            raise UsageError(f"{self.what}: scales belong to kernels that take some")
        self._run, self._scales = _kernel(code, dtype.name, self.what), scales
        self.step, self.step_bytes = registry.step(code)
        if swapped:
            self._run = _swapping(self._run, block_of(code)[1])
        self._groups = self.step // registry.SCALED[code].group if isinstance(code, str) else 0
        if scales is not None and scales.columns % self.step:
            self._run = _padding(self._run, scales.columns, self.step, self.step_bytes)
            self._groups *= -(-scales.columns // self.step)
            weights, nbytes = block_of(code)
            self.step, self.step_bytes = scales.columns, scales.columns // weights * nbytes
        self._bits = np.dtype(np.float32 if dtype.itemsize == 4 else np.uint16)

    def __call__(
        self, blocks: NDArray[np.uint8], out: NDArray[Any], past_caches: bool, first: int = 0
    ) -> None:
        """Convert blocks: flat bytes of whole blocks. out: flat, as many floats as they have.

        past_caches: for what is not read again soon, see ``LARGE``. first: number of the first
        weight, for which scales are looked up.
        """
        if self._scales is not None:
            self._scaled(blocks, out, past_caches, first)
            return
        bits = out.view(self._bits)
        # Stores past the caches that cross their lines are 13 times as slow as plain ones.
        past_caches = past_caches and bits.__array_interface__["data"][0] % LINE == 0
        whole = len(blocks) // self.step_bytes
        rest, done = whole * self.step_bytes, whole * self.step
        if whole:
            self._run(blocks[:rest], bits[:done], past_caches)
        if bits.size > done:
            self._finish(blocks[rest:], bits[done:])

    def _scaled(
        self, blocks: NDArray[np.uint8], out: NDArray[Any], past_caches: bool, first: int
    ) -> None:
        """Convert piece by piece, so that the scales are still in the caches."""
        bits, step, nbytes = out.view(self._bits), self.step, self.step_bytes
        steps = blocks.size // nbytes
        if blocks.size % nbytes or first % step or bits.size != steps * step:
            raise UsageError(f"{self.what}: {blocks.size} bytes are no whole rows or groups")
        past_caches = past_caches and bits.__array_interface__["data"][0] % LINE == 0
        each = max(1, SCALED_PIECE // step)
        for start in range(0, steps, each):
            stop = min(start + each, steps)
            made = bits[start * step : stop * step]
            scales = self._take(first + start * step, made.size)
            self._run(blocks[start * nbytes : stop * nbytes], made, past_caches, scales)

    def _take(self, first: int, count: int) -> NDArray[np.float32] | None:
        """Return the scales of so many weights, in whole steps. Raises: as the scales' own."""
        if self._scales is None:
            return None
        found = self._scales.take(first, count)
        wanted = count // self.step * self._groups
        if found.shape != (wanted,) or found.dtype != np.float32:
            raise UsageError(f"{self.what}: {found.shape} scales, expected {wanted} float32")
        return found

    @property
    def reads(self) -> bool:
        """Return whether ``read`` works: not with big-endian files, nor with kernels in Python."""
        return isinstance(self._run, registry.Compiled)

    def read(
        self,
        fd: int,
        offset: int,
        out: NDArray[Any],
        scratch: NDArray[np.uint8],
        past_caches: bool,
        first: int = 0,
    ) -> int:
        """Read and convert; return how many floats of ``out`` were made, in whole steps.

        Fewer than those that there are where it cannot be read. scratch: for what is read at a
        time, a step at least. first: see ``__call__``.
        """
        steps = out.size // self.step
        if not steps or not isinstance(self._run, registry.Compiled):
            return 0
        bits = out[: steps * self.step].view(self._bits)
        past = past_caches and bits.__array_interface__["data"][0] % LINE == 0
        scales = self._take(first, bits.size)
        return self._run.from_file(fd, offset, bits, steps, scratch, past, scales) * self.step

    def _finish(self, rest: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Make the last floats, which are no whole step, by way of one."""
        blocks, floats = np.zeros(self.step_bytes, np.uint8), np.empty(self.step, out.dtype)
        blocks[: rest.size] = rest
        self._run(blocks, floats, False)
        out[:] = floats[: out.size]


def dequantize_blocks(
    blocks: Blocks,
    code: registry.Code,
    dtype: np.dtype[Any],
    out: NDArray[Any],
    workers: Workers,
    *,
    name: str = "",
    byte_order: str = "little",
    scales: GivenScales | None = None,
    first: int = 0,
    nodes: Collection[int] = (),
) -> None:
    """Turn ``blocks`` (n_blocks, type_size) into ``out``, flat, n_blocks * block_size of ``dtype``.

    Bit-exact with ggml's to_float. float16 and bfloat16: rounded to nearest even, too large is inf.
    name, byte_order, scales, first: see ``Conversion``. nodes: of the memory, for spans.
    Raises: UnsupportedTypeError, UsageError.
    """
    convert = Conversion(code, dtype, name=name, byte_order=byte_order, scales=scales)
    _check(blocks, code, out, convert.what)
    step, nbytes = convert.step, convert.step_bytes
    flat = np.ascontiguousarray(blocks).reshape(-1)
    n_steps = flat.nbytes // nbytes
    past_caches = out.nbytes >= LARGE

    def task(start: int, stop: int) -> None:
        part = out[start * step : stop * step]
        with trace.span("convert", (stop - start) * nbytes, nodes, tensor=name):
            convert(flat[start * nbytes : stop * nbytes], part, past_caches, first + start * step)

    if n_steps:
        workers.ranges(task, n_steps, max(1, GRAIN // step))
    convert(flat[n_steps * nbytes :], out[n_steps * step :], False)


def rows_at_once(most: int, width: int) -> int:
    """Return how many rows of ``width`` floats to make of at most ``most``, and at least one."""
    rows = max(1, most // max(1, width))
    return rows - rows % LINES if rows > LINES else rows


def dequantize_turned(
    convert: Conversion, blocks: NDArray[np.uint8], out: NDArray[Any], workers: Workers, start: int
) -> None:
    """Make rows of ``out``, (columns, rows), from number ``start`` of all matrices transposed.

    blocks: (matrices, rows, bytes of a row).
    """
    _, rows, nbytes = blocks.shape
    width = nbytes // convert.step_bytes * convert.step
    for number, matrix in enumerate(blocks):
        before = number * width
        first, last = max(start, before), min(start + len(out), before + width)
        if first < last:
            place, columns = (
                out[first - start : last - start].T,
                slice(first - before, last - before),
            )
            task = partial(_turn, convert, matrix, place, columns, before * rows)
            workers.ranges(task, rows, max(1, GRAIN // width))


def _turn(
    convert: Conversion,
    matrix: NDArray[np.uint8],
    place: NDArray[Any],
    columns: slice,
    first: int,
    start: int,
    stop: int,
) -> None:
    """Put some columns of rows [start, stop) of a matrix to ``place``. first: its first weight."""
    width = matrix.shape[1] // convert.step_bytes * convert.step
    most = rows_at_once(SCATTERED // place.itemsize, width)
    for row in range(start, stop, most):
        made = np.empty((min(most, stop - row), width), place.dtype)
        flat = matrix[row : row + len(made)].reshape(-1)
        convert(flat, made.reshape(-1), False, first + row * width)
        place[row : row + len(made)] = made[:, columns]


def _check(blocks: Blocks, code: registry.Code, out: NDArray[Any], what: str) -> None:
    """Check what the compiled kernel trusts: types, shapes, bounds."""
    block_size, type_size = block_of(code)
    if blocks.shape[1:] != (type_size,) or out.size != len(blocks) * block_size:
        raise UsageError(
            f"{what}: blocks {blocks.shape} for {out.size} weights, expected (n, {type_size}) for"
            f" n * {block_size}"
        )


@trace.spanned("kernel")
def _kernel(code: registry.Code, dtype_name: str, what: str) -> registry.Kernel:
    try:
        kernel = registry.load(code, dtype_name)
    except registry.SettingError as error:
        raise UsageError(f"{what} cannot be turned to float: {error}") from error
    if kernel is None:
        raise UnsupportedTypeError(
            f"{what} cannot be turned to float: ggml has no conversion for it"
        )
    problem = registry.problem()
    if problem:
        warn_once("kernels", problem)
    return kernel


def _swapping(kernel: registry.Kernel, width: int) -> registry.Kernel:
    """Return a kernel for floats of ``width`` bytes in the other byte order."""

    def run(
        blocks: NDArray[np.uint8], floats: NDArray[Any], past_caches: bool, scales: Any = None
    ) -> None:
        count = len(floats)
        big = blocks.view(f">u{width}")
        for first in range(0, count, PIECE):
            last = min(first + PIECE, count)
            little = big[first:last].astype(f"<u{width}").view(np.uint8)
            kernel(little, floats[first:last], past_caches, scales)

    return run


def _padding(kernel: registry.Kernel, columns: int, step: int, step_bytes: int) -> registry.Kernel:
    """Return a kernel for rows of ``columns`` weights that are no whole number of steps."""
    steps = -(-columns // step)

    def run(
        blocks: NDArray[np.uint8],
        floats: NDArray[Any],
        past_caches: bool,  # noqa: ARG001 - as for all kernels
        scales: Any = None,
    ) -> None:
        rows = len(floats) // columns
        codes, out = blocks.reshape(rows, -1), floats.reshape(rows, columns)
        scales, at_once = scales.reshape(rows, -1), max(1, PIECE // columns)
        for first in range(0, rows, at_once):
            part = codes[first : first + at_once]
            padded = np.zeros((len(part), steps * step_bytes), np.uint8)
            padded[:, : part.shape[1]] = part
            made = np.empty((len(part), steps * step), floats.dtype)
            its = scales[first : first + at_once].reshape(-1)
            kernel(padded.reshape(-1), made.reshape(-1), past_caches=False, scales=its)
            out[first : first + at_once] = made[:, :columns]

    return run


@contextmanager
def new_array(
    shape: Sequence[int], dtype: np.dtype[Any], what: str, nodes: Collection[int]
) -> Iterator[NDArray[Any]]:
    """Make an array for floats of ``what``, to be filled inside. nodes: where, if it is large.

    Raises: NodeMemoryError.
    """
    nbytes = prod(shape) * dtype.itemsize
    with result(nbytes, f"{what} as {dtype.name}", nodes) as lent:
        if lent is not None:
            yield lent.view(dtype).reshape(shape)
            return
        try:
            array = np.empty(shape, dtype)
        except MemoryError as error:
            raise NodeMemoryError(f"{what}: {error}: {MORE_ADDRESSES}", needed=nbytes) from error
        yield array


def as_output(out: Any, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """Return ``out`` as a flat writable array of ``size`` elements, sharing its memory.

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
    """Flatten a torch tensor without importing torch: its bfloat16 has no buffer protocol."""
    strided = out.device.type == "cpu" and str(out.layout) == "torch.strided"
    # Without an address: a storage that was resized to nothing under the tensor.
    if not strided or not out.is_contiguous() or (out.numel() and not out.data_ptr()):
        raise UsageError(
            f"out: expected a contiguous tensor in CPU memory, found a {out.layout} one"
            f" on {out.device}"
        )
    memory = memory_at(out.data_ptr(), out.numel() * out.element_size())
    memory.owner = out  # type: ignore[attr-defined] # lives as long as an array of it
    return np.frombuffer(memoryview(memory), f"V{out.element_size()}")
