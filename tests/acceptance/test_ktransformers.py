"""Classic ktransformers' loaders over numaload: its contract, member by member.

ktransformers itself cannot be installed here (it builds CUDA extensions); what its loaders do was
read in its source, and run, once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
import numaload
import seeds
from ktransformers_model import (
    DOWN,
    EXPERTS,
    GATE,
    HIDDEN,
    INNER,
    NORM,
    TENSORS,
    UP,
    K,
    Q,
    floats,
    write_model,
)
from numaload import errors
from numaload.backends import ktransformers
from numaload.backends.ktransformers import GGUFLoader, SafeTensorLoader
from numaload.formats.qtypes import BLOCKS, QuantType

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch tensors of weights share read-only memory")

BYTES = np.dtype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture
def loader(folder: Path) -> GGUFLoader:
    return GGUFLoader(str(folder))


# GGUFLoader(gguf_path), gguf_path, the walk


def test_a_file_stands_for_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder, folder / "m-00001-of-00002.gguf", str(folder / "m-00002-of-00002.gguf")):
        loader = GGUFLoader(path)
        assert loader.gguf_path == str(folder)
        assert list(loader.tensor_file_map) == [*TENSORS, "late.weight"]
    monkeypatch.chdir(folder)
    assert GGUFLoader("m-00001-of-00002.gguf").gguf_path == str(folder)


def test_folders_below_are_walked_and_the_last_one_counts(folder: Path) -> None:
    again = {"late.weight": (QuantType.F32, np.zeros(4, np.float32))}
    gb.write_good(folder / "more/zz.gguf", again, {"llama.block_count": 8})
    loader = GGUFLoader(folder)
    assert loader.tensor_file_map["late.weight"] == str(folder / "more/zz.gguf")
    assert loader.load_gguf_tensor("late.weight").tolist() == [0] * 4
    assert loader.gguf_file_meta["llama.block_count"] == 8


def test_nothing_there_is_a_file_not_found_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=str(path)) as caught:
            GGUFLoader(path)
        assert isinstance(caught.value, errors.ModelNotFoundError)


def test_damaged_files_are_named(folder: Path) -> None:
    (folder / "more/broken.gguf").write_bytes(gb.build(n_tensors=gb.HUGE))
    with pytest.raises(errors.TruncatedError, match=r"broken\.gguf: .* tensors announced"):
        GGUFLoader(folder)


def test_splits_behind_links(folder: Path, tmp_path: Path) -> None:
    """As in the hub's cache: each split is one entry of the maps, once."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in folder.glob("*.gguf"):
        (cache / path.name).symlink_to(path)
    loader = GGUFLoader(cache)
    assert len(loader.file_data_map) == 2
    assert set(loader.tensor_file_map) == set(TENSORS)
    assert set(loader.tensor_file_map.values()) == set(loader.file_data_map)


# tensor_info, tensor_file_map, file_data_map, gguf_file_meta, the rest of the attributes


def test_tensor_info(loader: GGUFLoader) -> None:
    info = loader.tensor_info[GATE]
    assert info["ggml_type"] == 12
    assert type(info["ggml_type"]) is int
    assert (info["shape"], type(info["shape"])) == ([HIDDEN, INNER, EXPERTS], list)
    assert info["item_type"] is np.uint8
    assert info["item_count"] == EXPERTS * INNER * HIDDEN // 256 * 144
    assert info["np_dims"] == (EXPERTS, INNER, HIDDEN // 256 * 144)
    data = loader.file_data_map[loader.tensor_file_map[GATE]]
    assert data[info["offset"] :][:4].tolist() == TENSORS[GATE][1].ravel()[:4].tolist()
    assert info["bad_offset"] == 0
    second = loader.tensor_info[UP]
    assert second["offset"] - info["offset"] == second["bad_offset"] >= info["item_count"]
    plain = {name: loader.tensor_info[name] for name in (Q, K, NORM)}
    assert [info["item_type"] for info in plain.values()] == [np.float32, np.float16, np.uint8]
    assert [info["item_count"] for info in plain.values()] == [128, 64, 16]
    assert [info["np_dims"] for info in plain.values()] == [(16, 8), (8, 8), (16,)]


def test_every_type_has_its_row(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(seeds.every_qtype())
    loader = GGUFLoader(tmp_path)
    for qtype, (block_size, type_size) in BLOCKS.items():
        info = loader.tensor_info[f"blk.0.{qtype.name}"]
        assert (info["ggml_type"], info["shape"]) == (qtype, [block_size])
        assert np.dtype(info["item_type"]).itemsize * info["item_count"] == type_size
        assert loader.get_mmap_tensor(f"blk.0.{qtype.name}").size == type_size


def test_files(loader: GGUFLoader, folder: Path) -> None:
    paths = [str(folder / name) for name in
             ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "more/z.gguf")]  # fmt: skip
    assert list(loader.file_data_map) == paths
    for path, data in loader.file_data_map.items():
        assert (data.dtype, data.ndim, data.flags.writeable) == (BYTES, 1, False)
        assert data.tobytes() == Path(path).read_bytes()
    assert [loader.tensor_file_map[name] for name in (GATE, NORM, "late.weight")] == paths
    assert "model.layers.0.mlp.experts.ffn_gate_exps.weight" not in loader.tensor_file_map


def test_metadata_are_plain_values(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(1000)]
    words = gb.array(gb.STRING, *map(gb.string, tokens))
    entries = [gb.entry("tokens", gb.ARRAY, words), gb.u32("n", 5), seeds.text("name", "größer")]
    (tmp_path / "m.gguf").write_bytes(gb.build(entries, [gb.tensor("t")]))
    meta = GGUFLoader(tmp_path).gguf_file_meta
    assert meta == {"tokens": tokens, "n": 5, "name": "größer"}
    assert [type(value) for value in meta.values()] == [list, int, str]


def test_attributes_that_others_use(loader: GGUFLoader) -> None:
    assert loader.safetensor_loader is None
    assert loader.tensor_device_map == {}
    loader.tensor_device_map["blk.0"] = {"generate_device": "cpu"}
    assert GGUFLoader(loader.gguf_path).tensor_device_map == {}
    assert SafeTensorLoader not in type(loader).mro()


# has_tensor, get_ggml_type, get_mmap_tensor, get_undequanted_tensor_and_ggml_type

SAME = {
    GATE: "model.layers.0.mlp.experts.ffn_gate_exps.weight",
    Q: "model.layers.0.self_attn.q_proj.weight",
    NORM: "model.layers.0.input_layernorm.weight",
}


@pytest.mark.parametrize("name", SAME)
def test_names_are_translated_first(loader: GGUFLoader, name: str) -> None:
    other = SAME[name]
    assert loader.has_tensor(name)
    assert loader.has_tensor(other)
    assert loader.get_ggml_type(other) == loader.get_ggml_type(name) == TENSORS[name][0]
    assert loader.get_mmap_tensor(other).ctypes.data == loader.get_mmap_tensor(name).ctypes.data
    assert torch.equal(loader.load_gguf_tensor(other), loader.load_gguf_tensor(name))


def test_missing_tensors_are_key_errors(loader: GGUFLoader) -> None:
    assert not loader.has_tensor("model.layers.9.self_attn.q_proj.weight")
    uses: list[Any] = [
        loader.get_ggml_type, loader.get_mmap_tensor, loader.load_gguf_tensor,
        loader.get_undequanted_tensor_and_ggml_type,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(KeyError, match=r"no tensor 'blk\.9\.attn_q\.weight'; close: blk\.0"):
            use("model.layers.9.self_attn.q_proj.weight")


@pytest.mark.parametrize("name", TENSORS)
def test_mmap_tensors_are_flat_bytes_zero_copy(loader: GGUFLoader, name: str) -> None:
    data = loader.get_mmap_tensor(name)
    assert (data.dtype, data.ndim, data.flags.writeable) == (BYTES, 1, False)
    assert data.tobytes() == TENSORS[name][1].tobytes()
    whole = loader.file_data_map[loader.tensor_file_map[name]]
    assert np.shares_memory(data, whole)
    assert data.ctypes.data == whole.ctypes.data + loader.tensor_info[name]["offset"]
    tensor, type_id = loader.get_undequanted_tensor_and_ggml_type(name)
    assert (tensor.dtype, tensor.ndim, type_id) == (torch.uint8, 1, TENSORS[name][0])
    assert (tensor.data_ptr(), tensor.numel()) == (data.ctypes.data, data.size)


def test_blocks_outlive_the_loader_and_its_close(folder: Path) -> None:
    loader = GGUFLoader(folder)
    data = loader.get_mmap_tensor(GATE)
    loader.close()
    with pytest.raises(errors.ClosedError):
        loader.load_gguf_tensor(GATE)
    del loader
    assert data.tobytes() == TENSORS[GATE][1].tobytes()


def test_load_gguf_adds_an_opened_file(loader: GGUFLoader, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    gb.write_good(path, {"other.weight": (QuantType.F32, np.ones(4, np.float32))})
    with path.open("rb") as file:
        loader.load_gguf(file)
    assert loader.has_tensor("other.weight")
    assert loader.tensor_file_map["other.weight"] == str(path)
    assert loader.load_gguf_tensor("other.weight").tolist() == [1] * 4


# Replicas


@pytest.fixture
def own_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""


def test_blocks_are_in_the_replica(own_store: None, folder: Path) -> None:
    path = folder / "m-00001-of-00002.gguf"
    with numaload.open(path) as weights, numaload.mirror(weights, shared=True) as mirror:
        for replica in (mirror, mirror.local(), [mirror]):
            loader = GGUFLoader(folder, replica=replica)
            for name in TENSORS:
                address = mirror.local()[name].address
                assert loader.get_mmap_tensor(name).ctypes.data == address != weights[name].address
                tensor, _ = loader.get_undequanted_tensor_and_ggml_type(name)
                assert tensor.data_ptr() == address
            assert torch.equal(loader.load_gguf_tensor(DOWN), floats(DOWN))
            assert loader.load_gguf_tensor("late.weight").tolist() == [1] * 4  # has no replica
            loader.close()
            assert mirror.local()[GATE].buffer.nbytes  # the caller's, still open


def test_a_replica_of_another_model(own_store: None, folder: Path, tmp_path: Path) -> None:
    other = shutil.copy(folder / "more/z.gguf", tmp_path / "z.gguf")
    with (
        numaload.mirror(other, shared=True) as mirror,
        pytest.raises(errors.UsageError, match=r"replica of .*z\.gguf: none of its files is below"),
    ):
        GGUFLoader(folder, replica=mirror)


def test_the_factory_knows_gguf(folder: Path) -> None:
    create = ktransformers.ModelLoaderFactory.create_loader
    for path in (folder, folder / "m-00001-of-00002.gguf", folder / "more"):
        assert type(create(str(path))) is GGUFLoader
    (folder / "empty").mkdir()
    for path in (folder / "empty", folder / "absent"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            create(path)
