"""Walk through an untrusted header: compare what it announces with the bytes that are there."""

from __future__ import annotations

import struct
from typing import Any, NoReturn

from numaload.errors import FormatError, MetadataError, TruncatedError
from numaload.formats.metadata import (
    ARRAY,
    LITTLE,
    MAX_NESTING,
    SMALLEST,
    STRING,
    MetadataArray,
    Place,
    ReadAt,
)

MAX_NAME = 65535  # bytes; ggml's own limit for keys
MAX_HEADER = 1 << 28  # bytes; the largest vocabularies need a tenth of it
MAX_ARRAYS = 1 << 18  # inside of arrays, of a whole header; nothing that is read today has any
FIRST_READ = 1 << 18


class Cursor:
    """Walk the header, reading more of the file only when the walk gets there."""

    def __init__(self, read_at: ReadAt, size: int, path: str) -> None:
        self.read_at, self.size, self.path = read_at, size, path
        self.buffer, self.pos, self.order = bytearray(), 0, LITTLE
        self.arrays = 0

    def fail(self, kind: type[FormatError], message: str, at: int | None = None) -> NoReturn:
        raise kind(message, path=self.path, offset=self.pos if at is None else at)

    def need(self, end: int, what: str) -> None:
        """Read the bytes up to ``end``, or say that the file lacks them.

        Only if the buffer lacks them: who walks asks that first, for every number of a header.
        """
        self.inside(end, what)
        if end > MAX_HEADER:
            self.fail(FormatError, f"header of over {MAX_HEADER} bytes, in {what}")
        have = len(self.buffer)
        target = min(self.size, MAX_HEADER, max(end, 2 * have, FIRST_READ))
        self.buffer += self.read_at(have, target - have)

    def inside(self, end: int, what: str) -> None:
        if end > self.size:
            self.fail(
                TruncatedError, f"{what} ends at byte {end} or later, the file at {self.size}"
            )

    def unpack(self, fmt: struct.Struct, what: str) -> tuple[Any, ...]:
        end = self.pos + fmt.size
        if end > len(self.buffer):
            self.need(end, what)
        values = fmt.unpack_from(self.buffer, self.pos)
        self.pos = end
        return values

    def string(self, what: str) -> str:
        (length,) = self.unpack(self.order.u64, what)
        return self.take(length, what).decode("utf-8", "surrogateescape")

    def name(self, what: str, kind: type[FormatError]) -> str:
        """Read a metadata key or a tensor's name. Unlike values these are printed: text only."""
        at = self.pos
        (length,) = self.unpack(self.order.u64, what)
        if length > MAX_NAME:
            self.fail(kind, f"{what} of {length} bytes, at most {MAX_NAME} are possible", at)
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(kind, f"{what} {bytes(raw)!r} is not UTF-8", at)

    def take(self, length: int, what: str) -> bytearray:
        start, end = self.pos, self.pos + length
        if end > len(self.buffer):
            self.need(end, what)
        self.pos = end
        return self.buffer[start:end]

    def skip_strings(self, count: int, what: str) -> None:
        """Skip strings. The one hot loop: a vocabulary has hundreds of thousands of them."""
        unpack, buffer, pos = self.order.u64.unpack_from, self.buffer, self.pos
        left = count
        while left:
            try:
                for left in range(left, 0, -1):  # noqa: B007, B020
                    pos += 8 + unpack(buffer, pos)[0]
                left = 0
            except (struct.error, OverflowError):  # noqa: PERF203 - once per buffer, not per string
                # What came before is walked again only from here: ``left`` counts this string too.
                self.pos = min(pos, self.size)
                self.inside(pos + 8 * left, what)
                self.need(pos + 8, what)
                buffer = self.buffer
        self.pos = pos
        self.inside(pos, what)

    def skip_elements(self, type_id: int, count: int, what: str, depth: int = 0) -> None:
        smallest = SMALLEST.get(type_id)
        if smallest is None:
            self.fail(MetadataError, f"{what}: no value type has the id {type_id}")
        self.inside(self.pos + count * smallest, f"{what} of {count} elements")
        if type_id == STRING:
            self.skip_strings(count, what)
        elif type_id == ARRAY:
            self.skip_arrays(count, what, depth)
        else:
            self.pos += count * smallest

    def skip_arrays(self, count: int, what: str, depth: int) -> None:
        """Skip arrays inside an array. Empty ones are small: without a limit they are a bomb."""
        if depth >= MAX_NESTING:
            self.fail(MetadataError, f"{what}: arrays nested over {MAX_NESTING} deep")
        self.arrays += count
        if self.arrays > MAX_ARRAYS:
            self.fail(
                MetadataError, f"{what}: {self.arrays} arrays in arrays, at most {MAX_ARRAYS}"
            )
        for _ in range(count):
            inner, inner_count = self.unpack(self.order.type_and_count, what)
            self.skip_elements(inner, inner_count, what, depth + 1)

    def value(self, type_id: int, key: str) -> Any:
        what = f"value of {key!r}"
        if type_id == STRING:
            return self.string(what)
        if type_id == ARRAY:
            inner, count = self.unpack(self.order.type_and_count, what)
            start = self.pos
            self.skip_elements(inner, count, what)
            place = Place(self.read_at, self.path, start, self.pos - start, self.order)
            return MetadataArray(inner, count, place)
        if type_id not in self.order.scalars:
            self.fail(MetadataError, f"{what}: no value type has the id {type_id}")
        return self.unpack(self.order.scalars[type_id], what)[0]
