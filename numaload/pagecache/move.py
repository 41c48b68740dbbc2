"""Page cache from one node to another, without reading it again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from numaload.errors import NumaUnavailableError, warn_once
from numaload.numa import syscalls
from numaload.numa.syscalls import HUGE, PAGE
from numaload.pagecache.reading import Placing
from numaload.storage.files import SourceFile
from numaload.storage.residency import LOOK, Residency, map_present, map_quietly, present


def move_pages(
    files: Sequence[SourceFile], found: Sequence[Residency], placing: Placing
) -> tuple[int, dict[str, int]]:
    """Bytes that moved to the nodes asked for, and {why they stayed elsewhere: bytes}.

    Only pages that no other process maps can be moved.
    """
    moved, stayed = 0, Counter[str]()
    try:
        for file, resident in zip(files, found, strict=True):
            with map_quietly(file) as mapping:
                for start, stop in _steps(resident):
                    map_present(mapping, start, stop)
                    wrong = _wrong(mapping.address, start, stop, placing.nodes)
                    moved += _move(wrong, placing.nodes, stayed)
    except NumaUnavailableError as error:
        warn_once(
            "move_pages", f"page cache cannot be moved: {error}: numaload evict, then prewarm"
        )
    return moved, dict(stayed)


def _steps(resident: Residency) -> Iterator[tuple[int, int]]:
    for start, stop in present(resident):
        for at in range(start, stop, LOOK):
            yield at, min(at + LOOK, stop)


def _wrong(base: int, start: int, stop: int, nodes: Sequence[int]) -> list[int]:
    """Addresses of pages that are on other nodes."""
    pages = range(base + start, base + stop, PAGE)
    where = syscalls.pages_nodes(pages)
    return [a for a, node in zip(pages, where, strict=True) if node >= 0 and node not in nodes]


def _move(pages: Sequence[int], nodes: Sequence[int], stayed: Counter[str]) -> int:
    if not pages:
        return 0
    # Huge pages move as one: all of one go to one node.
    wanted = [nodes[page // HUGE % len(nodes)] for page in pages]
    moved = 0
    for status in syscalls.move_pages(pages, wanted):
        if status in nodes:
            moved += PAGE
        else:
            stayed[os.strerror(-status) if status < 0 else "the kernel does not say why"] += PAGE
    return moved
