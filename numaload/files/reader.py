"""Read many ranges: threads take chunks in turn, and the way is tried on the first of them.

What is done with a chunk is the caller's: into the page cache, into replicas, into memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

from numaload import trace
from numaload.errors import CancelledError
from numaload.files.plan import CHUNK, STRIPES, ReadMethod, ReadPlan, Tried
from numaload.linux.syscalls import PAGE
from numaload.machine.stopping import CancelToken, Steps

TRY_BYTES = 96 << 20  # read by each candidate: 25 ms of a fast disk
TRY_SHARE = 24  # trying takes no more than one part in so many of all bytes
RATE_STEPS = 8  # reads a second, at least, where the rate is limited
LOOK_S = 0.05  # between two looks at whether a thread still waits for the callback

Progress = Callable[[int, int], Any]  # (bytes done, bytes in all); returning False cancels
Announce = Callable[[ReadPlan], Any]  # called before reading begins


class Chunk(NamedTuple):
    """``nbytes`` from ``offset`` of the file that is number ``which`` among those read."""

    which: int
    offset: int
    nbytes: int

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes


Work = Callable[[Chunk, ReadMethod], None]


class Reading:
    """The state that the threads of one reading share.

    The reading ends where nothing is left, at the first error of any thread, at Ctrl-C.
    rate: at most so many bytes a second.
    """

    def __init__(
        self, total: int, progress: Progress | None = None, *, rate: int | None = None
    ) -> None:
        self.total, self.rate, self.taken = total, rate, 0
        self.steps = Steps(total, progress)
        self.begin = time.monotonic()
        self.lock, self.token = threading.Lock(), CancelToken()

    @property
    def done(self) -> int:
        return self.steps.done

    def run(
        self,
        runs: Sequence[Iterable[tuple[int, int]]],
        plan: ReadPlan,
        work: Work,
        cpus: frozenset[int],
        name: str,
    ) -> ReadPlan:
        """Read the (start, stop) byte ranges of each file; the plan as it was carried out.

        work: called in threads of this reading's own, on these CPUs, with each chunk.
        Raises: what ``work`` raises first; CancelledError after Ctrl-C.
        """
        if not self.done:
            self.steps.begin()
        if self.rate:
            most = max(PAGE, self.rate // RATE_STEPS // PAGE * PAGE)
            slower = [w._replace(chunk=min(w.chunk, most), threads=1) for w in plan.candidates]
            plan = plan.forced_to(slower[:1])
        absent = Ranges(runs)
        nbytes = absent.left
        trials = plan.candidates if TRY_SHARE * TRY_BYTES * len(plan.candidates) <= nbytes else ()
        tried = []
        for way in trials if len(trials) > 1 else ():
            begin = time.perf_counter()
            self._read(absent.first(TRY_BYTES, way.chunk), way, work, cpus, name)
            tried.append(Tried(way, TRY_BYTES / max(time.perf_counter() - begin, 1e-9)))
        if tried:
            plan = plan.with_tried(tried)
        way = plan.way
        chunks = absent.first(absent.left, way.chunk)
        if plan.order == STRIPES:
            chunks = in_stripes(list(chunks), way.threads)
        self._read(chunks, way, work, cpus, name)
        return plan

    def _read(
        self, chunks: Iterator[Chunk], way: ReadMethod, work: Work, cpus: frozenset[int], name: str
    ) -> None:
        with trace.importing("numaload.machine.workers"):  # a resident file needs no threads
            from numaload.machine.workers import Workers, finish

        def reading() -> None:
            while not self.token.cancelled():
                with self.lock:
                    chunk = next(chunks, None)
                if chunk is None:
                    return
                self._pace(chunk.nbytes)
                try:
                    work(chunk, way)
                except CancelledError:
                    if self.token.cancelled():  # not an error: another thread read enough
                        return
                    raise
                self.advance(chunk.nbytes)

        workers = Workers(cpus, way.threads, name, hands_on=True)
        try:
            parent = trace.current()  # of what they do: they go on when all are started
            with trace.span("threads"), trace.under(parent):
                jobs = [workers.submit(reading, token=self.token) for _ in range(way.threads)]
            finish(jobs, self.token, self.steps)
            workers.close()
        except BaseException as error:
            self.end()  # Ctrl-C may come while threads are still being started
            workers.close()
            if isinstance(error, KeyboardInterrupt):
                raise self.cancelled("interrupted") from None
            raise

    def _pace(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more are due."""
        if not self.rate:
            return
        with self.lock:
            due = self.begin + self.taken / self.rate
            self.taken += nbytes
        with trace.span("wait"):
            self.token.wait(max(0.0, due - time.monotonic()))

    def advance(self, nbytes: int) -> None:
        """Count it, and wait until the callback was told: no thread runs far ahead of it."""
        self.steps.add(nbytes)
        while self.steps.progress and not self.token.cancelled():
            if self.steps.told.acquire(timeout=LOOK_S):
                return

    def end(self) -> None:
        """Have the threads end. A forked child has none, and locks that they may have had."""
        if os.getpid() == self.steps.pid:
            self.token.cancel()

    def cancelled(self, why: str) -> CancelledError:
        return CancelledError(why, done=self.done, total=self.total)


class Ranges:
    """(start, stop) byte ranges of each file, given out in chunks, in order."""

    def __init__(self, runs: Sequence[Iterable[tuple[int, int]]]) -> None:
        self._todo = [(which, start, stop) for which, its in enumerate(runs) for start, stop in its]
        self._todo.reverse()
        self.left = sum(stop - start for _, start, stop in self._todo)

    def first(self, nbytes: int, size: int = CHUNK) -> Iterator[Chunk]:
        """Return the next ``nbytes`` in chunks of at most ``size``, cut at its multiples.

        They are taken from the rest at once, whoever iterates over them, and when.
        """
        taken = []
        while nbytes > 0 and self._todo:
            which, start, stop = self._todo.pop()
            end = min(stop, start + nbytes)
            if end < stop:
                self._todo.append((which, end, stop))
            taken.append((which, start, end))
            nbytes -= end - start
            self.left -= end - start
        return chain.from_iterable(_cut(*one, size) for one in taken)


def _cut(which: int, start: int, stop: int, size: int) -> Iterator[Chunk]:
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield Chunk(which, start, end - start)
        start = end


def in_stripes(chunks: Sequence[Chunk], threads: int) -> Iterator[Chunk]:
    """Yield chunks so that ``threads`` taking them in turn each go through a part of their own.

    Only nearly: a thread that is faster takes of its neighbour's.
    """
    each = -(-len(chunks) // threads)
    for i in range(each):
        yield from chunks[i::each]
