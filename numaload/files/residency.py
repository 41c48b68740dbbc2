"""Ask the kernel which parts of a file are in the page cache, and on which nodes.

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
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from numaload import trace
from numaload.errors import NumaError
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import MappedMemory, map_file, populate_read
from numaload.linux.syscalls import PAGE

if TYPE_CHECKING:
    from numaload.machine.devices import Device

STEP = 1 << 30  # bytes asked about at a time: 256 KiB of answer
MIXED = 64 << 20  # bytes of which the pages are looked at one by one, if they differ
PARTS = 16  # into which a larger range is divided, if its pages differ
LOOK = 64 << 20  # bytes whose pages are mapped between two looks at what is in RAM
ABSENT = re.compile(rb"\0+")
PRESENT = re.compile(rb"[^\0]+")
# File systems of which a file's pages are those of another file: cachestat finds none.
# overlayfs, FUSE (where it passes through), aufs, shiftfs: linux/magic.h and their sources.
STACKED = {0x794C7630, 0x65735546, 0x61756673, 0x6A656A62}
HUGETLBFS = 0x958458F6  # of linux/magic.h: all of a file is in memory, which no call tells

AROUND = 32 << 20  # bytes that the kernel may read ahead: two windows of NFS
TRIES, PAUSE_S = 5, 0.005  # pages that are just being read cannot be dropped yet

ByteRange = tuple[int, int]  # (start, stop) in a file
AbsentRange = tuple[int, int]  # one of which no page is in RAM


class Residency(NamedTuple):
    """What of a file is in RAM, told by what is not: ``absent`` ranges, in order."""

    size: int  # bytes asked about
    absent: tuple[AbsentRange, ...]
    known: bool = True  # False where the kernel does not tell: then all counts as absent
    start: int = 0  # the first of them

    @property
    def resident(self) -> int:
        return self.size - length(self.absent)

    def resident_in(self, start: int, stop: int) -> int:
        """Count the resident bytes of a part of it; beyond its end are none."""
        stop = min(stop, self.start + self.size)
        return max(0, stop - start - length(overlaps(self.absent, start, stop)))


def present(found: Residency) -> Iterator[ByteRange]:
    """Yield the byte ranges that are in RAM."""
    return between(found.absent, found.start, found.start + found.size)


def length(ranges: Iterable[ByteRange]) -> int:
    """Return how many bytes these ranges have together."""
    return sum(stop - start for start, stop in ranges)


def merged(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Yield the ranges in order, without overlaps and empty ones."""
    begin = end = -1
    for start, stop in sorted(each for each in ranges if each[0] < each[1]):
        if start > end:
            if begin >= 0:
                yield begin, end
            begin = start
        end = max(end, stop)
    if begin >= 0:
        yield begin, end


def between(ranges: Iterable[ByteRange], start: int, stop: int) -> Iterator[ByteRange]:
    """Yield the gaps between start and stop that these ascending ranges leave."""
    for first, last in (*ranges, (stop, stop)):
        if first > start:
            yield start, first
        start = last


def overlaps(ranges: Sequence[ByteRange], start: int, stop: int) -> Iterator[ByteRange]:
    """Yield the overlaps with ``ranges``: they ascend, and may be a hundred thousand."""
    for i in range(max(0, bisect_right(ranges, (start,)) - 1), len(ranges)):
        first, last = ranges[i]
        if first >= stop:
            return
        if last > start:
            yield max(first, start), min(last, stop)


def without(ranges: Iterable[ByteRange], others: Sequence[ByteRange]) -> Iterator[ByteRange]:
    """Yield what these ranges have outside the others, which ascend."""
    for start, stop in ranges:
        yield from between(overlaps(others, start, stop), start, stop)


def whole_pages(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Yield these ranges without the pages that they have in part."""
    for start, stop in ranges:
        first, last = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        if first < last:
            yield first, last


def steps(ranges: Iterable[ByteRange]) -> Iterator[ByteRange]:
    """Cut the ranges into parts whose pages are mapped at a time."""
    for start, stop in ranges:
        for at in range(start, stop, LOOK):
            yield at, min(at + LOOK, stop)


def asked_by(file: SourceFile) -> str | None:
    """Return which call tells about this file: "cachestat", "mincore", or None for none."""
    if cached_bytes(file, 0, 1) is not None:
        return "cachestat"
    return "mincore" if may_ask(file) else None


def may_ask(file: SourceFile) -> bool:
    """Return whether mincore(2) tells the truth about this file."""
    return file.ask(_may_ask, file)


def _may_ask(file: SourceFile) -> bool:
    try:
        owner = os.fstat(file.fd).st_uid
    except OSError:  # then that is not known
        return False
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{file.fd}", os.W_OK)


def cached_bytes(file: SourceFile, start: int = 0, nbytes: int = 0) -> int | None:
    """Count how many of these bytes are in RAM, by cachestat(2).

    nbytes: 0 means up to the file's end. Returns: None where cachestat does not tell; ``residency``
    does. It counts pages: a range that begins or ends within one may take a second call.
    """
    if file.is_network:  # asking which file system it is may wait
        return None
    if syscalls.file_system(file.fd) in STACKED:
        return None
    stop = min(start + nbytes, file.size) if nbytes else file.size
    return _count(file.fd, start, stop) if start < stop else 0


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


def residency(file: SourceFile, start: int = 0, stop: int | None = None) -> Residency:
    """Find which of these bytes are in RAM, page by page; the last page ends with the file.

    Since Linux 5.2 mincore(2) answers truthfully only to the file's owner and those who may write
    it, and says "resident" for everything to others; later kernels refuse cachestat(2) to them.
    For them nothing is known then.
    """
    stop = file.size if stop is None else min(stop, file.size)
    start = min(start, stop)
    with trace.span("residency", stop - start, file=file.path):
        return file.ask(_residency, file, start, stop, patient=True)


def _residency(file: SourceFile, start: int, stop: int) -> Residency:
    system = syscalls.file_system(file.fd)
    if start == stop or system == HUGETLBFS:
        return Residency(stop - start, (), True, start)
    may_map = may_ask(file)
    parts = [((start, stop), True)]
    if system not in STACKED:
        parts = list(_lacking(file.fd, start, stop, MIXED // PAGE if may_map else 1))
    mixed = [part for part, is_mixed in parts if is_mixed]
    if mixed and not may_map:
        return Residency(stop - start, ((start, stop),), False, start)
    absent = [part for part, is_mixed in parts if not is_mixed]
    if mixed:  # the file is mapped for nothing else
        absent += _by_mincore(file, mixed)
    return Residency(stop - start, tuple(merged(absent)), True, start)


def _lacking(fd: int, start: int, stop: int, few: int) -> Iterator[tuple[ByteRange, bool]]:
    """Yield (range, whether some of it may be in RAM) of what is not all in RAM, by cachestat(2).

    few: pages of a range that is not divided any more.
    """
    found, pages = _count(fd, start, stop), _pages(start, stop)
    if found == stop - start:
        return
    if not found or pages <= few:
        yield (start, stop), found != 0
        return
    part = -(-pages // PARTS) * PAGE
    for edge in range(start - start % PAGE, stop, part):
        yield from _lacking(fd, max(start, edge), min(stop, edge + part), few)


def _by_mincore(file: SourceFile, ranges: Iterable[ByteRange]) -> Iterator[AbsentRange]:
    try:
        mapping = map_file(file.fd, file.size)
    except NumaError as error:
        if error.errno != errno.ENODEV:
            raise
        yield from ranges  # its file system maps no files, and so keeps no pages
        return
    with mapping:
        for start, stop in ranges:
            for edge in range(start - start % PAGE, stop, STEP):
                vector = syscalls.mincore(mapping.address + edge, min(STEP, stop - edge))
                for match in ABSENT.finditer(vector):
                    first, last = (edge + border * PAGE for border in match.span())
                    yield max(start, first), min(stop, last)


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
        for start, stop in steps(present(found)):
            map_present(mapping, start, stop)
        for counts in count_pages([mapping.range]):
            on.update(counts)
    return {node: pages * PAGE for node, pages in sorted(on.items())}


def map_quietly(file: SourceFile) -> MappedMemory:
    """Map the whole file to look at what is resident: without reading ahead of what is mapped."""
    mapping = map_file(file.fd, file.size)
    if mapping.length:
        # A page that readers left as a mark to read on from would start that, resident or not.
        syscalls.madvise(mapping.address, mapping.length, mmap.MADV_RANDOM)
    return mapping


def map_present(mapping: MappedMemory, start: int, stop: int) -> bytes:
    """Map what is in RAM of these bytes; a byte per page, 1 where it is. start: of a page."""
    vector = syscalls.mincore(mapping.address + start, stop - start)
    for match in PRESENT.finditer(vector):
        first, last = (start + edge * PAGE for edge in match.span())
        populate_read(mapping, first, min(last, stop))
    return vector


def read_around(device: Device) -> int:
    """Return how many bytes around what was read the kernel may have read as well."""
    return max(AROUND, 2 * device.read_ahead)


def give_back(file: SourceFile, ranges: Iterable[ByteRange]) -> list[ByteRange]:
    """Drop the page cache of these bytes; also what the kernel is still reading ahead there.

    Ctrl-C meanwhile is raised when that is done.
    Returns: those of which something stays: it is in use, or comes from a slow device still.
    """
    todo = list(ranges)
    try:
        return _give_back(file, todo)
    except KeyboardInterrupt:
        _give_back(file, todo)
        raise


def _give_back(file: SourceFile, todo: list[ByteRange]) -> list[ByteRange]:
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * attempt)
        for start, stop in todo:
            file.drop_cache(start, stop - start)
        todo = _in_ram(file, todo)
        if not todo:
            break
    return todo


def _in_ram(file: SourceFile, ranges: list[ByteRange]) -> list[ByteRange]:
    """Return those of which something is in RAM; no server is waited for to tell that."""
    counts = [cached_bytes(file, start, stop - start) for start, stop in ranges]
    if None in counts and not file.is_network:  # asked once: mincore takes a mapping
        found = residency(file, min(ranges)[0], max(stop for _, stop in ranges))
        counts = [found.resident_in(start, stop) for start, stop in ranges]
    return [one for one, count in zip(ranges, counts, strict=True) if count]
