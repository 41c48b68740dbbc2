"""Names of split files, and which files make one model."""

from __future__ import annotations

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
        ("m-00001-of-00003.gguf", SplitName("m", 1, 3)),
        ("/a b/m-00009-of-00009-00002-of-00002.gguf", SplitName("/a b/m-00009-of-00009", 2, 2)),
        ("-00001-of-00001.gguf", SplitName("", 1, 1)),
        ("new\nline-00001-of-00002.gguf", SplitName("new\nline", 1, 2)),
        ("m.gguf", None),
        ("m-00000-of-00003.gguf", None),
        ("m-00004-of-00003.gguf", None),
        ("m-1-of-3.gguf", None),
        ("m-000001-of-000003.gguf", None),
        ("m-00001-of-00003.gguf.part", None),
        ("m-00001-of-00003.gguf\n", None),
        ("m-\u0660\u0660\u0660\u0660\u0661-of-00003.gguf", None),  # digits, but not ours
    ],
)
def test_split_names(path: str, expected: SplitName | None) -> None:
    assert split_name(path) == expected
    if expected:
        assert expected.sibling(expected.number) == path


def test_all_files_are_found_from_any_of_them(tmp_path: Path) -> None:
    paths = [tmp_path / f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for path in paths:
        path.touch()
    for path in paths:
        assert sibling_paths(str(path)) == [str(p) for p in paths]


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00001.gguf"])
def test_a_file_of_its_own(name: str) -> None:
    assert sibling_paths(name) == [name]


def test_missing_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "m-00002-of-00009.gguf").touch()
    with pytest.raises(SplitError, match=r"8 of 9 split files missing: .*m-00001-of.*, \.\.\."):
        sibling_paths(str(tmp_path / "m-00002-of-00009.gguf"))


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
    with pytest.raises(SplitError, match="but not named NAME-00001-of-00003"):
        split_count(header({"count": (U16, 3)}), "blobs/3f2a")


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
