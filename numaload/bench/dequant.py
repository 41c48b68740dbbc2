"""``numaload bench dequant``: kernels beside writing alone, memcpy, gguf-py and ggml."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.bench.ggml import Ggml
from numaload.bench.machine import describe
from numaload.bench.memory import prefaulted
from numaload.bench.timing import Rates, Thing, in_turns
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.errors import UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
from numaload.numa.affinity import pinned_to
from numaload.numa.topology import topology
from numaload.numa.workers import Workers
from numaload.samples import random_blocks

WEIGHTS = 16 << 20  # 64 MiB of float32: more than a cache holds
PATTERN = 1 << 21  # weights that are random; the rest repeats them
COLUMNS = 4096  # of the tensor: gguf-py works on 16 rows at a time
FILL, PAST, COPY = "fill", "past caches", "memcpy"
# As scripts use it, in the main thread; and in a thread, whose heap glibc does not give back to the
# kernel after every few rows: up to 2.5 times faster, and nobody does that.
GGUF, GGUF_WARM = "gguf-py", "gguf-py warm"
THREADS, CALLERS = "threads", "two callers"


@dataclass(frozen=True)
class Row:
    """One type. rates: Gweights/s; ratios: float32's rate to others'; None: not measured.

    same: whether float32 is bit for bit what each of the others computes.
    """

    qtype: str
    bits_per_weight: float
    rates: dict[str, float]
    ratios: dict[str, float]
    same: dict[str, bool]


@dataclass
class DequantReport:
    """Baselines in GB/s written, medians over all types; machine: what it was measured on."""

    machine: dict[str, str]
    weights: int
    rounds: int
    threads: int
    libraries: dict[str, str]
    baselines: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def same(self) -> bool:
        """Whether every type was bit for bit what the others compute."""
        return all(all(row.same.values()) for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DequantReport:
        """What ``to_dict`` gave, as from ``--json``."""
        return cls(**{**data, "rows": [Row(**row) for row in data["rows"]]})


@dataclass(frozen=True)
class Buffers:
    """blocks: (n, type_size); out: bytes of the floats; spare: as many, for copies."""

    blocks: NDArray[np.uint8]
    out: NDArray[np.uint8]
    spare: NDArray[np.uint8]

    def floats(self, dtype: str) -> NDArray[Any]:
        size = DTYPES[dtype].itemsize
        return self.out[: len(self.out) // 4 * size].view(np.float32 if size == 4 else np.uint16)


def measure(
    qtypes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    threads: int = 1,
    rounds: int = 7,
    ggml: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> DequantReport:
    """Measure types (all unless named) to dtypes, on one thread and, if more, on ``threads``.

    ggml: {what to call it: path of a libggml-base.so}. progress(name of the type begun).
    Raises: UsageError, ReadError for a library that cannot be loaded.
    """
    if rounds < 1:
        raise UsageError(f"rounds {rounds}: expected at least 1")
    chosen = [_qtype(name) for name in qtypes] or list(registry.KERNELS)
    kinds = [_dtype(name) for name in dtypes] or list(DTYPES)
    libraries = {name: Ggml(path) for name, path in (ggml or {}).items()}
    report = DequantReport(
        describe(), WEIGHTS, rounds, threads, {name: one.path for name, one in libraries.items()}
    )
    bench = _Bench(kinds, libraries, threads)
    rates: list[Rates] = []
    for qtype in chosen:
        if progress is not None:
            progress(qtype.name)
        row, measured = bench.row(qtype, rounds)
        report.rows.append(row)
        rates.append(measured)
    for name in bench.baselines():
        values = [one.median(name) for one in rates]
        report.baselines[name] = float(np.median(values)) * 4 / 1e9
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


class _Bench:
    """Things to run for a type. All run on one pinned thread, but for what is named after more."""

    def __init__(self, dtypes: Sequence[str], libraries: dict[str, Ggml], threads: int) -> None:
        cpus = sorted(topology().cpus)
        if not 1 <= threads <= len(cpus):
            raise UsageError(f"threads {threads}: expected 1 to {len(cpus)}, the CPUs allowed here")
        self.dtypes, self.libraries = dtypes, libraries
        self.one = Workers(cpus[-1:], 1)
        self.many = Workers(cpus[-threads:], threads) if threads > 1 else None
        self.callers = ThreadPoolExecutor(2)
        self.out, self.spare = prefaulted(4 * WEIGHTS), prefaulted(4 * WEIGHTS)
        self.fill = registry.load_fill()

    def baselines(self) -> list[str]:
        return [FILL, PAST, COPY] + ([f"{THREADS} {PAST}"] if self.many else [])

    def row(self, qtype: QuantType, rounds: int) -> tuple[Row, Rates]:
        buffers = Buffers(_blocks(qtype), self.out, self.spare)
        others = self.others(qtype, buffers)
        same = {name: self.agrees(qtype, buffers, run) for name, (run, _) in others.items()}
        ours = self.ours(qtype, buffers)
        measured = in_turns(
            self.writing(buffers) | ours | others | self.more(qtype, buffers), rounds
        )
        block_size, type_size = BLOCKS[qtype]
        rates = {name: measured.median(name) / 1e9 for name in measured.rates}
        return (
            Row(qtype.name, 8 * type_size / block_size, rates, self.ratios(measured, qtype), same),
            measured,
        )

    def ratios(self, measured: Rates, qtype: QuantType) -> dict[str, float]:
        first = self.dtypes[0]
        ratios = {}
        for name in measured.rates:
            if name in self.dtypes:
                ratios[name] = measured.ratio(name, first)
            elif name != CALLERS and not name.startswith(THREADS):
                ratios[name] = measured.ratio(first, name)
        if self.many:
            ratios[THREADS] = self._scaling(measured, qtype)
            ratios[CALLERS] = 2 * measured.ratio(CALLERS, THREADS)
        return ratios

    def _scaling(self, measured: Rates, qtype: QuantType) -> float:
        """The rate on several threads to what it could be: theirs times one, or what memory takes.

        Memory takes as many bytes, read and written, as the same threads can fill.
        """
        first, count = self.dtypes[0], self.many.count if self.many else 1
        block_size, type_size = BLOCKS[qtype]
        moved = DTYPES[first].itemsize + type_size / block_size
        rows = zip(
            measured.rates[THREADS],
            measured.rates[first],
            measured.rates[f"{THREADS} {PAST}"],
            strict=True,
        )
        return float(np.median([x / min(count * one, 4 / moved * fill) for x, one, fill in rows]))

    def alone(self, run: Callable[[], object]) -> object:
        """In the caller's thread, on the CPU that all others have."""
        with pinned_to(self.one.cpus):
            return run()

    def pinned(self, run: Callable[[], object]) -> Callable[[], object]:
        return lambda: self.one.submit(run).result()

    def writing(self, buffers: Buffers) -> dict[str, Thing]:
        floats = buffers.out.ctypes.data
        source, count = buffers.spare.ctypes.data, WEIGHTS // 32
        runs: dict[str, Callable[[], object]] = {
            FILL: partial(self.fill, source, floats, count, 0),
            PAST: partial(self.fill, source, floats, count, 1),
            COPY: partial(np.copyto, buffers.out, buffers.spare),
        }
        return {name: (self.pinned(run), WEIGHTS) for name, run in runs.items()}

    def ours(self, qtype: QuantType, buffers: Buffers) -> dict[str, Thing]:
        things: dict[str, Thing] = {}
        for dtype in self.dtypes:
            kernel = registry.load(qtype, dtype)
            assert kernel is not None  # noqa: S101 - it was chosen from the table
            run = partial(kernel, buffers.blocks, buffers.floats(dtype), True)
            things[dtype] = (self.pinned(run), WEIGHTS)
        return things

    def others(self, qtype: QuantType, buffers: Buffers) -> dict[str, Thing]:
        things: dict[str, Thing] = {}
        source, floats = buffers.blocks.ctypes.data, buffers.out.ctypes.data
        for name, library in self.libraries.items():
            convert = library.convert(qtype)
            if convert is not None:
                things[name] = (self.pinned(partial(convert, source, floats, WEIGHTS)), WEIGHTS)
        if _known_to_gguf(qtype):
            run = partial(_by_gguf, buffers.blocks, qtype)
            things[GGUF] = (partial(self.alone, run), WEIGHTS)
            things[GGUF_WARM] = (self.pinned(run), WEIGHTS)
        return things

    def more(self, qtype: QuantType, buffers: Buffers) -> dict[str, Thing]:
        if self.many is None:
            return {}
        dtype = DTYPES[self.dtypes[0]]

        def every(out: NDArray[np.uint8]) -> None:
            floats = out[: WEIGHTS * dtype.itemsize].view(dtype)
            dequantize_blocks(buffers.blocks, qtype, dtype, floats, workers)

        def together() -> None:
            """The slower of two, which share the workers, ends it."""
            for future in [self.callers.submit(every, o) for o in (buffers.out, buffers.spare)]:
                future.result()

        workers = self.many
        return {
            THREADS: (partial(every, buffers.out), WEIGHTS),
            f"{THREADS} {PAST}": (partial(self._fill_together, buffers), WEIGHTS),
            CALLERS: (together, WEIGHTS),
        }

    def _fill_together(self, buffers: Buffers) -> None:
        assert self.many is not None  # noqa: S101 - its caller looked
        source, floats = buffers.spare.ctypes.data, buffers.out.ctypes.data

        def task(start: int, stop: int) -> None:
            self.fill(source, floats + 128 * start, stop - start, 1)

        self.many.ranges(task, WEIGHTS // 32)

    def agrees(self, qtype: QuantType, buffers: Buffers, run: Callable[[], object]) -> bool:
        """Whether another's float32 have the same bits as ours."""
        theirs = run()
        if theirs is None:  # written to our buffer
            theirs = buffers.floats("float32").copy()
        expected = np.asarray(theirs, np.float32).reshape(-1).view(np.uint32)
        kernel = registry.load(qtype, "float32")
        assert kernel is not None  # noqa: S101
        kernel(buffers.blocks, buffers.floats("float32"), True)
        return np.array_equal(buffers.out.view(np.uint32)[: len(expected)], expected)


def _blocks(qtype: QuantType) -> NDArray[np.uint8]:
    """WEIGHTS random weights of a type."""
    block_size, type_size = BLOCKS[qtype]
    rng = np.random.default_rng(qtype.value)
    pattern = random_blocks(qtype, 1, PATTERN, rng).reshape(-1)
    blocks = prefaulted(WEIGHTS // block_size * type_size)
    blocks.reshape(-1, len(pattern))[:] = pattern
    return blocks.reshape(-1, type_size)


def _known_to_gguf(qtype: QuantType) -> bool:
    """F32 is left out: gguf-py only looks at it in another way."""
    known = gguf.GGMLQuantizationType.__members__.get(qtype.name)
    return known in gguf.quants._type_traits or qtype.name == "F16"  # noqa: SLF001


def _by_gguf(blocks: NDArray[np.uint8], qtype: QuantType) -> Any:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = gguf.GGMLQuantizationType(qtype.value)
        return gguf.quants.dequantize(blocks.reshape(WEIGHTS // COLUMNS, -1), foreign)
