"""How fast the store is: attaching, building a replica, and switching a model.

    python scripts/bench_store.py [--rounds N] [--build BYTES] [--base BYTES] [--only PART]

- attach beside ``open`` of the same file, for models of 1, 2 and 6 GiB (holes: headers count).
- a shared replica from a warm file beside ``cp`` to the same tmpfs and beside a copy into anonymous
  huge pages, by as many threads; as much memory is touched and freed before each.
- switching: attach, the first tensor computed on, close; beside safetensors and torch reading the
  warm file into memory of their own. For a base model and for an adapter.

All in this run, in turns; medians of the rounds, and of each round's ratio. Must: attach at most 3
opens or 1 ms; a replica 3 times cp, 0.6 of the copy. Goal: 2 opens; switching 100 times as fast.
Needs torch and safetensors for the last part.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import numaload
from numaload.bench.mirror import cleared, copied
from numaload.demo import parse_size, write_model
from numaload.replicas import reclaim, store

SIZES = (1 << 30, 2 << 30, 6 << 30)
TENSORS = 300  # of the models that are attached, as 7 billion weights have
THREADS = os.cpu_count() or 1
Way = Callable[[], None]


def sparse(path: Path, nbytes: int) -> str:
    """Write a model of this size whose tensors are a hole."""
    import gguf

    rows = nbytes // TENSORS // 4096
    writer = gguf.GGUFWriter(str(path), "llama")
    for index in range(TENSORS):
        writer.add_tensor_info(f"blk.{index}.w", [rows, 1024], np.dtype(np.float32), rows * 4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + TENSORS * rows * 4096)
    return str(path)


def timed(ways: dict[str, Way], rounds: int, before: Way = lambda: None) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name in random.sample(list(ways), len(ways)):
            before()
            begin = time.perf_counter()
            ways[name]()
            if turn:  # the first one imports and compiles
                times[name].append(time.perf_counter() - begin)
    return times


def show(times: dict[str, list[float]], base: str) -> None:
    for name, took in times.items():
        ratio = statistics.median(b / t for b, t in zip(times[base], took, strict=True))
        median, least, most = (1e3 * f(took) for f in (statistics.median, min, max))
        print(
            f"  {name:44}{median:9.3f} ms [{least:.3f}, {most:.3f}]  {ratio:9.3f} x {base}",
            flush=True,
        )


def attaching(folder: Path, rounds: int) -> None:
    for size in SIZES:
        path = sparse(folder / f"sparse-{size >> 30}.gguf", size)
        numaload.mirror(path, nodes="local", shared=True).close()
        print(f"attach, {size >> 30} GiB, {TENSORS} tensors")
        ways: dict[str, Way] = {
            "open": lambda path=path: numaload.open(path).close(),  # type: ignore[misc]
            "attach": lambda path=path: numaload.attach(path).close(),  # type: ignore[misc]
            "attach, and a view": lambda path=path: view_of(path),  # type: ignore[misc]
            "open(replica='local')": lambda path=path: numaload.open(  # type: ignore[misc]
                path, replica="local"
            ).close(),
        }
        show(timed(ways, 20 * rounds), "open")
        reclaim.release(store.entries())


def view_of(path: str) -> None:
    with numaload.attach(path) as mirror:
        mirror.local()


def building(folder: Path, rounds: int, size: int) -> None:
    (path,) = write_model(str(folder / "warm.gguf"), size)
    nbytes = os.path.getsize(path)
    numaload.prewarm(path)
    target = Path(os.environ["NUMALOAD_STORE"]).parent / "copy.gguf"
    left: list[numaload.Mirror] = []

    def replica() -> None:
        left.append(numaload.mirror(path, nodes="local", shared=True))

    def clear() -> None:
        for one in left:
            one.close()
        left.clear()
        reclaim.release(store.entries())
        target.unlink(missing_ok=True)
        cleared(2 * nbytes)
        numaload.prewarm(path)  # machines page out what is idle

    print(f"building from a warm file, {nbytes >> 20} MiB")
    ways: dict[str, Way] = {
        "cp to the tmpfs": lambda: subprocess.run(["cp", path, target], check=True) and None,
        "mirror(shared=True)": replica,
        "a copy into anonymous huge pages": lambda: copied([path], THREADS) and None,
    }
    times = timed(ways, rounds, clear)
    cp, *others = ways
    show(times, cp)
    show({name: times[name] for name in others}, others[-1])
    clear()


def switching(folder: Path, rounds: int, base: int) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    models = (("base", base >> 24, (4096, 2048)), ("LoRA", 224, (64, 4096)))
    for what, count, shape in models:
        source = folder / what
        source.mkdir()
        path = source / "model.safetensors"
        save_file({f"{i}.weight": torch.randn(shape).bfloat16() for i in range(count)}, path)
        numaload.prewarm(str(path))
        numaload.mirror(str(path), nodes="local", shared=True, pool=what).close()

        def attach(path: Path = path) -> None:
            with numaload.attach(str(path)) as mirror:
                mirror.local()["0.weight"].torch().float().sum().item()

        def theirs(path: Path = path) -> None:
            tensors = {name: one.clone() for name, one in load_file(str(path)).items()}
            tensors["0.weight"].float().sum().item()

        print(f"switching a {what}, {path.stat().st_size >> 20} MiB, warm")
        ways: dict[str, Way] = {"safetensors and torch, copied": theirs, "attach": attach}
        show(
            timed(ways, rounds, lambda: cleared(1 << 30) and None), "safetensors and torch, copied"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--build", type=parse_size, default="2G")
    parser.add_argument("--base", type=parse_size, default="1536M", help="what is switched to")
    parser.add_argument("--only", choices=("attach", "build", "switch"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/dev/shm"))
    os.environ["NUMALOAD_STORE"] = str(memory / "store")
    try:
        parts = {
            "attach": lambda: attaching(folder, options.rounds),
            "build": lambda: building(folder, options.rounds, options.build),
            "switch": lambda: switching(folder, options.rounds, options.base),
        }
        for part in [options.only] if options.only else parts:
            parts[part]()
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)


if __name__ == "__main__":
    main()
