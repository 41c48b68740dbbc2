"""Yield every tensor of a model, one after another, with bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterable
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numaload import trace
from numaload.dequantize import DTYPES
from numaload.dtypes import (
    ITEMS,
    KERNEL_DTYPES,
    NAMES,
    dtype_name,
    is_float,
    is_torch,
    item_shape,
    numpy_dtype,
)
from numaload.errors import NodeMemoryError, NumaloadError, UnsupportedTypeError, UsageError
from numaload.files.reader import Progress
from numaload.kernels import registry
from numaload.machine import memory
from numaload.machine.buffers import LEAST_FREE, WAY_OUT, Buffers
from numaload.pipeline.fill import READ, Part, Target, Work, Write, writer
from numaload.weights import Tensor, Weights

AHEAD = 256 << 20
# Bytes of results under way at first; twice as many whenever a caller who takes time for a tensor
# comes back to threads that have nothing left to do. New memory must be cleared, while some of what
# is used again soon is in caches still.
FIRST = 64 << 20
SLOW_S = 1e-3
SCARCE = 1 << 30  # bytes of room; of more, what compiling takes is no matter
MOST = 1000  # tensors that are ready: each has a price, however small it is


def stream(
    weights: Weights,
    dtype: Any = "float32",
    *,
    ahead: int = AHEAD,
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Generator[tuple[str, Any], None, None]:
    """Yield (name, array) of each tensor in file order, while threads prepare the next ones.

    dtype: "float32", "float16" or "bfloat16" give numpy arrays, torch's dtypes torch tensors, of
    the tensor's shape; integers, bools and complex numbers keep their type. None, or "torch":
    numpy arrays or torch tensors of the type that they have in the file; uint8, (..., bytes per
    row), for blocks, and in numpy for F4 and F6. The caller owns them and may write to them.
    Weights whose scales other tensors hold come multiplied by these, which do not come themselves
    unless ``names`` has them; X_blocks comes as X. With None all come as they are.
    ahead: bytes, each for results that are ready or under way (one tensor always is), for reading
    ahead, and for memory kept for later tensors. Less where memory has no room for it: limits are
    looked at once, at the start.
    names: only these. progress(bytes of the files done, in all): returning False cancels.
    Raises: TensorNotFoundError, UsageError at once. When its turn comes, for a tensor:
    UnsupportedTypeError, UnknownQuantTypeError, ReadError, FileChangedError, CancelledError,
    NodeMemoryError where two of the largest tensors do not fit, or what the caller keeps.
    """
    if not isinstance(weights, Weights):
        raise UsageError(f"weights: expected what numaload.open returns, found {weights!r}")
    output = _output(dtype)
    if ahead < 0:
        raise UsageError(f"ahead: {ahead} bytes, expected 0 or more")
    chosen = [weights[name] for name in (weights if names is None else dict.fromkeys(names))]
    if output.dtype is None:
        chosen = [tensor.as_stored() for tensor in chosen]
    elif names is None:
        applied = {name for tensor in chosen if tensor.scales for name in tensor.scales.names}
        chosen = [tensor for tensor in chosen if tensor.name not in applied]
    chosen.sort(key=lambda tensor: tensor.place_in_files)
    return _stream(chosen, output, ahead, progress)


class _Output(NamedTuple):
    """Say what the caller gets. dtype: None for the type that each tensor has in the file."""

    dtype: str | None
    torch: bool


def _output(dtype: Any) -> _Output:
    if dtype is None:
        return _Output(None, torch=False)
    if isinstance(dtype, str) and dtype == "torch":
        from numaload.torch_memory import import_torch

        import_torch()
        return _Output(None, torch=True)
    name = dtype_name(dtype)
    if name not in KERNEL_DTYPES:
        raise UsageError(f"dtype {dtype}: expected {', '.join(KERNEL_DTYPES)}, None or 'torch'")
    return _Output(name, is_torch(dtype))


def _stream(
    tensors: list[Tensor], output: _Output, ahead: int, progress: Progress | None
) -> Generator[tuple[str, Any], None, None]:
    if not tensors:
        return
    ahead = min(ahead, _room(tensors, output))
    buffers, todo = Buffers(ahead), deque(tensors)
    ready: deque[_Result] = deque()
    nbytes, most = 0, min(ahead, FIRST)  # of those that are ready or under way
    with Work([_Whole(tensor) for tensor in tensors], progress, ahead) as work:
        try:
            while todo or ready:
                while todo and _fits(len(ready), nbytes, _nbytes(todo[0], output), most, ahead):
                    ready.append(_Result(todo[0], output, buffers, work))
                    if len(ready) > 1 and isinstance(ready[-1].error, NodeMemoryError):
                        ready.pop()  # there may be room once those before are taken
                        break
                    nbytes += ready[-1].nbytes
                    todo.popleft()
                nbytes -= ready[0].nbytes
                ready[0].wait()
                given = time.perf_counter()
                yield _taken(ready.popleft())
                work.check()
                is_slow = time.perf_counter() - given > SLOW_S
                if is_slow and (not ready or ready[-1].done):
                    most = min(ahead, 2 * most)
        finally:
            for result in ready:  # errors that are kept have it in their traceback
                result.end()
            buffers.close()


def _room(tensors: list[Tensor], output: _Output) -> int:
    """Return how many bytes ahead fit into memory, beside two tensors: this and the caller's.

    Raises: NodeMemoryError where it has none for these two.
    """
    room = memory.available().free
    if room < SCARCE:
        for code in {tensor.code for tensor in tensors if _kernel(tensor, output)}:
            with suppress(registry.SettingError):  # which its tensors tell
                registry.load(code, output.dtype or "")  # compiling takes more than a tensor
        room = memory.available().free
    sizes = [0, *(_nbytes(tensor, output) for tensor in tensors)]
    least = max(map(sum, pairwise(sizes)))
    own = LEAST_FREE + tensors[0].workers().count * READ
    if least + own > room:
        memory.require(least, "a tensor and the one before it", WAY_OUT, least=own)
    return max(0, room - least - own) // 2  # ahead, and kept for later


def _fits(count: int, nbytes: int, more: int, most: int, ahead: int) -> bool:
    """Return whether ``more`` bytes may join ``nbytes`` of ``count`` tensors that are under way."""
    return not count or (count < MOST and nbytes + more <= min(ahead, max(most, 2 * more)))


def _taken(result: _Result) -> tuple[str, Any]:
    """Return the result and keep no reference to it: what the caller drops is free at once."""
    return result.tensor.weight_name, result.value()


def _ending(promise: memory.Promise, write: Write) -> Write:
    """Wrap ``write``: once a part is written, its share of the promised memory is given back."""

    def write_touching(part: Part) -> None:
        write(part)
        promise.end(part.place.nbytes)

    return write_touching


class _Whole(NamedTuple):
    """Cover all bytes of a tensor."""

    tensor: Tensor
    start: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)


def _kernel(tensor: Tensor, output: _Output) -> str | None:
    """Return the dtype that a kernel makes of it; None where its bytes are handed on."""
    return output.dtype if tensor.has_kernel else None


def _nbytes(tensor: Tensor, output: _Output) -> int:
    kernel = _kernel(tensor, output)
    return int(tensor.nbytes if kernel is None else tensor.size * DTYPES[kernel].itemsize)


def _as_in_file(tensor: Tensor, output: _Output) -> tuple[str, tuple[int, ...]]:
    """Return the dtype's name and the shape. Raises: UnsupportedTypeError.

    numpy has no dtype for numbers that share a byte; torch has one such type.
    """
    name = tensor.type_name
    packed = name in ITEMS or not (tensor.in_blocks or name in NAMES)
    if packed and output.dtype is not None:
        message = f"tensor {tensor.name!r}: {name} cannot become float; dtype=None gives bytes"
        raise UnsupportedTypeError(message)
    if tensor.in_blocks or (packed and not output.torch):
        return "uint8", tensor.byte_shape
    if name not in NAMES:
        message = f"tensor {tensor.name!r}: torch has no type for {name}; dtype=None gives bytes"
        raise UnsupportedTypeError(message)
    return NAMES[name], item_shape(name, tensor.shape, tensor.name)


class _Result:
    """Make one tensor: started here, finished by the threads, taken by the caller."""

    def __init__(self, tensor: Tensor, output: _Output, buffers: Buffers, work: Work) -> None:
        self.tensor, self.output, self.nbytes = tensor, output, _nbytes(tensor, output)
        self.kernel, self.work = _kernel(tensor, output), work
        self.error: NumaloadError | None = None
        self.promise: memory.Promise | None = None
        try:
            self._start(buffers)
        except NumaloadError as error:  # comes when its turn has come
            self.error = error

    def _start(self, buffers: Buffers) -> None:
        tensor, kernel = self.tensor, self.kernel
        tensor.check_type()
        if self.output.dtype is not None:
            tensor.check_scales(self.output.dtype)
        item, self.shape = (kernel, tensor.shape) if kernel else _as_in_file(tensor, self.output)
        self.dtype = self._find(item)
        self.flat, self.promise = buffers.take(self.nbytes, f"tensor {tensor.name!r}")
        place: NDArray[Any] = self.flat
        if kernel:
            place = self.flat.view(DTYPES[kernel]).reshape(self.shape)
        target = Target(tensor, place, kernel)
        write, cut = writer(target)
        if self.promise is not None:
            write = _ending(self.promise, write)
        self.futures = self.work.start(target, cut, write)

    def end(self) -> None:
        """Give back the promised memory that will not be touched."""
        if self.promise is not None:
            self.promise.end()

    @property
    def done(self) -> bool:
        return self.error is not None or all(future.done() for future in self.futures)

    def _find(self, dtype: str) -> Any:
        """Return torch's or numpy's dtype of this name. Raises: UnsupportedTypeError."""
        if not self.output.torch:
            return numpy_dtype(dtype, self.tensor.name)
        from numaload.torch_memory import torch_dtype

        return torch_dtype(dtype, self.tensor.name)

    def wait(self) -> None:
        """Wait until the tensor is ready. Raises: what making it raised."""
        if self.error is not None:
            raise self.error
        with trace.span("wait", tensor=self.tensor.name):
            self.work.finish(self.futures)

    def value(self) -> Any:
        """Return the array or the torch tensor. Raises: UnsupportedTypeError."""
        if self.kernel is None and self.tensor.byte_order == "big":
            self.flat.view(f"u{self.dtype.itemsize}").byteswap(inplace=True)
        made = self._torch() if self.output.torch else self.flat.view(self.dtype)
        made = made.reshape(self.shape)
        if self.output.dtype is None or self.kernel or not is_float(self.tensor.type_name):
            return made
        if self.output.torch:
            return made.to(self._find(self.output.dtype))
        more = memory.promise(self.tensor.size * 4, f"tensor {self.tensor.name!r}", WAY_OUT)
        with more, np.errstate(all="ignore"):  # what is too large is infinite, as kernels have it
            return made.astype(DTYPES[self.output.dtype])

    def _torch(self) -> Any:
        from numaload.torch_memory import of_bytes

        return of_bytes(self.flat, self.dtype, self.shape)
