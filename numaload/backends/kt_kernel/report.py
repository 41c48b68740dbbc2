"""What the kernel says of kt-kernel in this process: where its weights, copies and threads are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from numaload.backends.kt_kernel.workers import Worker
from numaload.errors import printable
from numaload.linux.lists import format_list
from numaload.linux.placement import ABSENT, PROC, Range, parse_numa_maps, sample
from numaload.linux.syscalls import PAGE

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
        """Return whether every page that was asked for is on its node."""
        return set(self.pages) <= set(self.nodes)

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"local": self.local}


@dataclass
class Report:
    """Say what Linux answered when it was asked about kt-kernel. Sizes are bytes.

    given: what kt-kernel was handed addresses of. grown: {node: bytes} by which this process's own
    memory grew since the first of them; None where the kernel does not say. workers: its threads.
    """

    version: str
    hook: str
    path: str
    given: list[Given] = field(default_factory=list)
    grown: dict[int, int] | None = None
    workers: list[Worker] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Return whether all pages of replicas that were asked for, and all workers, are local."""
        replicas = [given for given in self.given if given.nodes]
        return all(g.local for g in replicas) and all(w.right for w in self.workers)

    @property
    def copied(self) -> dict[int, int]:
        """Return ``grown`` where it is at least half of what was given: then it holds copies."""
        given = sum(one.nbytes for one in self.given)
        grown = {node: n for node, n in (self.grown or {}).items() if n > 0}
        return grown if given and 2 * sum(grown.values()) >= given else {}

    def to_dict(self) -> dict[str, Any]:
        row = vars(self) | {"right": self.right, "copied": self.copied}
        for key in ("given", "workers"):
            row[key] = [one.to_dict() for one in row[key]]
        return row

    def __str__(self) -> str:
        lines = [f"kt-kernel {self.version}: {self.path}", *map(_given_line, self.given)]
        if self.given:
            lines.append(self._copies_line())
        return "\n".join(map(printable, [*lines, *self.workers, *self.notes]))

    def _copies_line(self) -> str:
        if self.grown is None:
            return f"copies: unknown, {PROC}/numa_maps cannot be read"
        if not self.copied:
            return "no copies: kt-kernel computes from these pages"
        sizes = (f"{n / MIB:.1f} MiB on node {node}" for node, n in sorted(self.copied.items()))
        return f"copies: this process's own memory grew by {', '.join(sizes)}"


def _given_line(given: Given) -> str:
    where = f"replica of node {format_list(given.nodes)}" if given.nodes else "page cache"
    size = f"{given.nbytes / MIB:.1f} MiB"
    return f"{where}: {given.tensors} tensors, {size}; pages: {_pages(given.pages)}"


def _pages(pages: Mapping[int, int]) -> str:
    words = {node: f"on node {node}" for node in pages} | {ABSENT: "not mapped yet"}
    found = (f"{pages[node]} {words[node]}" for node in sorted(pages))
    return ", ".join(found) or "not asked"


def pages_by_node(ranges: Iterable[Range]) -> dict[int, int]:
    """Count pages of (address, bytes) by node, or -1, with move_pages; of a sample if many."""
    return sample([(a // PAGE * PAGE, a % PAGE + nbytes) for a, nbytes in ranges if nbytes])


def own_memory() -> dict[int, int] | None:
    """Count this process's anonymous memory by node, in bytes; None where the kernel hides it.

    kt-kernel tells nobody where it copied to, but its copies are plain ``new`` memory.
    """
    found: Counter[int] = Counter()
    try:
        with open(f"{PROC}/numa_maps", encoding="utf-8", errors="replace", newline="\n") as file:
            lines = [line for line in file if " anon=" in line and " file=" not in line]
    except OSError:  # also on a kernel without NUMA
        return None
    for area in parse_numa_maps(lines):
        found.update({node: pages * PAGE for node, pages in area.counts.items()})
    return dict(found)
