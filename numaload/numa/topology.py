"""NUMA nodes from /sys, cut down to what this process may use. Needs no libnuma.

Node ids are sets, never ranges: they have holes, nodes lack CPUs (CXL, GPU memory) or memory, and
inside a container /sys shows the host's. Source: Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from numaload.errors import UsageError
from numaload.numa.affinity import ALLOWED
from numaload.numa.lists import BLANK, format_list, parse_list, parse_map, select
from numaload.numa.memory import fields


@dataclass(frozen=True)
class Node:
    """``cpus``: all online CPUs of the node; ``usable_cpus``: those this process may run on."""

    id: int
    cpus: frozenset[int]
    usable_cpus: frozenset[int]
    memory_total: int  # bytes
    memory_free: int  # bytes, as the kernel counts it: without what could be reclaimed
    memory_allowed: bool
    distances: dict[int, int] = field(default_factory=dict)  # {node: SLIT distance, 10 is local}
    packages: tuple[int, ...] = ()  # sockets that its CPUs sit in

    @property
    def has_memory(self) -> bool:
        return self.memory_total > 0

    @property
    def why_not(self) -> str:
        """What keeps this node from being used like any other, or an empty string."""
        if not self.has_memory:
            return "has no memory"
        if not self.memory_allowed:
            return "its memory is not allowed to this process (cpuset)"
        if not self.cpus:
            return "has no CPUs"
        if not self.usable_cpus:
            return "none of its CPUs are allowed to this process (affinity or cpuset)"
        return ""


@dataclass(frozen=True)
class Topology:
    nodes: dict[int, Node]
    source: str  # where this was read

    @property
    def all(self) -> list[int]:
        """Nodes that ``--nodes all`` means: the usable memory nearest to each allowed CPU.

        A node with both is its own nearest. CPUs whose node has no memory, or none that this
        process may use, are served by another, which may have no CPUs itself.
        """
        usable = self.usable
        with_cpus = [n.id for n in self.nodes.values() if n.usable_cpus and usable]
        return sorted({self.nearest(node, usable) for node in with_cpus})

    @property
    def usable(self) -> list[int]:
        """Nodes that may be named: with memory that is allowed, CPUs or not."""
        return [n.id for n in self.nodes.values() if n.has_memory and n.memory_allowed]

    @property
    def left_out(self) -> dict[int, str]:
        """{node: why ``all`` does not include it}."""
        included = self.all
        return {n.id: n.why_not for n in self.nodes.values() if n.id not in included}

    @property
    def cpus(self) -> frozenset[int]:
        """All CPUs this process may run on."""
        return frozenset().union(*(n.usable_cpus for n in self.nodes.values()))

    def node_of_cpu(self, cpu: int) -> int | None:
        return next((n.id for n in self.nodes.values() if cpu in n.cpus), None)

    def local(self) -> int:
        """The usable node nearest to the CPUs that the calling thread may run on now."""
        cpus = os.sched_getaffinity(0)
        here = [n for n in self.nodes.values() if n.cpus & cpus]
        most = max(here or self.nodes.values(), key=lambda n: len(n.cpus & cpus))
        return self.nearest(most.id, self.usable)

    def nearest(self, node: int, among: Collection[int]) -> int:
        """The node among these with the smallest distance from ``node`` (itself if it is one)."""
        if not among:
            raise UsageError("no usable node to choose from")
        distances = self.nodes[node].distances
        return min(among, key=lambda other: (other != node, distances.get(other, 255), other))

    def threads_node(self, node: int) -> int:
        """Where the threads run that work for ``node``: itself, or the nearest with CPUs."""
        return self.nearest(node, [n.id for n in self.nodes.values() if n.usable_cpus])

    def select(self, nodes: str | int | Iterable[int]) -> list[int]:
        """Node ids from ``"all"``, ``"0,2-3"``, ``"!1"``, ``"local"``, an id or ids.

        Raises: UsageError for an id that is not usable here.
        """
        if not isinstance(nodes, str):
            ids = [nodes] if isinstance(nodes, int) else sorted(set(nodes))
            nodes = format_list(ids)
        return select(nodes, everything=self.all, known=self.usable, local=self.local())

    def to_dict(self) -> dict[str, Any]:
        rows, left_out = [], self.left_out
        for node in self.nodes.values():
            row = asdict(node) | {"why_not": left_out.get(node.id, "")}
            row |= {key: sorted(row[key]) for key in ("cpus", "usable_cpus")}
            rows.append(row)
        return {"nodes": rows, "all": self.all, "source": self.source}


def topology(
    sys_root: str = "/sys", proc_root: str = "/proc", allowed: frozenset[int] | None = None
) -> Topology:
    """Read the machine. The roots and ``allowed`` (CPUs) can be replaced by recorded ones."""
    base = f"{sys_root}/devices/system/node"
    cpus = ALLOWED if allowed is None else allowed
    ids = _node_ids(base)
    if not ids:
        return _single_node(proc_root, cpus)
    mems = _allowed_mems(proc_root)
    distances = _distances(base, ids)
    nodes = {i: _node(f"{base}/node{i}", i, distances[i], cpus, mems) for i in ids}
    return Topology(nodes, base)


def _read(path: str) -> str | None:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip(BLANK)
    except OSError:
        return None


def _node_ids(base: str) -> list[int]:
    try:
        present = {
            int(name[4:]) for name in os.listdir(base) if name[:4] == "node" and name[4:].isdigit()
        }
    except OSError:
        return []
    online = _read(f"{base}/online")
    return sorted(present & set(parse_list(online)) if online else present)


def _allowed_mems(proc_root: str) -> frozenset[int] | None:
    for line in (_read(f"{proc_root}/self/status") or "").splitlines():
        if line.startswith("Mems_allowed_list:"):
            return frozenset(parse_list(line.partition(":")[2]))
    return None


def _node(
    path: str,
    node: int,
    distances: dict[int, int],
    allowed: frozenset[int],
    mems: frozenset[int] | None,
) -> Node:
    cpus = frozenset(_cpus(path))
    memory = fields(f"{path}/meminfo")
    return Node(
        id=node,
        cpus=cpus,
        usable_cpus=cpus & allowed,
        memory_total=memory.get("MemTotal", 0),
        memory_free=memory.get("MemFree", 0),
        memory_allowed=mems is None or node in mems,
        distances=distances,
        packages=_packages(f"{path}/../../cpu", cpus),
    )


def _cpus(path: str) -> list[int]:
    text = _read(f"{path}/cpulist")
    if text is not None:
        return parse_list(text)
    return parse_map(_read(f"{path}/cpumap") or "")  # old POWER kernels have only this


def _distances(base: str, ids: list[int]) -> dict[int, dict[int, int]]:
    """{node: {other: distance}}. A row lists the online nodes in the order of ids, not by id."""
    possible = parse_list(_read(f"{base}/possible") or "")
    distances: dict[int, dict[int, int]] = {}
    for node in ids:
        row = [int(word) for word in (_read(f"{base}/node{node}/distance") or "").split()]
        # Rows of other lengths cannot be told apart: better no distance than a wrong one.
        columns = next((order for order in (ids, possible) if len(order) == len(row)), [])
        pairs = zip(columns, row if columns else [], strict=True)
        distances[node] = {other: distance for other, distance in pairs if other in ids}
    return distances


def _packages(base: str, cpus: Collection[int]) -> tuple[int, ...]:
    """Sockets; -1, where the firmware does not say, is none."""
    texts = (_read(f"{base}/cpu{cpu}/topology/physical_package_id") or "" for cpu in cpus)
    return tuple(sorted({int(text) for text in texts if text.isdecimal()}))


def _single_node(proc_root: str, cpus: frozenset[int]) -> Topology:
    """A kernel without NUMA support: everything is node 0."""
    memory = fields(f"{proc_root}/meminfo")
    total, free = memory.get("MemTotal", 0), memory.get("MemFree", 0)
    node = Node(0, cpus, cpus, total, free, memory_allowed=True, distances={0: 10})
    return Topology({0: node}, f"{proc_root}/meminfo")
