"""Find the nodes of a file's resident pages. Where only one node has memory, it is that.

The kernel tells the node of a page that is mapped (move_pages), so what is in RAM is mapped: all of
it up to 8 GiB of a file, and random pages of more, with the error of that stated.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from numaload.errors import NumaError, warn_once
from numaload.files.residency import (
    LOOK,
    cached_on,
    map_present,
    map_quietly,
    may_ask,
    residency,
)
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import populate_read
from numaload.linux.syscalls import PAGE
from numaload.pagecache.counting import Counting, Runs, is_resident, spread, uncertain

SAMPLED_FROM = 8 << 30  # resident bytes of a file; each GiB of them takes some 0.1 s
MOST_SAMPLES = 5000  # at a time: each takes a page table, 4 KiB
PIECES = 1024  # mapped at a time, of LOOK bytes at most, for the same reason
MOST_NODES = 254  # that a byte has names for

ByNode = tuple[dict[int, int], int]  # {node: bytes}, and their error at 95 %


class Locating:
    """``on(start, stop, resident, samples)``: the nodes of a range's resident bytes.

    This one knows nothing.
    """

    def on(self, start: int, stop: int, resident: int, samples: int) -> ByNode:  # noqa: ARG002
        return {}, 0


class OnOneNode(Locating):
    def __init__(self, node: int) -> None:
        self.node = node

    def on(self, start: int, stop: int, resident: int, samples: int) -> ByNode:  # noqa: ARG002
        return ({self.node: resident} if resident else {}), 0


class ByEveryPage(Locating):
    """Asked once, about all that is resident; a byte for each of these pages."""

    def __init__(self, file: SourceFile, runs: Runs) -> None:
        self._names: list[int] = []
        self._firsts: list[int] = []  # pages, of the pieces
        self._pieces: list[bytes] = []
        starts = [(at, min(at + LOOK, b)) for a, b in runs for at in range(a, b, LOOK)]
        for i in range(0, len(starts), PIECES):
            with map_quietly(file) as mapping:
                for start, stop in starts[i : i + PIECES]:
                    there = map_present(mapping, start, stop)
                    self._firsts.append(start // PAGE)
                    self._pieces.append(self._named(mapping.address + start, there))

    def _named(self, address: int, there: bytes) -> bytes:
        """Return for each page 1 + the index of its node in ``_names``, or 0."""
        pages = [i for i, is_there in enumerate(there) if is_there]
        found, named = bytearray(len(there)), {node: i for i, node in enumerate(self._names, 1)}
        nodes = syscalls.pages_nodes([address + i * PAGE for i in pages])
        for i, node in zip(pages, nodes, strict=True):
            if node >= 0 and node not in named:
                self._names.append(node)
                named[node] = len(self._names)
            found[i] = named.get(node, 0)
        return bytes(found)

    def on(self, start: int, stop: int, resident: int, samples: int) -> ByNode:  # noqa: ARG002
        counts = Counter[int]()
        for part in self._parts(start // PAGE, -(-stop // PAGE)):
            for i, node in enumerate(self._names, 1):
                counts[node] += part.count(i)
        return _divided(resident, counts), 0

    def _parts(self, first: int, end: int) -> Iterator[bytes]:
        for i in range(max(0, bisect_right(self._firsts, first) - 1), len(self._firsts)):
            begin = self._firsts[i]
            if begin >= end:
                break
            yield self._pieces[i][max(0, first - begin) : max(0, end - begin)]


class BySamples(Locating):
    def __init__(self, file: SourceFile, runs: Runs | None) -> None:
        self._file, self._runs = file, runs

    def on(self, start: int, stop: int, resident: int, samples: int) -> ByNode:
        addresses = []
        # Each time anew: page tables of all that was ever mapped would add up to gigabytes.
        with map_quietly(self._file) as mapping:
            for page in self._pages(start, stop, min(samples, MOST_SAMPLES)) if resident else ():
                if is_resident(mapping, page):
                    populate_read(mapping, page * PAGE, (page + 1) * PAGE)
                    addresses.append(mapping.address + page * PAGE)
            counts = Counter(node for node in syscalls.pages_nodes(addresses) if node >= 0)
        found = sum(counts.values())
        error = max((uncertain(n / found, found) for n in counts.values()), default=0)
        return _divided(resident, counts), min(resident, round(error * resident))

    def _pages(self, start: int, stop: int, samples: int) -> Iterator[int]:
        """Yield random pages, of those known to be resident or else of all."""
        runs = [(start, stop)] if self._runs is None else self._runs.within(start, stop)
        pages = [range(a // PAGE, -(-b // PAGE)) for a, b in runs]
        firsts = list(accumulate(map(len, pages), initial=0))
        for i in spread(0, firsts[-1], samples) if pages else ():
            which = bisect_right(firsts, i) - 1
            yield pages[which][i - firsts[which]]


class ByNumaMaps(Locating):
    """Of the whole file only: it is one mapping, and the kernel counts no parts of that."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file

    def on(self, start: int, stop: int, resident: int, samples: int) -> ByNode:  # noqa: ARG002
        if stop - start < self._file.size:
            return {}, 0
        return _divided(resident, cached_on(self._file, residency(self._file))), 0


def locating(file: SourceFile, count: Counting, nodes: Sequence[int], resident: int) -> Locating:
    """Return the way for this file. nodes: those with memory; resident: its bytes in RAM."""
    if len(nodes) == 1:
        return OnOneNode(nodes[0])
    if not (resident and may_ask(file)):
        return Locating()  # what must not be asked about could not be mapped without reading it
    if not _may_ask_pages():
        return ByNumaMaps(file)
    runs = count.runs()
    if runs is None or resident > SAMPLED_FROM or len(nodes) > MOST_NODES:
        return BySamples(file, runs)
    return ByEveryPage(file, runs)


def _may_ask_pages() -> bool:
    try:
        syscalls.pages_nodes([])
    except NumaError as error:
        warn_once("move_pages_residency", f"{error}; nodes are told of whole files, not of tensors")
        return False
    return True


def _divided(nbytes: int, pages: Mapping[int, int]) -> dict[int, int]:
    """Divide bytes in the proportion of pages; they add up."""
    total, seen, done, on = sum(pages.values()), 0, 0, {}
    for node, count in sorted(pages.items()):
        seen += count
        upto = nbytes * seen // max(total, 1)
        if upto > done:
            on[node] = upto - done
        done = upto
    return on
