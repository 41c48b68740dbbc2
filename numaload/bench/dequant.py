"""``numaload bench dequant``: kernels beside writing alone, memcpy, gguf-py and ggml."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload.bench.baselines import Ggml, by_gguf, known_to_gguf
from numaload.bench.machine import (
    LOAD_AFTER,
    Progress,
    Rates,
    Series,
    Thing,
    check_rounds,
    describe,
    in_turns,
    load,
    prefaulted,
)
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.errors import UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
from numaload.kernels.loops import STEP
from numaload.machine.affinity import pinned_to
from numaload.machine.topology import topology
from numaload.machine.workers import Workers
from numaload.samples import random_blocks

WEIGHTS = 16 << 20  # 64 MiB of float32: more than a cache holds
MARGIN = 0.05  # see machine.Series
SITTINGS = 3  # in which all types are measured: machines change their speed within a run
PATTERN = 1 << 21  # weights that are random; the rest repeats them
SOURCES = 128 << 20  # bytes of blocks that are gone round in
FIRST = "float32"  # always measured: what the others are compared with
FILL, PAST, COPY = "fill", "past caches", "memcpy"
ALLOCATING = "float32 allocating"  # as without ``out``, and as gguf-py does
ALLOCATING_TO_GGUF = "float32 allocating to gguf-py"
# As scripts use it, in the main thread; and in a thread, whose heap glibc does not give back to the
# kernel after every few rows: up to three times faster, and nobody does that.
GGUF, GGUF_WARM = "gguf-py", "gguf-py warm"
THREADS, THREADS_PAST, CALLERS = "threads", "threads past caches", "two callers"
NAMES = (FILL, PAST, COPY, ALLOCATING, GGUF, GGUF_WARM, THREADS, THREADS_PAST, CALLERS)

Bytes = NDArray[np.uint8]
Run = Callable[[], object]


@dataclass(frozen=True)
class Row:
    """One type. rates: Gweights/s. ratios: float32's rate to that of writing and of others; other
    dtypes' rates to float32's; for several threads see ``_scaling``.

    same: {name: whether it gave the right bits}: others and several threads those of one thread's
    float32, other dtypes those that numpy and ml_dtypes round it to.
    """

    qtype: str
    bits_per_weight: float
    rates: dict[str, float]
    ratios: dict[str, float]
    same: dict[str, bool]


@dataclass
class DequantReport:
    """machine: what it was measured on; libraries: {name: file of ggml}; baselines: GB/s written,
    medians over all types; series: the single rounds, Gweights/s, beside those of
    writing alone.
    """

    machine: dict[str, str]
    weights: int
    rounds: int
    threads: int
    libraries: dict[str, str]
    baselines: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Return whether every type was bit for bit what the others compute."""
        return all(all(row.same.values()) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(
    qtypes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    threads: int = 1,
    rounds: int = 15,
    ggml: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> DequantReport:
    """Measure types (all unless named) to float32 and to dtypes (all unless named).

    threads: also on so many, if more than one. ggml: {what to call it: path of a libggml-base.so}.
    progress(name of the type begun).
    Raises: UsageError, ReadError for a library that cannot be loaded.
    """
    check_rounds(rounds)
    if registry.interpreted():
        raise UsageError("there is nothing to measure with NUMBA_DISABLE_JIT: kernels are Python")
    chosen = [_qtype(name) for name in qtypes] or list(registry.KERNELS)
    asked = {FIRST, *map(_dtype, dtypes)} if dtypes else set(DTYPES)
    kinds = [name for name in DTYPES if name in asked]
    libraries = {_free(name): Ggml(path) for name, path in (ggml or {}).items()}
    paths = {name: one.path for name, one in libraries.items()}
    report = DequantReport(describe(), WEIGHTS, rounds, threads, paths)
    measured: dict[QuantType, _Measured] = {}
    with closing(_Contenders(kinds, libraries, threads)) as contenders:
        for sitting in range(min(rounds, SITTINGS)):
            share = len(range(sitting, rounds, SITTINGS))
            for qtype in chosen:
                if progress is not None:
                    progress(f"{qtype.name}, {sitting + 1} of {min(rounds, SITTINGS)}")
                found = _sit(contenders, qtype, share, measured.get(qtype))
                measured[qtype] = found
    for qtype, found in measured.items():
        report.rows.append(_row(qtype, found, threads))
        report.series += _series(qtype, found)
    for name in [FILL, PAST, COPY] + [THREADS_PAST] * (threads > 1):
        medians = [one.all.median(name) for one in measured.values()]
        report.baselines[name] = float(np.median(medians)) * 4 / 1e9
    report.machine[LOAD_AFTER] = load()
    return report


def _qtype(name: str) -> QuantType:
    found = QuantType.__members__.get(name.upper())
    if found not in registry.KERNELS:
        known = ", ".join(one.name for one in registry.KERNELS)
        raise UsageError(f"type {name}: expected one of {known}")
    return found


def _dtype(name: str) -> str:
    if name not in DTYPES:
        raise UsageError(f"dtype {name}: expected {', '.join(DTYPES)}")
    return name


def _free(name: str) -> str:
    """Return a library's name if nothing else in a report has it. Raises: UsageError."""
    if not name or name in {*DTYPES, *NAMES}:
        raise UsageError(f"ggml named {name!r}: expected another name")
    return name


# what is run -------------------------------------------------------------------------------------


class _Contenders:
    """Threads and memory for all types. All runs share one pinned thread, blocks and output.

    Only gguf-py runs in the caller's thread, and what is named so on several. Raises: UsageError.
    """

    def __init__(self, dtypes: Sequence[str], libraries: Mapping[str, Ggml], threads: int) -> None:
        cpus = sorted(topology().cpus)
        if not 1 <= threads <= len(cpus):
            raise UsageError(f"threads {threads}: expected 1 to {len(cpus)}, the CPUs allowed here")
        self.dtypes, self.libraries = dtypes, libraries
        self.one = Workers(cpus[-1:], 1)
        self.many = Workers(cpus[-threads:], threads) if threads > 1 else None
        self.callers = ThreadPoolExecutor(2)
        self.out, self.spare = prefaulted(4 * WEIGHTS), prefaulted(4 * WEIGHTS)
        self.fill = registry.load_fill()

    def close(self) -> None:
        for workers in filter(None, (self.one, self.many)):
            workers.close()
        self.callers.shutdown()

    def writing(self) -> dict[str, Thing]:
        source, out, count = self.spare.ctypes.data, self.out.ctypes.data, WEIGHTS // STEP
        return self._pinned(
            {
                FILL: partial(self.fill, source, out, count, 0),
                PAST: partial(self.fill, source, out, count, 1),
                COPY: partial(np.copyto, self.out, self.spare),
            }
        )

    def kernels(self, qtype: QuantType, blocks: Callable[[], Bytes]) -> dict[str, Thing]:
        kernel = {dtype: registry.load(qtype, dtype) for dtype in self.dtypes}

        def run(dtype: str, out: NDArray[Any] | None = None) -> None:
            floats = np.empty(WEIGHTS, np.float32) if out is None else out
            kernel[dtype](blocks(), floats, True)  # type: ignore[misc] # it is in the table

        runs: dict[str, Run] = {dtype: partial(run, dtype, self.bits(dtype)) for dtype in kernel}
        return self._pinned(runs | {ALLOCATING: partial(run, FIRST)})

    def others(self, qtype: QuantType, blocks: Callable[[], Bytes]) -> dict[str, Thing]:
        def convert(function: Callable[[int, int, int], None]) -> None:
            function(blocks().ctypes.data, self.out.ctypes.data, WEIGHTS)

        def gguf() -> Any:
            return by_gguf(blocks(), qtype)

        def gguf_here() -> Any:
            with pinned_to(self.one.cpus):
                return gguf()

        found = {name: library.convert(qtype) for name, library in self.libraries.items()}
        things = self._pinned({name: partial(convert, f) for name, f in found.items() if f})
        if known_to_gguf(qtype):
            things |= {GGUF: (gguf_here, WEIGHTS)} | self._pinned({GGUF_WARM: gguf})
        return things

    def together(self, qtype: QuantType, blocks: Callable[[], Bytes]) -> dict[str, Thing]:
        """Return what runs on several threads; nothing if there is one."""
        workers = self.many
        if workers is None:
            return {}

        def every(out: Bytes) -> None:
            floats = out.view(np.float32)
            dequantize_blocks(blocks(), qtype, DTYPES[FIRST], floats, workers)

        def fill(start: int, stop: int) -> None:
            out = self.out.ctypes.data + 4 * STEP * start
            self.fill(self.spare.ctypes.data, out, stop - start, 1)

        def callers() -> None:
            """Have two callers share the workers: the slower ends it."""
            for future in [self.callers.submit(every, out) for out in (self.out, self.spare)]:
                future.result()

        return {
            THREADS: (partial(every, self.out), WEIGHTS),
            THREADS_PAST: (partial(workers.ranges, fill, WEIGHTS // STEP), WEIGHTS),
            CALLERS: (callers, WEIGHTS),
        }

    def bits(self, dtype: str) -> NDArray[Any]:
        """View the output as what kernels write."""
        kind = np.float32 if DTYPES[dtype].itemsize == 4 else np.uint16
        return self.out.view(kind)[:WEIGHTS]

    def _pinned(self, runs: Mapping[str, Run]) -> dict[str, Thing]:
        def run(one: Run) -> object:
            return self.one.submit(one).result()

        return {name: (partial(run, one), WEIGHTS) for name, one in runs.items()}


def _blocks_of(qtype: QuantType) -> Callable[[], Bytes]:
    """Make WEIGHTS random weights, (n, type_size), and return what gives another copy each time.

    So they are not in a cache, as when a model is loaded.
    """
    block_size, type_size = BLOCKS[qtype]
    pattern = random_blocks(qtype, 1, PATTERN, np.random.default_rng(qtype.value)).reshape(-1)
    nbytes = WEIGHTS // block_size * type_size
    copies = prefaulted(nbytes * max(1, SOURCES // nbytes)).reshape(-1, nbytes)
    copies.reshape(-1, len(pattern))[:] = pattern
    return partial(next, cycle([copy.reshape(-1, type_size) for copy in copies]))


# what is made of it ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Measured:
    """One type's rounds so far. one: on one thread; several: on several, if asked for."""

    same: dict[str, bool]
    one: Rates
    several: Rates

    @property
    def all(self) -> Rates:
        return Rates({**self.several.rates, **self.one.rates}, {})


def _sit(
    contenders: _Contenders, qtype: QuantType, rounds: int, before: _Measured | None
) -> _Measured:
    """Measure a type, as often again as ``rounds``. before: of the sittings before this one."""
    blocks = _blocks_of(qtype)
    ours, others = contenders.kernels(qtype, blocks), contenders.others(qtype, blocks)
    together = contenders.together(qtype, blocks)
    same = before.same if before else _same(contenders, ours, others, together)
    one, several = in_turns(contenders.writing() | ours | others, rounds), Rates({}, {})
    if together:
        # By themselves: how much memory several CPUs reach depends on what they did just before.
        several = in_turns({FIRST: ours[FIRST]} | together, 2 * rounds)
    if before:
        one, several = before.one + one, before.several + several
    return _Measured(same, one, several)


def _row(qtype: QuantType, found: _Measured, threads: int) -> Row:
    block_size, type_size = BLOCKS[qtype]
    ratios = _ratios(found.one)
    if found.several.rates:
        ratios |= _scaling(found.several, threads, type_size / block_size)
    medians = {name: found.all.median(name) / 1e9 for name in found.all.rates}
    return Row(qtype.name, 8 * type_size / block_size, medians, ratios, found.same)


def _series(qtype: QuantType, found: _Measured) -> Iterator[Series]:
    """Yield the rounds of numaload's own kernels beside writing alone, in the same turns.

    On one thread by processor time, on several by the clock: that they wait is what is looked for.
    """
    for rates, names, baseline in (
        (found.one.by_cpu, DTYPES, PAST),
        (found.several.rates, (THREADS,), THREADS_PAST),
    ):
        for name in (name for name in names if name in rates):
            values, beside = ([rate / 1e9 for rate in rates[one]] for one in (name, baseline))
            yield Series(f"{qtype.name} {name}", "Gw/s", values, MARGIN, baseline, beside)


def _ratios(rates: Rates) -> dict[str, float]:
    """Compare one thread's rates in turns."""
    found = {}
    for name in rates.rates:
        if name in DTYPES:
            found[name] = rates.ratio(name, FIRST)
        elif name == ALLOCATING and GGUF in rates.rates:
            found[ALLOCATING_TO_GGUF] = rates.ratio(ALLOCATING, GGUF)
        elif name != ALLOCATING:
            found[name] = rates.ratio(FIRST, name)
    return found


def _scaling(rates: Rates, threads: int, bytes_read: float) -> dict[str, float]:
    """Compare several threads' rates with what they could reach; ``bytes_read`` for a weight.

    That is as often the rate of one as there are threads, or the memory's limit: as many bytes,
    read and written, as they fill together, or what one alone reaches, if that is more.
    two callers: the slower's rate to half of theirs.
    """
    rows = zip(*(rates.rates[name] for name in (THREADS, FIRST, THREADS_PAST)), strict=True)
    share = 4 / (4 + bytes_read)
    could = [(many, min(threads * one, max(one, share * fill))) for many, one, fill in rows]
    reached = float(np.median([many / most for many, most in could]))
    return {THREADS: reached, CALLERS: 2 * rates.ratio(CALLERS, THREADS)}


def _same(
    contenders: _Contenders,
    ours: Mapping[str, Thing],
    others: Mapping[str, Thing],
    together: Mapping[str, Thing],
) -> dict[str, bool]:
    """Run each into memory full of something else, and compare: {name: whether it is right}."""

    def result(run: Callable[[], object], dtype: str = FIRST) -> Any:
        contenders.out[:] = 0xFF
        floats = run()
        bits = contenders.bits(dtype) if floats is None else np.asarray(floats).reshape(-1)
        return bits.view(np.uint32 if dtype == FIRST else np.uint16).copy()

    expected = result(ours[FIRST][0])
    found = {name: np.array_equal(result(run), expected) for name, (run, _) in others.items()}
    if THREADS in together:
        found[THREADS] = np.array_equal(result(together[THREADS][0]), expected)
    for dtype in contenders.dtypes:
        if dtype != FIRST:
            rounded = expected.view(np.float32).astype(DTYPES[dtype]).view(np.uint16)
            found[dtype] = np.array_equal(result(ours[dtype][0], dtype), rounded)
    return found
