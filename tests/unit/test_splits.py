"""Names of split files, and which files make one model."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

import gguf_builder as gb
from numaload.errors import SplitError
from numaload.formats.gguf import Header, parse_header
from numaload.formats.splits import (
    SplitName,
    check_splits,
    sibling_paths,
    split_count,
    split_link,
    split_name,
)

U16, I32 = gb.U16, gb.I32


Keys = dict[str, tuple[int, Any]]  # {what follows "split.": (value type, value)}


def header(keys: Keys, names: tuple[str, ...] = ()) -> Header:
    entries = [
        gb.entry(
            f"split.{key}",
            kind,
            gb.string(value) if kind == gb.STRING else gb.scalar(kind, value),
        )
        for key, (kind, value) in keys.items()
    ]
    tensors = [gb.tensor(name, (8,), offset=32 * i) for i, name in enumerate(names)]
    raw = gb.build(entries, tensors)
    return parse_header(lambda at, nbytes: raw[at : at + nbytes], len(raw))


def part(number: int, count: int, *names: str, total: int | None = None) -> Header:
    keys: Keys = {"no": (U16, number), "count": (U16, count)}
    if total is not None:
        keys["tensors.count"] = (I32, total)
    return header(keys, names)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("m-00001-of-00003.gguf", ("m", 1, 5, "00003")),
        ("/a b/m-00009-of-00009-00002-of-00002.gguf", ("/a b/m-00009-of-00009", 2, 5, "00002")),
        ("-00001-of-00001.gguf", ("", 1, 5, "00001")),
        ("new\nline-00001-of-00002.gguf", ("new\nline", 1, 5, "00002")),
        ("m-1-of-3.gguf", ("m", 1, 1, "3")),
        ("m-00001-of-000163.gguf", ("m", 1, 5, "000163")),
        ("m-00000-of-00003.gguf", ("m", 0, 5, "00003")),
        ("m.gguf", None),
        ("m-00000-of-00000.gguf", None),
        ("m-00004-of-00003.gguf", None),
        ("m-1-of-100000.gguf", None),
        ("m-1-of-1111111111.gguf", None),
        ("m-00001-of-00003.safetensors", None),
        ("m-00001-of-00003.gguf.part", None),
        ("m-00001-of-00003.gguf\n", None),
        ("m-\u0660\u0660\u0660\u0660\u0661-of-00003.gguf", None),  # digits, but not ours
    ],
)
def test_split_names(path: str, expected: tuple[str, int, int, str] | None) -> None:
    found = split_name(path)
    assert found == (expected and SplitName(*expected, ".gguf"))
    if found:
        assert found.sibling(found.number) == path


def test_all_files_are_found_from_any_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:
        path.touch()
    for path in paths:
        assert sibling_paths(str(path)) == [str(p) for p in paths]


SERIES = {
    "six-digits": [f"m-{n:05d}-of-000012.gguf" for n in range(1, 13)],
    "no-padding": [f"m-{n}-of-12.gguf" for n in range(1, 13)],
    "two-digits": [f"m-{n:02d}-of-12.gguf" for n in range(1, 13)],
    "from-0": [f"m-{n:05d}-of-00012.gguf" for n in range(12)],
    "from-0-without-padding": [f"m-{n}-of-12.gguf" for n in range(12)],
    "from-0-and-one-more": [f"m-{n}-of-12.gguf" for n in range(13)],
}


@pytest.mark.parametrize("names", SERIES.values(), ids=SERIES)
def test_numbers_of_any_form(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    expected = [str(tmp_path / name) for name in names]
    assert [sibling_paths(path) for path in expected] == [expected] * len(names)
    for lost in (names[2], names[11]):
        (tmp_path / lost).rename(tmp_path / "away")
        for name in set(names[1:]) - {lost}:
            with pytest.raises(SplitError, match=rf"1 of 1\d split files missing: .*/{lost}"):
                sibling_paths(str(tmp_path / name))
        (tmp_path / "away").rename(tmp_path / lost)


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf"])
def test_a_file_of_its_own(name: str) -> None:
    assert sibling_paths(name) == [name]


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00009.gguf").touch()
    with pytest.raises(
        SplitError, match=r"8 of 9 split files missing: .*m-00001-of.*, \.\.\."
    ) as no:
        sibling_paths(str(tmp_path / "m-00002-of-00009.gguf"))
    others = [1, *range(3, 10)]
    assert no.value.missing == [str(tmp_path / f"m-{i:05}-of-00009.gguf") for i in others]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [({}, 1), ({"count": (U16, 0)}, 1), ({"count": (U16, 1)}, 1), ({"count": (I32, 3)}, 3)],
    ids=["absent", "merged", "one", "three"],
)
def test_split_count(keys: Keys, expected: int) -> None:
    assert split_count(header(keys), "m-00001-of-00003.gguf") == expected


@pytest.mark.parametrize(
    ("count", "words"),
    [
        ((I32, -1), "is -1, expected 0 to 99999"),
        ((gb.U64, 2**63), "is 9223372036854775808"),
        ((gb.STRING, "3"), "is '3'"),
        ((gb.BOOL, True), "is True"),
        ((gb.F32, 2.0), r"is 2\.0"),
    ],
    ids=["negative", "huge", "string", "bool", "float"],
)
def test_counts_that_cannot_be(count: tuple[int, Any], words: str) -> None:
    with pytest.raises(SplitError, match=words) as caught:
        split_count(header({"count": count}), "m-00001-of-00003.gguf")
    assert caught.value.path == "m-00001-of-00003.gguf"


def test_a_part_without_a_number_in_its_name() -> None:
    keys: Keys = {"count": (U16, 3)}
    with pytest.raises(SplitError, match=r"but not named NAME-00001-of-00003.*cannot be found$"):
        split_count(header(keys), "m.gguf")
    with pytest.raises(SplitError, match=r"open the link to it in \.\./snapshots"):
        split_count(header(keys), "blobs/3f2a")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (b"GGUF", "joined with cat: the second begins at byte 208; open any one"),
        (bytes(64) + b"GGUF", "begins at byte 272"),
        (b"", "but not named"),
        (b"GGU" + bytes(1 << 20) + b"GGUF", "but not named"),
    ],
    ids=["next", "after-padding", "whole", "far"],
)
def test_joined_files_are_told_by_the_second_header(rest: bytes, words: str) -> None:
    first = named(0, [])
    end = first.tensors[0].offset + first.tensors[0].nbytes
    raw = bytes(end) + rest
    with pytest.raises(SplitError, match=words):
        split_count(
            first._replace(size=len(raw)), "m.gguf", lambda at, nbytes: raw[at : at + nbytes]
        )


def test_links_lead_to_the_name_with_a_number(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    paths = [folder / f"m-{i:05d}-of-00002.gguf" for i in (1, 2)]
    for path in paths:
        path.symlink_to(f"../blobs/{path.name[2:7]}")
    (tmp_path / "blobs").mkdir()
    for number in ("00001", "00002"):
        (tmp_path / "blobs" / number).touch()
    (tmp_path / "latest.gguf").symlink_to("model/m-00002-of-00002.gguf")
    (tmp_path / "later.gguf").symlink_to(tmp_path / "latest.gguf")
    for name in ("latest.gguf", "later.gguf"):
        assert split_link(str(tmp_path / name)) == str(paths[1])
        assert sibling_paths(str(tmp_path / name)) == [str(p) for p in paths]
    assert split_link(str(paths[0])) == str(paths[0])  # not the blob


@pytest.mark.parametrize("name", ["loop.gguf", "dangling.gguf", "absent.gguf", "plain", "n\0l"])
def test_links_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "loop.gguf").symlink_to("loop.gguf")
    (tmp_path / "dangling.gguf").symlink_to("nothing")
    (tmp_path / "plain").touch()
    path = str(tmp_path / name)
    assert split_link(path) == path
    assert sibling_paths(path) == [path]


def test_files_that_belong_together() -> None:
    check_splits(["a", "b"], [part(0, 2, "x", total=3), part(1, 2, "y", "z")])
    check_splits(["a"], [part(5, 9, "x")])


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (part(0, 2, "y"), r"b: expected split\.no 1 of 2, found 0 of 2"),
        (part(1, 3, "y"), "found 1 of 3"),
        (header({}, ("y",)), "found None of None"),
        (part(1, 2), "a: 2 tensors announced, the files hold 1"),
        (part(1, 2, "x"), "b: tensor 'x' is in a too"),
    ],
    ids=["number", "count", "no-keys", "too-few-tensors", "tensor-in-both"],
)
def test_files_that_do_not(second: Header, words: str) -> None:
    with pytest.raises(SplitError, match=words):
        check_splits(["a", "b"], [part(0, 2, "x", total=2), second])


def named(number: int, entries: Sequence[bytes], alignment: int = 32, order: str = "<") -> Header:
    """A split of two, with these entries besides."""
    with gb.big_endian() if order == ">" else nullcontext():
        splits = [
            gb.entry(f"split.{key}", U16, gb.scalar(U16, n))
            for key, n in (("no", number), ("count", 2))
        ]
        row = gb.tensor(f"t{number}", (20,))
        raw = gb.build([*splits, *entries], [row], bytes(alignment * 4), alignment=alignment)
    return parse_header(lambda at, nbytes: raw[at : at + nbytes], len(raw))


def text(key: str, value: str) -> bytes:
    return gb.entry(key, gb.STRING, gb.string(value))


FOREIGN: dict[str, tuple[list[bytes], list[bytes], str]] = {
    "architecture": (
        [text("general.architecture", "llama")],
        [text("general.architecture", "qwen2")],
        "general.architecture is 'qwen2', there 'llama'",
    ),
    "name": (
        [text("general.name", "a" * 100)],
        [text("general.name", "b" * 100)],
        r"general.name is 'b{59}\.\.\., there 'a{59}\.\.\.",
    ),
    "array": (
        [gb.entry("general.tags", gb.ARRAY, gb.array(gb.U8, b"\1"))],
        [gb.entry("general.tags", gb.ARRAY, gb.array(gb.U8, b"\2"))],
        "general.tags is <array of 1 u8>",
    ),
    "count": (
        [gb.u32("split.tensors.count", 2)],
        [gb.u32("split.tensors.count", 3)],
        r"split.tensors.count is 3, there 2",
    ),
}


@pytest.mark.parametrize(("first", "second", "words"), FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_another_model(first: list[bytes], second: list[bytes], words: str) -> None:
    with pytest.raises(SplitError, match=f"^b: of another model than a: {words}"):
        check_splits(["a", "b"], [named(0, first), named(1, second)])
    check_splits(["a", "b"], [named(0, first), named(1, [])])
    check_splits(["a", "b"], [named(0, first), named(1, first)])


def test_a_file_of_another_byte_order() -> None:
    with pytest.raises(SplitError, match="byte order is 'big', there 'little'"):
        check_splits(["a", "b"], [named(0, []), named(1, [], order=">")])


def test_alignment_is_each_file_s_own() -> None:
    """As llama.cpp has it, and its gguf-split writes: the key is in the first file only."""
    first = named(0, [gb.u32("general.alignment", 128)], alignment=128)
    second = named(1, [])
    assert (first.alignment, second.alignment) == (128, 32)
    check_splits(["a", "b"], [first, second])


def test_a_file_that_is_aligned_and_does_not_say_so() -> None:
    """As gguf-py writes it: its weights would be read from the wrong place."""
    first = named(0, [gb.u32("general.alignment", 1024)], alignment=1024)
    second = named(1, [], alignment=1024)._replace(size=2048)
    with pytest.raises(SplitError, match=r"^b: its weights begin at byte 1024, aligned to 1024"):
        check_splits(["a", "b"], [first, second])
