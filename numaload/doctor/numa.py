"""Nodes: memory that is far from the CPUs that use it, and what keeps it from being near."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import ClassVar

from numaload.doctor.check import COPY, ESTIMATED, PASS, Check, Price, Unknown, counted
from numaload.doctor.storage import size_of, unused
from numaload.errors import NumaloadError
from numaload.files.source import Identity
from numaload.linux.lists import format_list
from numaload.linux.syscalls import LIBNUMA, LIBNUMA_HINT
from numaload.machine import memory
from numaload.machine.topology import Node
from numaload.replicas.entry import Entry
from numaload.replicas.layout import MIRROR

# Bytes a second that the cores of one socket read of a copy that is spread over all nodes. It is
# assumed, on the low side: eight channels of DDR4-3200 have 205e9, and half of that is remote.
SOCKET = 100e9
# Shares of such a pass that a mirror saves: 18.1 tokens a second against 11.6 on two sockets
# (llama.cpp #27986, 2026-08), 1.112 against 1 on one socket in NPS2 (ik_llama.cpp #2396, 2026-09).
# Both are claims of their authors.
MIRRORED, MIRRORED_INSIDE = 1 - 11.6 / 18.1, 1 - 1 / 1.112
# Passes more where all weights are on one node of two sockets: 2.9 tokens a second against 11.6
# (llama.cpp #27986, 2026-08).
ON_ONE_NODE = 11.6 / 2.9 - 1
COPIED = 10e9  # bytes a second at which replicas are filled from RAM; assumed, some threads a node
FAR = 30e9  # bytes a second of memory without CPUs; assumed: CXL over eight lanes of PCIe 5.0

REMOTE = 20  # distance from which on a node is not near: Linux include/linux/topology.h, 2026-11

# {word of /etc/os-release: (command that installs libnuma, command that removes it)}
PACKAGES = {
    "debian": ("apt-get install -y libnuma1", "apt-get remove libnuma1"),
    "fedora": ("dnf install -y numactl-libs", "dnf remove numactl-libs"),
    "rhel": ("dnf install -y numactl-libs", "dnf remove numactl-libs"),
    "suse": ("zypper install -y libnuma1", "zypper remove libnuma1"),
    "arch": ("pacman -S --noconfirm numactl", "pacman -R numactl"),
    "alpine": ("apk add numactl", "apk del numactl"),
}


class _Nodes(Check):
    """A check for machines with several nodes.

    first: checks that claim the same seconds. share: of a pass over the weights, that is lost.
    """

    why = ""
    first: ClassVar[tuple[type[Check], ...]] = ()
    share = 0.0

    def available(self) -> bool:
        return len(self.system.machine.all) > 1

    @property
    def file(self) -> str:
        return shlex.quote(self.system.path) if self.system.path else "FILE"

    def explain(self) -> str:
        return self.why

    def price(self) -> Price | None:
        """Return what ``share`` costs; None where it is not known, or others claim it."""
        if not self.system.size or not self.share or self._claimed():
            return None
        bandwidth = SOCKET * max(1, len(self.system.machine.sockets))
        return Price(self.share * self.system.size / bandwidth, ESTIMATED, PASS)

    @property
    def mirrored(self) -> float:
        """Return the share of a pass that a replica on every node saves."""
        return MIRRORED if self.are_far(self.system.machine.all) else MIRRORED_INSIDE

    def are_far(self, nodes: Sequence[int]) -> bool:
        """Return whether any of these nodes is as far from another one as in another socket."""
        known = [self.system.machine.nodes[node].distances for node in nodes]
        return any(found.get(node, 0) >= REMOTE for found in known for node in nodes)

    def _claimed(self) -> bool:
        for kind in self.first:
            with suppress(Unknown, NumaloadError, OSError):
                other = kind(self.system)
                if other.available() and other.measure():
                    return True
        return False

    def far_nodes(self) -> dict[int, Node]:
        """Return nodes with memory and without CPUs, unless they are the nearest to some CPUs."""
        machine = self.system.machine
        nodes = [n for n in machine.nodes.values() if n.has_memory and not n.cpus]
        return {node.id: node for node in nodes if node.id not in machine.all}


class StaleReplicas(_Nodes):
    id, title = "NL310", "Replicas of this file are outdated or incomplete"
    source = "docs/store.md: replicas are of one version of the files, 2026-11"
    why = (
        "Where a node has no replica of just this file, its threads read the page cache or"
        " another node's memory."
    )

    def available(self) -> bool:
        return super().available() and bool(self.system.files)

    def measure(self) -> str:
        stored = self.system.replicas
        now = [one for one in stored if self._is_current(one)]
        nodes = self.system.machine.all
        self.is_outdated = bool(stored) and not now
        if self.is_outdated:
            self.share, on = self.mirrored, format_list(_nodes_of(stored))
            return f"the store has replicas on node {on}, of the file as it was before it changed"
        there = _nodes_of(one for one in now if one.policy == MIRROR)
        lacking = set(nodes) - there
        self.share = self.mirrored * len(lacking) / len(nodes)
        if not there or not lacking:
            return ""
        on, not_on = format_list(there), format_list(lacking)
        return f"the store has replicas on node {on}, none on node {not_on}"

    def _is_current(self, entry: Entry) -> bool:
        """Compare files as they are open here, without reading what they begin with."""
        opened = {Identity.of(os.fstat(file.fd))[:-1] for file in self.system.files}
        return opened <= {one[:-1] for one in entry.model.identities}

    def fix(self) -> str:
        again = f"numaload mirror {self.file}"
        return f"numaload release {self.file}; {again}" if self.is_outdated else again

    def undo(self) -> str:
        return f"numaload release {self.file}"


class Refused(_Nodes):
    id, title = "NL307", "Memory cannot be bound to nodes here"
    source = "mbind(2); moby profiles/seccomp/default.json, 2026-11"
    why = (
        "The container or the kernel refuses mbind. Engines then keep one copy of the weights,"
        " wherever it lands; numaload places replicas by threads on each node instead."
    )
    first = (StaleReplicas,)

    def measure(self) -> str:
        self.share = self.mirrored
        return self.system.refused

    def fix(self) -> str:
        return (
            "start the container with --cap-add SYS_NICE (docker, podman; in Kubernetes"
            " securityContext.capabilities.add: [SYS_NICE]); in a seccomp profile of your own allow"
            " mbind, set_mempolicy and get_mempolicy; gVisor has no such calls"
        )


class NoLibnuma(_Nodes):
    id, title = "NL301", "libnuma is missing: engines do not mirror or bind"
    source = "ktransformers CMake USE_NUMA, vllm #55416, llama.cpp #27986, 2026-09"
    why = (
        "Engines such as ktransformers, vLLM and forks of llama.cpp ask libnuma to place weights."
        " Some go on silently without it, with one copy for all nodes; one that was built without"
        " it must be built again. numaload mirror and numaload exec work without it."
    )
    root, first = True, (StaleReplicas, Refused)

    def measure(self) -> str:
        if self.system.binding == LIBNUMA:
            return ""
        self.share, count = self.mirrored, len(self.system.machine.all)
        return (
            f"{LIBNUMA} does not load; with one copy of the weights each of {count} nodes reads"
            f" {(count - 1) / count:.0%} of it from another node's memory"
        )

    def fix(self) -> str:
        other = f"{LIBNUMA_HINT}  # or the package of this distribution that has {LIBNUMA}"
        command = self._commands()[0]
        remark = "where the engine runs; then restart it with its NUMA option"
        return f"{command}  # {remark}" if command else other

    def undo(self) -> str:
        return self._commands()[1]

    def _commands(self) -> tuple[str, str]:
        with suppress(Unknown):
            for line in self.system.text("/etc/os-release").splitlines():
                name, _, value = line.partition("=")
                if name in ("ID", "ID_LIKE"):
                    for word in value.strip("\"'").split():
                        if word in PACKAGES:
                            return PACKAGES[word]
        return "", ""


class OtherOpinion(_Nodes):
    id, title = "NL302", "libnuma sees other nodes than the kernel"
    source = "numactl #232; what libnuma 2.0.16 did in a guest, 2026-10"
    why = (
        "Engines that ask libnuma place weights by its nodes, which may be the wrong ones."
        " numaload reads /sys and is not concerned."
    )

    def measure(self) -> str:
        said = self.system.opinion
        return "" if said.startswith(("none, ", "libnuma agrees")) else said

    def fix(self) -> str:
        node = min(self.system.machine.all)
        return (
            f"numaload exec --node {node} {self.file} -- PROGRAM -m {{model}}  # instead of the"
            " engine's own NUMA option; libnuma 2.0.19 or later may mend it too, but not every"
            " distribution has that: Debian 12 ends at 2.0.16"
        )


class ManyNodes(_Nodes):
    id, title = "NL303", "A mirror takes more copies than there are sockets"
    source = "ktransformers #1147, #637: a copy per SNC node, out of memory, 2025"
    why = (
        "The BIOS splits each socket into nodes (NPS of AMD, SNC of Intel). Memory of another node"
        " in the same socket is almost as fast, so one copy for each socket, spread over its nodes,"
        " is enough. Splitting pays for several processes, one on each node."
    )

    def available(self) -> bool:
        # Of guests all nodes may be in one socket, however far they are.
        several = [group for group in self.system.machine.sockets if len(group) > 1]
        return bool(several) and not any(map(self.are_far, several))

    def measure(self) -> str:
        machine, size = self.system.machine, self.system.size
        groups = machine.sockets
        self.nodes, self.sockets = len(machine.all), len(groups)
        room = {n: memory.node_free(n, self.system.sys, self.system.proc) for n in machine.all}
        known = {node: size if free is None else free for node, free in room.items()}
        short = [node for node, free in known.items() if free < size]
        self.fits = all(sum(known[node] for node in group) >= size for group in groups)
        if self.nodes <= 2 and not short:
            return ""
        lacks = f"; {_gib(size)} do not fit on node {format_list(short)}" if short else ""
        made, enough = _copies(self.nodes, size), _copies(self.sockets, size)
        return (
            f"{self.nodes} nodes in {counted(self.sockets, 'socket')}{self._mode()}: numaload"
            f" mirror makes {made} where {enough} would do{lacks}"
        )

    def _mode(self) -> str:
        """Name the setting of the BIOS, by the processor and the nodes of a socket."""
        each = max(map(len, self.system.machine.sockets))
        if "EPYC" in self.system.processor:
            return f", NPS{each}" if each <= 4 else ", L3 cache as NUMA domain"
        return f", SNC{each}" if "Intel" in self.system.processor else ""

    def price(self) -> Price | None:
        """Return how long the copies take that are too many."""
        if not self.system.size:
            return None
        return Price((self.nodes - self.sockets) * self.system.size / COPIED, ESTIMATED, COPY)

    def fix(self) -> str:
        return f"numaload mirror {'--per socket' if self.fits else '--policy stripe'} {self.file}"

    def undo(self) -> str:
        return f"numaload release {self.file}"


class _Setting(_Nodes):
    """A check of a kernel setting whose lowest bit is to be off. ``name``: as sysctl has it."""

    root, name = True, ""

    def value(self) -> int:
        """Return it; 0 where this kernel has no such setting."""
        path = f"/proc/sys/{self.name.replace('.', '/')}"
        if self.system.exists(os.path.dirname(path)) and not self.system.exists(path):
            return 0
        return self.system.number(path)

    def measure(self) -> str:
        self.before = self.value()
        return f"{self.name} is {self.before}" if self.before & 1 else ""

    def fix(self) -> str:
        return f"sysctl -w {self.name}={self.before & ~1}"

    def undo(self) -> str:
        return f"sysctl -w {self.name}={self.before}"


class Balancing(_Setting):
    id, title = "NL304", "The kernel moves pages between nodes (numa_balancing)"
    source = "Linux Documentation/admin-guide/sysctl/kernel.rst; llama.cpp #14969, 2025-08"
    why = (
        "The kernel unmaps pages to see which node touches them, and moves them. That"
        " interrupts threads, and memory of engines wanders. Bound memory and files that are"
        " mapped read-only stay where they are."
    )
    name = "kernel.numa_balancing"
    # Share of a thread's time: 256 MiB of 4 KiB pages a second are unmapped to see who touches
    # them (scan_size_mb, scan_period_min_ms); a fault of 1 us each is assumed.
    share = (256 << 20) / 4096 * 1e-6


class ZoneReclaim(_Setting):
    id, title = "NL305", "Page cache is dropped though other nodes have room"
    source = "Linux Documentation/admin-guide/sysctl/vm.rst, zone_reclaim_mode, 2026-11"
    why = (
        "When a node is full, the kernel drops page cache there before it uses free memory of"
        " the others. So a model larger than a node is never all in RAM, and is read again."
    )
    name = "vm.zone_reclaim_mode"

    def measure(self) -> str:
        machine, size = self.system.machine, self.system.size
        self.largest = max(machine.nodes[node].memory_total for node in machine.all)
        seen = super().measure()
        if not seen or not size:
            return seen
        sizes = f"the file has {_gib(size)}, the largest node {_gib(self.largest)}"
        return f"{seen}; {sizes}" if size > self.largest else ""

    def price(self) -> Price | None:
        """Return how long it takes to read again what one node does not hold."""
        size, disk = self.system.size, self.system.speeds.disk
        return Price((size - self.largest) / disk) if size and self.largest and disk else None


class LeftOut(_Nodes):
    id, title = "NL306", "This process may use only some of the nodes"
    source = "Linux Documentation/admin-guide/cgroup-v2.rst, cpuset, 2026-11"
    why = (
        "Memory and bandwidth of the other nodes are not used. That is right for a model that fits"
        " on the nodes that may be used, with an engine that runs on their CPUs."
    )

    def available(self) -> bool:
        return len(self._whole()) > 1

    def _whole(self) -> list[Node]:
        return [n for n in self.system.machine.nodes.values() if n.cpus and n.has_memory]

    def measure(self) -> str:
        out = [n for n in self._whole() if not (n.memory_allowed and n.usable_cpus)]
        self.share = len(out) / len(self._whole())
        return "; ".join(f"node {node.id}: {node.why_not}" for node in out)

    def fix(self) -> str:
        cpus = frozenset[int]().union(*(node.cpus for node in self._whole()))
        return (
            f"{self._update(cpus, (node.id for node in self._whole()))}  # on the host, of docker;"
            " elsewhere start it without taskset, numactl or a cpuset"
        )

    def undo(self) -> str:
        machine = self.system.machine
        return self._update(machine.cpus, machine.usable)

    def _update(self, cpus: Iterable[int], nodes: Iterable[int]) -> str:
        which = f"--cpuset-cpus={format_list(cpus)} --cpuset-mems={format_list(nodes)}"
        return f"docker update {which} CONTAINER"


class _Cached(_Nodes):
    """A check of the nodes that the page cache of the file is on."""

    source = "llama.cpp #1437, #11744, #27986: page cache stays where it was first read, 2026-08"
    LEAST = 1 / 8  # share of the model; where less is in RAM, its place matters little

    def cached(self) -> dict[int, int]:
        """Return {node: bytes}; nothing where little is in RAM."""
        on = self.system.cache_nodes
        return on if sum(on.values()) > self.LEAST * self.system.size else {}

    def fix(self) -> str:
        if self.system.device.kind == "memory":  # of tmpfs: evicting would lose it
            names = [file.path for file in self.system.files] or [self.system.path or ""]
            pairs = [(shlex.quote(name), shlex.quote(unused(f"{name}.new"))) for name in names]
            copy = "numactl --interleave=all cp {0} {1} && mv {1} {0}"
            return " && ".join(copy.format(*pair) for pair in pairs)
        warm = f"numaload prewarm --nodes all --policy interleave {self.file}"
        return f"numaload evict {self.file} && {warm}"


class FarCache(_Cached):
    id, title = "NL312", "The file's page cache is on a node without CPUs"
    why = "Memory of CXL cards, persistent memory or a GPU is slower to read than DRAM."
    SHARE = 0.1  # of the page cache

    def available(self) -> bool:
        # Memory in the package of a Xeon Max is a node without CPUs too, and the fastest.
        return bool(self.far_nodes()) and "Xeon(R) CPU Max" not in self.system.processor

    def measure(self) -> str:
        on, far = self.cached(), self.far_nodes()
        self.nbytes = sum(nbytes for node, nbytes in on.items() if node in far)
        if self.nbytes <= self.SHARE * sum(on.values()):
            return ""
        nodes = format_list(node for node in on if node in far)
        return f"{size_of(self.nbytes)} of {size_of(sum(on.values()))} in RAM are on node {nodes}"

    def price(self) -> Price | None:
        return Price(self.nbytes / FAR, ESTIMATED, PASS)


class CacheOnOneNode(_Cached):
    id, title = "NL308", "The file's page cache is on one node"
    why = (
        "Page cache stays on the node whose thread first read it. All others read it over the"
        " interconnect, from the memory channels of one node."
    )
    SHARE = 0.8  # of the page cache

    def measure(self) -> str:
        on, machine = self.cached(), self.system.machine
        self.share = ON_ONE_NODE if self.are_far(machine.all) else len(machine.all) - 1
        node, most = max(on.items(), key=lambda one: one[1], default=(0, 0))
        if most <= self.SHARE * sum(on.values()) or node in self.far_nodes():
            return ""
        share, all_of_it = most / sum(on.values()), size_of(sum(on.values()))
        return f"{share:.0%} of {all_of_it} in RAM are on node {node}"


class NoMemory(_Nodes):
    id, title = "NL311", "A node with CPUs has no memory"
    source = "Linux Documentation/mm/numa.rst, memoryless nodes, 2026-11"
    why = "Its threads always use memory of another node, and its memory channels are idle."

    def available(self) -> bool:
        return len(self.system.machine.nodes) > 1

    def measure(self) -> str:
        """Look for CPUs whose nearest memory is that of other CPUs."""
        machine = self.system.machine
        having = [node.id for node in machine.nodes.values() if node.has_memory]
        with_cpus = [node for node in machine.nodes.values() if node.cpus]
        lacking = [node.id for node in with_cpus if having and not node.has_memory]
        nearest = {node: machine.nodes[machine.nearest(node, having)] for node in lacking}
        found = {node: near.id for node, near in nearest.items() if near.cpus}
        self.share = len(found) / max(1, len(with_cpus))
        pairs = found.items()
        return "; ".join(f"node {node} has none, and uses node {near}'s" for node, near in pairs)

    def fix(self) -> str:
        return (
            "move memory modules so that each node has some; or choose fewer nodes in the BIOS:"
            " NPS1, SNC off"
        )


def _nodes_of(entries: Iterable[Entry]) -> set[int]:
    return {node for entry in entries for node in entry.nodes}


def _gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"


def _copies(count: int, size: int) -> str:
    each = "1 copy" if count == 1 else f"{count} copies"
    return f"{each} ({_gib(count * size)})" if size else each


CHECKS: tuple[type[Check], ...] = (
    NoLibnuma,
    OtherOpinion,
    ManyNodes,
    Balancing,
    ZoneReclaim,
    LeftOut,
    Refused,
    CacheOnOneNode,
    StaleReplicas,
    NoMemory,
    FarCache,
)
