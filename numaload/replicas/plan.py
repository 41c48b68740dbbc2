"""Whether replicas fit, with numbers, before a page is touched.

Memory bound strictly to a full node is no error but an OOM kill, so this is asked first.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from numaload.errors import NodeMemoryError, StoreError
from numaload.numa import memory
from numaload.numa.lists import Group
from numaload.numa.syscalls import PAGE
from numaload.numa.topology import Topology
from numaload.storage import logout, userdir
from numaload.storage.known import Model

PRIVATE, STORED, HELD = "private", "stored", "held"  # where replicas are kept
SMALL, SMALL_SHARE = 256 << 10, 1 << 18  # bytes of an entry without its replicas, and one for these
LEAST_FREE = 32 << 20  # on a node that is being filled, on top of what free_on leaves
PAGE_CACHE = (
    "the rest is page cache, which the kernel gives up only for memory that is bound: allow"
    " binding, or drop the cache"
)


@dataclass(frozen=True)
class Need:
    """One limit and what would be taken of it, in bytes. free: None where that is unknown."""

    name: str
    needed: int
    free: int | None
    node: int | None = None
    hint: str = ""  # what else can be done where it does not fit

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.name}: needs {_gib(self.needed)}, the kernel does not say what it has"
        sign = "fits" if self.fits else "does NOT fit"
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.name}: needs {_gib(self.needed)}, has {_gib(self.free)}: {sign}{hint}"


@dataclass(frozen=True)
class Plan:
    """What would be built: ``builds`` is [(model, groups of nodes still without a replica)]."""

    builds: tuple[tuple[Model, tuple[Group, ...]], ...]
    needs: tuple[Need, ...]

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    @property
    def nbytes(self) -> int:
        return sum(footprint(model) * len(groups) for model, groups in self.builds)

    def check(self) -> None:
        """Raises: NodeMemoryError naming every limit that is too small."""
        short = [need for need in self.needs if not need.fits]
        if short:
            text = "; ".join(str(need) for need in short)
            raise NodeMemoryError(
                f"replicas do not fit, nothing was built: {text}",
                node=short[0].node,
                needed=short[0].needed,
                free=short[0].free or 0,
            )

    def to_dict(self) -> dict[str, Any]:
        builds = [
            {"paths": m.paths, "size": m.size, "nodes": nodes_of(groups), "replicas": groups}
            for m, groups in self.builds
        ]
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        return {"builds": builds, "needs": needs, "nbytes": self.nbytes, "fits": self.fits}


def plan(
    builds: Sequence[tuple[Model, Sequence[Group]]],
    machine: Topology,
    *,
    kept: str,
    bound: bool = True,
) -> Plan:
    """Compare what these replicas take with every limit that they count against.

    kept: PRIVATE, HELD by a process, or STORED: then the store's tmpfs is a limit too.
    bound: see ``build``.
    """
    per_node: dict[int, int] = {}
    for model, groups in builds:
        for group in groups:
            for node in group:
                per_node[node] = per_node.get(node, 0) + -(-footprint(model) // len(group))
    total = sum(footprint(model) * len(groups) for model, groups in builds)
    needs = [_node_need(node, per_node[node], machine, bound=bound) for node in sorted(per_node)]
    if total:
        needs += [
            Need(limit.name, total, max(0, limit.free - LEAST_FREE))
            for limit in memory.known_limits()
        ]
        if kept != PRIVATE:
            # A manifest, folders and links come on top, and are all that held replicas take there.
            small = SMALL + total // SMALL_SHARE
            needs.append(_store_need(small if kept == HELD else total + small))
    return Plan(tuple((m, tuple(g)) for m, g in builds), tuple(needs))


def _node_need(node: int, needed: int, machine: Topology, *, bound: bool) -> Need:
    # Filling stops at LEAST_FREE: what fits only without it would be rolled back at its end.
    free, strictly = free_on(node, machine, bound=bound), free_on(node, machine)
    if free is None or strictly is None:
        return Need(f"node {node}", needed, None, node)
    free, hint = max(0, free - LEAST_FREE), ""
    if not bound and free < needed <= strictly - LEAST_FREE:
        hint = PAGE_CACHE
    return Need(f"node {node}", needed, free, node, hint)


def nodes_of(groups: Sequence[Group]) -> list[int]:
    """All nodes that these replicas are on."""
    return sorted({node for group in groups for node in group})


def footprint(model: Model) -> int:
    """Bytes of memory that one replica takes: whole pages per file."""
    return sum(-(-identity.size // PAGE) * PAGE for identity in model.identities)


def free_on(node: int, machine: Topology, *, bound: bool = True) -> int | None:
    """Bytes that may be put on this node: if not bound, page cache there makes no room.

    None where the kernel does not say.
    """
    whole = memory.machine_available()
    if whole and [n.id for n in machine.nodes.values() if n.has_memory] == [node]:
        # The only memory there is: the kernel's own estimate is better than one from its parts.
        total = machine.nodes[node].memory_total
        return max(0, whole.free - memory.reserve(total))
    return memory.node_free(node) if bound else memory.node_unused(node)


def _store_need(needed: int) -> Need:
    try:
        where = userdir.path()
        while not os.path.isdir(where) and where != "/":
            where = os.path.dirname(where)
        userdir.check_tmpfs(where)
        with userdir.named(where):
            status = os.statvfs(where)
            free = status.f_bavail * status.f_frsize
            hint = "" if needed <= free else logout.tmpfs_limit_note(where, needed)
    except StoreError as error:
        return Need("the store", needed, 0, hint=str(error))
    return Need(f"tmpfs {where}", needed, free, hint=hint)


def _gib(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB)"
