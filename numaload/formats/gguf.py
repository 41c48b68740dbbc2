"""The header of a GGUF file: metadata and the table of tensors, nothing of the weights.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    magic "GGUF" | version u32 | n_tensors u64 | n_kv u64
    n_kv times:       key string | value type u32 | value
    n_tensors times:  name string | n_dims u32 | dims u64 x n_dims | type u32 | offset u64
    padding to general.alignment (32 unless given), then the weights; offsets count from here
    string: length u64, UTF-8 bytes.  array: element type u32, count u64, elements

Versions 2 and 3 have this layout. Numbers, those of the weights too, are little endian, or all of
them big endian: which one, the version tells, being small. Of split files each has an alignment of
its own, as in llama.cpp.

The file is not trusted. Every length, count and product is compared with the file's size before
it is used, and the header is read in growing steps, so memory follows what the file really holds:
parsing takes at most 32 times the bytes of the header, which has at most 256 MiB, and time
proportional to them.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import pairwise
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

from numaload.errors import (
    FormatError,
    MetadataError,
    NotGGUFError,
    TensorInfoError,
    TruncatedError,
    UnsupportedVersionError,
)
from numaload.formats.cursor import Cursor
from numaload.formats.metadata import BIG, MAX_DIMS, Metadata, ReadAt
from numaload.formats.qtypes import (
    BLOCKS,
    PRISM_BLOCK,
    PRISM_KEYS,
    PRISM_Q2_0,
    QuantType,
    foreign_type,
)
from numaload.formats.unusable import instead

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ELEMENTS = 1 << 60  # so that their bytes, as any of our floats, count in 63 bits


class _Table(NamedTuple):
    """Limits of one of the two tables of a header."""

    what: str
    smallest: int  # bytes of an entry
    most: int  # entries; models have about a hundredth of this


ENTRIES = _Table("metadata entries", 13, 1 << 16)
TENSORS = _Table("tensors", 24, 1 << 18)


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
    def known(self) -> bool:
        """Return whether the tensor's type, and so its size, is known."""
        return self.type_id in BLOCKS

    @property
    def problem(self) -> str:
        """Describe an unknown type, for an error."""
        return f"type {self.type_id} is {foreign_type(self.type_id).why}"

    @property
    def type_name(self) -> str:
        """Return ggml's name of the type; an unknown one's is "ik_llama.cpp:133", owner and id."""
        if self.qtype is not None:
            return self.qtype.name
        return f"{foreign_type(self.type_id).family}:{self.type_id}"


class Header(NamedTuple):
    version: int
    metadata: Metadata
    tensors: list[TensorInfo]
    alignment: int
    data_start: int  # byte at which the weights begin
    header_end: int  # byte after the tensor table
    size: int  # bytes of the file
    byte_order: str  # "little" or "big", of the header and of the weights

    @property
    def title(self) -> str:
        order = "" if self.byte_order == "little" else f" {self.byte_order}-endian"
        return f"GGUF v{self.version}{order}"


def parse_header(read_at: ReadAt, size: int, path: str = "<buffer>") -> Header:
    """Read the header of a GGUF file of ``size`` bytes.

    read_at(offset, n): exactly n bytes, or an error of its own.
    Raises: NotGGUFError, UnsupportedVersionError, TruncatedError, MetadataError, TensorInfoError,
    and FormatError itself for a header too large to be one.
    """
    cursor = Cursor(read_at, size, path)
    version, n_tensors, n_kv = _preamble(cursor)
    metadata = _metadata(cursor, n_kv)
    rows = _tensor_rows(cursor, n_tensors)
    header_end = cursor.pos
    alignment = _alignment(cursor, metadata)
    data_start = -(-header_end // alignment) * alignment
    if suspects := [row for row in rows if row.type_id == QuantType.Q2_0]:
        rotated = any(key.startswith(PRISM_KEYS) for key in metadata)
        prisms = _prisms(suspects, rows, size - data_start, alignment)
        rows = [
            row._replace(type_id=PRISM_Q2_0)
            if row.type_id == QuantType.Q2_0 and (rotated or row.name in prisms)
            else row
            for row in rows
        ]
    tensors = [_tensor_info(cursor, row, data_start, alignment) for row in rows]
    _check_overlap(cursor, tensors)
    order = cursor.order.name
    return Header(version, metadata, tensors, alignment, data_start, header_end, size, order)


def _preamble(cursor: Cursor) -> tuple[int, int, int]:
    # Before the rest: what is no model, as a file of /sys, may have less than its size says.
    start = bytes(cursor.read_at(0, min(4, cursor.size)))
    if start != MAGIC:
        what = instead(cursor.read_at, cursor.size)
        cursor.fail(NotGGUFError, f"expected the magic {MAGIC!r}, found {start!r}{what}")
    cursor.pos = 4
    version = _version(cursor)
    n_tensors, n_kv = cursor.unpack(cursor.order.counts, "counts")
    return version, n_tensors, n_kv


# What to do about a file that is too old or too new.
ADVICE = {
    1: "it has lengths of 32 bits; convert the model again from where it came from, or copy the"
    " file with a llama.cpp of September or October 2023: quantize OLD NEW COPY",
}
NEWEST = 99  # higher numbers are no versions but damage


def _version(cursor: Cursor) -> int:
    """Read the version, which also shows the byte order."""
    (found,) = cursor.unpack(cursor.order.u32, "version")
    swapped = int.from_bytes(found.to_bytes(4, "little"), "big")
    version, order = (found, "") if found <= swapped else (swapped, ", big-endian")
    if version not in VERSIONS:
        newer = max(VERSIONS) < version <= NEWEST
        advice = ADVICE.get(version, "a later numaload may read it" if newer else "it is damaged")
        message = f"GGUF version {version}{order}; versions 2 and 3 are read: {advice}"
        cursor.fail(UnsupportedVersionError, message, 4)
    if order:
        cursor.order = BIG
    return int(version)


def _plausible(cursor: Cursor, count: int, table: _Table) -> int:
    """Refuse a count for which the rest of the file has no room, before looping over it."""
    room = (cursor.size - cursor.pos) // table.smallest
    if count > room:
        cursor.fail(TruncatedError, f"{count} {table.what} announced, the file has room for {room}")
    if count > table.most:
        cursor.fail(FormatError, f"{count} {table.what} announced, at most {table.most} are read")
    return count


def _metadata(cursor: Cursor, n_kv: int) -> Metadata:
    values: dict[str, Any] = {}
    types: dict[str, int] = {}
    for _ in range(_plausible(cursor, n_kv, ENTRIES)):
        at = cursor.pos
        key = cursor.name("metadata key", MetadataError)
        if key in values:
            cursor.fail(MetadataError, f"key {key!r} appears twice", at)
        (types[key],) = cursor.unpack(cursor.order.u32, f"type of {key!r}")
        values[key] = cursor.value(types[key], key)
    return Metadata(values, types)


class _Row(NamedTuple):
    at: int
    name: str
    dims: tuple[int, ...]
    type_id: int
    offset: int


def _tensor_rows(cursor: Cursor, n_tensors: int) -> list[_Row]:
    rows: dict[str, _Row] = {}
    for _ in range(_plausible(cursor, n_tensors, TENSORS)):
        row = _tensor_row(cursor)
        if row.name in rows:
            cursor.fail(TensorInfoError, f"tensor {row.name!r} appears twice", row.at)
        rows[row.name] = row
    return list(rows.values())


def _tensor_row(cursor: Cursor) -> _Row:
    at = cursor.pos
    name = cursor.name("tensor name", TensorInfoError)
    (n_dims,) = cursor.unpack(cursor.order.u32, f"tensor {name!r}")
    if n_dims > MAX_DIMS:
        message = f"tensor {name!r} has {n_dims} dims, at most {MAX_DIMS} are read"
        cursor.fail(TensorInfoError, message, at)
    *dims, type_id, offset = cursor.unpack(cursor.order.rows[n_dims], f"tensor {name!r}")
    return _Row(at, name, tuple(dims), type_id, offset)


def _prisms(suspects: list[_Row], rows: list[_Row], nbytes: int, alignment: int) -> set[str]:
    """Return the names of Prism's tensors of type 42, whose blocks are not those of Q2_0.

    They are smaller, so the room that a tensor has tells, unless it is tiny: then the others do.
    nbytes: of all weights.
    """
    block_size, type_size = BLOCKS[QuantType.Q2_0]
    weights, theirs = PRISM_BLOCK
    starts = sorted({row.offset for row in rows})
    found: dict[str, bool] = {}  # whether it is Prism's; unsure ones are not in it
    for row in suspects:
        size = prod(row.dims)
        after = bisect_right(starts, row.offset)
        room = (starts[after] if after < len(starts) else nbytes) - row.offset
        small, large = size // weights * theirs, size // block_size * type_size
        is_small = size % weights == 0 and room in (small, -(-small // alignment) * alignment)
        if not is_small or room < large:
            found[row.name] = is_small
    unsure = True in found.values()
    return {row.name for row in suspects if found.get(row.name, unsure)}


def _alignment(cursor: Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 0 < value <= 1 << 31 or value & (value - 1):
        cursor.fail(MetadataError, f"general.alignment is {value!r}, expected a power of two")
    return value


def _tensor_info(cursor: Cursor, row: _Row, data_start: int, alignment: int) -> TensorInfo:
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


def _nbytes(cursor: Cursor, row: _Row, what: str) -> int:
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
    if prod(filter(None, row.dims)) >= MAX_ELEMENTS:
        cursor.fail(TensorInfoError, f"{what}: dims {row.dims}, over 2^60 elements", row.at)
    return prod(row.dims) // block_size * type_size


def _check_overlap(cursor: Cursor, tensors: list[TensorInfo]) -> None:
    ordered = sorted(filter(attrgetter("nbytes"), tensors), key=attrgetter("offset"))
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            cursor.fail(
                TensorInfoError, f"tensors {before.name!r} and {after.name!r} overlap", after.offset
            )
