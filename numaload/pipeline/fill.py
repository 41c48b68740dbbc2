"""Filling memory that is there: many tensors, in order, by the threads of their node."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload.dequantize import DTYPES, LARGE, Conversion
from numaload.errors import CancelledError, UsageError
from numaload.formats.qtypes import BLOCKS
from numaload.numa.workers import Workers, finish, settle
from numaload.pipeline.ahead import Ahead, Range
from numaload.pipeline.pieces import Piece, Target, pieces
from numaload.pipeline.source import fetch, scratch
from numaload.storage.parallel import Progress
from numaload.weights import Tensor

WINDOW = 64 << 20  # bytes of files that are read ahead of the workers
QUEUED = 8  # targets whose work is handed to the threads before the first of them is done

Write = Callable[[Tensor, Piece], int]  # puts a piece into its place; bytes of the file


def fill(
    targets: Sequence[Target], *, ahead: int = WINDOW, progress: Progress | None = None
) -> None:
    """Put every tensor into its place, in parallel; best given in the order of the files.

    ahead: bytes that are read ahead of the workers. progress(bytes of the files done, in all):
    returning False cancels.
    Raises: UnsupportedTypeError, UsageError before anything is written; ReadError,
    FileChangedError, CancelledError: then some places are filled. When it returns or raises, no
    thread writes to them any more.
    """
    if not targets:
        return
    writers = [writer(target) for target in targets]
    work = Work([target.tensor for target in targets], progress, ahead)
    with work:
        waiting: deque[list[Future[None]]] = deque()
        for target, (write, cut) in zip(targets, writers, strict=True):
            waiting.append(work.start(target.tensor, cut, write))
            if len(waiting) > QUEUED:
                finish(waiting.popleft())
        while waiting:
            finish(waiting.popleft())


class Work:
    """Tensors in the hands of threads. Leaving it, however, ends with no thread at work."""

    def __init__(self, tensors: Sequence[Tensor], progress: Progress | None, ahead: int) -> None:
        self.workers: Workers = tensors[0].workers()
        self.total, self.done, self.progress = sum(t.nbytes for t in tensors), 0, progress
        self.stop, self.lock = threading.Event(), threading.Lock()
        self.ahead = Ahead(_ranges(tensors), ahead)
        self._started: list[Future[None]] = []

    def __enter__(self) -> Work:
        if self.progress:
            self.progress(0, self.total)
        self.ahead.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            settle(self._started, self.stop)
        self.ahead.stop()

    def start(self, tensor: Tensor, cut: Iterable[Piece], write: Write) -> list[Future[None]]:
        """Hand the pieces to the threads; they take them in order, and tensors in that of calls."""
        todo = iter(cut)

        def work() -> None:
            while not self.stop.is_set():
                with self.lock:
                    piece = next(todo, None)
                if piece is None:
                    return
                self._advance(write(tensor, piece))

        self._started = [future for future in self._started if not future.done()]
        count = min(self.workers.count, -(-tensor.nbytes // MOST_ALONE))
        futures = []
        for _ in range(count):
            futures.append(self.workers.submit(work))
            self._started.append(futures[-1])
        return futures

    def _advance(self, nbytes: int) -> None:
        self.ahead.took(nbytes)
        with self.lock:
            self.done += nbytes
            if self.progress and self.progress(self.done, self.total) is False:
                self.stop.set()
                raise CancelledError("cancelled", done=self.done, total=self.total)


MOST_ALONE = 256 << 10  # bytes of a tensor that a second thread would not make faster


def _ranges(tensors: Sequence[Tensor]) -> list[Range]:
    """What will be read of files, in order."""
    found, before = [], 0
    for tensor in tensors:
        if tensor.is_file and tensor.nbytes:
            stop = tensor.offset + tensor.nbytes
            found.append(Range(tensor.file, tensor.offset, stop, before))
        before += tensor.nbytes
    return found


def writer(target: Target) -> tuple[Write, Iterable[Piece]]:
    """How pieces of this target are written, and which they are.

    Raises: UnsupportedTypeError, UsageError.
    """
    tensor, place = target.tensor, target.place
    if target.dtype is None:
        if place.nbytes != tensor.nbytes:
            raise UsageError(
                f"tensor {tensor.name!r}: {place.nbytes} bytes for its {tensor.nbytes}"
            )
        return _write_raw, pieces(place, 1)
    if place.size != tensor.size:
        raise UsageError(f"tensor {tensor.name!r}: {place.size} places for {tensor.size} weights")
    convert = Conversion(
        tensor.qtype, DTYPES[target.dtype], name=tensor.name, byte_order=tensor.byte_order
    )
    return _Converting(convert, tensor, place), pieces(place, convert.step)


class _Converting:
    def __init__(self, convert: Conversion, tensor: Tensor, place: NDArray[Any]) -> None:
        self.convert, self.past_caches = convert, place.nbytes >= LARGE
        self.block_size, self.type_size = BLOCKS[tensor.qtype]

    def __call__(self, tensor: Tensor, piece: Piece) -> int:
        start = piece.first // self.block_size * self.type_size
        nbytes = piece.place.size // self.block_size * self.type_size
        blocks, place = fetch(tensor, start, nbytes), piece.place
        if place.flags.c_contiguous:
            self.convert(blocks, place.reshape(-1), self.past_caches)
        else:
            made = scratch("floats", place.nbytes).view(place.dtype)
            self.convert(blocks, made, False)
            place[...] = made.reshape(place.shape)
        return nbytes


def _write_raw(tensor: Tensor, piece: Piece) -> int:
    place = piece.place
    start, nbytes = piece.first * place.itemsize, place.nbytes
    if not place.flags.c_contiguous:
        place[...] = fetch(tensor, start, nbytes).view(place.dtype).reshape(place.shape)
    elif tensor.is_file:
        tensor.read_into(place.reshape(-1).view(np.uint8).data, start)
    else:
        place.reshape(-1).view(np.uint8)[:] = fetch(tensor, start, nbytes)
    return nbytes
