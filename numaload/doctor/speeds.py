"""Measure how fast a file can be read, in about a second, and give back what that brought into RAM.

Three ways: past the page cache as numaload reads it (what the disk gives), page by page through a
mapping as programs do that map a model, and copied from RAM. Only bytes that are absent are read
from the disk, and holes are not read: they are on no disk.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from errno import EFAULT
from threading import Thread
from typing import NamedTuple

from numaload.doctor.check import Unknown
from numaload.errors import FileChangedError, NumaloadError, ReadError, StalledError, reason
from numaload.files.holes import find_holes
from numaload.files.plan import BUFFERED, DIRECT, MEMORY, make_plan
from numaload.files.residency import (
    ByteRange,
    Residency,
    give_back,
    length,
    merged,
    overlaps,
    present,
    read_around,
    residency,
    whole_pages,
    without,
)
from numaload.files.source import SourceFile
from numaload.files.ways import IntoMemory
from numaload.linux.mapping import map_file, map_private, populate_write
from numaload.linux.syscalls import PAGE
from numaload.machine.devices import Device

FIRST, CHUNK = 256 << 10, 8 << 20  # bytes of the first read, and of the largest
MAPPED_CHUNK = 2 << 20  # bytes of a mapping that are taken between two looks at the clock
SHORT = 1 << 20  # bytes of the shortest read by which several threads are measured
MOST_THREADS = 8
ROUNDS = 4  # reads that each of several threads has time for
# How the seconds and bytes are divided.
SHARES = {"disk": 0.5, "mapped": 0.4, "warm": 0.1}
ALONE = 1 / 3  # of what "disk" has is for one thread, where others follow
HIDDEN = "the kernel tells only the file's owner what of it is in RAM"
NOTHING = "the file has no whole page, or is mostly holes"


class Budget(NamedTuple):
    """What measuring may take."""

    seconds: float
    nbytes: int


class Speeds(NamedTuple):
    """Bytes a second; None where it was not measured. ``nbytes`` and ``seconds`` that it took."""

    disk: float | None = None  # past the page cache, by one thread or several: the fastest
    mapped: float | None = None  # page by page, by one thread, with the kernel's read-ahead
    warm: float | None = None  # copied from RAM by one thread
    nbytes: int = 0
    seconds: float = 0.0
    why_not: str = ""  # why something could not be measured
    stalled_s: float = 0.0  # that a network was waited for in vain
    direct: bool = True  # whether what was read of the disk went past the page cache


def measure_speeds(
    files: Sequence[SourceFile], found: Sequence[Residency], device: Device, budget: Budget
) -> Speeds:
    """Measure the file that lacks most. What cannot be read is not measured: ``why_not`` says so.

    It ends within the seconds of the budget and one read more.
    """
    known = [(file, one) for file, one in zip(files, found, strict=True) if one.known]
    if not known:
        return Speeds(why_not=HIDDEN)
    file, its = max(known, key=lambda pair: length(pair[1].absent))
    meter = _Meter(file, its, device, budget)
    begin = time.perf_counter()
    speeds = meter.run()
    return speeds._replace(nbytes=meter.nbytes, seconds=time.perf_counter() - begin)


def brought(found: Residency, taken: Sequence[ByteRange], device: Device) -> list[ByteRange]:
    """Return what of a file was absent and may be in RAM since ``taken`` was read of it."""
    far = read_around(device)
    around = merged((max(0, start - far), stop + far) for start, stop in taken)
    return [one for start, stop in around for one in overlaps(found.absent, start, stop)]


def pieces(
    file: SourceFile, ranges: Sequence[ByteRange], device: Device
) -> Iterator[tuple[ByteRange, memoryview | ReadError]]:
    """Read these ranges, or all of the file, past the page cache; what is read is yielded.

    A range has at most 16 MiB. The bytes are gone with the next ones.
    Raises: FileChangedError; Unknown where what is read would stay in RAM.
    """
    found, cached = residency(file), list[ByteRange]()
    ranges = ranges or [
        (at, min(at + 2 * CHUNK, file.size)) for at in range(0, file.size, 2 * CHUNK)
    ]
    with ExitStack() as opened:
        source = IntoMemory(file, direct=True, quiet=True)
        opened.callback(source.close)
        if not (found.known or source.is_direct):
            raise Unknown(HIDDEN)  # what this brings into RAM could not be given back
        memory = opened.enter_context(map_private(2 * CHUNK))
        buffer = opened.enter_context(memory.view(0, 2 * CHUNK, write=True))

        def drop() -> None:
            if found.known and cached:
                give_back(file, brought(found, cached, device))
            cached.clear()

        opened.callback(drop)
        for start, stop in ranges:
            missing = found.resident_in(start, stop) < stop - start
            cached.append((start, stop))  # before it is read: Ctrl-C may come at any moment
            with buffer[: stop - start] as view:
                read: memoryview | ReadError = view
                try:
                    source.read(view, start, DIRECT if missing else BUFFERED)
                except FileChangedError:
                    raise
                except ReadError as error:
                    read = error
                if missing and source.is_direct and read is view and not stop % PAGE:
                    cached.clear()  # it went past the page cache
                yield (start, stop), read
            drop()


class _Meter:
    """Reads one file in three ways, each within its share of the budget."""

    def __init__(self, file: SourceFile, found: Residency, device: Device, budget: Budget) -> None:
        self.file, self.found, self.device, self.budget = file, found, device, budget
        self.nbytes = 0
        self.taken: list[ByteRange] = []  # also what could not be read to its end
        self.direct = True
        self.lock = threading.Lock()

    def run(self) -> Speeds:
        absent = list(whole_pages(without(self.found.absent, find_holes(self.file))))
        if 2 * length(absent) < length(self.found.absent):
            absent = []  # so little would say nothing of the rest
        middle = length(absent) // 2 // PAGE * PAGE
        # The first half is read one way and the second another: none sees what the other read.
        first, second = list(_cut(absent, 0, middle)), list(_cut(absent, middle, None))
        there = list(present(self.found)) or second
        rates: dict[str, float | None] = {}
        why, stalled_s = "", 0.0
        ways = (("disk", self._disk, first), ("mapped", self._mapped, second))
        try:
            for name, measure, ranges in (*ways, ("warm", self._warm, there)):
                try:
                    rates[name] = measure(ranges) if ranges else None
                except StalledError as error:  # noqa: PERF203 - the other ways may still work
                    why, stalled_s = str(error), error.seconds
                    break
                except NumaloadError as error:
                    why = why or str(error)
        finally:
            if not stalled_s:
                give_back(self.file, brought(self.found, self.taken, self.device))
        why = why or ("" if any(rates.values()) else NOTHING)
        disk, mapped, warm = (rates.get(name) for name in SHARES)
        if disk and mapped:
            disk = max(disk, mapped)  # it gives at least that
        return Speeds(disk, mapped, warm, why_not=why, stalled_s=stalled_s, direct=self.direct)

    def _share(self, way: str) -> tuple[float, int]:
        """Return until when this way may read, and how many bytes."""
        share = SHARES[way]
        return time.perf_counter() + share * self.budget.seconds, int(share * self.budget.nbytes)

    def _take(self, start: int, stop: int) -> None:
        """Note what is going to be read."""
        with self.lock:
            self.taken.append((start, stop))
            self.nbytes += stop - start

    def _disk(self, ranges: Sequence[ByteRange]) -> float | None:
        """Read by one thread, then by as many as the plan has; the faster of both counts."""
        way = make_plan(MEMORY, self.device, length(self.found.absent)).way
        threads = min(way.threads, MOST_THREADS)
        share = ALONE if threads > 1 else 1.0
        with ExitStack() as opened:
            source = IntoMemory(self.file, direct=True, quiet=True)
            opened.callback(source.close)
            views = [opened.enter_context(_buffer()) for _ in range(threads)]
            until, nbytes = self._share("disk")  # what memory took is not the disk's time
            now, before = time.perf_counter(), self.nbytes
            chunks = _chunks(ranges, int(share * nbytes))
            rate = self._alone(source, chunks, views[0], now + share * (until - now))
            done = self.nbytes - before
            left, left_s = nbytes - done, until - time.perf_counter()
            if rate and threads * SHORT < min(rate * left_s, left):
                each = int(min(rate * left_s, left)) // (threads * ROUNDS) // PAGE * PAGE
                each = max(SHORT, min(CHUNK, each))
                chunks = _chunks(list(_cut(ranges, done, None)), left, each, each)
                rate = max(rate, self._together(source, chunks, views, until) or 0.0)
            self.direct = not source.is_refused
        return rate

    def _alone(
        self, source: IntoMemory, chunks: Iterator[ByteRange], view: memoryview, until: float
    ) -> float | None:
        """Read ever larger chunks by this thread; return the rate of the larger ones."""
        took: list[tuple[int, float]] = []
        for start, stop in chunks:
            begin = time.perf_counter()
            if took and begin + (stop - start) / _rate(took) > until:
                break
            self._take(start, stop)
            with view[: stop - start] as part:
                source.read(part, start, DIRECT)
            took.append((stop - start, time.perf_counter() - begin))
        return _rate(took) if took else None

    def _together(
        self,
        source: IntoMemory,
        chunks: Iterator[ByteRange],
        views: Sequence[memoryview],
        until: float,
    ) -> float | None:
        """Read by a thread for each view until the time is over."""
        before, failed = self.nbytes, list[BaseException]()
        turn = threading.Lock()

        def work(view: memoryview) -> None:
            try:
                while time.perf_counter() < until and not failed:
                    with turn:
                        chunk = next(chunks, None)
                    if chunk is None:
                        return
                    self._take(*chunk)
                    with view[: chunk[1] - chunk[0]] as part:
                        source.read(part, chunk[0], DIRECT)
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
        """Touch pages one after the other, as programs do that map the file."""
        return self.file.ask(self._touch_all, ranges, *self._share("mapped"))

    def _touch_all(self, ranges: Sequence[ByteRange], until: float, nbytes: int) -> float | None:
        done, begin = 0, time.perf_counter()
        ends = os.pipe2(os.O_CLOEXEC)
        try:
            with map_file(self.file.fd, self.file.size) as mapping, mapping.view() as view:
                for start, stop in _chunks(ranges, nbytes, FIRST, MAPPED_CHUNK):
                    now = time.perf_counter()
                    if done and now + (stop - start) * (now - begin) / done > until:
                        break
                    self._take(start, stop)
                    self._touch(view, start, stop, ends)
                    done += stop - start
        finally:
            for end in ends:
                os.close(end)
        return done / (time.perf_counter() - begin) if done else None

    def _touch(self, view: memoryview, start: int, stop: int, ends: tuple[int, int]) -> None:
        """Have the kernel take a byte of each page into a pipe.

        A page that cannot be read ends that call, while touching it would end this process, and
        asking for it by madvise never returns on Linux 6.1. Raises: ReadError.
        """
        its, count = [view[at : at + 1] for at in range(start, stop, PAGE)], 0
        try:
            count = os.writev(ends[1], its)
            os.read(ends[0], count)
        except OSError as error:
            if error.errno != EFAULT:  # which is said of the first page
                raise ReadError(reason(error), path=self.file.path, offset=start) from error
        finally:
            for byte in its:
                byte.release()
        if count < len(its):
            at = start + count * PAGE
            raise ReadError("this page cannot be read", path=self.file.path, offset=at)

    def _warm(self, ranges: Sequence[ByteRange]) -> float | None:
        """Copy what is in RAM, or was just brought there; None where nothing is."""
        done, seconds = 0, 0.0
        with _buffer() as buffer:
            until, nbytes = self._share("warm")
            for start, stop in _chunks(ranges, nbytes):
                if time.perf_counter() > until:
                    break
                if residency(self.file, start, stop).absent:
                    continue
                self._take(start, stop)
                begin = time.perf_counter()
                with buffer[: stop - start] as part:
                    self.file.read_into(part, start)
                seconds += time.perf_counter() - begin
                done += stop - start
        return done / seconds if done else None


@contextmanager
def _buffer() -> Iterator[memoryview]:
    """Give memory for one chunk, which was touched before."""
    with map_private(CHUNK) as memory, memory.view(0, CHUNK, write=True) as view:
        populate_write(memory, 0, CHUNK)
        yield view


def _rate(took: Sequence[tuple[int, float]]) -> float:
    """Return bytes a second of (bytes, seconds) of reads, without the first and the short ones.

    The first waits for a disk's head or a sleeping link, and short ones for their answer.
    """
    rest = took[1:] or took
    longest = max(nbytes for nbytes, _ in rest)
    counted = [one for one in rest if 2 * one[0] >= longest]
    return sum(nbytes for nbytes, _ in counted) / sum(seconds for _, seconds in counted)


def _cut(ranges: Sequence[ByteRange], first: int, last: int | None) -> Iterator[ByteRange]:
    """Yield the bytes from the ``first`` to the ``last`` of these ranges, in whole pages."""
    passed = 0
    for start, stop in ranges:
        end = stop if last is None else min(stop, start + max(0, last - passed))
        begin = start + max(0, first - passed)
        passed += stop - start
        yield from whole_pages([(begin, end)])


def _chunks(
    ranges: Sequence[ByteRange], limit: int, size: int = FIRST, largest: int = CHUNK
) -> Iterator[ByteRange]:
    """Yield chunks that double in size up to the largest; of all, no more bytes than the limit."""
    for start, stop in ranges:
        at = start
        while at < stop and limit >= PAGE:
            end = min(stop, at + min(size, limit // PAGE * PAGE))
            yield at, end
            limit -= end - at
            at, size = end, min(largest, 2 * size)
