"""Metadata of a GGUF file: the 13 value types, and arrays that are decoded when asked for."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from numaload.errors import MetadataError, MetadataKeyError

MAX_NESTING = 4  # arrays of arrays; ggml itself refuses any
STRING, ARRAY, BOOL = 8, 9, 7
CODES: dict[int, str] = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
TYPE_NAMES = dict(
    enumerate("u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split())  # noqa: SIM905
)
# {value type: the fewest bytes that one element of it takes}
SMALLEST: dict[int, int] = {
    **{type_id: struct.calcsize("<" + code) for type_id, code in CODES.items()},
    STRING: 8,
    ARRAY: 12,
}
MAX_DIMS = 8  # ggml has 4; stable-diffusion.cpp and ComfyUI-GGUF write 5, of conv3d

ReadAt = Callable[[int, int], bytes]


class ByteOrder(NamedTuple):
    """How a file packs its numbers. Compiled once: the parser only looks them up."""

    name: str  # "little" or "big", as int.from_bytes has it
    sign: str
    u32: struct.Struct
    u64: struct.Struct
    counts: struct.Struct
    type_and_count: struct.Struct
    scalars: dict[int, struct.Struct]
    rows: tuple[struct.Struct, ...]  # of a tensor, after the name and n_dims, by n_dims

    def __reduce__(self) -> tuple[Any, ...]:
        return _byte_order, (self.name, self.sign)  # structs cannot be pickled


def _byte_order(name: str, sign: str) -> ByteOrder:
    u32, u64, counts, type_and_count = (struct.Struct(sign + f) for f in ("I", "Q", "QQ", "IQ"))
    scalars = {type_id: struct.Struct(sign + code) for type_id, code in CODES.items()}
    rows = tuple(struct.Struct(f"{sign}{n}QIQ") for n in range(MAX_DIMS + 1))
    return ByteOrder(name, sign, u32, u64, counts, type_and_count, scalars, rows)


LITTLE, BIG = _byte_order("little", "<"), _byte_order("big", ">")


class Place(NamedTuple):
    """Where the elements of an array are in a file. Bytes."""

    read_at: ReadAt
    path: str
    offset: int
    nbytes: int
    order: ByteOrder


class MetadataArray(Sequence[Any]):
    """An array value, decoded when it is first asked for; its length is known at once.

    Decoding takes at most 32 times the array's bytes in the file (25 for numbers of 16 bits).
    """

    def __init__(self, type_id: int, count: int, place: Place) -> None:
        self.type_id, self._count, self._place = type_id, count, place
        self._values: list[Any] | None = None

    @property
    def type_name(self) -> str:
        return TYPE_NAMES[self.type_id]

    @property
    def offset(self) -> int:
        """Return the byte of the file at which the elements begin."""
        return self._place.offset

    @property
    def nbytes(self) -> int:
        return self._place.nbytes

    def __getstate__(self) -> dict[str, Any]:
        """Give copies and pickles the values: the open file is this process's own."""
        place = self._place._replace(read_at=None)  # type: ignore[arg-type] # not read again
        return vars(self) | {"_values": self._decoded(), "_place": place}

    def tolist(self) -> list[Any]:
        return list(self._decoded())

    def _decoded(self) -> list[Any]:
        if self._values is None:
            read_at, _, offset, nbytes, order = self._place
            decoder = _Decoder(read_at(offset, nbytes), order)
            try:
                values = decoder.elements(self.type_id, self._count)
            except (struct.error, KeyError, OverflowError, RecursionError) as error:
                raise self._changed() from error
            if decoder.pos != nbytes:
                raise self._changed()
            self._values = values
        return self._values

    def _changed(self) -> MetadataError:
        message = f"{self!r} has other lengths in it than when the header was read"
        return MetadataError(message, path=self._place.path, offset=self.offset)

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
        """Return how the file stores ``key``: "u32", "string", "array of f32", ..."""
        value = self[key]
        if isinstance(value, MetadataArray):
            return f"array of {value.type_name}"
        return TYPE_NAMES[self._types[key]]


class _Decoder:
    """Decode one array from bytes whose structure was walked before."""

    def __init__(self, raw: bytes, order: ByteOrder) -> None:
        self.raw, self.order, self.pos = raw, order, 0

    def elements(self, type_id: int, count: int, depth: int = 0) -> list[Any]:
        if type_id == STRING:
            return self.strings(count)
        if type_id == ARRAY:
            if depth >= MAX_NESTING:
                raise RecursionError
            return [self.array(depth + 1) for _ in range(count)]
        fmt = struct.Struct(f"{self.order.sign}{count}{CODES[type_id]}")
        values = list(fmt.unpack_from(self.raw, self.pos))
        self.pos += fmt.size
        return values

    def array(self, depth: int) -> list[Any]:
        head = self.order.type_and_count
        type_id, count = head.unpack_from(self.raw, self.pos)
        self.pos += head.size
        return self.elements(type_id, count, depth)

    def strings(self, count: int) -> list[str]:
        unpack, raw, pos = self.order.u64.unpack_from, self.raw, self.pos
        values = []
        for _ in range(count):
            start = pos + 8
            pos = start + unpack(raw, pos)[0]
            # A vocabulary may hold byte tokens that are no UTF-8; gguf-py and llama.cpp keep them.
            values.append(raw[start:pos].decode("utf-8", "surrogateescape"))
        self.pos = pos
        return values
