"""Read ahead: threads bring into the page cache what the workers will want next."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from numaload import trace
from numaload.errors import CancelledError, warn_once
from numaload.files.plan import CACHE, CHUNK, ReadMethod
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.files.tuned import plan_reading
from numaload.files.ways import IntoCache
from numaload.linux.syscalls import name_thread
from numaload.machine.stopping import CancelToken, stopping
from numaload.machine.threads import no_thread

NOTICE_S = 0.5  # until a cancelled thread ends that waits for what others read
LEAST_THREADS = 4  # where two do not make the storage seek
# Bytes that a thread brings in between two turns in Python, for which it waits behind threads that
# convert. The first are smaller: there is work for those at once.
MOST_READ = 32 << 20
PADDING = 4096  # bytes, at most, between tensors that are read as one range
PROBES = 8  # pages of a range that are asked for, where the kernel does not tell what is in RAM


class Range(NamedTuple):
    """Name bytes of a file that will be wanted. ``before``: bytes wanted before, of all files."""

    file: SourceFile
    start: int
    stop: int
    before: int


class _ToRead(NamedTuple):
    """Name an absent range of a file. ``position``: bytes wanted up to its end, of all files."""

    file: SourceFile
    start: int
    stop: int
    position: int


class Ahead:
    """Read at most ``window`` bytes in front of what was taken.

    Workers that have caught up wait for it: their own small reads would only get in its way.
    Errors are the workers' business: they come to the same place and raise them.
    """

    def __init__(self, ranges: Sequence[Range], window: int) -> None:
        self.ranges, self.window = _merged(ranges), window
        self._taken, self._ready, self._token = 0, 0, CancelToken()
        self._moved = threading.Condition()
        self._todo: Iterator[_ToRead] = iter(())
        self._busy: dict[int, int] = {}  # thread: position of the beginning of what it reads
        self._active = self._blocked = 0
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        if not self.window or not self.ranges:
            return
        self._todo, way = self._absent(), self._way()
        if way is None:
            return
        for _ in range(max(1, min(way.threads, self.window // CHUNK))):
            thread = threading.Thread(
                target=self._run, args=(way, trace.current()), name="numaload-ahead", daemon=True
            )
            self._threads.append(thread)  # before it runs: Ctrl-C may come at any time
            try:
                thread.start()
            except RuntimeError as error:
                warn_once("ahead", f"files are not read ahead: {no_thread(error)}")
                return

    def _way(self) -> ReadMethod | None:
        """Return how to read the first file that has absent bytes; None where all is in RAM."""
        for one in self.ranges:
            if one.file.closed:  # workers tell
                return None
            found = residency(one.file, one.start, one.stop)
            if found.absent:
                total = sum(each.stop - each.start for each in self.ranges)
                plan = plan_reading(CACHE, one.file, total, seen=found.known)
                # Converting threads make each one wait for its turn in Python: others read on.
                least = 1 if plan.device.kind == "hdd" else LEAST_THREADS
                return plan.way._replace(threads=max(least, plan.way.threads))
        return None

    def _absent(self) -> Iterator[_ToRead]:
        """Look each range up when its turn comes: others may have read it, or pushed it out."""
        size, most = CHUNK, max(CHUNK, min(MOST_READ, self.window // LEAST_THREADS))
        for one in self.ranges:
            stop = one.start
            while stop < one.stop:
                start, stop = stop, min(stop + size, one.stop)
                size = min(2 * size, most)
                found = residency(one.file, start, stop)
                unknown = not (found.known or one.file.is_network)  # which cannot tell either
                if unknown and resident(one.file.fd, start, stop - start):
                    continue
                for first, last in found.absent:
                    yield _ToRead(one.file, first, last, one.before + last - one.start)

    def took(self, nbytes: int) -> None:
        if not self._threads:  # all is in RAM
            return
        with self._moved:
            self._taken += nbytes
            if self._blocked:
                self._moved.notify_all()

    def wait(self, position: int) -> None:
        """Wait until that many bytes of all wanted are there, or nobody is reading them.

        Also until this thread's own work is cancelled, of which nobody tells.
        """
        if not self._threads:
            return
        with self._moved:
            while not self._moved.wait_for(
                lambda: (
                    stopping()
                    or self._token.cancelled()
                    or self._blocked == self._active
                    or position <= min(self._busy.values(), default=self._ready)
                ),
                NOTICE_S,
            ):
                pass

    def stop(self, *, wait: bool = True) -> None:
        self._token.cancel()  # at once: a thread that waits for a network may have the lock
        with self._moved:
            self._moved.notify_all()
        for thread in self._threads if wait else ():
            if thread.ident is not None:
                thread.join()

    def _run(self, way: ReadMethod, parent: Any) -> None:
        name_thread("numaload-ahead")
        with self._token, trace.under(parent):
            self._read(way)

    def _read(self, way: ReadMethod) -> None:
        into, own = IntoCache(), threading.get_ident()
        with self._moved:
            self._active += 1
        try:
            while (absent := self._next(own)) is not None:
                nbytes, path = absent.stop - absent.start, absent.file.path
                with trace.span("read", nbytes, file=path):
                    into.read(absent.file, absent.start, absent.stop, way.name)
        except (OSError, CancelledError):
            self._token.cancel()
        finally:
            into.close()
            with self._moved:
                self._busy.pop(own, None)
                self._active -= 1
                self._moved.notify_all()

    def _next(self, own: int) -> _ToRead | None:
        with self._moved:
            self._busy.pop(own, None)
            absent = None if self._token.cancelled() else next(self._todo, None)
            if absent is None:
                return None
            # All before it is in RAM, or other threads are at it.
            self._busy[own] = absent.position - (absent.stop - absent.start)
            self._ready = absent.position
            self._blocked += 1
            self._moved.notify_all()
            self._moved.wait_for(
                lambda: self._token.cancelled() or absent.position <= self._taken + self.window
            )
            self._blocked -= 1
            return None if self._token.cancelled() else absent


def _merged(ranges: Sequence[Range]) -> list[Range]:
    """Join neighbours in a file, since tensors may be small. Bytes between them are read too."""
    found: list[Range] = []
    for one in ranges:
        last = found[-1] if found else None
        if last and last.file is one.file and 0 <= one.start - last.stop < PADDING:
            found[-1] = last._replace(stop=one.stop)
        else:
            found.append(one)
    return found


def resident(fd: int, offset: int, nbytes: int) -> bool:
    """Return whether some pages of the range, evenly spread, are in RAM: others may be missing.

    Asked by reads that must not wait: unlike mincore(2) that answers everyone who may read.
    False where the file system cannot tell.
    """
    byte = bytearray(1)
    step = max(1, nbytes // PROBES)
    try:
        return all(
            os.preadv(fd, [byte], at, os.RWF_NOWAIT) == 1
            for at in range(offset, offset + nbytes, step)
        )
    except OSError:  # EAGAIN: not in RAM. EOPNOTSUPP: cannot tell.
        return False
