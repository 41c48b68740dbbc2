"""Count what of a model is in the page cache: each file, each tensor, on which nodes.

A byte counts where its page is in RAM. Tensors share pages at their edges, and each has only its
own bytes of those: so tensors and what is between them add up to the file. By node, the resident
bytes are divided as the pages that hold them are.
"""

from __future__ import annotations

import os
import random
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, islice, pairwise
from math import sqrt
from typing import Any, NamedTuple

from numaload.errors import FormatError, NumaError, ReadError, reason, warn_once
from numaload.files.residency import (
    Residency,
    asked_by,
    cached_bytes,
    cached_on,
    map_present,
    map_quietly,
    may_ask,
    present,
    steps,
)
from numaload.files.residency import residency as residency_of
from numaload.files.source import SourceFile
from numaload.formats import gguf, safetensors
from numaload.formats.metadata import ReadAt
from numaload.formats.shards import SUFFIX
from numaload.linux import syscalls
from numaload.linux.syscalls import PAGE
from numaload.machine.topology import topology
from numaload.pagecache.choice import Source, models_of, real

START = 9  # bytes that tell one format from the other
HEAD, BEYOND = 1 << 30, 8 << 20  # bytes: no header is longer, and none is read in larger parts
CELLS = 60  # into which a file is divided for a bar

SAMPLED_FROM = 8 << 30  # resident bytes of a file; each GiB of them takes some 0.1 s to locate
FILE_SAMPLES, TENSOR_SAMPLES = 5000, 500  # pages of more: each takes a page table, 4 KiB
RANGES = 1024  # mapped at a time, for the same reason
Z = 1.96  # standard deviations that 95 % are within
NONE_OF = 3  # over n: the share of which none being found in n is as likely as 5 %

ByNode = tuple[dict[int, int], int]  # {node: bytes}, and their error at 95 %


class Span(NamedTuple):
    """A tensor's place in its file, in bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass
class TensorResidency:
    """Bytes. nodes_error: at 95 %, and 0 where every page was asked about."""

    name: str
    nbytes: int
    resident: int
    on_nodes: dict[int, int] = field(default_factory=dict)
    nodes_error: int = 0


@dataclass
class FileResidency:
    """Bytes, as of a tensor, of a whole file.

    known: False where the kernel does not tell; then ``resident`` is 0 and ``how`` is "unknown".
    how: "cachestat" or "mincore". on_nodes: empty where that is not known.
    cells: the resident share of each of up to 60 equal parts, in order.
    """

    path: str
    size: int
    resident: int = 0
    known: bool = True
    how: str = "unknown"
    on_nodes: dict[int, int] = field(default_factory=dict)
    nodes_error: int = 0
    cells: list[float] = field(default_factory=list)
    tensors: list[TensorResidency] = field(default_factory=list)


@dataclass
class ResidencyReport:
    """``files`` in order, each once. notes: files that are no models, so without tensors."""

    files: list[FileResidency]
    notes: list[str] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, TensorResidency]:
        """Return tensors by name; where models share a name, the last one's."""
        return {tensor.name: tensor for file in self.files for tensor in file.tensors}

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def resident(self) -> int:
        return sum(file.resident for file in self.files)

    @property
    def known(self) -> bool:
        return all(file.known for file in self.files)

    @property
    def on_nodes(self) -> dict[int, int]:
        on: Counter[int] = Counter()
        for file in self.files:
            on.update(file.on_nodes)
        return dict(sorted(on.items()))

    def to_dict(self) -> dict[str, Any]:
        whole = ("size", "resident", "known", "on_nodes")
        return asdict(self) | {name: getattr(self, name) for name in whole}


def residency(what: Source | Sequence[Source], *, tensors: bool = True) -> ResidencyReport:
    """Count what of these files, and their split siblings, is in RAM. Bring nothing there.

    what: a path (of safetensors also an index or a folder), opened weights, or several of them.
    tensors: each tensor too, of which the headers tell; they do not stay in RAM either.
    Raises: ReadError, SplitError, NumaError, UsageError.
    """
    report, nodes = ResidencyReport([]), nodes_with_memory()
    paths = {real(path): path for paths in models_of(what) for path in paths}
    for path in paths.values():
        with SourceFile(path) as file:
            spans: Sequence[Span] = ()
            try:
                spans = spans_of(file) if tensors else ()
            except FormatError as error:
                report.notes.append(f"no tensors are shown: {error}")
            report.files.append(look(file, spans, nodes))
    return report


def spans_of(file: SourceFile) -> list[Span]:
    """Return a file's tensors by its header, of which nothing more stays in RAM.

    Raises: FormatError if it is no model, ReadError.
    """
    before = residency_of(file, 0, HEAD)
    try:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
    except OSError as error:
        raise ReadError(f"posix_fadvise: {reason(error)}", path=file.path) from error
    end = 0
    try:
        start = file.read_at(0, min(START, file.size))
        header = _parser(file.path, start)(file.read_at, file.size, file.path)
        spans = [Span(t.name, t.offset, t.nbytes) for t in header.tensors]
        end = min((span.offset for span in spans), default=0)
        return spans
    finally:
        for first, last in before.absent if before.known else ():
            if first <= end:
                file.drop_cache(first, min(last, end + BEYOND) - first)


def _parser(path: str, start: bytes) -> Callable[[ReadAt, int, str], Any]:
    ours = path.endswith(SUFFIX) or safetensors.looks_like(start)
    is_gguf = start.startswith(gguf.MAGIC) or not ours
    return gguf.parse_header if is_gguf else safetensors.parse_header


def nodes_with_memory() -> list[int]:
    return [node.id for node in topology().nodes.values() if node.has_memory] or [0]


def look(file: SourceFile, spans: Iterable[Span], nodes: Sequence[int]) -> FileResidency:
    """Look at one file and these tensors of it; nodes: the machine's nodes with memory.

    Raises: NumaError.
    """
    how, spans = asked_by(file), list(spans)
    if how is None:
        return FileResidency(file.path, file.size, known=False)
    # Each page is asked about where cachestat does not count, or to ask for the page's node.
    every = how == "mincore" or (len(nodes) > 1 and may_ask(file))
    found = residency_of(file) if every else None
    count = found.resident_in if found else partial(_cached, file)
    ranges = [(0, file.size), *((span.offset, span.offset + span.nbytes) for span in spans)]
    counts = [count(*each) for each in ranges]
    located = _on_nodes(file, found, nodes, list(zip(ranges, counts, strict=True)))
    report = FileResidency(file.path, file.size, counts[0], how=how)
    report.cells = list(_cells(report, count))
    report.on_nodes, report.nodes_error = located[0]
    report.tensors = [
        TensorResidency(span.name, span.nbytes, resident, *on)
        for span, resident, on in zip(spans, counts[1:], located[1:], strict=True)
    ]
    return report


def _cached(file: SourceFile, start: int, stop: int) -> int:
    found = cached_bytes(file, start, stop - start) if start < stop else 0
    # A call that fails now, though it answered before, has not said that nothing is there.
    return residency_of(file, start, stop).resident if found is None else found


def _cells(file: FileResidency, count: Callable[[int, int], int]) -> list[float]:
    if file.resident in (0, file.size):
        return [float(file.resident > 0)] * min(CELLS, file.size)
    edges = pairwise(file.size * i // CELLS for i in range(CELLS + 1))
    return [count(a, b) / (b - a) for a, b in edges if a < b]


def _on_nodes(
    file: SourceFile,
    found: Residency | None,
    nodes: Sequence[int],
    places: Sequence[tuple[tuple[int, int], int]],
) -> list[ByNode]:
    """Find the nodes of ranges' resident bytes; the first range is the file.

    places: ((start, stop), resident bytes). found: None where mincore(2) must not be asked about
    the file: its pages cannot be mapped then without reading it.
    """
    resident = places[0][1]
    if len(nodes) == 1:
        return [({nodes[0]: nbytes} if nbytes else {}, 0) for _, nbytes in places]
    if not (found and resident):
        return [({}, 0) for _ in places]
    if not _may_ask_pages():
        return [(_divided(resident, cached_on(file, found)), 0), *(({}, 0) for _ in places[1:])]
    pages = _ResidentPages(found)
    if resident > SAMPLED_FROM:
        samples = [FILE_SAMPLES] + [TENSOR_SAMPLES] * (len(places) - 1)
        return [_by_samples(file, pages, *each) for each in zip(places, samples, strict=True)]
    where = _nodes_of(file, found)
    return [
        (_divided(nbytes, Counter(where[pages.touched(*place)])), 0) for place, nbytes in places
    ]


class _ResidentPages:
    """The resident pages of a file, numbered in order from 0."""

    def __init__(self, found: Residency) -> None:
        self._starts = [start for start, _ in present(found)]
        lengths = (-(-(stop - start) // PAGE) for start, stop in present(found))
        self._numbers = list(accumulate(lengths, initial=0))  # of the first page of each range

    def touched(self, start: int, stop: int) -> slice:
        """Return the numbers of the pages that a byte range touches."""
        return slice(self._number(start // PAGE * PAGE), self._number(-(-stop // PAGE) * PAGE))

    def _number(self, place: int) -> int:
        """Return how many resident pages begin before this one."""
        which = bisect_right(self._starts, place) - 1
        if which < 0:
            return 0
        number = self._numbers[which] + (place - self._starts[which]) // PAGE
        return min(number, self._numbers[which + 1])

    def place(self, number: int) -> int:
        """Return where in the file a page begins."""
        which = bisect_right(self._numbers, number) - 1
        return self._starts[which] + (number - self._numbers[which]) * PAGE


def _nodes_of(file: SourceFile, found: Residency) -> array[int]:
    """Return the node of each resident page; negative: it is there no more."""
    nodes, todo = array("h"), steps(present(found))
    # Not all in one mapping: scattered pages take a page table each.
    while ranges := list(islice(todo, RANGES)):
        with map_quietly(file) as mapping:
            for start, stop in ranges:
                map_present(mapping, start, stop)
                pages = range(mapping.address + start, mapping.address + stop, PAGE)
                nodes.extend(syscalls.pages_nodes(pages))
    return nodes


def _by_samples(
    file: SourceFile, pages: _ResidentPages, place: tuple[tuple[int, int], int], samples: int
) -> ByNode:
    (start, stop), resident = place
    if not resident:
        return {}, 0
    addresses, touched = [], pages.touched(start, stop)
    # Each time anew: page tables of all that was ever mapped would add up to gigabytes.
    with map_quietly(file) as mapping:
        for number in spread(touched.start, touched.stop, samples):
            at = pages.place(number)
            map_present(mapping, at, at + PAGE)
            addresses.append(mapping.address + at)
        counts = Counter(node for node in syscalls.pages_nodes(addresses) if node >= 0)
    found = counts.total()
    error = max((uncertain(each / found, found) for each in counts.values()), default=0)
    return _divided(resident, counts), min(resident, round(error * resident))


def spread(first: int, end: int, count: int) -> Iterator[int]:
    """Yield ``count`` random numbers, one from each of as many equal parts, in order."""
    each = (end - first) / count
    for i in range(count):
        yield min(end - 1, first + int((i + random.random()) * each))  # noqa: S311


def uncertain(share: float, samples: int) -> float:
    """Return the error of a sampled share at 95 %: at most that of samples not spread."""
    return max(Z * sqrt(share * (1 - share) / samples), NONE_OF / samples)


def _may_ask_pages() -> bool:
    try:
        syscalls.pages_nodes([])
    except NumaError as error:
        warn_once("move_pages_residency", f"{error}; nodes are told of whole files, not of tensors")
        return False
    return True


def _divided(nbytes: int, pages: Mapping[int, int]) -> dict[int, int]:
    """Divide bytes in the proportion of the pages on each node; they add up."""
    known = sorted((node, count) for node, count in pages.items() if node >= 0)
    total, seen, done, on = sum(count for _, count in known), 0, 0, {}
    for node, count in known:
        seen += count
        upto = nbytes * seen // total
        if upto > done:
            on[node] = upto - done
        done = upto
    return on
