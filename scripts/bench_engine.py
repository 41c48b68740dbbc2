"""How long llama.cpp takes from its start to its first token: cold file, warm file, replica.

    python scripts/bench_engine.py [--size BYTES] [--rounds N]

A llama of Q8_0, which is not repacked, so that the engine computes where the file is mapped. Each
start is a process of its own; times are of loading (the weights' part) and of the first token, as
that process sees them, and of the rest: Python and the engine's library. Needs xllamacpp
(scripts/clients installs it). Medians of the rounds, which are shuffled.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numaload
from numaload.demo import parse_size
from numaload.formats.qtypes import QuantType

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from llama_model import Shape, write_llama

START = """
import json, sys, time
import xllamacpp

begin = time.perf_counter()
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
server = xllamacpp.Server(params)
loaded = time.perf_counter()
server.handle_completions({"prompt": "hello", "n_predict": 1, "temperature": 0})
print("TIMES", json.dumps([loaded - begin, time.perf_counter() - loaded]), flush=True)
"""
WIDTH, INNER = 2048, 8192
LAYER = (4 * WIDTH * WIDTH + 3 * WIDTH * INNER) * 34 // 32  # bytes of Q8_0


def start(path: str) -> tuple[float, float, float]:
    """Return the seconds of loading, of the first token, and of all else."""
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", START, path], capture_output=True, text=True, check=True
    )
    took = time.perf_counter() - begin
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("TIMES")]
    load, token = json.loads(line.removeprefix("TIMES"))
    return load, token, took - load - token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default="2G")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/dev/shm"))
    os.environ["NUMALOAD_STORE"] = str(memory)
    try:
        shape = Shape(WIDTH, INNER, options.size // LAYER, heads=16, qtype=QuantType.Q8_0)
        (path,) = write_llama(folder / "m.gguf", shape)
        numaload.mirror(path, nodes="local", shared=True).close()
        replica = os.path.join(numaload.store.folder(path), "m.gguf")
        ways = {"cold file": path, "warm file": path, "replica": replica}
        times: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name in random.sample(list(ways), len(ways)):
                numaload.evict(path) if name == "cold file" else numaload.prewarm(path)
                times[name].append(start(ways[name]))
        print(f"{os.path.getsize(path) / 2**30:.2f} GiB; seconds: loading, first token, the rest")
        for name, rows in times.items():
            columns = list(zip(*rows, strict=True))
            print(f"  {name:10}", *(f"{statistics.median(one):8.3f}" for one in columns), end="")
            whole = [sum(row) for row in rows]
            print(f"   all {statistics.median(whole):.3f} [{min(whole):.3f}, {max(whole):.3f}]")
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)


if __name__ == "__main__":
    main()
