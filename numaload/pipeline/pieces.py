"""Work on one tensor, cut into pieces that fit into a core's cache, whatever its place looks like.

A place may be any view of the memory that is to be filled, in the order of the tensor's elements:
rows in another order, one half of a fused parameter, a transposed matrix. Pieces whose place is
contiguous are written by the kernel itself, others by way of a scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numaload.formats.qtypes import BLOCKS
from numaload.weights import Tensor

# Bytes of a piece's place: whole huge pages, so that no two threads are the first to touch the same
# one; and long enough that what threads of Python do to each other in between does not count.
PIECE = 8 << 20
SCATTERED = 512 << 10  # of a place that is not contiguous: there is a scratch of it in each thread


class Target(NamedTuple):
    """Where a tensor goes.

    place: of any strides; its elements are the tensor's, in order. float32, float16 or ml_dtypes'
    bfloat16, or uint16 for either of those.
    dtype: "float32", "float16" or "bfloat16"; None for the bytes as they are in the file.
    first: element of the tensor, in units of the place's items, that the place begins with.
    """

    tensor: Tensor
    place: NDArray[Any]
    dtype: str | None
    first: int = 0

    def bytes_of(self, items: int) -> int:
        """Bytes in the file of so many items of the place; whole blocks."""
        if self.dtype is None:
            return items * self.place.itemsize
        block_size, type_size = BLOCKS[self.tensor.qtype]
        return items // block_size * type_size

    @property
    def start(self) -> int:
        """Byte of the tensor that it begins with."""
        return self.bytes_of(self.first)

    @property
    def nbytes(self) -> int:
        """Bytes of the file that go there."""
        return self.bytes_of(self.place.size)

    @property
    def order(self) -> tuple[int, int]:
        """Sorts targets as their bytes come in the files."""
        part, offset = self.tensor.place_in_files
        return part, offset + self.start


class Piece(NamedTuple):
    first: int  # element of the place
    place: NDArray[Any]


def pieces(place: NDArray[Any], unit: int, first: int = 0) -> Iterator[Piece]:
    """Cut ``place`` in order. unit: elements that a piece must be a multiple of, the last aside."""
    if place.flags.c_contiguous:
        flat, most = place.reshape(-1), _most(PIECE, place.itemsize, unit)
        for start in range(0, flat.size, most):
            yield Piece(first + start, flat[start : start + most])
        return
    most = _most(SCATTERED, place.itemsize, unit)
    if place.size <= most or place.ndim == 1:
        yield Piece(first, place)
        return
    each = place[0].size
    if each > most:
        for index, part in enumerate(place):
            yield from pieces(part, unit, first + index * each)
        return
    count = most // each
    for index in range(0, len(place), count):
        yield Piece(first + index * each, place[index : index + count])


def _most(nbytes: int, itemsize: int, unit: int) -> int:
    return max(unit, nbytes // itemsize // unit * unit)
