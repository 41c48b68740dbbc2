"""GGUF files for tests: good ones by the gguf package, and wrong ones byte by byte, on purpose.

What ``build`` puts together, little endian unless inside ``big_endian``; every count, length and
offset can be a lie::

    "GGUF" | version u32 | n_tensors u64 | n_kv u64
    entry:    key length u64, key bytes  | value type u32 | value
    tensor:   name length u64, name bytes | n_dims u32 | dims u64 x n_dims | type u32 | offset u64
    zeros up to a multiple of the alignment | data

    string:   length u64, bytes
    array:    element type u32, count u64, elements
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import QuantType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f",
    BOOL: "?", U64: "Q", I64: "q", F64: "d",
}  # fmt: skip
HUGE = 2**64 - 1
signs = ["<"]  # the last one is how numbers are packed now


@contextmanager
def big_endian() -> Iterator[None]:
    """What is built inside is big endian, the numbers of ``data`` being the caller's."""
    signs.append(">")
    try:
        yield
    finally:
        signs.pop()


def pack(fields: str, *values: Any) -> bytes:
    return struct.pack(signs[-1] + fields, *values)


def scalar(type_id: int, value: Any) -> bytes:
    return pack(CODES[type_id], value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return pack("Q", len(raw) if length is None else length) + raw


def array(type_id: int, *elements: bytes, count: int | None = None) -> bytes:
    head = pack("IQ", type_id, len(elements) if count is None else count)
    return head + b"".join(elements)


def entry(key: str | bytes, type_id: int, value: bytes) -> bytes:
    return string(key) + pack("I", type_id) + value


def u32(key: str, value: int) -> bytes:
    return entry(key, U32, scalar(U32, value))


def tensor(
    name: str | bytes, dims: Sequence[int] = (32,), type_id: int = 0, offset: int = 0
) -> bytes:
    row = pack(f"I{len(dims)}QIQ", len(dims), *dims, type_id, offset)
    return string(name) + row


def build(
    entries: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: bytes = bytes(1024),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_kv: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    """Counts are what there is, unless given. alignment only pads: its entry is the caller's."""
    counts = (
        len(tensors) if n_tensors is None else n_tensors,
        len(entries) if n_kv is None else n_kv,
    )
    header = magic + pack("IQQ", version, *counts) + b"".join([*entries, *tensors])
    return header + bytes(-len(header) % alignment) + data


def random_blocks(qtype: QuantType, shape: Sequence[int], seed: int = 0) -> NDArray[np.uint8]:
    """Random bytes, infinite and NaN scales among them, for a tensor of this numpy shape."""
    block_size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(qtype)]
    row_bytes = shape[-1] // block_size * type_size
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape[:-1], row_bytes), dtype=np.uint8)


def write_good(
    path: Path,
    tensors: Mapping[str, tuple[QuantType, NDArray[Any]]],
    metadata: Mapping[str, int] | None = None,
    per_file: int = 0,
) -> list[str]:
    """Write blocks with the gguf package, ``per_file`` tensors to a split file; all its paths."""
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=per_file)
    for key, value in (metadata or {}).items():
        writer.add_uint32(key, value)
    for name, (qtype, blocks) in tensors.items():
        # The writer takes float32 as such; of all other types it wants the bytes.
        plain = qtype is QuantType.F32
        raw_dtype = None if plain else gguf.GGMLQuantizationType(qtype)
        writer.add_tensor(name, blocks.view(np.float32) if plain else blocks, raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(str(p) for p in path.parent.glob(f"{path.stem}*.gguf"))
