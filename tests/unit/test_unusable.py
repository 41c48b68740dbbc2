"""Files that are no model, or not all there: what they are and what helps, said by every reader."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import gguf_builder as gb
import numaload
import safetensors_builder as sb
from numaload.backends import ktransformers
from numaload.backends.gguf_reader import GGUFReader
from numaload.backends.kt_kernel import handle
from numaload.errors import (
    ModelNotFoundError,
    NotGGUFError,
    NotSafetensorsError,
    NumaloadError,
    ReadError,
    SplitError,
    TruncatedError,
)

KINDS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "(the file is empty: download it again)"),
    "zeros": (bytes(4096), "(zeros: a download that did not finish, or a sparse file;"),
    "web-page": (b"<!DOCTYPE html>\n<html class=''>", "(a web page, or a server's error, in place"),
    "web-page-spaced": (b"\n\n  <html><head>", "(a web page, or a server's error, in place"),
    "xml": (b'\xef\xbb\xbf<?xml version="1.0"?><Error>', "(a web page, or a server's error"),
    "json": (b'{"error":"Repository not found"}', 'server\'s error: \'{"error":"Repository not f'),
    "text": (b"Access to model x is restricted.", "error: 'Access to model x is restricted.'; log"),
    "not-found": (b"404: Not Found", "(text, perhaps a server's error: '404: Not Found';"),
    "umlauts": ("größer als erlaubt".encode(), "(text, perhaps"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\n", "(a git-lfs pointer: fetch"),
    "ggml": (b"lmgg" + bytes(60), "(GGML, of before August 2023: convert"),
    "ggmf": (b"fmgg" + bytes(60), "(GGMF, of before"),
    "ggjt": (b"tjgg" + bytes(60), "(GGJT, of before"),
    "ggla": (b"algg" + bytes(60), "(GGLA, an adapter of llama.cpp of before"),
    "gguf-as-text": (b"\xef\xbb\xbfGGUF" + bytes(60), "(GGUF behind a byte order mark"),
    "gzip": (b"\x1f\x8b\x08\0" + bytes(60), "(compressed by gzip: gunzip it)"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(60), "(compressed by zstd: zstd -d"),
    "xz": (b"\xfd7zXZ\0" + bytes(60), "(compressed by xz: xz -d"),
    "bzip2": (b"BZh9" + bytes(60), "(compressed by bzip2: bzip2 -d"),
    "7-zip": (b"7z\xbc\xaf\x27\x1c" + bytes(60), "(a 7-zip archive: 7z x"),
    "zip": (b"PK\3\4" + bytes(60), "(a zip archive, as torch.save writes: convert"),
    "pickle": (b"\x80\2}q\0" + bytes(60), "(a pickle, as torch.save wrote: convert"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" * 2, "(an HDF5 file"),
    "apple-double": (b"\0\5\x16\7\0\2\0\0Mac OS X        ", "open the file whose name has no ._"),
    "apple-single": (b"\0\5\x16\0\0\2\0\0Mac OS X        ", "(AppleSingle"),
    "noise": (b"\x93\xfe\xa1NUMPY\1\0\x97\x99\x9a" * 5, "found b'\\x93\\xfe"),
}


@pytest.mark.parametrize("end", ["gguf", "safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_named(tmp_path: Path, kind: str, end: str) -> None:
    raw, words = KINDS[kind]
    path = tmp_path / f"m.{end}"
    path.write_bytes(raw)
    expected = {"gguf": NotGGUFError, "safetensors": NotSafetensorsError}[end]
    loader = ktransformers.GGUFLoader if end == "gguf" else ktransformers.SafeTensorLoader
    for opening in [numaload.open, loader, *([GGUFReader] if end == "gguf" else [])]:
        with pytest.raises(expected) as caught:
            opening(path)
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
        assert str(caught.value).isprintable()
    if kind == "noise":
        assert str(caught.value).endswith("' (at byte 0)")


def test_a_shard_that_is_no_model_is_named_before_its_siblings(tmp_path: Path) -> None:
    path = tmp_path / "._model-00001-of-00002.safetensors"
    path.write_bytes(KINDS["apple-double"][0])
    with pytest.raises(NotSafetensorsError, match="AppleDouble"):
        numaload.open(path)


PARTS = r"part 1 of 2 of one file: join them in this order with cat, as m\.gguf, and open that"
MODEL = gb.build([], [gb.tensor("t", (256,))])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m.gguf.part1of2", PARTS),
        ("m.gguf.part", "its name is that of a download which did not finish"),
        ("0f.incomplete", "its name is that of a download which did not finish"),
        ("m.gguf", r"did not finish: m\.gguf\.aria2 is beside it; aria2c -c goes on with it"),
    ],
)
def test_a_file_that_was_cut(tmp_path: Path, name: str, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(MODEL[:-512])
    Path(f"{path}.aria2").touch()
    for opening in (numaload.open, GGUFReader):
        with pytest.raises(TruncatedError, match=rf"bytes are missing \(at byte 24\); .*{words}"):
            opening(path)


@pytest.mark.parametrize(
    ("beside", "words"),
    [
        ("m.gguf.part1of2", rf"m\.gguf\.part1of2 is there: {PARTS}"),
        ("m.gguf.incomplete", r"m\.gguf\.incomplete is there: its name is that of a download"),
        ("m.gguf.aria2", r"m\.gguf\.aria2 is there: its name is that of a download"),
        (".cache/huggingface/download/x=.0f.incomplete", r"x=\.0f\.incomplete is there"),
        ("m.gguf.txt", r"No such file or directory$"),
        ("n.gguf.part", r"No such file or directory$"),
    ],
)
def test_a_file_that_is_not_there(tmp_path: Path, beside: str, words: str) -> None:
    (tmp_path / beside).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / beside).touch()
    with pytest.raises(ReadError, match=words):
        numaload.open(tmp_path / "m.gguf")


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    """As the hub's after its blobs were removed, or while they are loaded."""
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "blobs").mkdir()
    path, blob = tmp_path / "snapshots" / "m.gguf", tmp_path / "blobs" / "0f"
    path.symlink_to("../blobs/0f")
    words = f"a link to {blob}, which is not there: download it again"
    with pytest.raises(ReadError, match=words):
        numaload.open(path)
    with pytest.raises(ModelNotFoundError, match=words):
        GGUFReader(path)
    Path(f"{blob}.incomplete").touch()
    with pytest.raises(ReadError, match=rf"a link, of whose target only {blob}\.incomplete is"):
        numaload.open(path)


@pytest.mark.parametrize("end", ["gguf", "safetensors"])
def test_a_missing_split_says_why(tmp_path: Path, end: str) -> None:
    count = gb.entry("split.count", gb.U16, gb.scalar(gb.U16, 2))
    raw = gb.build([count]) if end == "gguf" else sb.model({})
    (tmp_path / f"m-00001-of-00002.{end}").write_bytes(raw)
    (tmp_path / f"m-00002-of-00002.{end}").symlink_to("blobs/none")
    with pytest.raises(SplitError, match=r"1 of 2 .* missing: .*blobs/none, which is not there"):
        numaload.open(tmp_path / f"m-00001-of-00002.{end}")


@pytest.mark.parametrize("folder", ["", "sub", ".hidden"])
def test_hidden_files_are_no_models_of_a_folder(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "m.gguf").write_bytes(MODEL)
    (tmp_path / folder / "._m.gguf").write_bytes(KINDS["apple-double"][0])
    if folder == ".hidden":
        (tmp_path / folder / "m.gguf").write_bytes(b"no model")
    loader = ktransformers.GGUFLoader(tmp_path)
    assert list(loader.tensor_file_map) == ["t"]
    loader.close()


def test_hidden_files_are_no_models_to_kt_kernel(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(MODEL)
    (tmp_path / "._m.gguf").write_bytes(KINDS["apple-double"][0])
    assert handle._gguf_files(str(tmp_path)) == [str(tmp_path / "m.gguf")]


def test_errors_of_odd_names_are_named(tmp_path: Path) -> None:
    for name in ("m\0.gguf", "", "x" * 5000, f"{os.sep * 2}"):
        with pytest.raises(NumaloadError):
            numaload.open(f"{tmp_path}/{name}")
