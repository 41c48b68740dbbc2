"""ComfyUI-GGUF's loaders and those of vLLM's GGUF plugin, as published, on both readers.

ComfyUI-GGUF has no package: NUMALOAD_COMFYUI_GGUF names a checkout. Of ComfyUI and vLLM themselves
these loaders take a logger and base classes; those stand here as empty modules.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import numaload
from numaload.backends import gguf_reader
from numaload.formats.qtypes import QuantType
from numaload.samples import random_blocks

pytestmark = pytest.mark.usefixtures("store")

KINDS = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_K", "Q6_K", "IQ4_XS")
HEADS, WIDTH = 2, 256
Load = Callable[[str], dict[str, Any]]


def module(name: str, monkeypatch: pytest.MonkeyPatch, **members: Any) -> ModuleType:
    made = ModuleType(name)
    vars(made).update(members)
    monkeypatch.setitem(sys.modules, name, made)
    return made


def imported(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    places = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=places)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, made)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    checkout = os.environ.get("NUMALOAD_COMFYUI_GGUF")
    if not checkout:
        pytest.skip("NUMALOAD_COMFYUI_GGUF does not say where a checkout of ComfyUI-GGUF is")
    layers = {
        n: type(n, (), {}) for n in ("Linear", "Conv2d", "Embedding", "LayerNorm", "GroupNorm")
    }
    ops = module("comfy.ops", monkeypatch, manual_cast=type("manual_cast", (), layers))
    rest = {n: module(f"comfy.{n}", monkeypatch) for n in ("lora", "model_management")}
    module("comfy", monkeypatch, ops=ops, **rest)
    package = module("comfyui_gguf", monkeypatch)
    package.__path__ = [checkout]
    yield imported("comfyui_gguf.loader", Path(checkout, "loader.py"), monkeypatch)
    for name in [n for n in sys.modules if n.startswith("comfyui_gguf.")]:
        del sys.modules[name]


@pytest.fixture
def vllm_plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    found = importlib.util.find_spec("vllm_gguf_plugin")
    if found is None or found.origin is None:
        pytest.skip("vllm-gguf-plugin is not installed: scripts/clients installs it")
    module(
        "vllm",
        monkeypatch,
        logger=module("vllm.logger", monkeypatch, init_logger=logging.getLogger),
    )
    file = Path(found.origin).parent / "weight_utils.py"
    return imported("vllm_gguf_weight_utils", file, monkeypatch)


def write(path: Path, architecture: str) -> str:
    """A model of every kind that these loaders tell apart, with a vocabulary and merges."""
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_block_count(1)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_array("comfy.gguf.orig_shape.blk.0.ffn_F16.weight", [2, 128, WIDTH // 64])
    writer.add_token_list([f"tok{number}" for number in range(4)])
    writer.add_token_types([1] * 4)
    writer.add_token_merges(["t o", "to k"])
    rng = np.random.default_rng(0)
    for kind in KINDS:
        blocks = random_blocks(QuantType[kind], 4, WIDTH, rng)
        raw = gguf.GGMLQuantizationType[kind]
        if kind in ("F32", "F16"):
            blocks = blocks.view(np.float32 if kind == "F32" else np.float16)
        writer.add_tensor(f"blk.0.ffn_{kind}.weight", blocks, raw_dtype=raw)
    for name in ("attn_q", "attn_k"):
        writer.add_tensor(f"blk.0.{name}.weight", rng.random((64, 4), np.float32))
    writer.add_tensor("token_embd.weight", rng.random((4, 8), np.float32))
    norm = rng.integers(0, 1 << 14, 6).astype(np.uint16).view(np.uint8)
    writer.add_tensor("blk.0.attn_norm.weight", norm, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def bits(tensor: Any) -> Any:
    return tensor.as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)


def assert_same(load: Load, path: str) -> None:
    """What it loads with gguf-py's reader, it loads with ours, and from a folder of the store."""
    theirs = load(path)
    with gguf_reader.install() as done:
        assert "gguf.GGUFReader" in done.places
        assert_equal(load(path), theirs)
    numaload.mirror(path, nodes="local", shared=True).close()
    stored = os.path.join(numaload.store.folder(path), os.path.basename(path))
    assert_equal(load(stored), theirs)


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert list(ours) == list(theirs)
    assert len(ours) > 8
    for name, tensor in theirs.items():
        found = ours[name]
        assert type(found) is type(tensor)
        assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape), name
        for said in ("tensor_type", "tensor_shape"):
            assert getattr(found, said, None) == getattr(tensor, said, None), name
        assert torch.equal(bits(found), bits(tensor)), name


def test_comfyuis_loader_of_image_models(comfyui: Any, tmp_path: Path) -> None:
    assert_same(comfyui.gguf_sd_loader, write(tmp_path / "m.gguf", "flux"))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_comfyuis_loader_of_text_models(comfyui: Any, tmp_path: Path, architecture: str) -> None:
    assert_same(comfyui.gguf_clip_loader, write(tmp_path / "m.gguf", architecture))


def test_vllms_iterator(vllm_plugin: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", "llama")
    assert_same(lambda given: dict(vllm_plugin.gguf_quant_weights_iterator(given, None)), path)
    theirs = vllm_plugin.get_gguf_unquantized_params([path])
    names = {f"blk.0.ffn_{kind}.weight": f"model.{kind}" for kind in KINDS}
    kinds = vllm_plugin.get_gguf_weight_type_map(path, names)
    with gguf_reader.install():
        assert sorted(vllm_plugin.get_gguf_unquantized_params([path])) == sorted(theirs)
        assert vllm_plugin.get_gguf_weight_type_map(path, names) == kinds
        assert vllm_plugin.get_gguf_extra_tensor_names(path, names | {"no": "x"}) == ["x"]
