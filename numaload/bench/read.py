"""``numaload bench read``: all ways of reading a file, in shuffled turns, cold and warm."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from numaload.bench.machine import (
    CONFIDENCE,
    GIB,
    LOAD_AFTER,
    MOST_ROUNDS,
    Progress,
    Series,
    check_rounds,
    describe,
    load,
    median_interval,
    prefaulted,
)
from numaload.bench.ways import (
    CACHE,
    CEILING,
    CHUNK,
    COPY,
    DIRECT,
    DIRECT_4K,
    MEMORY,
    PREWARM,
    Done,
    Turn,
    Unavailable,
    Way,
    chosen,
)
from numaload.errors import NumaloadError, ReadError, UsageError
from numaload.files.residency import residency
from numaload.files.source import SourceFile, model_paths
from numaload.machine.devices import device_of
from numaload.machine.memory import LEAST_FREE, UNKNOWN, available

COLD, WARM = "cold", "warm"
STATES = (COLD, WARM)
LOADED = 0.9  # of the file, in the page cache after it was read: with less it was not read
MARGIN = 0.25  # see machine.Series
BASELINE = "dd"  # what the series of other ways are beside
KERNELS_OWN = ("populate", "vmtouch")
MOST_OF_FREE = 2  # a file larger than one part in so many of the memory is not used whole
EVICTED = 100  # at most one part in so many may stay
TRIES, BETWEEN_S = 10, 0.05  # the kernel does not give back pages that somebody is looking at
SPARE, TIMES = 64 << 20, 2  # bytes touched besides so many times what is needed


# the report --------------------------------------------------------------------------------------


@dataclass
class Figures:
    """Rounds in order. rates: GB/s; cpu: seconds a GiB.

    loaded: share that is in the page cache afterwards, None where that is not what the way is for,
    or not known.
    """

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    loaded: list[float | None] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def least_loaded(self) -> float | None:
        return min((share for share in self.loaded if share is not None), default=None)


@dataclass
class Row:
    """One way. states: {"cold" or "warm": figures}; the rest as in ``ways.ReadMethod``."""

    way: str
    family: str
    sink: str
    what: str
    ours: bool
    own: bool
    states: dict[str, Figures] = field(default_factory=dict)

    @classmethod
    def of(cls, way: Way) -> Row:
        method = way.method
        return cls(way.name, method.name, method.sink, method.what, method.ours, method.own)

    def counts(self, state: str) -> bool:
        """Return whether it did read the file, so that its rate is one."""
        if state not in self.states:
            return False
        loaded = self.states[state].least_loaded
        return loaded is None or loaded >= LOADED


@dataclass
class Pairs:
    """``ours`` and ``theirs`` in turns. ratios: of their rates, pair by pair."""

    what: str
    state: str
    ours: str
    theirs: str
    ratios: list[float]

    @property
    def median(self) -> float:
        return median(self.ratios)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the 95 % interval of the median; None where there are too few pairs."""
        return median_interval(self.ratios)

    def to_dict(self) -> dict[str, Any]:
        more = {"median": self.median, "interval": self.interval, "confidence": CONFIDENCE}
        return asdict(self) | more


@dataclass
class ReadReport:
    """nbytes: of the file's ``size``, from its start. plan: what prewarm chose on the cold file.

    left_out: {way: why it was not measured}. notes: what limits the figures' meaning.
    """

    path: str
    size: int
    nbytes: int
    rounds: int
    machine: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    plan: Any = None
    pairs: list[Pairs] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def series(self) -> list[Series]:
        """Return the rounds of all ways; beside dd's where that was measured, instead of its own.

        A disk's speed is what others leave of it. Warm, dd is no measure of what does not copy.
        """
        baseline, found = self.row(BASELINE), []
        for row in self.rows:
            for state, figures in row.states.items():
                name, rates = f"{row.way} {state}", figures.rates
                beside = baseline.states[state].rates if baseline and state == COLD else []
                if baseline is None or len(beside) != len(rates):
                    found.append(Series(name, "GB/s", rates, MARGIN))
                elif row is not baseline:
                    found.append(Series(name, "GB/s", rates, MARGIN, BASELINE, beside))
        return found

    def row(self, way: str) -> Row | None:
        return next((row for row in self.rows if row.way == way), None)

    def best(self, state: str, wanted: Callable[[Row], bool]) -> Row | None:
        """Return the row with the highest median rate among those wanted."""
        rows = [row for row in self.rows if row.counts(state) and wanted(row)]
        return max(rows, key=lambda row: row.states[state].rate, default=None)

    def ceiling(self, state: str) -> Row | None:
        """Return direct reads into prepared memory: what fills memory cannot be faster."""
        return self.best(state, lambda row: row.sink == CEILING)

    def buffer_limit(self, state: str) -> Row | None:
        """Return direct reads into a buffer in the processor's caches: what the disk gives."""
        return self.best(state, lambda row: row.family == DIRECT)

    def dd_limit(self, state: str) -> Row | None:
        """Return what dd and fio would call the limit."""
        return self.best(state, lambda row: row.family == DIRECT_4K)

    def champion(self, state: str) -> Row | None:
        """Return the fastest way into the page cache that is not numaload's."""
        return self.best(state, lambda row: row.sink == CACHE and not row.ours)

    def own_best(self) -> Row | None:
        """Return the fastest cold way into the page cache of those that numaload has."""
        return self.best(COLD, lambda row: row.sink == CACHE and (row.own or row.ours))

    def plan_share(self) -> float | None:
        """Return what the chosen plan reaches of the best of numaload's own ways, cold."""
        row, best = self.row(PREWARM), self.own_best()
        if row is None or best is None or not row.counts(COLD):
            return None
        return row.states[COLD].rate / best.states[COLD].rate

    def ratios(self, row: Row, state: str) -> dict[str, float]:
        """Compare its rate with the best of the same sink and with the ceiling, if it is one."""
        if not row.counts(state):
            return {}
        others = {"best": self.best(state, lambda one: one.sink == row.sink)}
        others["ceiling"] = self.ceiling(state)
        rate = row.states[state].rate
        return {name: rate / other.states[state].rate for name, other in others.items() if other}

    def to_dict(self) -> dict[str, Any]:
        names = {"own_best": self.own_best()}
        for state in STATES:
            names[f"champion_{state}"] = self.champion(state)
            names[f"ceiling_{state}"] = self.ceiling(state)
            names[f"buffer_limit_{state}"] = self.buffer_limit(state)
            names[f"dd_limit_{state}"] = self.dd_limit(state)
        return asdict(self) | {
            "rows": [asdict(row) | {"states": self._states(row)} for row in self.rows],
            "pairs": [pairs.to_dict() for pairs in self.pairs],
            "series": [asdict(one) for one in self.series],
            "plan_share": self.plan_share(),
            **{name: row and row.way for name, row in names.items()},
        }

    def _states(self, row: Row) -> dict[str, Any]:
        return {
            state: asdict(figures)
            | {
                "rate": figures.rate,
                "cpu_per_gib": median(figures.cpu),
                "ratios": self.ratios(row, state),
            }
            for state, figures in row.states.items()
        }


@dataclass(frozen=True)
class _Duel:
    """Two ways to compare pair by pair: ``ours`` and a rival that the report names."""

    what: str
    state: str
    ours: str
    rival: Callable[[ReadReport], Row | None]

    def fighters(self, report: ReadReport) -> tuple[str, str] | None:
        """Return the names of both ways, ours first; None where one of them was not measured."""
        ours, rival = report.row(self.ours), self.rival(report)
        if ours is None or rival is None or self.state not in ours.states:
            return None
        return ours.way, rival.way


def _kernels_own(report: ReadReport) -> Row | None:
    return report.best(WARM, lambda row: row.family in KERNELS_OWN)


DUELS = (
    _Duel("into the page cache, beside the fastest other way", COLD, PREWARM,
          lambda report: report.champion(COLD)),
    _Duel("into the page cache, beside direct reads into prepared memory", COLD, PREWARM,
          lambda report: report.ceiling(COLD)),
    _Duel("what is resident, beside the kernel's own call and vmtouch", WARM, PREWARM,
          _kernels_own),
    _Duel("into private memory, beside direct reads into prepared memory", COLD, COPY,
          lambda report: report.ceiling(COLD)),
)  # fmt: skip


# measuring ---------------------------------------------------------------------------------------


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
    """Read a file in all ways, or those named (``ways.chosen``), ``rounds`` times each.

    states: "cold", given back to the kernel before each timing and checked, or "warm". threads:
    counts for the ways that have several. pairs: so many times numaload and the fastest other way
    in turns, for each of ``DUELS``. progress(what is done now).
    Raises: UsageError; ReadError for what is no file, is empty or cannot be read, and where the
    kernel does not give its page cache back; FileChangedError.
    """
    check_rounds(rounds)
    if not 0 <= pairs <= MOST_ROUNDS:
        raise UsageError(f"pairs {pairs}: expected at least 0 and at most {MOST_ROUNDS}")
    selected = chosen(ways, threads)
    with SourceFile(path) as file:
        bench = _Bench(file, selected, rounds, progress or (lambda _: None))
        bench.look()
        device = device_of(file.path, network=file.is_network, numbers=file.device)
        bench.report.machine["storage"] = str(device)
        bench.report.machine["read-ahead"] = f"{device.read_ahead >> 10} KiB"
        for turn in range(rounds):
            for state in (state for state in STATES if state in states):
                bench.round(state, f"round {turn + 1} of {rounds}: {state}")
        for duel in DUELS if pairs else ():
            bench.duel(duel, pairs)
        if pairs and not bench.report.pairs:
            needed = f"{PREWARM} or {COPY}, and another way into the same place"
            bench.report.notes.append(f"pairs are not measured: they need {needed}")
        file.check_unchanged()
    bench.report.machine[LOAD_AFTER] = load()
    return bench.report


def usable(size: int, free: int) -> int:
    """Return how many bytes of a file are used, from its start: what fits twice into ``free``."""
    most = free // MOST_OF_FREE
    step = GIB if most >= GIB else CHUNK
    return size if size <= most else min(size, max(CHUNK, most // step * step))


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
        self.report.rows = [Row.of(way) for way in ways]
        self.rng = np.random.default_rng()
        self._cut()
        self.alone = _is_alone(file.path)
        self.known = residency(file).known
        if not self.known:
            self._note("whether it is cold is not known: the kernel tells that to its owner only")

    def _cut(self) -> None:
        """Let the file end, for all ways, where its first part fits twice into free memory."""
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

        Write it back too: pages that are not on the disk yet cannot be given back.
        """
        self.progress("reading it once")
        held = os.fstat(self.file.fd).st_blocks * 512
        if held < self.report.size * 9 // 10:
            self._note(f"only {held} of {self.report.size} bytes are on the disk: holes are fast")
        with suppress(OSError):
            os.fsync(self.file.fd)
        self._read_in()

    def round(self, state: str, title: str) -> None:
        self._begin(state)
        names = list(self.ways)
        for index in self.rng.permutation(len(names)):
            name = names[index]
            measured = state == COLD or self.ways[name].method.warm
            if measured and name not in self.report.left_out:
                self.progress(f"{title}, {name}")
                self._enter(name, state)

    def _begin(self, state: str) -> None:
        """Have a warm file read in by ordinary reads: other ways leave pages of other sizes."""
        if state == WARM and self.known:
            with suppress(ReadError):
                self._evict()

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

    def duel(self, duel: _Duel, count: int) -> None:
        """Time both in turns, each first every other time."""
        names = duel.fighters(self.report)
        if names is None:
            return
        self._begin(duel.state)
        ratios = []
        for index in range(count):
            self.progress(f"pair {index + 1} of {count}: {duel.state}, {' and '.join(names)}")
            order = names if index % 2 else names[::-1]
            rates = {name: self._rate(self._time(self.ways[name], duel.state)) for name in order}
            ratios.append(rates[names[0]] / rates[names[1]])
        self.report.pairs.append(Pairs(duel.what, duel.state, *names, ratios))

    def _rate(self, found: _Timing) -> float:
        """Return GB/s."""
        return self.file.size / max(found.seconds, 1e-9) / 1e9

    def _time(self, way: Way, state: str) -> _Timing:
        if state == COLD:
            self._evict()
        else:
            self._keep()
        self._touch(way, state)
        with Turn(self.file, whole=self.file.size == self.report.size, alone=self.alone) as turn:
            run = way.start(turn)
            before, begin = _cpu(), time.perf_counter()
            done = run()
            seconds, spent = time.perf_counter() - begin, _cpu() - before
            if done.nbytes != self.file.size:
                message = f"{way.name} read {done.nbytes} bytes, expected {self.file.size}"
                raise ReadError(message, path=self.file.path)
            del run
        loaded = None
        if way.method.sink == CACHE and self.known:
            loaded = residency(self.file).resident / self.file.size
        return _Timing(seconds, spent if done.cpu is None else done.cpu, loaded, done)

    def _evict(self) -> None:
        """Give its page cache back. Raises: ReadError where more than a hundredth stays."""
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
        """Bring all of it into the page cache."""
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
        """Touch and free the memory it will take: a host that has yet to find it is slow.

        Touch no more than fits beside the file's own pages.
        """
        wanted = self.file.size * ((way.method.sink == MEMORY) + (state == COLD))
        if not wanted:
            return
        room = available().free
        if room == UNKNOWN:
            return
        room -= LEAST_FREE + room // 8 + (self.file.size if state == WARM else 0)
        if wanted > room:
            self._note("there was not room to touch the memory before that all ways need")
        prefaulted(max(CHUNK, min(TIMES * wanted + SPARE, room)))


def _is_alone(path: str) -> bool:
    """Return whether the file is no part of a larger model."""
    try:
        return len(model_paths(path)) == 1
    except NumaloadError:  # no model, or not a whole one
        return True


def _cpu() -> float:
    """Return the seconds that this process and those that it waited for have computed."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
