"""NUMA nodes from /sys, cut down to what this process may use. Needs no libnuma.

Node ids are sets, never ranges: they have holes, nodes lack CPUs (CXL, GPU memory) or memory, and
inside a container /sys shows the host's. Source: Documentation/ABI/stable/sysfs-devices-node.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from numaload import trace
from numaload.errors import UsageError
from numaload.linux.cgroups import cpu_quota
from numaload.linux.lists import Group, format_list, parse_map, select
from numaload.linux.sysfs import SysFiles
from numaload.machine import affinity
from numaload.machine.memory import fields

PER = ("node", "socket")  # what there is one replica for


@dataclass(frozen=True)
class Node:
    """``cpus``: all online CPUs of the node; ``usable_cpus``: those this process may run on."""

    id: int
    cpus: frozenset[int]
    usable_cpus: frozenset[int]
    has_memory: bool
    memory_total: int  # bytes; 0 too where the kernel does not say
    memory_free: int  # bytes, as the kernel counts it: without what could be reclaimed
    memory_allowed: bool
    distances: dict[int, int] = field(default_factory=dict)  # {node: SLIT distance, 10 is local}
    packages: tuple[int, ...] = ()  # sockets that its CPUs sit in

    @property
    def why_not(self) -> str:
        """Say what keeps this node from being used like any other, or return an empty string."""
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
    problems: tuple[str, ...] = ()  # files that could not be understood, and what was taken instead
    quota: float | None = None  # CPUs' time that the cgroups allow, as in 1.5

    @property
    def all(self) -> list[int]:
        """Return the nodes that ``--nodes all`` means: the usable memory nearest to each CPU.

        A node with both is its own nearest. CPUs whose node has no memory, or none that this
        process may use, are served by another, which may have no CPUs itself.
        """
        usable = self.usable
        with_cpus = [n.id for n in self.nodes.values() if n.usable_cpus and usable]
        return sorted({self.nearest(node, usable) for node in with_cpus})

    @property
    def usable(self) -> list[int]:
        """Return the nodes that may be named: with memory that is allowed, CPUs or not."""
        return [n.id for n in self.nodes.values() if n.has_memory and n.memory_allowed]

    @property
    def left_out(self) -> dict[int, str]:
        """Return {node: why ``all`` does not include it}."""
        included = self.all
        return {n.id: n.why_not for n in self.nodes.values() if n.id not in included}

    def groups(self, nodes: Sequence[int], per: str = "node") -> list[Group]:
        """Return a group of nodes for each replica: the nodes that share it.

        per: "node", or "socket": the nodes of one physical package together. A node without CPUs
        belongs to the socket of the nearest node with CPUs. A node stays alone where the firmware
        does not say its socket, where it spans several, and where several sockets are nearest.
        Sorted by their first ids. Raises: UsageError for another ``per``.
        """
        if per not in PER:
            raise UsageError(f"per {per!r}: expected {' or '.join(PER)}")
        found: dict[tuple[str, int], list[int]] = {}
        for node in sorted(set(nodes)):
            socket = self._socket(node) if per == "socket" else None
            found.setdefault(("node", node) if socket is None else ("socket", socket), []).append(
                node
            )
        return sorted(tuple(group) for group in found.values())

    @property
    def sockets(self) -> list[Group]:
        """Return ``all``, the nodes of one socket together."""
        return self.groups(self.all, "socket")

    @property
    def copies_note(self) -> str:
        """Say what ``all`` costs where sockets have several nodes, or return an empty string."""
        every, sockets = len(self.all), len(self.sockets)
        if sockets == every:
            return ""
        each = "each interleaved over its socket's nodes" if sockets > 1 else "interleaved over all"
        return (
            f"all is {every} nodes in {sockets} socket{'s' * (sockets > 1)}: {every} copies;"
            f" --per socket makes {sockets}, {each}"
        )

    def _socket(self, node: int) -> int | None:
        here = self.nodes[node]
        near = [here] if here.cpus else self._nearest_with_cpus(here)
        packages = {near_one.packages for near_one in near}
        (only,) = packages if len(packages) == 1 else ((),)
        return only[0] if len(only) == 1 else None

    def _nearest_with_cpus(self, node: Node) -> list[Node]:
        """Return all nodes with CPUs that are equally near; none where distances are unknown."""
        known = [n for n in self.nodes.values() if n.cpus and n.id in node.distances]
        nearest = min((node.distances[n.id] for n in known), default=0)
        return [n for n in known if node.distances[n.id] == nearest]

    @property
    def cpus(self) -> frozenset[int]:
        """Return all CPUs this process may run on."""
        return frozenset().union(*(n.usable_cpus for n in self.nodes.values()))

    def node_of_cpu(self, cpu: int) -> int | None:
        return next((n.id for n in self.nodes.values() if cpu in n.cpus), None)

    def local(self) -> int:
        """Return the usable node nearest to the CPUs that the calling thread may run on now."""
        cpus = os.sched_getaffinity(0)
        here = [n for n in self.nodes.values() if n.cpus & cpus]
        most = max(here or self.nodes.values(), key=lambda n: len(n.cpus & cpus))
        return self.nearest(most.id, self.usable)

    def nearest(self, node: int, among: Collection[int]) -> int:
        """Return the node among these that is nearest to ``node`` (itself if it is one)."""
        if not among:
            raise UsageError("no usable node to choose from")
        here = self.nodes.get(node)  # stored replicas may be of a node that is gone
        distances = here.distances if here else {}
        return min(among, key=lambda other: (other != node, distances.get(other, 255), other))

    def threads_node(self, node: int) -> int:
        """Return the node whose CPUs work for ``node``: itself, or the nearest with CPUs."""
        return self.nearest(node, [n.id for n in self.nodes.values() if n.usable_cpus])

    def cpus_of(self, nodes: Iterable[int]) -> frozenset[int]:
        """Return the CPUs that this process may use beside these nodes."""
        return frozenset().union(*(self.nodes[self.threads_node(n)].usable_cpus for n in nodes))

    def select(self, nodes: str | int | Iterable[int]) -> list[int]:
        """Return node ids from ``"all"``, ``"0,2-3"``, ``"!1"``, ``"local"``, an id or ids.

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
        sockets = self.sockets
        return {
            "nodes": rows,
            "all": self.all,
            "sockets": [list(group) for group in sockets],
            "copies": {"node": len(self.all), "socket": len(sockets)},
            "cpu_quota": self.quota,
            "problems": list(self.problems),
            "source": self.source,
        }


@trace.spanned("topology")
def topology(
    sys_root: str = "/sys", proc_root: str = "/proc", allowed: frozenset[int] | None = None
) -> Topology:
    """Read the machine. The roots and ``allowed`` (CPUs) can be replaced by recorded ones."""
    base = f"{sys_root}/devices/system/node"
    files, quota = SysFiles(), cpu_quota(sys_root, proc_root)
    if allowed is None:
        allowed = affinity.allowed()
    nodes = _nodes(files, base, allowed, _allowed_mems(files, proc_root))
    source = base if nodes else f"{proc_root}/meminfo"
    nodes = nodes or {0: _single_node(files, sys_root, proc_root, allowed)}
    files.report()
    return Topology(nodes, source, tuple(files.problems), quota)


def _nodes(
    files: SysFiles, base: str, allowed: frozenset[int], mems: frozenset[int] | None
) -> dict[int, Node]:
    ids = _node_ids(files, base)
    listed = files.ids(f"{base}/has_memory")
    distances = _distances(files, base, ids)
    nodes = {}
    for i in ids:
        may = mems is None or i in mems
        has = listed is None or i in listed
        node = _node(files, f"{base}/node{i}", i, has, allowed, may, distances[i])
        if node is not None:
            nodes[i] = node
    if nodes and not any(node.cpus for node in nodes.values()):
        files.note(base, "no node shows its CPUs: all that this process may use count for each")
        nodes = {i: replace(n, cpus=allowed, usable_cpus=allowed) for i, n in nodes.items()}
    return nodes


def _node_ids(files: SysFiles, base: str) -> list[int]:
    names = [name[4:] for name in files.names(base) if name.startswith("node")]
    present = {int(name) for name in names if name.isascii() and name.isdecimal()}
    online = files.ids(f"{base}/online")
    if present and online is not None and present.isdisjoint(online):
        files.note(f"{base}/online", "names no node that has a folder: every folder was taken")
        online = None
    return sorted(present if online is None else present & set(online))


def _allowed_mems(files: SysFiles, proc_root: str) -> frozenset[int] | None:
    path = f"{proc_root}/self/status"
    for line in (files.text(path) or "").splitlines():
        if line.startswith("Mems_allowed_list:"):
            mems = files.listed(path, line.partition(":")[2])
            return None if mems is None else frozenset(mems)
    return None


def _node(
    files: SysFiles,
    path: str,
    node: int,
    listed: bool,
    allowed: frozenset[int],
    memory_allowed: bool,
    distances: dict[int, int],
) -> Node | None:
    """Read a node; None if it went away meanwhile.

    listed: whether the kernel's list of nodes with memory has it, if there is such a list.
    """
    seen = SysFiles()
    cpus = frozenset(_cpus(seen, path))
    memory = fields(f"{path}/meminfo")
    total = memory.get("MemTotal")
    if total is None:
        has = "it has memory, how much is unknown" if listed else "taken as without memory"
        seen.note(f"{path}/meminfo", f"no MemTotal for node {node}: {has}")
    packages = _packages(seen, f"{path}/../../cpu", cpus)
    if not os.path.isdir(path):
        return None
    files.problems += seen.problems
    return Node(
        id=node,
        cpus=cpus,
        usable_cpus=cpus & allowed,
        has_memory=listed if total is None else total > 0,
        memory_total=total or 0,
        memory_free=memory.get("MemFree", 0),
        memory_allowed=memory_allowed,
        distances=distances,
        packages=packages,
    )


def _cpus(files: SysFiles, path: str) -> list[int]:
    found = files.ids(f"{path}/cpulist")
    if found is None:  # old POWER kernels have only the map
        found = files.ids(f"{path}/cpumap", parse_map)
    return found or []


def _distances(files: SysFiles, base: str, ids: list[int]) -> dict[int, dict[int, int]]:
    """Return {node: {other: distance}}. A row lists the online nodes in the order of ids."""
    possible, online = files.ids(f"{base}/possible") or [], set(ids)
    distances: dict[int, dict[int, int]] = {}
    for node in ids:
        path = f"{base}/node{node}/distance"
        row = files.numbers(path) or []
        # Rows of other lengths cannot be told apart: better no distance than a wrong one.
        columns = next((order for order in (ids, possible) if len(order) == len(row)), [])
        if row and not columns:
            files.note(path, f"{len(row)} numbers for {len(ids)} nodes: taken as unknown")
        pairs = zip(columns, row if columns else [], strict=True)
        distances[node] = {other: distance for other, distance in pairs if other in online}
    return distances


def _packages(files: SysFiles, base: str, cpus: Collection[int]) -> tuple[int, ...]:
    """Return the sockets of these CPUs; -1, where firmware does not say, is left out."""
    found = (files.number(f"{base}/cpu{cpu}/topology/physical_package_id") for cpu in cpus)
    return tuple(sorted({package for package in found if package is not None and package >= 0}))


def _single_node(files: SysFiles, sys_root: str, proc_root: str, allowed: frozenset[int]) -> Node:
    """Return node 0 with everything: the kernel has no NUMA support, or may not be asked."""
    system = f"{sys_root}/devices/system"
    if os.path.isdir(f"{system}/node") or not os.path.isdir(f"{system}/cpu"):
        files.note(f"{system}/node", "shows no node: the whole machine is taken as one")
    # Affinity may name CPUs that are offline; a container may show other ids here than are used.
    cpus = allowed & frozenset(files.ids(f"{system}/cpu/online") or ()) or allowed
    memory = fields(f"{proc_root}/meminfo")
    total, free = memory.get("MemTotal", 0), memory.get("MemFree", 0)
    return Node(0, cpus, cpus, True, total, free, memory_allowed=True, distances={0: 10})
