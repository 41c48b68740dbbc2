"""Threads pinned to the CPUs of a node, one pool per node.

The caller's own threads are never touched. A task is a function of ``(start, stop)`` that releases
the GIL for most of its time (pread, nogil kernels, hashing).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from numaload.numa.topology import Topology

T = TypeVar("T")
PIECES_EACH = 4  # so that a thread that was interrupted does not hold up the rest
POLL_S = 0.1  # how long a waiting main thread may leave Ctrl-C unanswered


class Workers:
    """``count`` threads that run only on ``cpus``."""

    def __init__(
        self, cpus: Iterable[int], count: int | None = None, name: str = "numaload"
    ) -> None:
        self.cpus = frozenset(cpus)
        self.count = count or len(self.cpus)
        self._pool = ThreadPoolExecutor(self.count, name, initializer=self._pin)

    def _pin(self) -> None:
        os.sched_setaffinity(0, self.cpus)

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        return self._pool.submit(function, *arguments)

    def ranges(self, function: Callable[[int, int], None], total: int, grain: int = 1) -> None:
        """Call ``function(start, stop)`` over [0, total), in pieces of at least ``grain``."""
        pieces = min(self.count * PIECES_EACH, max(1, total // max(1, grain)))
        step = max(1, -(-total // pieces))
        starts = range(0, total, step)
        finish([self.submit(function, start, min(start + step, total)) for start in starts])

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def finish(futures: list[Future[T]], stop: threading.Event | None = None) -> list[T]:
    """Wait for all; at the first error, or Ctrl-C, cancel what has not begun and wait for the rest.

    stop: set in that case, for tasks that look at it.
    """
    try:
        pending = set(futures)
        while pending:
            done, pending = wait(pending, POLL_S, FIRST_EXCEPTION)
            for future in done:
                future.result()
    except BaseException:
        if stop is not None:
            stop.set()
        for future in futures:
            future.cancel()
        wait(futures)
        raise
    return [future.result() for future in futures]


_pools: dict[tuple[frozenset[int], int], Workers] = {}
_lock = threading.Lock()


def pool(topology: Topology, node: int | None = None, count: int | None = None) -> Workers:
    """The pool of a node's CPUs, or of all this process may use; kept for the process's life."""
    if node is None:
        cpus = topology.cpus
    else:
        cpus = topology.nodes[topology.threads_node(node)].usable_cpus
    key = (cpus, count or len(cpus))
    with _lock:
        if key not in _pools:
            _pools[key] = Workers(*key)
        return _pools[key]


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _lock  # noqa: PLW0603 - the old one may be held by a thread that is gone
    _pools.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
