"""What the kernel says of kt-kernel in this process: where its weights, copies and threads are."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from numaload.backends.kt_kernel_copies import Copy
from numaload.backends.kt_kernel_workers import Worker
from numaload.errors import printable
from numaload.numa.lists import format_list
from numaload.numa.placement import ABSENT, PROC, Area, Range, parse_numa_maps, sample
from numaload.numa.syscalls import PAGE

MIB = 1 << 20


@dataclass
class Given:
    """Tensors that kt-kernel was given from one memory. ``pages``: {node, or -1: pages}."""

    nodes: list[int]  # whose replica it is; none: the file, in the page cache
    tensors: int
    nbytes: int
    pages: dict[int, int] = field(default_factory=dict)  # by move_pages, of a sample if many

    @property
    def local(self) -> bool:
        """Whether every page that was asked for is there."""
        return set(self.pages) <= set(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"local": self.local}


@dataclass
class Report:
    """All by the kernel's word, at the time of asking. Bytes.

    given: what kt-kernel was handed addresses of. copies: what it made of that for itself, found by
    content in this process's memory; ``searched`` is False where there was too much of it.
    workers: its threads.
    """

    version: str
    hook: str
    path: str
    given: list[Given] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    searched: bool = True
    workers: list[Worker] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether all pages of replicas that were asked for, and all workers, are on their node."""
        replicas = [given for given in self.given if given.nodes]
        return all(g.local for g in replicas) and all(w.right for w in self.workers)

    @property
    def copied(self) -> dict[int, int]:
        """{node: bytes} of the copies; where their pages are, by the kernel."""
        found: Counter[int] = Counter()
        for copied in self.copies:
            total = sum(copied.pages.values())
            for node, pages in copied.pages.items():
                found[node] += copied.nbytes * pages // total
        return dict(found)

    def to_dict(self) -> dict[str, Any]:
        row = vars(self) | {"right": self.right, "copied": self.copied}
        for key in ("given", "workers"):
            row[key] = [one.to_dict() for one in row[key]]
        return row | {"copies": [vars(copied) for copied in self.copies]}

    def __str__(self) -> str:
        lines = [f"kt-kernel {self.version}: {self.path}", *map(_given_line, self.given)]
        lines += _copies_lines(self.copies)
        if self.given and not self.copies:
            lines.append("no copies: kt-kernel computes from these pages")
        if not self.searched:
            lines.append("there is more memory than was searched for copies")
        return "\n".join(map(printable, [*lines, *self.workers, *self.notes]))


def _copies_lines(copies: Iterable[Copy]) -> list[str]:
    """A line for each part, which is a subpool's."""
    parts: dict[tuple[int, int], list[Copy]] = {}
    for copied in copies:
        parts.setdefault((copied.first, copied.count), []).append(copied)
    return [
        f"copies of weights {first} to {first + count} of the inner dimension:"
        f" {len(group)} tensors, {sum(c.nbytes for c in group) / MIB:.1f} MiB;"
        f" pages: {_pages(sum((Counter(c.pages) for c in group), Counter()))}"
        for (first, count), group in sorted(parts.items())
    ]


def _given_line(given: Given) -> str:
    where = f"replica of node {format_list(given.nodes)}" if given.nodes else "page cache"
    size = f"{given.nbytes / MIB:.1f} MiB"
    return f"{where}: {given.tensors} tensors, {size}; pages: {_pages(given.pages)}"


def _pages(pages: dict[int, int]) -> str:
    words = {node: f"on node {node}" for node in pages} | {ABSENT: "not mapped yet"}
    found = (f"{pages[node]} {words[node]}" for node in sorted(pages))
    return ", ".join(found) or "not asked"


def locate_copies(copies: Iterable[Copy]) -> None:
    """Fill in where their pages are: by move_pages, and by numa_maps what that does not see.

    From 6.1 on, for some versions, move_pages takes pages for absent that NUMA balancing watches
    (mm/gup.c, gup_can_follow_protnone). numa_maps counts them, for the mapped range around a copy.
    """
    areas = _areas()
    starts = [area.start for area in areas]
    for copied in copies:
        copied.pages = pages_by_node([(copied.address, copied.nbytes)])
        hidden = copied.pages.get(ABSENT, 0)
        around = areas[max(0, bisect_right(starts, copied.address) - 1)].counts if areas else {}
        if hidden and around:
            del copied.pages[ABSENT]
            for node, pages in around.items():
                share = -(-hidden * pages // sum(around.values()))
                copied.pages[node] = copied.pages.get(node, 0) + share


def _areas() -> list[Area]:
    try:
        with open(f"{PROC}/numa_maps", encoding="utf-8", errors="replace", newline="\n") as file:
            return parse_numa_maps(file)
    except OSError:  # a kernel without NUMA
        return []


def pages_by_node(ranges: Iterable[Range]) -> dict[int, int]:
    """{node, or -1: pages} of these (address, bytes), by move_pages; of a sample if many."""
    whole = [(a // PAGE * PAGE, a % PAGE + nbytes) for a, nbytes in ranges if nbytes]
    return sample(whole)
