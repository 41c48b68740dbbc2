"""How much memory is left: per node, for this process's cgroups, for the machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from numaload.errors import check_limits
from numaload.numa.cgroups import folders

# Never planned for: what the kernel, other programs and page tables need to go on.
RESERVE_SHARE, RESERVE_MIN, RESERVE_MAX = 50, 64 << 20, 1 << 30


class Limit(NamedTuple):
    """``free`` bytes may still be used; ``name`` says by whose leave."""

    name: str
    free: int


def fields(path: str) -> dict[str, int]:
    """Lines ``[Node 0] Name: 12 kB`` or ``name 12`` as bytes; empty where there is no such file."""
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


def node_free(node: int, sys_root: str = "/sys", proc_root: str = "/proc") -> int:
    """Bytes that strictly bound memory can take on this node without an OOM kill.

    Free pages and clean page cache, less a reserve. FilePages would be wrong: it counts shared
    memory, which cannot be given back.
    """
    base = f"{sys_root}/devices/system/node"
    # Only a kernel without NUMA has all memory on one node; an absent node has none.
    path = f"{base}/node{node}/meminfo" if os.path.isdir(base) else f"{proc_root}/meminfo"
    info = fields(path)
    cache = info.get("Active(file)", 0) + info.get("Inactive(file)", 0)
    clean = max(0, cache - info.get("Dirty", 0) - info.get("Writeback", 0))
    slab = info.get("SReclaimable", 0) // 2  # part of it stays in use
    return max(0, info.get("MemFree", 0) + clean + slab - reserve(info.get("MemTotal", 0)))


def node_unused(node: int, sys_root: str = "/sys") -> int:
    """Bytes of free pages of this node, less a reserve: what unbound memory can take there.

    Where only page cache could make room, the kernel takes another node's free pages instead.
    """
    info = fields(f"{sys_root}/devices/system/node/node{node}/meminfo")
    return max(0, info.get("MemFree", 0) - reserve(info.get("MemTotal", 0)))


def machine_available(proc_root: str = "/proc") -> Limit:
    """What the kernel thinks can be used without swapping (MemAvailable)."""
    free = fields(f"{proc_root}/meminfo").get("MemAvailable", 0)
    return Limit("this machine (MemAvailable)", free)


def cgroup_limits(sys_root: str = "/sys", proc_root: str = "/proc") -> Iterator[Limit]:
    """Room under every memory limit above this process; page cache counts as room."""
    for folder, maximum, current in _cgroup_folders(sys_root, proc_root):
        limit, used = _number(f"{folder}/{maximum}"), _number(f"{folder}/{current}")
        if limit is None or used is None or limit >= 1 << 60:
            continue
        stat = fields(f"{folder}/memory.stat")
        prefix = "total_" if "total_inactive_file" in stat else ""  # version 1: with descendants
        cache = sum(stat.get(prefix + key, 0) for key in ("inactive_file", "active_file"))
        yield Limit(f"cgroup {folder} ({maximum})", max(0, limit - used + cache))


def _cgroup_folders(sys_root: str, proc_root: str) -> Iterator[tuple[str, str, str]]:
    """(folder, name of its limit, name of its usage) from this process's group to the root."""
    names = {  # memory.high kills nobody but lets a process crawl
        2: (("memory.max", "memory.high"), "memory.current"),
        1: (("memory.limit_in_bytes",), "memory.usage_in_bytes"),
    }
    for folder, version in folders("memory", sys_root, proc_root):
        maxima, current = names[version]
        yield from ((folder, maximum, current) for maximum in maxima)


def _number(path: str) -> int | None:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except (OSError, ValueError):
        return None  # "max", or no such limit


def available(sys_root: str = "/sys", proc_root: str = "/proc") -> Limit:
    """The tightest of the machine's and the cgroups' limits."""
    limits = [machine_available(proc_root), *cgroup_limits(sys_root, proc_root)]
    return min(limits, key=lambda limit: limit.free)
