"""Reading ahead: a thread that brings into the page cache what the workers will want next."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from numaload.errors import CancelledError, warn_once
from numaload.numa.stopping import until
from numaload.storage.files import SourceFile

STEP = 1 << 20  # bytes read at a time
NO_THREAD = "raise ulimit -u, or the cgroup's pids.max"
PROBES = 8  # pages of it that are asked for


class Range(NamedTuple):
    """Bytes of a file that will be wanted. ``before``: bytes wanted before them, of all files."""

    file: SourceFile
    start: int
    stop: int
    before: int


class Ahead:
    """Stays at most ``window`` bytes in front of what was taken. Errors are the workers' business:
    they come to the same place and raise them.
    """

    def __init__(self, ranges: Sequence[Range], window: int) -> None:
        self.ranges, self.window = ranges, window
        self._taken, self._stopped = 0, False
        self._moved = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="numaload-ahead", daemon=True)

    def start(self) -> None:
        if self.window and self.ranges:
            try:
                self._thread.start()
            except RuntimeError as error:  # of threading, which keeps no errno
                warn_once("ahead", f"files are not read ahead: {error}: {NO_THREAD}")

    def took(self, nbytes: int) -> None:
        with self._moved:
            self._taken += nbytes
            self._moved.notify()

    def stop(self) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        with until(lambda: self._stopped), suppress(OSError, CancelledError):
            self._read()

    def _read(self) -> None:
        """Raises: OSError, CancelledError."""
        buffer = memoryview(b"")  # what is in RAM needs none
        for one in self.ranges:
            for start in range(one.start, one.stop, STEP):
                nbytes = min(STEP, one.stop - start)
                if not self._wait(one.before + start - one.start):
                    return
                # What is on a network is asked nothing from here, and cannot tell.
                if one.file.is_network or not resident(one.file.fd, start, nbytes):
                    buffer = buffer or memoryview(bytearray(STEP))
                    one.file.read_into(buffer[:nbytes], start)

    def _wait(self, position: int) -> bool:
        """Until ``position`` is near enough; False if it never will be."""
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or position <= self._taken + self.window)
            return not self._stopped


def resident(fd: int, offset: int, nbytes: int) -> bool:
    """Whether some pages of the range, evenly spread, are in RAM: others may be missing.

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
