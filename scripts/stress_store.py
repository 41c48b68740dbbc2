"""Many processes mirror, attach, read, release and collect the same models at once.

    python scripts/stress_store.py [--processes N] [--seconds S] [--seed N]

Each reads what it attached and compares every byte with what the file must hold. At the end the
store must be empty, and take no memory; nobody may have seen another byte, or an error that does
not say that somebody else released it. Exit status 1 if anything was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np

import numaload
from numaload.demo import write_model
from numaload.replicas import catalogue, reclaim, store

MODELS = 3
SIZE = 20 << 20
WAYS = ("mirror", "mirror", "attach", "attach", "attach", "open", "folder", "release", "collect")


def work(paths: list[str], seconds: float, seed: int) -> int:
    """Do it in this process; return how often."""
    warnings.simplefilter("ignore", numaload.errors.NumaloadWarning)
    chance, done, end = random.Random(seed), 0, time.monotonic() + seconds
    expected = {path: np.fromfile(path, np.uint8).sum(dtype=np.uint64) for path in paths}
    while time.monotonic() < end:
        path, way = chance.choice(paths), chance.choice(WAYS)
        with suppress(numaload.errors.ReplicaNotFoundError):  # somebody released it
            _once(path, way, int(expected[path]), chance)
        done += 1
    return done


def _once(path: str, way: str, expected: int, chance: random.Random) -> None:
    if way == "mirror":
        with numaload.mirror(path, "local", shared=True, pool=chance.choice(["", "x"])) as mirror:
            _check(path, mirror.local(), expected)
    elif way == "attach":
        with numaload.attach(path) as mirror:
            _check(path, mirror.local(), expected)
    elif way == "open":
        with numaload.open(path, replica="local") as weights:
            _check(path, weights, expected)
    elif way == "folder":
        with numaload.attach(path) as mirror:
            file = os.path.join(mirror.folder(mirror.nodes[0]), os.path.basename(path))
            with suppress(FileNotFoundError):  # it was released
                assert os.path.getsize(file) == os.path.getsize(path), file
    elif way == "release":
        reclaim.release([e for e in store.entries() if e.model.paths == (path,)])
    else:
        catalogue.collect(idle_s=chance.choice([None, 0.0, 0.5]))


def _check(path: str, weights: numaload.Weights, expected: int) -> None:
    found = int(np.frombuffer(weights.image(), np.uint8).sum(dtype=np.uint64))
    assert found == expected, f"{path}: other bytes than in the file"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        try:
            print(work(options.work, options.seconds, options.seed))
        except BaseException:  # noqa: BLE001 - it shall be seen
            traceback.print_exc()
            return 1
        return 0
    folder = Path(tempfile.mkdtemp(prefix="numaload-stress-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="numaload-stress-", dir="/dev/shm"))
    os.environ["NUMALOAD_STORE"] = str(memory)
    try:
        paths = [write_model(str(folder / f"{n}.gguf"), SIZE)[0] for n in range(MODELS)]
        return _run(paths, options)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)


def _run(paths: list[str], options: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--seconds", str(options.seconds)]
    processes = [
        subprocess.Popen(
            [*command, "--seed", str(options.seed + number), "--work", *paths],
            stdout=subprocess.PIPE, text=True,
        )
        for number in range(options.processes)
    ]  # fmt: skip
    told = [process.communicate()[0].strip() for process in processes]
    failed = [process for process in processes if process.returncode]
    reclaim.release(store.entries())
    reclaim.sweep()
    left = [entry.name for entry in store.entries()]
    own = Path(os.environ["NUMALOAD_STORE"], f"numaload-{os.geteuid()}")
    files = [
        str(path) for path in own.rglob("*") if path.is_file() and path.stat().st_size > 1 << 20
    ]
    rounds = sum(int(one or 0) for one in told)
    ran = f"{options.processes} processes, {rounds} rounds, {len(failed)} failed"
    print(f"{ran}; left: {left + files}")
    return 1 if failed or left or files else 0


if __name__ == "__main__":
    sys.exit(main())
