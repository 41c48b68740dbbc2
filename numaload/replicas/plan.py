"""Whether replicas fit, with numbers, before a page is touched.

Memory bound strictly to a full node is no error but an OOM kill, so this is asked first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numaload.errors import NodeMemoryError
from numaload.numa import memory
from numaload.numa.syscalls import PAGE
from numaload.numa.topology import Topology
from numaload.storage import userdir
from numaload.storage.known import Model

LEAST_FREE = 32 << 20  # on a node that is being filled, on top of what free_on leaves


@dataclass(frozen=True)
class Need:
    """One limit and what would be taken of it, in bytes."""

    name: str
    needed: int
    free: int
    node: int | None = None

    @property
    def fits(self) -> bool:
        return self.needed <= self.free

    def __str__(self) -> str:
        sign = "fits" if self.fits else "does NOT fit"
        return f"{self.name}: needs {_gib(self.needed)}, has {_gib(self.free)}: {sign}"


@dataclass(frozen=True)
class Plan:
    """What would be built: ``builds`` is [(model, nodes still without a replica of it)]."""

    builds: tuple[tuple[Model, tuple[int, ...]], ...]
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    @property
    def nbytes(self) -> int:
        return sum(footprint(model) * len(nodes) for model, nodes in self.builds)

    def check(self) -> None:
        """Raises: NodeMemoryError naming every limit that is too small."""
        short = [need for need in self.needs if not need.fits]
        if short:
            text = "; ".join(str(need) for need in short)
            raise NodeMemoryError(
                f"replicas do not fit, nothing was built: {text}",
                node=short[0].node,
                needed=short[0].needed,
                free=short[0].free,
            )

    def to_dict(self) -> dict[str, Any]:
        builds = [{"paths": m.paths, "size": m.size, "nodes": nodes} for m, nodes in self.builds]
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return {"builds": builds, "needs": needs, "nbytes": self.nbytes, "fits": self.fits}


def plan(builds: Sequence[tuple[Model, Sequence[int]]], machine: Topology, *, shared: bool) -> Plan:
    """Compare what these replicas take with every limit that they count against.

    shared: they go to the store's tmpfs, whose size is a limit too.
    """
    per_node: dict[int, int] = {}
    for model, nodes in builds:
        for node in nodes:
            per_node[node] = per_node.get(node, 0) + footprint(model)
    total = sum(per_node.values())
    # Filling stops at LEAST_FREE: what fits only without it would be rolled back at its end.
    room = {n: max(0, free_on(n, machine) - LEAST_FREE) for n in per_node}
    needs = [Need(f"node {n}", b, room[n], n) for n, b in sorted(per_node.items())]
    if total:
        limits = [memory.machine_available(), *memory.cgroup_limits()]
        if shared:
            limits.append(_store_room())
        needs += [Need(limit.name, total, limit.free) for limit in limits]
    return Plan(tuple((m, tuple(n)) for m, n in builds), tuple(needs))


def footprint(model: Model) -> int:
    """Bytes of memory that one replica takes: whole pages per file."""
    return sum(-(-identity.size // PAGE) * PAGE for identity in model.identities)


def free_on(node: int, machine: Topology) -> int:
    """Bytes that may be bound to this node."""
    if [n.id for n in machine.nodes.values() if n.has_memory] == [node]:
        # The only memory there is: the kernel's own estimate is better than one from its parts.
        total = machine.nodes[node].memory_total
        return max(0, memory.machine_available().free - memory.reserve(total))
    return memory.node_free(node)


def _store_room() -> memory.Limit:
    where = userdir.path()
    while not os.path.isdir(where) and where != "/":
        where = os.path.dirname(where)
    status = os.statvfs(where)
    return memory.Limit(f"tmpfs {where}", status.f_bavail * status.f_frsize)


def _gib(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB)"
