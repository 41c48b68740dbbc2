"""Headers of safetensors files: what they say is found, as their own library finds it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import safetensors_builder as sb
from headers import Source
from numaload.errors import MetadataKeyError
from numaload.formats.qtypes import QuantType
from numaload.formats.safetensors import BITS, Header, looks_like, parse_header

SHAPES: list[tuple[int, ...]] = [(4,), (), (3, 5, 8), (0,), (2, 0, 4), (1,) * 32]


def parse(raw: bytes) -> Header:
    source = Source(raw)
    return parse_header(source.read_at, source.size, "model.safetensors")


def test_a_header() -> None:
    raw = sb.model({"a.weight": ("BF16", (3, 2)), "ä": ("F8_E4M3", (5,))}, {"format": "pt"})
    header = parse(raw)
    a, b = header.tensors
    assert (a.name, a.dims, a.type_name, a.nbytes) == ("a.weight", (2, 3), "BF16", 12)
    assert (b.name, b.dims, b.type_name, b.nbytes) == ("ä", (5,), "F8_E4M3", 5)
    assert (a.qtype, b.qtype, a.known, b.known) == (QuantType.BF16, None, True, True)
    assert (a.offset, b.offset) == (header.data_start, header.data_start + 12)
    assert header.data_start == 8 + int.from_bytes(raw[:8], "little")
    assert raw[: header.header_end].endswith(b"}")
    assert raw[header.header_end : header.data_start].strip() == b""
    assert (header.size, header.byte_order, header.alignment) == (len(raw), "little", 8)


def test_metadata_is_that_of_gguf() -> None:
    metadata = parse(sb.model({}, {"format": "pt", "note": 'a "quoted" ö\n'})).metadata
    assert dict(metadata) == {"format": "pt", "note": 'a "quoted" ö\n'}
    assert metadata.type_name("format") == "string"
    assert metadata.get("absent") is None
    with pytest.raises(MetadataKeyError, match="no metadata key 'formats'; close: format"):
        metadata["formats"]


@pytest.mark.parametrize("metadata", [None, {}])
def test_no_tensors_and_no_metadata(metadata: dict[str, str] | None) -> None:
    header = parse(sb.model({}, metadata))
    assert (header.tensors, dict(header.metadata)) == ([], {})
    assert header.data_start == header.size


def test_all_types_are_those_that_gguf_has_too_or_have_none() -> None:
    rows = parse(sb.model({name: (name, (8,)) for name in BITS})).tensors
    shared = "F64 F32 F16 BF16 I64 I32 I16 I8".split()  # noqa: SIM905
    assert {t.name: t.qtype for t in rows if t.qtype is not None} == {
        name: QuantType[name] for name in shared
    }


def test_an_unknown_type_spoils_one_tensor_only() -> None:
    members = {"odd": sb.row("F3_E1M1", [3], [0, 5]), "t": sb.row("F32", [2], [5, 13])}
    odd, t = parse(sb.build(members, bytes(13))).tensors
    assert (odd.known, odd.qtype, odd.type_name, odd.nbytes) == (False, None, "F3_E1M1", 5)
    assert (t.known, t.nbytes) == (True, 8)


def test_tensors_are_in_the_order_of_their_bytes() -> None:
    members = {
        "c": sb.row("I8", [3], [5, 8]), "empty": sb.row("F32", [0], [5, 5]),
        "a": sb.row("I8", [5], [0, 5]), "none": sb.row("I8", [0], [0, 0]),
    }  # fmt: skip
    assert [t.name for t in parse(sb.build(members)).tensors] == ["none", "a", "empty", "c"]


SPELLINGS = {
    "spaces": '{ "a" :\n{ "dtype" : "I8" ,\t"shape" : [ 2 , 4 ] , "data_offsets":[ 0\r, 8 ] } }\n',
    "offsets-first": '{"a":{"data_offsets":[0,8],"shape":[2,4],"dtype":"I8"}}',
    "shape-first": '{"a":{"shape":[2,4],"dtype":"I8","data_offsets":[0,8]}}',
    "escapes": r'{"\u0061":{"dtype":"I8","shape":[2,4],"data_offsets":[0,8]}}',
}


@pytest.mark.parametrize("text", SPELLINGS.values(), ids=SPELLINGS)
def test_spellings(text: str) -> None:
    raw = sb.frame(text, bytes(8))
    (found,) = parse(raw).tensors
    assert (found.name, found.dims, found.nbytes) == ("a", (4, 2), 8)
    assert [name for name, _ in sb.by_library(raw)] == ["a"]


@pytest.mark.parametrize(
    "name", ['q"uote', "back\\slash", "new\nline", "", "a[0]{b}", "名前", "😀"]
)
def test_names(name: str) -> None:
    raw = sb.model({name: ("I8", (2,)), "other": ("I8", (3,))})
    assert {t.name for t in parse(raw).tensors} == {name, "other"}
    assert {n for n, _ in sb.by_library(raw)} == {name, "other"}


def test_alignment_is_1_where_the_writer_did_not_pad() -> None:
    assert (
        parse(sb.frame('{"a":{"dtype":"I8","shape":[],"data_offsets":[0,1]}}', b"x")).alignment == 1
    )


def as_library(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {n: (i["dtype"], i["shape"], bytes(i["data"])) for n, i in sb.by_library(raw)}


def as_ours(raw: bytes) -> dict[str, tuple[str, list[int], bytes]]:
    return {
        t.name: (t.type_name, list(t.dims[::-1]), raw[t.offset : t.offset + t.nbytes])
        for t in parse(raw).tensors
    }


@pytest.mark.parametrize("dtype", BITS)
def test_every_type_is_found_as_the_library_finds_it(dtype: str) -> None:
    shapes = [shape for shape in SHAPES if BITS[dtype] >= 8 or np.prod(shape) % 8 in {0, 4}]
    raw = sb.model({f"t{i}": (dtype, shape) for i, shape in enumerate(shapes)})
    assert as_ours(raw) == as_library(raw)


def test_random_models_are_found_as_the_library_finds_them() -> None:
    rng = random.Random(5)
    for _ in range(50):
        rows: dict[str, sb.Row] = {
            f"blk.{i}": (rng.choice(list(BITS)), (rng.randrange(3), 8, rng.randrange(1, 4)))
            for i in range(rng.randrange(20))
        }
        raw = sb.model(rows, {"k": "v"})
        assert as_ours(raw) == as_library(raw)


NUMPY: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def test_files_that_the_library_wrote(tmp_path: Path) -> None:
    """Their order, offsets and padding are its own."""
    path = tmp_path / "m.safetensors"
    arrays = {
        f"{name}.{len(shape)}": np.arange(np.prod(shape)).reshape(shape).astype(dtype)
        for name, dtype in NUMPY.items()
        for shape in SHAPES
    }
    safetensors.numpy.save_file(arrays, path, {"format": "np", "made by": "a test"})
    raw, header = path.read_bytes(), sb.read_header(path)
    assert dict(header.metadata) == {"format": "np", "made by": "a test"}
    assert {t.name for t in header.tensors} == set(arrays)
    for found in header.tensors:
        array = arrays[found.name]
        assert raw[found.offset : found.offset + found.nbytes] == array.tobytes()
        assert (found.dims[::-1], NUMPY[found.type_name]) == (array.shape, array.dtype)


def test_what_looks_like_a_header() -> None:
    assert looks_like(sb.model({})[:9])
    assert not looks_like(b"GGUF\3\0\0\0\0")
    assert not looks_like(b"")


def test_nothing_of_the_weights_is_read() -> None:
    raw = sb.model({"a": ("F32", (1000,))})
    source = Source(raw)
    header = parse_header(source.read_at, source.size)
    assert source.reads == 9 + header.data_start - 8
    assert json.loads(raw[8 : header.data_start])["a"]["shape"] == [1000]
