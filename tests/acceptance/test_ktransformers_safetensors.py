"""Classic ktransformers' SafeTensorLoader over numaload, and the choice between loaders.

Files are written by the safetensors package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
import numaload
from numaload import errors
from numaload.backends import ktransformers
from numaload.backends.ktransformers import GGUFLoader, SafeTensorLoader
from numaload.formats.qtypes import QuantType

torch = pytest.importorskip("torch")
library: Any = pytest.importorskip("safetensors.torch")

EXPERTS = "model.layers.3.mlp.experts"
Q = "model.layers.3.self_attn.q_proj.weight"


def made(*shape: int, dtype: Any = None, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype or torch.bfloat16)


def experts(words: tuple[str, str, str], count: int, dtype: Any) -> dict[str, Any]:
    shapes = dict(zip(words, [(8, 16), (8, 16), (16, 8)], strict=True))
    return {
        f"{EXPERTS}.{number}.{word}.weight": made(*shape, dtype=dtype, seed=number)
        for number in range(count)
        for word, shape in shapes.items()
    }


LONG, SHORT = ("up_proj", "gate_proj", "down_proj"), ("up", "gate", "down")
PLAIN = {
    Q: made(8, 16),
    "model.norm.weight": made(16, dtype=torch.float32),
    "blk.4.attn_q.weight": made(4, 4, dtype=torch.float16),
    "scalar": torch.tensor(5, dtype=torch.int32),
    "nothing": torch.empty(0, 4),
    "model.layers.3.mlp.gate.weight": made(3, 16),
    "model.layers.3.mlp.gate.e_score_correction_bias": made(3, dtype=torch.float32),
    "model.layers.4.mlp.gate.weight": made(3, 16),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards as ktransformers' merge scripts name them, from 0, and one in a folder below."""
    model = tmp_path / "model"
    (model / "more").mkdir(parents=True)
    library.save_file(PLAIN, model / "model-00000-of-00003.safetensors")
    library.save_file(experts(LONG, 3, torch.bfloat16), model / "model-00001-of-00003.safetensors")
    library.save_file({"late": made(2)}, model / "more/z.safetensors")
    return model


@pytest.fixture
def loader(folder: Path) -> SafeTensorLoader:
    return SafeTensorLoader(str(folder))


def test_files(loader: SafeTensorLoader, folder: Path) -> None:
    assert loader.tensor_file_map[Q] == "model-00000-of-00003.safetensors"
    assert loader.tensor_file_map["late"] == "z.safetensors"
    assert set(loader.file_handle_map) == set(loader.tensor_file_map.values())
    assert (loader.tensor_type_map, loader.tensor_device_map) == ({}, {})
    assert loader.safetensor_loader is None
    from_file = SafeTensorLoader(folder / "model-00001-of-00003.safetensors")
    assert from_file.tensor_file_map == loader.tensor_file_map


def test_nothing_there(tmp_path: Path) -> None:
    assert SafeTensorLoader(tmp_path).tensor_file_map == {}
    with pytest.raises(FileNotFoundError, match="absent"):
        SafeTensorLoader(tmp_path / "absent")


def test_damaged_files_are_named(folder: Path) -> None:
    path = folder / "model-00001-of-00003.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(errors.FormatError, match=str(path)):
        SafeTensorLoader(folder)


def test_a_name_in_two_folders(folder: Path) -> None:
    library.save_file({"other": made(2)}, folder / "more/model-00000-of-00003.safetensors")
    loader = SafeTensorLoader(folder)
    assert loader.tensor_file_map["other"] == "more/model-00000-of-00003.safetensors"
    assert torch.equal(loader.load_tensor("other"), made(2))
    assert torch.equal(loader.load_tensor(Q), PLAIN[Q])


@pytest.mark.parametrize("name", PLAIN)
def test_load_tensor(loader: SafeTensorLoader, name: str) -> None:
    assert loader.has_tensor(name)
    found = loader.load_tensor(name, device="cpu")
    assert (found.dtype, found.shape) == (PLAIN[name].dtype, PLAIN[name].shape)
    assert torch.equal(found, PLAIN[name])
    found.zero_()  # memory of its own, as from the safetensors package
    assert torch.equal(loader.load_tensor(name), PLAIN[name])
    moved = loader.load_tensor(name, "meta")
    assert (moved.device.type, moved.shape) == ("meta", PLAIN[name].shape)


def test_names_of_hugging_face_find_ggufs(loader: SafeTensorLoader) -> None:
    """Merged files have both; the translated one comes first."""
    name = "model.layers.4.self_attn.q_proj.weight"
    assert loader.has_tensor(name)
    assert torch.equal(loader.load_tensor(name), PLAIN["blk.4.attn_q.weight"])
    assert not loader.has_tensor("model.layers.5.self_attn.q_proj.weight")
    with pytest.raises(KeyError, match=r"no tensor 'model\.layers\.3\.self_attn\.q_pro\.weight'; "):
        loader.load_tensor("model.layers.3.self_attn.q_pro.weight")


@pytest.mark.parametrize("words", [LONG, SHORT], ids=["proj", "short"])
@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_experts_are_stacked(tmp_path: Path, words: tuple[str, str, str], name: str) -> None:
    dtype = getattr(torch, name)
    tensors = experts(words, 5, dtype)
    library.save_file(tensors, tmp_path / "m.safetensors")
    found = SafeTensorLoader(tmp_path).load_experts(EXPERTS)
    kinds = {"bfloat16": QuantType.BF16, "float16": QuantType.F16, "float32": QuantType.F32}
    assert set(found) == {"up", "gate", "down", "up_type", "gate_type", "down_type"}
    for short, word in zip(SHORT, words, strict=True):
        stacked = torch.stack([tensors[f"{EXPERTS}.{n}.{word}.weight"] for n in range(5)])
        expected = stacked.view(torch.uint16).numpy()
        assert found[f"{short}_type"] == kinds[name]
        assert (found[short].dtype, found[short].shape) == (np.uint16, expected.shape)
        np.testing.assert_array_equal(found[short], expected)


def test_experts_that_cannot_be_stacked(tmp_path: Path) -> None:
    tensors = experts(LONG, 2, torch.bfloat16)
    tensors[f"{EXPERTS}.1.gate_proj.weight"] = made(8, 17)
    path = tmp_path / "m.safetensors"
    library.save_file(tensors, path)
    with pytest.raises(errors.TensorInfoError, match=r"1\.gate_proj.*\(8, 17\), expected as"):
        SafeTensorLoader(tmp_path).load_experts(EXPERTS)
    with pytest.raises(FileNotFoundError, match=r"no experts 'model\.layers\.9\.mlp\.experts'"):
        SafeTensorLoader(tmp_path).load_experts("model.layers.9.mlp.experts")
    del tensors[f"{EXPERTS}.1.gate_proj.weight"]
    library.save_file(tensors, path)
    with pytest.raises(KeyError, match=r"1\.gate_proj"):
        SafeTensorLoader(tmp_path).load_experts(EXPERTS)
    library.save_file(experts(LONG, 2, torch.float8_e4m3fn), path)
    with pytest.raises(NotImplementedError, match="F8_E4M3 experts have no GGML type"):
        SafeTensorLoader(tmp_path).load_experts(EXPERTS)


def test_experts_of_merged_files_are_blocks(tmp_path: Path) -> None:
    """As merge_safetensor_gguf.py writes them: flat blocks, and their type beside them."""
    kinds = {"up": 12, "gate": 12, "down": 14}
    blocks = {name: torch.arange(kind * 16, dtype=torch.uint8) for name, kind in kinds.items()}
    tensors = {f"blk.3.ffn_{name}_exps.weight": data for name, data in blocks.items()}
    types = {f"blk.3.ffn_{n}_exps.ggml_type": torch.tensor(k) for n, k in kinds.items()}
    library.save_file(tensors | types, tmp_path / "m.safetensors")
    loader = SafeTensorLoader(tmp_path)
    for key in ("blk.3", EXPERTS):
        found = loader.load_experts(key)
        for name, kind in kinds.items():
            assert (found[f"{name}_type"], type(found[f"{name}_type"])) == (kind, int)
            np.testing.assert_array_equal(found[name], blocks[name].numpy())
            assert not found[name].flags.writeable  # zero-copy: C++ takes the address
    again = loader.load_experts("blk.3")["down"]
    assert again.ctypes.data == found["down"].ctypes.data


def test_gate(loader: SafeTensorLoader) -> None:
    gate, bias = "weight", "e_score_correction_bias"
    found = loader.load_gate("model.layers.3.mlp.gate", device="cpu")
    assert torch.equal(found[gate], PLAIN["model.layers.3.mlp.gate.weight"])
    assert torch.equal(found[bias], PLAIN["model.layers.3.mlp.gate.e_score_correction_bias"])
    found = loader.load_gate("model.layers.4.mlp.gate")
    assert torch.equal(found[gate], PLAIN["model.layers.4.mlp.gate.weight"])
    assert found[bias] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 384), (130, 260), (1, 1)], ids=str)
def test_scaled_fp8_becomes_float(tmp_path: Path, shape: tuple[int, int], dtype: Any) -> None:
    weights = made(*shape, dtype=torch.float8_e4m3fn)
    scales = made(-(-shape[0] // 128), -(-shape[1] // 128), dtype=torch.float32, seed=1)
    # In files of their own: the original looks for scales beside the weights only.
    library.save_file({Q: weights, "plain.weight": weights.clone()}, tmp_path / "a.safetensors")
    library.save_file({Q + "_scale_inv": scales}, tmp_path / "b.safetensors")
    rows, columns = (torch.arange(size) // 128 for size in shape)
    expected = weights.to(torch.float32) * scales[rows][:, columns]
    loader = SafeTensorLoader(tmp_path)
    torch.set_default_dtype(dtype)
    try:
        found = loader.load_dequantized_tensor(Q)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == dtype
    assert torch.equal(found, expected.to(dtype))
    assert loader.load_dequantized_tensor("plain.weight").dtype == torch.float8_e4m3fn
    assert torch.equal(loader.load_dequantized_tensor(Q + "_scale_inv"), scales)


def test_scales_of_another_size(tmp_path: Path) -> None:
    weights = made(130, 8, dtype=torch.float8_e4m3fn)
    tensors = {Q: weights, Q + "_scale_inv": torch.ones(3, 1)}
    library.save_file(tensors, tmp_path / "a.safetensors")
    words = r"shape \(3, 1\) for \(130, 8\), expected blocks of 128x128"
    with pytest.raises(errors.UnsupportedTypeError, match=words):
        SafeTensorLoader(tmp_path).load_dequantized_tensor(Q)


def test_close_all_handles(loader: SafeTensorLoader) -> None:
    found = loader.load_tensor(Q)
    loader.close_all_handles()
    assert loader.file_handle_map == {}
    assert loader.has_tensor(Q)
    with pytest.raises(FileNotFoundError, match=r"model-00000-of-00003\.safetensors was closed"):
        loader.load_tensor(Q)
    assert torch.equal(found, PLAIN[Q])


@pytest.fixture
def own_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""


def test_a_replica(own_store: None, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    library.save_file({"blk.3.ffn_gate_exps.weight": torch.arange(99, dtype=torch.uint8)}, path)
    with numaload.mirror(path, shared=True) as mirror:
        loader = SafeTensorLoader(tmp_path, replica=mirror)
        (weights,) = loader.file_handle_map.values()
        assert weights is mirror.local()
        loader.close_all_handles()
        assert mirror.local()["blk.3.ffn_gate_exps.weight"].buffer[98] == 98


# ModelLoaderFactory


def test_safetensors_come_before_gguf(folder: Path) -> None:
    create = ktransformers.ModelLoaderFactory.create_loader
    gb.write_good(folder / "a.gguf", {"t": (QuantType.F32, np.ones(4, np.float32))})
    assert type(create(str(folder))) is SafeTensorLoader
    assert type(create(folder / "a.gguf")) is GGUFLoader
    assert type(create(folder / "more/z.safetensors")) is SafeTensorLoader
    (folder / "config.json").write_text("{}")
    assert type(create(folder / "config.json")) is SafeTensorLoader
