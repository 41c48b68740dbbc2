"""Which parts of a file are in the page cache, and on which nodes."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from numaload.numa import syscalls
from numaload.numa.mapping import Mapping, map_file, populate_read
from numaload.numa.placement import count_pages
from numaload.numa.syscalls import PAGE
from numaload.storage.files import SourceFile

STEP = 1 << 30  # bytes asked about at a time: 256 KiB of answer
LOOK = 64 << 20  # bytes whose pages are mapped between two looks at what is in RAM
ABSENT_RUN = re.compile(rb"\0+")
PRESENT_RUN = re.compile(rb"[^\0]+")


@dataclass(frozen=True)
class Residency:
    """``absent``: (start, stop) byte ranges that are not in RAM, in order."""

    size: int
    absent: tuple[tuple[int, int], ...]
    known: bool = True  # False where the kernel does not tell: then all counts as absent

    @property
    def resident(self) -> int:
        return self.size - sum(stop - start for start, stop in self.absent)


def residency(file: SourceFile) -> Residency:
    """Ask mincore(2) about the whole file.

    Since Linux 5.2 it answers truthfully only to the file's owner and those who may write it, and
    says "resident" for everything to others: for them nothing is known.
    """
    if not _may_ask(file):
        return Residency(file.size, ((0, file.size),) if file.size else (), known=False)
    with map_file(file.fd, file.size) as mapping:
        return Residency(file.size, tuple(_absent(mapping)))


def _may_ask(file: SourceFile) -> bool:
    owner = os.fstat(file.fd).st_uid
    return os.geteuid() in (0, owner) or os.access(f"/proc/self/fd/{file.fd}", os.W_OK)


def _absent(mapping: Mapping) -> Iterator[tuple[int, int]]:
    """Runs of absent pages, in bytes, cut at the file's end."""
    runs: list[list[int]] = []
    for offset in range(0, mapping.length, STEP):
        length = min(STEP, mapping.length - offset)
        vector = syscalls.mincore(mapping.address + offset, length)
        for match in ABSENT_RUN.finditer(vector):
            start, stop = (offset + edge * PAGE for edge in match.span())
            if runs and runs[-1][1] == start:
                runs[-1][1] = stop
            else:
                runs.append([start, stop])
    return ((start, min(stop, mapping.length)) for start, stop in runs)


def cached_on(file: SourceFile, found: Residency) -> dict[int, int]:
    """{node: bytes} of the file's page cache. Looks only at what is resident: it reads nothing.

    What was found resident may be gone since. Mapping that would read it again, and Linux 6.1
    tries for ever where it cannot be read: so the kernel is asked just before, once more.
    """
    on: Counter[int] = Counter()
    with map_file(file.fd, file.size) as mapping:
        for start, stop in present(found):
            for offset in range(start, stop, LOOK):
                _map_present(mapping, offset, min(offset + LOOK, stop))
        for counts in count_pages([mapping.range]):
            on.update(counts)
    return {node: pages * PAGE for node, pages in sorted(on.items())}


def _map_present(mapping: Mapping, start: int, stop: int) -> None:
    vector = syscalls.mincore(mapping.address + start, stop - start)
    for match in PRESENT_RUN.finditer(vector):
        first, last = (start + edge * PAGE for edge in match.span())
        populate_read(mapping, first, min(last, stop))


def present(found: Residency) -> Iterator[tuple[int, int]]:
    """The complement of ``absent``: (start, stop) byte ranges that are in RAM."""
    begin = 0
    for start, stop in (*found.absent, (found.size, found.size)):
        if start > begin:
            yield begin, start
        begin = stop
