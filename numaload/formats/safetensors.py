"""The header of a safetensors file: the table of tensors, and metadata, nothing of the weights.

Layout (https://github.com/huggingface/safetensors, README, "Format")::

    length of the header u64 | header, JSON in UTF-8 that begins with { | the weights
    {"NAME": {"dtype": "F16", "shape": [16, 256], "data_offsets": [BEGIN, END]}, ...,
     "__metadata__": {"KEY": "VALUE", ...}}

Offsets count from the end of the header; numbers are little endian, rows come first. The weights
have no holes: every byte is of exactly one tensor. The order of members is anyone's choice.

The file is not trusted. What the safetensors library refuses is refused, but for types that it does
not know: they spoil one tensor, not the file. Members that it ignores are ignored, and metadata may
be null, as MLX writes it. Refused is also what it leaves open: names that appear twice, spellings
that no writer has. The header has at most 100 MB, and parsing takes at most 32 times its bytes.
"""

from __future__ import annotations

import re
from math import prod
from typing import NamedTuple, NoReturn

from numaload.errors import (
    FormatError,
    MetadataError,
    NotSafetensorsError,
    TensorInfoError,
    TruncatedError,
)
from numaload.formats.jsontext import MAX_TEXT, WS, JsonText
from numaload.formats.metadata import STRING, Metadata, ReadAt
from numaload.formats.qtypes import QuantType
from numaload.formats.unusable import instead

# {dtype: bits of an element}. Source: the library's enum Dtype.
BITS: dict[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# Those that GGUF has too.
QTYPES = {name: QuantType[name] for name in BITS if name in QuantType.__members__}

LENGTH = 8  # bytes of the header's length
METADATA = "__metadata__"
MAX_DIMS = 32  # what every numpy takes
MAX_ELEMENTS = 1 << 60
SPACES = (b" ", b"\t", b"\n", b"\r")  # that the library takes before the header, too

NUMBER = "(?:0|[1-9][0-9]{0,19})"
DIMS = f"(?:{WS}{NUMBER}(?:{WS},{WS}{NUMBER}){{0,{MAX_DIMS - 1}}})?"
FIELDS = {
    "dtype": '"([A-Za-z0-9_.-]{1,64})"',
    "shape": rf"\[({DIMS}){WS}\]",
    "data_offsets": rf"\[{WS}({NUMBER}){WS},{WS}({NUMBER}){WS}\]",
}
FIELD = '"(?:' + "|".join(f'{name}"{WS}:{WS}{value}' for name, value in FIELDS.items()) + ")"
# All three fields in any order. Of the last two, those of one kind overwrite each other: then
# another kind is missing.
INFO = re.compile(rf"\{{{WS}{FIELD}{WS}(?:,{WS}{FIELD}{WS}){{2}}\}}")
EXPECTED = (
    '{"dtype": "TYPE", "shape": [DIMS], "data_offsets": [BEGIN, END]} of whole numbers below 10^20'
    f" and at most {MAX_DIMS} dims"
)


class SafeTensorInfo(NamedTuple):
    """One row of the table. ``offset`` is absolute in its file; it and ``nbytes`` are bytes."""

    name: str
    dims: tuple[int, ...]  # GGUF order, fastest first: the file's shape reversed
    type_name: str  # as the file has it: "BF16", "F8_E4M3", ...
    offset: int
    nbytes: int

    @property
    def qtype(self) -> QuantType | None:
        """Return the same type of GGUF; None where only safetensors has it."""
        return QTYPES.get(self.type_name)

    @property
    def type_id(self) -> int:
        """Return GGUF's id of the type, or -1."""
        return -1 if self.qtype is None else int(self.qtype)

    @property
    def problem(self) -> str:
        """Describe a type that GGUF does not have, for an error."""
        if self.known:
            return f"type {self.type_name} is none of GGUF's: take torch() or buffer"
        return f"type {self.type_name} is unknown to this numaload"

    @property
    def known(self) -> bool:
        """Return whether the tensor's type is known; its place in the file always is."""
        return self.type_name in BITS


class Header(NamedTuple):
    metadata: Metadata  # strings
    tensors: list[SafeTensorInfo]  # in the order of their bytes
    alignment: int  # 8, or 1 where the writer did not care
    data_start: int  # byte at which the weights begin
    header_end: int  # byte after the JSON, which may be padded
    size: int  # bytes of the file
    byte_order: str  # "little"

    @property
    def version(self) -> int | None:
        """Return None: the format has no version."""
        return None

    @property
    def title(self) -> str:
        return "safetensors"


def looks_like(start: bytes) -> bool:
    """Return whether the first nine bytes of a file can begin a header."""
    return start[LENGTH : LENGTH + 1] == b"{"


def parse_header(read_at: ReadAt, size: int, path: str = "<buffer>") -> Header:
    """Read the header of a safetensors file of ``size`` bytes.

    read_at(offset, n): exactly n bytes, or an error of its own.
    Raises: NotSafetensorsError, TruncatedError, MetadataError, TensorInfoError, and FormatError
    itself for a header that is no JSON, or too large, and for bytes that belong to no tensor.
    """
    length = _length(read_at, size, path)
    walk = JsonText(read_at(LENGTH, length), path, FormatError, LENGTH)
    data_start = LENGTH + length
    metadata, tensors = _members(walk, data_start)
    header_end = data_start - (len(walk.text) - len(walk.text.rstrip()))
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_layout(read_at, tensors, data_start, size, path)
    alignment = LENGTH if data_start % LENGTH == 0 else 1
    return Header(metadata, tensors, alignment, data_start, header_end, size, "little")


def _length(read_at: ReadAt, size: int, path: str) -> int:
    start = bytes(read_at(0, min(LENGTH + 1, size)))
    length = int.from_bytes(start[:LENGTH], "little")
    padded = start[LENGTH:] in SPACES and LENGTH + length <= size
    if not padded and not looks_like(start):
        what = instead(read_at, size)
        message = f"expected a length of 8 bytes and {{, found {start!r}{what}"
        raise NotSafetensorsError(message, path=path, offset=0)
    if length > MAX_TEXT:
        message = f"header of {length} bytes announced, at most {MAX_TEXT} are read"
        raise FormatError(message, path=path, offset=0)
    if LENGTH + length > size:
        missing = LENGTH + length - size
        message = f"the header ends at byte {LENGTH + length}, the file at {size}: {missing} bytes"
        raise TruncatedError(f"{message} are missing", path=path, offset=0)
    return length


def _members(walk: JsonText, data_start: int) -> tuple[Metadata, list[SafeTensorInfo]]:
    metadata: dict[str, str] | None = None
    tensors: dict[str, SafeTensorInfo] = {}
    for name in walk.members("the header"):
        if name == METADATA:
            if metadata is not None:
                walk.fail(f"{METADATA} appears twice", kind=MetadataError)
            walk.kind = MetadataError
            metadata = {} if walk.null() else walk.string_map(METADATA)
            walk.kind = FormatError
        elif name in tensors:
            walk.fail(f"tensor {name!r} appears twice", kind=TensorInfoError)
        else:
            tensors[name] = _tensor_info(walk, name, data_start)
    walk.end("the header")
    values = metadata or {}
    return Metadata(values, dict.fromkeys(values, STRING)), list(tensors.values())


def _tensor_info(walk: JsonText, name: str, data_start: int) -> SafeTensorInfo:
    at = walk.pos
    match = INFO.match(walk.text, at)
    a, b, c, d, dtype, shape, begin, end = match.groups() if match else (None,) * 8
    dtype, shape, begin, end = a or dtype, shape if b is None else b, c or begin, d or end
    if match is None or dtype is None or shape is None or begin is None or end is None:
        dtype, shape, begin, end = _fields(walk, name)
    else:
        walk.pos = match.end()
    dims = tuple(map(int, shape.split(",")))[::-1] if shape else ()
    first, last = int(begin), int(end)
    if prod(dims) * BITS.get(dtype, 0) != 8 * (last - first) or 0 in dims:
        _check_size(walk, at, name, dtype, dims, first, last)
    return SafeTensorInfo(name, dims, dtype, data_start + first, last - first)


def _fields(walk: JsonText, name: str) -> tuple[str, str, str, str]:
    """Read a description that has other members too, which mean nothing, or that cannot be."""
    at, found = walk.pos, dict[str, tuple[str, ...]]()
    walk.kind = TensorInfoError
    for member in walk.members(f"tensor {name!r}"):
        if member not in FIELDS:
            walk.skip(repr(member))
            continue
        match = re.compile(FIELDS[member]).match(walk.text, walk.pos)
        if match is None or member in found:
            found.clear()
            break
        found[member], walk.pos = match.groups(), match.end()
    if len(found) < len(FIELDS):
        walk.pos = at
        walk.expected(f"of tensor {name!r} {EXPECTED}")
    walk.kind = FormatError
    (dtype,), (shape,), (begin, end) = (found[field] for field in FIELDS)
    return dtype, shape, begin, end


def _check_size(
    walk: JsonText, at: int, name: str, dtype: str, dims: tuple[int, ...], first: int, last: int
) -> None:
    """Check a tensor whose bytes do not match its shape, or that is empty."""

    def fail(why: str) -> NoReturn:
        walk.fail(f"tensor {name!r}: {why}", at, TensorInfoError)

    shape = dims[::-1]
    # Python integers: nothing wraps. A dim of 0 must not hide that the others are impossible.
    if prod(max(dim, 1) for dim in dims) >= MAX_ELEMENTS:
        fail(f"shape {shape}, over 2^60 elements")
    if first > last:
        fail(f"data_offsets begin at {first} and end at {last}")
    if dtype not in BITS:
        return
    bits = prod(dims) * BITS[dtype]
    if bits % 8:
        fail(f"shape {shape} of {dtype}, {BITS[dtype]} bits each, is no whole number of bytes")
    if bits != 8 * (last - first):
        fail(f"shape {shape} of {dtype} is {bits // 8} bytes, data_offsets are {last - first}")


def _check_layout(
    read_at: ReadAt, tensors: list[SafeTensorInfo], data_start: int, size: int, path: str
) -> None:
    """Check that every byte after the header belongs to exactly one tensor."""
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            gap = tensor.offset - end
            why = f"leaves {gap} bytes unused after" if gap > 0 else "overlaps"
            message = f"tensor {tensor.name!r} {why} {before}"
            raise TensorInfoError(message, path=path, offset=min(end, size))
        end, before = end + tensor.nbytes, f"tensor {tensor.name!r}"
    if end > size:
        message = f"{before} ends at byte {end}, the file at {size}: {end - size} bytes are missing"
        raise TruncatedError(message, path=path, offset=size)
    if end < size:
        message = f"{size - end} bytes after {before}, which ends the weights"
        if looks_like(read_at(end, min(LENGTH + 1, size - end))):
            message += " (another file, joined to this one with cat: use them as they were)"
        raise FormatError(message, path=path, offset=end)
