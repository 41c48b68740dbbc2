"""Headers of safetensors files that lie: each lie has its named error, and costs no memory."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

import safetensors_builder as sb
from headers import Source
from numaload.errors import (
    FormatError,
    MetadataError,
    NotSafetensorsError,
    TensorInfoError,
    TruncatedError,
)
from numaload.formats import jsontext
from numaload.formats.jsontext import MAX_NAME, MAX_TEXT
from numaload.formats.safetensors import BITS, Header, parse_header

PROPERTY = settings(derandomize=True, deadline=None, max_examples=400, database=None)
NOT, INFO, META = NotSafetensorsError, TensorInfoError, MetadataError


def parse(raw: bytes, size: int | None = None) -> Header:
    source = Source(raw, size)
    return parse_header(source.read_at, source.size, "m.safetensors")


def info(text: str, data: bytes = bytes(8)) -> bytes:
    """A file whose one tensor is described so."""
    return sb.frame(f'{{"a":{text}}}', data)


def fields(dtype: str = '"F32"', shape: str = "[2]", offsets: str = "[0,8]") -> bytes:
    return info(f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}')


def two(first: Any, second: Any, data: bytes = bytes(16)) -> bytes:
    return sb.build({"a": sb.row("I8", [first[1] - first[0]], first),
                     "b": sb.row("I8", [second[1] - second[0]], second)}, data)  # fmt: skip


GOOD = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
EXPECTED = 'expected of tensor \'a\' {"dtype": "TYPE", '
HOSTILE: dict[str, tuple[bytes, type[FormatError], str]] = {
    "empty": (b"", NOT, "found b'' (the file is empty: download it again)"),
    "eight-bytes": (bytes([2]) + bytes(7), NOT, "expected a length of 8 bytes and {"),
    "gguf": (b"GGUF\3\0\0\0" * 4, NOT, "(a GGUF file)"),
    "git-lfs": (b"version https://git-lfs", NOT, "fetch the real file"),
    "zip": (b"PK\3\4\0\0\x08\x08" * 4, NOT, "a zip archive, as torch.save writes"),
    "pickle": (b"\x80\2\x8a\nl\xfc\x9cF\xf9 j", NOT, "a pickle, as torch.save wrote"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" * 2, NOT, "an HDF5 file"),
    "web-page": (b"<!DOCTYPE html><html>", NOT, "a web page"),
    "index": (b'{"metadata": {"total_size"', NOT, "perhaps an index, a config or"),
    "zeros": (bytes(100), NOT, "a download that did not finish"),
    "no-brace": (sb.frame('x{"a":1}'), NOT, "expected a length of 8 bytes and {"),
    "no-break-space": (sb.frame("\xa0{}"), NOT, "expected a length of 8 bytes and {"),
    "blanks-past-the-end": (sb.frame(" {}", length=4), NOT, "expected a length of 8 bytes and {"),
    "length-0": (sb.frame("{}", length=0), FormatError, "expected { of the header"),
    "length-1": (sb.frame("{}", length=1), FormatError, "expected a name in the header"),
    "length-past-end": (sb.frame("{}", length=3), TruncatedError, "1 bytes are missing"),
    "length-over-limit": (
        sb.frame("{}", length=MAX_TEXT + 1), FormatError, f"at most {MAX_TEXT} are read"
    ),
    "length-all-ones": (
        sb.frame("{}", length=2**64 - 1), FormatError, "header of 18446744073709551615 bytes"
    ),
    "not-utf-8": (sb.frame(b'{"\xff":1}'), FormatError, "is not UTF-8"),
    "utf-16": (sb.frame('{"a":1}'.encode("utf-16-le")), FormatError, "expected a name in"),
    "surrogate": (sb.build({"\ud800": sb.row()}), FormatError, "is not UTF-8"),
    "name-of-half-a-pair": (
        sb.frame(rf'{{"\ud800":{GOOD}}}', bytes(8)), FormatError, "expected a name in the header"
    ),
    "name-with-a-control": (
        sb.frame(f'{{"\1":{GOOD}}}', bytes(8)), FormatError, "expected a name in the header"
    ),
    "name-unquoted": (sb.frame(f"{{a:{GOOD}}}"), FormatError, "expected a name in the header"),
    "name-that-does-not-end": (sb.frame('{"a'), FormatError, "expected a name in the header"),
    "name-ends-in-a-backslash": (sb.frame('{"a\\'), FormatError, "expected a name in the header"),
    "name-of-a-bad-escape": (sb.frame(r'{"\x":1}'), FormatError, "expected a name in the header"),
    "name-too-long": (
        sb.build({"a" * (MAX_NAME + 1): sb.row()}), FormatError, f"at most {MAX_NAME} are read"
    ),
    "no-colon": (sb.frame(f'{{"a"{GOOD}}}'), FormatError, "expected : after a name"),
    "no-end": (sb.frame(f'{{"a":{GOOD}', bytes(8)), FormatError, "expected , or } in the header"),
    "comma-at-the-end": (
        sb.frame(f'{{"a":{GOOD},}}', bytes(8)), FormatError, "expected a name in the header"
    ),
    "comma-first": (sb.frame(f'{{,"a":{GOOD}}}'), FormatError, "expected a name in the header"),
    "more-after-the-end": (
        sb.frame("{}x"), FormatError, "expected nothing after the header, found 'x'"
    ),
    "zeros-after-the-end": (sb.frame(b"{}\0"), FormatError, "expected nothing after the header"),
    "twice": (
        sb.frame(f'{{"a":{GOOD},"a":{GOOD}}}', bytes(8)), INFO, "tensor 'a' appears twice"
    ),
    "twice-by-an-escape": (
        sb.frame(rf'{{"a":{GOOD},"\u0061":{GOOD}}}', bytes(8)), INFO, "tensor 'a' appears twice"
    ),
    "metadata-twice": (
        sb.frame('{"__metadata__":{},"__metadata__":{}}'), META, "__metadata__ appears twice"
    ),
    "metadata-key-twice": (
        sb.frame('{"__metadata__":{"k":"1","k":"2"}}'), META, "'k' appears twice in __metadata__"
    ),
    "metadata-null-and-again": (
        sb.frame('{"__metadata__":null,"__metadata__":{}}'), META, "__metadata__ appears twice"
    ),
    "metadata-nul": (sb.frame('{"__metadata__":nul}'), META, "expected { of __metadata__"),
    "metadata-value-null": (sb.frame('{"__metadata__":{"k":null}}'), META, "a string for 'k'"),
    "metadata-list": (sb.frame('{"__metadata__":["a"]}'), META, "expected { of __metadata__"),
    "metadata-number": (sb.frame('{"__metadata__":{"k":1}}'), META, "expected a string for 'k'"),
    "metadata-nested": (sb.frame('{"__metadata__":{"k":{}}}'), META, "expected a string for 'k'"),
    "metadata-half-a-pair": (
        sb.frame(r'{"__metadata__":{"k":"\udfff"}}'), META, "expected a string for 'k'"
    ),
    "info-null": (info("null"), INFO, "expected { of tensor 'a', found"),
    "info-list": (info('["F32",[2],[0,8]]'), INFO, "expected { of tensor 'a', found"),
    "info-empty": (info("{}"), INFO, EXPECTED),
    "info-without-a-type": (info('{"shape":[2],"data_offsets":[0,8]}'), INFO, EXPECTED),
    "info-without-a-shape": (info('{"dtype":"F32","data_offsets":[0,8]}'), INFO, EXPECTED),
    "info-without-offsets": (info('{"dtype":"F32","shape":[2]}'), INFO, EXPECTED),
    "info-with-two-types": (
        info('{"dtype":"F32","dtype":"F32","data_offsets":[0,8]}'), INFO, EXPECTED
    ),
    "info-with-a-field-twice": (
        info(GOOD[:-1] + ',"shape":[2]}'), INFO, EXPECTED
    ),
    "info-with-another-field-twice": (
        info(GOOD[:-1] + ',"strides":[1],"shape":[2]}'), INFO, EXPECTED
    ),
    "info-with-another-field-alone": (info('{"strides":[1]}'), INFO, EXPECTED),
    "info-with-another-field-that-is-no-json": (
        info(GOOD[:-1] + ',"s":NaN}'), INFO, "expected a value of 's'"
    ),
    "info-with-another-field-that-does-not-end": (
        info(GOOD[:-1] + ',"s":[1}'), INFO, "expected a value of 's'"
    ),
    "info-with-another-field-and-no-end": (
        info(GOOD[:-1] + ',"s":1]'), INFO, "expected , or } in tensor 'a'"
    ),
    "info-with-a-comma-at-the-end": (info(GOOD[:-1] + ",}"), INFO, "expected a name in tensor"),
    "type-number": (fields("0"), INFO, EXPECTED),
    "type-object": (fields('{"F32":null}'), INFO, EXPECTED),
    "type-null": (fields("null"), INFO, EXPECTED),
    "type-no-word": (fields('"F32\\n"'), INFO, EXPECTED),
    "type-in-lower-case-is-unknown-and-too-short": (
        fields('"f32"', "[2]", "[0,4]"), FormatError, "4 bytes after tensor 'a'"
    ),
    "shape-number": (fields(shape="2"), INFO, EXPECTED),
    "shape-float": (fields(shape="[2.0]"), INFO, EXPECTED),
    "shape-exponent": (fields(shape="[2e0]"), INFO, EXPECTED),
    "shape-negative": (fields(shape="[-2]"), INFO, EXPECTED),
    "shape-minus-zero": (fields(shape="[-0]"), INFO, EXPECTED),
    "shape-bool": (fields(shape="[true,2]"), INFO, EXPECTED),
    "shape-nan": (fields(shape="[NaN]"), INFO, EXPECTED),
    "shape-infinity": (fields(shape="[Infinity]"), INFO, EXPECTED),
    "shape-string": (fields(shape='["2"]'), INFO, EXPECTED),
    "shape-leading-zero": (fields(shape="[02]"), INFO, EXPECTED),
    "shape-underscore": (fields(shape="[1_0]"), INFO, EXPECTED),
    "shape-other-digits": (fields(shape="[\u0662]"), INFO, EXPECTED),
    "shape-comma-at-the-end": (fields(shape="[2,]"), INFO, EXPECTED),
    "shape-without-commas": (fields(shape="[1 2]"), INFO, EXPECTED),
    "shape-nested": (fields(shape="[[2]]"), INFO, EXPECTED),
    "shape-of-33-dims": (fields(shape=str([1] * 32 + [2])), INFO, EXPECTED),
    "shape-huge": (fields(shape="[" + "9" * 5000 + "]"), INFO, EXPECTED),
    "shape-wraps": (  # 2^62 elements of 4 bytes are 0 modulo 2^64
        fields(shape=f"[{2**62}]", offsets="[0,0]"), INFO, "over 2^60 elements"
    ),
    "shape-wraps-by-product": (
        fields(shape=f"[{2**32},{2**32}]", offsets="[0,0]"), INFO, "over 2^60 elements"
    ),
    "shape-impossible-behind-a-zero": (
        fields(shape=f"[0,{2**61}]", offsets="[0,0]"), INFO, "over 2^60 elements"
    ),
    "offsets-one": (fields(offsets="[8]"), INFO, EXPECTED),
    "offsets-three": (fields(offsets="[0,8,8]"), INFO, EXPECTED),
    "offsets-negative": (fields(offsets="[-8,0]"), INFO, EXPECTED),
    "offsets-float": (fields(offsets="[0,8.0]"), INFO, EXPECTED),
    "offsets-backwards": (fields(offsets="[8,0]"), INFO, "begin at 8 and end at 0"),
    "offsets-backwards-of-an-unknown-type": (
        fields('"X"', offsets="[8,0]"), INFO, "begin at 8 and end at 0"
    ),
    "offsets-wrap": (
        fields(offsets=f"[{2**64 - 8},{2**64}]"), INFO, "bytes unused after the header"
    ),
    "too-small-for-its-shape": (fields(offsets="[0,4]"), INFO, "is 8 bytes, data_offsets are 4"),
    "too-large-for-its-shape": (fields(shape="[1]"), INFO, "is 4 bytes, data_offsets are 8"),
    "empty-with-bytes": (fields(shape="[0]"), INFO, "is 0 bytes, data_offsets are 8"),
    "half-a-byte": (fields('"F4"', "[15]", "[0,8]"), INFO, "4 bits each, is no whole number"),
    "six-bits": (fields('"F6_E2M3"', "[10]", "[0,8]"), INFO, "6 bits each, is no whole number"),
    "hole-before-the-first": (two((1, 8), (8, 16)), INFO, "'a' leaves 1 bytes unused after the h"),
    "hole": (two((0, 7), (8, 16)), INFO, "tensor 'b' leaves 1 bytes unused after tensor 'a'"),
    "overlap": (two((0, 8), (7, 16)), INFO, "tensor 'b' overlaps tensor 'a'"),
    "same-place": (two((0, 16), (0, 16)), INFO, "tensor 'b' overlaps tensor 'a'"),
    "empty-inside-of-another": (two((0, 16), (8, 8)), INFO, "tensor 'b' overlaps tensor 'a'"),
    "weights-cut": (two((0, 8), (8, 16), bytes(9)), TruncatedError, "7 bytes are missing"),
    "weights-missing": (two((0, 8), (8, 16), b""), TruncatedError, "16 bytes are missing"),
    "more-weights": (two((0, 8), (8, 16), bytes(17)), FormatError, "1 bytes after tensor 'b'"),
    "weights-of-nobody": (sb.build({}), FormatError, "8 bytes after the header, which ends the w"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "kind", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_lie(raw: bytes, kind: type[FormatError], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse(raw)
    assert type(caught.value) is kind
    assert words in str(caught.value)
    assert str(caught.value).startswith("m.safetensors: ")
    assert caught.value.offset is not None
    assert 0 <= caught.value.offset <= len(raw)
    assert len(str(caught.value)) < 1000


def test_a_file_of_another_kind() -> None:
    with pytest.raises(NotSafetensorsError, match="a zip archive"):
        parse(b"PK\3\4" * 100)


ALSO_THE_LIBRARY = {  # what it reads, and README says is wrong, or no writer writes
    "twice", "twice-by-an-escape", "metadata-key-twice", "info-list",
    "type-object", "name-too-long", "shape-of-33-dims",
}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in HOSTILE if k not in ALSO_THE_LIBRARY])
def test_the_library_refuses_it_too(kind: str) -> None:
    with pytest.raises(safetensors.SafetensorError):
        sb.by_library(HOSTILE[kind][0])


BARE = GOOD[:-1]  # that more members may follow
AS_SERDE: dict[str, str] = {
    "metadata-null": f'{{"__metadata__":null,"a":{GOOD}}}',
    "metadata-null-last": f'{{"a":{GOOD},"__metadata__": null }}',
    "another-member": f'{{"a":{BARE},"strides":[1]}}}}',
    "another-first": f'{{"a":{{"é":"x\\"",{GOOD[1:]}}}',
    "another-nested": f'{{"a":{BARE},"q":{{"bits":4,"of":[{{}}, null,true,-1e3]}} }} }}',
    "others-twice": f'{{"a":{BARE},"x":1,"x":2}}}}',
    "others-that-are-long": f'{{"a":{BARE},"x":"{"y" * 5000}"}}}}',
    "name-with-an-escape": '{"a":{"d\\u0074ype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "blanks-before": f' \n\t\r{{"a":{GOOD}}}',
    "blanks-after": f'{{"a":{GOOD}}} \n\t\r',
}  # fmt: skip


@pytest.mark.parametrize("text", AS_SERDE.values(), ids=AS_SERDE)
def test_what_the_library_ignores_is_ignored(text: str) -> None:
    raw = sb.frame(text, bytes(8))
    assert [name for name, _ in sb.by_library(raw)] == ["a"]
    header = parse(raw)
    assert dict(header.metadata) == {}
    assert [(t.name, t.type_name, t.dims) for t in header.tensors] == [("a", "F32", (2,))]
    assert header.tensors[0].offset == len(raw) - 8


def test_every_tensor_may_have_members_that_are_not_known() -> None:
    members = {f"t{i}": sb.row("I8", [1], [i, i + 1], x=[1], y="z") for i in range(3000)}
    assert len(parse(sb.build(members, bytes(3000))).tensors) == 3000


def test_members_that_are_not_known_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsontext, "MOST_SKIPPED", 10 * jsontext.SHORT)
    for count in (10, 11):
        raw = sb.build({"a": sb.row() | {f"x{i}": 0 for i in range(count)}})
        with nullcontext() if count == 10 else pytest.raises(TensorInfoError, match="too many"):
            parse(raw)


def test_files_joined_by_cat() -> None:
    with pytest.raises(FormatError, match="another file, joined to this one with cat"):
        parse(VALID + VALID)


def test_where_a_lie_is() -> None:
    """Bytes of the file, also after letters that take several."""
    raw = sb.frame(f'{{"größe":{GOOD},"b":{GOOD.replace("[2]", "[3]")}}}', bytes(8))
    with pytest.raises(TensorInfoError, match="tensor 'b'") as caught:
        parse(raw)
    assert caught.value.offset == raw.index(b'"b":') + 4


VALID = sb.model(
    {"a": ("F32", (2, 3)), "größe": ("BF16", (4,)), "q": ("F4", (6,)), "e": ("I64", (0, 2))},
    {"format": "pt", "é": "x\\y"},
)
BEFORE_DATA = 8 + int.from_bytes(VALID[:8], "little")


def check(raw: bytes) -> None:
    """Refused by name; or read, and the library reads the same where it knows all types."""
    try:
        header = parse(raw)
    except FormatError:
        return
    end = header.data_start
    for tensor in header.tensors:
        assert tensor.offset == end
        end += tensor.nbytes
    assert end == len(raw)
    if all(tensor.known for tensor in header.tensors):
        found = {name: (i["dtype"], i["shape"]) for name, i in sb.by_library(raw)}
        assert found == {t.name: (t.type_name, list(t.dims[::-1])) for t in header.tensors}


def test_any_truncation_is_a_format_error() -> None:
    check(VALID)
    for length in range(len(VALID)):
        with pytest.raises(FormatError):
            parse(VALID[:length])


@PROPERTY
@given(st.integers(0, BEFORE_DATA - 1), st.integers(1, 255))
def test_any_changed_byte_is_survived(at: int, flip: int) -> None:
    raw = bytearray(VALID)
    raw[at] ^= flip
    check(bytes(raw))


def test_the_corpus_is_as_written_small_and_read() -> None:
    corpus = {path.name: path.read_bytes() for path in sb.FOLDER.iterdir()}
    assert corpus == sb.seeds()
    assert sum(map(len, corpus.values())) < 16 << 10
    for raw in corpus.values():
        parse(raw)
        check(raw)


PIECES = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e9", b"null", b"NaN", b" ",
    b'"a"', b'"dtype"', b'"shape":[', b'"__metadata__":{', b"\\ud800", b"\xff", b"9" * 25,
]  # fmt: skip


@PROPERTY
@given(st.lists(st.tuples(st.integers(8, BEFORE_DATA), st.integers(0, 9), st.sampled_from(PIECES))))
def test_any_pieces_are_survived(changes: list[tuple[int, int, bytes]]) -> None:
    raw = VALID[8:BEFORE_DATA]
    for at, dropped, piece in changes:
        raw = raw[: at - 8] + piece + raw[at - 8 + dropped :]
    check(sb.frame(raw, VALID[BEFORE_DATA:]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(list(BITS)) | JSON,
        "shape": st.lists(st.integers(-1, 5) | JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-1, 30), min_size=2, max_size=2) | JSON,
    },
)


@pytest.mark.slow  # for seconds
@PROPERTY
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), FIELDS | JSON, max_size=4))
def test_any_json_is_survived(members: dict[str, Any]) -> None:
    try:
        text = json.dumps(members).encode()
    except UnicodeEncodeError:
        return
    check(sb.frame(text, bytes(8)))


@PROPERTY
@given(st.lists(st.tuples(st.sampled_from(list(BITS)), st.lists(st.integers(0, 9), max_size=4))))
def test_any_rows_are_as_the_library_has_them(rows: list[tuple[str, list[int]]]) -> None:
    raw = sb.model({f"t{i}": row for i, row in enumerate(rows)})
    try:
        sb.by_library(raw)
    except safetensors.SafetensorError:
        with pytest.raises(TensorInfoError, match="no whole number of bytes"):
            parse(raw)
    else:
        check(raw)
        assert len(parse(raw).tensors) == len(rows)
