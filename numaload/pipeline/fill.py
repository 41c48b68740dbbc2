"""Fill memory that is there with many tensors, in order, by the threads of their node.

A place may be any view of that memory, in the order of the tensor's elements: rows in another
order, one half of a fused parameter, a transposed matrix. It is cut into parts that fit into a
core's cache. The kernel writes contiguous parts itself, others go by way of a scratch.

Files are read rather than mapped: a mapping faults page by page, counts as this process's memory,
and kills the process where a file was cut short or its disk fails.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from numaload import trace
from numaload.dequantize import DTYPES, LARGE, SCATTERED, rows_at_once
from numaload.dtypes import NAMES
from numaload.errors import CancelledError, ReadError, UsageError
from numaload.files.reader import Progress
from numaload.files.source import SourceFile
from numaload.machine.stopping import CancelToken, Steps, at_work, check_process
from numaload.machine.workers import Workers, finish
from numaload.pipeline.ahead import Ahead, Range
from numaload.weights import Tensor

WINDOW = 128 << 20  # bytes of files that are read ahead of the workers
READ = 512 << 10  # bytes of a file that are read and converted at a time
AT_ONCE = 2 << 20  # the same by Python: more would leave a core's caches
QUEUED = 8  # targets whose work is handed to the threads before the first of them is done
# Bytes of a part's place: whole huge pages, so that no two threads are the first to touch the same
# one; and long enough that what threads of Python do to each other in between does not count.
PART = 8 << 20


class Target(NamedTuple):
    """Say where a tensor goes.

    place: of any strides; its elements are the tensor's, in order; (.., rows, columns) where a file
    holds them transposed. float32, float16 or ml_dtypes'
    bfloat16, or uint16 for either of those.
    dtype: "float32", "float16" or "bfloat16"; None for the bytes as they are in the file.
    first: element of the tensor, in units of the place's items, that the place begins with.
    """

    tensor: Tensor
    place: NDArray[Any]
    dtype: str | None
    first: int = 0

    def bytes_of(self, items: int) -> int:
        """Return the bytes in the file of so many items of the place; whole blocks."""
        if self.dtype is None:
            return items * self.place.itemsize
        block_size, type_size = self.tensor.block
        return items // block_size * type_size

    @property
    def is_copy(self) -> bool:
        """Return whether the place gets the very bytes that the file has."""
        tensor = self.tensor
        same = NAMES.get(tensor.type_name) == self.dtype and tensor.byte_order == "little"
        return self.dtype is None or same

    @property
    def start(self) -> int:
        """Return the byte of the tensor at which the place begins."""
        return self.bytes_of(self.first)

    @property
    def nbytes(self) -> int:
        """Return how many bytes of the file go there."""
        return self.bytes_of(self.place.size)

    @property
    def order(self) -> tuple[int, int]:
        """Return the key that sorts targets in file order."""
        part, offset = self.tensor.place_in_files
        return part, offset + self.start


class Part(NamedTuple):
    """Name elements of a tensor that one thread makes at a time."""

    first: int  # element of the tensor
    place: NDArray[Any]


def parts(place: NDArray[Any], unit: int, first: int = 0) -> Iterator[Part]:
    """Cut ``place`` in order. unit: elements that a part must be a multiple of, the last aside."""
    if place.flags.c_contiguous:
        flat, most = place.reshape(-1), _most(PART, place.itemsize, unit)
        for start in range(0, flat.size, most):
            yield Part(first + start, flat[start : start + most])
        return
    most = _most(SCATTERED, place.itemsize, unit)
    if place.size <= most or place.ndim == 1:
        yield Part(first, place)
        return
    each = place[0].size
    if each > most:
        for index, part in enumerate(place):
            yield from parts(part, unit, first + index * each)
        return
    count = rows_at_once(most, each)
    for index in range(0, len(place), count):
        yield Part(first + index * each, place[index : index + count])


def _most(nbytes: int, itemsize: int, unit: int) -> int:
    return max(unit, nbytes // itemsize // unit * unit)


_scratch = threading.local()


def scratch(name: str, nbytes: int) -> NDArray[np.uint8]:
    """Return ``nbytes`` of this thread's own memory, which its next call uses again."""
    found: NDArray[np.uint8] | None = getattr(_scratch, name, None)
    if found is None or len(found) < nbytes:
        found = np.empty(nbytes, np.uint8)
        setattr(_scratch, name, found)
    return found[:nbytes]


def _fetch(tensor: Tensor, start: int, nbytes: int) -> NDArray[np.uint8]:
    """Return bytes of the tensor from ``start``, valid until this thread's next call.

    Raises: ReadError, FileChangedError, ClosedError.
    """
    return tensor.fetch(start, nbytes, partial(scratch, "blocks"))


Write = Callable[[Part], None]  # puts it into its place


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
    """Hand tensors to threads. Leaving the context leaves no thread at work.

    todo: what will come, in order.
    """

    def __init__(self, todo: Sequence[Extent], progress: Progress | None, ahead: int) -> None:
        self.workers: Workers = todo[0].tensor.workers()
        self.steps = Steps(sum(t.nbytes for t in todo), progress)
        self.lock, self.token, self.running = threading.Lock(), CancelToken(), 0
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
            self.token.cancel()
            self.ahead.stop(wait=False)
            return
        if kind is not None:
            self._settle()
        self.ahead.stop()

    def _settle(self) -> None:
        """Wait until no thread works, whatever signals come; tasks not begun yet end at once.

        The threads count themselves: a signal may come before their future is kept.
        """
        while True:
            try:
                self.token.cancel()
                with self.idle:
                    self.idle.wait_for(lambda: not self.running)
            except KeyboardInterrupt:
                continue
            return

    def start(self, target: Target, cut: Iterable[Part], write: Write) -> list[Future[None]]:
        """Hand a tensor's parts to the threads, which take parts and tensors in order."""
        todo, ready = iter(cut), self._ready(target)
        stage, tensor = "copy" if target.is_copy else "convert", target.tensor

        def work() -> None:
            while (part := self._next(todo)) is not None:
                try:
                    ready(part)
                    nbytes = target.bytes_of(part.place.size)
                    with trace.span(stage, nbytes, tensor.nodes, tensor=tensor.name):
                        _naming(tensor, write, part)
                    self.ahead.took(nbytes)
                    self.steps.add(nbytes)
                finally:
                    self._pause()

        count = min(self.workers.count, -(-target.nbytes // MOST_ALONE))
        return [self.workers.submit(work, token=self.token) for _ in range(count)]

    def finish(self, futures: list[Future[None]]) -> None:
        """Wait for the threads and call the callback. Raises: CancelledError, and their errors."""
        finish(futures, self.token, self.steps)

    def check(self) -> None:
        """Check that this is the process that began the work. Raises: UsageError in a fork."""
        check_process(self.steps.pid)

    def _ready(self, target: Target) -> Callable[[Part], None]:
        """Return a function that waits until the bytes of a part were read ahead."""
        tensor = target.tensor
        if not tensor.is_file or not target.nbytes:
            return lambda _: None
        before = self.before[tensor.file, tensor.offset + target.start] - target.start

        def wait(part: Part) -> None:
            self.ahead.wait(before + target.bytes_of(part.first + part.place.size))

        return wait

    def _next(self, todo: Iterator[Part]) -> Part | None:
        """Return the next part. Raises: CancelledError for one that nobody will write."""
        with self.lock:
            part = next(todo, None)
            if part is not None and self.token.cancelled():
                raise CancelledError("cancelled", done=self.steps.done, total=self.steps.total)
            self.running += part is not None
            return part

    def _pause(self) -> None:
        with self.idle:
            self.running -= 1
            if not self.running:
                self.idle.notify_all()


def _naming(tensor: Tensor, write: Write, part: Part) -> None:
    """Write a part; errors say which tensor was being read."""
    try:
        write(part)
    except ReadError as error:
        error.within(tensor.name)
        raise


MOST_ALONE = 256 << 10  # bytes of a tensor that a second thread would not make faster


class Extent(Protocol):
    """Name bytes of a tensor that will be wanted."""

    @property
    def tensor(self) -> Tensor: ...
    @property
    def start(self) -> int: ...
    @property
    def nbytes(self) -> int: ...


def _ranges(todo: Sequence[Extent]) -> list[Range]:
    """Return the ranges of files that will be read, in order."""
    found, before = [], 0
    for one in todo:
        if one.tensor.is_file and one.nbytes:
            start = one.tensor.offset + one.start
            found.append(Range(one.tensor.file, start, start + one.nbytes, before))
        before += one.nbytes
    return found


def writer(target: Target) -> tuple[Write, Iterable[Part]]:
    """Return the function that writes one part of this target, and the target's parts.

    Raises: UnsupportedTypeError, UnknownQuantTypeError, UsageError.
    """
    tensor = target.tensor
    tensor.check_type()
    if target.start + target.nbytes > tensor.nbytes:
        raise UsageError(
            f"tensor {tensor.name!r} has {tensor.nbytes} bytes: a place of {target.place.size}"
            f" items wants bytes {target.start} to {target.start + target.nbytes}"
        )
    if target.is_copy:
        return _Raw(target), parts(target.place, 1, target.first)
    writing, place, scales = _Converting(target), target.place, tensor.scales
    if scales is not None and scales.turned:
        place = place.swapaxes(-1, -2)
    return writing, parts(place, writing.convert.step, target.first)


class _Converting:
    def __init__(self, target: Target) -> None:
        self.target, self.past_caches = target, target.place.nbytes >= LARGE
        self.convert = convert = target.tensor.conversion(DTYPES[target.dtype or ""])
        self.step = max(1, AT_ONCE // convert.step_bytes) * convert.step

    def __call__(self, part: Part) -> None:
        place = part.place
        if place.flags.c_contiguous:
            self._put(part.first, place.reshape(-1), past_caches=self.past_caches)
        else:
            made = scratch("floats", place.nbytes).view(place.dtype)
            self._put(part.first, made, past_caches=False)
            place[...] = made.reshape(place.shape)

    def _put(self, first: int, flat: NDArray[Any], *, past_caches: bool) -> None:
        """Convert step by step, so that blocks just read are still in the caches."""
        target, done = self.target, 0
        if self.convert.reads and target.tensor.is_file and not target.tensor.file.is_network:
            done = self._read(first, flat, past_caches=past_caches)
        for start in range(done, flat.size, self.step):
            part = flat[start : start + self.step]
            blocks = _fetch(
                target.tensor, target.bytes_of(first + start), target.bytes_of(part.size)
            )
            self.convert(blocks, part, past_caches, first + start)

    def _read(self, first: int, flat: NDArray[Any], *, past_caches: bool) -> int:
        """Read and convert in one compiled loop. Returns: how many elements are done."""
        tensor, done = self.target.tensor, [0]
        offset = tensor.offset + self.target.bytes_of(first)
        part = scratch("blocks", max(READ, self.convert.step_bytes))

        def read(file: SourceFile) -> None:
            done[0] = self.convert.read(file.fd, offset, flat, part, past_caches, first)

        tensor.read_by(read)
        return done[0]


class _Raw:
    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(self, part: Part) -> None:
        tensor, place = self.target.tensor, part.place
        start, nbytes = self.target.bytes_of(part.first), place.nbytes
        if not place.flags.c_contiguous:
            place[...] = _fetch(tensor, start, nbytes).view(place.dtype).reshape(place.shape)
        elif tensor.is_file:
            tensor.read_into(place.reshape(-1).view(np.uint8).data, start)
        else:
            place.reshape(-1).view(np.uint8)[:] = _fetch(tensor, start, nbytes)
