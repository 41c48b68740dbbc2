"""``load_state_dict`` into tiny models of transformers: what torch's own load_state_dict does."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import numaload as api
from numaload.errors import StateDictError

transformers.logging.set_verbosity_error()

MODEL_TYPES = """
    albert audio-spectrogram-transformer bart beit bert big_bird bloom clip_text_model
    clip_vision_model codegen cohere2 convbert deberta deberta-v2 deepseek_v3 dinov2
    distilbert dpr electra falcon falcon_h1 gemma2 gemma3_text glm4_moe gpt2 gpt_bigcode
    gpt_neox gpt_oss gptj idefics3_vision jamba lfm2 llama llama4_text longformer m2m_100
    mamba marian minimax_m2 mixtral modernbert moonshine mpt nemotron olmoe opt
    parakeet_encoder patchtst pegasus persimmon phi3 pixtral qwen2 qwen2_5_vl_text
    qwen3_5_vision qwen3_moe recurrent_gemma roberta rwkv siglip_vision_model squeezebert
    starcoder2 t5 umt5 vilt vit vivit whisper xlnet youtu
"""
WIDTHS = "hidden_size d_model n_embd dim embed_dim embedding_size"
INNER = """intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim"""
LAYERS = """
    num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers
"""
HEADS = """
    num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads
"""
SMALL: dict[str, int] = {
    **dict.fromkeys(WIDTHS.split(), 32), **dict.fromkeys(INNER.split(), 48),
    **dict.fromkeys(LAYERS.split(), 2), **dict.fromkeys(HEADS.split(), 4),
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 8, "d_kv": 8,
    "image_size": 32, "patch_size": 8, "moe_intermediate_size": 16, "num_experts": 4,
    "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16,
    "q_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
    "state_size": 8, "time_step_rank": 4, "type_vocab_size": 2, "first_k_dense_replace": 1,
}  # fmt: skip


def make(kind: str, seed: int, device: str = "cpu") -> Any:
    config = CONFIG_MAPPING[kind]
    fields = set(inspect.signature(config.__init__).parameters)
    fields |= set(getattr(config, "__dataclass_fields__", ()))
    torch.manual_seed(seed)
    with torch.device(device):
        made = config(**{name: size for name, size in SMALL.items() if name in fields})
        return AutoModel.from_config(made, dtype=torch.float32)


def values_of(model: Any) -> dict[str, Any]:
    """Parameters and buffers, those that are not saved too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("kind", MODEL_TYPES.split())
def test_the_same_as_torch(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    state = {key: tensor.clone() for key, tensor in make(kind, 0).state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, str(path))
    theirs, ours, on_meta = make(kind, 1), make(kind, 1), make(kind, 1, "meta")
    expected = theirs.load_state_dict(state)
    unsaved = [
        name
        for name, buffer in on_meta.named_buffers(remove_duplicate=False)
        if name not in state and buffer.device.type == "meta"
    ]
    with api.open(path) as weights:
        assert api.load_state_dict(ours, weights) == expected
        if unsaved:
            with pytest.raises(StateDictError, match="left on the meta device") as caught:
                api.load_state_dict(on_meta, weights)
            assert sorted(caught.value.missing) == sorted(unsaved)
            assert all(one.device.type == "meta" for one in on_meta.parameters())
        else:
            assert api.load_state_dict(on_meta, weights) == expected
    for loaded in (ours,) if unsaved else (ours, on_meta):
        found = values_of(loaded)
        assert found.keys() == values_of(theirs).keys()
        for name, tensor in values_of(theirs).items():
            assert torch.equal(found[name], tensor), name
