"""``load_state_dict`` into models of transformers, beside its own loading of GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import hf_models as hf
import numaload as api
from hf_configs import CONFIGS, config_of

transformers.logging.set_verbosity_error()

# What transformers itself reads of GGUF files.
THEIRS = ("llama", "qwen2", "qwen2moe", "qwen3", "qwen3moe")


def model_of(case: str, device: str, dtype: Any = torch.float32, **options: Any) -> Any:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config_of(case, **options), dtype=dtype)


def write(folder: Path, case: str) -> hf.Made:
    return hf.write(folder / "m.gguf", CONFIGS[case][0], experts=case == "mixtral")


def expected_of(case: str, made: hf.Made) -> dict[str, Any]:
    """DeepSeek V2 has no correction of the router's scores."""
    if case != "deepseek2-v2":
        return dict(made.expected)
    return {k: v for k, v in made.expected.items() if "e_score_correction" not in k}


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_every_parameter(tmp_path: Path, case: str, device: str) -> None:
    made = write(tmp_path, case)
    model = model_of(case, device)
    strict = case != "deepseek2-v2"
    with api.open(made.path) as weights:
        result = api.load_state_dict(model, weights, strict=strict)
    assert result.missing_keys == []
    assert all("exp_probs_b" in name for name in result.unexpected_keys)
    found, expected = model.state_dict(), expected_of(case, made)
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        assert torch.equal(found[key], torch.from_numpy(array.copy())), key


@pytest.mark.parametrize("case", CONFIGS)
def test_a_model_made_on_meta_runs(tmp_path: Path, case: str) -> None:
    """Its outputs are those of the same model made in memory: rotary embeddings are there too."""
    made = write(tmp_path, case)
    tokens = torch.arange(12).reshape(2, 6)
    outputs = []
    for device in ("meta", "cpu"):
        model = model_of(case, device).eval()
        with api.open(made.path) as weights:
            api.load_state_dict(model, weights, strict=False)
        assert all(
            tensor.device.type == "cpu" for tensor in [*model.parameters(), *model.buffers()]
        )
        with torch.no_grad():
            outputs.append(model(tokens).logits)
    assert torch.equal(*outputs)
    assert outputs[0].isfinite().all()


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_transformers_own_loading(tmp_path: Path, case: str, dtype: Any) -> None:
    write(tmp_path, case)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="m.gguf",
        dtype=dtype,
        config=config_of(case),  # of the file it does not read all sizes
    )
    with torch.device("meta"):
        ours = AutoModelForCausalLM.from_config(theirs.config, dtype=dtype)
    with api.open(tmp_path / "m.gguf") as weights:
        api.load_state_dict(ours, weights)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert ours.state_dict()[key].dtype == tensor.dtype, key
        assert torch.equal(ours.state_dict()[key], tensor), key
    for (name, mine), (_, yours) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(mine, yours), name


def test_tied_embeddings(tmp_path: Path) -> None:
    made = hf.write(tmp_path / "m.gguf", "qwen2", tied=True)
    model = model_of("qwen2", "meta", tie_word_embeddings=True)
    with api.open(made.path) as weights:
        assert api.load_state_dict(model, weights).missing_keys == []
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wanted = torch.from_numpy(made.expected["lm_head.weight"])
    assert torch.equal(model.lm_head.weight.detach(), wanted)


def test_what_transformers_keeps_in_float32(tmp_path: Path) -> None:
    made = hf.write(tmp_path / "m.gguf", "deepseek2")
    model = model_of("deepseek2-v3", "meta")
    with api.open(made.path) as weights:
        api.load_state_dict(model, weights, dtype=torch.bfloat16)
    kinds = {key: tensor.dtype for key, tensor in model.state_dict().items()}
    assert kinds["model.layers.1.mlp.gate.e_score_correction_bias"] == torch.float32
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == torch.bfloat16


def test_a_base_model_without_a_head(tmp_path: Path) -> None:
    made = hf.write(tmp_path / "m.gguf", "qwen3")
    model = model_of("qwen3", "cpu").model
    with api.open(made.path) as weights:
        result = api.load_state_dict(model, weights, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["output.weight"])


VISION = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_embeddings_that_transformers_would_initialize_again(tmp_path: Path, kind: str) -> None:
    """Positions beside them are on the meta device: then nothing is loaded, and in memory it is."""
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=VISION)
    make = getattr(transformers, f"{kind}Model")
    made = make(config)
    made.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = make(config)
    with api.open(tmp_path) as weights:
        with pytest.raises(api.errors.StateDictError, match=r"embeddings\.position_ids"):
            api.load_state_dict(model, weights)
        assert all(one.device.type == "meta" for one in model.parameters())
        model = make(config)
        api.load_state_dict(model, weights)
    for key, tensor in made.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_safetensors_checkpoint(tmp_path: Path) -> None:
    """As save_pretrained writes it, sharded."""
    model = model_of("qwen3moe", "cpu", torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    again = model_of("qwen3moe", "meta", torch.bfloat16)
    with api.open(tmp_path) as weights:
        result = api.load_state_dict(again, weights)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
