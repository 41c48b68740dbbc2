"""Finding the copies that kt-kernel made of experts, by what is in them.

kt-kernel tells nobody where it copied to. Its copies are plain ``new`` memory, one range for each
tensor and subpool, the part's rows one after another (see ``numaload/weights/slices.py``). So this
process's anonymous memory is searched for the first bytes of every part that there can be, and
what begins like one is compared at its last row too. Large allocations are stepped over by the
sizes that glibc writes before them (malloc/malloc.c, IS_MMAPPED); the rest is read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from numaload.formats.qtypes import BLOCKS
from numaload.numa.placement import PROC, Range
from numaload.numa.syscalls import PAGE
from numaload.weights import Tensor
from numaload.weights.slices import COLUMNS, ROWS, UNIT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BEGINNING = 32  # bytes that a part is recognized by
LEAST_KINDS = 8  # of different bytes in them: zeros are everywhere
BLOCK = 1 << 20  # bytes read at once
SEARCHED = 1 << 30  # bytes read at most
HEADER, IS_MMAPPED, FLAGS = 16, 2, 7  # of an allocation of glibc's
LARGE = 32 * PAGE  # the least that glibc maps by itself


@dataclass
class Copy:
    """A part of a tensor in memory of kt-kernel's. ``pages``: {node, or -1: pages}."""

    name: str
    address: int
    nbytes: int
    first: int  # of the inner dimension's weights
    count: int
    pages: dict[int, int] = field(default_factory=dict)


class Source:
    """A tensor that was given away: where its parts begin, and how their rows follow."""

    def __init__(self, tensor: Tensor) -> None:
        experts, rows, _ = tensor.shape
        block_size, type_size = BLOCKS[tensor.qtype]
        self.name, self.columns = tensor.name, COLUMNS.search(tensor.name) is not None
        self.blocks: NDArray[np.uint8] = tensor.blocks.reshape(experts, rows, -1)
        self.unit = UNIT // block_size * type_size  # bytes of a row in 256 weights
        self.units = (self.blocks.shape[2] // self.unit) if self.columns else rows // UNIT

    def row(self, expert: int, row: int, first: int, units: int) -> bytes:
        """One row of the part of ``units`` from ``first`` on."""
        if not self.columns:
            return bytes(self.blocks[expert, first * UNIT + row])
        start = first * self.unit
        return bytes(self.blocks[expert, row, start : start + units * self.unit])

    def beginnings(self) -> Iterator[tuple[bytes, int]]:
        for first in range(self.units):
            begins = self.row(0, 0, first, 1)[:BEGINNING]
            if len(set(begins)) >= LEAST_KINDS:
                yield begins, first

    def copy_at(self, memory: Memory, address: int, first: int) -> Copy | None:
        """The part that is there, from ``first`` on, or None. The longest that fits."""
        experts, rows, row_bytes = self.blocks.shape
        for units in range(self.units - first, 0, -1):
            height = rows if self.columns else units * UNIT
            width = units * self.unit if self.columns else row_bytes
            probes = {(0, 0), (0, height - 1), (experts - 1, 0), (experts - 1, height - 1)}
            if all(
                memory.peek(address + (e * height + r) * width, width)
                == self.row(e, r, first, units)
                for e, r in probes
            ):
                nbytes = experts * height * width
                return Copy(self.name, address, nbytes, first * UNIT, units * UNIT)
        return None


class Memory:
    """Memory of this process, read as a file: what is gone meanwhile is an error, not a crash."""

    def __init__(self) -> None:
        import numpy as np

        self.fd = os.open(f"{PROC}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.buffer = np.empty(BLOCK, np.uint8)
        self.left = SEARCHED

    def block(self, address: int, most: int) -> NDArray[np.uint8]:
        """Whole pages, in a buffer that is used again; none where they cannot be read."""
        try:
            count = os.preadv(self.fd, [self.buffer[:most].data], address)
        except OSError:
            count = 0
        return self.buffer[: count // PAGE * PAGE]

    def peek(self, address: int, nbytes: int) -> bytes:
        try:
            return os.pread(self.fd, nbytes, address)
        except OSError:
            return b""

    def owns(self, address: int) -> bool:
        """Whether it is in the buffer, which has what was read elsewhere."""
        return 0 <= address - self.buffer.ctypes.data < BLOCK

    def close(self) -> None:
        os.close(self.fd)


def find_copies(tensors: Iterable[Tensor], without: Sequence[Range]) -> tuple[list[Copy], bool]:
    """Copies of experts' parts in anonymous memory, and whether all of that was searched.

    without: ranges that are not kt-kernel's: replicas, and what is kept of earlier ones. Not
    searched either where this process may not read itself.
    """
    known: dict[bytes, list[tuple[Source, int]]] = {}
    for tensor in tensors:
        if len(tensor.shape) == 3 and (ROWS.search(tensor.name) or COLUMNS.search(tensor.name)):
            source = Source(tensor)
            for begins, first in source.beginnings():
                known.setdefault(begins, []).append((source, first))
    try:
        memory = Memory()
    except OSError:
        return [], False
    try:
        found = [
            copied
            for start, stop in _anonymous(without)
            for address in _candidates(memory, start, stop, known)
            for source, first in known[memory.peek(address, BEGINNING)]
            if not any(a <= address < a + nbytes for a, nbytes in without)
            and (copied := source.copy_at(memory, address, first)) is not None
        ]
        return found, memory.left > 0
    finally:
        memory.close()


def _anonymous(without: Sequence[Range]) -> list[tuple[int, int]]:
    """(start, stop) of this process's private writable memory that no file is behind."""
    inside = [(address, address + nbytes) for address, nbytes in without]
    with open(f"{PROC}/maps", encoding="utf-8", errors="replace", newline="\n") as file:
        rows = [line.split() for line in file]
    found = []
    for row in rows:
        start, stop = (int(word, 16) for word in row[0].split("-"))
        plain = row[1][:2] == "rw" and row[1][3] == "p" and row[4] == "0"
        if plain and not any(a <= start < b for a, b in inside):
            found.append((start, stop))
    return found


def _candidates(memory: Memory, start: int, stop: int, known: Collection[bytes]) -> Iterator[int]:
    """Addresses in the range where something begins like a part; in order."""
    import numpy as np

    words = np.array([int.from_bytes(begins[:8], "little") for begins in known], "<u8")
    at = start
    while at < stop and memory.left > 0:
        block = memory.block(at, min(stop - at, BLOCK))
        sizes = _allocations(block, stop - at)
        if sizes[:1].any():
            found, step = [at + HEADER], int(sizes[0])
        else:
            block = block[: PAGE * int(np.append(np.flatnonzero(sizes), len(sizes))[0])]
            memory.left -= len(block)
            found, step = _like(block, words, at), len(block) or PAGE
        for address in found:
            if memory.peek(address, BEGINNING) in known and not memory.owns(address):
                yield address
        at += step


def _allocations(block: NDArray[np.uint8], most: int) -> NDArray[np.uint64]:
    """For each page, the bytes of the large allocation of glibc's that begins there, or 0.

    Such a one has 0 and its size in front, the size with a flag in its lowest bits.
    """
    import numpy as np

    heads = block.view("<u8").reshape(-1, PAGE // 8)
    sizes = heads[:, 1] & ~np.uint64(FLAGS)
    begins = (heads[:, 0] == 0) & (heads[:, 1] & np.uint64(FLAGS) == IS_MMAPPED)
    begins &= (sizes % PAGE == 0) & (sizes >= LARGE) & (sizes <= most)
    return np.where(begins, sizes, np.uint64(0))


def _like(block: NDArray[np.uint8], words: NDArray[np.uint64], at: int) -> list[int]:
    """Addresses that begin with one of these words; allocations are aligned to 16 bytes."""
    import numpy as np

    hits = np.flatnonzero(np.isin(block.view("<u8")[::2], words))
    return [at + hit * HEADER for hit in hits.tolist()]
