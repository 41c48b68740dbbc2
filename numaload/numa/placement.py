"""On which nodes pages really are, as the kernel tells afterwards.

Two witnesses. /proc/self/numa_maps counts every page and needs no privilege. move_pages asks for
random single pages; with none of n wrong, under 3/n of all pages are misplaced at 95 % confidence.
Both see only pages that this process has mapped: populate first.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from numaload.errors import NumaError, PlacementError, warn_once
from numaload.numa import syscalls
from numaload.numa.lists import format_list
from numaload.numa.mapping import Mapping
from numaload.numa.syscalls import PAGE

ABSENT = -1  # in the counts: pages that are not in RAM, or not mapped here
SAMPLES = 10_000


@dataclass
class Placement:
    """Where the pages of one replica are. Counts are pages of ``page_size`` bytes."""

    asked: list[int]
    pages: int
    on: dict[int, int]  # {node: pages} by numa_maps; -1 for pages that are nowhere
    sampled: dict[int, int] = field(default_factory=dict)  # the same by move_pages, of a sample
    huge_pages: int = 0  # bytes mapped by huge pages
    page_size: int = PAGE

    @property
    def placed(self) -> int:
        return sum(self.on.get(node, 0) for node in self.asked)

    @property
    def elsewhere(self) -> int:
        return self.pages - self.placed

    @property
    def right(self) -> bool:
        wrong = set(self.sampled) - set(self.asked)
        return self.elsewhere == 0 and not wrong

    def check(self, what: str) -> None:
        """Raises: PlacementError saying how many pages are where."""
        if not self.right:
            found = dict(sorted((Counter(self.on) or Counter(self.sampled)).items()))
            raise PlacementError(
                f"{what}: {self.pages} pages asked for on node {format_list(self.asked)},"
                f" {self.placed} are there; by node: {found}, by sample: {self.sampled}",
                {self.asked[0]: found},
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"placed": self.placed, "elsewhere": self.elsewhere}


def locate(groups: Sequence[tuple[list[int], Sequence[Mapping]]]) -> list[Placement]:
    """Ask the kernel about several replicas at once: [(nodes asked for, its mappings), ...].

    One reading of numa_maps serves all of them: it walks the page tables of the whole process.
    """
    live = [[m for m in mappings if m.length] for _, mappings in groups]
    counts = count_pages([m.range for mappings in live for m in mappings])
    placements = []
    for (asked, _), mappings in zip(groups, live, strict=True):
        on: Counter[int] = Counter()
        for _ in mappings:
            on.update(next(counts))
        pages = sum(-(-m.length // PAGE) for m in mappings)
        on[ABSENT] = max(0, pages - sum(on.values()))
        ranges = [m.range for m in mappings]
        placements.append(Placement(asked, pages, dict(+on), _sample(ranges), _huge_bytes(ranges)))
    return placements


def count_pages(ranges: Sequence[tuple[int, int]]) -> Iterator[dict[int, int]]:
    """For each (address, length): {node: pages mapped there}, from /proc/self/numa_maps."""
    lines = _numa_maps()
    found: list[Counter[int]] = [Counter() for _ in ranges]
    for start, on in lines:
        for (address, length), counts in zip(ranges, found, strict=True):
            if address <= start < address + length:
                counts.update(on)
    return iter(found)


def _numa_maps() -> list[tuple[int, dict[int, int]]]:
    """(start address, {node: base pages}) of each mapped range.

    ``7f3e00000000 bind:1 file=/dev/shm/x dirty=512 N1=512 kernelpagesize_kB=4``: the policy may
    hold a space, the file name is escaped, and N counts are in units of kernelpagesize.
    """
    rows = []
    try:
        with open("/proc/self/numa_maps", encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    except OSError as error:
        raise NumaError(f"/proc/self/numa_maps: {error.strerror}", call="numa_maps") from error
    for line in lines:
        words = line.split()
        counts = {
            int(w[1 : w.index("=")]): int(w[w.index("=") + 1 :]) for w in words if _is_count(w)
        }
        if counts:
            unit = next((int(w[18:]) for w in words if w.startswith("kernelpagesize_kB=")), 4)
            scale = (unit << 10) // PAGE
            rows.append((int(words[0], 16), {n: c * scale for n, c in counts.items()}))
    return rows


def _is_count(word: str) -> bool:
    node, _, count = word[1:].partition("=")
    return word[0] == "N" and node.isdigit() and count.isdigit()


def _sample(ranges: Sequence[tuple[int, int]], samples: int = SAMPLES) -> dict[int, int]:
    """{node: pages} of random pages, by move_pages; empty where the call is refused."""
    pages = [-(-length // PAGE) for _, length in ranges]
    total = sum(pages)
    if not total:
        return {}
    # Random, not every n-th: a stride would alias with interleaving.
    chosen = random.sample(range(total), samples) if total > samples else range(total)
    addresses, first = [], 0
    for (address, _), count in zip(ranges, pages, strict=True):
        inside = (i - first for i in chosen if first <= i < first + count)
        addresses += [address + i * PAGE for i in inside]
        first += count
    try:
        nodes = syscalls.pages_nodes(addresses)
    except NumaError as error:
        warn_once("move_pages", f"{error}; placement is verified by numa_maps alone")
        return {}
    return dict(Counter(max(node, ABSENT) for node in nodes))


def _huge_bytes(ranges: Sequence[tuple[int, int]]) -> int:
    """Bytes of these ranges that are mapped by huge pages, from /proc/self/smaps."""
    total, inside = 0, False
    try:
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            for line in file:
                head = line.split(None, 1)[0]
                if "-" in head and not head.endswith(":"):
                    start = int(head.split("-")[0], 16)
                    inside = any(a <= start < a + n for a, n in ranges)
                elif inside and head in ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:"):
                    total += int(line.split()[1]) << 10
    except OSError:
        return 0
    return total
