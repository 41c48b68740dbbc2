"""Safetensors files for tests, byte by byte: whatever is not given is as it must be.

``length u64 | JSON, padded with spaces to a multiple of 8 | weights``
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

from numaload.files.source import SourceFile
from numaload.formats.safetensors import BITS, Header, parse_header

Row = tuple[str, Sequence[int]]  # dtype, shape


def size_of(dtype: str, shape: Sequence[int]) -> int:
    return prod(shape) * BITS[dtype] // 8


def table(rows: Mapping[str, Row]) -> dict[str, Any]:
    """The members of a header whose tensors follow one another."""
    members, begin = {}, 0
    for name, (dtype, shape) in rows.items():
        end = begin + size_of(dtype, shape)
        members[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    return members


def row(dtype: str = "F32", shape: Any = (2,), offsets: Any = (0, 8), **others: Any) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets} | others


def frame(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def build(members: Mapping[str, Any], data: bytes = bytes(8), **options: Any) -> bytes:
    text = json.dumps(members, separators=(",", ":"), ensure_ascii=False)
    raw = text.encode("utf-8", "surrogatepass")
    return frame(raw + b" " * (-len(raw) % 8), data, **options)


def model(rows: Mapping[str, Row], metadata: Mapping[str, str] | None = None) -> bytes:
    """A whole file; its weights are bytes that differ from place to place."""
    members = table(rows)
    nbytes = max((member["data_offsets"][1] for member in members.values()), default=0)
    head = {} if metadata is None else {"__metadata__": dict(metadata)}
    return build(head | members, bytes(i * 37 % 251 for i in range(nbytes)))


def read_header(path: Path | str) -> Header:
    with SourceFile(os.fspath(path)) as file:
        return parse_header(file.read_at, file.size, os.fspath(path))


def by_library(raw: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(name, {dtype, shape, data}) of all tensors, as the safetensors package reads a file."""
    import safetensors

    library: Any = safetensors
    found: list[tuple[str, dict[str, Any]]] = library.deserialize(raw)
    return found


FOLDER = Path(__file__).parent / "corpus-safetensors"


def seeds() -> dict[str, bytes]:
    """{file of the corpus that fuzzing starts from: what is in it}."""
    every: dict[str, Row] = {f"t.{dtype}": (dtype, (4, 2)) for dtype in BITS}
    shapes: dict[str, Row] = {
        f"s{i}": ("I16", s) for i, s in enumerate([(), (0,), (2, 0, 3), (1,) * 32])
    }
    odd = {"odd": row("F3_E1M1", [3], [0, 5]), "t": row("F32", [2], [5, 13])}
    spaced = json.dumps(table({"a": ("F16", (2,)), "b": ("U8", (3,))}), indent=1)
    return {
        "types.seed": model(every, {"format": "pt"}),
        "shapes.seed": model(shapes),
        "unknown.seed": build(odd, bytes(13)),
        "names.seed": model({'"q\\\n😀': ("I8", (2,)), "ä": ("I8", (1,))}, {"é": "x\\y", "": ""}),
        "spaces.seed": frame(spaced + "\n\t ", bytes(7)),
        "empty.seed": model({}, {}),
        "turned.seed": build(
            dict(reversed(table(every).items())),
            bytes(sum(size_of(*row) for row in every.values())),
        ),
    }


if __name__ == "__main__":  # python -m safetensors_builder, in tests: to write them again
    FOLDER.mkdir(exist_ok=True)
    for seed, raw in seeds().items():
        (FOLDER / seed).write_bytes(raw)
