"""Measure how fast a file can be read, in about a second, and give back what that brought into RAM.

Three ways: past the page cache as numaload reads it (what the disk gives), page by page through a
mapping as programs do that map a model, and copied from RAM. Only bytes that are absent are read
from the disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Thread
from typing import NamedTuple

from numaload.errors import NumaloadError
from numaload.files.plan import DIRECT, MEMORY, make_plan
from numaload.files.residency import (
    ByteRange,
    Residency,
    give_back,
    overlaps,
    present,
    residency,
)
from numaload.files.source import SourceFile
from numaload.files.ways import IntoMemory
from numaload.linux.mapping import map_file, map_private, populate_read, populate_write
from numaload.linux.syscalls import PAGE
from numaload.machine.devices import Device

FIRST, CHUNK = 256 << 10, 8 << 20  # bytes of the first read, and of the largest
MAPPED_CHUNK = 2 << 20  # bytes of a mapping that are taken between two looks at the clock
AHEAD = 16 << 20  # bytes beyond what was taken that the kernel may have read
MOST_THREADS = 8
# How the seconds and bytes are divided.
SHARES = {"disk": 0.5, "mapped": 0.4, "warm": 0.1}


class Budget(NamedTuple):
    """What measuring may take."""

    seconds: float
    nbytes: int


class Speeds(NamedTuple):
    """Bytes a second; None where it was not measured. ``nbytes`` and ``seconds`` that it took."""

    disk: float | None = None  # past the page cache, by several threads
    mapped: float | None = None  # page by page, by one thread, with the kernel's read-ahead
    warm: float | None = None  # copied from RAM by one thread
    nbytes: int = 0
    seconds: float = 0.0
    why_not: str = ""  # why something could not be measured


def measure_speeds(
    files: Sequence[SourceFile], found: Sequence[Residency], device: Device, budget: Budget
) -> Speeds:
    """Measure the file that lacks most. What cannot be read is not measured: ``why_not`` says so.

    It ends within the seconds of the budget and one read more.
    """
    lacking = [one.size - one.resident for one in found]
    which = lacking.index(max(lacking))
    meter = _Meter(files[which], found[which], device, budget)
    begin = time.perf_counter()
    try:
        return meter.run()._replace(nbytes=meter.nbytes, seconds=time.perf_counter() - begin)
    except NumaloadError as error:
        seconds = time.perf_counter() - begin
        return Speeds(nbytes=meter.nbytes, seconds=seconds, why_not=str(error))


class _Meter:
    """Reads one file in three ways, each within its share of the budget."""

    def __init__(self, file: SourceFile, found: Residency, device: Device, budget: Budget) -> None:
        self.file, self.found, self.device, self.budget = file, found, device, budget
        self.nbytes = 0
        self.lock = threading.Lock()

    def run(self) -> Speeds:
        absent = list(_whole_pages(self.found.absent)) if self.found.known else []
        there = list(present(self.found)) if self.found.known else []
        middle = sum(stop - start for start, stop in absent) // 2
        # The first half is read one way and the second another: none sees what the other read.
        first, second = list(_cut(absent, 0, middle)), list(_cut(absent, middle, None))
        try:
            disk = self._disk(first) if first else None
            mapped = self._mapped(second) if second else None
            return Speeds(disk, mapped, self._warm(there or second))
        finally:
            give_back(self.file, [*self._brought(first, "disk"), *self._brought(second, "mapped")])

    def _until(self, way: str) -> float:
        return time.perf_counter() + SHARES[way] * self.budget.seconds

    def _chunks(
        self, ranges: Sequence[ByteRange], way: str, largest: int = CHUNK
    ) -> Iterator[ByteRange]:
        return _chunks(ranges, int(SHARES[way] * self.budget.nbytes), largest)

    def _brought(self, ranges: Sequence[ByteRange], way: str) -> list[ByteRange]:
        """Return what of the absent bytes may be in RAM by now, by read-ahead too."""
        taken = list(self._chunks(ranges, way))
        if not taken:
            return []
        start, stop = taken[0][0], taken[-1][1]
        return list(overlaps(self.found.absent, max(0, start - AHEAD), stop + AHEAD))

    def _count(self, nbytes: int) -> None:
        with self.lock:
            self.nbytes += nbytes

    def _disk(self, ranges: Sequence[ByteRange]) -> float | None:
        """Read ever larger chunks by one thread, then the largest by as many as the plan has."""
        way = make_plan(MEMORY, self.device, self.found.size - self.found.resident).way
        threads, until = min(way.threads, MOST_THREADS), self._until("disk")
        chunks, rate = self._chunks(ranges, "disk"), None
        with ExitStack() as opened:
            source = IntoMemory(self.file, direct=True, quiet=True)
            opened.callback(source.close)
            views = [opened.enter_context(_buffer()) for _ in range(threads)]
            for start, stop in chunks:
                begin = time.perf_counter()
                source.read(views[0][: stop - start], start, DIRECT)
                rate = (stop - start) / (time.perf_counter() - begin)
                self._count(stop - start)
                full = stop - start == CHUNK
                if full or time.perf_counter() + threads * CHUNK / rate > until:
                    break
            else:
                full = False
            if full and threads > 1:
                rate = self._together(source, chunks, views, until) or rate
        return rate

    def _together(
        self,
        source: IntoMemory,
        chunks: Iterator[ByteRange],
        views: Sequence[memoryview],
        until: float,
    ) -> float | None:
        """Read by a thread for each view until the time is over."""
        before, failed = self.nbytes, list[BaseException]()

        def work(view: memoryview) -> None:
            try:
                while time.perf_counter() < until and not failed:
                    with self.lock:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    source.read(view[: chunk[1] - chunk[0]], chunk[0], DIRECT)
                    self._count(chunk[1] - chunk[0])
            except BaseException as error:  # noqa: BLE001 - raised again by who waits
                failed.append(error)

        begin = time.perf_counter()
        running = [Thread(target=work, args=(v,), name="numaload-doctor") for v in views]
        for thread in running:
            thread.start()
        for thread in running:
            thread.join()
        if failed:
            raise failed[0]
        read = self.nbytes - before
        return read / (time.perf_counter() - begin) if read else None

    def _mapped(self, ranges: Sequence[ByteRange]) -> float | None:
        """Map pages one after the other, as touching them does, but an error is no signal."""
        return self.file.ask(self._take, ranges, self._until("mapped"), patient=True)

    def _take(self, ranges: Sequence[ByteRange], until: float) -> float | None:
        before, begin = self.nbytes, time.perf_counter()
        with map_file(self.file.fd, self.file.size) as mapping:
            for start, stop in self._chunks(ranges, "mapped", MAPPED_CHUNK):
                populate_read(mapping, start, stop)
                self._count(stop - start)
                if time.perf_counter() > until:
                    break
        taken = self.nbytes - before
        return taken / (time.perf_counter() - begin) if taken else None

    def _warm(self, ranges: Sequence[ByteRange]) -> float | None:
        """Copy what is in RAM, or was just brought there; None where nothing is."""
        taken, seconds, until = 0, 0.0, self._until("warm")
        with _buffer() as view:
            for start, stop in self._chunks(ranges, "warm"):
                if time.perf_counter() > until or not residency(self.file, start, stop).resident:
                    break
                begin = time.perf_counter()
                self.file.read_into(view[: stop - start], start)
                seconds += time.perf_counter() - begin
                taken += stop - start
        self._count(taken)
        return taken / seconds if taken else None


@contextmanager
def _buffer() -> Iterator[memoryview]:
    """Give memory for one chunk, which was touched before."""
    with map_private(CHUNK) as memory, memory.view(0, CHUNK, write=True) as view:
        populate_write(memory, 0, CHUNK)
        yield view


def _whole_pages(ranges: Sequence[ByteRange]) -> Iterator[ByteRange]:
    """Yield these ranges without the pages that they have in part."""
    for start, stop in ranges:
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if first < last:
            yield first, last


def _cut(ranges: Sequence[ByteRange], first: int, last: int | None) -> Iterator[ByteRange]:
    """Yield the bytes from the ``first`` to the ``last`` of these ranges, in whole pages."""
    passed = 0
    for start, stop in ranges:
        end = stop if last is None else min(stop, start + max(0, last - passed))
        begin = start + max(0, first - passed)
        passed += stop - start
        yield from _whole_pages([(begin, end)])


def _chunks(ranges: Sequence[ByteRange], limit: int, largest: int = CHUNK) -> Iterator[ByteRange]:
    """Yield chunks that double in size up to the largest; of all, no more bytes than the limit."""
    size = FIRST
    for start, stop in ranges:
        at = start
        while at < stop and limit >= PAGE:
            end = min(stop, at + min(size, limit // PAGE * PAGE))
            yield at, end
            limit -= end - at
            at, size = end, min(largest, 2 * size)
