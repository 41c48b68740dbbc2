"""Fields as gguf-py's reader has them, made when somebody looks at them.

A field there is its bytes in the file, cut into *parts*: an array for every length, every type id,
and every single number or text of an array; *data* are the indexes of those parts that are values.
A vocabulary of 150,000 tokens has 900,000 of them, with scores, types and merges. Here a part is
made when it is asked for; at once is known only where a field begins and of which types it is.

Parts are views of the file's memory: where that can be written to, writing to them does.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from gguf.constants import GGUFValueType
from gguf.gguf_reader import ReaderField

from numaload.errors import MetadataError
from numaload.formats.metadata import (
    ARRAY,
    BIG,
    CODES,
    LITTLE,
    MAX_NESTING,
    SMALLEST,
    STRING,
    ByteOrder,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

U32, U64 = 4, 10
DTYPES = {
    order.name: {type_id: np.dtype(order.sign + code) for type_id, code in CODES.items()}
    for order in (LITTLE, BIG)
}
BYTES = np.dtype(np.uint8)
ARRAY_HEAD = 12  # bytes: the type of the elements, how many


class Span(NamedTuple):
    """One part: so many items from byte ``offset`` on."""

    offset: int
    dtype: np.dtype[Any]
    items: int


class Image(NamedTuple):
    """All bytes of a file, how it packs numbers, and its name for errors."""

    data: NDArray[np.uint8]
    order: ByteOrder
    path: str

    def dtype(self, type_id: int) -> np.dtype[Any]:
        return DTYPES[self.order.name][type_id]

    def view(self, span: Span) -> NDArray[Any]:
        offset, dtype, items = span
        return self.data[offset : offset + items * dtype.itemsize].view(dtype)

    def array_head(self, offset: int) -> tuple[int, int]:
        """Read the type of the elements, and how many, of an array that begins there."""
        try:
            type_id, count = self.order.type_and_count.unpack_from(self.data.data, offset)
        except struct.error:
            raise self.changed(offset) from None
        return type_id, count

    def changed(self, offset: int) -> MetadataError:
        message = "array lengths here differ from those when the header was read"
        return MetadataError(message, path=self.path, offset=offset)


# What follows are the bodies of values: their parts, counted from the first; ``data(first)``: which
# parts of the field are values, where the body begins with part ``first`` of it; ``values``: Python
# values, faster than by parts.


class _Numbers:
    """Numbers one after another: a part each."""

    def __init__(self, image: Image, offset: int, type_id: int, count: int) -> None:
        self._every = Span(offset, image.dtype(type_id), count)
        self._image = image

    def __len__(self) -> int:
        return self._every.items

    def span(self, index: int) -> Span:
        offset, dtype, _ = self._every
        return Span(offset + index * dtype.itemsize, dtype, 1)

    def data(self, first: int) -> Sequence[int]:
        return range(first, first + len(self))

    def values(self, wanted: slice) -> list[Any]:
        found: list[Any] = self._image.view(self._every)[wanted].tolist()
        return found


class _Strings:
    """Texts one after another: two parts each, length and bytes."""

    def __init__(self, image: Image, offset: int, count: int, nbytes: int | None) -> None:
        self._image, self._offset, self._count, self._nbytes = image, offset, count, nbytes

    def __len__(self) -> int:
        return 2 * self._count

    @cached_property
    def starts(self) -> array[int]:
        """Return the offset of each text, and the byte after the last."""
        raw, unpack, at = self._image.data.data, self._image.order.u64.unpack_from, self._offset
        starts = array("q", [at])
        try:
            for _ in range(self._count):
                at += 8 + unpack(raw, at)[0]
                starts.append(at)
        except (struct.error, OverflowError):
            raise self._image.changed(self._offset) from None
        if at > len(raw) or self._nbytes not in (None, at - self._offset):
            raise self._image.changed(self._offset)
        return starts

    def span(self, index: int) -> Span:
        number, is_text = divmod(index, 2)
        start = self.starts[number]
        if not is_text:
            return Span(start, self._image.dtype(U64), 1)
        return Span(start + 8, BYTES, self.starts[number + 1] - start - 8)

    def data(self, first: int) -> Sequence[int]:
        return range(first + 1, first + len(self), 2)

    def values(self, wanted: slice) -> list[Any]:
        starts, first = self.starts, self._offset
        raw = self._image.data[first : starts[-1]].tobytes()
        return [
            str(raw[starts[number] + 8 - first : starts[number + 1] - first], "utf-8")
            for number in range(self._count)[wanted]
        ]


class _Nested:
    """Arrays in an array: the parts of all of them in a row, as gguf-py has it."""

    def __init__(self, image: Image, offset: int, count: int) -> None:
        self._image, self._offset, self._count = image, offset, count

    @cached_property
    def _flat(self) -> tuple[list[Span], list[int]]:
        spans: list[Span] = []
        data: list[int] = []
        at = self._offset
        for _ in range(self._count):
            at = self._add(at, spans, data, 1)
        return spans, data

    def _add(self, at: int, spans: list[Span], data: list[int], depth: int) -> int:
        """Add the parts of the array at this byte; return the byte after it."""
        type_id, count = self._image.array_head(at)
        known = type_id in SMALLEST and depth <= MAX_NESTING
        if not known or at + count * SMALLEST[type_id] > self._image.data.size:
            raise self._image.changed(at)
        spans += array_head_spans(self._image, at)
        at += ARRAY_HEAD
        if type_id == ARRAY:
            for _ in range(count):
                at = self._add(at, spans, data, depth + 1)
            return at
        body = body_of(self._image, type_id, at, count)
        data += body.data(len(spans))
        spans += map(body.span, range(len(body)))
        return body.starts[-1] if isinstance(body, _Strings) else at + count * SMALLEST[type_id]

    def __len__(self) -> int:
        return len(self._flat[0])

    def span(self, index: int) -> Span:
        return self._flat[0][index]

    def data(self, first: int) -> Sequence[int]:
        return [first + index for index in self._flat[1]]


Body = _Numbers | _Strings | _Nested


def body_of(
    image: Image, type_id: int, offset: int, count: int = 1, nbytes: int | None = None
) -> Body:
    """Make the body of ``count`` values that begin at ``offset``. nbytes: of all, where known."""
    if type_id == STRING:
        return _Strings(image, offset, count, nbytes)
    if type_id == ARRAY:
        return _Nested(image, offset, count)
    return _Numbers(image, offset, type_id, count)


def array_head_spans(image: Image, offset: int) -> list[Span]:
    return [Span(offset, image.dtype(U32), 1), Span(offset + 4, image.dtype(U64), 1)]


def array_types(image: Image, offset: int) -> list[GGUFValueType]:
    """List the types of an array, its first element, that one's first element and so on."""
    types = [GGUFValueType.ARRAY]
    type_id, count = image.array_head(offset)
    while count and type_id == ARRAY and len(types) <= MAX_NESTING:
        types.append(GGUFValueType.ARRAY)
        offset += ARRAY_HEAD
        type_id, count = image.array_head(offset)
    return [*types, GGUFValueType(type_id)] if count else types


class Parts(Sequence[Any]):
    """The parts of a field: a list that makes its elements when they are asked for."""

    def __init__(self, image: Image, head: Sequence[Span], body: Body | None = None) -> None:
        self._image, self._head, self.body = image, head, body

    def __len__(self) -> int:
        return len(self._head) + (0 if self.body is None else len(self.body))

    def __getitem__(self, index: Any) -> Any:
        wanted = range(len(self))[index]
        return self._part(wanted) if isinstance(wanted, int) else [*map(self._part, wanted)]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return map(self._part, range(len(self)))

    def _part(self, index: int) -> NDArray[Any]:
        first = len(self._head)
        if index < first or self.body is None:
            return self._image.view(self._head[index])
        return self._image.view(self.body.span(index - first))


class Field(ReaderField):  # type: ignore[misc] # gguf-py's types are not looked at
    """gguf-py's ReaderField; ``parts`` are made when asked for, ``data`` of arrays is a range."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy and pickle the parts alone, not the whole file's memory."""
        return ReaderField, (self.offset, self.name, [*self.parts], [*self.data], self.types)

    def contents(self, index_or_slice: int | slice = slice(None)) -> Any:
        """Return plain Python values, of an array a list, as gguf-py does."""
        body: Any = getattr(self.parts, "body", None)
        is_array = self.types[:1] == [GGUFValueType.ARRAY] and isinstance(body, _Numbers | _Strings)
        if is_array and isinstance(index_or_slice, slice):
            return body.values(index_or_slice)
        return super().contents(index_or_slice)
