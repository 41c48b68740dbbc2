"""Measure how long the command line takes to start, as a multiple of bare Python in the same run.

Bytecode is cached in a folder of its own, as any installation has it, whatever this shell says.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

COMMAND = str(Path(sys.executable).parent / "numaload")
ROWS: dict[str, Sequence[str]] = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "numaload --version": (COMMAND, "--version"),
    "python -m numaload --version": (sys.executable, "-m", "numaload", "--version"),
    "numaload nodes": (COMMAND, "nodes"),
    "numaload prewarm, resident": (COMMAND, "prewarm", sys.executable),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in ROWS}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": cache}
        for turn in range(options.rounds + 1):
            for name, command in ROWS.items():
                begin = time.perf_counter()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
                if turn:  # the first fills the cache
                    times[name].append(time.perf_counter() - begin)
    bare = median(times["python -c pass"])
    for name, row in times.items():
        print(f"{name:30}{median(row) * 1e3:7.1f} ms  {median(row) / bare:5.2f} times bare Python")


if __name__ == "__main__":
    main()
