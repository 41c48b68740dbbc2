"""Free memory of the nodes that are being filled, looked at all along."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from numaload.errors import NodeMemoryError
from numaload.numa.lists import Group
from numaload.numa.memory import Limit, cgroup_limits, tightest
from numaload.numa.topology import Topology
from numaload.replicas.plan import LEAST_FREE, PAGE_CACHE, free_on

TRUSTED = 256 << 20  # bytes filled, at most, between two looks at a node's free memory


class Room:
    """What may be filled on each node. Others may fill it meanwhile, and the kernel would kill
    rather than fail. bound: see ``build``.
    """

    def __init__(self, machine: Topology, groups: Sequence[Group], *, bound: bool) -> None:
        self.machine, self.bound = machine, bound
        nodes = {node for group in groups for node in group}
        self.trusted = dict.fromkeys(nodes, 0)  # bytes that may be filled before looking again
        self.pending = dict.fromkeys(nodes, 0)  # bytes that threads are filling just now
        self.lock, self.looking = threading.Lock(), threading.Lock()
        self.finished = threading.Condition(self.lock)

    @contextmanager
    def taken(self, group: Group, nbytes: int) -> Iterator[None]:
        """Room for a chunk, shared by the nodes of the group. Raises: NodeMemoryError."""
        each = -(-nbytes // len(group))
        with ExitStack() as taken:
            for node in group:
                self.check(node, each)
                taken.callback(self._finished, node, each)
            yield

    def _finished(self, node: int, nbytes: int) -> None:
        with self.finished:
            self.pending[node] -= nbytes
            self.finished.notify_all()

    def check(self, node: int, nbytes: int) -> None:
        """Looking takes longer than it takes eight threads to fill a chunk, so while there is
        plenty a look is good for several chunks, and those who wait for one need none of their own.
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
        with self.finished:
            self.finished.wait_for(lambda: self.pending[node] < pending)

    def _is_trusted(self, node: int, nbytes: int) -> bool:
        with self.lock:
            if self.trusted[node] < nbytes:
                return False
            self.trusted[node] -= nbytes
            self.pending[node] += nbytes
            return True

    def _look(self, node: int, nbytes: int) -> int | None:
        """None where there is room. What others are filling may be filled already or not: in doubt
        they are to be waited for, until less than the result is pending.
        """
        limits, on_node = [*cgroup_limits()], free_on(node, self.machine, bound=self.bound)
        if on_node is not None:
            limits.append(Limit(f"node {node}", on_node))
        name, free = tightest(limits)
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
