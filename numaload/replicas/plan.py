"""Compare what replicas take with every limit, before a page is touched.

Memory bound strictly to a full node is no error but an OOM kill, so this is asked first.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from numaload import trace
from numaload.errors import NodeMemoryError, StoreError
from numaload.files.known import Model
from numaload.linux.lists import Group
from numaload.linux.placement import NodeRange
from numaload.linux.syscalls import PAGE
from numaload.machine import logout, memory, userdir
from numaload.machine.topology import Topology
from numaload.replicas.layout import Layout

PRIVATE, STORED, HELD = "private", "stored", "held"  # where replicas are kept
SMALL, SMALL_SHARE = 256 << 10, 1 << 18  # bytes of an entry without its replicas, and one for these
LEAST_FREE = 32 << 20  # on a node that is being filled, on top of what free_on leaves
PAGE_CACHE = (
    "the rest is page cache, which the kernel gives up only for memory that is bound: allow"
    " binding, or drop the cache"
)


OVER_BUDGET = "a larger budget: numaload store budget POOL SIZE"
NO_BUDGET: dict[int, int] = {}
TRUSTED = 256 << 20  # bytes filled, at most, between two looks at a node's free memory


class Build(NamedTuple):
    """Say what to build of a model: a replica of each layout, by its nodes."""

    model: Model
    layouts: Mapping[Group, Layout]

    @property
    def nbytes(self) -> int:
        return sum(sum(one.on_nodes(self.model).values()) for one in self.layouts.values())


@dataclass(frozen=True)
class Need:
    """Name a limit and the bytes that would be taken of it.

    free: None where that is unknown, negative by how much a pool is over its budget already.
    """

    name: str
    needed: int
    free: int | None
    node: int | None = None
    hint: str = ""  # what else can be done where it does not fit
    is_tmpfs: bool = False

    @property
    def fits(self) -> bool:
        return self.free is None or self.needed <= self.free

    def __str__(self) -> str:
        if self.free is None:
            return f"{self.name}: needs {_gib(self.needed)}, the kernel does not say what it has"
        sign = "fits" if self.fits else "does NOT fit"
        hint = f" ({self.hint})" if self.hint else ""
        free = _gib(max(0, self.free))
        return f"{self.name}: needs {_gib(self.needed)}, has {free}: {sign}{hint}"


@dataclass(frozen=True)
class MirrorPlan:
    """Say what would be built, and what that needs of every limit."""

    builds: tuple[Build, ...]
    needs: tuple[Need, ...]
    goes: tuple[str, ...] = ()  # models whose replicas would go, and then it fits
    why: str = ""  # replicas of the pool cannot make room

    @property
    def fits(self) -> bool:
        return all(need.fits for need in self.needs)

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in self.builds)

    def check(self) -> None:
        """Check that it fits. Raises: NodeMemoryError naming every limit that is too small."""
        short = [need for need in self.needs if not need.fits]
        if short:
            text = "; ".join([*map(str, short), *([self.why] if self.why else [])])
            raise NodeMemoryError(
                f"replicas do not fit, nothing was built: {text}",
                node=short[0].node,
                needed=short[0].needed,
                free=max(0, short[0].free or 0),
            )

    def to_dict(self) -> dict[str, Any]:
        builds = [
            {"paths": m.paths, "size": m.size, "nodes": nodes_of(layouts), "replicas": [*layouts]}
            for m, layouts in self.builds
        ]
        needs = [asdict(need) | {"fits": need.fits} for need in self.needs]
        rest = {"nbytes": self.nbytes, "fits": self.fits, "goes": self.goes, "why": self.why}
        return {"builds": builds, "needs": needs} | rest


@trace.spanned("plan")
def plan(
    builds: Sequence[Build],
    machine: Topology,
    *,
    kept: str,
    bound: bool = True,
    pool: str = "",
    left: Mapping[int, int] = NO_BUDGET,
    moved: Mapping[int, int] = NO_BUDGET,
) -> MirrorPlan:
    """Compare what these replicas take with every limit that they count against.

    kept: PRIVATE, HELD by a process, or STORED: then the store's tmpfs is a limit too.
    bound: see ``build``. left: bytes of each node that the budget of ``pool`` leaves.
    moved: of what is there, and comes into that pool from another one.
    """
    memory.give_back()
    per_node: Counter[int] = Counter()
    for model, layouts in builds:
        for layout in layouts.values():
            per_node.update(layout.on_nodes(model))
    total = sum(one.nbytes for one in builds)
    needs = [_node_need(node, per_node[node], machine, bound=bound) for node in sorted(per_node)]
    in_pool = per_node + Counter(moved)
    needs += [
        Need(f"pool {pool} on node {node}", in_pool[node], left[node], node, OVER_BUDGET)
        for node in sorted(in_pool)
        if node in left and in_pool[node]
    ]
    if total:
        needs += [
            Need(limit.name, total, max(0, limit.free - LEAST_FREE))
            for limit in memory.known_limits()
        ]
        if kept != PRIVATE:
            # A manifest, folders and links come on top, and are all that held replicas take there.
            small = SMALL + total // SMALL_SHARE
            needed = small if kept == HELD else total + small
            needs.append(_store_need(needed, held=kept == HELD))
    return MirrorPlan(tuple(builds), tuple(needs))


def _node_need(node: int, needed: int, machine: Topology, *, bound: bool) -> Need:
    # Filling stops at LEAST_FREE: what fits only without it would be rolled back at its end.
    free, strictly = free_on(node, machine, bound=bound), free_on(node, machine)
    if free is None or strictly is None:
        return Need(f"node {node}", needed, None, node)
    free, hint = max(0, free - LEAST_FREE), ""
    if not bound and free < needed <= strictly - LEAST_FREE:
        hint = PAGE_CACHE
    return Need(f"node {node}", needed, free, node, hint)


def nodes_of(groups: Iterable[Group]) -> list[int]:
    """Return all nodes that these replicas are on."""
    return sorted({node for group in groups for node in group})


def footprint(model: Model) -> int:
    """Return the bytes of memory that one replica takes: whole pages per file."""
    return sum(-(-identity.size // PAGE) * PAGE for identity in model.identities)


def free_on(node: int, machine: Topology, *, bound: bool = True) -> int | None:
    """Return the bytes that may be put on this node; if not bound, page cache makes no room.

    None where the kernel does not say.
    """
    whole = memory.machine_available()
    if whole and [n.id for n in machine.nodes.values() if n.has_memory] == [node]:
        # The only memory there is: the kernel's own estimate is better than one from its parts.
        total = machine.nodes[node].memory_total
        return max(0, whole.free - memory.reserve(total))
    return memory.node_free(node) if bound else memory.node_unused(node)


def _store_need(needed: int, *, held: bool) -> Need:
    try:
        where = userdir.path()
        while not os.path.isdir(where) and where != "/":
            where = os.path.dirname(where)
        userdir.check_tmpfs(where)
        with userdir.named(where):
            status = os.statvfs(where)
            free = status.f_bavail * status.f_frsize
            hint = "" if needed <= free else logout.tmpfs_limit_note(where, needed, held=held)
    except StoreError as error:
        return Need("the store", needed, 0, hint=str(error), is_tmpfs=True)
    return Need(f"tmpfs {where}", needed, free, hint=hint, is_tmpfs=True)


def _gib(nbytes: int) -> str:
    return f"{nbytes} bytes ({nbytes / 2**30:.2f} GiB)"


class MemoryBudget:
    """Track how much may be filled on each node, and look again while it is filled.

    Other processes may take that memory meanwhile; Linux would then kill a process, not fail.
    bound: see ``build``.
    """

    def __init__(self, machine: Topology, groups: Sequence[Group], *, bound: bool) -> None:
        self.machine, self.bound = machine, bound
        nodes = {node for group in groups for node in group}
        self.trusted = dict.fromkeys(nodes, 0)  # bytes that may be filled before looking again
        self.pending = dict.fromkeys(nodes, 0)  # bytes that threads are filling just now
        self.lock, self.looking = threading.Lock(), threading.Lock()
        self.finished = threading.Condition(self.lock)

    @contextmanager
    def taken(self, ranges: Iterable[NodeRange]) -> Iterator[None]:
        """Take room for ranges of a replica that are filled now. Raises: NodeMemoryError."""
        needed: Counter[int] = Counter()
        for start, stop, node in ranges:
            needed[node] += stop - start
        with ExitStack() as taken:
            for node, nbytes in sorted(needed.items()):  # in one order: none waits in a circle
                self.check(node, nbytes)
                taken.callback(self._finished, node, nbytes)
            yield

    def _finished(self, node: int, nbytes: int) -> None:
        with self.finished:
            self.pending[node] -= nbytes
            self.finished.notify_all()

    def check(self, node: int, nbytes: int) -> None:
        """Check that a node has room for a chunk. Raises: NodeMemoryError.

        Looking takes longer than eight threads take to fill a chunk. So while there is plenty, a
        look is good for several chunks, and those who wait for one need none of their own.
        """
        while not self._is_trusted(node, nbytes):
            with self.looking:
                if self._is_trusted(node, nbytes):
                    return
                pending = self._look(node, nbytes)
            if pending is None:
                return
            self._wait(node, pending)

    def _wait(self, node: int, pending: int) -> None:
        with self.finished, trace.span("wait", nodes=(node,)):
            self.finished.wait_for(lambda: self.pending[node] < pending)

    def _is_trusted(self, node: int, nbytes: int) -> bool:
        with self.lock:
            if self.trusted[node] < nbytes:
                return False
            self.trusted[node] -= nbytes
            self.pending[node] += nbytes
            return True

    def _look(self, node: int, nbytes: int) -> int | None:
        """Return None where there is room, else how many pending bytes to wait for.

        Bytes that others are filling may or may not count already: in doubt, wait for those.
        """
        limits, on_node = [*memory.cgroup_limits()], free_on(node, self.machine, bound=self.bound)
        if on_node is not None:
            limits.append(memory.Limit(f"node {node}", on_node))
        name, free = memory.tightest(limits)
        with self.lock:
            pending, needed = self.pending[node], nbytes + LEAST_FREE
            if free >= pending + needed:
                self.pending[node] += nbytes
                self.trusted[node] = min(TRUSTED, (free - LEAST_FREE) // 8)
                return None
            if pending:
                return pending
        strictly = free_on(node, self.machine) if not self.bound else None
        hint = f"; {PAGE_CACHE}" if strictly is not None and strictly >= needed else ""
        raise NodeMemoryError(
            f"{name} ran out while node {node} was filled: needs {needed} bytes"
            f" for the next chunk, has {free}; all of it is given back: free memory there, or"
            f" leave this node out (--nodes){hint}",
            node=node,
            needed=needed,
            free=free,
        )
