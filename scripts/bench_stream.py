"""``numaload.stream`` to bfloat16 beside its slowest stage alone, cold and warm.

The stages: reading ahead (into the page cache; warm there is nothing to do) and converting (out of
it, to bfloat16 in memory that is used again, by the same threads). Beside them the two parts of
converting: reading out of the page cache, into memory of each thread that is used again, and the
kernels on blocks that are in memory of this process. Both need the same CPUs, so together they take
longer than either. Rounds alternate over all rows; before each timing memory is touched and freed,
since what a hypervisor has not backed yet is several times slower to touch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import gguf
import numpy as np

import numaload
from numaload.bench.machine import describe, median_interval
from numaload.demo import parse_size
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.linux.mapping import map_private
from numaload.pipeline.fill import AT_ONCE, Target, fill, scratch
from numaload.samples import random_blocks

COLUMNS, TENSORS = 4096, 48
COLD, WARM = "cold", "warm"


def write(path: Path, name: str, size: int) -> None:
    """Write a model of one type, as many equal tensors."""
    qtype = QuantType[name]
    block_size, type_size = BLOCKS[qtype]
    rows = max(1, size // TENSORS // (COLUMNS // block_size * type_size))
    blocks = random_blocks(qtype, rows, COLUMNS, np.random.default_rng(0))
    raw = gguf.GGMLQuantizationType[name]
    if name in ("F16", "F32"):
        blocks = blocks.view(np.float16 if name == "F16" else np.float32)
    writer = gguf.GGUFWriter(str(path), "llama")
    for i in range(TENSORS):
        writer.add_tensor(f"blk.{i}.weight", blocks, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def touch(nbytes: int) -> None:
    with map_private(nbytes) as mapping, mapping.view(write=True) as view:
        for offset in range(0, nbytes, 4096):
            view[offset] = 1


class Stages:
    """What is measured, each a whole pass over the file."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.weights = numaload.open(path)
        self.copy = numaload.open(path, copy=True)
        self.tensors = list(self.copy.values())
        self.results = [self._result() for _ in range(4)]

    def _result(self) -> np.ndarray:
        made = np.frombuffer(map_private(self.tensors[0].size * 2).view(write=True), np.uint16)
        made[:] = 1
        return made

    def stream(self) -> None:
        for _ in numaload.stream(self.weights, "bfloat16"):
            pass

    def convert(self) -> None:
        tensors = [self.weights[tensor.name] for tensor in self.tensors]
        places = [self.results[i % len(self.results)] for i in range(len(tensors))]
        fill([Target(*one, "bfloat16") for one in zip(tensors, places, strict=True)], ahead=0)

    def kernels(self) -> None:
        for i, tensor in enumerate(self.tensors):
            tensor.dequantize("bfloat16", out=self.results[i % len(self.results)])

    def read_ahead(self) -> None:
        numaload.prewarm(self.path)

    def read_out(self) -> None:
        step = AT_ONCE
        file, workers = self.weights.parts[0].file, self.weights.workers()

        def read(start: int, stop: int) -> None:
            for at in range(start, stop, step):
                view = scratch("bench", min(step, stop - at)).data
                file.read_into(view, at)

        workers.ranges(read, file.size, step)

    @contextmanager
    def prepared(self, state: str) -> Iterator[None]:
        touch(self.size + (1 << 30))
        if state == COLD:
            numaload.evict(self.path)
        else:
            numaload.prewarm(self.path)
        yield


def measure(stages: Stages, rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Return {row: (seconds, CPU seconds) of each round}."""
    rows: dict[str, tuple[str, Callable[[], None]]] = {
        "stream cold": (COLD, stages.stream),
        "read ahead cold": (COLD, stages.read_ahead),
        "stream warm": (WARM, stages.stream),
        "read out warm": (WARM, stages.read_out),
        "convert": (WARM, stages.convert),
        "kernels": (WARM, stages.kernels),
    }
    for _, run in rows.values():  # kernels are compiled, libraries loaded
        run()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, (state, run) in rows.items():
            with stages.prepared(state):
                cpu, begin = time.process_time(), time.perf_counter()
                run()
                took = time.perf_counter() - begin
            found[name].append((took, time.process_time() - cpu))
    return found


def ratios(found: dict[str, list[tuple[float, float]]], state: str) -> list[float]:
    """Return, for each round, the slowest stage's seconds divided by the stream's."""
    stages = [found["convert"], *([found["read ahead cold"]] if state == COLD else [])]
    slowest = [max(seconds for seconds, _ in its) for its in zip(*stages, strict=True)]
    streams = zip(slowest, found[f"stream {state}"], strict=True)
    return [stage / seconds for stage, (seconds, _) in streams]


def report(name: str, size: int, found: dict[str, list[tuple[float, float]]]) -> dict[str, object]:
    told: dict[str, object] = {"type": name, "bytes": size}
    print(f"{name}, {size / 2**30:.2f} GiB")
    for row, pairs in found.items():
        rate = size / median(seconds for seconds, _ in pairs) / 1e9
        cpu = median(cpu for _, cpu in pairs) / (size / 2**30)
        told[row] = {"GB/s": rate, "CPU s/GiB": cpu}
        print(f"  {row:16} {rate:6.2f} GB/s of the file, {cpu:.3f} CPU s/GiB")
    for state in (COLD, WARM):
        each = ratios(found, state)
        interval = median_interval(each)
        told[f"ratio {state}"] = {"median": median(each), "interval": interval}
        print(f"  {state}: {median(each):.3f} of the slowest stage, 95 % interval {interval}")
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default="1G")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--types", default="Q4_K,Q6_K,Q8_0,F16")
    parser.add_argument("--folder", help="where the model is written, on the disk to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    print(", ".join(f"{k} {v}" for k, v in describe().items()))
    rows = []
    for name in options.types.split(","):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = Path(folder, "model.gguf")
            write(path, name, options.size)
            size = path.stat().st_size
            rows.append(report(name, size, measure(Stages(path, size), options.rounds)))
    if options.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
