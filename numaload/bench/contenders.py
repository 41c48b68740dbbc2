"""What `bench dequant` runs for a type: writing alone, our kernels, others, and several threads.

All but the last run on one pinned thread, on the same blocks and into the same memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.bench.ggml import Ggml
from numaload.bench.memory import prefaulted
from numaload.bench.timing import Thing
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.errors import UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.kernels import registry
from numaload.kernels.loops import STEP
from numaload.numa.affinity import pinned_to
from numaload.numa.topology import topology
from numaload.numa.workers import Workers
from numaload.samples import random_blocks

WEIGHTS = 16 << 20  # 64 MiB of float32: more than a cache holds
COLUMNS = 4096  # of the tensor: gguf-py works on 16 rows at a time
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


class Contenders:
    """Raises: UsageError."""

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

        found = {name: library.convert(qtype) for name, library in self.libraries.items()}
        things = self._pinned({name: partial(convert, f) for name, f in found.items() if f})
        if not _known_to_gguf(qtype):
            return things

        def by_gguf() -> Any:
            return _by_gguf(blocks(), qtype)

        return (
            things
            | {GGUF: (partial(self._alone, by_gguf), WEIGHTS)}
            | self._pinned({GGUF_WARM: by_gguf})
        )

    def together(self, qtype: QuantType, blocks: Callable[[], Bytes]) -> dict[str, Thing]:
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
            """Two that share the workers: the slower ends it."""
            for future in [self.callers.submit(every, out) for out in (self.out, self.spare)]:
                future.result()

        return {
            THREADS: (partial(every, self.out), WEIGHTS),
            THREADS_PAST: (partial(workers.ranges, fill, WEIGHTS // STEP), WEIGHTS),
            CALLERS: (callers, WEIGHTS),
        }

    def bits(self, dtype: str) -> NDArray[Any]:
        """``out`` as what kernels write."""
        kind = np.float32 if DTYPES[dtype].itemsize == 4 else np.uint16
        return self.out.view(kind)[:WEIGHTS]

    def _pinned(self, runs: Mapping[str, Run]) -> dict[str, Thing]:
        def run(one: Run) -> object:
            return self.one.submit(one).result()

        return {name: (partial(run, one), WEIGHTS) for name, one in runs.items()}

    def _alone(self, run: Run) -> object:
        """In the caller's thread, on the CPU that the others have."""
        with pinned_to(self.one.cpus):
            return run()


def blocks_of(qtype: QuantType) -> Callable[[], Bytes]:
    """WEIGHTS random weights, (n, type_size). Each time another copy of them: as when a model is
    loaded they are not in a cache.
    """
    block_size, type_size = BLOCKS[qtype]
    pattern = random_blocks(qtype, 1, PATTERN, np.random.default_rng(qtype.value)).reshape(-1)
    nbytes = WEIGHTS // block_size * type_size
    copies = prefaulted(nbytes * max(1, SOURCES // nbytes)).reshape(-1, nbytes)
    copies.reshape(-1, len(pattern))[:] = pattern
    return partial(next, cycle([copy.reshape(-1, type_size) for copy in copies]))


def _known_to_gguf(qtype: QuantType) -> bool:
    """F32 is left out: gguf-py only looks at it in another way."""
    known = gguf.GGMLQuantizationType.__members__.get(qtype.name)
    return known in gguf.quants._type_traits or qtype.name == "F16"  # noqa: SLF001


def _by_gguf(blocks: Bytes, qtype: QuantType) -> Any:
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = gguf.GGMLQuantizationType(qtype.value)
        return gguf.quants.dequantize(blocks.reshape(WEIGHTS // COLUMNS, -1), foreign)
