"""Reading files of GGUF v2 and v3, little and big endian: all split files from any one of them,
header only; arrays lazy; every count, length, offset, product and overlap checked against the file
before use; named errors. `numaload inspect FILE [--metadata]`: tensors, qtypes, splits, bytes.
"""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
from commands import Numaload, sparse_model
from numaload.cli.files import FILE_TYPES
from numaload.cli.output import size
from numaload.demo import write_model

TENSORS = {
    f"blk.{i}.{qtype.name.lower()}": (qtype, gb.random_blocks(qtype, (4, 512), i))
    for i, qtype in enumerate(map(api.QuantType, gguf.GGMLQuantizationType))
    if qtype.name not in {"Q8_1", "F64", "I8", "I16", "I32", "I64"}
}
PER_FILE = 10
HEAD_READ = 1 << 20


@pytest.fixture
def splits(tmp_path: Path) -> list[str]:
    return gb.write_good(tmp_path / "m.gguf", TENSORS, {"llama.block_count": 7}, PER_FILE)


def check_tensors(weights: api.Weights) -> None:
    assert list(weights) == list(TENSORS)
    for name, (qtype, blocks) in TENSORS.items():
        tensor = weights[name]
        assert (tensor.qtype, tensor.shape, tensor.dims) == (qtype, (4, 512), (512, 4))
        assert tensor.nbytes == blocks.nbytes
        assert np.array_equal(tensor.blocks, blocks.reshape(4, -1).view(np.uint8))
        with open(tensor.path, "rb") as file:
            file.seek(tensor.offset)
            assert file.read(tensor.nbytes) == blocks.tobytes()


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_split_files_from_any_one(splits: list[str], given: int) -> None:
    assert len(splits) == 3
    with api.open(splits[given]) as weights:
        assert weights.paths == splits
        assert weights.nbytes == sum(map(os.path.getsize, splits))
        assert weights.metadata["llama.block_count"] == 7
        check_tensors(weights)


def test_links_are_followed_by_their_own_names(splits: list[str], tmp_path: Path) -> None:
    """As in the hub's cache: names with numbers that link to files without."""
    links: list[str] = []
    for path in splits:
        blob = tmp_path / "blobs" / f"{len(links)}abc"
        blob.parent.mkdir(exist_ok=True)
        os.rename(path, blob)
        os.symlink(blob, path)
        links.append(path)
    with api.open(links[1]) as weights:
        assert weights.paths == links
        check_tensors(weights)


@pytest.mark.parametrize("version", [2, 3])
def test_both_versions(tmp_path: Path, version: int) -> None:
    (path,) = gb.write_good(tmp_path / "m.gguf", TENSORS)
    with open(path, "r+b") as file:  # the two have one layout
        file.seek(4)
        file.write(bytes([version]))
    with api.open(path) as weights:
        assert weights.parts[0].header.version == version
        check_tensors(weights)


def _bytes_read() -> int:
    """By this process, through any call, since it began."""
    words = Path("/proc/self/io").read_text(encoding="ascii").split()
    return int(words[words.index("rchar:") + 1])


def test_opening_reads_the_header_only(tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", 2 << 30)
    before = _bytes_read()
    with api.open(path) as weights:
        assert weights["big.weight"].nbytes == 2 << 30
        assert weights.nbytes > 2 << 30
        assert _bytes_read() - before < HEAD_READ
        assert path not in Path("/proc/self/maps").read_text(errors="replace")
        assert not weights["big.weight"].blocks[-1].any()
        assert path in Path("/proc/self/maps").read_text(errors="replace")


def test_arrays_are_read_when_asked_for(tmp_path: Path) -> None:
    path, tokens = tmp_path / "m.gguf", [f"token number {i}" for i in range(100_000)]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-0.5 * i for i in range(1000)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with api.open(path) as weights:
        found = weights.metadata["tokenizer.ggml.tokens"]
        before = _bytes_read()
        assert len(found) == 100_000
        assert weights.metadata.type_name("tokenizer.ggml.tokens") == "array of string"
        assert _bytes_read() - before < 10_000
        assert found[77_777] == tokens[77_777]
        assert found == tokens
        assert _bytes_read() - before > 1_000_000
        assert weights.metadata["tokenizer.ggml.scores"][3] == -1.5


@pytest.mark.fast
def test_inspect_as_text(numaload: Numaload, splits: list[str]) -> None:
    first, *lines = numaload("inspect", splits[1]).stdout.splitlines()
    assert first.startswith("llama, ")
    assert " in 3 files, 7 layers" in first
    for path, line, names in zip(
        splits, lines, itertools.zip_longest(*[iter(TENSORS)] * PER_FILE), strict=False
    ):
        assert line.startswith(f"{path}: GGUF v3, {len(names) - names.count(None)} tensors, ")
    cells = [line.split() for line in lines]
    for name, (qtype, blocks) in TENSORS.items():
        assert [name, qtype.name, "4x512", str(blocks.nbytes)] in cells
        assert [qtype.name, "1", str(blocks.nbytes)] in cells
    assert "llama.block_count" not in "".join(lines)


@pytest.mark.parametrize(
    ("entries", "rows", "said"),
    [
        (
            [
                gb.entry("general.architecture", gb.STRING, gb.string("llama")),
                gb.u32("general.file_type", 15),
                gb.u32("llama.block_count", 1),
                gb.u32("llama.context_length", 8192),
            ],
            [gb.tensor("t", (32, 100))],
            "llama, 3.2 K parameters, Q4_K_M, {size} in 1 file, 1 layer, context 8192",
        ),
        ([], [gb.tensor("t")], "32 parameters, F32, {size} in 1 file"),
        ([], [], "{size} in 1 file"),
        (
            [
                gb.entry("general.architecture", gb.STRING, gb.string("\x1b" * 100)),
                gb.entry("general.file_type", gb.STRING, gb.string("15")),
                gb.u32("general.file_type.", 999),
                gb.entry("\x1b.block_count", gb.STRING, gb.string("1")),
            ],
            [gb.tensor("t")],
            r"\x1b\x1b",
        ),
    ],
    ids=["all", "types", "nothing", "hostile"],
)
def test_inspect_begins_with_what_the_header_tells(
    numaload: Numaload, tmp_path: Path, entries: list[bytes], rows: list[bytes], said: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build(entries, rows, bytes(12800)))
    line = numaload("inspect", path).stdout.splitlines()[0]
    shown = said.format(size=size(path.stat().st_size))
    assert line == shown or (line.startswith(shown) and len(line) < 120)


def test_file_types_have_llama_cpp_s_names() -> None:
    known = {one.value: one.name for one in gguf.LlamaFileType if one.name != "GUESSED"}
    assert known == {
        value: f"{'ALL' if name == 'F32' else 'MOSTLY'}_{name}"
        for value, name in FILE_TYPES.items()
        if value in known
    }


def test_inspect_with_metadata(numaload: Numaload, model: str) -> None:
    text = numaload("inspect", model, "--metadata").stdout
    assert "general.architecture (string) = 'llama'\n" in text
    assert "tokenizer.ggml.tokens (array of string) = ['token 0', " in text
    assert ", ...] (1000 elements)" in text


def test_inspect_as_json(numaload: Numaload, model: str, model_files: list[str]) -> None:
    found = numaload.json("inspect", model, "--metadata")
    tensors = {t["name"]: (t["qtype"], tuple(t["shape"]), t["nbytes"]) for t in found["tensors"]}
    tokens = "tokenizer.ggml.tokens"
    with api.open(model) as weights:
        assert [file["path"] for file in found["files"]] == model_files
        assert sum(file["size"] for file in found["files"]) == weights.nbytes
        assert tensors == {t.name: (t.qtype.name, t.shape, t.nbytes) for t in weights.values()}
        assert found["metadata"][tokens] == weights.metadata[tokens].tolist()


HOSTILE: dict[str, tuple[bytes, type[api.errors.NumaloadError], str]] = {
    "empty": (b"", api.errors.NotGGUFError, "expected the magic"),
    "other-format": (b"PK\3\4" * 100, api.errors.NotGGUFError, r"found b'PK\x03\x04'"),
    "version": (gb.build(version=9), api.errors.UnsupportedVersionError, "version 9"),
    "version-1": (gb.build(version=1), api.errors.UnsupportedVersionError, "quantize OLD NEW COPY"),
    "count": (gb.build(n_tensors=gb.HUGE), api.errors.TruncatedError, "tensors announced"),
    "length": (
        gb.build([gb.entry("k", gb.STRING, gb.string("v", gb.HUGE))]),
        api.errors.TruncatedError,
        "value of 'k'",
    ),
    "array": (
        gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U8, count=gb.HUGE))]),
        api.errors.TruncatedError,
        "18446744073709551615 elements",
    ),
    "key-twice": (
        gb.build([gb.entry("k", gb.U8, b"\1")] * 2), api.errors.MetadataError, "twice"
    ),
    "offset": (
        gb.build([], [gb.tensor("t", offset=2**64 - 32)]), api.errors.TruncatedError, "'t' ends"
    ),
    "product": (
        gb.build([], [gb.tensor("t", (2**32, 2**32))]), api.errors.TensorInfoError, "2^60"
    ),
    "overlap": (
        gb.build([], [gb.tensor("a"), gb.tensor("b", offset=96)]),
        api.errors.TensorInfoError,
        "'a' and 'b' overlap",
    ),
    "cut": (gb.build([], [gb.tensor("t")], b""), api.errors.TruncatedError, "128 bytes are"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "error", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(
    tmp_path: Path, raw: bytes, error: type[api.errors.NumaloadError], words: str
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(error) as caught:
        api.open(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["overlap", "other-format", "absent", "folder"])
def test_inspect_fails_with_one_line(numaload: Numaload, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gguf"
    if kind == "folder":
        path.mkdir()
    elif kind in HOSTILE:
        path.write_bytes(HOSTILE[kind][0])
    done = numaload("inspect", path, status=1)
    assert done.stdout == ""
    assert done.stderr.startswith(f"numaload: error: {path}: ")
    assert done.stderr.count("\n") == 1


def test_missing_split_files_are_named(numaload: Numaload, splits: list[str]) -> None:
    os.remove(splits[0])
    with pytest.raises(api.errors.SplitError, match="1 of 3 split files missing"):
        api.open(splits[2])
    assert splits[0] in numaload("inspect", splits[2], status=1).stderr


def test_split_files_of_two_models(splits: list[str], tmp_path: Path) -> None:
    other = write_model(str(tmp_path / "o.gguf"), 1 << 20, splits=2)
    shutil.copy(other[1], splits[1])
    with pytest.raises(api.errors.SplitError, match=r"expected split\.no 1 of 3, found 1 of 2"):
        api.open(splits[0])


def test_an_unknown_type_is_listed(numaload: Numaload, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build([], [gb.tensor("odd", (7,), 133), gb.tensor("t", offset=32)]))
    done = numaload("inspect", path)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["odd", "ik_llama.cpp:133", "7", "0"] in lines
    assert "tensor 'odd' cannot be used, the rest of the file can: type 133" in done.stderr
    assert ["t", "F32", "32", "128"] in lines
