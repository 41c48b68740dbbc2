"""Machines and files of which users told, and others that are often met: what is found first there.

The three stories are those that this project grew from. Each is a constructed system; what it would
measure is given, since a tree has no disk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from doctor_systems import GIB, constructed
from machines import CXL, MEMORYLESS, NPS1, NPS4, ONE, SNC2_IN_ORDER, XEON, Machine
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import System
from numaload.linux.mounts import Mount
from numaload.machine.devices import Device, FileDevice

THP, CPUS = "/sys/kernel/mm/transparent_hugepage", "/sys/devices/system/cpu"
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
NFS = "rw,vers=4.2,rsize={},namlen=255,hard,proto=tcp,nconnect=8,addr={}"
GEN5 = "32.0 GT/s PCIe"
FLAGS = "fpu sse2 avx avx2 fma f16c avx512f avx512bw avx512vl"
SWAPS = "Filename Type Size Used Priority\n"

NVME_PCI = "/sys/class/nvme/nvme0/device"

# What every check reads, on a machine with nothing to mend.
HEALTHY: dict[str, str] = {
    "/proc/cpuinfo": f"processor\t: 0\nmodel name\t: Intel(R) Xeon(R) 8480+\nflags\t: {FLAGS}\n",
    "/proc/cmdline": "quiet\n",
    "/proc/loadavg": "0.50 0.40 0.30 1/500 4242\n",
    "/proc/uptime": "86400.11 340000.00\n",
    "/proc/self/cgroup": "0::/\n",
    "/proc/self/mountinfo": "30 25 0:27 / /dev/shm rw - tmpfs tmpfs rw\n",
    "/proc/swaps": SWAPS,
    "/proc/vmstat": "pswpin 0\npswpout 0\n",
    "/proc/diskstats": " 259 0 nvme0n1 1 0 8 1 0 0 0 0 0 1 1\n",
    "/proc/sys/kernel/numa_balancing": "0\n",
    "/proc/sys/vm/zone_reclaim_mode": "0\n",
    "/proc/sys/vm/overcommit_memory": "0\n",
    "/sys/kernel/mm/numa/demotion_enabled": "false\n",
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/hugepages-2048kB/enabled": "always [inherit] madvise never\n",
    f"{THP}/shmem_enabled": "always within_size advise [never] deny force\n",
    f"{POOL}/nr_hugepages": "0\n",
    f"{POOL}/free_hugepages": "0\n",
    f"{POOL}/resv_hugepages": "0\n",
    "/sys/block/nvme0n1/queue/read_ahead_kb": "4096\n",
    "/sys/block/nvme0n1/queue/scheduler": "[none] mq-deadline\n",
    f"{NVME_PCI}/current_link_speed": "16.0 GT/s PCIe\n",
    f"{NVME_PCI}/max_link_speed": "16.0 GT/s PCIe\n",
    f"{NVME_PCI}/current_link_width": "4\n",
    f"{NVME_PCI}/max_link_width": "4\n",
    f"{NVME_PCI}/power_state": "D0\n",
    "/sys/class/net/eth0/operstate": "up\n",
    "/sys/class/net/eth0/device/numa_node": "0\n",
}


class Story(NamedTuple):
    """``first``: the number that must come first. ``command``: words of what mends it."""

    make: Callable[[Path], System]
    first: str
    command: str


def told(
    root: Path, machine: Machine, size: int, files: dict[str, str] | None = None, **said: Any
) -> System:
    """Return a system that is healthy but for this."""
    cpus = ",".join(cpus for cpus, _ in machine.nodes.values() if cpus)
    known = {f"{CPUS}/present": cpus, f"{CPUS}/online": cpus}
    system = constructed(root, machine, HEALTHY | known | (files or {}), size=size, **said)
    if "gpus" not in said:
        del system.gpus
    return system


def _pci(root: Path, folder: Path, files: dict[str, str], driver: str = "") -> None:
    """Write a device of PCI, below its port if that is in the path."""
    for leaf, text in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / leaf).write_text(f"{text}\n")
    links = {root / f"sys/bus/pci/devices/{folder.name}": folder}
    if driver:
        there = root / f"sys/bus/pci/drivers/{driver}"
        there.mkdir(parents=True)
        links[folder / "driver"] = there
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)


def _disk(root: Path, name: str, numbers: str, queue: dict[str, str]) -> FileDevice:
    """Write a disk with its queue, and return the file's place on it."""
    folder = root / "sys/devices/pci0000:00" / name
    for leaf, text in queue.items():
        path = folder / "queue" / leaf
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    for link in (root / f"sys/block/{name}", root / f"sys/dev/block/{numbers}"):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    bdi = root / f"sys/class/bdi/{numbers}/read_ahead_kb"
    bdi.parent.mkdir(parents=True, exist_ok=True)
    bdi.write_text(f"{queue['read_ahead_kb']}\n")
    return FileDevice("/models/model.gguf", "ext4", name, (name,), (), "a virtual device")


def _meminfo(total: int, available: int, swap: int = 0, swap_free: int = 0) -> str:
    rows = {"MemTotal": total, "MemFree": available // 2, "MemAvailable": available}
    rows |= {"SwapTotal": swap, "SwapFree": swap_free}
    return "".join(f"{name}: {nbytes >> 10} kB\n" for name, nbytes in rows.items())


def team_with_a_hub_mount(root: Path) -> System:
    """20 GB from a mount that a program of this machine serves; a GPU that lacks lanes."""
    port = root / "sys/devices/pci0000:00/0000:ad:00.0"
    link = {"current_link_speed": GEN5, "max_link_speed": GEN5, "max_link_width": "16"}
    card = {"class": "0x030200", "vendor": "0x10de", "device": "0x2330", "numa_node": "1"}
    card |= {"local_cpulist": XEON.nodes[1][0], "aer_dev_correctable": "TOTAL_ERR_COR 0"}
    _pci(root, port, link | {"class": "0x060400", "vendor": "0x8086", "current_link_width": "4"})
    _pci(root, port / "0000:ae:00.0", link | card | {"current_link_width": "4"}, "nvidia")
    return told(
        root,
        XEON,
        20 * GIB,
        {"/sys/class/bdi/0:45/read_ahead_kb": "15360\n"},
        device=Device("network", "127.0.0.1:/hub", "nfs4"),
        mount=Mount("0:45", "/models", "nfs4", NFS.format(1 << 20, "127.0.0.1"), "127.0.0.1:/hub"),
        disks=FileDevice("/models/model.gguf", "nfs4", "", (), (), "no block device: nfs4"),
        speeds=Speeds(0.12e9, 0.11e9, 9e9, 100 << 20, 0.9),
    )


def q4_on_a_hard_disk(root: Path) -> System:
    """40 GB on a hard disk, 32 GB of RAM, and swap in use."""
    total, swap = 32 * GIB, 16 * GIB
    files = {
        "/proc/meminfo": _meminfo(total, 24 * GIB, swap, 9 * GIB),
        "/proc/swaps": SWAPS + f"/dev/sda2 partition {swap >> 10} {7 << 20} -2\n",
        "/proc/diskstats": " 8 0 sda 1 0 8 1 0 0 0 0 0 1 1\n",
    }
    machine = replace(ONE, nodes={0: ("0-7", 32 << 10)})
    queue = {"read_ahead_kb": "4096", "rotational": "1", "scheduler": "[mq-deadline] none"}
    return told(
        root,
        machine,
        40 * GIB,
        files,
        device=Device("hdd", "sda1", "ext4", 1, rotational=True, read_ahead=4 << 20),
        disks=_disk(root, "sda", "8:0", queue),
        speeds=Speeds(0.14e9, 0.13e9, 8e9, 80 << 20, 0.9),
    )


def epyc_without_libnuma(root: Path) -> System:
    """A model that is in RAM already, on two sockets, beside an engine that mirrors by libnuma."""
    size = 380 * GIB
    cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 9554 64-Core Processor\n"
    return told(
        root,
        NPS1,
        size,
        {"/proc/cpuinfo": f"{cpuinfo}flags\t: {FLAGS}\n", "/etc/os-release": "ID=debian\n"},
        absent=0,
        binding="system calls",
        cache_nodes={0: size // 2, 1: size // 2},
    )


def snc2(root: Path) -> System:
    return told(root, SNC2_IN_ORDER, 200 * GIB)


def nps4(root: Path) -> System:
    cpuinfo = "processor\t: 0\nmodel name\t: AMD EPYC 9554 64-Core Processor\n"
    return told(root, NPS4, 60 * GIB, {"/proc/cpuinfo": f"{cpuinfo}flags\t: {FLAGS}\n"})


def memory_less(root: Path) -> System:
    return told(root, MEMORYLESS, 12 * GIB)


def cxl(root: Path) -> System:
    """Page cache of the file on memory without CPUs."""
    size = 40 * GIB
    return told(root, CXL, size, absent=0, cache_nodes={0: size // 4, 2: size - size // 4})


def container(root: Path) -> System:
    """One node's CPUs and memory of two, and 64 MB of shared memory."""
    machine = replace(XEON, mems_allowed="1")
    mounts = "30 25 0:27 / /dev/shm rw - tmpfs shm rw,size=65536k\n"
    return told(root, machine, 60 * GIB, {"/proc/self/mountinfo": mounts})


def nfs_with_a_small_rsize(root: Path) -> System:
    mount = Mount("0:45", "/models", "nfs4", NFS.format(8192, "10.0.0.2"), "filer:/models")
    return told(
        root,
        XEON,
        40 * GIB,
        {"/sys/class/bdi/0:45/read_ahead_kb": "15360\n"},
        device=Device("network", "filer:/models", "nfs4"),
        mount=mount,
        disks=FileDevice("/models/model.gguf", "nfs4", "", (), (), "no block device: nfs4"),
        speeds=Speeds(0.25e9, 0.2e9, 9e9, 100 << 20, 0.9),
    )


def hard_disk_with_little_read_ahead(root: Path) -> System:
    """Ubuntu's and Debian's default, and a machine that swaps."""
    files = {
        "/proc/meminfo": _meminfo(64 * GIB, 48 * GIB, 8 * GIB, 6 * GIB),
        "/proc/swaps": SWAPS + f"/dev/sda2 partition {8 << 20} {2 << 20} -2\n",
        "/proc/diskstats": " 8 0 sda 1 0 8 1 0 0 0 0 0 1 1\n",
    }
    queue = {"read_ahead_kb": "128", "rotational": "1", "scheduler": "[mq-deadline] none"}
    return told(
        root,
        ONE,
        24 * GIB,
        files,
        device=Device("hdd", "sda1", "ext4", 1, rotational=True, read_ahead=128 << 10),
        disks=_disk(root, "sda", "8:0", queue),
        speeds=Speeds(0.15e9, 0.03e9, 8e9, 80 << 20, 0.9),
    )


STORIES: dict[str, Story] = {
    "team-with-a-hub-mount": Story(team_with_a_hub_mount, "NL105", "cp "),
    "q4-on-a-hard-disk": Story(q4_on_a_hard_disk, "NL201", "smaller quantization"),
    "epyc-without-libnuma": Story(epyc_without_libnuma, "NL301", "apt-get install"),
    "snc2": Story(snc2, "NL303", "--per socket"),
    "nps4": Story(nps4, "NL303", "--per socket"),
    "memory-less": Story(memory_less, "NL311", ""),
    "cxl": Story(cxl, "NL312", "numaload evict"),
    "container": Story(container, "NL306", "--cpuset-mems"),
    "nfs-small-rsize": Story(nfs_with_a_small_rsize, "NL103", "rsize=1048576"),
    "hard-disk-128-kb": Story(hard_disk_with_little_read_ahead, "NL102", "read_ahead_kb"),
}
