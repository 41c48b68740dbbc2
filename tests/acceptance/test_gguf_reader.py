"""The gguf-py face: it and gguf-py's own reader agree on every field and every tensor, and what
gguf-py loses itself in is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf.gguf_reader
import numpy as np
import pytest

import gguf_builder as gb
import numaload
import seeds
from numaload import errors
from numaload.backends import gguf_reader
from numaload.formats.qtypes import BLOCKS, QuantType

Ours, Theirs = gguf_reader.GGUFReader, gguf_reader.THEIRS
NAMES = {value.value: value.name for value in gguf.GGUFValueType}
KNOWN = {kind.name: kind for kind in gguf.GGMLQuantizationType}


def numbers() -> list[bytes]:
    """An entry of each scalar type, an array of it, an empty one, and one of a single element."""
    entries = []
    for type_id, values in seeds.VALUES.items():
        elements = [gb.scalar(type_id, value) for value in values]
        entries.append(gb.entry(f"one.{type_id}", type_id, elements[1]))
        for name, some in {"all": elements, "first": elements[:1], "none": []}.items():
            entries.append(gb.entry(f"{name}.{type_id}", gb.ARRAY, gb.array(type_id, *some)))
    return entries


def texts() -> list[bytes]:
    words = [gb.string(word) for word in ("", "größer", "a" * 300, "\0")]
    long = [gb.string(f"token {number}") for number in range(1000)]
    return [
        seeds.text("general.architecture", "llama"),
        seeds.text("empty", ""),
        seeds.text("schlüssel", "wert"),
        gb.entry("words", gb.ARRAY, gb.array(gb.STRING, *words)),
        gb.entry("tokens", gb.ARRAY, gb.array(gb.STRING, *long)),
        gb.entry("nobody", gb.ARRAY, gb.array(gb.STRING)),
    ]


def arrays_in_arrays() -> list[bytes]:
    pair = gb.array(gb.I16, gb.scalar(gb.I16, -1), gb.scalar(gb.I16, 2))
    lines = gb.array(gb.STRING, gb.string("a"), gb.string(""), gb.string("bc"))
    deep = gb.array(gb.ARRAY, pair, gb.array(gb.I16), pair)
    return [
        gb.entry("pairs", gb.ARRAY, gb.array(gb.ARRAY, pair, pair)),
        gb.entry("lines", gb.ARRAY, gb.array(gb.ARRAY, lines, lines)),
        gb.entry("mixed", gb.ARRAY, gb.array(gb.ARRAY, pair, lines)),
        gb.entry("first is empty", gb.ARRAY, gb.array(gb.ARRAY, gb.array(gb.I16), pair)),
        gb.entry("deep", gb.ARRAY, gb.array(gb.ARRAY, deep, deep)),
        gb.entry("nothing", gb.ARRAY, gb.array(gb.ARRAY)),
    ]


Rows = tuple[list[bytes], bytes]


def rows(dims_of: Callable[[int], tuple[int, ...]], names: list[str], alignment: int) -> Rows:
    """A tensor of each type, of random bytes, after the first 2048; dims_of(block size)."""
    infos, data = [], bytes(range(256)) * 8
    data += bytes(-len(data) % alignment)
    rng = np.random.default_rng(len(names))
    for name in names:
        block_size, type_size = gguf.GGML_QUANT_SIZES[KNOWN[name]]
        dims = dims_of(block_size)
        infos.append(gb.tensor(f"blk.0.{name}.weight", dims, KNOWN[name], len(data)))
        raw = rng.bytes(int(np.prod(dims)) // block_size * type_size)
        data += raw.ljust(-(-len(raw) // alignment) * alignment, b"\0")
    return infos, data


AGREED = [name for name in KNOWN if name != "Q8_1" and name in QuantType.__members__]


def empty_file() -> bytes:
    return gb.build(data=b"")


def metadata_only(version: int = 3) -> bytes:
    return gb.build([*numbers(), *texts(), *arrays_in_arrays()], data=b"", version=version)


def all_types(alignment: int = 32) -> bytes:
    infos, data = rows(lambda size: (2 * size, 3), AGREED, alignment)
    entries = [*texts(), gb.u32("general.alignment", alignment)]
    return gb.build(entries, infos, data, alignment=alignment)


def odd_dims() -> bytes:
    shapes = [(0,), (0, 5), (3, 1, 1, 2), (1,) * 4, (7,), (2, 3, 5)]
    infos = [
        gb.tensor(f"t{number}", dims, QuantType.F32, 256 * number)
        for number, dims in enumerate(shapes)
    ]
    blocks, data = rows(lambda size: (size, 1, 3), ["Q4_K", "Q8_0"], 32)
    return gb.build(texts(), [*infos, *blocks], data)


FILES: dict[str, Callable[[], bytes]] = {
    "empty": empty_file,
    "metadata": metadata_only,
    "version 2": lambda: metadata_only(2),
    "types": all_types,
    "alignment 8": lambda: all_types(8),
    "alignment 4096": lambda: all_types(4096),
    "dims": odd_dims,
    "no weights": lambda: gb.build([], [gb.tensor("t", (0,))], b""),
    "vocabulary": seeds.vocabulary,
    "split": seeds.split,
}


@pytest.fixture(params=["little", "big"])
def order(request: pytest.FixtureRequest) -> Iterator[str]:
    """What is built in the test is packed so."""
    if request.param == "little":
        yield "little"
    else:
        with gb.big_endian():
            yield "big"


def same_array(ours: Any, theirs: Any) -> None:
    assert isinstance(ours, np.ndarray)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert ours.dtype.byteorder == theirs.dtype.byteorder
    assert ours.tobytes() == theirs.tobytes()


def same_field(ours: Any, theirs: Any) -> None:
    assert isinstance(ours, gguf.gguf_reader.ReaderField)
    assert (ours.offset, ours.name, ours.types) == (theirs.offset, theirs.name, theirs.types)
    assert list(ours.data) == theirs.data
    assert list(ours.data) == theirs.data
    assert [ours.data[i] for i in range(-len(theirs.data), 0)] == theirs.data
    assert (len(ours.parts), len(ours.data)) == (len(theirs.parts), len(theirs.data))
    for index, part in enumerate(theirs.parts):
        same_array(ours.parts[index], part)
    for ours_part, part in zip(ours.parts, theirs.parts, strict=True):
        same_array(ours_part, part)
    same_contents(ours, theirs)


def contents(field: Any, *wanted: Any) -> str:
    """As repr: NaN is not equal to itself."""
    try:
        return repr(field.contents(*wanted))
    except (IndexError, UnicodeDecodeError, TypeError) as error:
        return type(error).__name__


def same_contents(ours: Any, theirs: Any) -> None:
    for wanted in [(), (0,), (-1,), (slice(2),), (slice(1, None, 2),), (slice(0),)]:
        assert contents(ours, *wanted) == contents(theirs, *wanted), (ours.name, wanted)


def same_tensor(ours: Any, theirs: Any) -> None:
    assert isinstance(ours, gguf.gguf_reader.ReaderTensor)
    for name in ("name", "tensor_type", "n_elements", "n_bytes", "data_offset"):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert type(getattr(ours, name)) is type(getattr(theirs, name)), name
    same_array(ours.shape, theirs.shape)
    same_array(ours.data, theirs.data)
    same_field(ours.field, theirs.field)


def same(ours: Any, theirs: Any) -> None:
    assert isinstance(ours, Theirs)
    for name in ("byte_order", "endianess", "alignment", "data_offset", "gguf_scalar_to_np"):
        assert getattr(ours, name) == getattr(theirs, name), name
    same_array(np.asarray(ours.data), np.asarray(theirs.data))
    assert list(ours.fields) == list(theirs.fields)
    for name, field in theirs.fields.items():
        same_field(ours.fields[name], field)
        assert ours.get_field(name) is ours.fields[name]
    assert ours.get_field("no such key") is None
    assert len(ours.tensors) == len(theirs.tensors)
    for index, tensor in enumerate(theirs.tensors):
        same_tensor(ours.get_tensor(index), tensor)


@pytest.mark.parametrize("name", FILES)
def test_every_field_and_tensor_is_gguf_pys(tmp_path: Path, order: str, name: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FILES[name]())
    ours = Ours(path)
    assert ours.byte_order == ("I" if order == sys.byteorder else "S")
    same(ours, Theirs(path))


def test_the_files_have_all_metadata_types_and_all_of_gguf_pys_types(tmp_path: Path) -> None:
    """Or the test above says less than it seems to."""
    path = tmp_path / "m.gguf"
    path.write_bytes(metadata_only())
    seen = [field.types for field in Theirs(path).fields.values()]
    assert {t[0].name for t in seen} == set(NAMES.values())
    assert {t[1].name for t in seen if len(t) > 1} == set(NAMES.values())
    path.write_bytes(all_types())
    types = {tensor.tensor_type.name for tensor in Theirs(path).tensors}
    assert set(KNOWN) - types <= {"Q8_1"}


def test_models_by_ggufs_writer(tmp_path: Path, model_files: list[str]) -> None:
    for path in model_files:
        same(Ours(path), Theirs(path))


def test_texts_that_are_no_utf8(tmp_path: Path) -> None:
    """Parts are the bytes; contents() raises, as gguf-py's does."""
    path = tmp_path / "m.gguf"
    path.write_bytes(seeds.every_value())
    same(Ours(path), Theirs(path))
    field = Ours(path).fields["tokens"]
    assert field.parts[field.data[2]].tobytes() == b"\xff\xfe"
    with pytest.raises(UnicodeDecodeError):
        field.contents()
    assert field.contents(slice(2)) == ["", "größer"]


def test_q8_1_has_ggmls_size(tmp_path: Path) -> None:
    """36 bytes: ggml halved its two scales, gguf-py's table is from before that."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], [gb.tensor("t", (32,), QuantType.Q8_1)], bytes(64)))
    (ours,), (theirs,) = Ours(path).tensors, Theirs(path).tensors
    assert (ours.n_bytes, ours.data.shape) == (36, (36,))
    assert (theirs.n_bytes, theirs.data.shape) == (40, (40,))
    same_field(ours.field, theirs.field)


def test_types_that_only_numaload_knows(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(seeds.every_qtype())
    found = {tensor.tensor_type.name: tensor for tensor in Ours(path).tensors}
    assert set(found) == {qtype.name for qtype in BLOCKS}
    for name, tensor in found.items():
        block_size, type_size = BLOCKS[QuantType[name]]
        assert (tensor.n_elements, tensor.n_bytes) == (block_size, type_size)
        assert int(tensor.tensor_type) == QuantType[name]
        kind = gguf.GGMLQuantizationType if name in KNOWN else QuantType
        assert type(tensor.tensor_type) is kind


def test_types_that_nobody_knows_spoil_the_tensors_only(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rows = [gb.tensor("odd", (256,), 137)]
    path.write_bytes(gb.build([seeds.text("general.name", "x")], rows))
    reader = Ours(path)
    assert reader.fields["general.name"].contents() == "x"
    with pytest.raises(errors.UnknownQuantTypeError, match=r"'odd': type 137 is of ik_llama.cpp"):
        len(reader.tensors)


def test_fields_are_tuples_as_gguf_pys(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(metadata_only())
    field = Ours(path).fields["words"]
    offset, name, parts, data, types = field
    assert (offset, name, types) == (field.offset, "words", field.types)
    assert parts is field.parts
    assert data is field[3]
    assert field._replace(name="other").contents() == field.contents()
    assert [part.tobytes() for part in parts[3:5]] == [bytes([8, 0, 0, 0]), bytes([4] + [0] * 7)]
    assert parts[-1].tobytes() == b"\0"
    assert [list(data[1:3]), data[-1]] == [[8, 10], 12]
    with pytest.raises(IndexError):
        parts[len(parts)]


def test_tensors_are_zero_copy_and_outlive_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(all_types())
    reader = Ours(path)
    data = {tensor.name: tensor.data for tensor in reader.tensors}
    assert all(np.shares_memory(array, reader.data) for array in data.values())
    assert not any(array.flags.writeable for array in data.values())
    assert isinstance(reader.data, np.memmap)
    assert reader.data.filename == str(path)
    del reader
    for tensor in Theirs(path).tensors:
        assert data[tensor.name].tobytes() == tensor.data.tobytes()


def test_modes(tmp_path: Path) -> None:
    """r+ writes to the file, c to memory alone, r nowhere."""
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([gb.u32("answer", 41)], [gb.tensor("t", (4,))]))
    with pytest.raises(ValueError, match="read-only"):
        Ours(path).fields["answer"].parts[-1][0] = 42
    private = Ours(path, "c")
    private.fields["answer"].parts[-1][0] = 42
    private.tensors[0].data[:] = 7
    assert private.fields["answer"].contents() == 42
    assert Ours(path).fields["answer"].contents() == 41
    writing = Ours(path, "r+")
    writing.fields["answer"].parts[-1][0] = 43
    writing.tensors[0].data[:] = [1, 2, 3, 4]
    assert Ours(path).fields["answer"].contents() == 43
    assert Theirs(path).tensors[0].data.tolist() == [1, 2, 3, 4]
    with pytest.raises(errors.UsageError, match=r"mode 'w\+': expected one of r, r\+, c"):
        Ours(path, "w+")  # type: ignore[arg-type]


def test_over_weights_and_replicas(numaload_store: None, model_files: list[str]) -> None:
    with numaload.open(model_files[0]) as weights:
        for part, path in enumerate(model_files):
            same(Ours.over(weights, part), Theirs(path))
        with numaload.mirror(weights, shared=True) as mirror:
            view = mirror.local()
            reader = Ours.over(view, 1)
            same(reader, Theirs(model_files[1]))
            tensor = reader.tensors[0]
            assert tensor.data.ctypes.data == view[tensor.name].address
            assert tensor.data.ctypes.data != weights[tensor.name].address


@pytest.fixture
def numaload_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""


def test_weights_of_another_format(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with numaload.open(path) as weights, pytest.raises(errors.UsageError, match="not a GGUF file"):
        Ours.over(weights)


HOSTILE: dict[str, tuple[bytes, type[errors.FormatError]]] = {
    "empty": (b"", errors.NotGGUFError),
    "no magic": (b"GGML" + bytes(100), errors.NotGGUFError),
    "version": (gb.build(version=1), errors.UnsupportedVersionError),
    "entries": (gb.build(n_kv=gb.HUGE), errors.TruncatedError),
    "tensors": (gb.build(n_tensors=gb.HUGE), errors.TruncatedError),
    # gguf-py makes a part for each of these, for ever.
    "array": (
        gb.build([gb.entry("a", gb.ARRAY, gb.array(gb.U8, count=1 << 40))]),
        errors.TruncatedError,
    ),
    "strings": (
        gb.build([gb.entry("a", gb.ARRAY, gb.array(gb.STRING, count=1 << 40))]),
        errors.TruncatedError,
    ),
    "string": (
        gb.build([gb.entry("a", gb.STRING, gb.string("x", 1 << 40))]),
        errors.TruncatedError,
    ),
    "value type": (gb.build([gb.entry("a", 13, b"")]), errors.MetadataError),
    "twice": (gb.build([gb.u32("a", 1), gb.u32("a", 2)]), errors.MetadataError),
    "pseudo-field": (gb.build([gb.u32("GGUF.version", 3)]), errors.MetadataError),
    "alignment": (gb.build([gb.u32("general.alignment", 0)]), errors.MetadataError),
    "dims": (gb.build([], [gb.tensor("t", (1 << 62, 4))]), errors.TensorInfoError),
    "truncated": (gb.build([], [gb.tensor("t", (512,))]), errors.TruncatedError),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_damaged_files_are_refused_by_name(tmp_path: Path, name: str) -> None:
    raw, kind = HOSTILE[name]
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(kind) as caught:
        Ours(path)
    assert isinstance(caught.value, ValueError)  # what programs catch from gguf-py
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(errors.ReadError, match="expected a file, found a directory"):
        Ours(tmp_path)
    absent = tmp_path / "absent.gguf"
    with pytest.raises(FileNotFoundError, match=str(absent)) as caught:
        Ours(absent)
    assert isinstance(caught.value, errors.ModelNotFoundError)


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    """Lengths that somebody overwrites are looked at again, with the same distrust; those of arrays
    in arrays were taken when the file was opened.
    """
    path = tmp_path / "m.gguf"
    path.write_bytes(metadata_only())
    reader = Ours(path, "c")
    tokens, lines = reader.fields["tokens"], reader.fields["lines"]
    before = [part.size for part in lines.parts]
    for field, entry in ((tokens, 24), (lines, 36)):
        at = field.offset + len(field.name) + entry
        reader.data[at : at + 8] = 255
    with pytest.raises(errors.MetadataError, match="array lengths here differ"):
        tokens.parts[-1]
    assert [part.size for part in lines.parts] == before
