"""What every measurement needs: the machine in words, touched memory, turns, and intervals."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from math import comb
from statistics import median

import numpy as np
from numpy.typing import NDArray

from numaload._version import __version__
from numaload.kernels.jit.target import target
from numaload.linux.mapping import map_private
from numaload.machine import memory

PACKAGES = ("numba", "llvmlite", "numpy", "gguf")
CONFIDENCE = 0.95
GIB = 1 << 30

Progress = Callable[[str], None]
Thing = tuple[Callable[[], object], float]  # what is run, and how much that is


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return what figures were measured on and with: {what: words}."""
    release = platform.release().partition("-")[0]  # without what its builder added
    found = {
        "processor": f"{_processor()} ({target().cpu}), {os.cpu_count()} CPUs",
        "system": f"{platform.system()} {release} {platform.machine()}",
        "huge pages": _huge_pages(),
        "python": platform.python_version(),
        "numaload": __version__,
    }
    return found | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def _huge_pages() -> str:
    """Return which memory gets huge pages: "madvise", "always", or "never"."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"


def prefaulted(nbytes: int) -> NDArray[np.uint8]:
    """Make memory that begins at a huge page and was written once. Raises: NodeMemoryError."""
    memory.require(nbytes, "memory to measure in", "measure less: --size, --threads")
    touched = np.frombuffer(map_private(nbytes).view(write=True), np.uint8)
    touched[:] = 1
    return touched


@dataclass(frozen=True)
class Rates:
    """Amounts per second by name, one per round, rounds in order."""

    rates: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.rates[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Return how many times as fast as ``baseline``: the median over rounds."""
        pairs = zip(self.rates[name], self.rates[baseline], strict=True)
        return median(rate / base for rate, base in pairs)


def in_turns(things: Mapping[str, Thing], rounds: int) -> Rates:
    """Run one after another, ``rounds`` times; each twice, and the second counts.

    The first leaves the caches as it will find them. Otherwise it would pay for carrying out what
    its predecessor wrote there.
    """
    rates: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, (run, amount) in things.items():
            run()
            begin = time.perf_counter()
            run()
            rates[name].append(amount / (time.perf_counter() - begin))
    return Rates(rates)


def median_interval(values: list[float]) -> tuple[float, float] | None:
    """Return the narrowest two order statistics that hold the median with at least 95 %.

    It assumes nothing about the distribution: each value is below the median with one half. None
    for fewer than six values. Source: the sign test's interval, in any book on order statistics.
    """
    count, found = len(values), None
    outside = 0.0  # the probability that fewer than ``k`` values are below the median
    for k in range(count // 2):
        outside += comb(count, k) / 2**count
        if 2 * outside > 1 - CONFIDENCE:
            break
        found = k
    ordered = sorted(values)
    return None if found is None else (ordered[found], ordered[count - 1 - found])
