"""Find which parts of a file are in the page cache, and on which nodes.

Two calls tell. cachestat(2) counts the pages of a range at once and maps nothing; mincore(2) has a
byte for each page, and costs as much for what is not there. So the first is asked about larger
ranges and the second about those where something is and something is not.
"""

from __future__ import annotations

import errno
import mmap
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from numaload.errors import NumaError
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import Mapping, map_file, populate_read
from numaload.linux.syscalls import PAGE

STEP = 1 << 30  # bytes asked about at a time: 256 KiB of answer
MIXED = 64 << 20  # bytes of which the pages are looked at one by one, if they differ
PARTS = 16  # into which a larger range is divided, if its pages differ
LOOK = 64 << 20  # bytes whose pages are mapped between two looks at what is in RAM
ABSENT_RUN = re.compile(rb"\0+")
PRESENT_RUN = re.compile(rb"[^\0]+")
# File systems of which a file's pages are those of another file: cachestat finds none.
# overlayfs, FUSE (where it passes through), aufs, shiftfs: linux/magic.h and their sources.
STACKED = {0x794C7630, 0x65735546, 0x61756673, 0x6A656A62}
HUGETLBFS = 0x958458F6  # of linux/magic.h: all of a file is in memory, which no call tells

TRIES, PAUSE_S = 5, 0.005  # pages that are just being read cannot be dropped yet

Run = tuple[int, int]  # (start, stop) in bytes of a file


@dataclass(frozen=True)
class Residency:
    """``absent``: (start, stop) byte ranges that are not in RAM, in order."""

    size: int  # bytes asked about
    absent: tuple[Run, ...]
    known: bool = True  # False where the kernel does not tell: then all counts as absent
    start: int = 0  # the first of them

    @property
    def resident(self) -> int:
        return self.size - sum(stop - start for start, stop in self.absent)


def cached_bytes(file: SourceFile, start: int = 0, nbytes: int = 0) -> int | None:
    """Count how many of these bytes are in RAM, by cachestat(2); nbytes 0: all that follow.

    None where it does not tell: ask ``residency`` then. One system call where all or none are
    there; otherwise one more for an edge that is not a page's.
    """
    if file.is_network:  # asking which file system it is may wait
        return None
    stop = min(start + nbytes, file.size) if nbytes else file.size
    return _cached_bytes(file.fd, start, stop)


def _cached_bytes(fd: int, start: int, stop: int) -> int | None:
    if syscalls.file_system(fd) in STACKED:
        return None
    return _count(fd, start, stop) if start < stop else 0


def _count(fd: int, start: int, stop: int) -> int | None:
    found = syscalls.cachestat(fd, start, stop - start)
    if found is None:
        return None
    if not found.cached or found.cached >= _pages(start, stop):
        return stop - start if found.cached else 0
    edges = ((start - start % PAGE, start), (stop, stop + -stop % PAGE))
    outside = sum(b - a for a, b in edges if a < b and _is_cached(fd, a, b))
    return max(0, found.cached * PAGE - outside)


def _is_cached(fd: int, start: int, stop: int) -> bool:
    found = syscalls.cachestat(fd, start, stop - start)
    return found is not None and found.cached > 0


def _pages(start: int, stop: int) -> int:
    return -(-stop // PAGE) - start // PAGE


def asked_by(file: SourceFile) -> str | None:
    """Return which call tells about this file: "cachestat", "mincore", or None for none."""
    if cached_bytes(file, 0, 1) is not None:
        return "cachestat"
    return "mincore" if may_ask(file) else None


def residency(file: SourceFile, start: int = 0, stop: int | None = None) -> Residency:
    """Find which of these bytes are in RAM, page by page; the last page ends with the file.

    Since Linux 5.2 mincore(2) answers truthfully only to the file's owner and those who may write
    it, and says "resident" for everything to others; later kernels refuse cachestat(2) to them.
    For them nothing is known then.
    """
    stop = file.size if stop is None else min(stop, file.size)
    start = min(start, stop)
    return file.ask(_residency, file, start, stop, patient=True)


def _residency(file: SourceFile, start: int, stop: int) -> Residency:
    with _Search(file) as search:
        if not search.counts and syscalls.file_system(file.fd) == HUGETLBFS:
            return Residency(stop - start, (), True, start)
        if not search.possible:
            return Residency(stop - start, ((start, stop),) * (start < stop), False, start)
        return Residency(stop - start, tuple(_joined(search.absent(start, stop))), True, start)


class _Search:
    """Finds what is absent, in ever smaller ranges. Maps the file only for mincore."""

    def __init__(self, file: SourceFile) -> None:
        self.file, self._mapping = file, Mapping(0, 0, (0, 0))
        self.may_map = may_ask(file)
        self.counts = _cached_bytes(file.fd, 0, min(1, file.size)) is not None
        self.possible = self.may_map or self.counts

    def absent(self, start: int, stop: int) -> Iterator[Run]:
        """Yield runs of absent bytes; those that touch are not joined yet."""
        found = _count(self.file.fd, start, stop) if self.counts else None
        if found is not None and found in (0, stop - start):
            if found < stop - start:
                yield start, stop
        elif self.may_map and (found is None or stop - start <= MIXED):
            yield from self._one_by_one(start, stop)
        else:
            part = -(-_pages(start, stop) // PARTS) * PAGE
            for edge in range(start - start % PAGE, stop, part):
                yield from self.absent(max(start, edge), min(stop, edge + part))

    def _one_by_one(self, start: int, stop: int) -> Iterator[Run]:
        try:
            address = self._mapped().address
        except NumaError as error:
            if error.errno != errno.ENODEV:
                raise
            yield start, stop  # its file system maps no files, and so keeps no pages
            return
        for edge in range(start - start % PAGE, stop, STEP):
            length = min(STEP, stop - edge)
            vector = syscalls.mincore(address + edge, length)
            for match in ABSENT_RUN.finditer(vector):
                first, last = (edge + border * PAGE for border in match.span())
                yield max(start, first), min(stop, last)

    def _mapped(self) -> Mapping:
        if not self._mapping.length:
            self._mapping = map_file(self.file.fd, self.file.size)
        return self._mapping

    def __enter__(self) -> _Search:
        return self

    def __exit__(self, *_: object) -> None:
        self._mapping.close()


def _joined(runs: Iterator[Run]) -> Iterator[Run]:
    begin = end = -1
    for start, stop in runs:
        if start != end:
            if begin >= 0:
                yield begin, end
            begin = start
        end = stop
    if begin >= 0:
        yield begin, end


def may_ask(file: SourceFile) -> bool:
    """Return whether mincore(2) tells the truth about this file."""
    return file.ask(_may_ask, file)


def _may_ask(file: SourceFile) -> bool:
    try:
        owner = os.fstat(file.fd).st_uid
    except OSError:  # then that is not known
        return False
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{file.fd}", os.W_OK)


def cached_on(file: SourceFile, found: Residency) -> dict[int, int]:
    """Return {node: bytes} of what is resident of the file. It reads nothing.

    What was found resident may be gone since. Mapping that would read it again, and Linux 6.1
    tries for ever where it cannot be read: so the kernel is asked just before, once more.
    """
    return file.ask(_cached_on, file, found, patient=True)


def _cached_on(file: SourceFile, found: Residency) -> dict[int, int]:
    from numaload.linux.placement import count_pages

    on: Counter[int] = Counter()
    if not found.resident:
        return {}
    with map_quietly(file) as mapping:
        for start, stop in present(found):
            for offset in range(start, stop, LOOK):
                map_present(mapping, offset, min(offset + LOOK, stop))
        for counts in count_pages([mapping.range]):
            on.update(counts)
    return {node: pages * PAGE for node, pages in sorted(on.items())}


def map_quietly(file: SourceFile) -> Mapping:
    """Map the whole file to look at what is resident: without reading ahead of what is mapped."""
    mapping = map_file(file.fd, file.size)
    if mapping.length:
        # A page that readers left as a mark to read on from would start that, resident or not.
        syscalls.madvise(mapping.address, mapping.length, mmap.MADV_RANDOM)
    return mapping


def map_present(mapping: Mapping, start: int, stop: int) -> bytes:
    """Map what is in RAM of these bytes; a byte per page, 1 where it is. start: of a page."""
    vector = syscalls.mincore(mapping.address + start, stop - start)
    for match in PRESENT_RUN.finditer(vector):
        first, last = (start + edge * PAGE for edge in match.span())
        populate_read(mapping, first, min(last, stop))
    return vector


def present(found: Residency) -> Iterator[tuple[int, int]]:
    """Yield the (start, stop) byte ranges that are in RAM: the complement of ``absent``."""
    begin, end = found.start, found.start + found.size
    for start, stop in (*found.absent, (end, end)):
        if start > begin:
            yield begin, start
        begin = stop


def give_back(file: SourceFile, runs: Iterable[Run]) -> None:
    """Drop the page cache of these bytes; also what the kernel is still reading ahead there."""
    todo = list(runs)
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * attempt)
        for start, stop in todo:
            file.drop_cache(start, stop - start)
        todo = [(start, stop) for start, stop in todo if cached_bytes(file, start, stop - start)]
        if not todo:
            return
