"""What every measurement needs: the machine in words, touched memory, turns, and intervals."""

from __future__ import annotations

import os
import platform
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import comb
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload._version import __version__
from numaload.errors import UsageError
from numaload.kernels.jit.objects import cpuid
from numaload.kernels.jit.target import target
from numaload.linux.lists import format_list
from numaload.linux.mapping import map_private
from numaload.linux.sysfs import SysFiles
from numaload.machine import affinity, memory

PACKAGES = ("numba", "llvmlite", "numpy", "gguf")
CONFIDENCE = 0.95
GIB = 1 << 30
MOST_ROUNDS = 500  # every one is compared with every one of another run
LEAST_S = 0.02  # of a timing
UNKNOWN = "unknown"
EMULATED = "QEMU TCG (emulated)"
# What leaf 0x40000000 of cpuid says. Source: Linux, arch/x86/kernel/cpu; QEMU, target/i386/cpu.c.
HYPERVISORS = {
    "KVMKVMKVM": "KVM", "TCGTCGTCGTCG": EMULATED, "Microsoft Hv": "Hyper-V",
    "VMwareVMware": "VMware", "XenVMMXenVMM": "Xen",
}  # fmt: skip
LOAD_AFTER = "load after"
CPUS = "/sys/devices/system/cpu"

Progress = Callable[[str], None]
Thing = tuple[Callable[[], object], float]  # what is run, and how much that is


def check_rounds(rounds: int) -> None:
    """Check how many rounds are asked for. Raises: UsageError."""
    if not 1 <= rounds <= MOST_ROUNDS:
        raise UsageError(f"rounds {rounds}: expected at least 1 and at most {MOST_ROUNDS}")


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Return what figures were measured on and with: {what: words}.

    What is measured adds LOAD_AFTER at its end. What the kernel hides is "unknown".
    """
    release = platform.release().partition("-")[0]  # without what its builder added
    found = {
        "processor": processor(),
        "CPUs allowed": format_list(affinity.allowed()),
        "system": f"{platform.system()} {release} {platform.machine()}",
        "hypervisor": hypervisor(),
        "governor": _frequency("scaling_governor"),
        "most kHz": _frequency("scaling_max_freq"),
        "huge pages": _huge_pages(),
        "in huge pages": _in_huge_pages(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load before": load(),
        "python": platform.python_version(),
        "numaload": __version__,
    }
    return found | {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """Return its name, the one that kernels are compiled for, and how many CPUs there are."""
    return f"{_model_name()} ({target().cpu}), {os.cpu_count()} CPUs"


def _model_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.machine()


def hypervisor() -> str:
    """Return what runs this machine, "none" on bare metal. EMULATED: its speeds mean nothing."""
    features = cpuid(1)
    if features is None:
        return UNKNOWN
    if not features[2] >> 31:
        return "none"
    registers = cpuid(0x40000000) or ()
    name = struct.pack("3I", *registers[1:]).rstrip(b"\0").decode("ascii", "replace")
    return HYPERVISORS.get(name, name)


def load() -> str:
    """Return the load averages over 1, 5 and 15 minutes."""
    with suppress(OSError):
        return " ".join(f"{average:.2f}" for average in os.getloadavg())
    return UNKNOWN


def _frequency(leaf: str) -> str:
    """Return what the files of this name below cpufreq say of the CPUs allowed here."""
    files = SysFiles()
    found = {files.text(f"{CPUS}/cpu{cpu}/cpufreq/{leaf}") or UNKNOWN for cpu in affinity.allowed()}
    return ", ".join(sorted(found))


def _in_huge_pages() -> str:
    """Return how much of the machine's private memory huge pages hold."""
    nbytes = memory.fields("/proc/meminfo").get("AnonHugePages")
    return UNKNOWN if nbytes is None else f"{nbytes >> 20} MiB"


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
class Series:
    """One figure, with its single rounds in order: what ``compare`` compares.

    unit: of ``values``; of "ns" less is better. margin: the share by which two runs of the same
    code differ on a busy machine. baseline: what was measured in the same turns, and ``beside`` its
    rounds; empty where there is none.
    """

    name: str
    unit: str
    values: list[float]
    margin: float
    baseline: str = ""
    beside: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Rates:
    """Amounts per second by name, one per round, rounds in order.

    by_cpu: per second that this process computed: what others take of the CPU is not in it.
    """

    rates: Mapping[str, list[float]]
    by_cpu: Mapping[str, list[float]]

    def __add__(self, later: Rates) -> Rates:
        """Append the rounds of the same things, measured later."""
        return Rates(_joined(self.rates, later.rates), _joined(self.by_cpu, later.by_cpu))

    def median(self, name: str) -> float:
        return median(self.rates[name])

    def ratio(self, name: str, baseline: str) -> float:
        """Return how many times as fast as ``baseline``: the median over rounds."""
        pairs = zip(self.rates[name], self.rates[baseline], strict=True)
        return median(rate / base for rate, base in pairs)


def _joined(first: Mapping[str, list[float]], then: Mapping[str, list[float]]) -> Any:
    return {name: rounds + then[name] for name, rounds in first.items()}


def in_turns(things: Mapping[str, Thing], rounds: int) -> Rates:
    """Run one after another, ``rounds`` times; each once more before, which does not count.

    The first leaves the caches as it will find them. Otherwise it would pay for carrying out what
    its predecessor wrote there. What is over in less than LEAST_S is run again until it is not: a
    busy machine interrupts a thread for some milliseconds.
    """
    rates: dict[str, list[float]] = {name: [] for name in things}
    by_cpu: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, (run, amount) in things.items():
            run()
            begin, cpu, runs, seconds = time.perf_counter(), time.process_time(), 0, 0.0
            while seconds < LEAST_S:
                run()
                runs, seconds = runs + 1, time.perf_counter() - begin
            rates[name].append(runs * amount / seconds)
            by_cpu[name].append(runs * amount / max(time.process_time() - cpu, 1e-9))
    return Rates(rates, by_cpu)


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
