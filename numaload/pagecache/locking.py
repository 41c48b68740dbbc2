"""Lock page cache in RAM as long as this process lives, by mapping it.

A range is locked before anything of it is read (MLOCK_ONFAULT): from then on each page that is
mapped is locked with that, and what is read is mapped soon after. What is mapped of a file counts
as the file's (RssFile), not as private; page tables are 2 MiB for each GiB.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from numaload.errors import NodeMemoryError, NumaError, NumaloadError
from numaload.files.residency import ByteRange, length, map_present, map_quietly, steps
from numaload.files.source import SourceFile, make_room_for
from numaload.linux import syscalls
from numaload.linux.mapping import MappedMemory
from numaload.linux.syscalls import PAGE
from numaload.machine import memory
from numaload.machine.stopping import CancelToken
from numaload.pagecache.choice import choose, models_of, real

FIX = (
    "raise the limit before: ulimit -l unlimited; for good, a line `USER - memlock unlimited` in"
    " /etc/security/limits.conf, or LimitMEMLOCK=infinity in the systemd unit"
)
REFUSED = (errno.ENOMEM, errno.EPERM, errno.EAGAIN)
PAUSE_S, IDLE_SHARE = 0.5, 9  # between two looks at what was read meanwhile: of the time they take


class Locked:
    """Byte ranges of files, locked from when they are in RAM on."""

    def __init__(self, files: Sequence[SourceFile], ranges: Sequence[Sequence[ByteRange]]) -> None:
        """Lock the ranges, of which nothing need be in RAM yet.

        Raises: NodeMemoryError where this user may not lock so much.
        """
        self.nbytes = 0  # that are in RAM and locked
        self.size = sum(map(length, ranges))
        self._whole: list[MappedMemory] = []
        self._todo: list[tuple[MappedMemory, int, int]] = []
        needed = sum(_pages(start, stop) * PAGE for its in ranges for start, stop in its)
        limit = raise_limit()
        for file, its in zip(files, ranges, strict=True):
            mapping = map_quietly(file)
            self._whole.append(mapping)
            for start, stop in its:
                _lock(mapping, start, stop, needed, limit)
                first = start - start % PAGE
                self._todo.extend((mapping, *step) for step in steps([(first, stop)]))

    def catch_up(self) -> int:
        """Lock what is in RAM by now; return how many bytes are locked.

        Raises: NumaError for a file that got shorter.
        """
        left, partly = [], 0
        for mapping, start, stop in self._todo:
            there = map_present(mapping, start, stop)
            count = min(there.count(1) * PAGE, stop - start)
            if all(there):
                self.nbytes += count
            else:
                left.append((mapping, start, stop))
                partly += count
        self._todo = left
        return self.nbytes + partly


def _pages(start: int, stop: int) -> int:
    return -(-stop // PAGE) - start // PAGE


def raise_limit() -> int:
    """Raise the soft limit to the hard one, as anybody may; return it in bytes, -1: any number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    return hard


def _lock(mapping: MappedMemory, start: int, stop: int, needed: int, limit: int) -> None:
    first = start - start % PAGE
    failed = syscalls.mlock_on_fault(mapping.address + first, _pages(start, stop) * PAGE)
    if failed in REFUSED and 0 <= limit < needed:
        raise NodeMemoryError(
            f"{needed} bytes ({needed / 2**30:.2f} GiB) are to be locked, this process may lock"
            f" {limit} bytes ({limit / 2**20:.1f} MiB) (RLIMIT_MEMLOCK): {FIX}",
            needed=needed,
            free=limit,
        )
    if failed:
        raise NumaError(
            f"mlock2: {needed} bytes cannot be locked: {os.strerror(failed)}",
            call="mlock2",
            errno=failed,
        )


def check_room(size: int) -> None:
    """Refuse to lock what leaves others no room. Raises: NodeMemoryError."""
    tightest = memory.available()
    total = memory.fields("/proc/meminfo").get("MemTotal", 0)
    free = max(0, tightest.free - memory.reserve(total))
    if size > free:
        raise NodeMemoryError(
            f"{size} bytes ({size / 2**30:.1f} GiB) are to be locked, {tightest.name} has room"
            f" for {free} ({free / 2**30:.1f} GiB), less what others need to go on; --force locks"
            " anyway",
            needed=size,
            free=free,
        )


@contextmanager
def chosen_of(
    paths: Sequence[str], tensors: str | None, layers: str | int | None
) -> Iterator[tuple[list[SourceFile], list[list[ByteRange]]]]:
    """Open the files of these models; give them, and which ranges of each are meant.

    Raises: NumaloadError.
    """
    models = models_of(list(paths))
    chosen = choose(models, tensors, layers)
    names = dict.fromkeys(real(path) for its in models for path in its)
    make_room_for(len(names))
    with ExitStack() as opened:
        files = [opened.enter_context(SourceFile(name)) for name in names]
        yield files, [chosen.of(name, file) for name, file in zip(names, files, strict=True)]


def lock(
    paths: Sequence[str], tensors: str | None, layers: str | int | None, *, force: bool
) -> Locked:
    """Lock files whole, or what is chosen of them, before it is read. Raises: NumaloadError."""
    with chosen_of(paths, tensors, layers) as (files, ranges):
        if not force:
            check_room(sum(map(length, ranges)))
        return Locked(files, ranges)  # mappings need no descriptors


class LockingMeanwhile:
    """Lock in a thread what is read meanwhile, so that little can be pushed out before."""

    def __init__(self, locked: Locked) -> None:
        self._locked, self._token = locked, CancelToken()
        self._thread = threading.Thread(target=self._run, name="numaload-lock", daemon=True)

    def _run(self) -> None:
        took = 0.0
        with suppress(NumaloadError):  # whoever locks the rest meets it too
            while not self._token.wait(max(PAUSE_S, IDLE_SHARE * took)):
                begin = time.monotonic()
                self._locked.catch_up()
                took = time.monotonic() - begin

    def __enter__(self) -> LockingMeanwhile:
        with suppress(RuntimeError):  # no more threads allowed: all is locked in the end
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._token.cancel()
        if self._thread.ident is not None:  # it was started
            self._thread.join()
