"""Small GGUF files, one for each thing that headers can hold: what fuzzing starts from.

They are kept in tests/corpus, since fuzzing needs nothing installed. To write them again:

    .venv/bin/python tests/seeds.py
"""

from __future__ import annotations

import struct
from pathlib import Path

import gguf_builder as gb
from numaload.formats.qtypes import BLOCKS, QuantType

FOLDER = Path(__file__).parent / "corpus"
VALUES: dict[int, list[float]] = {
    gb.U8: [0, 255], gb.I8: [-128, 127], gb.U16: [0, 65535], gb.I16: [-32768, 32767],
    gb.U32: [0, 2**32 - 1], gb.I32: [-(2**31), 2**31 - 1], gb.F32: [-0.5, 2.0**-140],
    gb.BOOL: [False, True], gb.U64: [0, 2**64 - 1], gb.I64: [-(2**63), 2**63 - 1],
    gb.F64: [0.1, -1e308],
}  # fmt: skip


def text(key: str, value: str | bytes) -> bytes:
    return gb.entry(key, gb.STRING, gb.string(value))


def every_value() -> bytes:
    """All 13 value types, each as a value, as an array and as an empty array."""
    entries = [text("general.architecture", "llama"), text("empty", "")]
    for type_id, values in VALUES.items():
        elements = [gb.scalar(type_id, value) for value in values]
        entries += [gb.entry(f"one.{type_id}", type_id, elements[0])]
        entries += [gb.entry(f"all.{type_id}", gb.ARRAY, gb.array(type_id, *elements))]
        entries += [gb.entry(f"none.{type_id}", gb.ARRAY, gb.array(type_id))]
    strings = gb.array(gb.STRING, gb.string(""), gb.string("größer"), gb.string(b"\xff\xfe"))
    return gb.build([*entries, gb.entry("tokens", gb.ARRAY, strings)], [gb.tensor("t")], bytes(128))


def nested() -> bytes:
    inner = gb.array(gb.ARRAY, gb.array(gb.U8, b"\7"), gb.array(gb.STRING, gb.string("a")))
    rows = gb.array(gb.ARRAY, inner, gb.array(gb.ARRAY), inner)
    return gb.build([gb.entry("rows", gb.ARRAY, rows), gb.u32("after", 5)], data=b"")


def vocabulary() -> bytes:
    """As those of llama.cpp: no tensors, and arrays to the very end."""
    tokens = gb.entry("tokens", gb.ARRAY, gb.array(gb.STRING, *map(gb.string, ["a", "", "bcd"])))
    scores = gb.array(gb.F32, *(gb.scalar(gb.F32, x) for x in (0.5, -1, 0)))
    return gb.build([gb.entry("scores", gb.ARRAY, scores), tokens], data=b"")


def scores_last() -> bytes:
    kinds = gb.array(gb.I32, *(gb.scalar(gb.I32, x) for x in (1, 2, 3)))
    return gb.build([gb.u32("a", 1), gb.entry("kinds", gb.ARRAY, kinds)], data=b"")


def every_qtype() -> bytes:
    tensors, offset = [], 0
    for qtype, (block_size, type_size) in BLOCKS.items():
        tensors.append(gb.tensor(f"blk.0.{qtype.name}", (block_size,), qtype, offset))
        offset += -(-type_size // 32) * 32
    return gb.build([text("general.architecture", "llama")], tensors, bytes(offset))


def foreign_types() -> bytes:
    ids = (4, 31, 36, 38, 97, 133, 158, 202, 399, 500, 2**32 - 1)
    rows = [gb.tensor(f"t{type_id}", (7,), type_id) for type_id in ids]
    return gb.build([], [*rows, gb.tensor("good", (8,), offset=64)], bytes(96))


def odd_dims() -> bytes:
    dims = [(), (0,), (0, 5), (3, 1, 1, 2), (1,) * 4, (2, 2)]
    return gb.build(
        [], [gb.tensor(f"t{i}", d, offset=32 * i) for i, d in enumerate(dims)], bytes(192)
    )


def aligned(alignment: int) -> bytes:
    rows = [gb.tensor("a", (4,)), gb.tensor("b", (4,), offset=max(16, alignment))]
    return gb.build(
        [gb.u32("general.alignment", alignment)], rows, bytes(2 * max(16, alignment)),
        alignment=alignment,
    )  # fmt: skip


def split() -> bytes:
    entries = [
        gb.entry("split.no", gb.U16, gb.scalar(gb.U16, 0)),
        gb.entry("split.count", gb.U16, gb.scalar(gb.U16, 3)),
        gb.entry("split.tensors.count", gb.I32, gb.scalar(gb.I32, 9)),
    ]
    return gb.build(entries, data=b"", version=2)


def in_big_endian() -> bytes:
    with gb.big_endian():
        entries = [text("general.architecture", "llama"), gb.u32("general.alignment", 64)]
        scores = gb.array(gb.F32, *(gb.scalar(gb.F32, x) for x in (0.5, -1)))
        entries += [gb.entry("scores", gb.ARRAY, scores)]
        entries += [gb.entry("tokens", gb.ARRAY, gb.array(gb.STRING, *map(gb.string, "abc")))]
        rows = [gb.tensor("f", (3,)), gb.tensor("q", (32,), QuantType.Q8_0, 64)]
        data = struct.pack(">3f", 1, 2, 3).ljust(128, b"\0")
        return gb.build(entries, rows, data, alignment=64)


def seeds() -> dict[str, bytes]:
    """{name of the file in the corpus: what is in it}."""
    return {
        "aligned-1.seed": aligned(1),
        "aligned-256.seed": aligned(256),
        "big-endian.seed": in_big_endian(),
        "empty.seed": gb.build(data=b""),
        "foreign-types.seed": foreign_types(),
        "nested.seed": nested(),
        "odd-dims.seed": odd_dims(),
        "qtypes.seed": every_qtype(),
        "scores-last.seed": scores_last(),
        "split.seed": split(),
        "values.seed": every_value(),
        "vocabulary.seed": vocabulary(),
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, raw in seeds().items():
        (FOLDER / name).write_bytes(raw)
