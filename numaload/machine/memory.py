"""How much memory is left: per node, for this process's cgroups, for the machine.

What the kernel does not show is unknown, which is not "none": it refuses nothing.
"""

from __future__ import annotations

import os
import resource
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import NamedTuple

from numaload.errors import NodeMemoryError, NotCopyable, check_limits
from numaload.linux.cgroups import folders
from numaload.linux.sysfs import SysFiles
from numaload.machine.stopping import renewed

# Never planned for: what the kernel, other programs and page tables need to go on.
RESERVE_SHARE, RESERVE_MIN, RESERVE_MAX = 50, 64 << 20, 1 << 30
UNKNOWN = 1 << 62  # bytes free where the kernel does not say
NO_LIMIT = 1 << 60  # bytes: version 1 of cgroups writes a number of pages for "unlimited"
LEAST_FREE = 16 << 20  # bytes that ``require`` leaves: threads, page tables, others
TRUSTED = 256 << 20  # bytes that may be allocated, at most, between two looks at limits
# Limits may have changed after TRUSTED_S seconds: results of SMALL bytes and more look anew.
SMALL, TRUSTED_S = 1 << 20, 0.05
# Seconds to wait, at most, for what other threads fill, and between two looks meanwhile.
WAIT_S, PAUSE_S = 10.0, 0.005


class Limit(NamedTuple):
    """``free`` bytes may still be used; ``name`` says by whose leave."""

    name: str
    free: int


def fields(path: str) -> dict[str, int]:
    """Parse lines ``[Node 0] Name: 12 kB`` or ``name 12`` to bytes; no file: an empty dict."""
    found: dict[str, int] = {}
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        check_limits(error, path)
        return {}
    for line in lines:
        words = line.split()
        if words and words[0] == "Node":
            words = words[2:]
        if len(words) >= 2 and words[1].isdigit() and len(words[1]) < 20:
            scale = 1024 if words[2:] == ["kB"] else 1
            found[words[0].rstrip(":")] = int(words[1]) * scale
    return found


def reserve(total: int) -> int:
    return min(RESERVE_MAX, max(RESERVE_MIN, total // RESERVE_SHARE))


def node_free(node: int, sys_root: str = "/sys", proc_root: str = "/proc") -> int | None:
    """Return the bytes that strictly bound memory can take on this node without an OOM kill.

    Free pages and clean page cache, less a reserve. None where the kernel does not say; an absent
    node has none.
    """
    base = f"{sys_root}/devices/system/node"
    there = bool(SysFiles().names(base))
    # Only a kernel without NUMA has all memory on one node.
    path = f"{base}/node{node}/meminfo" if there else f"{proc_root}/meminfo"
    info = fields(path)
    if "MemFree" not in info:
        return 0 if there and not os.path.isdir(f"{base}/node{node}") else None
    return max(0, _estimated(info) - reserve(info.get("MemTotal", 0)))


def _estimated(info: dict[str, int]) -> int:
    """Estimate a node's room. FilePages would be wrong: shared memory cannot be given back."""
    cache = info.get("Active(file)", 0) + info.get("Inactive(file)", 0)
    clean = max(0, cache - info.get("Dirty", 0) - info.get("Writeback", 0))
    slab = info.get("SReclaimable", 0) // 2  # part of it stays in use
    return info["MemFree"] + clean + slab


def node_unused(node: int, sys_root: str = "/sys") -> int | None:
    """Return the free pages of a node in bytes, less a reserve: room for unbound memory.

    Where only page cache could make room, the kernel takes another node's free pages instead.
    None where the kernel does not say.
    """
    info = fields(f"{sys_root}/devices/system/node/node{node}/meminfo")
    if "MemFree" not in info:
        return None
    return max(0, info["MemFree"] - reserve(info.get("MemTotal", 0)))


def machine_available(proc_root: str = "/proc") -> Limit | None:
    """Return what the kernel thinks fits without swapping; None where it does not say."""
    info = fields(f"{proc_root}/meminfo")
    if "MemAvailable" in info:
        return Limit("this machine (MemAvailable)", info["MemAvailable"])
    if "MemFree" in info:  # Linux before 3.14
        return Limit("this machine (MemFree and page cache)", _estimated(info))
    return None


def cgroup_limits(
    sys_root: str = "/sys", proc_root: str = "/proc", process: str = "self"
) -> Iterator[Limit]:
    """Yield the room under every memory limit above a process; page cache counts as room.

    process: its id, as a folder of ``proc_root``.
    """
    for folder, version in folders("memory", sys_root, proc_root, process):
        limits = _limits_1(folder) if version == 1 else _limits_2(folder)
        limits = {name: limit for name, limit in limits.items() if limit < NO_LIMIT}
        # What is used is asked only where that is limited: the kernel counts it then.
        current = "memory.usage_in_bytes" if version == 1 else "memory.current"
        used = _number(f"{folder}/{current}") if limits else None
        if used is None:
            continue
        stat = fields(f"{folder}/memory.stat")
        prefix = "total_" if "total_inactive_file" in stat else ""  # version 1: with descendants
        cache = sum(stat.get(prefix + key, 0) for key in ("inactive_file", "active_file"))
        for name, limit in limits.items():
            yield Limit(f"cgroup {folder} ({name})", max(0, limit - used + cache))


def _limits_1(folder: str) -> dict[str, int]:
    """Return {file: its limit}: of this group, or the smaller one of any above, hidden or not."""
    least = fields(f"{folder}/memory.stat").get("hierarchical_memory_limit")
    own = _number(f"{folder}/memory.limit_in_bytes") if (least or 0) < NO_LIMIT else None
    if least is not None and (own is None or least < own):
        return {"memory.stat: hierarchical_memory_limit": least}
    return {} if own is None else {"memory.limit_in_bytes": own}


def _limits_2(folder: str) -> dict[str, int]:
    """Return {file: its limit}. memory.high kills nobody but lets a process crawl."""
    numbers = {name: _number(f"{folder}/{name}") for name in ("memory.max", "memory.high")}
    return {name: number for name, number in numbers.items() if number is not None}


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None  # "max", or no such limit


def known_limits(sys_root: str = "/sys", proc_root: str = "/proc") -> list[Limit]:
    """Return the machine's and the cgroups' limits, as far as the kernel shows them."""
    machine = machine_available(proc_root)
    return [*([machine] if machine else []), *cgroup_limits(sys_root, proc_root)]


def available(sys_root: str = "/sys", proc_root: str = "/proc") -> Limit:
    """Return the tightest known limit; UNKNOWN bytes are free where none is shown."""
    return tightest(known_limits(sys_root, proc_root))


def tightest(limits: list[Limit]) -> Limit:
    unknown = Limit("unknown", UNKNOWN)
    return min(limits, key=lambda limit: limit.free, default=unknown)


def _process_limits() -> Iterator[Limit]:
    """Yield the room under ulimit -v and -d, where they are set; statm: proc_pid_statm(5)."""
    for name, which, column in (("v", resource.RLIMIT_AS, 0), ("d", resource.RLIMIT_DATA, 5)):
        soft, _ = resource.getrlimit(which)
        if soft == resource.RLIM_INFINITY:
            continue
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                used = int(file.read().split()[column]) * resource.getpagesize()
        except (OSError, IndexError) as error:  # hidden, or empty
            check_limits(error, "/proc/self/statm")
            continue
        yield Limit(f"this process (ulimit -{name})", max(0, soft - used))


_trusted, _looked = SMALL, 0.0  # bytes that may be allocated without a look, and when it was
_left = 0  # bytes that the last look would have left
_promised: dict[int, tuple[int, int]] = {}  # {number of a promise: (thread, bytes left)}
_ended: deque[tuple[int, int | None]] = deque()  # (number of a promise, bytes touched, None: all)
_numbers = count()
_lock = renewed(threading.RLock())  # of all these; a signal handler may allocate inside
on_shortage: list[Callable[[], bool]] = []  # what ``give_back`` calls; whether there was any
os.register_at_fork(after_in_child=_promised.clear)


class Promise(NotCopyable):
    """Counts bytes as used that were found free and are not touched yet, for looks of all threads.

    The kernel counts what is touched: what is promised meanwhile may be counted twice.
    """

    __slots__ = ("_number",)

    def __init__(self, nbytes: int) -> None:
        number = next(_numbers)
        _promised[number] = (threading.get_ident(), nbytes)
        self._number = number

    def end(self, nbytes: int | None = None) -> None:
        """Take back ``nbytes``, which are touched now; None: all that are left.

        No lock is taken: one who holds it may wait for this thread, as a finalizer does that
        closes a stream.
        """
        _ended.append((self._number, nbytes))

    def __enter__(self) -> Promise:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __del__(self) -> None:
        """Leave nothing behind where Ctrl-C came before it was entered."""
        if hasattr(self, "_number"):
            self.end()


def promised() -> list[tuple[int, int]]:
    """Return (thread, bytes) of the promises that are left."""
    with _lock:
        while _ended:
            number, touched = _ended.popleft()
            thread, left = _promised.pop(number, (0, 0))
            if touched is not None and touched < left:
                _promised[number] = (thread, left - touched)
        return list(_promised.values())


def give_back() -> bool:
    """Give back memory that is only kept to be used again; return whether there was any."""
    return any([one() for one in on_shortage])  # noqa: C419 - all of them


def require(
    nbytes: int, what: str, way_out: str, *, node: int | None = None, least: int = LEAST_FREE
) -> None:
    """Look whether ``nbytes`` fit, as ``promise``, and count them no longer."""
    promise(nbytes, what, way_out, node=node, least=least).end()


def promise(
    nbytes: int, what: str, way_out: str, *, node: int | None = None, least: int = LEAST_FREE
) -> Promise:
    """Look whether ``nbytes`` more of this process's memory fit, before they are allocated.

    The kernel would not refuse them but kill, later, when they are touched. A look takes 0.1 ms,
    so it is good for some bytes more: an eighth of what was free then. Where only what other
    threads fill leaves no room, wait for these.
    node: that they are to be bound to. least: bytes that are to stay free.
    Returns: what counts them until it ends. Raises: NodeMemoryError with numbers and the way out.
    """
    begun, given_back = time.monotonic(), False
    while True:
        with _lock:
            if _is_trusted(nbytes, node):
                return Promise(nbytes)
            shared, *own = _limits(node)
            others, me = promised(), threading.get_ident()
            total, mine = sum(n for _, n in others), sum(n for thread, n in others if thread == me)
            name, free = tightest([shared._replace(free=shared.free - total), *own])
            if nbytes + least <= free:
                _trust(free - nbytes - least)
                return Promise(nbytes)
        if not given_back:
            given_back = True
            if give_back():
                continue
        later = tightest([shared._replace(free=shared.free - mine), *own]).free
        if nbytes + least > later or time.monotonic() > begun + WAIT_S:
            break
        time.sleep(PAUSE_S)
    free = max(0, free)
    raise NodeMemoryError(
        f"{what}: needs {nbytes} bytes ({nbytes / 2**30:.2f} GiB) and {least} more to go on,"
        f" {name} has room for {free} ({free / 2**30:.2f} GiB); {way_out}",
        node=node,
        needed=nbytes,
        free=free,
    )


def _limits(node: int | None) -> list[Limit]:
    """Return the limit of what all nodes have touched, then those that no promise is counted in.

    ulimit counts what is allocated, touched or not; promised bytes may be on any node.
    """
    on_node = None if node is None else node_free(node)
    of_node = [] if on_node is None else [Limit(f"node {node}", on_node)]
    return [available(), *_process_limits(), *of_node]


def _is_trusted(nbytes: int, node: int | None) -> bool:
    """Return whether the last look is good for these bytes too, which it then is no more."""
    global _trusted  # noqa: PLW0603 - there is one process
    lately = nbytes < SMALL or time.monotonic() < _looked + TRUSTED_S
    trusted = node is None and nbytes <= _trusted and lately
    _trusted -= nbytes if trusted else 0
    return trusted


def _trust(left: int) -> None:
    """Let an eighth of what is left be allocated without another look."""
    global _trusted, _looked, _left
    _trusted, _looked, _left = min(TRUSTED, left // 8), time.monotonic(), left


def left() -> int:
    """Return what was left when memory was last looked at, 0 if it never was."""
    return _left
