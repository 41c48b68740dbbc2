"""Memory: whether the model has room in RAM, and what keeps RAM from being filled fast."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from numaload.doctor.check import ESTIMATED, LOAD, MEASURED, ONCE, PASS, Check, Price, Unknown
from numaload.doctor.system import System
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mounts import mount_of
from numaload.linux.sysfs import SysFiles, number_in
from numaload.machine import logout, userdir
from numaload.machine.memory import Limit, cgroup_limits, machine_available, node_free, tightest
from numaload.replicas.entry import Entry
from numaload.replicas.layout import MIXED

GIB = 1 << 30
THP = "/sys/kernel/mm/transparent_hugepage"
# Bytes a second at which memory is filled from the page cache, by 2 threads.
FILL_HUGE, FILL_SMALL = 10.7e9, 2.9e9
FILLED = "measured in docs/findings.md, 2026-11"
COPY_SHARE = 1.5  # of the model: a private copy, and half of the file in the page cache
IDLE_SHARE = 0.1  # of RAM


class Room(NamedTuple):
    """What the model may take of RAM, with what it has of it already."""

    machine: Limit
    group: Limit  # the tightest of the process's cgroups
    idle: int  # bytes of huge pages that are set aside, enough to be a finding, and in no use

    def tightest(self, more: int = 0) -> Limit:
        """Return the tighter limit. more: bytes that the machine would have besides."""
        return tightest([self.machine._replace(free=self.machine.free + more), self.group])


class Lack(NamedTuple):
    nbytes: int  # that are read again; of LOAD: besides what is absent now, which others count
    on: str  # PASS or LOAD


def room(system: System) -> Room:
    """Look at the limits of the process, or else of this one. Raises: Unknown."""
    machine = machine_available(system.proc)
    if machine is None:
        raise Unknown("/proc/meminfo does not say what is available")
    # Page cache is available already, but not where it is locked.
    held = min(system.size - _absent(system), system.meminfo.get("Mlocked", 0))
    held += _own(system)
    process = str(system.pid or "self")
    group = tightest(list(cgroup_limits(system.sys, system.proc, process)))
    idle = 0
    with suppress(Unknown):  # then they are not counted on
        idle = sum(pool.idle for pool in _idle_pools(system))
    return Room(
        machine._replace(free=machine.free + held), group._replace(free=group.free + held), idle
    )


def lacks(system: System, free: int) -> Lack | None:
    """Return what has no room in so many bytes; None where there is room, or a replica."""
    size = system.size
    if free >= COPY_SHARE * size or (free < size and not _absent(system)):
        return None
    if any(entry.policy != MIXED for entry in stored(system)):
        return None
    if size > free:
        return Lack(size - free, PASS)
    return Lack(max(0, 2 * size - free - _absent(system)), LOAD)


def stored(system: System) -> list[Entry]:
    """Return what the store has of the model, or of all where none was given."""
    if system.path is None:
        return system.stored
    return [
        entry
        for entry in system.stored
        if system.path in entry.model.paths and entry.model.size == system.size
    ]


def _absent(system: System) -> int:
    """Return what of the model is not in RAM; all of it where the kernel does not tell."""
    try:
        return system.absent
    except Unknown:
        return system.size


def _own(system: System) -> int:
    """Return the bytes that the process has in RAM and that are in no page cache."""
    if system.pid is None:
        return 0
    status = system.fields(f"/proc/{system.pid}/status")
    return status.get("RssAnon", 0) + status.get("RssShmem", 0)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB"


def _write(value: object, path: str) -> str:
    return f"echo {value} > {shlex.quote(path)}"


def _chosen(system: System, path: str) -> str:
    """Return the word in brackets, of ``always [madvise] never``. Raises: Unknown."""
    text = system.text(path)
    found = re.search(r"\[(\S+)\]", text)
    if found is None:
        raise Unknown(f"{path}: {text[:40]!r} has no word in brackets")
    return found[1]


def _of_meminfo(system: System, name: str) -> int:
    found = system.meminfo.get(name)
    if found is None:
        raise Unknown(f"/proc/meminfo: has no {name}")
    return found


class _Memory(Check):
    why = ""
    new = old = path = ""  # of a setting that mends it, where it is one

    def explain(self) -> str:
        return self.why

    def read(self, nbytes: int, on: str, how: str = MEASURED) -> Price | None:
        """Price the reading of so many bytes from the model's disk; None where there are none."""
        disk = self.system.speeds.disk
        return Price(nbytes / disk, how, on) if disk and nbytes else None

    def fix(self) -> str:
        return _write(self.new, self.path)

    def undo(self) -> str:
        return _write(self.old, self.path) if self.path else ""

    @property
    def file(self) -> str:
        return shlex.quote(self.system.path or "FILE")


class _Lacking(_Memory):
    """A model on a disk that has too little room in RAM.

    ``case``: what is read again, and whether the machine has less room than the model.
    """

    case = (PASS, True)
    lack, limit = Lack(0, PASS), Limit("", 0)
    # At the least: the kernel may also drop weights that had room.
    how = MEASURED

    def available(self) -> bool:
        return bool(self.system.size) and self.system.device.kind != "memory"

    def measure(self) -> str:
        found = room(self.system)
        limit = found.tightest(found.idle)
        lack = lacks(self.system, limit.free)
        whole = found.machine.free + found.idle
        if lack is None or (lack.on, self.system.size > whole) != self.case:
            return ""
        self.lack, self.limit = lack, limit
        said = f"the model has {_gib(self.system.size)}, {limit.name} has room for"
        more = f", the machine for {_gib(whole)}" if limit is found.group else ""
        return f"{said} {_gib(limit.free)}{more}"

    def price(self) -> Price | None:
        # Layers on a GPU are not read again; how many are there is not known.
        how = ESTIMATED if self.system.gpus else self.how
        return self.read(self.lack.nbytes, self.lack.on, how)


class LargerThanRam(_Lacking):
    id, title = "NL201", "The model is larger than the RAM that is available"
    source = "Linux Documentation/filesystems/proc.rst: MemAvailable, 2026-11"
    why = (
        "Weights that do not fit into RAM are dropped and read from the disk again whenever they"
        " are used."
    )

    def fix(self) -> str:
        return (
            f"numaload plan {self.file}  # what fits; then use a smaller quantization, put layers"
            " on a GPU, which need no RAM, or end what else takes memory"
        )


class NoRoomForCopy(_Lacking):
    id, title = "NL202", "RAM has no room for a copy of the model beside its cache"
    source = "assumed: a copy evicts while half of the file is still to be read, 2026-11"
    case = (LOAD, False)
    how = ESTIMATED  # the engine copies the weights; what it evicts is read again
    why = (
        "An engine that copies the weights (llama.cpp --no-mmap, torch) pushes the file out of the"
        " page cache meanwhile: the load after that reads it from the disk again."
    )

    def available(self) -> bool:
        """Leave out a process that has no copy: it maps the file."""
        return super().available() and (
            self.system.pid is None or _own(self.system) > self.system.size // 2
        )

    def fix(self) -> str:
        return "have the engine map the file, as llama.cpp does by default"


class SmallGroup(_Lacking):
    id, title = "NL207", "The container's memory limit is smaller than the model"
    source = "Linux Documentation/admin-guide/cgroup-v2.rst: memory.max and memory.high, 2026-11"
    root = True
    case = (PASS, False)
    why = (
        "A container or service may use only so much memory, page cache included, whatever the"
        " machine has. What is over it is dropped and read from the disk again."
    )

    def measure(self) -> str:
        seen = super().measure()
        self.changes: list[tuple[str, int, int]] = []  # (path, old, new), in their order
        folder, _, name = self.limit.name.removeprefix("cgroup ").rpartition(" (")
        path = f"{folder}/{name.rstrip(')')}"
        old = number_in(SysFiles().text(path) or "") if seen else None
        # The outermost folder's limit is a container's own, which is set from outside.
        base = f"{self.system.sys}/fs/cgroup"
        if old is not None and folder not in (base, f"{base}/memory"):
            new = -(-(old + self.lack.nbytes) // GIB) * GIB
            self.changes = [(path, old, new)]
            # Version 1 refuses a limit above that of memory and swap together.
            both = f"{folder}/memory.memsw.limit_in_bytes"
            most = number_in(SysFiles().text(both) or "")
            if most is not None and most < new:
                self.changes.insert(0, (both, most, most + new - old))
        return seen

    def fix(self) -> str:
        if self.changes:
            return " && ".join(_write(new, path) for path, _, new in self.changes)
        enough = -(-self.system.size // GIB) + 1
        return (
            f"start the container with more: docker run --memory {enough}g, in Kubernetes"
            f" resources.limits.memory: {enough}Gi"
        )

    def undo(self) -> str:
        return " && ".join(_write(old, path) for path, old, _ in reversed(self.changes))


class MirrorsDoNotFit(_Memory):
    id, title = "NL203", "A replica on every node does not fit"
    source = "numaload/machine/memory.py: free pages and clean cache of a node, 2026-11"
    why = (
        "numaload mirror puts a whole copy of the model on each NUMA node, so that no CPU reads"
        " another node's memory. It refuses what does not fit."
    )

    def available(self) -> bool:
        return bool(self.system.size) and len(self.system.machine.all) > 1

    def measure(self) -> str:
        system, found = self.system, stored(self.system)
        if any(len(group) > 1 for entry in found for group in entry.groups):
            return ""  # one that several nodes share was chosen
        there: Counter[int] = Counter()
        for entry in found:
            there.update(entry.on_nodes)
        needed = {node: max(0, system.size - there[node]) for node in system.machine.all}
        free = {node: self._free(node) for node in needed}
        whole, total = room(system).tightest(), sum(needed.values())
        if not found and system.size > whole.free:
            return ""  # not even one fits, which others find
        short = [node for node in needed if needed[node] > free[node]]
        if not short and total <= whole.free:
            return ""
        has = ", ".join(f"node {node} has room for {_gib(free[node])}" for node in short)
        has = has or f"{whole.name} has room for {_gib(whole.free)}, all need {_gib(total)}"
        return f"a replica takes {_gib(system.size)}, {has}"

    def _free(self, node: int) -> int:
        free = node_free(node, self.system.sys, self.system.proc)
        if free is None:
            raise Unknown(f"how much memory of node {node} is free")
        return free

    def fix(self) -> str:
        nodes = self.system.machine.all
        fewer = len(self.system.machine.groups(nodes, "socket")) < len(nodes)
        words = "--per socket" if fewer else "--policy stripe"
        file = self.file
        return f"numaload mirror {file} {words}  # what else fits: numaload plan {file}"

    def undo(self) -> str:
        return f"numaload release {self.file}"


class SwapInUse(_Memory):
    id, title = "NL204", "Weights were swapped out and come back from a disk"
    source = "Linux Documentation/filesystems/proc.rst: VmSwap; proc_vmstat(5): pswpin, 2026-11"
    root = True
    LEAST = 64 << 20  # bytes of a process or of replicas: what is idle may be out
    RATE = 10 << 20  # bytes a second that come back: more than a desktop now and then
    LOOK_S = 0.1
    why = (
        "Private copies and replicas that the kernel moved to swap are read from there when they"
        " are used, page by page."
    )

    def available(self) -> bool:
        self.areas = [area for area in self.system.swaps if not area.is_ram]
        return bool(self.areas)

    def measure(self) -> str:
        system = self.system
        self.used = sum(area.used for area in self.areas)
        # What zswap has in RAM has a place in an area, too.
        held = max(0, self.used - system.meminfo.get("Zswapped", 0))
        lost = {"replicas in the store": self._replicas()}
        if system.pid is not None:
            status = system.fields(f"/proc/{system.pid}/status")
            lost[f"process {system.pid}"] = status.get("VmSwap", 0)
        much = {what: n for what, n in lost.items() if min(n, held) >= self.LEAST}
        seen = [f"{_gib(n)} of {what} are in swap" for what, n in much.items()]
        self.lost, came = min(held, max(lost.values())), self._came_back()
        self.goes_on = came >= self.RATE * self.LOOK_S
        if self.goes_on:
            seen.append(f"{came / 2**20:.1f} MiB came back from swap in {self.LOOK_S:g} s")
            self.lost = max(self.lost, min(held, system.size))
        return "; ".join([*seen, f"disks hold {_gib(held)} of swap"]) if seen else ""

    def _came_back(self) -> int:
        """Return the bytes that come back from disks meanwhile; 0 where zram may have them."""
        if self.areas != self.system.swaps:
            return 0
        before = self._read_in()
        time.sleep(self.LOOK_S)
        return self._read_in() - before

    def _read_in(self) -> int:
        found = self.system.fields("/proc/vmstat").get("pswpin")
        if found is None:
            raise Unknown("/proc/vmstat: has no pswpin")
        return found * syscalls.PAGE

    def _replicas(self) -> int:
        """Return what of the model's replicas is not in RAM: a tmpfs has no other place."""
        swapped = 0
        entries = stored(self.system)
        paths = [p for entry in entries for group in entry.groups for p in entry.paths(group)]
        for path in paths:
            with SourceFile(path) as file:
                found = residency(file)
                swapped += found.size - found.resident if found.known else 0
        return swapped

    def price(self) -> Price | None:
        system = self.system
        if not system.size:
            return None
        # The swap space is as fast as the model's disk, and every page of it is used in a pass.
        # Where there is room it comes back once; else other weights go for it.
        fits = self.lost + _own(system) < room(system).tightest().free
        return self.read(self.lost, ONCE if fits and not self.goes_on else PASS, ESTIMATED)

    def fix(self) -> str:
        names = " ".join(shlex.quote(area.name) for area in self.areas)
        if self.used < self.system.meminfo.get("MemAvailable", 0):
            return f"swapoff {names}"
        return f"end what else takes memory, until what is in swap fits; then: swapoff {names}"

    def undo(self) -> str:
        return " && ".join(area.swapon for area in self.areas)


class SmallTmpfs(_Memory):
    id, title = "NL206", "Shared memory is too small for a replica"
    source = "Linux Documentation/filesystems/tmpfs.rst: size, 2026-11"
    why = (
        "numaload mirror keeps replicas as files in shared memory, whose size is limited apart from"
        " RAM. Loads from the page cache need none of it."
    )
    # No price: the page cache may serve loads as well as a replica does.

    def available(self) -> bool:
        return bool(self.system.size)

    def measure(self) -> str:
        system, where = self.system, userdir.path()
        while not os.path.isdir(where) and where != "/":
            where = os.path.dirname(where)
        mount = mount_of(where, system.proc)
        if mount is None:
            raise Unknown(f"what {where} is on: the table of mounts is hidden")
        if mount.kind != "tmpfs" or stored(system):
            return ""
        given = re.search(r"(?:^|,)size=(\d{1,18})k", mount.options)
        # The kernel does not show the default, which is half of RAM.
        total = int(given[1]) << 10 if given else _of_meminfo(system, "MemTotal") // 2
        if not 0 < total < system.size <= room(system).tightest().free:
            return ""  # 0: without a limit
        self.remount = f"mount -o remount,size={total >> 10}k {shlex.quote(mount.point)}"
        note = logout.tmpfs_limit_note(where, system.size, system.root)
        seen, _, self.ways = note.partition(": ")
        self.root = "remount" in self.ways
        return f"a replica has {_gib(system.size)}; {seen}"

    def fix(self) -> str:
        # The note is for a user's shell; root is asked for by whoever shows the finding.
        return (
            self.ways.removeprefix("sudo ").replace("; or", "  # or", 1) if self.root else self.ways
        )

    def undo(self) -> str:
        return self.remount if self.root else ""


class EmptiedAtLogout(_Memory):
    id, title = "NL208", "Replicas are removed when you log out"
    source = "systemd logind.conf(5): RemoveIPC, 2026-11"
    why = (
        "systemd-logind removes a user's files in shared memory when the last session ends. The"
        " replicas must be built again after the next login."
    )

    def available(self) -> bool:
        self.entries = [entry for entry in stored(self.system) if entry.holder is None]
        return bool(self.entries)

    def measure(self) -> str:
        return logout.emptied_note(userdir.path(), self.system.root).partition(": ")[0]

    def price(self) -> Price | None:
        # Building them again takes as long as it took.
        return Price(sum(entry.seconds for entry in self.entries), ESTIMATED, LOAD)

    def fix(self) -> str:
        return "loginctl enable-linger"

    def undo(self) -> str:
        return "loginctl disable-linger"


class NoHugePages(_Memory):
    id, title = "NL209", "Huge pages are off for private memory"
    source = f"Linux Documentation/admin-guide/mm/transhuge.rst, 2026-11; price {FILLED}"
    root = True
    new, old = "madvise", "never"
    why = (
        "Memory is then made of pages of 4 KiB. Copies of the weights are filled three to six"
        " times slower, and each use of them misses address caches more often."
    )

    def available(self) -> bool:
        return self.system.exists(f"{THP}/enabled")

    def measure(self) -> str:
        self.path, sized = f"{THP}/enabled", f"{THP}/hugepages-{syscalls.HUGE >> 10}kB/enabled"
        word = _chosen(self.system, self.path)
        if self.system.exists(sized) and (own := _chosen(self.system, sized)) != "inherit":
            self.path, word = sized, own  # since Linux 6.8
        return f"{self.path} is set to never" if word == "never" else ""

    def price(self) -> Price | None:
        return _filling(self.system)


def _filling(system: System) -> Price | None:
    """Price small pages: the whole model is copied from the page cache once, by 2 threads."""
    size = system.size
    return Price(size / FILL_SMALL - size / FILL_HUGE, ESTIMATED, LOAD) if size else None


class NoSharedHugePages(_Memory):
    id, title = "NL210", "Huge pages are denied to replicas"
    source = f"Linux Documentation/admin-guide/mm/transhuge.rst, 2026-11; price {FILLED}"
    root = True
    new, old, path = "never", "deny", f"{THP}/shmem_enabled"
    why = (
        "numaload collapses shared memory into huge pages, which works whatever this is set to but"
        " deny. Of small pages, replicas are filled about three times slower."
    )

    def available(self) -> bool:
        """Look where replicas are made: on several nodes, or where some are."""
        several = len(self.system.machine.all) > 1
        return self.system.exists(self.path) and (several or bool(stored(self.system)))

    def measure(self) -> str:
        denied = _chosen(self.system, self.path) == "deny"
        return f"{self.path} is set to deny" if denied else ""

    def price(self) -> Price | None:
        return _filling(self.system)


class Pool(NamedTuple):
    """Huge pages of one size that are set aside."""

    path: str
    pages: int
    unused: int  # of them
    size: int  # bytes of a page

    @property
    def idle(self) -> int:
        return self.unused * self.size


def _idle_pools(system: System) -> list[Pool]:
    """Return what is in no use, if that is enough to be a finding. Raises: Unknown."""
    base, found = "/sys/kernel/mm/hugepages", []
    for name in SysFiles().names(system.root + base):
        size = re.fullmatch(r"hugepages-(\d{1,9})kB", name)
        if size is not None:
            path = f"{base}/{name}"
            count, free, promised = (
                system.number(f"{path}/{which}_hugepages") for which in ("nr", "free", "resv")
            )
            unused = min(count, max(0, free - promised))
            found.append(Pool(f"{path}/nr_hugepages", count, unused, int(size[1]) << 10))
    total = _of_meminfo(system, "MemTotal")
    is_much = sum(pool.idle for pool in found) > IDLE_SHARE * total
    return [pool for pool in found if pool.idle] if is_much else []


class IdleHugePages(_Memory):
    id, title = "NL211", "Huge pages are set aside that nobody uses"
    source = "Linux Documentation/admin-guide/mm/hugetlbpage.rst, 2026-11; 10 % is our choice"
    root = True
    lack = Lack(0, PASS)
    why = (
        "Pages that were set aside (vm.nr_hugepages) are lost to everything that does not ask for"
        " them by name: page cache, replicas and most engines."
    )

    def measure(self) -> str:
        self.pools = _idle_pools(self.system)
        idle = sum(pool.idle for pool in self.pools)
        if not idle:
            return ""
        if self.system.size:
            found = room(self.system)
            now, then = found.tightest().free, found.tightest(idle).free
            lack = lacks(self.system, now)
            if lack is None or now == then:
                return ""  # the model has room all the same, or something else limits it
            self.lack = lack._replace(nbytes=min(lack.nbytes, then - now))
        total = _of_meminfo(self.system, "MemTotal")
        return f"{_gib(idle)} of {_gib(total)} are set aside as huge pages, and unused"

    def price(self) -> Price | None:
        if not self.system.size:
            return None
        # In the second case the engine copies the weights.
        how = MEASURED if self.lack.on == PASS and not self.system.gpus else ESTIMATED
        return self.read(self.lack.nbytes, self.lack.on, how)

    def fix(self) -> str:
        return " && ".join(_write(pool.pages - pool.unused, pool.path) for pool in self.pools)

    def undo(self) -> str:
        return " && ".join(_write(pool.pages, pool.path) for pool in self.pools)


class Demotion(_Memory):
    id, title = "NL213", "The kernel may move weights to a node without CPUs"
    source = "Linux Documentation/ABI/testing/sysfs-kernel-mm-numa, 2026-11"
    root = True
    new, path = "false", "/sys/kernel/mm/numa/demotion_enabled"
    why = (
        "When a node runs short, its pages go to slower memory, such as CXL; shared memory may"
        " leave the node that it is bound to. Every use is slower then."
    )
    # No price: how many pages go depends on what else runs.

    def available(self) -> bool:
        nodes = self.system.machine.nodes.values()
        self.far = [node.id for node in nodes if node.has_memory and not node.cpus]
        return bool(self.far) and self.system.exists(self.path)

    def measure(self) -> str:
        self.old = self.system.text(self.path)
        if self.old not in ("true", "false", "1", "0"):
            raise Unknown(f"{self.path}: {self.old[:40]!r} is neither true nor false")
        if self.old in ("false", "0"):
            return ""
        far = ", ".join(map(str, self.far))
        return f"{self.path} is {self.old}; nodes with memory and without CPUs: {far}"


class StrictOvercommit(_Memory):
    id, title = "NL217", "The kernel will refuse a private copy of the model"
    source = "Linux Documentation/mm/overcommit-accounting.rst: mode 2, 2026-11"
    root = True
    new, old, path = "0", "2", "/proc/sys/vm/overcommit_memory"
    why = (
        "With strict accounting (vm.overcommit_memory=2) what all programs may allocate together"
        " is limited, used or not. A copy over that limit fails."
    )
    # No price: it fails.

    def available(self) -> bool:
        return bool(self.system.size)

    def measure(self) -> str:
        if self.system.number(self.path) != 2:
            return ""
        limit = _of_meminfo(self.system, "CommitLimit")
        left = max(0, limit - _of_meminfo(self.system, "Committed_AS"))
        if left >= self.system.size:
            return ""
        said = f"{_gib(left)} of {_gib(limit)} may still be allocated"
        return f"{said}, the model has {_gib(self.system.size)}"


CHECKS: tuple[type[Check], ...] = (
    LargerThanRam,
    NoRoomForCopy,
    MirrorsDoNotFit,
    SwapInUse,
    SmallTmpfs,
    SmallGroup,
    EmptiedAtLogout,
    NoHugePages,
    NoSharedHugePages,
    IdleHugePages,
    Demotion,
    StrictOvercommit,
)
