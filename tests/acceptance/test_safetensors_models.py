"""Safetensors: the same as by the format's own library, and everything that GGUF files can do."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numaload as api
import safetensors_builder as sb
from commands import KEPT, Numaload, evict, resident
from numaload import errors
from numaload.formats.safetensors import BITS

torch = pytest.importorskip("torch")
library: Any = pytest.importorskip("safetensors.torch")

pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")
MIB = 1 << 20
HASH = "0123456789abcdef0123456789abcdef01234567"


def raw(tensor: Any) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())


def check(weights: api.Weights, expected: dict[str, Any]) -> None:
    """Name by name: dtype, shape, bits; zero-copy but where torch could not use it."""
    assert set(weights) == set(expected)
    for name, theirs in expected.items():
        ours = weights[name].torch()
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        assert raw(ours) == raw(theirs), name
        if ours.numel() and weights[name].address % ours.element_size() == 0:
            assert ours.data_ptr() == weights[name].address


def made(*shape: int, seed: int = 0, dtype: Any = None) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype or torch.bfloat16)


def tensors(count: int, first: int = 0) -> dict[str, Any]:
    return {
        f"model.layers.{i}.{part}.weight": made(*shape, seed=10 * i + len(part))
        for i in range(first, first + count)
        for part, shape in {"q_proj": (256, 1024), "norm": (1024,)}.items()
    }


def shard(number: int, count: int = 3) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


@pytest.fixture
def expected() -> dict[str, Any]:
    return tensors(9)


@pytest.fixture
def folder(tmp_path: Path, expected: dict[str, Any]) -> Path:
    """A model as transformers saves it: three shards and their index."""
    model = tmp_path / "model"
    model.mkdir()
    where: dict[str, str] = {}
    for number in (1, 2, 3):
        part = tensors(3, 3 * (number - 1))
        library.save_file(part, model / shard(number), {"format": "pt"})
        where |= dict.fromkeys(part, shard(number))
    index = {"metadata": {"total_size": sum(t.nbytes for t in expected.values())}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": where}))
    (model / "config.json").write_text("{}")
    return model


@pytest.fixture
def repository(folder: Path) -> Path:
    """The same in the cache of the hub: links to blobs."""
    top = folder.parent / "models--org--name"
    snapshot = top / "snapshots" / HASH
    snapshot.mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs/main").write_text(HASH)
    (top / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, top / "blobs" / f"b10b{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/b10b{number}")
    return top


GIVEN = ["", "model.safetensors.index.json", shard(1), shard(3)]


# The same as by the library.


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("name", BITS)
def test_every_type(tmp_path: Path, name: str, *, aligned: bool) -> None:
    shapes = {"t": (4, 8), "e": (0, 8), "one": (1, 2, 1), "deep": (2, 1, 3, 2, 8)}
    rows: dict[str, sb.Row] = {} if aligned else {"a": ("U8", (3,))}
    rows |= {key: (name, shape) for key, shape in shapes.items()}
    if BITS[name] >= 8:
        rows["scalar"] = (name, ())
    else:
        del rows["one"]  # four bits are half of a byte
        rows["one"] = (name, (2, 4))
    path = tmp_path / "m.safetensors"
    path.write_bytes(sb.model(rows))
    with api.open(path) as weights:
        if name.startswith("F6_"):
            for key in rows.keys() - {"a"}:
                assert (
                    bytes(weights[key].buffer)
                    == dict(sb.by_library(path.read_bytes()))[key]["data"]
                )
                with pytest.raises(errors.UnsupportedTypeError, match=f"no type for {name}"):
                    weights[key].torch()
            return
        check(weights, library.load_file(path))
        assert weights["t"].type_name == name


def test_a_file_of_the_library(tmp_path: Path) -> None:
    values = {
        "float32": made(33, 7, dtype=torch.float32), "half": made(5, dtype=torch.float16),
        "scalar": torch.tensor(3.5), "empty": torch.zeros(4, 0, 2), "bool": made(9) > 0,
        "fp8": made(16, 16, dtype=torch.float8_e4m3fn), "int": torch.arange(7),
        "big": made(3000, 1000),
    }  # fmt: skip
    path = tmp_path / "m.safetensors"
    library.save_file(values, path, {"format": "pt", "made by": "a test"})
    with api.open(path) as weights:
        check(weights, library.load_file(path))
        check(weights, values)
        assert dict(weights.metadata) == {"format": "pt", "made by": "a test"}
        assert weights.nbytes == path.stat().st_size
    with api.open(str(path), copy=True) as copied:
        path.unlink()
        check(copied, values)


def test_without_the_name_s_end(tmp_path: Path) -> None:
    library.save_file({"t": made(3, 5)}, tmp_path / "weights.bin")
    with api.open(tmp_path / "weights.bin") as weights:
        check(weights, {"t": made(3, 5)})


def test_floats_are_those_of_torch(tmp_path: Path) -> None:
    dtypes = {"a": torch.float32, "b": torch.float16, "c": torch.bfloat16}
    values = {name: made(300, 77, dtype=dtype) for name, dtype in dtypes.items()}
    path = tmp_path / "m.safetensors"
    library.save_file(values, path)
    with api.open(path) as weights:
        for name, tensor in weights.items():
            for dtype in ("float32", "float16", "bfloat16"):
                converted = values[name].to(getattr(torch, dtype))
                assert raw(tensor.torch(dtype)) == raw(converted)
                assert tensor.dequantize(dtype).tobytes() == raw(converted)
            rows = tensor.dequantize(rows=(7, 9))
            np.testing.assert_array_equal(rows, values[name][7:9].float().numpy())


# Several files.


@pytest.mark.parametrize("given", GIVEN)
def test_shards_by_any_path(folder: Path, expected: dict[str, Any], given: str) -> None:
    with api.open(folder / given) as weights:
        check(weights, expected)
        assert weights.paths == [str(folder / shard(number)) for number in (1, 2, 3)]
        assert [name for name, _ in api.stream(weights, None)] == list(weights)
    with api.open(folder / given, copy=True) as weights:
        check(weights, expected)


def test_shards_without_their_index(folder: Path, expected: dict[str, Any]) -> None:
    (folder / "model.safetensors.index.json").unlink()
    for given in ("", shard(2)):
        with api.open(folder / given) as weights:
            check(weights, expected)


@pytest.mark.parametrize(
    "given", ["", f"snapshots/{HASH}", *(f"snapshots/{HASH}/{n}" for n in GIVEN[1:])]
)
def test_the_cache_of_the_hub(repository: Path, expected: dict[str, Any], given: str) -> None:
    with api.open(repository / given) as weights:
        check(weights, expected)
        assert len(weights.parts) == 3


# The command line.


def test_inspect(folder: Path, numaload: Numaload, expected: dict[str, Any]) -> None:
    for given in GIVEN:
        found = numaload.json("inspect", folder / given, "--metadata")
        assert [file["path"] for file in found["files"]] == [
            str(folder / shard(n)) for n in (1, 2, 3)
        ]
        for file in found["files"]:
            described = (file["format"], file["version"], file["byte_order"], file["alignment"])
            assert described == ("safetensors", None, "little", 8)
        assert found["metadata"] == {"format": "pt"}
        rows = {row["name"]: row for row in found["tensors"]}
        assert rows.keys() == expected.keys()
        for name, tensor in expected.items():
            assert (rows[name]["qtype"], rows[name]["shape"]) == ("BF16", list(tensor.shape))
            with open(rows[name]["path"], "rb") as file:
                file.seek(rows[name]["offset"])
                assert file.read(rows[name]["nbytes"]) == raw(tensor)
    text = numaload("inspect", folder, "--metadata").stdout
    assert f"{folder / shard(1)}: safetensors, 6 tensors, " in text
    assert "model.layers.8.q_proj.weight" in text
    assert "256x1024" in text
    assert "format (string) = 'pt'" in text


def test_inspect_says_which_types_cannot_be_used(tmp_path: Path, numaload: Numaload) -> None:
    members = {"odd": sb.row("F3_E1M1", [3], [0, 5]), "t": sb.row("F32", [2], [5, 13])}
    (tmp_path / "m.safetensors").write_bytes(sb.build(members, bytes(13)))
    done = numaload("inspect", tmp_path / "m.safetensors")
    assert "F3_E1M1" in done.stdout
    assert "'odd' cannot be used, the rest of the file can" in done.stderr


@pytest.mark.parametrize("given", GIVEN)
def test_prewarm_reads_all_shards(folder: Path, numaload: Numaload, given: str) -> None:
    paths = [str(folder / shard(number)) for number in (1, 2, 3)]
    evict(paths)
    report = numaload.json("prewarm", folder / given)
    assert report["paths"] == paths
    assert report["resident"] == report["size"] == sum(map(os.path.getsize, paths))
    assert report["read"] == report["size"] - report["resident_before"]
    assert resident(paths) > KEPT * report["size"]


def test_prewarm_the_cache_of_the_hub(repository: Path, numaload: Numaload) -> None:
    report = numaload.json("prewarm", repository)
    assert [os.path.basename(path) for path in report["paths"]] == [shard(n) for n in (1, 2, 3)]
    assert report["resident"] == report["size"]


@pytest.mark.parametrize("given", GIVEN)
def test_a_replica_from_mirror_to_release(
    folder: Path, numaload: Numaload, expected: dict[str, Any], given: str
) -> None:
    """Made by one path of the model, it is found by each."""
    (report,) = numaload.json("mirror", folder / given, "--nodes", "all")
    assert report["placed"]
    for other in GIVEN:
        assert numaload.json("mirror", folder / other, "--nodes", "all")[0]["placed"]  # the same
        with api.attach(folder / other) as mirror:
            view = mirror.view(mirror.nodes[0])
            assert not next(iter(view.values())).is_file
            check(view, expected)
            found = dict(api.stream(view, "torch"))
            assert all(raw(found[name]) == raw(tensor) for name, tensor in expected.items())
    status = numaload.json("status", folder / given)
    (entry,) = status["replicas"]
    (paths,) = entry["replicas"].values()
    for path, number in zip(paths, (1, 2, 3), strict=True):
        assert os.path.basename(path) == shard(number)
        assert Path(path).read_bytes() == (folder / shard(number)).read_bytes()
        assert library.load_file(path).keys() <= expected.keys()  # any engine may open it there
    with api.open(paths[1]) as weights:
        check(weights, expected)
    (verified,) = numaload.json("verify", folder / given)
    assert verified["right"]
    assert shard(2) in numaload("status", folder).stdout
    numaload("release", folder / given)
    assert numaload.json("status")["replicas"] == []


def test_a_mirror_of_the_hub_s_cache(
    repository: Path, numaload: Numaload, expected: dict[str, Any]
) -> None:
    snapshot = repository / "snapshots" / HASH
    numaload("mirror", repository)
    with api.attach(snapshot / shard(2)) as mirror:
        check(mirror.view(mirror.nodes[0]), expected)
    numaload("verify", snapshot)
    numaload("release", snapshot / "model.safetensors.index.json")


def test_what_was_prewarmed_is_mirrored_without_being_named(
    folder: Path, numaload: Numaload, expected: dict[str, Any]
) -> None:
    numaload("prewarm", folder)
    (report,) = numaload.json("mirror")
    assert [os.path.basename(path) for path in report["paths"]] == [shard(n) for n in (1, 2, 3)]
    with api.attach(folder) as mirror:
        check(mirror.view(mirror.nodes[0]), expected)


def test_files_that_only_an_index_joins(tmp_path: Path, numaload: Numaload) -> None:
    """Their names say nothing of one another: also not to those who start from one of them."""
    parts = {"first.safetensors": tensors(1), "second.safetensors": tensors(1, 1)}
    where: dict[str, str] = {}
    for name, part in parts.items():
        library.save_file(part, tmp_path / name)
        where |= dict.fromkeys(part, name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    everything = tensors(2)
    with api.open(index) as weights:
        check(weights, everything)
    numaload("mirror", index)
    with api.attach(index) as mirror:
        check(mirror.view(mirror.nodes[0]), everything)
    numaload("verify", index)
    numaload("release", index)
    numaload("prewarm", index)
    (report,) = numaload.json("mirror")
    assert [os.path.basename(path) for path in report["paths"]] == list(parts)


# Files that are not what they say.


def damaged(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return harm


def header(**fields: Any) -> Callable[[Path], None]:
    return damaged(lambda _: sb.build({"t": sb.row(**fields)}))


def twice(_: bytes) -> bytes:
    row = json.dumps(sb.row())
    return sb.frame(f'{{"a":{row},"a":{row}}}', bytes(8))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (damaged(lambda _: b""), "the file is empty"),
    "cut": (damaged(lambda all_: all_[:-1]), "1 bytes are missing"),
    "cut-header": (damaged(lambda all_: all_[:20]), "bytes are missing"),
    "longer": (damaged(lambda all_: all_ + b"x"), "1 bytes after"),
    "huge-header": (damaged(lambda all_: b"\xff" * 8 + all_[8:]), "at most 100000000 are read"),
    "no-json": (damaged(lambda all_: all_[:9] + b"x" + all_[10:]), "at byte"),
    "pickle": (damaged(lambda _: b"\x80\x02}q\x00." * 4), "a pickle"),
    "lfs": (damaged(lambda _: b"version https://git-lfs"), "fetch the real file"),
    "overlap": (header(offsets=(4, 12)), "leaves 4 bytes unused"),
    "size": (header(shape=(3,)), "data_offsets are 8"),
    "overflow": (header(shape=(2**63, 2**63)), "over 2^60 elements"),
    "negative": (header(shape=(-1,)), "expected"),
    "deep": (
        damaged(lambda _: sb.frame('{"a":' + "[" * 100_000)),
        "expected { of tensor 'a'",
    ),
    "twice": (damaged(twice), "'a' appears twice"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_named_errors(tmp_path: Path, numaload: Numaload, kind: str) -> None:
    path = tmp_path / "m.safetensors"
    library.save_file({"t": torch.zeros(2)}, path)
    harm, words = HOSTILE[kind]
    harm(path)
    done = numaload("inspect", path, status=1)
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"numaload: error: {path}: ")
    assert words in line
    for verb in ("plan", "mirror"):
        assert words in numaload(verb, path, status=1).stderr


def old_layout(index: dict[str, Any]) -> None:
    index["weight_map"] = dict.fromkeys(index["weight_map"], "model-00001-of-00009.safetensors")


def other_place(index: dict[str, Any]) -> None:
    index["weight_map"][next(iter(index["weight_map"]))] = shard(3)


def absent_tensor(index: dict[str, Any]) -> None:
    index["weight_map"]["absent"] = shard(3)


@pytest.mark.parametrize("change", [old_layout, other_place, absent_tensor])
def test_an_index_that_is_wrong_is_said_and_the_shards_are_used(
    folder: Path, numaload: Numaload, change: Callable[[dict[str, Any]], None]
) -> None:
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    expected = numaload("inspect", folder, "--json", status=0).stdout
    change(found)
    index.write_text(json.dumps(found))
    for given in ("", index.name, shard(1)):
        done = numaload("inspect", folder / given, "--json", status=0)
        assert done.stdout == expected
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"numaload: warning: {index}: ")


@pytest.mark.parametrize("kind", ["missing", "outside", "twice", "no-map"])
def test_hostile_indexes_are_named_errors(folder: Path, numaload: Numaload, kind: str) -> None:
    index = folder / "model.safetensors.index.json"
    found = json.loads(index.read_text())
    name = next(iter(found["weight_map"]))
    if kind == "missing":
        (folder / shard(2)).unlink()
    elif kind == "outside":
        found["weight_map"][name] = "../../etc/passwd.safetensors"
    elif kind == "twice":
        shutil.copy(folder / shard(1), folder / shard(2))
    else:
        del found["weight_map"]
    index.write_text(json.dumps(found))
    words = {
        "missing": f"1 of 3 shards missing: {folder / shard(2)}",
        "outside": "inside of the folder", "twice": "is in", "no-map": "no weight_map",
    }[kind]  # fmt: skip
    for given in ("", index.name, *([shard(1)] if kind != "no-map" else [])):
        done = numaload("inspect", folder / given, status=1)
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"numaload: error: {folder}")
        assert words in line
