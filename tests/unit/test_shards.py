"""Which files make one model of safetensors: by an index, by numbers, by folders."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import safetensors_builder as sb
from numaload.errors import FormatError, NumaloadWarning, ReadError, SplitError
from numaload.files.source import read_whole
from numaload.formats.safetensors import Header
from numaload.formats.shards import Shards, check_shards, find_shards, is_layout
from numaload.formats.splits import split_name

NAMES = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
INDEX = "model.safetensors.index.json"
pytestmark = pytest.mark.usefixtures("nothing_said")
MAP = {"a": NAMES[0], "b": NAMES[1], "b2": NAMES[1], "c": NAMES[2]}


def find(path: Path | str) -> Shards:
    return find_shards(os.fspath(path), read_whole)


def write_index(path: Path, weight_map: Mapping[str, str], **others: Any) -> Path:
    path.write_text(
        json.dumps({"metadata": {"total_size": 1e9}, "weight_map": weight_map} | others)
    )
    return path


def write_model(folder: Path, weight_map: Mapping[str, str] = MAP) -> Path:
    """A model of several files; without its index."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in set(weight_map.values()):
        rows = {tensor: ("F32", (2,)) for tensor, file in weight_map.items() if file == name}
        (folder / name).write_bytes(sb.model(rows))
    return folder


def paths(folder: Path, names: list[str] = NAMES) -> list[str]:
    return [str(folder / name) for name in names]


def headers(shards: Shards) -> list[Header]:
    return [sb.read_header(path) for path in shards.paths]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = write_model(tmp_path / "m")
    write_index(folder / INDEX, MAP)
    return folder


@pytest.mark.parametrize("given", ["", INDEX, *NAMES])
def test_a_model_by_any_of_its_paths(model: Path, given: str) -> None:
    found = find(model / given)
    assert found.paths == paths(model)
    assert found.index_path == str(model / INDEX)
    assert found.weight_map == {tensor: str(model / name) for tensor, name in MAP.items()}
    check_shards(found, headers(found))


@pytest.mark.parametrize("given", ["", *NAMES])
def test_shards_without_an_index(tmp_path: Path, given: str) -> None:
    found = find(write_model(tmp_path) / given)
    assert found == Shards(paths(tmp_path), None, {})
    check_shards(found, headers(found))


def test_paths_are_relative_where_the_given_one_is(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    for path in (".", INDEX, NAMES[1]):
        assert [os.path.normpath(path) for path in find(path).paths] == NAMES


@pytest.mark.parametrize("given", ["any", "m.gguf", "absent.safetensors", "m\0.safetensors"])
def test_what_is_no_shard_stands_for_itself(tmp_path: Path, given: str) -> None:
    path = f"{tmp_path}/{given}"
    assert find(path) == Shards([path], None, {})


@pytest.mark.parametrize(
    "name",
    ["m-00003-of-00002", "m-00001-of-00002.bin", "m-1-of-00002.gguf", "m00001-of-00002"],
)
def test_names_that_are_no_shards(name: str) -> None:
    assert split_name(name if "." in name else f"{name}.safetensors", ".safetensors") is None


def test_files_that_are_not_in_the_index_are_not_read(model: Path) -> None:
    """As the consolidated.safetensors that some repositories have beside the shards."""
    (model / "consolidated.safetensors").write_bytes(b"?")
    assert find(model).paths == paths(model)


def test_a_variant_has_an_index_of_its_own(model: Path) -> None:
    names = [f"model.fp16-0000{number}-of-00002.safetensors" for number in (1, 2)]
    write_model(model, {"a": names[0], "b": names[1]})
    index = write_index(model / "model.safetensors.index.fp16.json", {"a": names[0], "b": names[1]})
    assert find(model / names[1]).index_path == str(index)
    assert find(model / names[1]).paths == paths(model, names)
    assert find(model).paths == paths(model)


FOLDERS: dict[str, tuple[list[str], str]] = {
    "one-file": (["model.safetensors", "config.json"], "model.safetensors"),
    "any-name": (["x.safetensors", "README.md"], "x.safetensors"),
    "usual-first": (["a.safetensors", "model.safetensors"], "model.safetensors"),
    "variant-second": (["model.fp16.safetensors", "model.safetensors"], "model.safetensors"),
    "variant-alone": (["model.fp16.safetensors"], "model.fp16.safetensors"),
    "diffusers": (
        ["diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.safetensors"],
        "diffusion_pytorch_model.safetensors",
    ),
    "peft": (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors"),
    "other-json": (["x.safetensors", "tokenizer.index.json"], "x.safetensors"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder(tmp_path: Path, kind: str) -> None:
    names, expected = FOLDERS[kind]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert find(tmp_path) == Shards([str(tmp_path / expected)], None, {})


def test_the_one_file_comes_before_the_index(model: Path) -> None:
    """Where a folder has both transformers takes it."""
    (model / "model.safetensors").touch()
    assert find(model).paths == [str(model / "model.safetensors")]


EMPTY: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "found a directory without .safetensors files"),
    "gguf": (["m.gguf", "n.gguf"], "opened by their own names: m.gguf, n.gguf"),
    "pipeline": (["model_index.json"], "name the folder of one, as unet"),
    "bin": (["pytorch_model.bin"], "pickled weights are not read: convert them"),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_folder_without(tmp_path: Path, kind: str) -> None:
    names, words = EMPTY[kind]
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(ReadError, match="expected a file, found a directory") as caught:
        find(tmp_path)
    assert words in str(caught.value)


def test_a_folder_of_several_models_names_them(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b-00001-of-00002.safetensors", "b-00002-of-00002.safetensors"):
        (tmp_path / name).touch()
    words = r"2 models in this folder: a\.safetensors, b-00001-of-00002\.safetensors$"
    with pytest.raises(SplitError, match=words) as caught:
        find(tmp_path)
    assert caught.value.path == str(tmp_path)


HASH = "0" * 39 + "1"


@pytest.fixture
def repository(model: Path, tmp_path: Path) -> Path:
    """The model as the hub's cache has it."""
    folder = tmp_path / "models--org--name"
    snapshot = folder / "snapshots" / HASH
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(HASH)
    for number, name in enumerate([INDEX, *NAMES]):
        shutil.copy(model / name, folder / "blobs" / f"{number}f")
        (snapshot / name).symlink_to(f"../../blobs/{number}f")
    return folder


@pytest.mark.parametrize("given", ["", f"snapshots/{HASH}", f"snapshots/{HASH}/{NAMES[2]}"])
def test_the_cache_of_the_hub(repository: Path, given: str) -> None:
    (repository / "snapshots" / "other").mkdir()
    found = find(repository / given)
    assert found.paths == paths(repository / "snapshots" / HASH)
    check_shards(found, headers(found))


def test_a_cache_without_main_has_one_snapshot(repository: Path) -> None:
    (repository / "refs" / "main").unlink()
    (repository / "snapshots" / ".DS_Store").touch()
    assert find(repository).paths == paths(repository / "snapshots" / HASH)
    (repository / "snapshots" / "other").mkdir()
    with pytest.raises(SplitError, match=rf"no refs/main, and 2 snapshots: {HASH}, other"):
        find(repository)


@pytest.mark.parametrize("main", ["", "../../..", "absent", "a/b", "\xff", "x\0y", "."])
def test_a_main_that_is_no_snapshot(repository: Path, main: str) -> None:
    (repository / "refs" / "main").write_bytes(main.encode("latin-1"))
    with pytest.raises(SplitError, match="download the model again"):
        find(repository)


def test_a_main_that_is_no_reference_but_large(repository: Path) -> None:
    (repository / "refs" / "main").write_text("0" * 300)
    with pytest.raises(ReadError, match="300 bytes, expected at most 256"):
        find(repository)


def test_links_to_a_shard_and_to_an_index(model: Path, tmp_path: Path) -> None:
    for name in (NAMES[1], INDEX):
        link = tmp_path / f"latest{os.path.splitext(name)[1]}"
        link.symlink_to(f"m/{name}")
        found = find(link)
        assert list(map(os.path.realpath, found.paths)) == paths(model)
        check_shards(found, headers(found))


def test_an_index_may_name_files_in_folders(tmp_path: Path) -> None:
    write_model(tmp_path / "part", {"a": "x.safetensors"})
    write_index(tmp_path / INDEX, {"a": "part/x.safetensors"})
    assert find(tmp_path).paths == [str(tmp_path / "part/x.safetensors")]


OUTSIDE = {
    "parent": "../m.safetensors", "inside": "a/../m.safetensors", "absolute": "/m.safetensors",
    "empty": "", "no-name": "a//m.safetensors", "here": "./m.safetensors", "nul": "m\0.safetensors",
    "pickle": "pytorch_model.bin", "other": "/etc/passwd", "folder": "m.safetensors/",
    "long": "a" * 5000,
}  # fmt: skip


@pytest.mark.parametrize("name", OUTSIDE.values(), ids=OUTSIDE)
def test_names_that_lead_outside(model: Path, name: str) -> None:
    write_index(model / INDEX, MAP | {"x": name})
    for path in (model, model / INDEX, model / NAMES[0]):
        with pytest.raises(SplitError, match=r"expected a \.safetensors file inside") as caught:
            find(path)
        assert caught.value.path == str(model / INDEX)
        assert len(str(caught.value)) < 500


LIES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "expected {"),
    "list": ("[]", "expected {"),
    "no-map": ("{}", "found no weight_map"),
    "config": ('{"architectures": ["LlamaForCausalLM"]}', "found no weight_map"),
    "map-of-nothing": ('{"weight_map": {}}', "names 0 files"),
    "map-null": ('{"weight_map": null}', "expected { of weight_map, found 'null}'"),
    "map-of-numbers": ('{"weight_map": {"a": 1}}', "expected a string for 'a' in weight_map"),
    "map-twice": ('{"weight_map": {}, "weight_map": {}}', "weight_map appears twice"),
    "tensor-twice": ('{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice in weight_map"),
    "half": ('{"weight_map": {"a": "x.safetensors"', "expected , or }"),
    "more": ('{"weight_map": {}} {}', "expected nothing after the index"),
    "nan": ('{"metadata": NaN}', "expected a value of 'metadata'"),
    "nesting": ('{"metadata": ' + "[" * 100_000, "expected a value of 'metadata'"),
    "digits": ('{"metadata": ' + "1" * 100_000 + "}", "expected a value of 'metadata'"),
    "large": ('{"metadata": "' + "x" * (2 << 20) + '"}', "of at most 1048576 characters"),
    "not-utf-8": (b'{"weight_map": {"\xff": "x"}}', "is not UTF-8"),
    "half-a-pair": (r'{"weight_map": {"\ud800": "x"}}', "expected a name in weight_map"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1", "(a git-lfs pointer: fetch"),
    "web-page": ("<!DOCTYPE html><html>", "(a web page, or"),
}


@pytest.mark.parametrize("kind", LIES)
def test_an_index_that_cannot_be(model: Path, kind: str) -> None:
    text, words = LIES[kind]
    (model / INDEX).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SplitError) as caught:
        find(model)
    assert words in str(caught.value)
    assert caught.value.path == str(model / INDEX)
    assert len(str(caught.value)) < 500


def test_an_index_that_is_too_large(model: Path) -> None:
    os.truncate(model / INDEX, 1 << 40)
    with pytest.raises(ReadError, match="expected at most 100000000"):
        find(model)


def test_an_index_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match="No such file"):
        find(tmp_path / INDEX)


@pytest.mark.parametrize("index", [True, False], ids=["index", "numbers"])
def test_missing_shards_are_named(model: Path, index: bool) -> None:
    os.remove(model / NAMES[1])
    if not index:
        os.remove(model / INDEX)
    for path in (model, model / NAMES[0], model / NAMES[1]):
        with pytest.raises(SplitError, match=rf"1 of 3 shards missing: .*{NAMES[1]}"):
            find(path)


@pytest.fixture
def stale(tmp_path: Path) -> Path:
    """A folder whose index is of an older layout than its shards."""
    folder = write_model(tmp_path / "stale")
    old = [f"model-0000{number}-of-00005.safetensors" for number in (1, 5)]
    write_index(folder / INDEX, {"a": old[0], "c": old[1]})
    return folder


@pytest.mark.parametrize("given", ["", INDEX, *NAMES])
def test_an_index_of_an_older_layout(stale: Path, given: str) -> None:
    with pytest.warns(NumaloadWarning, match=rf"{INDEX}: .*remove"):
        found = find(stale / given)
    assert found == find(stale / given) == Shards(paths(stale), None, {})  # said once
    check_shards(found, headers(found))


def test_an_index_of_an_older_layout_beside_one_file(stale: Path) -> None:
    for name in NAMES:
        os.remove(stale / name)
    (stale / "model.safetensors").touch()
    with pytest.warns(NumaloadWarning, match="opened is another layout beside it"):
        assert find(stale / INDEX).paths == [str(stale / "model.safetensors")]


@pytest.mark.parametrize("beside", ["none", "not-all", "two", "of-another-model", "of-a-variant"])
def test_an_index_of_files_that_are_not_there(stale: Path, beside: str) -> None:
    if beside == "two":
        (stale / "model.safetensors-1-of-1.safetensors").touch()
    else:
        os.remove(stale / NAMES[0])
    if beside == "none":
        os.remove(stale / NAMES[1])
        os.remove(stale / NAMES[2])
    if beside == "of-another-model":
        (stale / "other-00001-of-00001.safetensors").touch()
    if beside == "of-a-variant":
        (stale / "model.fp16-00001-of-00001.safetensors").touch()
    with pytest.raises(SplitError, match=r"2 of 2 shards missing: .*; download them, or") as caught:
        find(stale / INDEX)
    assert caught.value.path == str(stale / INDEX)


def test_a_shard_of_a_layout_that_is_not_whole(stale: Path) -> None:
    """Neither it alone nor others in its place."""
    path = write_model(stale, {"x": "model-00005-of-00005.safetensors"}) / "model-00005-of-00005"
    with pytest.raises(SplitError, match=r"1 of 2 shards missing: .*model-00001-of-00005"):
        find(f"{path}.safetensors")
    left = write_model(stale, {"x": "model-00002-of-00004.safetensors"}) / "model-00002-of-00004"
    with pytest.raises(SplitError, match=rf"3 of 4 shards missing: .*{INDEX} does not name it"):
        find(f"{left}.safetensors")


FORMS = {
    "deepseek": "model-{:05d}-of-{:06d}", "kimi": "model-{}-of-{}",
    "four": "model-{:04d}-of-{:04d}", "mistral": "consolidated-{:05d}-of-{:05d}",
    "glm": "model.safetensors-{:05d}-of-{:05d}",
    "no-numbers": "part_{}_{}", "no-order": "of_{1}_{0}_parts",
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("index", [True, False], ids=["index", "numbers"])
def test_shards_of_any_name(tmp_path: Path, form: str, index: bool) -> None:
    names = [f"{form.format(number, 12)}.safetensors" for number in range(1, 13)]
    write_model(tmp_path, {name: name for name in names})
    if index:
        stem = re.split("[-_]|[.]safetensors", form)[0]
        write_index(tmp_path / f"{stem}.safetensors.index.json", {name: name for name in names})
    elif "-" not in form:
        return  # nothing says that they are one model
    given = [tmp_path / name for name in (names[0], names[2], names[11])]
    for path in given if "-" not in form else [tmp_path, *given]:
        assert sorted(find(path).paths) == sorted(paths(tmp_path, names))
    os.remove(tmp_path / names[4])
    for path in given:
        with pytest.raises(SplitError, match=rf"1 of 12 shards missing: .*/{names[4]}"):
            find(path)


@pytest.mark.parametrize("given", ["", *NAMES])
def test_what_is_hidden_is_no_model(tmp_path: Path, given: str) -> None:
    folder = write_model(tmp_path)
    for name in (*NAMES, INDEX, "other.safetensors"):
        (folder / f"._{name}").write_bytes(b"\0\5\x16\7")
    assert find(folder / given) == Shards(paths(folder), None, {})


def elsewhere(folder: Path) -> None:
    write_index(folder / INDEX, MAP | {"b2": NAMES[0]})


def nowhere(folder: Path) -> None:
    write_index(folder / INDEX, MAP | {"z": NAMES[1]})


def doubled(folder: Path) -> None:
    (folder / NAMES[2]).write_bytes(sb.model({"c": ("F32", (2,)), "b": ("F32", (2,))}))


def doubled_without_an_index(folder: Path) -> None:
    doubled(folder)
    os.remove(folder / INDEX)


UNFIT: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "doubled": (doubled, 2, "tensor 'b' is in .*00002-of-00003.safetensors too"),
    "doubled-without": (doubled_without_an_index, 2, "tensor 'b' is in .*00002"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_files_that_do_not_fit(model: Path, kind: str) -> None:
    change, number, words = UNFIT[kind]
    change(model)
    found = find(model)
    with pytest.raises(SplitError, match=words) as caught:
        check_shards(found, headers(found))
    assert caught.value.path == str(model / NAMES[number])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (elsewhere, "1 tensors are not in the files that it names for them; all that"),
        (nowhere, "1 tensors are not .* 1 of them in none: z; all that the files hold is there"),
    ],
)
def test_an_index_that_is_wrong_about_tensors(
    model: Path, change: Callable[[Path], None], words: str
) -> None:
    change(model)
    found = find(model)
    with pytest.warns(NumaloadWarning, match=f"{INDEX}: {words}.*Download the index again"):
        check_shards(found, headers(found))
    check_shards(found, headers(found))  # said once


def test_an_index_of_files_without_tensors(model: Path) -> None:
    for name in NAMES:
        (model / name).write_bytes(sb.model({}))
    found = find(model)
    with pytest.raises(SplitError, match="4 of them in none: a, b, b2, c: download") as caught:
        check_shards(found, headers(found))
    assert caught.value.path == str(model / INDEX)


def test_tensors_that_the_index_does_not_know_are_read_too(model: Path) -> None:
    write_index(model / INDEX, {tensor: name for tensor, name in MAP.items() if tensor != "b2"})
    found = find(model)
    check_shards(found, headers(found))


def test_what_is_a_layout(model: Path) -> None:
    assert is_layout(str(model))
    assert is_layout(str(model / INDEX))
    assert not is_layout(str(model / NAMES[0]))


RAW = json.dumps({"metadata": {"total_size": 8}, "weight_map": MAP}).encode()
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200, database=None)


@PROPERTY
@given(st.data())
def test_any_damaged_index_is_survived(data: st.DataObject) -> None:
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        found = find_shards(f"absent/{INDEX}", lambda *_: bytes(raw))
    except FormatError:
        return
    assert all(path.startswith("absent/") and ".." not in path for path in found.paths)
