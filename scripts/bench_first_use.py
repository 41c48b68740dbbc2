"""First use of Q4_K, Q6_K and F32 to bfloat16 in a fresh process: compiled, and from the cache."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

PROGRAM = """
import json, sys, time
begin = time.perf_counter()
import numpy as np
from numaload.dequantize import DTYPES, dequantize_blocks
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.machine.topology import topology
from numaload.machine.workers import pool
workers, found = pool(topology()), {"imports": time.perf_counter() - begin}
for name in ("Q4_K", "Q6_K", "F32"):
    begin = time.perf_counter()
    block_size, type_size = BLOCKS[QuantType[name]]
    out = np.empty(block_size * 64, DTYPES["bfloat16"])
    dequantize_blocks(np.zeros((64, type_size), "u1"), QuantType[name], out.dtype, out, workers)
    found[name] = time.perf_counter() - begin
found["numba"] = "numba" in sys.modules
print(json.dumps(found))
"""


def use(cache: str) -> dict[str, float]:
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | {"NUMALOAD_CACHE_DIR": cache}, text=True,
        stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found: dict[str, float] = json.loads(done.stdout)
    found["first use"] = sum(found[name] for name in ("Q4_K", "Q6_K", "F32"))
    found["process"] = time.perf_counter() - begin
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    rows: dict[str, list[dict[str, float]]] = {"compiled": [], "from the cache": []}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for row in rows.values():
                row.append(use(cache))
    columns = ("Q4_K", "Q6_K", "F32", "first use", "imports", "process")
    print(f"{'':16}" + "".join(f"{name:>11}" for name in columns) + "   numba imported")
    for label, found in rows.items():
        cells = "".join(f"{median(one[name] for one in found):9.3f} s" for name in columns)
        print(f"{label:16}{cells}   {any(one['numba'] for one in found)}")


if __name__ == "__main__":
    main()
