"""Machines that tests describe and write down as the kernel would show them in /sys and /proc."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from numaload.numa.lists import format_list, parse_list

EVERY_CPU = frozenset(range(1024))  # what a process may use that nothing keeps from it


class Roots(TypedDict):
    """Keyword arguments of ``topology()``."""

    sys_root: str
    proc_root: str


@dataclass(frozen=True)
class Machine:
    """``nodes``: {id: (CPUs, MiB)}; ``rows``: the lines of their distance files, in that order."""

    nodes: dict[int, tuple[str, int]]
    rows: list[str]
    sockets: dict[int, int] = field(default_factory=dict)  # {node: its CPUs' package}
    mems_allowed: str | None = None
    # Over what is written otherwise, below the folder of all nodes; None: there is no such file.
    files: Mapping[str, str | None] = field(default_factory=dict)

    def write(self, root: Path) -> Roots:
        base = root / "sys/devices/system/node"
        for (node, (cpus, mib)), row in zip(self.nodes.items(), self.rows, strict=True):
            _put(base / f"node{node}/cpulist", f"{cpus}\n")
            _put(base / f"node{node}/cpumap", cpumap(cpus))
            _put(base / f"node{node}/distance", f"{row}\n")
            _put(base / f"node{node}/meminfo", meminfo(mib, prefix=f"Node {node} "))
            for cpu in parse_list(cpus):
                package = base.parent / f"cpu/cpu{cpu}/topology/physical_package_id"
                _put(package, f"{self.sockets.get(node, 0)}\n")
        for name, ids in self._lists().items():
            _put(base / name, f"{format_list(ids)}\n")
        for name, text in self.files.items():
            if text is None:
                (base / name).unlink()
            else:
                _put(base / name, text)
        return write_proc(root, sum(mib for _, mib in self.nodes.values()), self.mems_allowed)

    def _lists(self) -> dict[str, list[int]]:
        has_memory = [node for node, (_, mib) in self.nodes.items() if mib]
        has_cpu = [node for node, (cpus, _) in self.nodes.items() if cpus]
        there = list(self.nodes)
        return {"online": there, "possible": there, "has_memory": has_memory, "has_cpu": has_cpu}


def write_proc(root: Path, mib: int, mems_allowed: str | None = None) -> Roots:
    """/proc of a machine, and no more: a kernel without NUMA has no folder of nodes."""
    status = "Name:\tpython\n"
    if mems_allowed is not None:
        status += f"Mems_allowed:\t00000000\nMems_allowed_list:\t{mems_allowed}\n"
    _put(root / "proc/self/status", status)
    _put(root / "proc/meminfo", meminfo(mib) + f"MemAvailable:   {mib * 768} kB\n")
    return {"sys_root": str(root / "sys"), "proc_root": str(root / "proc")}


def meminfo(mib: int, prefix: str = "") -> str:
    """Half of it free, a quarter clean page cache."""
    rows = {
        "MemTotal": mib << 10,
        "MemFree": mib << 9,
        "Active(file)": mib << 7,
        "Inactive(file)": mib << 7,
        "Dirty": 0,
        "Writeback": 0,
        "FilePages": mib << 9,
        "Shmem": mib << 8,
        "SReclaimable": 0,
    }
    lines = [f"{prefix}{name}:{kib:>15} kB\n" for name, kib in rows.items()]
    return "".join([*lines, f"{prefix}HugePages_Total:     0\n"])


def cpumap(cpus: str) -> str:
    """Words of 32 bits, the highest first, as every kernel writes them beside cpulist."""
    bits = sum(1 << cpu for cpu in parse_list(cpus))
    words = [f"{bits >> shift & 0xFFFFFFFF:08x}" for shift in range(0, 256, 32)]
    return ",".join(reversed(words)) + "\n"


def _put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="ascii")


def _without_lists(*nodes: int) -> dict[str, str | None]:
    """What kernels of old POWER machines do not have yet."""
    names = ("online", "possible", "has_memory", "has_cpu")
    return dict.fromkeys([*names, *(f"node{node}/cpulist" for node in nodes)])


ONE = Machine({0: ("0-3", 16_000)}, ["10"])
XEON = Machine(
    {0: ("0-15,32-47", 257_000), 1: ("16-31,48-63", 258_000)},
    ["10 21", "21 10"],
    sockets={0: 0, 1: 1},
)
# Sub-NUMA clusters: two nodes in each of two sockets, numbered across the sockets.
SNC2 = Machine(
    {node: (",".join(str(cpu) for cpu in range(node, 16, 4)), 380_000) for node in range(4)},
    ["10 21 11 21", "21 10 21 11", "11 21 10 21", "21 11 21 10"],
    sockets={0: 0, 1: 1, 2: 0, 3: 1},
)
NPS4 = Machine(
    {node: (f"{node * 8}-{node * 8 + 7}", 96_000) for node in range(8)},
    [
        " ".join("10" if i == j else "12" if i // 4 == j // 4 else "32" for j in range(8))
        for i in range(8)
    ],
    sockets={node: node // 4 for node in range(8)},
)
# Ids with holes; from 250 on it is the memory of GPUs, shown as nodes without CPUs.
POWER = Machine(
    {0: ("0-15", 126_000), 8: ("16-31", 130_000)} | dict.fromkeys(range(250, 256), ("", 15_000)),
    ["10 40" + 6 * " 80", "40 10" + 6 * " 80"]
    + [f"80 80 {' '.join('10' if i == j else '80' for j in range(6))}" for i in range(6)],
    sockets={0: 0, 8: 8},
)
OLD_POWER = Machine(
    {node: (f"{node * 8}-{node * 8 + 7}", 57_000) for node in (0, 1, 4, 5)},
    ["10 20 40 40", "20 10 40 40", "40 40 10 20", "40 40 20 10"],
    sockets=dict.fromkeys((0, 1, 4, 5), -1),  # the firmware does not say
    files=_without_lists(0, 1, 4, 5),
)
CXL = Machine(
    {0: ("0-7", 64_000), 1: ("8-15", 64_000), 2: ("", 256_000)},
    ["10 21 14", "21 10 24", "14 24 10"],
    sockets={0: 0, 1: 1},
)
MEMORYLESS = Machine(
    {0: ("0-3", 32_000), 1: ("4-7", 0), 2: ("8-11", 32_000)},
    ["10 20 30", "20 10 15", "30 15 10"],
)
# CPUs on some nodes, all memory on others.
APART = Machine(
    {0: ("0-1", 0), 1: ("2-3", 0), 2: ("", 96_000), 3: ("", 96_000), 4: ("", 760_000)},
    ["10 21 11 21 17", "21 10 21 11 28", "11 21 10 13 17", "21 11 13 10 28", "17 28 17 28 10"],
)
# Node 0 was taken offline; lists of what has memory may be older than that.
OFFLINE = Machine(
    {1: ("4-7", 64_000)},
    ["10"],
    files={"possible": "0-1\n", "has_memory": "0-1\n"},
)
CPUSET = Machine(XEON.nodes, XEON.rows, XEON.sockets, mems_allowed="1")

MACHINES = {
    "one-node": ONE,
    "dual-xeon": XEON,
    "snc2": SNC2,
    "epyc-nps4": NPS4,
    "power-gpus": POWER,
    "old-power": OLD_POWER,
    "cxl": CXL,
    "memory-less": MEMORYLESS,
    "memory-apart": APART,
    "offline": OFFLINE,
    "cpuset": CPUSET,
}
