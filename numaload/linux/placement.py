"""On which nodes pages really are, as the kernel tells afterwards.

Two witnesses. /proc/self/numa_maps counts every page and needs no privilege. move_pages asks for
random single pages; with none of n wrong, under 3/n of all pages are misplaced at 95 % confidence.
Both see only pages that this process has mapped: populate first.
"""

from __future__ import annotations

import os
import re
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

from numaload.errors import NumaError, PlacementError, check_limits, warn_once
from numaload.linux import pagemap, syscalls
from numaload.linux.lists import format_list
from numaload.linux.mapping import MappedMemory, populate_read
from numaload.linux.syscalls import HUGE, PAGE

PROC, NODES = "/proc/self", "/sys/devices/system/node"
ABSENT = -1  # in the counts: pages that are not in RAM, or not mapped here
SAMPLES = 10_000
MISPLACED = 10  # ranges that are named, at most
AGAIN = 4  # times that the kernel is asked where it says that pages are not mapped
ASKED = 1 << 30  # bytes whose pages move_pages is asked about at a time
LEAST_SHARE = 0.9  # of a fair part, on each of the nodes that share a replica
INDIVISIBLE = 16 << 20  # bytes of a file that one node may have to fill alone

Range = tuple[int, int]  # (address, bytes)
NodeRange = tuple[int, int, int]  # (first byte, end, node) of a mapping
# Words of numa_maps. File names cannot look like these: their blanks are escaped.
POLICY = re.compile(r"[0-9a-f]+ (.+?)(?: (?:file=(\S+)|heap|stack|huge|\w+=\d).*)?$")
NODE_PAGES = re.compile(r" N(\d+)=(\d+)(?!\S)")
KERNEL_PAGE = re.compile(r" kernelpagesize_kB=(\d+)")
HUGE_FIELDS = ("AnonHugePages:", "ShmemPmdMapped:", "FilePmdMapped:")  # of smaps


@dataclass
class Misplaced:
    """A range of a file that has pages on another node. found: {node: pages} by move_pages."""

    file: int
    start: int
    stop: int
    node: int
    found: dict[int, int]

    def __str__(self) -> str:
        where = f"bytes {self.start} to {self.stop} of file {self.file}"
        return f"{where} were asked for on node {self.node}, pages found: {self.found}"


class Asked(NamedTuple):
    """Say where one replica shall be.

    ranges: for each mapping, the node of each of its ranges, which begin at pages' borders; what is
    in none is no memory. No ranges where every page may be on any of the nodes.
    """

    nodes: list[int]
    mappings: Sequence[MappedMemory]
    ranges: Sequence[Sequence[NodeRange]] = ()

    @property
    def parts(self) -> Iterator[tuple[MappedMemory, int, int]]:
        """Yield (mapping, first byte, end) of all that there is memory for."""
        for i, mapping in enumerate(self.mappings):
            if not self.ranges and mapping.length:
                yield mapping, 0, mapping.length
            at = None
            for start, stop, _ in self.ranges[i] if self.ranges else ():
                if at is not None and at[1] != start:
                    yield mapping, *at
                    at = None
                at = (start if at is None else at[0]), stop
            if at is not None:
                yield mapping, *at


@dataclass
class Placement:
    """Where the pages of one replica are. Counts are pages of ``page_size`` bytes."""

    asked: list[int]
    pages: int
    on: dict[int, int]  # {node: pages} by numa_maps; -1 for pages that are nowhere
    sampled: dict[int, int] = field(default_factory=dict)  # the same by move_pages, of a sample
    huge_pages: int = 0  # bytes mapped by huge pages
    page_size: int = PAGE
    ranges: int = 1  # mappings, of a file each
    expected: dict[int, int] = field(default_factory=dict)  # {node: pages}, where ranges have nodes
    checked: int = 0  # such ranges that move_pages was asked about, page by page
    misplaced: list[Misplaced] = field(default_factory=list)  # the first of these that are wrong

    @property
    def placed(self) -> int:
        return sum(self.on.get(node, 0) for node in self.asked)

    @property
    def absent(self) -> int:
        return self.on.get(ABSENT, 0) + self.sampled.get(ABSENT, 0)

    @property
    def elsewhere(self) -> int:
        return self.pages - self.placed

    @property
    def even(self) -> bool:
        """Return whether nodes that share a replica have the parts that they shall have.

        Where no range has its node these are equal, as far as the replica divides.
        """
        if self.expected:
            return self.expected == {node: n for node, n in self.on.items() if node != ABSENT}
        fair = self.pages / max(1, len(self.asked))
        least = fair * LEAST_SHARE - self.ranges * INDIVISIBLE // PAGE
        return all(self.on.get(node, 0) >= least for node in self.asked)

    @property
    def right(self) -> bool:
        wrong = set(self.sampled) - set(self.asked)
        return self.elsewhere == 0 and not wrong and self.even and not self.misplaced

    def check(self, what: str) -> None:
        """Check it. Raises: PlacementError saying how many pages are where."""
        if not self.right:
            found = dict(sorted((Counter(self.on) or Counter(self.sampled)).items()))
            evenly = "" if self.even else f", unevenly: expected {self.expected or 'equal parts'}"
            evenly += "".join(f"; {one}" for one in self.misplaced[:1])
            raise PlacementError(
                f"{what}: {self.pages} pages asked for on node {format_list(self.asked)},"
                f" {self.placed} are there{evenly}; by node: {found}, by sample: {self.sampled}",
                {self.asked[0]: found},
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"placed": self.placed, "elsewhere": self.elsewhere}


def locate(replicas: Sequence[Asked]) -> list[Placement]:
    """Ask the kernel about several replicas at once.

    The kernel unmaps idle pages of a tmpfs at any time (reclaim, DAMON's pageout): where it says
    that some are not mapped, they are mapped again, and it is asked again.
    """
    placements: list[Placement] = []
    for _ in range(AGAIN if replicas else 0):
        placements = _ask(replicas)
        for one, found in zip(replicas, placements, strict=True):
            for mapping, start, stop in one.parts if found.absent else ():
                populate_read(mapping, start, stop)
        if not any(found.absent for found in placements):
            break
    return placements


def _ask(replicas: Sequence[Asked]) -> list[Placement]:
    """Read numa_maps, and smaps where needed, once for all: both walk all page tables."""
    live = [[m.range for m in one.mappings if m.length] for one in replicas]
    counts = count_pages([r for ranges in live for r in ranges])
    huge = pagemap.huge_ranges([r for ranges in live for r in ranges])
    nbytes = _huge_bytes([r for ranges in live for r in ranges], huge)
    placements = []
    for one, ranges in zip(replicas, live, strict=True):
        on: Counter[int] = Counter()
        for _ in ranges:
            on.update(next(counts))
        parts = [(mapping.address + start, stop - start) for mapping, start, stop in one.parts]
        pages = sum(
            -(-(stop - start) // mapping.page) * mapping.page // PAGE
            for mapping, start, stop in one.parts
        )
        on[ABSENT] = max(0, pages - sum(on.values()))
        huge_pages = sum(next(nbytes) for _ in ranges)
        # Of those that were set aside smaps says nothing in these fields.
        huge_pages = max(huge_pages, sum(m.length for m in one.mappings if m.page == HUGE))
        sampled = sample(parts)
        found = Placement(one.nodes, pages, dict(+on), sampled, huge_pages, ranges=len(ranges))
        if one.ranges:
            _ask_ranges(one, found, [piece for each in huge or () for piece in each])
        placements.append(found)
    return placements


def _ask_ranges(asked: Asked, found: Placement, huge: Sequence[Range]) -> None:
    """Ask about every range that has a node of its own. huge: addresses under huge pages.

    Of a huge page one address is asked: it is on one node.
    """
    inside = {address for start, stop in huge for address in range(start, stop, HUGE)}
    expected: Counter[int] = Counter()
    for file, (mapping, ranges) in enumerate(zip(asked.mappings, asked.ranges, strict=True)):
        for start, stop, node in ranges:
            expected[node] += -(-stop // mapping.page) * (mapping.page // PAGE) - start // PAGE
            there = _nodes_of(mapping.address + start, mapping.address + stop, inside)
            if there is None:  # said already
                continue
            found.checked += 1
            if set(there) != {node} and len(found.misplaced) < MISPLACED:
                found.misplaced.append(Misplaced(file, start, stop, node, there))
    found.expected = dict(sorted(expected.items()))


def _nodes_of(start: int, stop: int, huge: Collection[int]) -> dict[int, int] | None:
    """Return {node, or -1: pages} of these addresses; None where move_pages is refused."""
    pages, weights, at = list[int](), list[int](), start
    while at < stop:
        size = HUGE if at in huge and at + HUGE <= stop else PAGE
        pages.append(at)
        weights.append(size // PAGE)
        at += size
    try:
        nodes = syscalls.pages_nodes(pages)
    except NumaError as error:
        warn_once("move_pages", f"{error}; placement is verified by numa_maps alone")
        return None
    counts: Counter[int] = Counter()
    for node, weight in zip(nodes, weights, strict=True):
        counts[max(node, ABSENT)] += weight
    return dict(counts)


class Area(NamedTuple):
    """One line of numa_maps, or paragraph of smaps: a mapped range as the kernel divides them.

    policy, file: as numa_maps has them, blanks escaped; no file is anonymous memory.
    """

    start: int
    counts: dict[int, int]
    policy: str = ""
    file: str = ""


def _inside(areas: Sequence[Area], ranges: Sequence[Range]) -> Iterator[Counter[int]]:
    """Yield the counts of each range, summed. ``areas`` ascend, as the kernel lists them.

    A range is a whole MappedMemory: no area reaches beyond one.
    """
    starts = [area.start for area in areas]
    for address, length in ranges:
        counts: Counter[int] = Counter()
        for i in range(bisect_left(starts, address), bisect_left(starts, address + length)):
            counts.update(areas[i].counts)
        yield counts


def count_pages(ranges: Sequence[Range]) -> Iterator[dict[int, int]]:
    """Yield {node: pages mapped there} of each (address, length), from /proc/self/numa_maps.

    Where that file is hidden, by move_pages. A kernel without NUMA has neither, and no nodes:
    there, what is mapped is on node 0. Raises: NumaError.
    """
    areas, why = [], "empty"
    try:
        with open(f"{PROC}/numa_maps", encoding="utf-8", errors="replace", newline="\n") as file:
            areas = parse_numa_maps(file)
    except OSError as error:
        check_limits(error, f"{PROC}/numa_maps")
        why = error.strerror or str(error)
    if areas:  # every process has some
        return _inside(areas, ranges)
    try:
        return iter([_by_move_pages(*one) for one in ranges])
    except NumaError as error:
        if os.path.isdir(NODES):
            raise NumaError(
                f"{PROC}/numa_maps: {why}, and {error}: nothing tells where pages are",
                call="numa_maps",
                errno=error.errno or 0,
            ) from error
    try:
        with open(f"{PROC}/smaps", encoding="utf-8", errors="replace", newline="\n") as file:
            found = parse_smaps(file, ("Rss:",))
    except OSError as error:
        check_limits(error, f"{PROC}/smaps")
        raise NumaError(
            f"{PROC}/smaps: {error.strerror}", call="smaps", errno=error.errno or 0
        ) from error
    return _inside([Area(start, {0: nbytes // PAGE}) for start, nbytes in found], ranges)


def _by_move_pages(address: int, length: int) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for start in range(address, address + length, ASKED):
        stop = min(start + ASKED, address + length)
        nodes = syscalls.pages_nodes(range(start, stop, PAGE))
        counts.update(node for node in nodes if node >= 0)
    return dict(counts)


def parse_numa_maps(lines: Iterable[str]) -> list[Area]:
    """Return {node: base pages} of each mapped range that has any.

    ``7f3e00000000 bind:1 file=/dev/shm/x dirty=512 N1=512 kernelpagesize_kB=4``: the policy may
    hold a space, the file name is escaped, and N counts are in units of kernelpagesize.
    """
    areas = []
    for line in lines:
        counts = {int(node): int(pages) for node, pages in NODE_PAGES.findall(line)}
        if counts:
            unit = KERNEL_PAGE.search(line)
            scale = (int(unit[1]) << 10) // PAGE if unit else 1
            start = int(line.partition(" ")[0], 16)
            words = POLICY.match(line.rstrip("\n"))
            policy, file = (words[1], words[2] or "") if words else ("", "")
            scaled = {node: pages * scale for node, pages in counts.items()}
            areas.append(Area(start, scaled, policy, file))
    return areas


def sample(ranges: Sequence[Range], samples: int = SAMPLES) -> dict[int, int]:
    """Return {node, or -1: pages} of random pages, by move_pages; empty where that is refused.

    All pages where there are no more than ``samples``.
    """
    pages = [-(-length // PAGE) for _, length in ranges]
    total = sum(pages)
    if not total:
        return {}
    chosen: Sequence[int] = range(total)
    if total > samples:
        # Random, not every n-th: a stride would alias with interleaving. Some may come twice.
        numbers = struct.unpack(f"{samples}Q", os.urandom(8 * samples))
        chosen = sorted(number % total for number in numbers)
    firsts, addresses = list(accumulate(pages, initial=0)), list[int]()
    for (start, _), (first, last) in zip(ranges, pairwise(firsts), strict=True):
        inside = chosen[bisect_left(chosen, first) : bisect_left(chosen, last)]
        addresses += [start + (page - first) * PAGE for page in inside]
    try:
        nodes = syscalls.pages_nodes(addresses)
    except NumaError as error:
        warn_once("move_pages", f"{error}; placement is verified by numa_maps alone")
        return {}
    counts = Counter(nodes)
    absent = sum(counts.pop(node) for node in list(counts) if node < 0)
    return dict(counts) | ({ABSENT: absent} if absent else {})


def _huge_bytes(ranges: Sequence[Range], known: list[list[Range]] | None) -> Iterator[int]:
    """Yield the bytes of each range that huge pages map; 0 where nobody tells.

    known: the addresses under huge pages in each range, where the kernel says these.
    """
    if known is not None:
        return (sum(stop - start for start, stop in each) for each in known)
    try:
        with open(f"{PROC}/smaps", encoding="utf-8", errors="replace", newline="\n") as file:
            areas = [Area(start, {HUGE: n}) for start, n in parse_smaps(file, HUGE_FIELDS)]
    except OSError:
        areas = []
    return (counts[HUGE] for counts in _inside(areas, ranges))


def parse_smaps(lines: Iterable[str], fields: Collection[str]) -> list[tuple[int, int]]:
    """Return (first address, bytes in these fields together) of each mapped range."""
    areas: list[list[int]] = []
    for line in lines:
        head, _, rest = line.partition(" ")
        if head in fields:
            areas[-1][1] += int(rest.split()[0]) << 10
        elif not head.rstrip().endswith(":"):  # 7f3e00000000-7f3e40000000 r--s ...
            areas.append([int(head.partition("-")[0], 16), 0])
    return [(start, nbytes) for start, nbytes in areas]
