"""The point "Every GGUF: any alignment, all metadata types, all type ids and the foreign ranges;
splits named by symlinks, an empty first split, missing or foreign splits named; big-endian files".
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import gguf_builder as gb
import numaload as api
import seeds
from commands import Numaload
from numaload import errors
from numaload.formats.qtypes import BLOCKS, QuantType

VALUES = np.arange(-64, 64, dtype=np.float32).reshape(4, 32) / 4


def write(path: Path, **options: Any) -> list[str]:
    """Five tensors by the gguf package; the paths of all files."""
    alignment = options.pop("alignment", 32)
    writer = gguf.GGUFWriter(str(path), "llama", **options)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_string("general.name", path.stem)
    for number in range(5):
        writer.add_tensor(f"blk.{number}.weight", VALUES + number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(str(p) for p in path.parent.glob(f"{path.stem}*.gguf"))


def check(weights: api.Weights) -> None:
    assert list(weights) == [f"blk.{number}.weight" for number in range(5)]
    for number, tensor in enumerate(weights.values()):
        np.testing.assert_array_equal(tensor.dequantize(), VALUES + number)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096, 1 << 20])
def test_any_alignment(tmp_path: Path, alignment: int) -> None:
    (path,) = write(tmp_path / "m.gguf", alignment=alignment)
    with api.open(path) as weights:
        check(weights)
        assert all(tensor.offset % alignment == 0 for tensor in weights.values())


def test_values_of_all_types(numaload: Numaload, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(seeds.every_value())
    found = numaload.json("inspect", path, "--metadata")["metadata"]
    for type_id, values in seeds.VALUES.items():
        assert found[f"one.{type_id}"] == values[0]
        assert found[f"all.{type_id}"] == values
        assert found[f"none.{type_id}"] == []
    assert found["tokens"][:2] == ["", "größer"]
    lines = numaload("inspect", path, "--metadata").stdout
    assert "empty (string) = ''" in lines
    assert "none.0 (array of u8) = []" in lines


def test_every_type_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(seeds.every_qtype())
    with api.open(path) as weights:
        for qtype, (_, type_size) in BLOCKS.items():
            tensor = weights[f"blk.0.{qtype.name}"]
            assert (tensor.qtype, tensor.blocks.shape) == (qtype, (1, type_size))
        assert {QuantType.Q1_0, QuantType.Q2_0} <= {tensor.qtype for tensor in weights.values()}


FOREIGN = {
    4: "Q4_2 or Q4_3, removed from ggml in 2023",
    32: "a Q4_0 repacked for ARM",
    36: "IQ4_NL_4_4, removed from ggml in 2024, or I2_S of ik_llama.cpp",
    38: "IQ4_NL_4_8 or IQ4_NL_8_8, removed from ggml in 2024",
    66: "of TurboQuant",
    98: "of ik_llama.cpp",
    101: "of ROCmFPX",
    137: "of ik_llama.cpp",
    142: "PQ2_0 of Prism",
    143: "PTQ1_0 of Prism",
    144: "IQ4_KS of ik_llama.cpp, or of Prism",
    230: "of ik_llama.cpp, its rows interleaved",
    1000: "unknown to this numaload",
}


@pytest.mark.parametrize("type_id", FOREIGN)
def test_a_foreign_type_is_named_and_spoils_one_tensor_only(
    numaload: Numaload, tmp_path: Path, type_id: int
) -> None:
    path = tmp_path / "m.gguf"
    rows = [gb.tensor("odd", (256,), type_id), gb.tensor("t", (32,), offset=1024)]
    path.write_bytes(gb.build([], rows, bytes(1024) + VALUES[0].tobytes()))
    with api.open(path) as weights:
        for use in ("qtype", "blocks", "address", "dequantize"):
            with pytest.raises(errors.UnknownQuantTypeError) as caught:
                getattr(weights["odd"], use)()
            assert "tensor 'odd' cannot be used" in str(caught.value)
            assert f"type {type_id} is {FOREIGN[type_id]}" in str(caught.value)
        np.testing.assert_array_equal(weights["t"].dequantize(), VALUES[0])
    shown = numaload("inspect", path)
    assert f":{type_id} " in shown.stdout
    assert FOREIGN[type_id] in shown.stderr
    kinds = {t["name"]: t["qtype"] for t in numaload.json("inspect", path)["tensors"]}
    assert (kinds["odd"].split(":")[1], kinds["t"]) == (str(type_id), "F32")


@pytest.fixture
def hub(tmp_path: Path) -> list[str]:
    """A model in three files as the hub's cache has it; the links."""
    links = []
    for number, path in enumerate(write(tmp_path / "m.gguf", split_max_tensors=2)):
        blob = tmp_path / "models--m" / "blobs" / f"{number}f3a9"
        link = tmp_path / "models--m" / "snapshots" / "1a2b" / Path(path).name
        blob.parent.mkdir(parents=True, exist_ok=True)
        link.parent.mkdir(parents=True, exist_ok=True)
        os.rename(path, blob)
        link.symlink_to(f"../../blobs/{blob.name}")
        links.append(str(link))
    return links


@pytest.mark.parametrize("number", [0, 1, 2])
def test_any_link_of_a_hub_cache(hub: list[str], number: int) -> None:
    with api.open(hub[number]) as weights:
        assert weights.paths == hub
        check(weights)


def test_a_link_to_a_link_of_a_hub_cache(hub: list[str], tmp_path: Path) -> None:
    (tmp_path / "latest.gguf").symlink_to(hub[1])
    with api.open(tmp_path / "latest.gguf") as weights:
        assert weights.paths == hub
        check(weights)
    assert api.prewarm(str(tmp_path / "latest.gguf")).paths == hub


def test_a_blob_of_a_hub_cache_says_what_to_open(hub: list[str], numaload: Numaload) -> None:
    done = numaload("inspect", os.path.realpath(hub[1]), status=1)
    assert "part of 3 split files" in done.stderr
    assert "open the link to it in ../snapshots" in done.stderr


def test_files_in_any_order_are_one_model(hub: list[str], numaload: Numaload) -> None:
    one = numaload.json("plan", hub[0])
    all_of_them = numaload.json("plan", hub[2], hub[0], hub[1])
    assert [len(plan["builds"]) for plan in (one, all_of_them)] == [1, 1]
    report = api.prewarm([hub[2], hub[0], hub[1], os.path.realpath(hub[0])])
    assert sorted(map(os.path.realpath, report.paths)) == sorted(map(os.path.realpath, hub))


def test_an_empty_first_split(tmp_path: Path, numaload: Numaload) -> None:
    """gguf-split --no-tensor-first-split: the first file has all metadata and no tensor."""
    paths = write(tmp_path / "m.gguf", split_max_tensors=3, small_first_shard=True)
    assert len(paths) == 3
    for path in paths:
        with api.open(path) as weights:
            assert [len(part.header.tensors) for part in weights.parts] == [0, 3, 2]
            assert weights.metadata["general.name"] == "m"
            check(weights)
    assert "m-00001-of-00003.gguf: GGUF v3, 0 tensors" in numaload("inspect", paths[1]).stdout
    assert numaload.json("prewarm", paths[2])["done"]


def foreign_split(folder: Path) -> list[str]:
    """A model whose second file is the second file of another one."""
    paths = write(folder / "m.gguf", split_max_tensors=2)
    other = folder / "other"
    other.mkdir()
    shutil.copy(write(other / "o.gguf", split_max_tensors=3)[1], paths[1])
    return paths


def test_splits_that_are_missing_foreign_or_doubled_are_named(tmp_path: Path) -> None:
    paths = foreign_split(tmp_path)
    with pytest.raises(
        errors.SplitError, match=r"expected split\.no 1 of 3, found 1 of 2"
    ) as caught:
        api.open(paths[0])
    assert caught.value.path == paths[1]
    shutil.copy(paths[0], paths[1])
    with pytest.raises(errors.SplitError, match=r"expected split\.no 1 of 3, found 0 of 3"):
        api.open(paths[2])
    os.remove(paths[1])
    with pytest.raises(errors.SplitError, match=r"1 of 3 split files missing: .*00002-of-00003"):
        api.open(paths[2])


def split_by_hand(path: Path, number: int, *entries: bytes, names: str) -> None:
    """Split ``number`` of two, with a tensor for each letter."""
    keys = [("no", number), ("count", 2)]
    splits = [gb.entry(f"split.{k}", gb.U16, gb.scalar(gb.U16, n)) for k, n in keys]
    rows = [gb.tensor(name, (8,), offset=32 * i) for i, name in enumerate(names)]
    path.write_bytes(gb.build([*splits, *entries], rows))


@pytest.mark.parametrize(
    ("entry", "names", "words"),
    [
        (
            seeds.text("general.architecture", "qwen2"),
            "b",
            "general.architecture is 'qwen2', there",
        ),
        (gb.u32("split.tensors.count", 3), "b", "split.tensors.count is 3, there 2"),
        (gb.u32("split.tensors.count", 2), "bc", "2 tensors announced, the files hold 3"),
        (gb.u32("split.tensors.count", 2), "a", "tensor 'a' is in "),
    ],
    ids=["architecture", "count", "sum", "twice"],
)
def test_a_sibling_of_another_model(tmp_path: Path, entry: bytes, names: str, words: str) -> None:
    paths = [tmp_path / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    first = [seeds.text("general.architecture", "llama"), gb.u32("split.tensors.count", 2)]
    split_by_hand(paths[0], 0, *first, names="a")
    split_by_hand(paths[1], 1, entry, names=names)
    for path in paths:
        with pytest.raises(errors.SplitError) as caught:
            api.open(path)
        assert words in str(caught.value)
        assert str(paths[0]) in str(caught.value)


def test_splits_that_do_not_say_their_alignment(tmp_path: Path) -> None:
    """As the gguf package writes them. llama.cpp reads such weights from the wrong place."""
    paths = write(tmp_path / "m.gguf", split_max_tensors=2, alignment=4096)
    with pytest.raises(errors.SplitError, match=r"aligned to 4096 as .*00001-of-00003") as caught:
        api.open(paths[0])
    assert caught.value.path == paths[1]


BIG: dict[str, tuple[NDArray[Any], str]] = {
    "F32": (VALUES, ">f4"),
    "F16": (VALUES.astype(np.float16), ">f2"),
    "BF16": (VALUES.astype(ml_dtypes.bfloat16).view(np.uint16), ">u2"),
    "I8": (np.arange(128, dtype=np.int8).reshape(4, 32), ">i1"),
    "I16": (np.arange(128, dtype=np.int16).reshape(4, 32), ">i2"),
    "I32": (np.arange(128, dtype=np.int32).reshape(4, 32), ">i4"),
    "I64": (np.arange(128, dtype=np.int64).reshape(4, 32), ">i8"),
    "F64": (VALUES.astype(np.float64), ">f8"),
    "Q8_0": (np.zeros((4, 34), np.uint8), ">u1"),
}


@pytest.fixture
def big(tmp_path: Path) -> str:
    writer = gguf.GGUFWriter(str(tmp_path / "big.gguf"), "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_uint32("llama.block_count", 7)
    writer.add_array("scores", [0.5, -1.0])
    for name, (values, _) in BIG.items():
        kind = gguf.GGMLQuantizationType[name]
        # Of these the writer takes the numbers as such, of all others the bytes.
        plain = values.dtype.kind in "fi"
        raw = values if plain else values.view(np.uint16 if name == "BF16" else np.uint8)
        shape = values.shape if name == "BF16" else None
        writer.add_tensor(name, raw, raw_shape=shape, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(tmp_path / "big.gguf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_floats_of_a_big_endian_file(big: str, name: str, dtype: str) -> None:
    with api.open(big) as weights:
        tensor = weights[name]
        expected = VALUES.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
        np.testing.assert_array_equal(tensor.dequantize(dtype), expected)
        np.testing.assert_array_equal(tensor.dequantize(dtype, rows=(1, 3)), expected[1:3])


@pytest.mark.parametrize("name", BIG)
def test_blocks_of_a_big_endian_file_are_its_bytes(big: str, name: str) -> None:
    values, kind = BIG[name]
    with api.open(big) as weights:
        tensor = weights[name]
        assert (tensor.byte_order, tensor.type_name) == ("big", name)
        assert tensor.blocks.tobytes() == values.astype(kind).tobytes()
        if name not in {"F32", "F16", "BF16"}:
            with pytest.raises(errors.UnsupportedTypeError, match=f"'{name}': {name} of a big-"):
                tensor.dequantize()


def test_metadata_of_a_big_endian_file(big: str, numaload: Numaload) -> None:
    with api.open(big) as weights:
        assert weights.metadata["llama.block_count"] == 7
        assert weights.metadata["scores"] == [0.5, -1.0]
    assert f"{big}: GGUF v3 big-endian, {len(BIG)} tensors" in numaload("inspect", big).stdout
    (file,) = numaload.json("inspect", big)["files"]
    assert (file["byte_order"], file["version"], file["alignment"]) == ("big", 3, 32)
    assert file["size"] == os.path.getsize(big)
