"""Reading files with several threads: a shared list of pieces, of which each takes the next."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from numaload.errors import CancelledError

CHUNK = 8 << 20  # bytes a read; 1 MiB and 32 MiB were no faster
MAX_THREADS = 8

Progress = Callable[[int, int], Any]  # (bytes done, bytes in all); returning False cancels


class Piece(NamedTuple):
    """``nbytes`` from ``offset`` of the file that is number ``which`` among those read."""

    which: int
    offset: int
    nbytes: int
    absent: bool  # from RAM, before


def pieces(runs: Iterable[Iterable[tuple[int, int]]], *, absent: bool = True) -> Iterator[Piece]:
    """The (start, stop) byte ranges of each file, cut to what one read takes."""
    for which, its in enumerate(runs):
        for start, stop in its:
            for offset in range(start, stop, CHUNK):
                yield Piece(which, offset, min(CHUNK, stop - offset), absent)


class Job:
    """One reading of ``total`` bytes. Threads iterate over it, and tell what they did.

    The iteration ends where nothing is left, at the first error of any thread, at Ctrl-C.
    """

    def __init__(self, todo: Iterator[Piece], total: int, progress: Progress | None) -> None:
        self.todo, self.total, self.progress = todo, total, progress
        self.done = 0
        self.lock, self.stop = threading.Lock(), threading.Event()

    def threads(self, cpus: frozenset[int], wanted: int | None = None) -> int:
        """How many to read with: half of the CPUs saturate most storage."""
        most = wanted or min(MAX_THREADS, max(1, len(cpus) // 2))
        return max(1, min(most, -(-self.total // CHUNK)))

    def run(self, work: Callable[[], None], cpus: frozenset[int], count: int, name: str) -> None:
        """Call ``work`` in ``count`` threads of this job's own, on these CPUs, and wait for them.

        Raises: what ``work`` raises first; CancelledError after Ctrl-C.
        """
        from numaload.numa.workers import Workers, finish  # a resident file needs no threads

        if self.progress:
            self.progress(0, self.total)
        workers = Workers(cpus, count, name)
        try:
            finish([workers.submit(work) for _ in range(count)], self.stop)
        except KeyboardInterrupt:
            raise CancelledError("interrupted", done=self.done, total=self.total) from None
        finally:
            self.stop.set()  # Ctrl-C may come while threads are still being started
            workers.close()

    def __iter__(self) -> Iterator[Piece]:
        while not self.stop.is_set():
            with self.lock:
                piece = next(self.todo, None)
            if piece is None:
                return
            yield piece

    def advance(self, nbytes: int) -> None:
        """Raises: CancelledError where the callback says so."""
        with self.lock:
            self.done += nbytes
            if self.progress and self.progress(self.done, self.total) is False:
                self.stop.set()
                raise CancelledError("cancelled", done=self.done, total=self.total)
