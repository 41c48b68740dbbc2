"""Processors: instruction sets, threads, frequencies, quotas, and types that are slow here."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from collections.abc import Iterable

from numaload.doctor.check import ESTIMATED, PASS, Check, Price, Unknown, counted
from numaload.doctor.system import System
from numaload.formats.qtypes import BLOCKS, FLOATS, QuantType
from numaload.kernels import jit, registry
from numaload.linux.cgroups import cpu_quota, folders
from numaload.linux.lists import format_list, parse_list
from numaload.linux.sysfs import SysFiles, number_in

CPUS = "/sys/devices/system/cpu"
SAMPLE, ROUNDS = 1 << 17, 25  # weights that are converted, and how often


class InstructionSets(Check):
    id, title = "NL501", "Instruction sets of the processor are hidden"
    source = "QEMU docs/system/cpu-models-x86.rst.inc; numaload's kernels use these, 2026-11"
    NEEDED = ("avx2", "fma", "f16c")
    # Words of the kernel command line that take them away (kernel-parameters.txt).
    HIDING = ("clearcpuid=", "noxsave", "gather_data_sampling=force")
    # Seconds for a weight of Q4_0 by code for SSE2 and for the processor: docs/types.md, 2026-10.
    PLAIN_S, NATIVE_S = 1 / 3.0e9, 1 / 5.5e9
    word = ""

    def measure(self) -> str:
        rows = self.system.text("/proc/cpuinfo").splitlines()
        flags = next((row.split() for row in rows if row.startswith("flags")), None)
        if flags is None:
            if any(row.startswith("Features") for row in rows):  # not x86
                return ""
            raise Unknown("/proc/cpuinfo: no flags")
        missing = [name for name in self.NEEDED if name not in flags]
        if missing and "hypervisor" not in flags:
            words = self.system.text("/proc/cmdline").split()
            self.word = next((word for word in words if word.startswith(self.HIDING)), "")
        if not missing or ("hypervisor" not in flags and not self.word):
            return ""  # an old processor: nothing hides them
        where = self.word or "this virtual machine"
        return f"{', '.join(missing)} missing: {where} hides them ({self.system.processor})"

    def explain(self) -> str:
        return "Without these instructions the kernels handle fewer weights at a time."

    def price(self) -> Price | None:
        lost = sum(_weights(self.system).values()) * (self.PLAIN_S - self.NATIVE_S)
        return Price(lost / _count(self.system), ESTIMATED, PASS) if lost else None

    def fix(self) -> str:
        if self.word:
            return (
                f"take {self.word} off the kernel command line, then restart the machine, as root"
            )
        return (
            "start the virtual machine with the host's processor: qemu-system-x86_64 -cpu host,"
            " or <cpu mode='host-passthrough'/> by virsh edit"
        )

    def undo(self) -> str:
        if self.word:
            return (
                f"put {self.word} back on the kernel command line, then restart the machine, as"
                " root"
            )
        return "give the virtual machine its former -cpu model again"


class Hyperthreads(Check):
    id, title = "NL502", "More threads are asked for than there are cores"
    source = "llama.cpp docs/development/token_generation_performance_tips.md, 2026-08"
    VARIABLES = (
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS",
        "LLAMA_ARG_THREADS",
    )  # fmt: skip
    cores = 0

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.asked: dict[str, str] = {}

    def available(self) -> bool:
        return any(name in self.system.environment for name in self.VARIABLES)

    def measure(self) -> str:
        cpus, told = self.system.cpus, self.system.environment
        if not cpus:
            raise Unknown("which CPUs may be used")
        path = "topology/thread_siblings_list"
        self.cores = len({self.system.text(f"{CPUS}/cpu{cpu}/{path}") for cpu in cpus})
        for name in self.VARIABLES:  # OMP_NUM_THREADS may be a list: the first is the outermost
            count = number_in(told.get(name, "").partition(",")[0].strip())
            if count is not None and count > self.cores:
                self.asked[name] = told[name]
        which = ", ".join(f"{name}={value}" for name, value in self.asked.items())
        return (
            which and f"{which}, on {counted(self.cores, 'core')} with {counted(len(cpus), 'CPU')}"
        )

    def explain(self) -> str:
        return (
            "Threads on one core share its units and its path to memory: decoding gets no faster"
            " by them, and each step waits for the slowest."
        )

    def fix(self) -> str:
        return f"export {' '.join(f'{name}={self.cores}' for name in self.asked)}"

    def undo(self) -> str:
        before = (f"{name}={shlex.quote(value)}" for name, value in self.asked.items())
        return f"export {' '.join(before)}"


class _Frequencies(Check):
    """CPUs whose frequency is kept low by a file below cpufreq."""

    root = True
    leaf = ""  # the file

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.changes: dict[tuple[str, str], list[int]] = {}  # {(old, new): CPUs}

    def available(self) -> bool:
        cpus = self.system.cpus
        return bool(cpus) and self.system.exists(f"{CPUS}/cpu{min(cpus)}/cpufreq")

    def fix(self) -> str:
        rows = self.changes.items()
        return "; ".join(_write(new, cpus, f"cpufreq/{self.leaf}") for (_, new), cpus in rows)

    def undo(self) -> str:
        rows = self.changes.items()
        return "; ".join(_write(old, cpus, f"cpufreq/{self.leaf}") for (old, _), cpus in rows)

    def _text(self, cpu: int, leaf: str) -> str:
        return self.system.text(f"{CPUS}/cpu{cpu}/cpufreq/{leaf}")

    def _khz(self, cpu: int, leaf: str) -> int:
        return self.system.number(f"{CPUS}/cpu{cpu}/cpufreq/{leaf}")

    def _slowed(self, share: float) -> Price | None:
        """Return what copying the file from RAM loses at this share of the frequency.

        Assumed: it takes as much longer as the frequency is lower.
        """
        system = self.system
        if not system.size or not system.speeds.warm:
            return None
        return Price(system.size / system.speeds.warm * max(0.0, 1 - share))


class Governor(_Frequencies):
    id, title = "NL503", "The frequency governor keeps CPUs slow"
    source = "Linux Documentation/admin-guide/pm/cpufreq.rst and intel_pstate.rst, 2026-11"
    SLOW = ("powersave", "ondemand", "conservative")
    # Drivers with governors of their own, of which powersave follows the load.
    ACTIVE = ("intel_pstate", "amd-pstate-epp")
    PREFERENCE = "energy_performance_preference"
    LOWEST = "powersave"

    def measure(self) -> str:
        cpus = sorted(self.system.cpus)
        driver = self._text(cpus[0], "scaling_driver")
        active = driver in self.ACTIVE
        self.leaf = self.PREFERENCE if active else "scaling_governor"
        if active and not self.system.exists(f"{CPUS}/cpu{cpus[0]}/cpufreq/{self.leaf}"):
            return ""  # before HWP: there is no such preference
        for cpu in cpus:
            value = self._text(cpu, self.leaf)
            if value == "power" if active else value in self.SLOW:
                self.changes.setdefault((value, "performance"), []).append(cpu)
        rows = self.changes.items()
        told = ", ".join(f"{old} on CPUs {format_list(its)}" for (old, _), its in rows)
        return f"{self.leaf}: {told} (driver {driver})" if told else ""

    def explain(self) -> str:
        return (
            "The governor chooses each CPU's frequency: powersave stays at the lowest, ondemand and"
            " conservative rise late, and power prefers to save energy."
        )

    def price(self) -> Price | None:
        slowest = self.changes.get((self.LOWEST, "performance"))
        if not slowest:
            return None
        cpu = slowest[0]
        lowest, highest = self._khz(cpu, "scaling_min_freq"), self._khz(cpu, "scaling_max_freq")
        return self._slowed(lowest / highest) if highest > 0 else None


class Throttled(Check):
    id, title = "NL504", "The cgroup's CPU quota is far below the CPUs"
    source = "Linux Documentation/admin-guide/cgroup-v2.rst, cpu.max and cpu.stat, 2026-11"
    SHARE = 0.5  # of the CPUs that are visible
    quota = 0.0

    def available(self) -> bool:
        return self.system.pid is None  # the quota of a process: NL704

    def measure(self) -> str:
        self.system.text("/proc/self/cgroup")  # who hides it does not say "no quota"
        found = cpu_quota(self.system.sys, self.system.proc)
        count = _count(self.system)
        if found is None or found > self.SHARE * count:
            return ""
        self.quota = found
        groups = folders("cpu", self.system.sys, self.system.proc)
        stopped = max(map(self._stopped, groups), default=0)
        return (
            f"{found:.4g} CPUs' time is allowed, and {counted(count, 'CPU')} can be seen; it ran"
            f" out in {stopped} of its periods so far"
        )

    def _stopped(self, folder: tuple[str, int]) -> int:
        rows = (SysFiles().text(f"{folder[0]}/cpu.stat") or "").splitlines()
        words = [row.partition(" ")[2] for row in rows if row.startswith("nr_throttled ")]
        return next(filter(None, map(number_in, words)), 0)

    def explain(self) -> str:
        return (
            "Programs start a thread for each CPU that they see. These use up the quota of a period"
            " at once, and then all stand still until the next one."
        )

    def fix(self) -> str:
        return (
            f"docker update --cpus={_count(self.system)} CONTAINER  # in Kubernetes limits.cpu, of"
            " systemd CPUQuota=; or fewer threads: export"
            f" OMP_NUM_THREADS={max(1, int(self.quota))}"
        )

    def undo(self) -> str:
        return f"docker update --cpus={self.quota:.4g} CONTAINER; unset OMP_NUM_THREADS"


class CostlyTypes(Check):
    id, title = "NL505", "A quantization type is slow on this processor"
    source = "measured in this run, against a type of few instructions: docs/kernels.md, 2026-10"
    TIMES = 2.0  # as slow as the other
    MEMORY = 0.5  # of the speed of copying from RAM: who writes floats faster waits for memory
    # Types of few instructions, by bits of a weight.
    CHEAP = (QuantType.Q2_K, QuantType.Q3_K, QuantType.Q4_K, QuantType.Q5_K, QuantType.Q8_0)
    MOST = 3  # types of the model that are measured
    weights = 0  # of the type
    qtype = other = QuantType.Q8_0
    seconds = other_seconds = 0.0  # of a weight, by one thread

    def available(self) -> bool:
        return self.system.deep and bool(_weights(self.system))

    def measure(self) -> str:
        warm = self.system.speeds.warm
        if not warm:
            raise Unknown("how fast RAM is was not measured")
        for qtype, count in _weights(self.system).most_common(self.MOST):
            other = next((one for one in self.CHEAP if _bits(one) >= _bits(qtype)), qtype)
            seconds = seconds_of(qtype)
            if other == qtype or 4 / seconds > self.MEMORY * warm:
                continue
            cheap = seconds_of(other)
            if seconds > self.TIMES * cheap and count * (seconds - cheap) > self._lost():
                self.qtype, self.other, self.weights = qtype, other, count
                self.seconds, self.other_seconds = seconds, cheap
        if not self.weights:
            return ""
        return (
            f"{self.qtype.name} takes {self.seconds * 1e9:.2f} ns a weight, {self.other.name}"
            f" {self.other_seconds * 1e9:.2f}, for {self.weights / 1e9:.1f} billion weights"
        )

    def _lost(self) -> float:
        return self.weights * (self.seconds - self.other_seconds)

    def explain(self) -> str:
        return "Turning its blocks to floats takes longer than fetching them from memory."

    def price(self) -> Price:
        # Assumed: all CPUs share the work evenly.
        return Price(self._lost() / _count(self.system), ESTIMATED, PASS)

    def fix(self) -> str:
        more = self.weights * (_bits(self.other) - _bits(self.qtype)) / 8
        disk = self.system.speeds.disk
        reading = f" and {more / disk:.1f} s more of each cold load" if disk else ""
        return (
            f"use this model quantized as {self.other.name}: {more / (1 << 30):.1f} GiB"
            f" more{reading}"
        )


class Offline(Check):
    id, title = "NL506", "CPUs are switched off"
    source = "Linux Documentation/core-api/cpu_hotplug.rst, 2026-11"
    root = True
    cpus: tuple[int, ...] = ()

    def measure(self) -> str:
        present, online = (_ids(self.system, f"{CPUS}/{name}") for name in ("present", "online"))
        self.cpus = tuple(sorted(present - online))
        if not self.cpus or self._are_siblings():
            return ""
        return f"CPUs {format_list(self.cpus)} of {len(present)} are offline"

    def _are_siblings(self) -> bool:
        """Return whether they are second threads of cores, switched off on purpose."""
        path = f"{CPUS}/smt/control"
        return self.system.exists(path) and self.system.text(path) in ("off", "forceoff")

    def explain(self) -> str:
        return "No thread runs on a CPU that is offline, and its node computes with the others."

    def fix(self) -> str:
        return _write("1", self.cpus, "online")

    def undo(self) -> str:
        return _write("0", self.cpus, "online")


class Busy(Check):
    id, title = "NL507", "Other programs keep the machine busy"
    source = "Linux Documentation/filesystems/proc.rst, loadavg, 2026-11"

    def measure(self) -> str:
        word = self.system.text("/proc/loadavg").partition(" ")[0]
        count = len(_ids(self.system, f"{CPUS}/online"))
        try:
            load = float(word)
        except ValueError as error:
            raise Unknown(f"/proc/loadavg: {word[:40]!r} is no number") from error
        if round(load, 1) <= count:
            return ""
        return f"{load:.1f} threads on average, in the last minute, and {counted(count, 'CPU')}"

    def explain(self) -> str:
        return (
            "More threads run, or wait for a disk, than there are CPUs: what was measured now is"
            " slower than on a quiet machine."
        )

    def fix(self) -> str:
        return (
            "run this again when it is quiet; who keeps it busy:"
            " ps -eo pcpu,pid,user,comm --sort=-pcpu"
        )


class Capped(_Frequencies):
    id, title = "NL509", "The frequency of CPUs is capped"
    source = "Linux Documentation/admin-guide/pm/cpufreq.rst, scaling_max_freq, 2026-11"
    SHARE = 0.9  # of what the hardware can: a small difference is rounding, or its boost
    leaf = "scaling_max_freq"
    lowest = 1.0  # share of the most capped CPU

    def measure(self) -> str:
        cpus = sorted(self.system.cpus)
        for cpu in cpus:
            cap, top = self._khz(cpu, self.leaf), self._khz(cpu, "cpuinfo_max_freq")
            if 0 < cap < self.SHARE * top:
                self.changes.setdefault((str(cap), str(top)), []).append(cpu)
                self.lowest = min(self.lowest, cap / top)
        return ", ".join(
            f"CPUs {format_list(its)} may run at {int(cap) / 1e6:.1f} of {int(top) / 1e6:.1f} GHz"
            for (cap, top), its in self.changes.items()
        )

    def explain(self) -> str:
        return "Somebody set a limit below what the hardware can: copying and computing are slower."

    def price(self) -> Price | None:
        cpu = min(its[0] for its in self.changes.values())
        if self._text(cpu, "scaling_governor") == Governor.LOWEST and (
            self._text(cpu, "scaling_driver") not in Governor.ACTIVE
        ):
            return None  # it stays at the lowest anyhow: NL503
        return self._slowed(self.lowest)


CHECKS: tuple[type[Check], ...] = (
    InstructionSets,
    Hyperthreads,
    Governor,
    Throttled,
    CostlyTypes,
    Offline,
    Busy,
    Capped,
)


def seconds_of(qtype: QuantType) -> float:
    """Measure the processor time for a weight of this type, in the caches. Raises: Unknown.

    Nothing is compiled for it, as that would write to the cache of kernels.
    """
    if registry.interpreted():
        raise Unknown(registry.problem())
    from numaload.kernels.jit import cache

    try:
        there = cache.load(f"{registry.KERNELS[qtype][1]}_to_float32") is not None
        kernel = registry.load(qtype, "float32") if there else None
    except jit.SettingError as error:
        raise Unknown(str(error)) from error
    if kernel is None:
        how = f"numaload bench dequant --qtype {qtype.name}"
        raise Unknown(f"{qtype.name} was not used here yet, so nothing is compiled: {how}")
    import numpy as np

    from numaload.samples import random_blocks

    blocks = random_blocks(qtype, 1, SAMPLE, np.random.default_rng(0)).reshape(-1)
    floats, least = np.zeros(SAMPLE, np.float32), float("inf")
    for _ in range(ROUNDS):
        begin = time.thread_time()
        kernel(blocks, floats, False)
        least = min(least, time.thread_time() - begin)
    return least / SAMPLE


def _weights(system: System) -> Counter[QuantType]:
    """Count the model's weights by quantized type."""
    found: Counter[QuantType] = Counter()
    for tensor in (system.weights or {}).values():
        qtype = tensor.qtype
        if qtype in registry.KERNELS and qtype not in FLOATS:
            block_size, type_size = BLOCKS[qtype]
            found[qtype] += tensor.nbytes // type_size * block_size
    return found


def _bits(qtype: QuantType) -> float:
    block_size, type_size = BLOCKS[qtype]
    return 8 * type_size / block_size


def _count(system: System) -> int:
    return len(system.cpus) or os.cpu_count() or 1


def _ids(system: System, path: str) -> frozenset[int]:
    try:
        return frozenset(parse_list(system.text(path)))
    except ValueError as error:
        raise Unknown(f"{path}: {error}") from error


def _write(value: str, cpus: Iterable[int], leaf: str) -> str:
    """Return the command that writes to a file of each of these CPUs."""
    ranges = format_list(cpus).split(",")
    which = " ".join(f"$(seq {one.replace('-', ' ')})" if "-" in one else one for one in ranges)
    return f"for cpu in {which}; do echo {value} > {CPUS}/cpu$cpu/{leaf}; done"
