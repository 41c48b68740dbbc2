"""Work on one tensor, cut into pieces that fit into a core's cache, whatever its place looks like.

A place may be any view of the memory that is to be filled, in the order of the tensor's elements:
rows in another order, one half of a fused parameter, a transposed matrix. Pieces whose place is
contiguous are written by the kernel itself, others by way of a scratch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from numpy.typing import NDArray

from numaload.weights import Tensor

# Bytes of a piece's place: a huge page, so that no two threads are the first to touch the same one.
PIECE = 2 << 20


class Target(NamedTuple):
    """Where a tensor goes.

    place: of any strides; its elements are the tensor's, in order. float32, float16 or ml_dtypes'
    bfloat16, or uint16 for either of those.
    dtype: "float32", "float16" or "bfloat16"; None for the bytes as they are in the file.
    """

    tensor: Tensor
    place: NDArray[Any]
    dtype: str | None


class Piece(NamedTuple):
    first: int  # element of the place
    place: NDArray[Any]


def pieces(place: NDArray[Any], unit: int, first: int = 0) -> Iterator[Piece]:
    """Cut ``place`` in order. unit: elements that a piece must be a multiple of, the last aside."""
    most = max(unit, PIECE // place.itemsize // unit * unit)
    if place.flags.c_contiguous:
        flat = place.reshape(-1)
        for start in range(0, flat.size, most):
            yield Piece(first + start, flat[start : start + most])
    elif place.size <= most or place.ndim == 1:
        yield Piece(first, place)
    else:
        each = place[0].size
        if each > most:
            for index, part in enumerate(place):
                yield from pieces(part, unit, first + index * each)
            return
        count = most // each
        for index in range(0, len(place), count):
            yield Piece(first + index * each, place[index : index + count])
