"""``numaload bench dequant``: kernels beside writing alone, memcpy, gguf-py and ggml."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from numaload.bench.contenders import (
    ALLOCATING,
    ALLOCATING_TO_GGUF,
    CALLERS,
    COPY,
    FILL,
    FIRST,
    GGUF,
    NAMES,
    PAST,
    THREADS,
    THREADS_PAST,
    WEIGHTS,
    Contenders,
    blocks_of,
)
from numaload.bench.ggml import Ggml
from numaload.bench.machine import describe
from numaload.bench.timing import Rates, Thing, in_turns
from numaload.dequantize import DTYPES
from numaload.errors import UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry


@dataclass(frozen=True)
class Row:
    """One type. rates: Gweights/s. ratios: float32's rate to that of writing and of others; other
    dtypes' rates to float32's; of several threads see ``ratios``.

    same: whether float32 is bit for bit what others compute, other dtypes what numpy and ml_dtypes
    make of it, and several threads' result that of one.
    """

    qtype: str
    bits_per_weight: float
    rates: dict[str, float]
    ratios: dict[str, float]
    same: dict[str, bool]


@dataclass
class DequantReport:
    """machine: what it was measured on; libraries: {name: file of ggml}; baselines: GB/s written,
    medians over all types.
    """

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


def measure(
    qtypes: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    threads: int = 1,
    rounds: int = 7,
    ggml: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> DequantReport:
    """Measure types (all unless named) to float32 and to dtypes (all unless named).

    threads: also on so many, if more than one. ggml: {what to call it: path of a libggml-base.so}.
    progress(name of the type begun).
    Raises: UsageError, ReadError for a library that cannot be loaded.
    """
    if rounds < 1:
        raise UsageError(f"rounds {rounds}: expected at least 1")
    if registry.interpreted():
        raise UsageError("there is nothing to measure with NUMBA_DISABLE_JIT: kernels are Python")
    chosen = [_qtype(name) for name in qtypes] or list(registry.KERNELS)
    asked = {FIRST, *map(_dtype, dtypes)} if dtypes else set(DTYPES)
    kinds = [name for name in DTYPES if name in asked]
    libraries = {_free(name): Ggml(path) for name, path in (ggml or {}).items()}
    paths = {name: one.path for name, one in libraries.items()}
    report = DequantReport(describe(), WEIGHTS, rounds, threads, paths)
    measured: list[Rates] = []
    with closing(Contenders(kinds, libraries, threads)) as contenders:
        for qtype in chosen:
            if progress is not None:
                progress(qtype.name)
            row, rates = _row(contenders, qtype, rounds)
            report.rows.append(row)
            measured.append(rates)
    for name in [FILL, PAST, COPY] + [THREADS_PAST] * (threads > 1):
        report.baselines[name] = float(np.median([one.median(name) for one in measured])) * 4 / 1e9
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
    """A name for a library that nothing else in a report has."""
    if not name or name in {*DTYPES, *NAMES}:
        raise UsageError(f"ggml named {name!r}: expected another name")
    return name


def _row(contenders: Contenders, qtype: QuantType, rounds: int) -> tuple[Row, Rates]:
    blocks = blocks_of(qtype)
    ours, others = contenders.kernels(qtype, blocks), contenders.others(qtype, blocks)
    together = contenders.together(qtype, blocks)
    same = _same(contenders, ours, others, together)
    rates = in_turns(contenders.writing() | ours | others, rounds)
    block_size, type_size = BLOCKS[qtype]
    found = ratios(rates)
    if contenders.many is not None:
        # By themselves: how much memory several CPUs reach depends on what they did just before.
        several = in_turns({FIRST: ours[FIRST]} | together, 2 * rounds)
        found |= scaling(several, contenders.many.count, type_size / block_size)
        rates = Rates({**several.rates, **rates.rates})
    medians = {name: rates.median(name) / 1e9 for name in rates.rates}
    return Row(qtype.name, 8 * type_size / block_size, medians, found, same), rates


def ratios(rates: Rates) -> dict[str, float]:
    """What a row says of one thread's rates in turns."""
    found = {}
    for name in rates.rates:
        if name in DTYPES:
            found[name] = rates.ratio(name, FIRST)
        elif name == ALLOCATING and GGUF in rates.rates:
            found[ALLOCATING_TO_GGUF] = rates.ratio(ALLOCATING, GGUF)
        elif name != ALLOCATING:
            found[name] = rates.ratio(FIRST, name)
    return found


def scaling(rates: Rates, threads: int, bytes_read: float) -> dict[str, float]:
    """What it says of several threads; ``bytes_read`` for a weight.

    threads: what they reach of what they could. That is as often the rate of one as there are of
    them, or the memory's limit: as many bytes, read and written, as they fill together, or what one
    alone reaches, if that is more. two callers: the slower's rate to half of theirs.
    """
    rows = zip(*(rates.rates[name] for name in (THREADS, FIRST, THREADS_PAST)), strict=True)
    share = 4 / (4 + bytes_read)
    could = [(many, min(threads * one, max(one, share * fill))) for many, one, fill in rows]
    reached = float(np.median([many / most for many, most in could]))
    return {THREADS: reached, CALLERS: 2 * rates.ratio(CALLERS, THREADS)}


def _same(
    contenders: Contenders,
    ours: Mapping[str, Thing],
    others: Mapping[str, Thing],
    together: Mapping[str, Thing],
) -> dict[str, bool]:
    """{name: whether it computed what it should}, each into memory full of something else."""

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
