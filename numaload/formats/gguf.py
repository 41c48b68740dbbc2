"""The header of a GGUF file: metadata and the table of tensors, nothing of the weights.

Layout (little endian; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv times:       key string | value type u32 | value
    n_tensors times:  name string | n_dims u32 | dims u64 x n_dims | type u32 | offset u64
    padding to general.alignment (32 unless given), then the weights; offsets count from here
    string: length u64, UTF-8 bytes.  array: element type u32, count u64, elements

The file is not trusted. Every length, count and product is compared with the file's size before
it is used, and the header is read in growing steps, so memory follows what the file really holds.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, NoReturn, overload

from numaload.errors import (
    FormatError,
    MetadataError,
    MetadataKeyError,
    NotGGUFError,
    TensorInfoError,
    TruncatedError,
    UnsupportedVersionError,
)
from numaload.formats.qtypes import BLOCKS, QuantType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4  # ggml.h GGML_MAX_DIMS
MAX_NAME = 65535  # bytes; ggml's own limit for keys
MAX_HEADER = 1 << 28  # bytes; the largest vocabularies need a tenth of it
MAX_ELEMENTS = 1 << 60  # so that their bytes, as any of our floats, count in 63 bits
MAX_NESTING = 4  # arrays of arrays; ggml itself refuses any
MIN_KV, MIN_TENSOR = 13, 24  # bytes of the smallest possible entry
FIRST_READ = 1 << 18

STRING, ARRAY = 8, 9
BOOL = 7
SCALARS: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TYPE_NAMES = dict(
    enumerate("u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split())  # noqa: SIM905
)

ReadAt = Callable[[int, int], bytes]
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")
TYPE_AND_COUNT = struct.Struct("<IQ")


class TensorInfo(NamedTuple):
    """One row of the tensor table. ``offset`` is absolute in its file; both are bytes.

    ``nbytes`` is 0 where the type id is unknown: then only the tensor is unusable, not the file.
    """

    name: str
    dims: tuple[int, ...]  # GGUF order, fastest first
    type_id: int
    offset: int
    nbytes: int

    @property
    def qtype(self) -> QuantType | None:
        return QuantType(self.type_id) if self.type_id in BLOCKS else None

    @property
    def type_name(self) -> str:
        return f"unknown:{self.type_id}" if self.qtype is None else self.qtype.name


class Header(NamedTuple):
    version: int
    metadata: Metadata
    tensors: list[TensorInfo]
    alignment: int
    data_start: int  # byte at which the weights begin
    header_end: int  # byte after the tensor table


class MetadataArray(Sequence[Any]):
    """An array value, decoded when it is first asked for; its length is known at once."""

    def __init__(
        self, read_at: ReadAt, type_id: int, count: int, offset: int, nbytes: int, path: str
    ) -> None:
        self.type_id, self.offset, self.nbytes = type_id, offset, nbytes
        self._read_at, self._count, self._path = read_at, count, path
        self._values: list[Any] | None = None

    @property
    def type_name(self) -> str:
        return TYPE_NAMES[self.type_id]

    def tolist(self) -> list[Any]:
        return list(self._decoded())

    def _decoded(self) -> list[Any]:
        if self._values is None:
            decoder = _Decoder(self._read_at(self.offset, self.nbytes))
            try:
                values = decoder.elements(self.type_id, self._count)
            except (struct.error, KeyError, OverflowError, RecursionError) as error:
                raise self._changed() from error
            if decoder.pos != self.nbytes:
                raise self._changed()
            self._values = values
        return self._values

    def _changed(self) -> MetadataError:
        message = f"{self!r} has other lengths in it than when the header was read"
        return MetadataError(message, path=self._path, offset=self.offset)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._decoded())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, MetadataArray):
            return self._decoded() == other._decoded()
        return isinstance(other, (list, tuple)) and self._decoded() == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<array of {self._count} {self.type_name}>"


class Metadata(Mapping[str, Any]):
    """Keys in file order. Arrays are MetadataArray, everything else plain Python values."""

    def __init__(self, values: dict[str, Any], types: dict[str, int]) -> None:
        self._values, self._types = values, types

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise MetadataKeyError(key, self._values)
        return self._values[key]

    def get(self, key: str, default: Any = None) -> Any:
        # Mapping.get would compare the key with all others, to name close ones in an unseen error.
        return self._values.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def type_name(self, key: str) -> str:
        """How the file stores ``key``: "u32", "string", "array of f32", ..."""
        value = self[key]
        if isinstance(value, MetadataArray):
            return f"array of {value.type_name}"
        return TYPE_NAMES[self._types[key]]


class _Decoder:
    """Values of one array, from bytes whose structure was walked before."""

    def __init__(self, raw: bytes) -> None:
        self.raw, self.pos = raw, 0

    def elements(self, type_id: int, count: int) -> list[Any]:
        if type_id == STRING:
            return [self.string() for _ in range(count)]
        if type_id == ARRAY:
            return [self.array() for _ in range(count)]
        fmt = struct.Struct(f"<{count}{SCALARS[type_id]}")
        values = list(fmt.unpack_from(self.raw, self.pos))
        self.pos += fmt.size
        return values

    def array(self) -> list[Any]:
        type_id, count = TYPE_AND_COUNT.unpack_from(self.raw, self.pos)
        self.pos += TYPE_AND_COUNT.size
        return self.elements(type_id, count)

    def string(self) -> str:
        start = self.pos + 8
        self.pos = start + U64.unpack_from(self.raw, self.pos)[0]
        # A vocabulary may hold byte tokens that are no UTF-8; gguf-py and llama.cpp keep them too.
        return self.raw[start : self.pos].decode("utf-8", "surrogateescape")


class _Cursor:
    """Walks the header, reading more of the file only when the walk gets there."""

    def __init__(self, read_at: ReadAt, size: int, path: str) -> None:
        self.read_at, self.size, self.path = read_at, size, path
        self.buffer, self.pos = bytearray(), 0

    def fail(self, kind: type[FormatError], message: str, at: int | None = None) -> NoReturn:
        raise kind(message, path=self.path, offset=self.pos if at is None else at)

    def need(self, end: int, what: str) -> None:
        """Have the bytes up to ``end`` in the buffer, or say that the file lacks them."""
        if end <= len(self.buffer):
            return
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
        self.need(self.pos + fmt.size, what)
        values = fmt.unpack_from(self.buffer, self.pos)
        self.pos += fmt.size
        return values

    def string(self, what: str) -> str:
        (length,) = self.unpack(U64, what)
        return self.take(length, what).decode("utf-8", "surrogateescape")

    def name(self, what: str, kind: type[FormatError]) -> str:
        """A metadata key or the name of a tensor. Unlike values these are printed: text only."""
        at = self.pos
        (length,) = self.unpack(U64, what)
        if length > MAX_NAME:
            self.fail(kind, f"{what} of {length} bytes, at most {MAX_NAME} are possible", at)
        raw = self.take(length, what)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            self.fail(kind, f"{what} {bytes(raw)!r} is not UTF-8", at)

    def take(self, length: int, what: str) -> bytearray:
        start, end = self.pos, self.pos + length
        self.need(end, what)
        self.pos = end
        return self.buffer[start:end]

    def skip_strings(self, count: int, what: str) -> None:
        """The one hot loop: a vocabulary has hundreds of thousands of strings."""
        unpack, buffer, pos = U64.unpack_from, self.buffer, self.pos
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
        smallest = _smallest(type_id)
        if smallest is None:
            self.fail(MetadataError, f"{what}: no value type has the id {type_id}")
        self.inside(self.pos + count * smallest, f"{what} of {count} elements")
        if type_id == STRING:
            self.skip_strings(count, what)
        elif type_id == ARRAY:
            if depth >= MAX_NESTING:
                self.fail(MetadataError, f"{what}: arrays nested over {MAX_NESTING} deep")
            for _ in range(count):
                inner, inner_count = self.unpack(TYPE_AND_COUNT, what)
                self.skip_elements(inner, inner_count, what, depth + 1)
        else:
            self.pos += count * smallest

    def value(self, type_id: int, key: str) -> Any:
        what = f"value of {key!r}"
        if type_id == STRING:
            return self.string(what)
        if type_id == ARRAY:
            inner, count = self.unpack(TYPE_AND_COUNT, what)
            start = self.pos
            self.skip_elements(inner, count, what)
            return MetadataArray(self.read_at, inner, count, start, self.pos - start, self.path)
        if type_id not in SCALARS:
            self.fail(MetadataError, f"{what}: no value type has the id {type_id}")
        return self.unpack(struct.Struct("<" + SCALARS[type_id]), what)[0]


def _smallest(type_id: int) -> int | None:
    """The fewest bytes that one element of this type takes."""
    if type_id in SCALARS:
        return struct.calcsize("<" + SCALARS[type_id])
    return {STRING: 8, ARRAY: 12}.get(type_id)


def parse_header(read_at: ReadAt, size: int, path: str = "<buffer>") -> Header:
    """Read the header of a GGUF file of ``size`` bytes.

    read_at(offset, n): exactly n bytes, or an error of its own.
    Raises: NotGGUFError, UnsupportedVersionError, TruncatedError, MetadataError, TensorInfoError,
    and FormatError itself for a header too large to be one.
    """
    cursor = _Cursor(read_at, size, path)
    version, n_tensors, n_kv = _preamble(cursor)
    metadata = _metadata(cursor, n_kv)
    rows = _tensor_rows(cursor, n_tensors)
    header_end = cursor.pos
    alignment = _alignment(cursor, metadata)
    data_start = -(-header_end // alignment) * alignment
    tensors = [_tensor_info(cursor, row, data_start, alignment) for row in rows]
    _check_overlap(cursor, tensors)
    return Header(version, metadata, tensors, alignment, data_start, header_end)


def _preamble(cursor: _Cursor) -> tuple[int, int, int]:
    start = bytes(cursor.read_at(0, min(4, cursor.size)))
    if start != MAGIC:
        hint = " (a git-lfs pointer: fetch the real file)" if start == b"vers" else ""
        cursor.fail(NotGGUFError, f"expected the magic {MAGIC!r}, found {start!r}{hint}")
    cursor.pos = 4
    (version,) = cursor.unpack(U32, "version")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = f"{swapped}, big-endian" if swapped in VERSIONS else str(version)
        cursor.fail(UnsupportedVersionError, f"GGUF version {kind}; versions 2 and 3 are read", 4)
    n_tensors, n_kv = cursor.unpack(struct.Struct("<QQ"), "counts")
    return version, n_tensors, n_kv


def _plausible(cursor: _Cursor, count: int, what: str) -> int:
    """Refuse a count for which the rest of the file has no room, before looping over it."""
    smallest = MIN_TENSOR if what == "tensors" else MIN_KV
    room = (cursor.size - cursor.pos) // smallest
    if count > room:
        cursor.fail(TruncatedError, f"{count} {what} announced, the file has room for {room}")
    return count


def _metadata(cursor: _Cursor, n_kv: int) -> Metadata:
    values: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(_plausible(cursor, n_kv, "metadata entries")):
        at = cursor.pos
        key = cursor.name("metadata key", MetadataError)
        if key in values:
            cursor.fail(MetadataError, f"key {key!r} appears twice", at)
        (types[key],) = cursor.unpack(U32, f"type of {key!r}")
        values[key] = cursor.value(types[key], key)
    return Metadata(values, types)


class _Row(NamedTuple):
    at: int
    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


def _tensor_rows(cursor: _Cursor, n_tensors: int) -> list[_Row]:
    rows: dict[str, _Row] = {}
    for _ in range(_plausible(cursor, n_tensors, "tensors")):
        row = _tensor_row(cursor)
        if row.name in rows:
            cursor.fail(TensorInfoError, f"tensor {row.name!r} appears twice", row.at)
        rows[row.name] = row
    return list(rows.values())


def _tensor_row(cursor: _Cursor) -> _Row:
    at = cursor.pos
    name = cursor.name("tensor name", TensorInfoError)
    (n_dims,) = cursor.unpack(U32, f"tensor {name!r}")
    if n_dims > MAX_DIMS:
        cursor.fail(TensorInfoError, f"tensor {name!r} has {n_dims} dims, at most {MAX_DIMS}", at)
    *dims, type_id, offset = cursor.unpack(struct.Struct(f"<{n_dims}QIQ"), f"tensor {name!r}")
    return _Row(at, name, tuple(dims), type_id, offset)


def _alignment(cursor: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= 1 << 31 or value & (value - 1):
        cursor.fail(MetadataError, f"general.alignment is {value!r}, expected a power of two")
    return value


def _tensor_info(cursor: _Cursor, row: _Row, data_start: int, alignment: int) -> TensorInfo:
    what = f"tensor {row.name!r}"
    if row.offset % alignment:
        cursor.fail(
            TensorInfoError, f"{what}: offset {row.offset} is no multiple of {alignment}", row.at
        )
    start = data_start + row.offset
    nbytes = 0
    if row.type_id in BLOCKS:
        nbytes = _nbytes(cursor, row, what)
    if start + nbytes > cursor.size:
        missing = start + nbytes - cursor.size
        cursor.fail(
            TruncatedError,
            f"{what} ends at byte {start + nbytes}, the file at {cursor.size}:"
            f" {missing} bytes are missing",
            row.at,
        )
    return TensorInfo(row.name, row.dims, row.type_id, start, nbytes)


def _nbytes(cursor: _Cursor, row: _Row, what: str) -> int:
    block_size, type_size = BLOCKS[QuantType(row.type_id)]
    first = row.dims[0] if row.dims else 1
    if first % block_size:
        name = QuantType(row.type_id).name
        cursor.fail(
            TensorInfoError,
            f"{what}: rows of {first} elements are no whole {name} blocks of {block_size}",
            row.at,
        )
    # Python integers: nothing wraps. A dim of 0 must not hide that the others are impossible.
    if prod(max(dim, 1) for dim in row.dims) >= MAX_ELEMENTS:
        cursor.fail(TensorInfoError, f"{what}: dims {row.dims}, over 2^60 elements", row.at)
    return prod(row.dims) // block_size * type_size


def _check_overlap(cursor: _Cursor, tensors: list[TensorInfo]) -> None:
    ordered = sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(
                TensorInfoError, f"tensors {before.name!r} and {after.name!r} overlap", after.offset
            )
