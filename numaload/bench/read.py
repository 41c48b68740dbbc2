"""``numaload bench read``: all ways of reading a file, in shuffled turns, cold and warm."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

import numpy as np

from numaload.bench.machine import describe
from numaload.bench.memory import prefaulted
from numaload.bench.read_report import COLD, STATES, WARM, Figures, Pairs, ReadReport, Row
from numaload.bench.read_turn import CHUNK, Done, Subject, Turn, Unavailable
from numaload.bench.read_wanted import DUELS
from numaload.bench.read_ways import CACHE, Way, chosen
from numaload.errors import NumaloadError, ReadError, UsageError
from numaload.numa.memory import LEAST_FREE, UNKNOWN, available
from numaload.storage.files import SourceFile, model_paths
from numaload.storage.residency import residency

MOST_OF_FREE = 2  # a file larger than one part in so many of the memory is not used whole
EVICTED = 100  # at most one part in so many may stay
TRIES, BETWEEN_S = 10, 0.05  # pages that somebody is just looking at are not given back
SPARE, TIMES = 64 << 20, 2  # bytes touched besides so many times what is needed
GIB = 1 << 30

Progress = Callable[[str], None]


def measure(
    path: str,
    ways: Sequence[str] = (),
    *,
    states: Sequence[str] = STATES,
    threads: Sequence[int] = (),
    rounds: int = 3,
    pairs: int = 0,
    progress: Progress | None = None,
) -> ReadReport:
    """Read a file in all ways, or those named (``read_ways.chosen``), ``rounds`` times each.

    states: "cold", given back to the kernel before each timing and checked, or "warm". threads:
    counts for the ways that have several. pairs: so many times numaload and the fastest other way
    in turns, for each of ``read_wanted.DUELS``. progress(what is done now).
    Raises: UsageError; ReadError for what is no file, is empty or cannot be read, and where the
    kernel does not give its page cache back; FileChangedError.
    """
    if rounds < 1 or pairs < 0:
        raise UsageError(f"rounds {rounds}, pairs {pairs}: expected at least 1 and 0")
    selected = chosen(ways, threads)
    with SourceFile(path) as file:
        bench = _Bench(file, selected, rounds, progress or _silent)
        bench.look()
        for turn in range(rounds):
            for state in (state for state in STATES if state in states):
                bench.round(state, f"round {turn + 1} of {rounds}: {state}")
        for duel in DUELS if pairs else ():
            bench.duel(duel.what, duel.state, duel.fighters(bench.report), pairs)
        file.check_unchanged()
    return bench.report


def _silent(_: str) -> None:
    pass


class _Timing(NamedTuple):
    """seconds it took; cpu: seconds; loaded: share in the page cache afterwards, if known."""

    seconds: float
    cpu: float
    loaded: float | None
    done: Done


class _Bench:
    def __init__(
        self, file: SourceFile, ways: Sequence[Way], rounds: int, progress: Progress
    ) -> None:
        if file.size == 0:
            raise ReadError("empty: there is nothing to read", path=file.path)
        self.file, self.progress = file, progress
        self.ways = {way.name: way for way in ways}
        self.report = ReadReport(file.path, file.size, file.size, rounds, describe(()))
        self.report.rows = [_row(way) for way in ways]
        self.rng = np.random.default_rng()
        self._cut()
        files = tuple(_files(file.path))
        path = os.path.abspath(file.path)
        self.subject = Subject(file, path, self.report.nbytes == self.report.size, files)
        self.known = residency(file).known
        if not self.known:
            self._note("whether it is cold is not known: the kernel tells that to its owner only")

    def _cut(self) -> None:
        """From here on the file ends there, for all ways."""
        free = available().free
        self.file.size = self.report.nbytes = usable(self.file.size, free)
        if self.report.nbytes < self.report.size:
            self._note(
                f"only its first {self.file.size / GIB:.2f} GiB of {self.report.size / GIB:.2f}"
                f" are used: {free / GIB:.2f} GiB of memory are free, and it must fit twice"
            )

    def _note(self, text: str) -> None:
        if text not in self.report.notes:
            self.report.notes.append(text)

    def look(self) -> None:
        """Read all of it once: what is damaged or far away shall be an error before it is mapped.

        Written back too: pages that are not on the disk yet cannot be given back.
        """
        self.progress("reading it once")
        held = os.fstat(self.file.fd).st_blocks * 512
        if held < self.report.size * 9 // 10:
            self._note(f"only {held} of {self.report.size} bytes are on the disk: holes are fast")
        with suppress(OSError):
            os.fsync(self.file.fd)
        self._read_in()

    def _begin(self, state: str) -> None:
        """Read in by one ordinary way, the same for all: others leave pages of other sizes."""
        if state == WARM and self.known:
            with suppress(ReadError):
                self._evict()

    def round(self, state: str, title: str) -> None:
        self._begin(state)
        names = list(self.ways)
        for index in self.rng.permutation(len(names)):
            name = names[index]
            measured = state == COLD or self.ways[name].family.warm
            if measured and name not in self.report.left_out:
                self.progress(f"{title}, {name}")
                self._enter(name, state)

    def _enter(self, name: str, state: str) -> None:
        try:
            found = self._time(self.ways[name], state)
        except Unavailable as error:
            self.report.left_out[name] = str(error)
            self.report.rows = [row for row in self.report.rows if row.way != name]
            return
        row = self.report.row(name)
        assert row is not None  # noqa: S101 - it has not been left out
        figures = row.states.setdefault(state, Figures())
        figures.rates.append(self._rate(found))
        figures.cpu.append(found.cpu * GIB / self.file.size)
        figures.loaded.append(found.loaded)
        if state == COLD and found.done.plan is not None:
            self.report.plan = found.done.plan

    def duel(self, what: str, state: str, names: tuple[str, str] | None, count: int) -> None:
        """Both in turns, each first every other time."""
        if names is None:
            return
        self._begin(state)
        ratios = []
        for index in range(count):
            self.progress(f"pair {index + 1} of {count}: {state}, {' and '.join(names)}")
            order = names if index % 2 else names[::-1]
            rates = {name: self._rate(self._time(self.ways[name], state)) for name in order}
            ratios.append(rates[names[0]] / rates[names[1]])
        self.report.pairs.append(Pairs(what, state, *names, ratios))

    def _rate(self, found: _Timing) -> float:
        """GB/s."""
        return self.file.size / max(found.seconds, 1e-9) / 1e9

    def _time(self, way: Way, state: str) -> _Timing:
        if state == COLD:
            self._evict()
        else:
            self._keep()
        self._touch(way, state)
        with Turn(self.subject) as turn:
            run = way.start(turn)
            before, begin = _cpu(), time.perf_counter()
            done = run()
            seconds, spent = time.perf_counter() - begin, _cpu() - before
            if done.nbytes != self.file.size:
                message = f"{way.name} read {done.nbytes} bytes, expected {self.file.size}"
                raise ReadError(message, path=self.file.path)
            del run
        loaded = None
        if way.family.sink == CACHE and self.known:
            loaded = residency(self.file).resident / self.file.size
        return _Timing(seconds, spent if done.cpu is None else done.cpu, loaded, done)

    def _evict(self) -> None:
        """Raises: ReadError where more than a hundredth of it stays."""
        for _ in range(TRIES):
            self.file.drop_cache(0, 0)
            left = residency(self.file).resident
            if not self.known or left <= self.file.size // EVICTED:
                return
            time.sleep(BETWEEN_S)
        raise ReadError(
            f"{left} of {self.file.size} bytes stay in the page cache: it lies in memory, or others"
            " write it, have it mapped or locked; --warm measures it as it is",
            path=self.file.path,
        )

    def _keep(self) -> None:
        """All of it in the page cache."""
        if residency(self.file).absent:
            self._read_in()
            left = sum(stop - start for start, stop in residency(self.file).absent)
            if self.known and left > self.file.size // EVICTED:
                share = left / self.file.size
                self._note(f"{share:.0%} and more of it left the page cache again: it is not warm")

    def _read_in(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        for offset in range(0, self.file.size, CHUNK):
            self.file.read_into(buffer[: min(CHUNK, self.file.size - offset)], offset)

    def _touch(self, way: Way, state: str) -> None:
        """Touch and free what it will take: a host that has yet to find the memory is slow.

        Not so much that the file's own pages would have to go.
        """
        wanted = self.file.size * (way.family.copies + (state == COLD))
        if not wanted:
            return
        room = available().free
        if room == UNKNOWN:
            return
        room -= LEAST_FREE + room // 8 + (self.file.size if state == WARM else 0)
        if wanted > room:
            self._note("there was not room to touch the memory before that all ways need")
        prefaulted(max(CHUNK, min(TIMES * wanted + SPARE, room)))


def usable(size: int, free: int) -> int:
    """How many bytes of a file are used, from its start: what fits twice into ``free`` bytes."""
    most = free // MOST_OF_FREE
    step = GIB if most >= GIB else CHUNK
    return size if size <= most else min(size, max(CHUNK, most // step * step))


def _row(way: Way) -> Row:
    family = way.family
    return Row(
        way.name, family.name, family.sink, family.what, family.loads, family.ours, family.own
    )


def _files(path: str) -> Iterator[str]:
    """Of the model that it belongs to; itself where that is none that is whole."""
    try:
        yield from model_paths(path)
    except NumaloadError:
        yield path


def _cpu() -> float:
    """Seconds that this process and those that it waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
