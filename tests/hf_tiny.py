"""Tiny configurations of transformers, for each architecture of GGUF files that is known here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import transformers as hf

BASE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "vocab_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 3e-5, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}  # fmt: skip
HEAD = {"head_dim": 32}
TIED = {"tie_word_embeddings": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
ROUTED = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 1.5,
}  # fmt: skip
MLA = {
    "num_key_value_heads": 4, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32,
}  # fmt: skip
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16,
    "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5,
        "mrope_section": [3, 3, 2], "mrope_interleaved": True,
    },
}  # fmt: skip
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def theta(value: float = 20000.0, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": value} | more}


def _of(name: str, *parts: dict[str, Any], **more: Any) -> Callable[..., Any]:
    fields = dict(BASE)
    for part in (*parts, more):
        fields |= part
    return partial(getattr(hf, name), **fields)


LLAMA3 = theta(
    5e5, rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
LONG = theta(
    rope_type="longrope", long_factor=[1.0 + i for i in range(6)], partial_rotary_factor=0.75,
    short_factor=[1.0 + i / 9 for i in range(6)], original_max_position_embeddings=64, factor=4.0,
)  # fmt: skip
GEMMA3_ROPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 11000.0},
    }
}
# {case: (architecture, configuration)}
TINY: dict[str, tuple[str, Callable[..., Any]]] = {
    "llama": ("llama", _of("LlamaConfig", theta())),
    "llama-3.2": ("llama", _of("LlamaConfig", LLAMA3, TIED)),
    "llama-biased": ("llama", _of("LlamaConfig", HEAD, attention_bias=True, mlp_bias=True)),
    "mixtral": ("llama", _of("MixtralConfig", theta(), num_local_experts=4, num_experts_per_tok=2)),
    "qwen2": ("qwen2", _of("Qwen2Config", theta(1e6))),
    "qwen2-yarn": ("qwen2", _of("Qwen2Config", theta(1e6, **YARN))),
    "qwen2moe": ("qwen2moe", _of("Qwen2MoeConfig", MOE, shared_expert_intermediate_size=64)),
    "qwen3": ("qwen3", _of("Qwen3Config", HEAD, TIED, theta(1e6))),
    "qwen3moe": ("qwen3moe", _of("Qwen3MoeConfig", HEAD, MOE, norm_topk_prob=True)),
    "qwen3.5": ("qwen35", _of("Qwen3_5TextConfig", HEAD, LINEAR)),
    "qwen3.5-moe": (
        "qwen35moe",
        _of("Qwen3_5MoeTextConfig", HEAD, LINEAR, MOE, shared_expert_intermediate_size=64),
    ),
    "deepseek-v2-lite": ("deepseek2", _of("DeepseekV2Config", ROUTED, MLA, q_lora_rank=None)),
    "deepseek-v3": (
        "deepseek2",
        _of(
            "DeepseekV3Config",
            ROUTED,
            MLA,
            theta(**YARN, mscale=1.0, mscale_all_dim=1.0),
            q_lora_rank=32,
            n_group=2,
            topk_group=1,
        ),
    ),
    "gemma": ("gemma", _of("GemmaConfig", HEAD, TIED)),
    "gemma-2": (
        "gemma2",
        _of("Gemma2Config", HEAD, TIED, query_pre_attn_scalar=32, sliding_window=4),
    ),
    "gemma-3": (
        "gemma3",
        _of(
            "Gemma3TextConfig",
            HEAD,
            TIED,
            GEMMA3_ROPE,
            query_pre_attn_scalar=32,
            sliding_window=4,
            num_hidden_layers=7,
        ),
    ),
    "glm-4": (
        "glm4",
        _of("Glm4Config", HEAD, theta(partial_rotary_factor=0.5), attention_bias=True),
    ),
    "glm-4.5": (
        "glm4moe",
        _of(
            "Glm4MoeConfig",
            HEAD,
            ROUTED,
            theta(partial_rotary_factor=0.5),
            use_qk_norm=True,
            attention_bias=True,
        ),
    ),
    "gpt-oss": (
        "gpt-oss",
        _of(
            "GptOssConfig",
            HEAD,
            theta(150000.0, **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False),
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=4,
        ),
    ),
    "phi-3": ("phi3", _of("Phi3Config", theta(), sliding_window=5)),
    "phi-4-mini": ("phi3", _of("Phi3Config", LONG, TIED, original_max_position_embeddings=64)),
}
