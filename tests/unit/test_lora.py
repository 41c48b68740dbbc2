"""LoRA adapters: recognized, put together to pairs, named as PEFT names them; or refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import lora_files as lf
from numaload import errors
from numaload.backends.lora import open_adapter
from numaload.backends.lora_names import half_of
from numaload.errors import AdapterError

WRITERS: dict[str, tuple[Callable[[Path], Path], str, float | None, str | None, list[str]]] = {
    "peft": (lf.peft_folder, "peft", lf.ALPHA, "org/base", lf.MODULES),
    "peft-file": (lf.peft_file, "peft", lf.ALPHA, "org/base", lf.MODULES),
    "bare": (lf.bare, "peft", None, None, lf.MODULES),
    "kohya": (lf.kohya, "kohya", lf.ALPHA, None, lf.KOHYA),
    "diffusers": (lf.diffusers, "diffusers", None, None, lf.DIFFUSERS),
    "gguf": (lf.gguf_file, "gguf", lf.ALPHA, "Base", lf.TENSORS),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_an_adapter_is_recognized(tmp_path: Path, kind: str) -> None:
    write, expected, alpha, base, modules = WRITERS[kind]
    with open_adapter(write(tmp_path)) as adapter:
        assert (adapter.kind, adapter.rank, adapter.alpha) == (expected, lf.RANK, alpha)
        assert adapter.scaling == (1.5 if alpha else 1.0)
        assert adapter.base_model == base
        assert list(adapter.pairs) == modules
        assert adapter.others == []
        for pair in adapter.pairs.values():
            assert pair.a.shape == (lf.RANK, lf.WIDTH)
            assert pair.b.shape == (lf.ROWS, lf.RANK)
            assert (pair.rank, pair.alpha, pair.scaling) == (lf.RANK, alpha, adapter.scaling)
        assert expected in repr(adapter)


def test_target_modules(tmp_path: Path) -> None:
    with open_adapter(lf.peft_folder(tmp_path)) as adapter:
        assert adapter.target_modules == ["q_proj", "v_proj"]
    with open_adapter(lf.gguf_file(tmp_path)) as adapter:
        assert adapter.target_modules == ["attn_q", "attn_v"]
    with open_adapter(lf.write_peft(tmp_path / "b", target_modules=r".*\.(q|v)_proj")) as adapter:
        assert adapter.target_modules == [r".*\.(q|v)_proj"]


NAMES = {
    "base_model.model.a.b.lora_A.weight": ("peft", "a.b", "a"),
    "base_model.model.a.b.lora_B.default.weight": ("peft", "a.b", "b"),
    "base_model.model.e.lora_embedding_B": ("peft", "e", "b"),
    "unet.a.lora_A.weight": ("peft", "unet.a", "a"),
    "lora_unet_a_b.lora_up.weight": ("kohya", "lora_unet_a_b", "b"),
    "diffusion_model.a.lora_down.weight": ("kohya", "diffusion_model.a", "a"),
    "unet.a.lora.up.weight": ("diffusers", "unet.a", "b"),
    "unet.a.to_k.lora_linear_layer.down.weight": ("diffusers", "unet.a.to_k", "a"),
    "unet.a.attn1.processor.to_q_lora.down.weight": ("diffusers", "unet.a.attn1.to_q", "a"),
    "unet.a.attn1.processor.to_out_lora.up.weight": ("diffusers", "unet.a.attn1.to_out.0", "b"),
    "blk.3.ffn_up.weight.lora_a": ("gguf", "blk.3.ffn_up", "a"),
}


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    half = half_of(name)
    assert half is not None
    assert (half.kind, half.module, half.which) == NAMES[name]
    assert half_of(name + "x") is None


def test_rslora_and_ranks_that_differ(tmp_path: Path) -> None:
    arrays = lf.halves(lf.MODULES[:2], lf.PEFT_ENDS) | lf.halves(
        lf.MODULES[2:], lf.PEFT_ENDS, rank=8
    )
    patterns = {"rank_pattern": {"layers.1.self_attn.q_proj": 8, "layers.1.self_attn.v_proj": 8},
                "alpha_pattern": {"q_proj": 16}}  # fmt: skip
    folder = lf.write_peft(tmp_path / "a", arrays, use_rslora=True, **patterns)
    with open_adapter(folder) as adapter:
        assert [pair.rank for pair in adapter.pairs.values()] == [4, 4, 8, 8]
        scalings = [pair.scaling for pair in adapter.pairs.values()]
        assert scalings == pytest.approx([16 / 2, 6 / 2, 16 / 8**0.5, 6 / 8**0.5])
        assert adapter.lora_config()["rank_pattern"] == patterns["rank_pattern"]
        assert adapter.lora_config()["use_rslora"] is True


def test_alphas_and_ranks_of_kohya_differ_by_module(tmp_path: Path) -> None:
    arrays: dict[str, NDArray[np.float32]] = {}
    for number, name in enumerate(["a.x", "a.y", "a.z"]):
        arrays |= lf.halves([name], lf.KOHYA_ENDS, rank=8 if number == 2 else 4)
        arrays[name + ".alpha"] = np.float32(2 + 2 * (number == 1)).reshape(1)
    with open_adapter(lf.write_safetensors(tmp_path / "k.safetensors", arrays)) as adapter:
        config = adapter.lora_config()
    assert (config["r"], config["lora_alpha"]) == (4, 2.0)
    assert config["rank_pattern"] == {"a.z": 8}
    assert config["alpha_pattern"] == {"a.y": 4.0}
    assert config["target_modules"] == ["a.x", "a.y", "a.z"]


def test_a_config_that_peft_gets_has_no_unknown_fields(tmp_path: Path) -> None:
    folder = lf.write_peft(tmp_path / "a", auto_mapping=None, revision="x", peft_version="9.9")
    with open_adapter(folder) as adapter:
        assert set(adapter.lora_config()) == {
            "r", "lora_alpha", "inference_mode", "target_modules", "base_model_name_or_path",
            "use_rslora", "task_type", "rank_pattern", "alpha_pattern",
        }  # fmt: skip


def changed(**arrays: NDArray[np.float32] | None) -> dict[str, NDArray[np.float32]]:
    """The halves of one module, some replaced or left out."""
    found: dict[str, Any] = lf.halves(["m"], lf.PEFT_ENDS)
    found |= {f"m.lora_{end}.weight": array for end, array in arrays.items()}
    return {name: array for name, array in found.items() if array is not None}


ZEROS = np.zeros((3, 3), np.float32)
ONE = {"m.lora_down.weight": ZEROS, "m.lora_up.weight": ZEROS}
UNFIT: dict[str, tuple[lf.Arrays, str]] = {
    "no-pairs": ({"model.norm.weight": ZEROS}, "none of its 1 tensors is half of a pair: model"),
    "no-tensors": ({}, "none of its 0 tensors"),
    "no-b": (changed(B=None), "'m.lora_A.weight' has no other half"),
    "no-a": (changed(A=None), "'m.lora_B.weight' has no other half"),
    "no-rank": (changed(A=ZEROS), r"shape \(3, 3\) and .* of \(24, 4\) share no rank"),
    "one-dim": (changed(A=np.zeros(4, np.float32)), "share no rank"),
    "no-dims": (changed(B=np.zeros((), np.float32)), "share no rank"),
    "rank-0": (
        changed(A=np.zeros((0, 3), np.float32), B=np.zeros((3, 0), np.float32)), "share no rank"
    ),
    "twice": (changed() | {"base_model.model.m.lora_A.weight": ZEROS}, "'m' has two tensors for A"),
    "lycoris": (ONE | {"n.hada_w1_a": ZEROS}, "'n.hada_w1_a' is of another decomposition"),
    "alphas": (ONE | {"m.alpha": ZEROS}, r"'m.alpha': expected one float, found F32 \(3, 3\)"),
    "alpha-nan": (ONE | {"m.alpha": np.array(np.nan, np.float32)}, "'m.alpha' is nan"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_are_no_adapter(tmp_path: Path, kind: str) -> None:
    arrays, words = UNFIT[kind]
    path = lf.write_safetensors(tmp_path / "x.safetensors", arrays)
    with pytest.raises(AdapterError, match=words) as caught:
        open_adapter(path)
    assert caught.value.path == str(path)


CONFIGS: dict[str, tuple[str, str]] = {
    "empty": ("", "expected JSON"),
    "list": ("[]", "expected an object, found a list"),
    "nesting": ("[" * 100_000, "expected JSON"),
    "digits": ('{"r": ' + "9" * 5000 + "}", "expected JSON|r is"),
    "twice": ('{"r": 1, "r": 2}', "a name appears twice"),
    "no-kind": ("{}", "peft_type is None, expected 'LORA'"),
    "other-kind": (json.dumps({"peft_type": "IA3"}), "peft_type is 'IA3'"),
    "rank-0": (json.dumps(lf.CONFIG | {"r": 0}), "r is 0, expected 1 to"),
    "rank-float": (json.dumps(lf.CONFIG | {"r": 4.0}), "r: expected int, found float"),
    "rank-bool": (json.dumps(lf.CONFIG | {"r": True}), "r: expected int, found bool"),
    "rank-other": (json.dumps(lf.CONFIG | {"r": 8}), "has rank 4, but the configuration says 8"),
    "alpha-text": (json.dumps(lf.CONFIG | {"lora_alpha": "x"}), "lora_alpha: expected a number"),
    "alpha-nan": (json.dumps(lf.CONFIG | {"lora_alpha": float("nan")}), "NaN is no number"),
    "rslora": (json.dumps(lf.CONFIG | {"use_rslora": "no"}), "use_rslora: expected bool"),
    "targets": (json.dumps(lf.CONFIG | {"target_modules": [1]}), "target_modules: expected names"),
    "pattern": (json.dumps(lf.CONFIG | {"rank_pattern": {"a": "b"}}), "rank_pattern: expected"),
    "pattern-list": (json.dumps(lf.CONFIG | {"alpha_pattern": ["a"]}), "alpha_pattern: expected"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_that_cannot_be(tmp_path: Path, kind: str) -> None:
    text, words = CONFIGS[kind]
    folder = lf.write_peft(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(AdapterError, match=words) as caught:
        open_adapter(folder)
    assert len(str(caught.value)) < 500


def test_a_configuration_that_is_too_large(tmp_path: Path) -> None:
    folder = lf.write_peft(tmp_path / "a")
    os.truncate(folder / "adapter_config.json", 1 << 40)
    with pytest.raises(errors.ReadError, match="expected at most"):
        open_adapter(folder)


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"general.type": "model"}, "general.type: expected 'adapter', found 'model'"),
    "other": ({"adapter.type": "aloha"}, "adapter.type: expected 'lora', found 'aloha'"),
    "alpha-nan": ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
    "alpha-inf": ({"alpha": float("inf")}, "adapter.lora.alpha is inf"),
}


@pytest.mark.parametrize("kind", SAID)
def test_gguf_files_that_are_no_adapter(tmp_path: Path, kind: str) -> None:
    said, words = SAID[kind]
    path = lf.write_gguf(tmp_path / "x.gguf", lf.halves(lf.TENSORS, lf.GGUF_ENDS), **said)
    with pytest.raises(AdapterError, match=words):
        open_adapter(path)


def test_a_gguf_model_is_no_adapter(model: str) -> None:
    with pytest.raises(AdapterError, match=r"general\.type: expected 'adapter', found"):
        open_adapter(model)


def test_pickled_weights_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(errors.ReadError, match="convert them to safetensors"):
        open_adapter(tmp_path)


@pytest.mark.parametrize("alpha", [0.0, None])
def test_without_alpha_nothing_is_scaled(tmp_path: Path, alpha: float | None) -> None:
    """As in llama.cpp."""
    arrays = lf.halves(lf.TENSORS, lf.GGUF_ENDS)
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays, alpha=alpha)) as adapter:
        assert (adapter.alpha, adapter.scaling) == (None, 1.0)
        assert adapter.lora_config()["lora_alpha"] == lf.RANK
