"""GGUF files of tensors of any type, integers and float64 among them, in any order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import gguf_builder as gb
from numaload.formats.qtypes import BLOCKS, QuantType


class Given(NamedTuple):
    """``raw``: the bytes of its numbers or blocks. shape: numpy's."""

    type_id: int
    shape: tuple[int, ...]
    raw: bytes


def blocks(qtype: QuantType, shape: Sequence[int], seed: int = 0) -> Given:
    """Random bytes, infinite and NaN scales among them."""
    block_size, type_size = BLOCKS[qtype]
    count = int(np.prod(shape)) // block_size * type_size
    return Given(qtype, tuple(shape), np.random.default_rng(seed).bytes(count))


# {type: a dtype whose values it has}; bfloat16 is shown by its upper halves.
PLAIN = {
    "F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2",
    "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1",
}  # fmt: skip


def numbers(type_name: str, shape: Sequence[int], order: str = "<") -> Given:
    values = plain(type_name, shape).astype(f"{order}{PLAIN[type_name]}")
    return Given(QuantType[type_name], tuple(shape), values.tobytes())


def plain(type_name: str, shape: Sequence[int]) -> NDArray[Any]:
    """What ``numbers`` writes: halves from -60 on, which every one of these floats has."""
    halves = (np.arange(np.prod(shape)) % 256 - 120) / 2
    if type_name == "BF16":
        return (halves.astype(np.float32).view(np.uint32) >> 16).reshape(shape).astype(np.uint16)
    return halves.reshape(shape).astype(PLAIN[type_name])


def write(path: Path, tensors: Mapping[str, Given], table: Sequence[str] | None = None) -> str:
    """The bytes come in the order of ``tensors``, their rows in that of ``table``."""
    data, rows = bytearray(), {}
    for name, (type_id, shape, raw) in tensors.items():
        rows[name] = gb.tensor(name, shape[::-1], type_id, len(data))
        data += raw + bytes(-len(raw) % 32)
    entries = [gb.entry("general.architecture", gb.STRING, gb.string("test"))]
    path.write_bytes(gb.build(entries, [rows[name] for name in table or rows], bytes(data)))
    return str(path)
