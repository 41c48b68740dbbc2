"""``numaload tune``: measure once how this device is read fastest, and keep that as its plan.

Each turn reads another part of the file, which is absent, as prewarm, copies and mirrors read it.
First come the ways that the plan would try, then threads and bytes a read around the fastest of
them; at last the fastest and the default in turns, for so many rounds that noise shows.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from numaload.bench.machine import Progress, median_interval
from numaload.errors import ReadError
from numaload.files import tuned
from numaload.files.copy import begun_by_copies, fill
from numaload.files.holes import find_holes
from numaload.files.plan import (
    CACHE,
    MEMORY,
    MOST_THREADS,
    ReadMethod,
    ReadPlan,
    Tuned,
    make_plan,
    no_more_than,
)
from numaload.files.reader import Chunk, Reading
from numaload.files.reading_lock import reading_lock
from numaload.files.residency import (
    ByteRange,
    give_back,
    read_around,
    residency,
    whole_pages,
    without,
)
from numaload.files.source import SourceFile
from numaload.files.source import io_timeout as waiting
from numaload.files.ways import IntoMemory
from numaload.linux.mapping import map_private
from numaload.machine.affinity import allowed
from numaload.machine.devices import device_of
from numaload.machine.memory import available
from numaload.pagecache.reading import CacheBudget, read_into_cache

SECONDS = 25.0  # for each of page cache and memory, at most, and some turns more
SEARCHED = 0.4  # of these, before the last rounds begin
TURN_S = 0.4  # that a turn of the default way shall take
LEAST, MOST = 32 << 20, 512 << 20  # bytes of a turn
BEFORE = 16 << 20  # bytes that are read before these: the kernel reads ahead so far
LARGE = 1 << 40  # bytes of a reading for which every plan has all of its threads
PARTS = 4  # of the file, at least: what was just read may be in the disk's own memory
OF_MEMORY = 8  # a turn takes one part in so many of free memory at most
STEPS = 3  # times that threads and bytes a read around the fastest are measured
ROUNDS = 6  # of the last comparison: fewer do not tell whether a difference is noise
SOME = 3  # rounds after which what is slower than the default is left out; of the first part
FINALISTS = 2  # besides the default
CLEARLY = 1.05  # times as fast; less is not worth leaving the default
LEAST_CHUNK = 1 << 20
ANSWER_S = 5.0  # that a slow device may take to answer what the kernel has asked ahead
HIDDEN = "the kernel tells only its owner what of it is in RAM: tune a file of yours on this disk"


@dataclass
class TunedSink:
    """What was measured of one sink. rates: {way: bytes a second of each turn}.

    way: the fastest, or the default where nothing is faster beyond noise; ``gain`` times as fast.
    too_slow: the time was over before that could be told, so there is no plan.
    """

    default: ReadMethod
    way: ReadMethod
    gain: float = 1.0
    too_slow: bool = False
    rates: dict[ReadMethod, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        ways = [way._asdict() | {"rates": rates} for way, rates in self.rates.items()]
        return {
            "default": self.default._asdict(),
            **self.way._asdict(),
            "gain": self.gain,
            "too_slow": self.too_slow,
            "ways": ways,
        }


@dataclass
class TuneReport:
    """``sinks``: by "page cache" and "memory". nbytes: that were read.

    record: the file that the plans are kept in, "" where all sinks are too slow.
    """

    path: str
    device: str
    sinks: Mapping[str, TunedSink]
    nbytes: int
    seconds: float
    record: str

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"sinks": {name: one.to_dict() for name, one in self.sinks.items()}}


def tune(path: str | os.PathLike[str], *, io_timeout: float | None = None) -> TuneReport:
    """Measure how the device under a file is read fastest, and keep that as its plan.

    It takes about a minute at most. What it reads is absent, and is given back; what is in RAM
    stays. Later calls of prewarm, mirror and copies on this device read so, and say so.
    io_timeout: seconds to wait for an answer of a network file system.
    Raises: ReadError where too little of the file is absent; StoreError where the plan cannot be
    kept, before anything is read; StalledError, FileChangedError, NodeMemoryError, CancelledError.
    """
    return measure(path, lambda _: None, io_timeout)


def measure(
    path: str | os.PathLike[str], step: Progress, io_timeout: float | None = None
) -> TuneReport:
    """Tune as ``tune`` does, and tell ``step`` in words what is read next."""
    begin = time.perf_counter()
    with waiting(io_timeout), SourceFile(os.fsdecode(path)) as file, reading_lock([file]):
        tuner = _Tuner(file, step)
        tuned.check_kept()
        try:
            sinks = {sink: tuner.tune(sink) for sink in (CACHE, MEMORY)}
        finally:
            tuner.give_back()
        file.check_unchanged()
        file.check_name()  # by which each turn opened it
        date = time.strftime("%Y-%m-%d")
        told = {sink: one for sink, one in sinks.items() if not one.too_slow}
        plans = {sink: Tuned(one.way, one.gain, date) for sink, one in told.items()}
        if plans:
            record = tuned.keep(file, tuner.device, plans)
        else:
            tuned.forget(file)  # or an earlier plan would be used on
            record = ""
        seconds = time.perf_counter() - begin
        return TuneReport(file.path, str(tuner.device), sinks, tuner.nbytes, seconds, record)


class _Tuner:
    """Reads parts of one file in turns."""

    def __init__(self, file: SourceFile, step: Progress) -> None:
        self.file, self.step, self.nbytes = file, step, 0
        self.device = device_of(file.path, network=file.is_network, numbers=file.device)
        found = residency(file)
        if not found.known:
            raise ReadError(HIDDEN, path=file.path)
        if self.device.kind == "memory":
            raise ReadError(f"it lies in {self.device}: nothing is read there", path=file.path)
        self.ranges = list(whole_pages(without(found.absent, find_holes(file))))
        self.rng = random.Random()  # noqa: S311 - the order of turns
        self.part = LEAST
        self.left: list[ByteRange] = []  # of which something may still be in RAM
        self.todo: Iterator[ByteRange] = iter(())
        self._check()

    def give_back(self) -> None:
        """Drop what stays of turns: one failed, or a slow device was still reading ahead."""
        until = time.perf_counter() + ANSWER_S
        while self.left and time.perf_counter() < until:
            self.left = give_back(self.file, self.left)

    def _check(self) -> None:
        size, count = BEFORE + LEAST, len(self._parts())
        if count < PARTS:
            fix = "take a larger file" if self.file.size < PARTS * size else "numaload evict FILE"
            raise ReadError(
                f"expected {PARTS} pieces of {size >> 20} MiB that are on the disk and not in RAM,"
                f" found {count}: {fix}",
                path=self.file.path,
            )

    def _parts(self) -> list[ByteRange]:
        size = BEFORE + self.part
        return [
            (at, at + size)
            for start, stop in self.ranges
            for at in range(start, stop - size + 1, size)
        ]

    def tune(self, sink: str) -> TunedSink:
        plan = make_plan(sink, self.device, LARGE)
        until = time.perf_counter() + SECONDS
        self.part, self.todo = LEAST, iter(())
        rate = self._turn(sink, plan.way)  # wakes the device, too
        most = min(MOST, available().free // OF_MEMORY, int(rate * TURN_S))
        while 2 * self.part <= most:
            self.part *= 2
            if len(self._parts()) < PARTS:  # ranges may be in pieces that hold no larger ones
                self.part //= 2
                break
        self.todo = iter(())
        found = TunedSink(plan.way, plan.way)
        self._search(sink, plan.candidates, found, until - (1 - SEARCHED) * SECONDS)
        self._decide(sink, found, until)
        return found

    def _search(
        self, sink: str, ways: Sequence[ReadMethod], found: TunedSink, until: float
    ) -> None:
        """Measure these ways, and those around the fastest, step by step."""
        for _ in range(1 + STEPS):
            for way in self.rng.sample(ways, len(ways)):
                if time.perf_counter() < until:
                    found.rates[way] = [self._turn(sink, way)]
            if not found.rates:
                return
            best = max(found.rates, key=lambda way: found.rates[way])
            ways = [way for way in self._around(best) if way not in found.rates]

    def _around(self, way: ReadMethod) -> list[ReadMethod]:
        """Return ways with other threads and bytes a read, of which a part keeps all busy."""
        counts = (2 * way.threads, 4 * way.threads, way.threads // 2)
        near = [(count, way.chunk) for count in counts]
        near += [(way.threads, 4 * way.chunk), (way.threads, way.chunk // 4)]
        busy = [(t, min(chunk, self.part // t)) for t, chunk in near if 1 <= t <= MOST_THREADS]
        return [
            ReadMethod(way.name, threads, 1 << chunk.bit_length() - 1)
            for threads, chunk in busy
            if chunk >= LEAST_CHUNK
        ]

    def _decide(self, sink: str, found: TunedSink, until: float) -> None:
        """Read in turns by the default and the fastest others; take one that is clearly faster."""
        others = [way for way in found.rates if way != found.default]
        others.sort(key=lambda way: found.rates[way], reverse=True)
        ratios: dict[ReadMethod, list[float]] = {way: [] for way in others[:FINALISTS]}
        for _ in range(ROUNDS):
            # One that is behind after some rounds will not come first.
            ways = [way for way, its in ratios.items() if len(its) < SOME or median(its) > 1]
            if not ways or time.perf_counter() > until:
                found.too_slow = bool(ways) or not others
                break
            order = self.rng.sample([found.default, *ways], len(ways) + 1)
            rates = {way: self._turn(sink, way) for way in order}
            for way, rate in rates.items():
                found.rates.setdefault(way, []).append(rate)
            for way in ways:
                ratios[way].append(rates[way] / rates[found.default])
        gains = {way: median(its) for way, its in ratios.items() if _is_sure(its)}
        best = max(gains, key=lambda way: gains[way], default=found.default)
        if best != found.default:
            # Linux 6.1 reads ahead better from where an opened file begins than from its middle.
            first = [
                self._turn(sink, best, first=True) / self._turn(sink, found.default, first=True)
                for _ in range(SOME)
            ]
            gain = min(gains[best], median(first))
            if gain > CLEARLY:
                found.way, found.gain = best, gain

    def _turn(self, sink: str, way: ReadMethod, *, first: bool = False) -> float:
        """Read another part that is absent, or the first, and give it back; return bytes a second.

        Also what the kernel read around it; what was in RAM before stays.
        """
        self.step(f"{sink}: {way}")
        if first:
            self.todo = iter(self._parts())
        start, stop = self._next()
        far = read_around(self.device)
        absent = residency(self.file, max(0, start - far), stop + far).absent
        plan = ReadPlan(sink, self.device, (no_more_than(way, self.part),), "")
        read = _into_cache if sink == CACHE else _into_memory
        slow = self.left
        self.left = [*slow, *absent]  # before anything is read: Ctrl-C may come at any moment
        # Opened anew, as by who reads a model: the kernel's read-ahead remembers what came before.
        with SourceFile(self.file.path) as file:
            read(file, start, start + BEFORE, plan)
            took = read(file, start + BEFORE, stop, plan)
        self.left = [*slow, *give_back(self.file, absent)]
        self.nbytes += stop - start
        return self.part / max(took, 1e-9)

    def _next(self) -> ByteRange:
        """Return a part that no other program has read meanwhile; all are taken before any again.

        Raises: ReadError where there is none.
        """
        for _ in range(2):
            for part in self.todo:
                if not residency(self.file, *part).resident:
                    return part
            parts = self._parts()
            self.todo = iter(self.rng.sample(parts, len(parts)))
        raise ReadError("another program reads it now: tune it later", path=self.file.path)


def _is_sure(ratios: list[float]) -> bool:
    """Return whether the 95 % interval of their median is above 1; never of fewer than 6."""
    return (median_interval(ratios) or (0.0, 0.0))[0] > 1


def _into_cache(file: SourceFile, start: int, stop: int, plan: ReadPlan) -> float:
    """Read into the page cache as prewarm does; return the seconds."""
    absent = [[(start, stop)]]
    budget = CacheBudget([file], absent, 0, None)
    begin = time.perf_counter()
    read_into_cache([file], absent, plan, budget, None, placing=None, rate=None)
    took = time.perf_counter() - begin
    if budget.stopped:
        raise ReadError(budget.stopped, path=file.path)
    return took


def _into_memory(file: SourceFile, start: int, stop: int, plan: ReadPlan) -> float:
    """Read into fresh memory as copies do, and mirrors; return the seconds."""
    cpus = allowed()
    busy = threading.Semaphore(len(cpus))
    source = IntoMemory(file, direct=True, quiet=True)
    plan = plan.forced_to([begun_by_copies(plan.way)])
    with map_private(stop - start) as memory:

        def read(chunk: Chunk, way: ReadMethod) -> None:
            fill(memory, chunk.offset - start, source, chunk, way, busy)

        try:
            begin = time.perf_counter()
            reading = Reading(stop - start)
            reading.run([[(start, stop)]], plan, read, cpus, "numaload-tune")
            return time.perf_counter() - begin
        finally:
            source.close()
