"""Threads pinned to the CPUs of a node, one pool per node.

The caller's own threads are never touched. A task is a function of ``(start, stop)`` that releases
the GIL for most of its time (pread, nogil kernels, hashing). What one of these threads hands to a
pool it does itself: it would wait for itself.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from copy import copy
from errno import EINVAL
from functools import partial
from queue import Empty
from typing import Any, TypeVar

from numaload import trace
from numaload.errors import NumaError
from numaload.linux.syscalls import name_thread
from numaload.machine.affinity import pin
from numaload.machine.stopping import CancelToken, Steps, check_process, check_wanted
from numaload.machine.threads import no_thread
from numaload.machine.topology import Topology

T = TypeVar("T")
NOTICE_S = 0.5
PIECES_EACH = 4  # so that a thread that was interrupted does not hold up the rest
_local = threading.local()


class Workers:
    """``count`` threads that run only on ``cpus``. Their tasks raise NumaError if they cannot.

    hands_on: their tasks submit some to other pools, and do not wait for them.
    """

    def __init__(
        self,
        cpus: Iterable[int],
        count: int | None = None,
        name: str = "numaload",
        *,
        hands_on: bool = False,
    ) -> None:
        self.cpus = frozenset(cpus)
        if not self.cpus:
            raise NumaError("no CPUs to run threads on", call="sched_setaffinity", errno=EINVAL)
        self.count = count or len(self.cpus)
        self.name, self.hands_on, self.pid = name, hands_on, os.getpid()
        self._refused: NumaError | None = None
        self._closed = False
        self._pool = ThreadPoolExecutor(self.count, name, initializer=self._pin)

    def _pin(self) -> None:
        name_thread(self.name)
        _local.alone = not self.hands_on
        try:
            pin(self.cpus)
        except NumaError as error:
            self._refused = error  # raised from here it would break the pool and lose its name

    def _run(self, token: CancelToken, task: list[Callable[[], T]], parent: Any) -> T:
        if self._refused is not None:
            raise copy(self._refused)  # which would keep what the task was given
        with token, trace.under(parent):
            return task.pop()()

    def submit(
        self, function: Callable[..., T], *arguments: object, token: CancelToken | None = None
    ) -> Future[T]:
        """Have a thread call it, for ``token``'s work."""
        if getattr(_local, "alone", False):
            return _done_here(function, *arguments)
        task: list[Callable[[], T]] = [partial(function, *arguments)]
        try:
            with _alone():
                parent = trace.current()
                return self._pool.submit(self._run, token or CancelToken(), task, parent)
        except RuntimeError as error:
            task.clear()  # it stays in the pool's queue, and would keep what it was given
            if "shutdown" in str(error) and not self._closed:  # the main thread has ended
                return _done_here(function, *arguments)
            raise no_thread(error) from error

    def ranges(self, function: Callable[[int, int], None], total: int, grain: int = 1) -> None:
        """Call ``function(start, stop)`` over [0, total), in pieces of at least ``grain``."""
        token = CancelToken()
        futures = self.submit_ranges(function, total, grain, token)
        try:
            finish(futures, token)
        except BaseException:
            _settle(futures, token)
            raise

    def submit_ranges(
        self,
        function: Callable[[int, int], None],
        total: int,
        grain: int = 1,
        token: CancelToken | None = None,
    ) -> list[Future[None]]:
        """Do the same without waiting, for work on several nodes; cancelled, none begins.

        A future for each thread, not for each piece: that costs as much as a million weights.
        """
        pieces = min(self.count * PIECES_EACH, max(1, total // max(1, grain)))
        step = max(1, -(-total // pieces))
        starts, token = iter(range(0, total, step)), token or CancelToken()

        def work() -> None:
            for start in starts:  # each piece goes to the thread that asks first
                if token.cancelled():
                    return
                function(start, min(start + step, total))

        futures: list[Future[None]] = []
        try:
            for _ in range(min(self.count, -(-total // step))):
                futures.append(self.submit(work, token=token))  # noqa: PERF401 - some are there if one fails
        except BaseException:
            _settle(futures, token)
            raise
        return futures

    def close(self) -> None:
        self._closed = True
        if os.getpid() == self.pid:  # a forked child has none of the threads
            with trace.span("threads"):
                self._pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _alone() -> Iterator[None]:
    """Have this thread do what it submits inside: others may need a lock that it holds.

    It is garbage that does, collected at any moment, and signal handlers.
    """
    before, _local.alone = getattr(_local, "alone", False), True
    try:
        yield
    finally:
        _local.alone = before


def _done_here(function: Callable[..., T], *arguments: object) -> Future[T]:
    future: Future[T] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)
    return future


def finish(
    futures: list[Future[T]], token: CancelToken | None = None, steps: Steps | None = None
) -> list[T]:
    """Wait for all; at the first error, or Ctrl-C, cancel what has not begun and wait for the rest.

    token: cancelled in that case: tasks that look at it, or wait for a network, give up.
    steps: how far the tasks come, which is told to its callback meanwhile, here.
    Raises: CancelledError where nobody wants this thread's own work any more.
    """
    pid = os.getpid()
    try:
        if steps is not None and steps.progress:
            _tell(futures, steps)
        while not _settled(futures):
            check_process(pid)
            check_wanted(steps)
        return [future.result() for future in futures if future.done()]
    except BaseException:
        if os.getpid() != pid:  # forked by the callback; its parent has the threads
            raise
        if token is not None:
            token.cancel()
        for future in futures:
            future.cancel()
        _wait(futures)
        raise


def _tell(futures: list[Future[T]], steps: Steps) -> None:
    """Tell the callback how far it is, until all have ended, or one with an error."""
    with _alone():
        for future in futures:
            future.add_done_callback(steps.news.put)
    left = len(futures)
    while left:
        try:
            news = steps.news.get(timeout=NOTICE_S)
        except Empty:  # Ctrl-C that came just as waiting began is noticed now
            check_process(steps.pid)
            check_wanted(steps)
            continue
        if not isinstance(news, Future):
            steps.tell(news)
            continue
        left -= 1
        if not news.cancelled() and news.exception():
            return


def _wait(futures: list[Future[T]], *how: Any) -> Any:
    with _alone():  # it has locks of all these futures for a moment
        return wait(futures, *how)


def _settled(futures: list[Future[T]]) -> bool:
    """Wait a while; return whether nothing is left to wait for. Ctrl-C is noticed in between."""
    done, running = _wait(futures, NOTICE_S, FIRST_EXCEPTION)
    return not running or any(not f.cancelled() and f.exception() for f in done)


def _settle(futures: list[Future[None]], token: CancelToken) -> None:
    """Wait until none runs, whatever signals come: they write to memory of their caller's."""
    pid = os.getpid()
    while os.getpid() == pid:
        try:
            token.cancel()
            for future in futures:
                future.cancel()
            _wait(futures)
        except KeyboardInterrupt:
            continue
        return


_pools: dict[tuple[frozenset[int], int], Workers] = {}
_lock = threading.RLock()  # garbage that is collected inside may need a pool


def pool(topology: Topology, nodes: Collection[int] = (), count: int | None = None) -> Workers:
    """Return the pool of these nodes' CPUs, or of all allowed ones; it lives with the process."""
    cpus = topology.cpus
    if nodes:
        cpus = topology.cpus_of(nodes)
    key = (cpus, count or len(cpus))
    with _lock:
        if key not in _pools:
            _pools[key] = Workers(*key)
        return _pools[key]


def _forget() -> None:
    """Drop the pools in a forked child: it has none of its parent's threads."""
    global _lock  # noqa: PLW0603 - the old one may be held by a thread that is gone
    _pools.clear()
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_forget)
