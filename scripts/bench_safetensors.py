"""How long it takes to open a safetensors file and have all its tensors: beside safe_open.

    python scripts/bench_safetensors.py [--rounds N] [--size BYTES]

Both map the warm file and give zero-copy torch tensors. All in this run, in turns, on the same
file; medians of the rounds, least and most. Once as it is, once with a byte of every page read,
which makes the kernel map them: that is most of what loading costs. torch and safetensors are
needed. The exit status is 1 if numaload takes more than 1.1 times as long.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open

import numaload

MUST = 1.1
PAGE = 4096


def write(path: str, count: int, nbytes: int) -> None:
    """Write ``count`` tensors of ``nbytes`` in all, as models have them: matrices and norms."""
    rows = max(1, nbytes // (count * 3 // 4) // 2 // 512)
    shapes = [(rows, 512) if index % 4 else (512,) for index in range(count)]
    tensors = {
        f"model.layers.{index // 9}.part_{index % 9}.weight": torch.randn(shape).bfloat16()
        for index, shape in enumerate(shapes)
    }
    safetensors.torch.save_file(tensors, path)


def theirs(path: str) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def ours(path: str) -> dict[str, Any]:
    with numaload.open(path) as weights:
        return {name: tensor.torch() for name, tensor in weights.items()}


def touched(tensors: dict[str, Any]) -> int:
    """Sum a byte of every page, so that all are in memory; one byte of what is smaller."""
    return sum(
        int(t.view(-1).view(torch.uint8)[::PAGE].sum()) for t in tensors.values() if t.numel() > 512
    )


def seconds(load: Callable[[str], dict[str, Any]], path: str, *, touch: bool) -> tuple[float, int]:
    """Measure the seconds of loading, touching and letting go."""
    gc.collect()
    start = time.perf_counter()
    tensors = load(path)
    total = touched(tensors) if touch else len(tensors)
    del tensors
    return time.perf_counter() - start, total


def measure(name: str, path: str, rounds: int, *, touch: bool) -> bool:
    """Measure all ways in turns; return whether the must is met."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # the first is for imports and the page cache
        order = (0, 1) if turn % 2 else (1, 0)
        totals = {}
        for which in order:
            took, totals[which] = seconds((theirs, ours)[which], path, touch=touch)
            if turn:
                times[which].append(took * 1e3)
        if totals[0] != totals[1]:
            raise SystemExit(f"{name}: not the same values: {totals}")
    shown = [f"{statistics.median(t):8.2f} ms [{min(t):.2f}, {max(t):.2f}]" for t in times]
    ratio = statistics.median(times[1]) / statistics.median(times[0])
    print(f"{name:34} safe_open {shown[0]:30} numaload {shown[1]:30} {ratio:5.2f} (must <= {MUST})")
    return ratio <= MUST


def main() -> None:
    parser = argparse.ArgumentParser(description="Zero-copy loading, beside safe_open.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=1 << 30)
    options = parser.parse_args()
    warnings.simplefilter("ignore", numaload.errors.NumaloadWarning)
    met = []
    with tempfile.TemporaryDirectory() as folder:
        for count, nbytes in ((300, options.size), (2000, 2000 * 2048)):
            path = os.path.join(folder, f"{count}.safetensors")
            write(path, count, nbytes)
            name = f"{count} tensors, {os.path.getsize(path) >> 20} MiB"
            met += [
                measure(f"{name}, {how}", path, options.rounds, touch=touch)
                for how, touch in (("opened", False), ("touched", True))
            ]
    sys.exit(not all(met))


if __name__ == "__main__":
    main()
