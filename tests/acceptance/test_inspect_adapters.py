"""``numaload inspect ADAPTER``: whose it is, its ranks and modules, and which program loads it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_files as lf
import numaload as api
from commands import Numaload
from numaload.cli.adapters import describe

A, B = np.zeros((4, 16), np.float32), np.zeros((24, 4), np.float32)
LOHA = {"lora_unet_a.hada_w1_a": B, "lora_unet_a.hada_w1_b": A}
DIFFUSERS, PEFT = "diffusers: pipe.load_lora_weights(", "peft: PeftModel.from_pretrained(model, "
# {name of A, of B: (whose, how it is loaded)}
NAMES: dict[tuple[str, str], tuple[str, str]] = {
    ("base_model.model.q.lora_A.weight", "base_model.model.q.lora_B.weight"): ("PEFT", PEFT),
    ("base_model.model.e.lora_embedding_A", "base_model.model.e.lora_embedding_B"): ("PEFT", PEFT),
    ("lora_unet_a_to_q.lora_down.weight", "lora_unet_a_to_q.lora_up.weight"): ("kohya", DIFFUSERS),
    ("lora_te1_a_q.lora_down.weight", "lora_te1_a_q.lora_up.weight"): ("kohya", DIFFUSERS),
    ("unet.q.lora_A.weight", "unet.q.lora_B.weight"): ("diffusers", DIFFUSERS),
    ("unet.q.lora.down.weight", "unet.q.lora.up.weight"): ("diffusers", DIFFUSERS),
    ("a.processor.to_q_lora.down.weight", "a.processor.to_q_lora.up.weight"):
        ("diffusers", DIFFUSERS),
    ("t.lora_linear_layer.down.weight", "t.lora_linear_layer.up.weight"): ("diffusers", DIFFUSERS),
    ("diffusion_model.q.lora_down.weight", "diffusion_model.q.lora_up.weight"):
        ("diffusers", DIFFUSERS),
}  # fmt: skip


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[0])
def test_names_tell_whose_it_is(tmp_path: Path, names: tuple[str, str]) -> None:
    whose, load = NAMES[names]
    path = lf.write_safetensors(tmp_path / "x.safetensors", dict(zip(names, (A, B), strict=True)))
    with api.open(path) as weights:
        found = describe(weights)
    assert found is not None
    assert (found.kind, found.whose, found.ranks, found.modules) == ("LoRA", whose, [4], 1)
    assert load in found.load
    assert ("needs adapter_config.json beside it" in found.load) == (whose == "PEFT")


def test_an_adapter_of_peft(numaload: Numaload, tmp_path: Path) -> None:
    folder = lf.write_peft(tmp_path / "a")
    for given in (folder, folder / "adapter_model.safetensors"):
        first, file, *table = numaload("inspect", given).stdout.splitlines()
        assert first == (
            "LoRA adapter (PEFT), rank 4, 4 modules, base model org/base;"
            f" load it with peft: PeftModel.from_pretrained(model, '{folder}')"
        )
        assert file.startswith(f"{folder}/adapter_model.safetensors: safetensors, 8 tensors")
        rows = [line.split() for line in table]
        for name, array in lf.halves([lf.PREFIX + m for m in lf.MODULES], lf.PEFT_ENDS).items():
            assert [name, "F32", "x".join(map(str, array.shape)), str(array.nbytes)] in rows
    assert numaload.json("inspect", folder)["adapter"] == {
        "kind": "LoRA", "whose": "PEFT", "ranks": [4], "modules": 4, "base_model": "org/base",
        "load": f"peft: PeftModel.from_pretrained(model, '{folder}')",
    }  # fmt: skip


def test_a_gguf_adapter(numaload: Numaload, tmp_path: Path) -> None:
    embedding = {"token_embd.weight.lora_a": B, "token_embd.weight.lora_b": B}
    arrays = lf.halves(lf.TENSORS, lf.GGUF_ENDS, rank=8) | embedding
    path = lf.write_gguf(tmp_path / "x.gguf", arrays, general__base_model__0__name="Base")
    first = numaload("inspect", path).stdout.splitlines()[0]
    assert first == (
        "LoRA adapter (llama.cpp), ranks 4 to 8, 5 modules, base model Base; load it with"
        f" llama.cpp: --lora {path}, or peft: numaload.backends.lora.open_adapter('{path}')"
    )


OTHERS: dict[str, tuple[lf.Arrays, dict[str, Any], str]] = {
    "loha": (LOHA, {}, "LoRA adapter (LyCORIS), rank 4, 1 module; load it with ComfyUI"),
    "lokr": (
        {"lora_unet_a.lokr_w1": A, "lora_unet_a.lokr_w2": A}, {}, "LoRA adapter (LyCORIS), 1 mod"
    ),
    "mlx": (
        {"model.q.lora_a": A.T.copy(), "model.q.lora_b": B.T.copy()}, {"fine_tune_type": "lora"},
        "LoRA adapter (MLX), rank 4, 1 module; load it with mlx_lm: load(MODEL, adapter_path='",
    ),
    "other-peft": (
        {"base_model.model.q.ia3_l": A}, {"peft_type": "IA3"}, "IA3 adapter (PEFT); load it with p"
    ),
    "dora": (
        {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": A[0]},
        {"peft_type": "LORA"}, "LoRA adapter (PEFT), rank 4, 1 module;",
    ),
    "saved-modules": (
        {"q.lora_A.weight": A, "q.lora_B.weight": B, "lm_head.weight": np.tile(A, 9)},
        {"peft_type": "LORA"}, "LoRA adapter (PEFT), rank 4, 1 module;",
    ),
    "fields": (
        {"q.lora_A.weight": A, "q.lora_B.weight": B},
        {"peft_type": 5, "base_model_name_or_path": ["x"]}, "LoRA adapter (PEFT), rank 4, 1 module",
    ),
    "hostile": (
        {"q.lora_A.weight": A, "q.lora_B.weight": B},
        {"peft_type": "\x1b[2J" * 999, "base_model_name_or_path": "\x1b]0;" * 999}, r"\x1b[2J",
    ),
    "shapes": (
        {"q.lora_A.weight": A[0], "r.lora_A.weight": A[:0], "q.lora_B.weight": B}, {},
        "LoRA adapter (PEFT), 2 modules",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_else_there_is(tmp_path: Path, kind: str) -> None:
    arrays, config, said = OTHERS[kind]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    path = lf.write_safetensors(tmp_path / "adapter_model.safetensors", arrays)
    with api.open(path) as weights:
        found = describe(weights)
    assert found is not None
    assert found.line().startswith(said)
    assert len(found.line()) < 600
    assert found.line().isprintable()


def test_a_model_is_no_adapter(tmp_path: Path, model: str) -> None:
    """Nor is one that some adapters are part of."""
    arrays = {"q.base_layer.weight": np.zeros((24, 16), np.float32), "q.lora_A.speech.weight": A,
              "q.lora_B.speech.weight": B}  # fmt: skip
    path = lf.write_safetensors(tmp_path / "m.safetensors", arrays)
    for given in (path, model):
        with api.open(given) as weights:
            assert describe(weights) is None


def test_a_folder_of_one_adapter_of_any_name(numaload: Numaload, tmp_path: Path) -> None:
    lf.write_safetensors(
        tmp_path / "pytorch_lora_weights.safetensors",
        {"q.lora_A.weight": A, "q.lora_B.weight": B},
    )
    assert numaload("inspect", tmp_path).stdout.startswith("LoRA adapter (PEFT), rank 4, 1 module;")


CONFIGS = {
    "text": ("no json", "expected JSON"),
    "digits": (f'{{"r": {"9" * 5000}}}', "5000 digits"),
    "nan": ('{"lora_alpha": NaN}', "NaN"),
    "deep": ("[" * 200_000, "recursion"),
    "twice": ('{"r": 1, "r": 2}', "twice"),
    "no-object": ("[]", "expected an object"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_that_cannot_be_read_is_said(
    numaload: Numaload, tmp_path: Path, kind: str
) -> None:
    text, why = CONFIGS[kind]
    folder = lf.write_peft(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    done = numaload("inspect", folder)
    assert why in done.stderr
    assert len(done.stderr) < 1000
    assert done.stdout.startswith("LoRA adapter (PEFT), rank 4, 4 modules; load it with peft: ")


def test_a_configuration_that_is_too_large_is_said(numaload: Numaload, tmp_path: Path) -> None:
    folder = lf.write_peft(tmp_path / "a")
    os.truncate(folder / "adapter_config.json", 1 << 40)
    assert "expected at most 1048576" in numaload("inspect", folder).stderr
