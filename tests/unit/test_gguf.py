"""The header parser: every value type, every named error, and files that lie about themselves."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gguf_builder as gb
from numaload.errors import (
    FormatError,
    MetadataError,
    MetadataKeyError,
    NotGGUFError,
    TensorInfoError,
    TruncatedError,
    UnsupportedVersionError,
)
from numaload.formats.gguf import FIRST_READ, MAX_HEADER, Header, MetadataArray, parse_header
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.storage.files import SourceFile

PROPERTY = settings(derandomize=True, deadline=None, max_examples=300, database=None)


class Source:
    """A file in memory that notes what is read of it and gives exactly that."""

    def __init__(self, raw: bytes, size: int | None = None) -> None:
        self.raw, self.size, self.reads = raw, len(raw) if size is None else size, 0

    def read_at(self, offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= self.size
        self.reads += nbytes
        return self.raw[offset : offset + nbytes].ljust(nbytes, b"\0")


def parse(raw: bytes, size: int | None = None) -> Header:
    source = Source(raw, size)
    return parse_header(source.read_at, source.size, "model.gguf")


def u32(key: str, value: int) -> bytes:
    return gb.entry(key, gb.U32, gb.scalar(gb.U32, value))


def of_type(type_id: int, value: Any) -> bytes:
    return gb.string(value) if type_id == gb.STRING else gb.scalar(type_id, value)


def nested(depth: int) -> bytes:
    value = gb.array(gb.U8, b"\7")
    for _ in range(depth):
        value = gb.array(gb.ARRAY, value)
    return gb.entry("deep", gb.ARRAY, value)


EXTREMES: dict[int, list[Any]] = {
    gb.U8: [0, 255], gb.I8: [-128, 127], gb.U16: [0, 65535], gb.I16: [-32768, 32767],
    gb.U32: [0, 2**32 - 1], gb.I32: [-(2**31), 2**31 - 1], gb.F32: [-0.5, 2.0**-140],
    gb.BOOL: [False, True], gb.STRING: ["", "größer"], gb.U64: [0, 2**64 - 1],
    gb.I64: [-(2**63), 2**63 - 1], gb.F64: [0.1, -1e308],
}  # fmt: skip
WORDS = "u8 i8 u16 i16 u32 i32 f32 bool string array u64 i64 f64".split()  # noqa: SIM905


@pytest.mark.parametrize("type_id", EXTREMES, ids=[WORDS[t] for t in EXTREMES])
def test_values_and_arrays_of_every_type(type_id: int) -> None:
    values = EXTREMES[type_id]
    elements = [of_type(type_id, value) for value in values]
    entries = [gb.entry(f"k{i}", type_id, raw) for i, raw in enumerate(elements)]
    metadata = parse(
        gb.build([*entries, gb.entry("all", gb.ARRAY, gb.array(type_id, *elements))])
    ).metadata
    assert [metadata["k0"], metadata["k1"]] == values
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
    metadata = parse(gb.build([gb.entry("rows", gb.ARRAY, rows), u32("after", 5)])).metadata
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
    header = parse(gb.build([u32("a", 1)], [gb.tensor("t", (8, 4))], version=version))
    (tensor,) = header.tensors
    assert (header.version, dict(header.metadata)) == (version, {"a": 1})
    assert (tensor.dims, tensor.qtype, tensor.nbytes) == ((8, 4), QuantType.F32, 128)
    assert tensor.offset == header.data_start >= header.header_end


def test_missing_keys_name_close_ones() -> None:
    metadata = parse(gb.build([u32("llama.block_count", 1)])).metadata
    with pytest.raises(MetadataKeyError, match=r"llama\.block_count"):
        metadata["llama.block_counts"]
    assert metadata.get("llama.block_counts") is None
    assert metadata.get("x", 3) == 3
    assert "x" not in metadata


@pytest.mark.parametrize("alignment", [1, 32, 4096])
def test_alignment(alignment: int) -> None:
    raw = gb.build(
        [u32("general.alignment", alignment)],
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


@pytest.mark.parametrize("type_id", [4, 36, 99, 2**32 - 1])
def test_an_unknown_type_spoils_one_tensor_only(type_id: int) -> None:
    raw = gb.build([], [gb.tensor("odd", (7,), type_id), gb.tensor("t", (8,), offset=64)])
    odd, known = parse(raw).tensors
    assert (odd.qtype, odd.type_name, odd.nbytes) == (None, f"unknown:{type_id}", 0)
    assert known.qtype is QuantType.F32


HOSTILE: dict[str, tuple[bytes, type[FormatError], str]] = {
    "empty": (b"", NotGGUFError, "expected the magic"),
    "three-bytes": (b"GGU", NotGGUFError, "found b'GGU'"),
    "other-magic": (gb.build(magic=b"GGML"), NotGGUFError, "found b'GGML'"),
    "git-lfs": (b"version https://git-lfs", NotGGUFError, "fetch the real file"),
    "version-0": (gb.build(version=0), UnsupportedVersionError, "version 0;"),
    "version-1": (gb.build(version=1), UnsupportedVersionError, "version 1;"),
    "version-4": (gb.build(version=4), UnsupportedVersionError, "version 4;"),
    "big-endian": (gb.build(version=3 << 24), UnsupportedVersionError, "3, big-endian"),
    "no-version": (b"GGUF", TruncatedError, "version ends at byte 8"),
    "half-counts": (gb.build()[:20], TruncatedError, "counts"),
    "n-kv": (gb.build(n_kv=gb.HUGE), TruncatedError, "18446744073709551615 metadata entries"),
    "n-kv-one-too-many": (gb.build(n_kv=1, data=b""), TruncatedError, "room for 0"),
    "n-tensors": (gb.build(n_tensors=1 << 62), TruncatedError, "tensors announced"),
    "key-length": (gb.build([gb.string("k", gb.HUGE)]), MetadataError, "at most 65535"),
    "key-past-end": (gb.build([gb.string("k", 60000)]), TruncatedError, "metadata key ends"),
    "key-no-text": (gb.build([gb.entry(b"\xff", 0, b"1")]), MetadataError, "is not UTF-8"),
    "key-twice": (gb.build([u32("k", 1), u32("k", 2)]), MetadataError, "'k' appears twice"),
    "value-type": (gb.build([gb.entry("k", 13, b"")]), MetadataError, "the id 13"),
    "string-length": (
        gb.build([gb.entry("k", gb.STRING, gb.string("v", gb.HUGE))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "string-past-end": (
        gb.build([gb.entry("k", gb.STRING, gb.string("v", 2000))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-count": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U64, count=gb.HUGE))]),
        TruncatedError,
        "18446744073709551615 elements",
    ),
    "array-count-wraps": (  # 2^61 elements of 8 bytes are 0 modulo 2^64
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U64, count=1 << 61))]),
        TruncatedError,
        "elements ends",
    ),
    "array-type": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(77, count=1))]),
        MetadataError,
        "the id 77",
    ),
    "array-string-backwards": (  # as a signed number the length would go back to the start
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.STRING, gb.string("", 2**64 - 8), count=9))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-last-string": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.STRING, gb.string("", gb.HUGE)))]),
        TruncatedError,
        "value of 'k' ends",
    ),
    "array-in-array-count": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.U8, count=gb.HUGE)))]),
        TruncatedError,
        "elements ends",
    ),
    "arrays-too-deep": (gb.build([nested(6)]), MetadataError, "nested over 4 deep"),
    "alignment-0": (gb.build([u32("general.alignment", 0)]), MetadataError, "power of two"),
    "alignment-3": (gb.build([u32("general.alignment", 3)]), MetadataError, "is 3, expected"),
    "alignment-2^40": (
        gb.build([gb.entry("general.alignment", gb.U64, gb.scalar(gb.U64, 1 << 40))]),
        MetadataError,
        "is 1099511627776",
    ),
    "alignment-negative": (
        gb.build([gb.entry("general.alignment", gb.I32, gb.scalar(gb.I32, -32))]),
        MetadataError,
        "is -32",
    ),
    "alignment-string": (
        gb.build([gb.entry("general.alignment", gb.STRING, gb.string("32"))]),
        MetadataError,
        "is '32'",
    ),
    "alignment-true": (
        gb.build([gb.entry("general.alignment", gb.BOOL, b"\1")]), MetadataError, "is True"
    ),
    "name-length": (gb.build([], [gb.string("t", 65536)]), TensorInfoError, "at most 65535"),
    "name-no-text": (gb.build([], [gb.tensor(b"\x80")]), TensorInfoError, "is not UTF-8"),
    "name-twice": (
        gb.build([], [gb.tensor("t"), gb.tensor("t", offset=128)]),
        TensorInfoError,
        "'t' appears twice",
    ),
    "five-dims": (gb.build([], [gb.tensor("t", [1] * 5)]), TensorInfoError, "5 dims, at most 4"),
    "n-dims": (
        gb.build([], [gb.string("t") + struct.pack("<I", 2**32 - 1)]), TensorInfoError, "at most 4"
    ),
    "dims-wrap-to-0": (gb.build([], [gb.tensor("t", (2**32, 2**32))]), TensorInfoError, "2^60"),
    "dims-wrap-to-32": (
        gb.build([], [gb.tensor("t", (2**63 + 16, 2))]), TensorInfoError, "over 2^60 elements"
    ),
    "dim-of-0-hides": (gb.build([], [gb.tensor("t", (2**63, 0))]), TensorInfoError, "over 2^60"),
    "no-whole-block": (
        gb.build([], [gb.tensor("t", (48,), QuantType.Q8_0)]),
        TensorInfoError,
        "no whole Q8_0 blocks of 32",
    ),
    "block-across-rows": (
        gb.build([], [gb.tensor("t", (16, 2), QuantType.Q8_0)]), TensorInfoError, "rows of 16"
    ),
    "no-dims-no-block": (
        gb.build([], [gb.tensor("t", (), QuantType.Q8_0)]), TensorInfoError, "rows of 1"
    ),
    "offset-unaligned": (
        gb.build([], [gb.tensor("t", offset=4)]), TensorInfoError, "4 is no multiple of 32"
    ),
    "offset-past-end": (
        gb.build([], [gb.tensor("t", offset=1 << 40)]), TruncatedError, "'t' ends at byte"
    ),
    "offset-wraps": (
        gb.build([], [gb.tensor("t", offset=2**64 - 32)]), TruncatedError, "bytes are missing"
    ),
    "unknown-type-past-end": (
        gb.build([], [gb.tensor("t", (1,), 99, 4096)]), TruncatedError, "bytes are missing"
    ),
    "data-cut": (gb.build([], [gb.tensor("t", (32,))], bytes(127)), TruncatedError, "1 bytes are"),
    "overlap": (
        gb.build([], [gb.tensor("late", (32,), offset=32), gb.tensor("early", (16,))]),
        TensorInfoError,
        "'early' and 'late' overlap",
    ),
    "same-place": (gb.build([], [gb.tensor("a"), gb.tensor("b")]), TensorInfoError, "overlap"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "error", "words"), HOSTILE.values(), ids=HOSTILE)
def test_named_errors(raw: bytes, error: type[FormatError], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(raw)
    assert type(caught.value) is error
    assert words in str(caught.value)
    assert str(caught.value).startswith("model.gguf: ")
    assert caught.value.path == "model.gguf"
    assert caught.value.offset is not None
    assert f"(at byte {caught.value.offset})" in str(caught.value)


@pytest.mark.parametrize("raw", [row[0] for row in HOSTILE.values()], ids=HOSTILE)
def test_lies_cost_no_memory(raw: bytes) -> None:
    assert _peak(raw) < 100_000


def test_many_small_entries_cost_a_small_multiple() -> None:
    raw = gb.build(
        [gb.entry(f"{i}", gb.U8, b"\1") for i in range(5000)],
        [gb.tensor(f"{i}", (), offset=32 * i) for i in range(5000)],
        bytes(5000 * 32),
    )
    assert _peak(raw) < 20 * len(raw)


def _peak(raw: bytes) -> int:
    """Bytes that parsing took at most, over the input."""
    source = Source(raw)
    tracemalloc.start()
    try:
        parse_header(source.read_at, source.size)
    except FormatError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "value",
    [gb.string("v", 1 << 32), gb.array(gb.STRING, gb.string("", 1 << 32), count=2)],
    ids=["string", "array"],
)
def test_a_header_larger_than_headers_are(value: bytes) -> None:
    """A sparse file has room for anything; it is still not read."""
    kind = gb.STRING if value[8:] == b"v" else gb.ARRAY
    source = Source(gb.build([gb.entry("k", kind, value)]), size=1 << 40)
    with pytest.raises(FormatError, match=f"header of over {MAX_HEADER} bytes, in value of 'k'"):
        parse_header(source.read_at, source.size)
    assert source.reads <= FIRST_READ + 4


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
    raw = gb.build([gb.entry("a", gb.ARRAY, value), u32("after", 7)], [gb.tensor("t")])
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


VALID = gb.build(
    [
        gb.entry("general.architecture", gb.STRING, gb.string("llama")),
        u32("general.alignment", 64),
        gb.entry("tokens", gb.ARRAY, gb.array(gb.STRING, *map(gb.string, ["a", "", "bcd"]))),
        gb.entry("f", gb.ARRAY, gb.array(gb.F32, *[b"\0\0\x80?"] * 3)),
        nested(2),
    ],
    [gb.tensor("a", (32, 2), QuantType.Q8_0), gb.tensor("b", (4, 3, 2), offset=128)],
    bytes(128 + 96),
    alignment=64,
)
BEFORE_DATA = len(VALID) - 128 - 96


def check_survives(raw: bytes) -> None:
    source = Source(raw)
    try:
        header = parse_header(source.read_at, source.size)
    except FormatError:
        return
    for tensor in header.tensors:
        assert header.data_start <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)
    for value in header.metadata.values():
        if isinstance(value, MetadataArray):
            assert len(value.tolist()) == len(value)


def test_any_truncation_is_a_format_error() -> None:
    assert len(parse(VALID).tensors) == 2
    for length in range(len(VALID)):
        with pytest.raises(FormatError):
            parse(VALID[:length])


@PROPERTY
@given(st.integers(0, BEFORE_DATA - 1), st.integers(1, 255))
def test_any_changed_byte_is_survived(at: int, flip: int) -> None:
    raw = bytearray(VALID)
    raw[at] ^= flip
    check_survives(bytes(raw))


@PROPERTY
@given(st.lists(st.tuples(st.integers(0, BEFORE_DATA - 1), st.integers(0, 255)), min_size=2))
def test_any_changed_bytes_are_survived(changes: list[tuple[int, int]]) -> None:
    raw = bytearray(VALID)
    for at, value in changes:
        raw[at] = value
    check_survives(bytes(raw))


@PROPERTY
@given(st.binary(max_size=300))
def test_any_bytes_after_the_magic_are_survived(tail: bytes) -> None:
    check_survives(b"GGUF\3\0\0\0" + tail)


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


@settings(PROPERTY, max_examples=60)
@given(st.lists(ENTRIES, max_size=6), SHAPES, st.sampled_from([32, 64, 256]))
def test_what_gguf_writes_is_read_as_gguf_reads_it(
    tmp_path_factory: pytest.TempPathFactory,
    entries: list[tuple[str, Any]],
    shapes: list[list[int]],
    alignment: int,
) -> None:
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    _write(path, entries, shapes, alignment)
    with SourceFile(str(path)) as file:
        header = parse_header(file.read_at, file.size, str(path))
        got = {k: v.tolist() if isinstance(v, MetadataArray) else v for k, v in _own(header)}
    theirs = gguf.GGUFReader(str(path))
    assert got == {f"k{i}": value for i, (_, value) in enumerate(entries)}
    assert got == {k: f.contents() for k, f in theirs.fields.items() if k in got}
    assert header.alignment == theirs.alignment
    assert [(t.name, list(t.dims), t.offset, t.nbytes) for t in header.tensors] == [
        (t.name, t.shape.tolist(), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]


def _own(header: Header) -> list[tuple[str, Any]]:
    return [(k, v) for k, v in header.metadata.items() if not k.startswith("general.")]


def _write(
    path: Path, entries: list[tuple[str, Any]], shapes: list[list[int]], alignment: int
) -> None:
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_custom_alignment(alignment)
    for i, (kind, value) in enumerate(entries):
        getattr(writer, VALUES[kind][0])(f"k{i}", value)
    for i, shape in enumerate(shapes):
        writer.add_tensor(f"t{i}", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
