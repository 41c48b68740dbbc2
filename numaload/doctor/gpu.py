"""GPUs: their PCIe links, the nodes that they and the storage are on, their driver.

An idle GPU lowers its link, which is no finding. Nothing here wakes a GPU that is switched off.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from abc import abstractmethod
from contextlib import suppress
from typing import Any, NamedTuple

from numaload.doctor.check import Check, Price, Unknown
from numaload.doctor.system import System
from numaload.linux.lists import format_list
from numaload.linux.mounts import real
from numaload.linux.sysfs import SysFiles, number_in
from numaload.machine.devices import Gpu

NVIDIA, AMD = "10de", "1002"  # PCI vendors
VISIBLE = {NVIDIA: "CUDA_VISIBLE_DEVICES", AMD: "HIP_VISIBLE_DEVICES"}
PASSED_ON = ("vfio-pci", "pci-stub", "xen-pciback")  # drivers of what a virtual machine has
# Vendors of ports that hypervisors make up: QEMU, VMware, Hyper-V. What they can do is invented.
MADE_UP_PORTS = ("0x1b36", "0x15ad", "0x1414")
ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
SPEED = re.compile(r"([0-9]{1,3}(?:\.[0-9])?) GT/s")
PAYLOAD = 0.8  # of a link's coded bytes: 12.7 of 15.75 GB/s over Gen3 x16 (llama.cpp #16000)
# Bytes a second from memory beside the GPU, and from another socket's (llama.cpp #16000).
NEAR, FAR = 12.7e9, 4.5e9
SLOW = 1e9  # bytes a second of storage
MEMORY = 24 << 30  # bytes of a GPU that does not say: as in a card for workstations


class _Link(NamedTuple):
    """GT/s and lanes of a PCIe link, now and at most. sure: whether the slot's most is known."""

    speed: float
    width: int
    most_speed: float
    most_width: int
    sure: bool


class _EachGpu(Check):
    """Look at each GPU alone. ``found``: those with something to mend, ``lost``: their seconds."""

    def __init__(self, system: System) -> None:
        super().__init__(system)
        self.found: list[Gpu] = []
        self.lost = 0.0

    @abstractmethod
    def look(self, gpu: Gpu) -> str:
        """Say what is wrong with this GPU, or return "". Raises: Unknown."""

    def gpus(self) -> list[Gpu]:
        return _gpus(self.system)

    def available(self) -> bool:
        return bool(self.gpus())

    def measure(self) -> str:
        """Raise Unknown only where nothing was found on any GPU."""
        seen, unknown = [], None
        for gpu in self.gpus():
            try:
                text = self.look(gpu)
            except Unknown as error:
                unknown = error
                continue
            if text:
                self.found.append(gpu)
                seen.append(f"GPU {gpu.address}: {text}")
        if unknown and not seen:
            raise unknown
        return "; ".join(seen)

    def price(self) -> Price | None:
        return Price(self.lost) if self.system.size and self.lost else None


class _PcieLink(_EachGpu):
    def gpus(self) -> list[Gpu]:
        """Leave out those that are suspended, and those whose memory the CPU reaches past PCIe."""
        return [
            gpu
            for gpu in super().gpus()
            if gpu.memory_node is None
            and self.system.exists(f"{_folder(gpu)}/current_link_width")
            and not _is_suspended(self.system, gpu)
        ]

    def lose(self, gpu: Gpu, link: _Link, each_byte: float) -> None:
        """Add what copying this GPU's bytes takes longer. Raises: Unknown."""
        if not link.sure:
            raise Unknown(f"the slot of GPU {gpu.address}: it may do less than the GPU")
        # Assumed: copies do not overlap with reading, as in llama.cpp when it maps the file.
        self.lost += _share(self.system, gpu) * each_byte


class SlowLink(_PcieLink):
    id, title = "NL401", "The PCIe link of a GPU runs below its speed"
    source = "open-gpu-kernel-modules#1010: idle GPUs lower the speed, 2026-11"
    copy_bytes, copy_seconds = 64 << 20, 0.3

    def look(self, gpu: Gpu) -> str:
        links = _links(self.system, gpu)
        if all(link.speed >= link.most_speed for link in links):
            return ""
        copied, proof = self._under_copy(gpu), "unproven: no copy was made, but the GPU is at work"
        if copied:
            links, proof = copied, "under a copy"
        elif not _is_busy(self.system, gpu):
            return ""
        slowest = min(links, key=lambda link: _rate(link.speed, link.width))
        now = _rate(slowest.speed, slowest.width)
        most = min(_rate(link.most_speed, link.width) for link in links)
        if now >= most:
            return ""
        self.lose(gpu, slowest, 1 / now - 1 / most)
        return f"{slowest.speed:g} of {slowest.most_speed:g} GT/s ({proof})"

    def _under_copy(self, gpu: Gpu) -> list[_Link]:
        """Return the fastest links seen while torch copies to this GPU; [] where it cannot."""
        if not self.system.deep:  # importing torch takes seconds
            return []
        try:
            import torch

            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
            only = count == 1 and len(_gpus(self.system)) == 1
            index = 0 if only else next(i for i in range(count) if _is_torch(torch, i, gpu))
            source = torch.empty(self.copy_bytes, dtype=torch.uint8, pin_memory=True)
            target = torch.empty_like(source, device=f"cuda:{index}")
            end, seen = time.monotonic() + self.copy_seconds, []
            while time.monotonic() < end:
                target.copy_(source, non_blocking=True)
                seen.append(_links(self.system, gpu))  # while it copies
                torch.cuda.synchronize(index)
        except Exception:  # noqa: BLE001 - whatever fails in torch, nothing is proven then
            return []
        return max(seen, key=lambda links: min(_rate(one.speed, one.width) for one in links))

    def explain(self) -> str:
        return "All weights reach the GPU over PCIe. A bad contact or the BIOS can slow it down."

    def fix(self) -> str:
        return "set the slot to Auto or its highest PCIe generation in the BIOS; reseat the card"


class NarrowLink(_PcieLink):
    id, title = "NL402", "The PCIe link of a GPU lacks lanes"
    source = "Linux drivers/pci/pci-sysfs.c: the link's status and capabilities, 2026-11"

    def look(self, gpu: Gpu) -> str:
        if _is_at_top(self.system, gpu) is False:  # AMD's may also shed lanes when idle
            return ""
        links = _links(self.system, gpu)
        slowest = min(links, key=lambda link: _rate(link.most_speed, link.width))
        now = _rate(slowest.most_speed, slowest.width)
        most = min(_rate(link.most_speed, link.most_width) for link in links)
        if now >= most:
            return ""
        self.lose(gpu, slowest, 1 / now - 1 / most)
        return f"x{slowest.width} of x{slowest.most_width} lanes"

    def explain(self) -> str:
        return "Each lane carries a part of what is copied. Card and port can use more of them."

    def fix(self) -> str:
        return "reseat the card; use a slot with all lanes; do not bifurcate it in the BIOS"


class LinkErrors(_EachGpu):
    id, title = "NL403", "The PCIe link of a GPU makes errors"
    source = "DCGM dcgm_gpu_hardware_limits.h: 8 replays a minute are the most, 2026-11"
    most_per_minute = 8
    least = 100  # errors, below which it may have been the start
    # Of aer_dev_correctable: those that the link makes.
    names = ("RxErr", "BadTLP", "BadDLLP", "Rollover", "Timeout")

    def gpus(self) -> list[Gpu]:
        return [gpu for gpu in super().gpus() if self._counts(gpu)]

    def look(self, gpu: Gpu) -> str:
        errors = max(self._counts(gpu))
        seconds = number_in(self.system.text("/proc/uptime").partition(".")[0])
        if seconds is None:
            raise Unknown("/proc/uptime: it holds no number")
        each_minute = errors / max(1.0, seconds / 60)
        if errors < self.least or each_minute <= self.most_per_minute:
            return ""
        return f"{errors} errors since the start, {each_minute:.0f} a minute"

    def _counts(self, gpu: Gpu) -> list[int]:
        """Return how many errors each witness has counted; those that do not count are left out."""
        replays = _nvml(self.system, gpu, "PcieReplayCounter")
        counts = [] if replays is None else [replays]
        for folder in _way(self.system, gpu)[:2]:
            path = f"{folder}/aer_dev_correctable"
            if self.system.exists(path):
                rows = [line.split() for line in self.system.text(path).splitlines()]
                numbers = [number_in(row[-1]) for row in rows if row and row[0] in self.names]
                counts.append(sum(number for number in numbers if number is not None))
        return counts

    def explain(self) -> str:
        return "What arrives damaged is sent again, which takes time, and a link may fail for good."

    def fix(self) -> str:
        return "reseat the card; replace its riser or cable; or lower the slot's PCIe generation"


class _Nodes(Check):
    """Where a GPU is, beside what it is given to work on."""

    def available(self) -> bool:
        if not _gpus(self.system):
            return False
        return sum(bool(node.cpus) for node in self.system.machine.nodes.values()) > 1

    def known(self) -> list[Gpu]:
        """Return the GPUs that are used, and whose node is known. Raises: Unknown."""
        return [gpu for gpu in _used(self.system) if _near(self.system, gpu)]

    def named(self, cards: list[Gpu]) -> str:
        return ", ".join(f"GPU {gpu.address} on node {gpu.node}" for gpu in cards)


class FarStorage(_Nodes):
    id, title = "NL404", "The model's storage and the GPU are on different sockets"
    source = "llama.cpp #16000: 12.7 GB/s to the GPU from its node, 4.5 from another, 2026-11"

    def available(self) -> bool:
        return bool(self.system.size) and super().available()

    def measure(self) -> str:
        kind, fuse = self.system.device.kind, self.system.device.file_system.startswith("fuse")
        self.cards, allowed = self.known(), self.system.cpus
        near = frozenset[int]().union(*(_near(self.system, gpu) for gpu in self.cards))
        bound = allowed <= near or not allowed & near  # to the GPU; elsewhere: that is NL405
        if kind == "memory" or not self.cards or bound or not self.system.absent:
            return ""
        rate = self.system.speeds.disk
        if rate and rate < SLOW:  # so slow that even the longer way waits for it
            return ""
        name, nodes = self._network() if kind == "network" and not fuse else self._disks()
        cpus = [self.system.machine.nodes[n].cpus for n in nodes if n in self.system.machine.nodes]
        if not all(cpus) or any(one & near for one in cpus):
            return ""
        return f"{name} on node {format_list(nodes)}; {self.named(self.cards)}"

    def _disks(self) -> tuple[str, list[int]]:
        disks = self.system.disks
        if not disks.nodes:
            raise Unknown(f"the node of {disks.device or disks.file_system}: {disks.why}")
        return ", ".join(disks.disks) or disks.device, list(disks.nodes)

    def _network(self) -> tuple[str, list[int]]:
        """Return all interfaces that are up: which of them is used is not asked."""
        files, base = SysFiles(), f"{self.system.sys}/class/net"
        found = {
            name: files.number(f"{base}/{name}/device/numa_node")
            for name in files.names(base)
            if files.text(f"{base}/{name}/operstate") == "up"
        }
        known = {name: node for name, node in found.items() if node is not None and node >= 0}
        if not known:
            raise Unknown("the node of the network interface: the firmware does not say")
        return ", ".join(known), sorted(set(known.values()))

    def explain(self) -> str:
        return "The file crosses between sockets on its way to the GPU's memory."

    def price(self) -> Price:
        # Assumed: a program that is not bound has half of its staging memory on the wrong node.
        share = sum(_share(self.system, gpu) for gpu in self.cards) / 2
        return Price(share * self.system.absent / self.system.size * (1 / FAR - 1 / NEAR))

    def fix(self) -> str:
        machine, path = self.system.machine, shlex.quote(self.system.path or "")
        node = machine.nearest(self.cards[0].node or 0, machine.usable)
        remark = "{model} stays as it is; the program runs, and has memory, beside the GPU"
        return f"numaload exec --node {node} {path} -- PROGRAM -m {{model}}  # {remark}"


class FarCpus(_Nodes):
    id, title = "NL405", "No CPU of the GPU's socket may be used"
    source = "llama.cpp #16000: 12.7 GB/s to the GPU from its node, 4.5 from another, 2026-11"

    def measure(self) -> str:
        known, allowed = self.known(), self.system.cpus
        self.cards = [gpu for gpu in known if not _near(self.system, gpu) & allowed]
        self.wanted = format_list({gpu.node for gpu in known if gpu.node is not None})
        if not self.cards or not allowed:
            return ""
        return f"CPUs {format_list(allowed)} may be used; {self.named(self.cards)}"

    def explain(self) -> str:
        return "Memory is taken where the program runs. From there copies cross between sockets."

    def price(self) -> Price | None:
        share = sum(_share(self.system, gpu) for gpu in self.cards)
        return Price(share * (1 / FAR - 1 / NEAR)) if self.system.size else None

    def fix(self) -> str:
        return f"numactl --cpunodebind={self.wanted} --membind={self.wanted} PROGRAM"


class FarPeers(_Nodes):
    id, title = "NL406", "The GPUs of one model are on different sockets"
    source = "nvidia-smi topo -m: SYS is a way between sockets (nvml.h), 2026-11"
    between, links = 50, range(18)  # NVML_TOPOLOGY_SYSTEM, NVML_NVLINK_MAX_LINKS
    spare = 1 << 30  # bytes of each GPU for what is no weight, assumed

    def available(self) -> bool:
        return bool(self.system.size) and len(_gpus(self.system)) > 1 and super().available()

    def measure(self) -> str:
        used, sockets = _used(self.system), dict[str, list[Gpu]]()
        cards = max(([gpu for gpu in used if gpu.id.startswith(one)] for one in VISIBLE), key=len)
        for gpu in cards if len(cards) > 1 else ():
            node = self.system.machine.nodes.get(-1 if gpu.node is None else gpu.node)
            if node is None or not node.packages:
                raise Unknown(f"the socket of GPU {gpu.address}: it is not shown")
            sockets.setdefault(f"socket {format_list(node.packages)}", []).append(gpu)
        if len(sockets) < 2 or self._joined(cards):
            return ""
        best = max(sockets.values(), key=self._room)
        fits = self.system.size <= self._room(best)
        self.chosen = best if fits else [gpu for group in sockets.values() for gpu in group]
        if self.chosen == cards:  # all are needed, and neighbours are beside each other
            return ""
        rows = (", ".join(gpu.address for gpu in group) for group in sockets.values())
        return "; ".join(f"{one}: {row}" for one, row in zip(sockets, rows, strict=True))

    def _room(self, cards: list[Gpu]) -> int:
        return sum((_memory(self.system, gpu) or MEMORY) - self.spare for gpu in cards)

    def _joined(self, cards: list[Gpu]) -> bool:
        """Return whether NVLink or XGMI joins them, or no socket parts them. Raises: Unknown."""
        system = self.system
        if cards[0].id.startswith(AMD):
            hives = {_text(system, f"{_folder(gpu)}/xgmi_hive_info/xgmi_hive_id") for gpu in cards}
            return len(hives) == 1 and hives != {""}
        handles = [_handle(system, gpu) for gpu in cards]
        if None in handles:
            raise Unknown(
                "whether NVLink joins the GPUs: NVML does not tell (numaload[gpu] asks it)"
            )
        ways = [_nvml(system, cards[0], "TopologyCommonAncestor", one) for one in handles[1:]]
        states = ({_nvml(system, gpu, "NvLinkState", n) for n in self.links} for gpu in cards)
        beside = all((way or self.between) < self.between for way in ways)
        return beside or all(1 in state for state in states)

    def explain(self) -> str:
        return "What one GPU computes the next one needs. The way between sockets is a slow one."

    def fix(self) -> str:
        vendor = self.chosen[0].id[:4]
        cards = [gpu for gpu in _gpus(self.system) if gpu.id.startswith(vendor) and gpu.driver]
        numbers = ",".join(str(cards.index(gpu)) for gpu in self.chosen)
        order = "CUDA_DEVICE_ORDER=PCI_BUS_ID " if vendor == NVIDIA else ""
        return f"export {order}{VISIBLE[vendor]}={numbers}"

    def undo(self) -> str:
        words = self.fix().split()[1:]
        return _as_before(self.system, [word.partition("=")[0] for word in words])


class Mps(Check):
    id, title = "NL407", "MPS is asked for, but does not run or limits the GPU"
    source = "NVIDIA MPS r615, Environment Variables and Quick Start, 2026-11"
    pipes, threads = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
    memory = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"
    files = ("control", "nvidia-cuda-mps-control.pid")  # the daemon's socket and its number

    def available(self) -> bool:
        return any(gpu.driver == "nvidia" for gpu in _gpus(self.system))

    def measure(self) -> str:
        told, pid = self.system.environment, self.system.pid
        asked = [name for name in (self.pipes, self.threads, self.memory) if told.get(name)]
        folder = told.get(self.pipes) or "/tmp/nvidia-mps"  # noqa: S108 - NVIDIA's default
        if not asked or folder == os.devnull:  # no directory: MPS is not wanted
            return ""
        root = "" if pid is None else f"/proc/{pid}/root"
        if not folder.startswith("/") or not self.system.exists(f"{root}/"):
            raise Unknown(f"{folder}: the process may see other files there")
        if not any(self.system.exists(f"{root}{folder}/{name}") for name in self.files):
            quoted = shlex.quote(folder)
            control = f"{self.pipes}={quoted} nvidia-cuda-mps-control"
            self.do = f"mkdir -p {quoted} && CUDA_MPS_LOG_DIRECTORY={quoted} {control} -d"
            self.back = f"echo quit | {control}"
            return f"no control daemon in {folder}; set: {', '.join(asked)}"
        limits = [name for name in asked if name != self.pipes and self._binds(name, told[name])]
        self.do, self.back = f"unset {' '.join(limits)}", _as_before(self.system, limits)
        return ", ".join(f"{name}={told[name]}" for name in limits)

    def _binds(self, name: str, text: str) -> bool:
        """Return whether it leaves less than the GPU, or than the model. Raises: Unknown."""
        percent = number_in(text.partition(".")[0])
        if name == self.threads and percent is not None:
            return percent < 100
        found = re.findall(r"([0-9]{1,4})=([0-9]{1,9})([MG])", text.upper())  # 0=1G,1=512MB
        if len(found) <= text.count(","):
            raise Unknown(f"what {name}={text} means")
        limits = {int(n): int(most) << (30 if unit == "G" else 20) for n, most, unit in found}
        size, chosen = self.system.size, self.system.environment.get(VISIBLE[NVIDIA])
        cards = [gpu for gpu in _gpus(self.system) if gpu.driver == "nvidia"]
        count = len(cards if chosen is None else chosen.split(","))
        return sum(limits.get(n, size) for n in range(count)) < size  # without a limit: enough

    def explain(self) -> str:
        return "Without the daemon of MPS programs take turns. Its limits hold on an idle GPU too."

    def fix(self) -> str:
        return self.do

    def undo(self) -> str:
        return self.back


class NoDriver(_EachGpu):
    id, title = "NL408", "A GPU has no driver"
    source = "PCI Code and ID Assignment 1.11: classes 0302h and 12h draw nothing, 2019-01"
    root = True

    def gpus(self) -> list[Gpu]:
        """Return those that only compute: what draws too may be left to the firmware."""
        return [gpu for gpu in super().gpus() if gpu.kind in ("3D", "accelerator")]

    def available(self) -> bool:
        return self.system.exists("/sys/bus/pci/drivers") and super().available()

    def look(self, gpu: Gpu) -> str:
        return "" if gpu.driver else f"{gpu.id}, no driver is bound to it"

    def explain(self) -> str:
        return "No program can use this GPU. Models are then computed by the CPU, or by fewer GPUs."

    def _module(self) -> str:
        return "nvidia" if self.found[0].id.startswith(NVIDIA) else "amdgpu"

    def fix(self) -> str:
        return f"modprobe {self._module()}"

    def undo(self) -> str:
        return f"modprobe -r {self._module()}"


class NotPersistent(_EachGpu):
    id, title = "NL409", "The GPU is initialised anew at each start"
    source = "NVIDIA Driver Persistence r560: 1 to 3 s a GPU, 2024-11"
    root = True
    each = 2.0  # seconds

    def gpus(self) -> list[Gpu]:
        """Leave out those that are suspended, as in laptops: there it saves the battery."""
        cards = [gpu for gpu in super().gpus() if gpu.driver == "nvidia"]
        return [gpu for gpu in cards if not _is_suspended(self.system, gpu)]

    def look(self, gpu: Gpu) -> str:
        text = ""
        if _is_off(self.system, gpu):
            text = "the driver has not initialised it"
        elif gpu.kind != "VGA" and _nvml(self.system, gpu, "PersistenceMode") == 0:
            text = "persistence mode is off"
        self.lost += self.each if text else 0.0
        return text

    def explain(self) -> str:
        return "The driver lets go of a GPU when its last program ends. The next one waits for it."

    def fix(self) -> str:
        return self._set(1)

    def undo(self) -> str:
        return self._set(0)

    def _set(self, mode: int) -> str:
        return "; ".join(f"nvidia-smi -i {gpu.address} -pm {mode}" for gpu in self.found)


def _folder(gpu: Gpu) -> str:
    return f"/sys/bus/pci/devices/{gpu.address}"


def _gpus(system: System) -> list[Gpu]:
    """Return the GPUs that compute, and that this machine or container has."""
    return [gpu for gpu in system.gpus if _computes(system, gpu)]


def _computes(system: System, gpu: Gpu) -> bool:
    """Return whether it is no display adapter, no part of a processor, and nobody else's."""
    listed = "/proc/driver/nvidia/gpus"  # in a container, those that it was given
    if gpu.driver == "nvidia" and system.exists(listed):
        return system.exists(f"{listed}/{gpu.address}")
    if gpu.id.startswith(AMD) and gpu.kind != "accelerator" and gpu.driver not in PASSED_ON:
        # AMD's cards have a PCIe switch of their own above the GPU; processors' graphics do not.
        return _text(system, f"{_folder(gpu)}/../vendor") == f"0x{AMD}"
    return gpu.id.startswith((NVIDIA, AMD)) and gpu.driver not in PASSED_ON


def _text(system: System, path: str) -> str:
    """Return a file's text; "" where it cannot be read."""
    try:
        return system.text(path)
    except Unknown:
        return ""


def _as_before(system: System, names: list[str]) -> str:
    """Return the commands that give these variables what they are now."""
    now = system.environment
    rows = (f"export {n}={shlex.quote(now[n])}" if n in now else f"unset {n}" for n in names)
    return "; ".join(rows)


def _used(system: System) -> list[Gpu]:
    """Return the GPUs that a program with this environment sees. Raises: Unknown."""
    found = []
    for vendor, variable in VISIBLE.items():
        cards = [gpu for gpu in _gpus(system) if gpu.id.startswith(vendor) and gpu.driver]
        chosen = system.environment.get(variable) if cards else None
        if chosen is None:
            found += cards
            continue
        numbers = [number_in(word.strip()) for word in chosen.split(",") if word.strip()]
        # CUDA counts the fastest first, unless it is told otherwise.
        by_bus = system.environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
        alike = vendor == AMD or len({gpu.id for gpu in cards}) == 1
        if None in numbers or not (by_bus or alike):
            raise Unknown(f"which GPUs {variable}={chosen} means")
        found += [cards[n] for n in numbers if n is not None and 0 <= n < len(cards)]
    return found


def _near(system: System, gpu: Gpu) -> frozenset[int]:
    """Return the CPUs of the GPU's socket; none where its node is not known."""
    nodes = system.machine.nodes
    here = nodes.get(-1 if gpu.node is None else gpu.node)
    if here is None or not here.cpus:
        return frozenset()
    same = [node.cpus for node in nodes.values() if node.packages == here.packages != ()]
    return here.cpus.union(*same)


def _share(system: System, gpu: Gpu) -> float:
    """Return the model's bytes that go to this GPU: an equal share, and no more than fits."""
    return min(system.size / len(_gpus(system)), _memory(system, gpu) or MEMORY)


def _memory(system: System, gpu: Gpu) -> int | None:
    """Return the bytes of the GPU's own memory; None where they are not known."""
    told = _nvml(system, gpu, "MemoryInfo")
    if told is not None:
        return int(told.total)
    with suppress(Unknown):
        return system.number(f"{_folder(gpu)}/mem_info_vram_total")  # of amdgpu
    return None


def _way(system: System, gpu: Gpu) -> list[str]:
    """Return the folders of the GPU and of the ports above it."""
    names = real(system.root + _folder(gpu)).split("/")
    count = sum(1 for name in names if ADDRESS.fullmatch(name))
    return [_folder(gpu) + "/.." * above for above in range(count)]


def _links(system: System, gpu: Gpu) -> list[_Link]:
    """Read the links from the GPU to its processor, several where a switch is. Raises: Unknown."""
    way, found = _way(system, gpu), []
    # A link joins the first folder and the second, the third and the fourth: a switch has two.
    for i in range(0, len(way), 2):
        if i and not system.exists(f"{way[i]}/current_link_width"):
            continue
        speed, width = _end(system, way[i], "current")
        most_speed, most_width = _end(system, way[i], "max")
        sure = i + 1 < len(way) and _text(system, f"{way[i + 1]}/vendor") not in MADE_UP_PORTS
        if sure:
            slot_speed, slot_width = _end(system, way[i + 1], "max")
            most_speed, most_width = min(most_speed, slot_speed), min(most_width, slot_width)
        found.append(_Link(speed, width, most_speed, most_width, sure))
    return found


def _end(system: System, folder: str, which: str) -> tuple[float, int]:
    """Return GT/s and lanes of this end of a link. which: current or max. Raises: Unknown."""
    speed = SPEED.match(system.text(f"{folder}/{which}_link_speed"))
    width = system.number(f"{folder}/{which}_link_width")
    if speed is None or not 0 < width <= 32:  # 63 of what is switched off
        raise Unknown(f"{folder}: the kernel does not say its {which} PCIe link")
    return float(speed[1]), width


def _rate(speed: float, width: int) -> float:
    """Return the bytes a second that a link carries of a copy."""
    coded = 8 / 10 if speed < 8 else 128 / 130
    return speed * 1e9 / 8 * coded * PAYLOAD * width


def _is_suspended(system: System, gpu: Gpu) -> bool:
    return _text(system, f"{_folder(gpu)}/power/runtime_status") == "suspended"


def _is_off(system: System, gpu: Gpu) -> bool:
    """Return whether NVIDIA's driver has not initialised it: its names are question marks then."""
    return "??" in _text(system, f"/proc/driver/nvidia/gpus/{gpu.address}/information")


def _is_at_top(system: System, gpu: Gpu) -> bool | None:
    """Return whether amdgpu has the link in its highest state; None where it has no several."""
    states = _text(system, f"{_folder(gpu)}/pp_dpm_pcie").splitlines()
    return states[-1].endswith("*") if len(states) > 1 else None


def _is_busy(system: System, gpu: Gpu) -> bool:
    """Return whether the GPU is at work: in a high performance state, and not for nothing."""
    state, used = (_nvml(system, gpu, name) for name in ("PerformanceState", "UtilizationRates"))
    if state is not None and used is not None:
        return bool(0 <= state <= 2 and used.gpu > 0)
    return _is_at_top(system, gpu) is True


def _is_torch(torch: Any, index: int, gpu: Gpu) -> bool:
    """Return whether torch's GPU of this index is this one."""
    told = torch.cuda.get_device_properties(index)
    place = f"{told.pci_domain_id:04x}:{told.pci_bus_id:02x}:{told.pci_device_id:02x}"
    return gpu.address.startswith(f"{place}.")


def _handle(system: System, gpu: Gpu) -> Any:
    """Return NVML's handle; None without NVML, or where asking might initialise a GPU."""
    nvidia = [one for one in _gpus(system) if one.driver == "nvidia"]
    asleep = any(_is_off(system, one) or _is_suspended(system, one) for one in nvidia)
    if gpu not in nvidia or asleep or system.nvml is None:
        return None
    with suppress(Exception):  # NVMLError of whichever version
        return system.nvml.nvmlDeviceGetHandleByPciBusId(gpu.address)
    return None


def _nvml(system: System, gpu: Gpu, name: str, *more: Any) -> Any:
    """Ask NVML for this about a GPU; None where it does not say."""
    handle = _handle(system, gpu)
    with suppress(Exception):  # NotSupported, or a driver older than the question
        return handle and getattr(system.nvml, f"nvmlDeviceGet{name}")(handle, *more)
    return None


CHECKS: tuple[type[Check], ...] = (
    SlowLink,
    NarrowLink,
    LinkErrors,
    FarStorage,
    FarCpus,
    FarPeers,
    Mps,
    NoDriver,
    NotPersistent,
)
