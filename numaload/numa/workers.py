"""Threads pinned to the CPUs of a node, one pool per node.

The caller's own threads are never touched. A task is a function of ``(start, stop)`` that releases
the GIL for most of its time (pread, nogil kernels, hashing).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from errno import EAGAIN, EINVAL
from typing import TypeVar

from numaload.errors import NumaError
from numaload.numa.affinity import pin
from numaload.numa.stopping import until
from numaload.numa.threads import name_thread
from numaload.numa.topology import Topology

T = TypeVar("T")
NOTICE_S = 0.5
PIECES_EACH = 4  # so that a thread that was interrupted does not hold up the rest


class Workers:
    """``count`` threads that run only on ``cpus``. Their tasks raise NumaError if they cannot."""

    def __init__(
        self, cpus: Iterable[int], count: int | None = None, name: str = "numaload"
    ) -> None:
        self.cpus = frozenset(cpus)
        if not self.cpus:
            raise NumaError("no CPUs to run threads on", call="sched_setaffinity", errno=EINVAL)
        self.count = count or len(self.cpus)
        self.name = name
        self._refused: NumaError | None = None
        self._pool = ThreadPoolExecutor(self.count, name, initializer=self._pin)

    def _pin(self) -> None:
        name_thread(self.name)
        try:
            pin(self.cpus)
        except NumaError as error:
            self._refused = error  # raised from here it would break the pool and lose its name

    def _run(self, wanted: list[bool], function: Callable[..., T], *arguments: object) -> T:
        if self._refused is not None:
            raise self._refused
        with until(lambda: not wanted):
            return function(*arguments)

    def submit(self, function: Callable[..., T], *arguments: object) -> Future[T]:
        wanted = [True]  # emptied by ``finish``
        try:
            future = self._pool.submit(self._run, wanted, function, *arguments)
        except RuntimeError as error:  # of threading, which keeps no errno
            raise NumaError(
                f"no thread can be started ({error}): ulimit -u, or the cgroup's pids.max",
                call="clone",
                errno=EAGAIN,
            ) from error
        vars(future)["wanted"] = wanted
        return future

    def ranges(self, function: Callable[[int, int], None], total: int, grain: int = 1) -> None:
        """Call ``function(start, stop)`` over [0, total), in pieces of at least ``grain``."""
        stop = threading.Event()
        futures = self.submit_ranges(function, total, grain, stop)
        try:
            finish(futures, stop)
        except BaseException:
            _settle(futures, stop)
            raise

    def submit_ranges(
        self,
        function: Callable[[int, int], None],
        total: int,
        grain: int = 1,
        stop: threading.Event | None = None,
    ) -> list[Future[None]]:
        """The same without waiting, for work on several nodes at once; none begins after ``stop``.

        A future for each thread, not for each piece: that costs as much as a million weights.
        """
        pieces = min(self.count * PIECES_EACH, max(1, total // max(1, grain)))
        step = max(1, -(-total // pieces))
        starts, stop = iter(range(0, total, step)), stop or threading.Event()

        def work() -> None:
            for start in starts:  # each piece goes to the thread that asks first
                if stop.is_set():
                    return
                function(start, min(start + step, total))

        futures: list[Future[None]] = []
        try:
            for _ in range(min(self.count, -(-total // step))):
                futures.append(self.submit(work))  # noqa: PERF401 - some are there if one fails
        except BaseException:
            _settle(futures, stop)
            raise
        return futures

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


def finish(futures: list[Future[T]], stop: threading.Event | None = None) -> list[T]:
    """Wait for all; at the first error, or Ctrl-C, cancel what has not begun and wait for the rest.

    stop: set in that case, for tasks that look at it. Those that wait for a network give up.
    """
    try:
        while not _settled(futures):
            pass
        return [future.result() for future in futures if future.done()]
    except BaseException:
        if stop is not None:
            stop.set()
        for future in futures:
            vars(future).get("wanted", []).clear()
            future.cancel()
        wait(futures)
        raise


def _settled(futures: list[Future[T]]) -> bool:
    """Waits, too. Ctrl-C that comes just as waiting begins would be noticed only at its end."""
    done, running = wait(futures, NOTICE_S, FIRST_EXCEPTION)
    return not running or any(not f.cancelled() and f.exception() for f in done)


def _settle(futures: list[Future[None]], stop: threading.Event) -> None:
    """Until none runs any more, whatever signals come: they write to memory of their caller's."""
    while True:
        try:
            stop.set()
            for future in futures:
                future.cancel()
            wait(futures)
        except KeyboardInterrupt:
            continue
        return


_pools: dict[tuple[frozenset[int], int], Workers] = {}
_lock = threading.Lock()


def pool(topology: Topology, nodes: Collection[int] = (), count: int | None = None) -> Workers:
    """The pool of these nodes' CPUs, or of all this process may use; kept as long as that lives."""
    cpus = topology.cpus
    if nodes:
        cpus = topology.cpus_of(nodes)
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
