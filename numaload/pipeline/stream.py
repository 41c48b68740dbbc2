"""``stream``: every tensor of a model, one after another, with bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numaload.dequantize import DTYPES
from numaload.dtypes import (
    ITEMS,
    KERNEL_DTYPES,
    NAMES,
    dtype_name,
    is_float,
    is_torch,
    numpy_dtype,
)
from numaload.errors import NumaloadError, UsageError
from numaload.numa.workers import finish
from numaload.pipeline.fill import Work, writer
from numaload.pipeline.memory import Buffers
from numaload.pipeline.pieces import Target
from numaload.storage.parallel import Progress
from numaload.weights import Tensor, Weights

AHEAD = 256 << 20


def stream(
    weights: Weights,
    dtype: Any = "float32",
    *,
    ahead: int = AHEAD,
    names: Iterable[str] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[str, Any]]:
    """(name, array) of each tensor in the order of the files, while threads prepare the next ones.

    dtype: "float32", "float16" or "bfloat16" give numpy arrays, torch's dtypes torch tensors, of
    the tensor's shape; integers and bools keep their type. None, or "torch": the bytes as in the
    file, numpy arrays or torch tensors of the type that they have there, blocks as uint8.
    ahead: bytes of results that may be ready or under way at a time (one tensor always is), and
    that may be read ahead of the files. What is not held any more is used for later tensors.
    names: only these. progress(bytes of the files done, in all): returning False cancels.
    Raises: TensorNotFoundError, UsageError at once; at the tensor that has it, after those before:
    UnsupportedTypeError, UnknownQuantTypeError, ReadError, FileChangedError, CancelledError.
    """
    wanted = _wanted(dtype)
    if ahead < 0:
        raise UsageError(f"ahead: {ahead} bytes, expected 0 or more")
    chosen = [weights[name] for name in (weights if names is None else dict.fromkeys(names))]
    chosen.sort(key=lambda tensor: tensor.place_in_files)
    return _stream(chosen, wanted, ahead, progress)


class Wanted(NamedTuple):
    dtype: str | None
    torch: bool


def _wanted(dtype: Any) -> Wanted:
    if dtype is None or dtype == "torch":
        return Wanted(None, torch=dtype == "torch")
    name = dtype_name(dtype)
    if name not in KERNEL_DTYPES:
        raise UsageError(f"dtype {dtype}: expected {', '.join(KERNEL_DTYPES)}, None or 'torch'")
    return Wanted(name, is_torch(dtype))


def _stream(
    tensors: list[Tensor], wanted: Wanted, ahead: int, progress: Progress | None
) -> Iterator[tuple[str, Any]]:
    if not tensors:
        return
    buffers, todo = Buffers(ahead), deque(tensors)
    ready: deque[_Result] = deque()
    with Work([Whole(tensor) for tensor in tensors], progress, ahead) as work:
        try:
            while todo or ready:
                while todo and (not ready or _bytes(ready, todo[0], wanted) <= ahead):
                    ready.append(_Result(todo.popleft(), wanted, buffers, work))
                yield _taken(ready.popleft())
        finally:
            buffers.close()


def _bytes(ready: Iterable[_Result], more: Tensor, wanted: Wanted) -> int:
    return sum(one.nbytes for one in ready) + _layout(more, wanted).nbytes


def _taken(result: _Result) -> tuple[str, Any]:
    """Without a reference to it in the generator: what the caller drops is free at once."""
    return result.tensor.name, result.value()


class Whole(NamedTuple):
    """All bytes of a tensor."""

    tensor: Tensor
    start: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.tensor.nbytes)


class Layout(NamedTuple):
    """How the result looks: made by a kernel to ``dtype``, or as in the file."""

    dtype: str | None  # of a kernel
    item: str  # dtype of the array
    shape: tuple[int, ...]
    nbytes: int


def _layout(tensor: Tensor, wanted: Wanted) -> Layout:
    if wanted.dtype is not None and tensor.has_kernel:
        size = DTYPES[wanted.dtype].itemsize
        return Layout(wanted.dtype, wanted.dtype, tensor.shape, tensor.size * size)
    if tensor.in_blocks or tensor.type_name not in NAMES:
        *outer, columns = tensor.shape or (1,)
        row_bytes = tensor.nbytes // max(1, tensor.size // max(1, columns))
        return Layout(None, "uint8", (*outer, row_bytes), tensor.nbytes)
    return Layout(None, NAMES[tensor.type_name], tensor.shape, tensor.nbytes)


class _Result:
    """One tensor under way."""

    def __init__(self, tensor: Tensor, wanted: Wanted, buffers: Buffers, work: Work) -> None:
        self.tensor, self.wanted, self.layout = tensor, wanted, _layout(tensor, wanted)
        self.nbytes = self.layout.nbytes
        self.error: NumaloadError | None = None
        self.futures: list[Future[None]] = []
        try:
            self._start(buffers, work)
        except NumaloadError as error:  # comes when its turn has come
            self.error = error

    def _start(self, buffers: Buffers, work: Work) -> None:
        self.tensor.check_type()  # before it is sized
        self.flat = buffers.take(self.nbytes)
        dtype = self.layout.dtype
        place: NDArray[Any] = self.flat.view(DTYPES[dtype]) if dtype else self.flat
        target = Target(self.tensor, place, dtype)
        write, cut = writer(target)
        self.futures = work.start(target, cut, write)

    def value(self) -> Any:
        """Waits for it. Raises: what went wrong with it."""
        if self.error is not None:
            raise self.error
        finish(self.futures)
        made = self._torch() if self.wanted.torch else self._numpy()
        wanted = self.wanted.dtype
        if wanted is None or self.layout.dtype is not None or not is_float(self.tensor.type_name):
            return made
        return made.to(_torch_dtype(wanted)) if self.wanted.torch else made.astype(DTYPES[wanted])

    def _numpy(self) -> Any:
        dtype = numpy_dtype(self.layout.item, self.tensor.name)
        if self.layout.dtype is None and self.tensor.byte_order == "big":
            dtype = dtype.newbyteorder(">")
        return self.flat.view(dtype).reshape(self.layout.shape)

    def _torch(self) -> Any:
        if self.layout.dtype is None and not self.tensor.in_blocks:
            self.tensor.check_native()
        items = ITEMS.get(self.tensor.type_name, 1) if self.layout.dtype is None else 1
        *outer, last = self.layout.shape or (1,)
        shape = (*outer, last // items) if items > 1 else self.layout.shape
        from numaload.torch_memory import of_bytes

        return of_bytes(self.flat, _torch_dtype(self.layout.item), shape)


def _torch_dtype(name: str) -> Any:
    from numaload.torch_memory import torch_dtype

    return torch_dtype(name, "stream")
