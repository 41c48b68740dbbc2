"""The header parser: every value type, alignment, tensor type and byte order."""

from __future__ import annotations

import struct
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_builder as gb
import numaload
from headers import Source, parse
from numaload.backends.gguf_reader import GGUFReader
from numaload.errors import MetadataError, MetadataKeyError, TruncatedError
from numaload.files.source import SourceFile
from numaload.formats import qtypes
from numaload.formats.cursor import FIRST_READ
from numaload.formats.gguf import Header, parse_header
from numaload.formats.metadata import MAX_DIMS, MetadataArray
from numaload.formats.qtypes import BLOCKS, QuantType, foreign_type


def of_type(type_id: int, value: Any) -> bytes:
    return gb.string(value) if type_id == gb.STRING else gb.scalar(type_id, value)


EXTREMES: dict[int, list[Any]] = {
    gb.U8: [0, 255], gb.I8: [-128, 127], gb.U16: [0, 65535], gb.I16: [-32768, 32767],
    gb.U32: [0, 2**32 - 1], gb.I32: [-(2**31), 2**31 - 1], gb.F32: [-0.5, 2.0**-140],
    gb.BOOL: [False, True], gb.STRING: ["", "größer"], gb.U64: [0, 2**64 - 1],
    gb.I64: [-(2**63), 2**63 - 1], gb.F64: [0.1, -1e308],
}  # fmt: skip
WORDS = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()  # noqa: SIM905


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("type_id", EXTREMES, ids=[WORDS[t] for t in EXTREMES])
def test_values_and_arrays_of_every_type(type_id: int, order: str) -> None:
    values = EXTREMES[type_id]
    with gb.big_endian() if order == "big" else nullcontext():
        elements = [of_type(type_id, value) for value in values]
        entries = [gb.entry(f"k{i}", type_id, raw) for i, raw in enumerate(elements)]
        entries += [gb.entry("all", gb.ARRAY, gb.array(type_id, *elements))]
        entries += [gb.entry("none", gb.ARRAY, gb.array(type_id))]
        raw = gb.build(entries)
    header = parse(raw)
    metadata = header.metadata
    assert header.byte_order == order
    assert [metadata["k0"], metadata["k1"]] == values
    assert (len(metadata["none"]), metadata["none"].tolist()) == (0, [])
    assert type(metadata["k0"]) is type(values[0])
    assert metadata.type_name("k0") == WORDS[type_id]
    assert metadata.type_name("all") == f"array of {WORDS[type_id]}"
    assert metadata["all"] == values


def test_arrays_are_decoded_when_asked_for() -> None:
    source = Source(gb.build([gb.entry("a", gb.ARRAY, gb.array(gb.U16, b"\1\0", b"\2\0"))]))
    found = parse_header(source.read_at, source.size).metadata["a"]
    before = source.reads
    assert (len(found), repr(found), found._values) == (2, "<array of 2 u16>", None)
    assert source.reads == before
    assert (found[1], found[:1], list(found), 2 in found) == (2, [1], [1, 2], True)
    assert source.reads == before + 4
    found.tolist().clear()  # a copy
    assert found == [1, 2]
    assert found == (1, 2)
    assert found != "12"


def test_nested_arrays() -> None:
    rows = gb.array(
        gb.ARRAY, gb.array(gb.STRING, gb.string("a"), gb.string("bc")), gb.array(gb.U8, b"\3")
    )
    metadata = parse(gb.build([gb.entry("rows", gb.ARRAY, rows), gb.u32("after", 5)])).metadata
    assert metadata["rows"] == [["a", "bc"], [3]]
    assert metadata["after"] == 5


def test_bytes_that_are_no_text_survive_in_values() -> None:
    raw = b"\xff\xfeab"
    entries = [
        gb.entry("one", gb.STRING, gb.string(raw)),
        gb.entry("all", gb.ARRAY, gb.array(gb.STRING, gb.string(raw))),
    ]
    metadata = parse(gb.build(entries)).metadata
    assert metadata["one"].encode("utf-8", "surrogateescape") == raw
    assert metadata["all"] == [metadata["one"]]


@pytest.mark.parametrize("version", [2, 3])
def test_versions_have_one_layout(version: int) -> None:
    header = parse(gb.build([gb.u32("a", 1)], [gb.tensor("t", (8, 4))], version=version))
    (tensor,) = header.tensors
    assert (header.version, dict(header.metadata)) == (version, {"a": 1})
    assert (tensor.dims, tensor.qtype, tensor.nbytes) == ((8, 4), QuantType.F32, 128)
    assert tensor.offset == header.data_start >= header.header_end


def test_missing_keys_name_close_ones() -> None:
    metadata = parse(gb.build([gb.u32("llama.block_count", 1)])).metadata
    with pytest.raises(MetadataKeyError, match=r"llama\.block_count"):
        metadata["llama.block_counts"]
    assert metadata.get("llama.block_counts") is None
    assert metadata.get("x", 3) == 3
    assert "x" not in metadata


@pytest.mark.parametrize("alignment", [1, 8, 32, 64, 4096, 1 << 16])
def test_alignment(alignment: int) -> None:
    raw = gb.build(
        [gb.u32("general.alignment", alignment)],
        [gb.tensor("a", (4,)), gb.tensor("b", (4,), offset=alignment * 16)],
        bytes(alignment * 32),
        alignment=alignment,
    )
    header = parse(raw)
    assert header.alignment == alignment
    assert header.data_start % alignment == 0
    assert header.tensors[1].offset == header.data_start + 16 * alignment


@pytest.mark.parametrize("qtype", QuantType, ids=lambda q: q.name)
def test_bytes_of_every_type(qtype: QuantType) -> None:
    block_size, type_size = BLOCKS[qtype]
    header = parse(gb.build([], [gb.tensor("t", (2 * block_size, 3), qtype)], bytes(6 * type_size)))
    assert header.tensors[0].nbytes == 6 * type_size


@pytest.mark.parametrize(
    ("dims", "nbytes"), [((), 4), ((0,), 0), ((0, 5), 0), ((5, 0), 0), ((3, 1, 1, 2), 24)]
)
def test_unusual_dims(dims: tuple[int, ...], nbytes: int) -> None:
    # Tensors without bytes may share their place with others.
    raw = gb.build([], [gb.tensor("odd", dims), gb.tensor("t", (8,), offset=32 * (nbytes > 0))])
    header = parse(raw)
    assert (header.tensors[0].dims, header.tensors[0].nbytes) == (dims, nbytes)


FOREIGN = {
    "removed": [4, 5, 31, 32, 33, 36, 37, 38],
    "ik_llama.cpp": [97, 99, 133, 158, 202, 399],
    "TurboQuant": [64, 68],
    "ROCmFPX": [100, 107],
    "Prism": [142, 143],
    "ik_llama.cpp or Prism": [144],
    "unknown": [43, 63, 69, 96, 108, 132, 159, 201, 400, 2**32 - 1],
}


@pytest.mark.parametrize(
    ("family", "type_id"), [(family, i) for family, ids in FOREIGN.items() for i in ids]
)
def test_an_unknown_type_spoils_one_tensor_only(family: str, type_id: int) -> None:
    raw = gb.build([], [gb.tensor("odd", (7,), type_id), gb.tensor("t", (8,), offset=64)])
    odd, known = parse(raw).tensors
    assert (odd.qtype, odd.type_name, odd.nbytes) == (None, f"{family}:{type_id}", 0)
    assert foreign_type(type_id).family == family
    assert known.qtype is QuantType.F32


def test_every_id_up_to_42_is_a_type_or_was_removed() -> None:
    assert {*map(int, QuantType), *FOREIGN["removed"]} == set(range(43))
    assert not [row for row in qtypes.FOREIGN for i in row.ids if i in BLOCKS]


OURS, THEIRS = (64, 18), (128, 34)  # weights and bytes of a block of type 42, Prism's of old


def of_type_42(
    dims: list[tuple[int, int]], block: tuple[int, int], *entries: bytes, padded: bool = True
) -> bytes:
    """A file of tensors of type 42 whose blocks are so large."""
    rows, offset, nbytes = [], 0, 0
    for i, size in enumerate(dims):
        rows.append(gb.tensor(f"t{i}", size, 42, offset))
        nbytes = size[0] * size[1] // block[0] * block[1]
        offset += -(-nbytes // 32) * 32
    end = offset if padded else offset - (-nbytes % 32)
    return gb.build(list(entries), rows, bytes(end))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dims", [[(2048, 3)], [(128, 1), (4096, 2), (128, 2)]])
def test_type_42_of_prism_is_named(dims: list[tuple[int, int]], padded: bool) -> None:
    """Their blocks are larger and fewer; of tiny tensors the others tell."""
    theirs = parse(of_type_42(dims, THEIRS, padded=padded)).tensors
    assert {t.type_name for t in theirs} == {"Prism:142"}
    assert all(t.qtype is None and t.nbytes == 0 and "PQ2_0 of Prism" in t.problem for t in theirs)
    ours = parse(of_type_42(dims, OURS, padded=padded)).tensors
    assert {t.qtype for t in ours} == {QuantType.Q2_0}


def test_rotated_weights_of_type_42_are_refused_whatever_their_blocks() -> None:
    rotated = gb.u32("prism.hadamard.block_size", 128)
    tensors = parse(of_type_42([(2048, 3)], OURS, rotated)).tensors
    assert {t.type_name for t in tensors} == {"Prism:142"}


def test_type_42_that_is_cut_short_is_truncated() -> None:
    raw = of_type_42([(2048, 3)], OURS)
    with pytest.raises(TruncatedError):
        parse(raw[:-200])


@pytest.mark.parametrize("kind", ["short-strings", "long-strings", "nested", "numbers"])
def test_a_header_of_many_reads(kind: str) -> None:
    """Read in growing steps, each byte once, and the strings on a step's border are whole."""
    many: dict[str, tuple[bytes, list[Any]]] = {
        "short-strings": _strings([f"token {i}" * (i % 5) for i in range(60_000)]),
        "long-strings": _strings([f"{i % 10}" * 70_000 for i in range(20)]),
        "nested": (
            gb.array(gb.ARRAY, *[gb.array(gb.U32, struct.pack("<I", i)) for i in range(40_000)]),
            [[i] for i in range(40_000)],
        ),
        "numbers": (
            gb.array(gb.I32, *[struct.pack("<i", -i) for i in range(200_000)]),
            [-i for i in range(200_000)],
        ),
    }
    value, expected = many[kind]
    raw = gb.build([gb.entry("a", gb.ARRAY, value), gb.u32("after", 7)], [gb.tensor("t")])
    assert len(raw) > 2 * FIRST_READ
    source = Source(raw)
    header = parse_header(source.read_at, source.size)
    assert source.reads <= len(raw) + 4
    assert header.metadata["after"] == 7
    assert header.metadata["a"] == expected
    assert header.tensors[0].offset == len(raw) - 1024


def _strings(texts: list[str]) -> tuple[bytes, list[Any]]:
    return gb.array(gb.STRING, *map(gb.string, texts)), texts


def test_weights_are_not_read() -> None:
    raw = gb.build([], [gb.tensor("t", (1 << 20,))], bytes(4 << 20))
    source = Source(raw)
    parse_header(source.read_at, source.size)
    assert source.reads <= FIRST_READ + 4


CHANGED: dict[str, tuple[bytes, bytes]] = {
    "strings-longer": (gb.array(gb.STRING, gb.string("abcd")), gb.string("", 2**63)),
    "strings-shorter": (gb.array(gb.STRING, gb.string("abcd")), gb.string("abc")),
    "nested-type": (gb.array(gb.ARRAY, gb.array(gb.U8, b"\1")), gb.array(99, count=1)),
    "nested-count": (gb.array(gb.ARRAY, gb.array(gb.U8, b"\1")), gb.array(gb.U8, count=gb.HUGE)),
    "nested-endless": (
        gb.array(gb.ARRAY, gb.array(gb.U8, *[b"\1"] * 60_000)),
        gb.array(gb.ARRAY, count=1) * 5000,
    ),
    "nested-a-little-deeper": (
        gb.array(gb.ARRAY, gb.array(gb.U8, *[b"\1"] * 36)),
        gb.array(gb.ARRAY, count=1) * 4,
    ),
    "string-count": (gb.array(gb.ARRAY, gb.array(gb.U64, bytes(8))), gb.array(gb.STRING, count=9)),
}


@pytest.mark.parametrize(("value", "later"), CHANGED.values(), ids=CHANGED)
def test_an_array_that_changed_after_opening(value: bytes, later: bytes) -> None:
    source = Source(gb.build([gb.entry("a", gb.ARRAY, value)]))
    found = parse_header(source.read_at, source.size, "model.gguf").metadata["a"]
    at = found.offset
    source.raw = source.raw[:at] + later + source.raw[at + len(later) :]
    with pytest.raises(MetadataError, match=r"model\.gguf: .* other lengths") as caught:
        found.tolist()
    assert caught.value.offset == at


TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
VALUES: dict[str, tuple[str, st.SearchStrategy[Any]]] = {
    "u8": ("add_uint8", st.integers(0, 255)),
    "i32": ("add_int32", st.integers(-(2**31), 2**31 - 1)),
    "u64": ("add_uint64", st.integers(0, 2**64 - 1)),
    "f64": ("add_float64", st.floats(allow_nan=False)),
    "bool": ("add_bool", st.booleans()),
    "string": ("add_string", TEXT.filter(bool)),
    "strings": ("add_array", st.lists(TEXT, min_size=1, max_size=20)),
    "ints": ("add_array", st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=20)),
}
ENTRIES = st.sampled_from(sorted(VALUES)).flatmap(lambda k: st.tuples(st.just(k), VALUES[k][1]))
SHAPES = st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None, max_examples=60, database=None)
@given(
    st.lists(ENTRIES, max_size=6),
    SHAPES,
    st.sampled_from([32, 64, 256]),
    st.sampled_from(["LITTLE", "BIG"]),
)
def test_what_gguf_writes_is_read_as_gguf_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, Any]],
    shapes: list[list[int]],
    alignment: int,
    order: str,
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    _write(path, entries, shapes, alignment, order)
    with SourceFile(str(path)) as file:
        header = parse_header(file.read_at, file.size, str(path))
        got = {k: v.tolist() if isinstance(v, MetadataArray) else v for k, v in _own(header)}
    theirs = gguf.GGUFReader(str(path))
    assert got == {f"k{i}": value for i, (_, value) in enumerate(entries)}
    assert got == {k: f.contents() for k, f in theirs.fields.items() if k in got}
    assert (header.alignment, header.byte_order) == (theirs.alignment, order.lower())
    assert [(t.name, list(t.dims), t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.shape.tolist(), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def _own(header: Header) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in header.metadata.items() if not k.startswith("general.")]


def _write(
    path: Path, entries: list[tuple[str, Any]], shapes: list[list[int]], alignment: int, order: str
) -> None:
    writer = gguf.GGUFWriter(str(path), "llama", endianess=gguf.GGUFEndian[order])
    writer.add_custom_alignment(alignment)
    for i, (kind, value) in enumerate(entries):
        getattr(writer, VALUES[kind][0])(f"k{i}", value)
    for i, shape in enumerate(shapes):
        writer.add_tensor(f"t{i}", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("qtype", [QuantType.F32, QuantType.Q8_0])
@pytest.mark.parametrize("n_dims", [5, MAX_DIMS])
def test_more_dims_than_ggml_has_are_as_gguf_py_gives_them(
    tmp_path: Path, qtype: QuantType, n_dims: int
) -> None:
    """Weights of conv3d have 5 in the files of stable-diffusion.cpp and ComfyUI-GGUF."""
    shape = (*[2, 1, 3, 1, 2, 1, 1][: n_dims - 1], 64)
    blocks = gb.random_blocks(qtype, shape)
    path, *_ = gb.write_good(tmp_path / "m.gguf", {"patch.weight": (qtype, blocks)})
    (theirs,), (ours,) = gguf.GGUFReader(path).tensors, GGUFReader(path).tensors
    assert ours.data.shape == theirs.data.shape
    assert ours.data.tobytes() == theirs.data.tobytes() == blocks.tobytes()
    assert list(ours.shape) == list(theirs.shape) == list(shape[::-1])
    with numaload.open(path) as weights:
        tensor = weights["patch.weight"]
        assert tensor.shape == shape
        expected = gguf.dequantize(theirs.data, theirs.tensor_type).reshape(shape)
        np.testing.assert_array_equal(tensor.dequantize("float32"), expected)
