"""How long it takes to open a model with a large vocabulary: numaload.open against gguf-py.

    python scripts/bench_header.py [--tokens N] [--tensors N]

Both are measured in this run, alternating, on the same resident file; medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import gguf
import numpy as np

import numaload

WANTED = 50  # times faster


def write(path: str, tokens: int, tensors: int) -> None:
    """Write a header as large models have it, with a few bytes of weights."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {i}" for i in range(tokens)])
    writer.add_token_scores([-0.5 * i for i in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_token_merges([f"tok en{i}" for i in range(tokens)])
    for i in range(tensors):
        writer.add_tensor(f"blk.{i // 10}.part_{i % 10}.weight", np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(path: str) -> None:
    numaload.open(path).close()


def measure(path: str, our_runs: int, their_runs: int) -> tuple[float, float]:
    """Medians in seconds. One run of ours goes before, for the imports and the page cache."""
    ours(path)
    our_times: list[float] = []
    their_times: list[float] = []
    for turn in range(max(our_runs, their_runs)):
        our_times.append(seconds(lambda: ours(path)))
        if turn < their_runs:
            their_times.append(seconds(lambda: gguf.GGUFReader(path)))
    return statistics.median(our_times), statistics.median(their_times)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the opening of a large header.")
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--tensors", type=int, default=600)
    parser.add_argument("--runs", type=int, default=9, help="of numaload")
    parser.add_argument("--gguf-runs", type=int, default=3, help="of gguf-py, which takes seconds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "header.gguf")
        write(path, options.tokens, options.tensors)
        size = os.path.getsize(path)
        our, their = measure(path, options.runs, options.gguf_runs)
    print(f"{options.tokens} tokens, {options.tensors} tensors, {size / 1e6:.1f} MB")
    print(f"numaload.open     {our * 1e3:10.1f} ms  (median of {options.runs})")
    print(f"gguf.GGUFReader   {their * 1e3:10.1f} ms  (median of {options.gguf_runs})")
    print(f"ratio             {their / our:10.0f}  (at least {WANTED} is wanted)")
    return 0 if their / our >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main())
