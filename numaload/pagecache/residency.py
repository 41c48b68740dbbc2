"""Count what of a model is in the page cache: each file, each tensor, on which nodes.

A byte counts where its page is in RAM. Tensors share pages at their edges, and each has only its
own bytes of those: so tensors and what is between them add up to the file. By node, the resident
bytes are divided as the pages that hold them are.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from math import hypot
from typing import Any, NamedTuple

from numaload.errors import FormatError, ReadError, reason
from numaload.files.residency import residency as absent_runs
from numaload.files.source import SourceFile
from numaload.formats import gguf, safetensors
from numaload.formats.metadata import ReadAt
from numaload.formats.shards import SUFFIX
from numaload.machine.topology import topology
from numaload.pagecache.choice import Source, models_of, real
from numaload.pagecache.counting import Counting, counting
from numaload.pagecache.located import Locating, locating

START = 9  # bytes that tell one format from the other
HEAD, BEYOND = 1 << 30, 8 << 20  # bytes: no header is longer, and none is read in larger parts
CELLS = 60  # into which a file is divided for a bar
FILE_SAMPLES, TENSOR_SAMPLES, CELL_SAMPLES = 20_000, 500, 200  # pages, where samples are taken


class Span(NamedTuple):
    """A tensor's place in its file, in bytes."""

    name: str
    offset: int
    nbytes: int


@dataclass
class TensorResidency:
    """Bytes. Errors are at 95 %, and 0 where every page was asked about."""

    name: str
    nbytes: int
    resident: int
    error: int = 0
    on_nodes: dict[int, int] = field(default_factory=dict)
    nodes_error: int = 0


@dataclass
class FileResidency:
    """Bytes, as of a tensor, of a whole file.

    known: False where the kernel does not tell; then ``resident`` is 0 and ``how`` is "unknown".
    how: "cachestat", "mincore" or "sampled mincore". on_nodes: empty where that is not known.
    cells: the resident share of each of up to 60 equal parts, in order.
    """

    path: str
    size: int
    resident: int = 0
    known: bool = True
    how: str = "unknown"
    error: int = 0
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
    def error(self) -> int:
        """Return the error of ``resident`` in bytes at 95 %: files are sampled independently."""
        return round(hypot(*(file.error for file in self.files)))

    @property
    def on_nodes(self) -> dict[int, int]:
        on: Counter[int] = Counter()
        for file in self.files:
            on.update(file.on_nodes)
        return dict(sorted(on.items()))

    def to_dict(self) -> dict[str, Any]:
        whole = ("size", "resident", "known", "error", "on_nodes")
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
    before = absent_runs(file, 0, HEAD)
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
    with counting(file) as count:
        report = FileResidency(file.path, file.size, known=count.known, how=count.how)
        if not count.known:
            return report
        report.resident, report.error = count(0, file.size, FILE_SAMPLES)
        report.cells = list(_cells(count, report))
        located = locating(file, count, nodes, report.resident)
        everything = (0, file.size, report.resident, FILE_SAMPLES)
        report.on_nodes, report.nodes_error = located.on(*everything)
        report.tensors = [_tensor(span, count, located) for span in spans]
    return report


def _cells(count: Counting, file: FileResidency) -> list[float]:
    if not file.error and file.resident in (0, file.size):
        return [float(file.resident > 0)] * min(CELLS, file.size)
    edges = pairwise(file.size * i // CELLS for i in range(CELLS + 1))
    return [count(a, b, CELL_SAMPLES)[0] / (b - a) for a, b in edges if a < b]


def _tensor(span: Span, count: Counting, located: Locating) -> TensorResidency:
    stop = span.offset + span.nbytes
    resident, error = count(span.offset, stop, TENSOR_SAMPLES)
    on, nodes_error = located.on(span.offset, stop, resident, TENSOR_SAMPLES)
    return TensorResidency(span.name, span.nbytes, resident, error, on, nodes_error)
