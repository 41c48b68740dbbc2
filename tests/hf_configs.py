"""Configurations of transformers for the models of hf_models.py."""

from __future__ import annotations

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import hf_models as hf

COMMON: dict[str, Any] = {
    "hidden_size": hf.HIDDEN, "intermediate_size": hf.INNER, "vocab_size": hf.VOCABULARY,
    "num_hidden_layers": hf.LAYERS, "num_attention_heads": hf.HEADS, "rms_norm_eps": 1e-5,
    "num_key_value_heads": hf.KV_HEADS, "tie_word_embeddings": False,
}  # fmt: skip
MOE = {
    "num_experts": hf.EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": hf.EXPERT_INNER,
}
MLA = {
    "num_key_value_heads": hf.HEADS, "q_lora_rank": hf.Q_LORA, "kv_lora_rank": hf.KV_LORA,
    "qk_nope_head_dim": hf.NOPE, "qk_rope_head_dim": hf.ROPE, "v_head_dim": hf.VALUE,
    "n_routed_experts": hf.EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": hf.EXPERT_INNER, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1,
}  # fmt: skip
MIXTRAL = {
    "num_local_experts": hf.EXPERTS, "num_experts_per_tok": 2, "intermediate_size": hf.EXPERT_INNER,
}  # fmt: skip
HEAD = {"head_dim": hf.HIDDEN // hf.HEADS}
CONFIGS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "llama": ("llama", LlamaConfig, {}),
    "mistral": ("llama", MistralConfig, {}),
    "mixtral": ("llama", MixtralConfig, MIXTRAL),
    "qwen2": ("qwen2", Qwen2Config, {}),
    "qwen2moe": (
        "qwen2moe", Qwen2MoeConfig, MOE | {"shared_expert_intermediate_size": hf.SHARED_INNER},
    ),
    "qwen3": ("qwen3", Qwen3Config, HEAD),
    "qwen3moe": ("qwen3moe", Qwen3MoeConfig, MOE | HEAD),
    "deepseek2-v2": ("deepseek2", DeepseekV2Config, MLA),
    "deepseek2-v3": ("deepseek2", DeepseekV3Config, MLA),
}  # fmt: skip


def config_of(case: str, **options: Any) -> Any:
    _, config, sizes = CONFIGS[case]
    return config(**COMMON | sizes | options)
