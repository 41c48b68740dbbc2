"""Filling memory that is there: many tensors, in order, by the threads of their node."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from numaload.dequantize import DTYPES, LARGE, Conversion
from numaload.errors import CancelledError, ReadError, UsageError
from numaload.numa.stopping import Steps, at_work, check_process, until
from numaload.numa.workers import Workers, finish
from numaload.pipeline.ahead import Ahead, Range
from numaload.pipeline.pieces import Piece, Target, pieces
from numaload.pipeline.source import fetch, scratch
from numaload.storage.files import SourceFile
from numaload.storage.reader import Progress
from numaload.weights import Tensor

WINDOW = 128 << 20  # bytes of files that are read ahead of the workers
READ = 512 << 10  # bytes of a file that are read and converted at a time
AT_ONCE = 2 << 20  # the same by Python: more would leave a core's caches
QUEUED = 8  # targets whose work is handed to the threads before the first of them is done

Write = Callable[[Piece], None]  # puts it into its place


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
    with Work(targets, progress, ahead) as work:
        waiting: deque[list[Future[None]]] = deque()
        for target, (write, cut) in zip(targets, writers, strict=True):
            waiting.append(work.start(target, cut, write))
            if len(waiting) > QUEUED:
                work.finish(waiting.popleft())
        while waiting:
            work.finish(waiting.popleft())


class Work:
    """Tensors in the hands of threads. Leaving it, however, ends with no thread at work.

    todo: what will come, in order.
    """

    def __init__(self, todo: Sequence[Extent], progress: Progress | None, ahead: int) -> None:
        self.workers: Workers = todo[0].tensor.workers()
        self.steps = Steps(sum(t.nbytes for t in todo), progress)
        self.lock, self.stop, self.running = threading.Lock(), threading.Event(), 0
        self.idle = threading.Condition(self.lock)
        ranges = _ranges(todo)
        self.ahead = Ahead(ranges, ahead)
        self.before = {(one.file, one.start): one.before for one in ranges}

    def __enter__(self) -> Work:
        self.steps.begin()
        try:
            self.ahead.start()
        except BaseException:  # Ctrl-C: it may have begun
            self.ahead.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if os.getpid() != self.steps.pid:
            return  # the threads are the parent's
        if at_work():  # a stream that is garbage: what it is made of lives until it is done
            self.stop.set()
            self.ahead.stop(wait=False)
            return
        if kind is not None:
            self._settle()
        self.ahead.stop()

    def _settle(self) -> None:
        """Until none works, whatever signals come. What has not begun will find that it is over.

        Counted by the threads themselves: a signal may come before their future is kept.
        """
        while True:
            try:
                self.stop.set()
                with self.idle:
                    self.idle.wait_for(lambda: not self.running)
            except KeyboardInterrupt:
                continue
            return

    def start(self, target: Target, cut: Iterable[Piece], write: Write) -> list[Future[None]]:
        """Hand the pieces to the threads; they take them in order, and tensors in that of calls."""
        todo, ready = iter(cut), self._ready(target)

        def work() -> None:
            with until(self.stop.is_set):
                while (piece := self._next(todo)) is not None:
                    try:
                        ready(piece)
                        _naming(target.tensor, write, piece)
                        nbytes = target.bytes_of(piece.place.size)
                        self.ahead.took(nbytes)
                        self.steps.add(nbytes)
                    finally:
                        self._pause()

        count = min(self.workers.count, -(-target.nbytes // MOST_ALONE))
        return [self.workers.submit(work) for _ in range(count)]

    def finish(self, futures: list[Future[None]]) -> None:
        """Wait for them, and tell the callback meanwhile. Raises: CancelledError and theirs."""
        finish(futures, self.stop, self.steps)

    def check(self) -> None:
        """Raises: UsageError in a forked child."""
        check_process(self.steps.pid)

    def _ready(self, target: Target) -> Callable[[Piece], None]:
        """Waits until what a piece is made of was read ahead."""
        tensor = target.tensor
        if not tensor.is_file or not target.nbytes:
            return lambda _: None
        before = self.before[tensor.file, tensor.offset + target.start] - target.start

        def wait(piece: Piece) -> None:
            self.ahead.wait(before + target.bytes_of(piece.first + piece.place.size))

        return wait

    def _next(self, todo: Iterator[Piece]) -> Piece | None:
        """Raises: CancelledError for a piece that nobody will write."""
        with self.lock:
            piece = next(todo, None)
            if piece is not None and self.stop.is_set():
                raise CancelledError("cancelled", done=self.steps.done, total=self.steps.total)
            self.running += piece is not None
            return piece

    def _pause(self) -> None:
        with self.idle:
            self.running -= 1
            if not self.running:
                self.idle.notify_all()


def _naming(tensor: Tensor, write: Write, piece: Piece) -> None:
    """Errors say which tensor was being read."""
    try:
        write(piece)
    except ReadError as error:
        error.within(tensor.name)
        raise


MOST_ALONE = 256 << 10  # bytes of a tensor that a second thread would not make faster


class Extent(Protocol):
    """Bytes that will be wanted of a tensor."""

    @property
    def tensor(self) -> Tensor: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def _ranges(todo: Sequence[Extent]) -> list[Range]:
    """What will be read of files, in order."""
    found, before = [], 0
    for one in todo:
        if one.tensor.is_file and one.nbytes:
            start = one.tensor.offset + one.start
            found.append(Range(one.tensor.file, start, start + one.nbytes, before))
        before += one.nbytes
    return found


def writer(target: Target) -> tuple[Write, Iterable[Piece]]:
    """How pieces of this target are written, and which they are.

    Raises: UnsupportedTypeError, UnknownQuantTypeError, UsageError.
    """
    tensor = target.tensor
    tensor.check_type()
    if target.start + target.nbytes > tensor.nbytes:
        raise UsageError(
            f"tensor {tensor.name!r}: bytes {target.start} to {target.start + target.nbytes} of"
            f" {tensor.nbytes} for {target.place.size} places"
        )
    if target.dtype is None:
        return _Raw(target), pieces(target.place, 1, target.first)
    writing = _Converting(target)
    return writing, pieces(target.place, writing.convert.step, target.first)


class _Converting:
    def __init__(self, target: Target) -> None:
        self.target, self.past_caches = target, target.place.nbytes >= LARGE
        tensor, dtype = target.tensor, DTYPES[target.dtype or ""]
        self.convert = Conversion(
            tensor.qtype, dtype, name=tensor.name, byte_order=tensor.byte_order
        )

        convert = self.convert
        self.step = max(1, AT_ONCE // convert.step_bytes) * convert.step

    def __call__(self, piece: Piece) -> None:
        place = piece.place
        if place.flags.c_contiguous:
            self._put(piece.first, place.reshape(-1), past_caches=self.past_caches)
        else:
            made = scratch("floats", place.nbytes).view(place.dtype)
            self._put(piece.first, made, past_caches=False)
            place[...] = made.reshape(place.shape)

    def _put(self, first: int, flat: NDArray[Any], *, past_caches: bool) -> None:
        """Not all at once: blocks that were just read shall still be in the caches."""
        target, done = self.target, 0
        if self.convert.reads and target.tensor.is_file and not target.tensor.file.is_network:
            done = self._read(first, flat, past_caches=past_caches)
        for start in range(done, flat.size, self.step):
            part = flat[start : start + self.step]
            blocks = fetch(
                target.tensor, target.bytes_of(first + start), target.bytes_of(part.size)
            )
            self.convert(blocks, part, past_caches)

    def _read(self, first: int, flat: NDArray[Any], *, past_caches: bool) -> int:
        """Without Python between reading and converting; how much of it that did."""
        tensor, done = self.target.tensor, [0]
        offset = tensor.offset + self.target.bytes_of(first)
        part = scratch("blocks", max(READ, self.convert.step_bytes))

        def read(file: SourceFile) -> None:
            done[0] = self.convert.read(file.fd, offset, flat, part, past_caches)

        tensor.read_by(read)
        return done[0]


class _Raw:
    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, piece: Piece) -> None:
        tensor, place = self.target.tensor, piece.place
        start, nbytes = self.target.bytes_of(piece.first), place.nbytes
        if not place.flags.c_contiguous:
            place[...] = fetch(tensor, start, nbytes).view(place.dtype).reshape(place.shape)
        elif tensor.is_file:
            tensor.read_into(place.reshape(-1).view(np.uint8).data, start)
        else:
            place.reshape(-1).view(np.uint8)[:] = fetch(tensor, start, nbytes)
