"""Machines that tests describe and write down as the kernel would show them in /sys and /proc."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from numaload.linux.lists import format_list, parse_list

EVERY_CPU = frozenset(range(1024))  # what a process may use that nothing keeps from it


class Roots(TypedDict):
    """Keyword arguments of ``topology()``."""

    sys_root: str
    proc_root: str


@dataclass(frozen=True)
class Pci:
    """A device on PCI. ``node``: as its file says, None for no such file."""

    code: str  # class, subclass and interface
    node: int | None
    cpus: str = ""
    driver: str = ""
    id: tuple[str, str] = ("0x10de", "0x2330")
    memory_node: int | None = None  # that the NVIDIA driver tells

    def write(self, address: str, root: Path) -> None:
        folder = root / f"sys/devices/pci0000:00/{address}"
        texts = {"class": self.code, "local_cpulist": self.cpus, "numa_node": self.node}
        texts |= {"vendor": self.id[0], "device": self.id[1]}
        for name, text in texts.items():
            if text is not None:
                _put(folder / name, f"{text}\n")
        _link(root / f"sys/bus/pci/devices/{address}", folder)
        if self.driver:
            (root / f"sys/bus/pci/drivers/{self.driver}").mkdir(parents=True, exist_ok=True)
            _link(folder / "driver", root / f"sys/bus/pci/drivers/{self.driver}")
        if self.memory_node is not None:
            status = f"Node:      {self.memory_node}\nStatus:    online\n"
            _put(root / f"proc/driver/nvidia/gpus/{address}/numa_status", status)


@dataclass(frozen=True)
class Machine:
    """``nodes``: {id: (CPUs, MiB)}; ``rows``: the lines of their distance files, in that order."""

    nodes: dict[int, tuple[str, int]]
    rows: list[str]
    sockets: dict[int, int] = field(default_factory=dict)  # {node: its CPUs' package}
    mems_allowed: str | None = None
    # Over what is written otherwise, below the folder of all nodes; None: there is no such file.
    files: Mapping[str, str | None] = field(default_factory=dict)
    pci: Mapping[str, Pci] = field(default_factory=dict)

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
        for address, device in self.pci.items():
            device.write(address, root)
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


def write_block(
    root: Path,
    numbers: str,
    folder: str,
    files: Mapping[str, str] | None = None,
    slaves: Sequence[str] = (),
) -> Roots:
    """A block device below sys/devices. ``slaves``: folders of those that it is made of."""
    here = root / "sys/devices" / folder
    here.mkdir(parents=True, exist_ok=True)
    for name, text in (files or {}).items():
        _put(here / name, f"{text}\n")
    for slave in slaves:
        _link(here / "slaves" / Path(slave).name, root / "sys/devices" / slave)
    _link(root / f"sys/dev/block/{numbers}", here)
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


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def _rows(count: int, *steps: tuple[int, int]) -> list[str]:
    """Distances of nodes in order: of those in one run of so many nodes; 10 to itself."""

    def distance(i: int, j: int) -> int:
        return next(value for size, value in steps if i // size == j // size)

    words = [[str(distance(i, j)) for j in range(count)] for i in range(count)]
    return [" ".join(row) for row in words]


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
# The same on later processors: numbered socket by socket.
SNC2_IN_ORDER = Machine(
    {
        node: (f"{node * 8}-{node * 8 + 7},{32 + node * 8}-{39 + node * 8}", 257_000)
        for node in range(4)
    },
    _rows(4, (1, 10), (2, 12), (4, 21)),
    sockets={0: 0, 1: 0, 2: 1, 3: 1},
    pci={
        "0000:16:00.0": Pci("0x030200", 0, "0-7,32-39", "nvidia"),
        "0000:d8:00.0": Pci("0x030200", 3, "24-31,56-63", "nvidia"),
        "0000:04:00.0": Pci("0x030000", -1, "0-63", "ast", ("0x1a03", "0x2000")),
        "0000:05:00.0": Pci("0x010802", 1, "8-15,40-47", "nvme", ("0x144d", "0xa80a")),
    },
)
NPS1 = Machine(
    {0: ("0-63,128-191", 772_000), 1: ("64-127,192-255", 774_000)},
    _rows(2, (1, 10), (2, 32)),
    sockets={0: 0, 1: 1},
    pci={"0000:c1:00.0": Pci("0x120000", 1, "64-127,192-255", "", ("0x1002", "0x74a1"))},
)
NPS4 = Machine(
    {node: (f"{node * 8}-{node * 8 + 7}", 96_000) for node in range(8)},
    _rows(8, (1, 10), (4, 12), (8, 32)),
    sockets={node: node // 4 for node in range(8)},
)
# "L3 cache as NUMA domain": a node for every group of cores that share one.
L3_AS_NUMA = Machine(
    {node: (f"{node * 4}-{node * 4 + 3}", 48_000) for node in range(16)},
    _rows(16, (1, 10), (2, 11), (8, 12), (16, 32)),
    sockets={node: node // 8 for node in range(16)},
)
# One node over both sockets: interleaved by the hardware.
NPS0 = Machine(
    {0: ("0-7", 1_540_000)},
    ["10"],
    files={f"../cpu/cpu{cpu}/topology/physical_package_id": "1\n" for cpu in range(4, 8)},
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
# GPU memory beside CPUs; the other nodes are for parts of the GPU and hold nothing.
GH200 = Machine(
    {0: ("0-71", 490_000), 1: ("", 97_000)} | dict.fromkeys(range(2, 9), ("", 0)),
    _rows(9, (1, 10), (9, 80)),
    pci={"0009:01:00.0": Pci("0x030200", 0, "0-71", "nvidia", ("0x10de", "0x2342"), 1)},
)
GB200 = Machine(
    {0: ("0-71", 480_000), 1: ("72-143", 480_000), 2: ("", 188_000), 10: ("", 188_000)},
    ["10 40 80 120", "40 10 120 80", "80 120 10 160", "120 80 160 10"],
    sockets={0: 0, 1: 1},
    pci={
        "0008:01:00.0": Pci("0x030200", 0, "0-71", "nvidia", ("0x10de", "0x2941"), 2),
        "0018:01:00.0": Pci("0x030200", 1, "72-143", "nvidia", ("0x10de", "0x2941"), 10),
    },
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
FIRST_MEMORYLESS = Machine({0: ("0-3", 0), 1: ("4-7", 32_000)}, ["10 21", "21 10"])
# Memory that may only hold what can be moved, so that it can be unplugged.
MOVABLE = Machine(
    {0: ("0-3", 32_000), 1: ("4-7", 32_000)},
    ["10 20", "20 10"],
    sockets={0: 0, 1: 1},
    files={"has_normal_memory": "0\n"},
)
LARGEST_ID = Machine({0: ("0-3", 8_000), 1023: ("4-7", 8_000)}, ["10 40", "40 10"], {0: 0, 1023: 1})
# CPUs 3 and 8-11 were taken offline: kernels list neither.
CPUS_OFFLINE = Machine(
    {0: ("0-2,4-7", 32_000), 1: ("12-15", 32_000)},
    ["10 20", "20 10"],
    sockets={0: 0, 1: 1},
    files={"../cpu/cpu3/online": "0\n", "../cpu/online": "0-2,4-7,12-15\n"},
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
    "snc2-in-order": SNC2_IN_ORDER,
    "epyc-nps0": NPS0,
    "epyc-nps1": NPS1,
    "epyc-nps4": NPS4,
    "epyc-l3-as-numa": L3_AS_NUMA,
    "power-gpus": POWER,
    "old-power": OLD_POWER,
    "gh200": GH200,
    "gb200": GB200,
    "cxl": CXL,
    "memory-less": MEMORYLESS,
    "first-memory-less": FIRST_MEMORYLESS,
    "movable": MOVABLE,
    "largest-id": LARGEST_ID,
    "cpus-offline": CPUS_OFFLINE,
    "memory-apart": APART,
    "offline": OFFLINE,
    "cpuset": CPUSET,
}
