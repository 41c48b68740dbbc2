"""What the doctor looks at: a machine, the files of a model, and a process.

Every root can be replaced by a tree that was recorded or constructed, and every property by
assigning to it: that is how checks are tested.
"""

from __future__ import annotations

import os
import shlex
import time
import warnings
from bisect import bisect_right
from collections import Counter
from contextlib import suppress
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

from numaload.doctor.check import Unknown
from numaload.doctor.findings import ThreadReport, inspect_threads
from numaload.doctor.interconnect import observe
from numaload.doctor.opinion import second_opinion
from numaload.doctor.speeds import Budget, Speeds, measure_speeds
from numaload.errors import NumaError, NumaloadError, SplitError, check_limits, reason
from numaload.files.network import limit_now
from numaload.files.residency import (
    Residency,
    between,
    cached_on,
    give_back,
    merged,
    overlaps,
    present,
    read_around,
    residency,
)
from numaload.files.source import SourceFile, absolute, io_timeout, model_paths
from numaload.formats.shards import is_layout
from numaload.linux.mounts import Mount, mount_of, unescaped
from numaload.linux.placement import Area, parse_numa_maps
from numaload.linux.syscalls import PAGE, binding
from numaload.linux.sysfs import MOST, number_in
from numaload.machine import userdir
from numaload.machine.devices import Device, FileDevice, Gpu, device_of, disk_of, gpus
from numaload.machine.memory import fields
from numaload.machine.probe import why_not_bound
from numaload.machine.threads import environment
from numaload.machine.topology import Topology, topology
from numaload.pagecache.residency_report import spread
from numaload.replicas import store
from numaload.replicas.entry import Entry
from numaload.weights import Weights
from numaload.weights.opening import open_weights

QUICK, DEEP = Budget(0.9, 240 << 20), Budget(6.0, 4 << 30)
PLACES, PLACE = 512, 64 << 10  # of a model whose nodes are asked for, and bytes of each
RECORDED = "this is a recorded machine: only the one that runs numaload can be asked"
WAIT_S = 15.0  # for an answer of a network, where nothing else is said
LOOK_S = 0.1  # between two looks at what disks did
SECTOR = 512  # bytes, of /proc/diskstats


class DiskUse(NamedTuple):
    """What others have disks do. ``busy``: share of the time in which one had something to do."""

    rate: float  # bytes a second
    busy: float


class SwapArea(NamedTuple):
    """A device or file of swap space in which something is."""

    name: str
    used: int  # bytes
    priority: str

    @property
    def is_ram(self) -> bool:
        """Return whether it is RAM, compressed."""
        return self.name.startswith("/dev/zram")

    @property
    def swapon(self) -> str:
        """Return the command that turns it on as it was."""
        # A negative priority is the kernel's own choice, which cannot be given.
        given = f"-p {self.priority} " if self.priority.isdigit() else ""
        return f"swapon {given}{shlex.quote(self.name)}"


class System:
    """path: any file of the model, or None. pid: of the process, or None.

    Properties raise Unknown where the kernel does not say. Close it.
    """

    def __init__(
        self,
        path: str | None = None,
        *,
        pid: int | None = None,
        root: str = "/",
        deep: bool = False,
    ) -> None:
        self.path = None if path is None else absolute(path)
        self.pid, self.deep = pid, deep
        self.root = root.rstrip("/")
        self.sys, self.proc = f"{self.root}/sys", f"{self.root}/proc"

    # What is read of the tree.

    def text(self, path: str) -> str:
        """Return a file's text, stripped; path: from the root. Raises: Unknown."""
        try:
            with open(self.root + path, encoding="utf-8", errors="replace") as file:
                return file.read(MOST).strip("\0 \t\n")
        except OSError as error:
            check_limits(error, path)
            raise Unknown(f"{path}: {reason(error)}") from error

    def number(self, path: str) -> int:
        """Return the number in a file. Raises: Unknown, also for a word such as max."""
        text = self.text(path)
        found = number_in(text)
        if found is None:
            raise Unknown(f"{path}: {text[:40]!r} is no number")
        return found

    def exists(self, path: str) -> bool:
        """Return whether it is there. Raises: Unknown where that is not shown."""
        try:
            os.stat(self.root + path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            check_limits(error, path)
            raise Unknown(f"{path}: {reason(error)}") from error
        return True

    def fields(self, path: str) -> dict[str, int]:
        """Return the ``Name: 12 kB`` lines of a file, in bytes. Raises: Unknown where none is."""
        found = fields(self.root + path)
        if not found:
            raise Unknown(f"{path}: cannot be read")
        return found

    # The file.

    @cached_property
    def files(self) -> list[SourceFile]:
        """Open the files of the model. Raises: ReadError."""
        if self.path is None:
            return []
        with io_timeout(limit_now() or WAIT_S):
            return self._open(self.path)

    @staticmethod
    def _open(path: str) -> list[SourceFile]:
        try:
            paths = model_paths(path)
        except NumaloadError:  # named as one of several, of which some are missing
            if os.path.isdir(path):
                raise
            paths = [path]
        named = {os.path.basename(each): each for each in paths}
        if not is_layout(path):  # else its files are meant
            named[os.path.basename(path)] = path
        opened: list[SourceFile] = []
        for each in named.values():
            try:
                opened.append(SourceFile(each))
            except NumaloadError:  # noqa: PERF203 - a check says what is missing
                if each == path or len(named) == 1:
                    raise
        return opened

    @property
    def damage(self) -> str:
        """Say why the file is no model that can be used, or return an empty string."""
        error = self._opened[1]
        return "" if error is None else str(error)

    @property
    def damaged(self) -> str:
        """Return the path of the file that ``damage`` is about, where it is known."""
        error = self._opened[1]
        if isinstance(error, SplitError) and error.missing:
            return error.missing[0]
        return getattr(error, "path", None) or ""

    @cached_property
    def weights(self) -> Weights | None:
        """Return the model's tensors; None where there is no file, or it is damaged."""
        return self._opened[0]

    @cached_property
    def _opened(self) -> tuple[Weights | None, NumaloadError | None]:
        if self.path is None:
            return None, None
        with suppress(NumaloadError):
            _ = self.residency  # before the header is read
        try:
            return open_weights(self.path, io_timeout=limit_now() or WAIT_S), None
        except NumaloadError as error:
            return None, error

    @cached_property
    def size(self) -> int:
        """Return the bytes of all files of the model; 0 without one."""
        return sum(file.size for file in self.files)

    @cached_property
    def residency(self) -> list[Residency]:
        return [residency(file) for file in self.files]

    @cached_property
    def absent(self) -> int:
        """Return how many bytes of the model are not in RAM. Raises: Unknown."""
        if not all(found.known for found in self.residency):
            raise Unknown("what of the file is in RAM: the kernel tells its owner only")
        return sum(found.size - found.resident for found in self.residency)

    @cached_property
    def cache_nodes(self) -> dict[int, int]:
        """Return {node: bytes} of what of the model is in RAM, by a sample. Raises: Unknown."""
        on: Counter[int] = Counter()
        for file, found in zip(self.files, self.residency, strict=True):
            if not found.known:
                raise Unknown("what of the file is in RAM: the kernel tells its owner only")
            counts = cached_on(file, _sampled(found, max(8, PLACES // len(self.files))))
            total = sum(counts.values())
            on.update({node: found.resident * n // total for node, n in counts.items()})
        return dict(sorted(on.items()))

    @cached_property
    def stored(self) -> list[Entry]:
        """Return what is in the store. It is only read: nothing is swept or moved.

        Raises: StoreError where it cannot be read.
        """
        if not os.path.exists(f"{userdir.path()}/{userdir.MARKER}"):
            return []
        with userdir.existing() as folder:  # of a folder with that file it changes nothing
            found = [store.read(name, folder) for name in store.entry_names(folder)]
        return [one for one in found if isinstance(one, Entry) and store.reachable(one)]

    @cached_property
    def replicas(self) -> list[Entry]:
        """Return what the store has of these files, as they are or were. Raises: StoreError."""
        paths = {file.path for file in self.files}
        return [entry for entry in self.stored if not paths.isdisjoint(entry.model.paths)]

    @cached_property
    def device(self) -> Device:
        """Return what the file lies on. Raises: ReadError."""
        largest = self._largest
        return device_of(
            largest.path,
            network=largest.is_network,
            sys_root=self.sys,
            proc_root=self.proc,
            numbers=largest.device,
        )

    @cached_property
    def disks(self) -> FileDevice:
        """Return the disks under the file, and their nodes. Raises: ReadError."""
        largest = self._largest
        return disk_of(largest.path, self.sys, self.proc, numbers=largest.device)

    @cached_property
    def mount(self) -> Mount | None:
        """Return the mount that the file is on; None where the table does not say."""
        largest = self._largest
        major, minor = largest.device
        return mount_of(largest.path, self.proc, f"{major}:{minor}")

    @property
    def _largest(self) -> SourceFile:
        if not self.files:
            raise Unknown("no FILE was given")
        return max(self.files, key=lambda file: file.size)

    @cached_property
    def speeds(self) -> Speeds:
        """Measure how fast the file is read, within a second, and leave no trace in RAM."""
        if not self.files:
            return Speeds()
        with suppress(Unknown, NumaloadError):
            _ = self.disk_use  # before the doctor has the disks do something
        return measure_speeds(self.files, self.residency, self.device, DEEP if self.deep else QUICK)

    @property
    def load_seconds(self) -> float | None:
        """Return how long a program that maps the file takes to have it; None: not known."""
        return self._seconds(self.speeds.mapped)

    @property
    def best_seconds(self) -> float | None:
        """Return how long it takes at what the disk gives; None: not known."""
        return self._seconds(self.speeds.disk)

    def _seconds(self, rate: float | None) -> float | None:
        """Return how long what is absent takes at this rate: what is in RAM is only mapped."""
        try:
            absent = self.absent
        except Unknown:
            return None
        if not absent:
            return 0.0 if self.size else None
        return absent / rate if rate else None

    @cached_property
    def disk_use(self) -> DiskUse:
        """Watch the file's disks for a tenth of a second, in which the doctor reads nothing.

        Raises: Unknown.
        """
        if not self.disks.disks:
            raise Unknown(self.disks.why)
        before, begin = self._disk_counts(), time.perf_counter()
        time.sleep(LOOK_S)
        after, seconds = self._disk_counts(), time.perf_counter() - begin
        moved = sum(after[name][0] - before[name][0] for name in before) * SECTOR
        worked = max(after[name][1] - before[name][1] for name in before) / 1e3
        return DiskUse(max(0.0, moved / seconds), min(1.0, max(0.0, worked / seconds)))

    def _disk_counts(self) -> dict[str, tuple[int, int]]:
        """Return {disk: (sectors read and written, ms at work)} of the disks under the file.

        Documentation/admin-guide/iostats.rst: the 3rd, 7th and 10th field. Raises: Unknown.
        """
        rows = (row.split() for row in self.text("/proc/diskstats").splitlines())
        named = {row[2]: row[3:] for row in rows if len(row) >= 13}
        try:
            return {
                name: (int(named[name][2]) + int(named[name][6]), int(named[name][9]))
                for name in self.disks.disks
            }
        except (KeyError, ValueError) as error:
            raise Unknown(f"/proc/diskstats does not tell of {error}") from error

    # The machine.

    @cached_property
    def machine(self) -> Topology:
        return topology(self.sys, self.proc)

    @property
    def cpus(self) -> frozenset[int]:
        """Return the CPUs that the process, or else this one, may run on; none: not known.

        Raises: NumaError.
        """
        return self.machine.cpus if self.pid is None else self.threads.cpus

    @cached_property
    def gpus(self) -> list[Gpu]:
        return gpus(self.sys, self.proc)

    @cached_property
    def nvml(self) -> Any:
        """Return nvidia-ml-py, started; None without it or its driver, and on another tree."""
        if self.root:
            return None
        try:
            with warnings.catch_warnings():  # an older package of this name calls itself deprecated
                warnings.simplefilter("ignore")
                import pynvml
            pynvml.nvmlInit()
        except Exception:  # noqa: BLE001 - no package, or NVMLError of whichever version
            return None
        return pynvml

    @cached_property
    def meminfo(self) -> dict[str, int]:
        """Return /proc/meminfo in bytes. Raises: Unknown."""
        return self.fields("/proc/meminfo")

    @cached_property
    def swaps(self) -> list[SwapArea]:
        """Return the swap areas that are in use. Raises: Unknown."""
        header, *rows = self.text("/proc/swaps").splitlines() or [""]
        if not header.startswith("Filename"):
            raise Unknown("/proc/swaps: is not a table of swap space")
        return [
            SwapArea(unescaped(words[0]), used << 10, words[4])
            for words in map(str.split, rows)
            if len(words) == 5 and (used := number_in(words[3]))
        ]

    @cached_property
    def binding(self) -> str:
        """Return by what memory is bound here: libnuma.so.1, or system calls."""
        return binding().name

    @cached_property
    def refused(self) -> str:
        """Say why memory cannot be bound to nodes here; "" where it can. Raises: NumaError."""
        if self.root:
            raise Unknown(RECORDED)
        error = why_not_bound(self.machine.all)
        return "" if error is None else str(error)

    @cached_property
    def opinion(self) -> str:
        """Return what libnuma says of the nodes, in a sentence."""
        if self.root:
            raise Unknown(RECORDED)
        return second_opinion(self.machine)

    @cached_property
    def processor(self) -> str:
        """Return the processor's name as /proc/cpuinfo has it; empty where that is hidden."""
        try:
            rows = self.text("/proc/cpuinfo").splitlines()
        except Unknown:
            return ""
        names = (row.partition(":")[2].strip() for row in rows if row.startswith("model name"))
        return next(names, "")

    @cached_property
    def threads(self) -> ThreadReport:
        """Watch the process for a tenth of a second. Raises: NumaError, UsageError."""
        return inspect_threads(self.pid)

    @cached_property
    def areas(self) -> list[Area]:
        """Return what the process has mapped, and on which nodes that is. Raises: Unknown.

        The kernel walks its page tables: 13 ms for each GiB in pages of 4 KiB.
        """
        path = f"{self.proc}/{self.pid}/numa_maps"
        try:
            with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
                found = parse_numa_maps(file)
        except OSError as error:
            check_limits(error, path)
            raise Unknown(f"{path}: {reason(error)}") from error
        except ValueError as error:
            raise Unknown(f"{path}: cannot be understood: {error}") from error
        if not found:  # every process has some
            raise Unknown(f"{path}: empty")
        return found

    @cached_property
    def interconnect(self) -> str:
        """Return what perf counts between nodes and of the process; it takes 0.5 s."""
        return RECORDED if self.root else observe(self)

    @cached_property
    def uid(self) -> int:
        return os.geteuid()

    @cached_property
    def environment(self) -> dict[str, str]:
        """Return the variables of the process, or else of this one. Raises: Unknown."""
        if self.pid is None:
            return dict(os.environ)
        try:
            found = environment(self.pid)
        except NumaError as error:
            raise Unknown(str(error)) from error
        if found is None:
            raise Unknown(f"the variables of process {self.pid} are not shown")
        return found

    @cached_property
    def cmdline(self) -> list[str]:
        """Return the words that the process was started by; none without one. Raises: Unknown."""
        if self.pid is None:
            return []
        return self.text(f"/proc/{self.pid}/cmdline").split("\0")

    def close(self) -> None:
        """Close the files, and give back the headers that were read."""
        if self.__dict__.get("nvml") is not None:
            self.nvml.nvmlShutdown()
        opened: Weights | None = self.__dict__.get("_opened", (None, None))[0]
        if "residency" in self.__dict__:
            heads = [part.header.data_start for part in opened.parts] if opened else []
            device = self.__dict__.get("device", Device("unknown", "", ""))
            for file, found in zip(self.files, self.residency, strict=True):
                # Nobody knows how much was read of a damaged file's header, or before Ctrl-C.
                stop = max(heads) + read_around(device) if heads else file.size
                if found.known:
                    give_back(file, overlaps(found.absent, 0, stop))
        for one in (*self.__dict__.get("files", ()), opened):
            if one is not None:
                one.close()


def _sampled(found: Residency, places: int) -> Residency:
    """Return so many places of what is in RAM as if they were all; they are chosen by chance."""
    if found.resident <= places * PLACE:
        return found
    ranges = list(present(found))
    starts = list(accumulate((stop - start for start, stop in ranges), initial=0))
    chosen = []
    for at in spread(0, found.resident, places):
        i = bisect_right(starts, at) - 1
        start = ranges[i][0] + (at - starts[i]) // PAGE * PAGE
        chosen.append((start, min(start + PLACE, ranges[i][1])))
    return Residency(found.size, tuple(between(merged(chosen), 0, found.size)))
