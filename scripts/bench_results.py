"""New results: ``dequantize()`` beside its kernel alone and beside clearing the memory alone.

    bench_results.py [--weights MI] [--rounds N] [--rest SECONDS] [--case QTYPE:DTYPE]... [--sizes]

kernel: into memory that is there. clear: making that memory, by all workers. numpy: into memory
that numpy allocates. new: ``dequantize()`` when nothing is kept; again: when the result before it
was dropped. Each in a shuffled order, Gweights/s by the clock and by processor time, which others
at work change less; then the ratio to the slower of kernel and clear in the same round. Where the
host takes back freed memory, --rest waits for that before each. --sizes: numpy beside again by
size, in a loop that drops each result: why ``buffers.LENT`` is.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import gguf
import numpy as np

import numaload
from numaload.bench.machine import describe, prefaulted
from numaload.dequantize import DTYPES
from numaload.linux.mapping import map_private, populate_write
from numaload.linux.syscalls import HUGE
from numaload.machine import buffers
from numaload.samples import random_blocks
from numaload.weights import Tensor

CASES = ("Q4_K:float32", "Q8_0:float32", "IQ3_S:float32", "BF16:float32", "Q4_K:bfloat16")
PATTERN = 1 << 20  # weights that are random; the rest repeats them
SIZES = [1 << n for n in range(20, 27)]  # bytes of output
ROW, LOOP = 4096, 8
KERNEL, CLEAR = "kernel", "clear"


class Rate(NamedTuple):
    """Gweights/s, by the clock and by the time of as many processors as there are workers."""

    clock: float
    cpu: float


def write(path: Path, qtype: numaload.QuantType, weights: int) -> None:
    pattern = random_blocks(qtype, 1, PATTERN, np.random.default_rng(0)).reshape(PATTERN // ROW, -1)
    writer = gguf.GGUFWriter(str(path), "llama")
    kind = gguf.GGMLQuantizationType(qtype.value)
    writer.add_tensor("t", np.tile(pattern, (weights // PATTERN, 1)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def clear(tensor: Tensor, nbytes: int) -> Any:
    memory = map_private(nbytes)

    def part(start: int, stop: int) -> None:
        populate_write(memory, start * HUGE, min(stop * HUGE, nbytes))

    tensor.workers().ranges(part, -(-nbytes // HUGE))
    return memory


def into_numpy(tensor: Tensor, dtype: str) -> Any:
    return tensor.dequantize(dtype, out=np.empty(tensor.shape, DTYPES[dtype]))


def timed(run: Callable[[], Any], weights: int, threads: int) -> Rate:
    clock, cpu = time.perf_counter(), time.process_time()
    kept = run()  # giving it back is not measured
    clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
    del kept
    return Rate(weights / clock / 1e9, threads * weights / cpu / 1e9)


def measure(tensor: Tensor, dtype: str, rounds: int, rest: float) -> dict[str, list[Rate]]:
    nbytes = tensor.size * DTYPES[dtype].itemsize
    ready = prefaulted(nbytes).view(DTYPES[dtype])
    runs: dict[str, Callable[[], Any]] = {
        KERNEL: partial(tensor.dequantize, dtype, out=ready),
        CLEAR: partial(clear, tensor, nbytes),
        "numpy": partial(into_numpy, tensor, dtype),
        "new": partial(tensor.dequantize, dtype),
        "again": partial(tensor.dequantize, dtype),
    }
    assert np.array_equal(runs[KERNEL]().view(np.uint8), runs["new"]().reshape(-1).view(np.uint8))
    rates: dict[str, list[Rate]] = {name: [] for name in runs}
    threads = tensor.workers().count
    for _ in range(rounds):
        for name in random.sample(list(runs), len(runs)):
            buffers._results.clear()  # noqa: SLF001
            if name == "again":
                runs[name]()
            time.sleep(rest if name != KERNEL else 0)
            rates[name].append(timed(runs[name], tensor.size, threads))
    buffers._results.clear()  # noqa: SLF001
    return rates


def tell(title: str, rates: dict[str, list[Rate]]) -> None:
    for name, its in rates.items():
        cells = []
        for which in range(2):
            slower = [
                min(one[which], other[which])
                for one, other in zip(rates[KERNEL], rates[CLEAR], strict=True)
            ]
            ratio = median(one[which] / base for one, base in zip(its, slower, strict=True))
            values = [one[which] for one in its]
            cells.append(
                f"{median(values):7.2f} [{min(values):6.2f}, {max(values):6.2f}] {ratio:6.2f}"
            )
        print(f"{title:26}{name:8}" + "   ".join(cells), flush=True)


def sizes(folder: Path, rounds: int) -> None:
    print(
        "us a result, and of processor time" + "".join(f"{name:>16}" for name in ("numpy", "again"))
    )
    write(folder / "sizes.gguf", numaload.QuantType.Q4_K, max(SIZES) // 4)
    with numaload.open(folder / "sizes.gguf") as weights:
        tensor = weights["t"]
        for size in SIZES:
            rows = (0, size // 4 // ROW)
            shape = (rows[1], ROW)

            def by_numpy(rows: tuple[int, int] = rows, shape: tuple[int, int] = shape) -> Any:
                return tensor.dequantize(out=np.empty(shape, np.float32), rows=rows)

            runs = {"numpy": by_numpy, "again": partial(tensor.dequantize, rows=rows)}
            took: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
            for _ in range(rounds):
                for name in random.sample(list(runs), len(runs)):
                    clock, cpu, kept = time.perf_counter(), time.process_time(), None
                    for _ in range(LOOP):
                        kept = runs[name]()
                    spent = time.perf_counter() - clock, time.process_time() - cpu
                    took[name].append((spent[0] / LOOP * 1e6, spent[1] / LOOP * 1e6))
                    del kept
            cells = "".join(
                "{:9.0f}{:7.0f}".format(*map(median, zip(*its, strict=True)))
                for its in took.values()
            )
            print(f"{size >> 20:>4} MiB{'':26}{cells}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", metavar="MI", type=int, action="append")
    parser.add_argument("--rounds", metavar="N", type=int, default=11)
    parser.add_argument("--rest", metavar="SECONDS", type=float, default=0)
    parser.add_argument("--case", metavar="QTYPE:DTYPE", action="append")
    parser.add_argument("--sizes", action="store_true")
    options = parser.parse_args()
    print(", ".join(f"{what} {found}" for what, found in describe().items()))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.sizes:
            sizes(folder, options.rounds)
            return
        print(f"{'':34}{'clock Gw/s':24}{'ratio':>6}   {'processor time':24}{'ratio':>6}")
        for mi in options.weights or [64]:
            for case in options.case or CASES:
                qtype, _, dtype = case.partition(":")
                path = folder / "model.gguf"
                write(path, numaload.QuantType[qtype], mi << 20)
                with numaload.open(path) as weights:
                    rates = measure(weights["t"], dtype, options.rounds, options.rest)
                    tell(f"{mi} Mi {qtype} to {dtype}", rates)


if __name__ == "__main__":
    main()
