"""transformers' configuration of a model, from the metadata and the tensors of its GGUF file.

Widths are what the tensors have. Where a key is absent, llama.cpp's own default counts, and where
llama.cpp computes in one way whatever a file says, that counts; so a model here is what llama.cpp
runs. A key that nobody reads is refused: it may change what is computed. Source: src/models/*.cpp
of llama.cpp, load_arch_hparams.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from numaload.backends.gguf_layouts import MOST_LAYERS, check_architecture
from numaload.errors import UsageError, printable
from numaload.weights import Weights

MOST = 1 << 31
# Keys that no number depends on: sizes that tensors have, notes, what is done with the output.
SILENT = {
    "vocab_size", "feed_forward_length", "expert_feed_forward_length", "expert_count",
    "expert_shared_feed_forward_length", "rope.scaling.finetuned", "pooling_type",
    "tensor_data_layout", "interleave_moe_layer_step", "full_attention_interval",
}  # fmt: skip
TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id",
          "padding_token_id": "pad_token_id"}  # fmt: skip
SOFTMAX, SIGMOID = 1, 2  # llama.cpp's numbers of what weighs experts
# What Llama 3.1 to 3.3 have beside a factor: low_freq_factor, high_freq_factor, original context.
LLAMA3 = (1.0, 4.0, 8192)


def config_of(weights: Weights) -> Any:
    """Return transformers' configuration. Raises: UsageError for what it cannot be made of."""
    import transformers

    model = _Model(weights)
    if model.architecture not in ARCHITECTURES:
        raise UsageError(
            f"{weights.paths[0]}: what {model.architecture} computes by is not known here from its"
            " file alone: give config=, of the original model"
        )
    name, fields = ARCHITECTURES[model.architecture](model)
    model.check_unread()
    try:
        return getattr(transformers, name)(**model.common() | fields)
    except Exception as error:  # each class has checks of its own
        raise UsageError(
            f"{weights.paths[0]}: transformers' {name} refuses its numbers: {printable(error)}"
        ) from error


class _Model:
    """One GGUF file: its metadata under llama.cpp's names, and which of it was read."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.architecture = weights, check_architecture(weights)
        self.read: set[str] = set()
        self.blocks = self.number("block_count", most=MOST_LAYERS)
        self.layers = self.blocks - self.number("nextn_predict_layers", 0)
        self.hidden = self.width("token_embd.weight")
        self.heads = self.number("attention.head_count")
        self.head_dim = self.number("attention.key_length", self.hidden // self.heads)
        self.context = self.number("context_length")
        self.expect("embedding_length", self.hidden)

    def value(self, key: str, default: Any = None) -> Any:
        self.read.add(key)
        return self.weights.metadata.get(f"{self.architecture}.{key}", default)

    def refuse(self, key: str, expected: str, found: Any) -> NoReturn:
        raise UsageError(
            f"{self.weights.paths[0]}: {self.architecture}.{key}: expected {expected}, found"
            f" {'nothing' if found is None else repr(found)}: give config=, of the original model"
        )

    def number(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self.value(key, default)
        least = 0 if default == 0 else 1
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"a number, {least} to {most}", value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            self.refuse(key, "a finite number", value)
        short = np.float32(value)  # "3e-05" became 2.99999992e-05 when it was written as one
        return float(str(short)) if short == value else float(value)

    def expect(self, key: str, *values: Any) -> None:
        """Check a key, where it is there, for what alone is known to be computed."""
        found = self.value(key)
        if found is not None and found not in values:
            self.refuse(key, " or ".join(map(repr, values)), found)

    def has(self, name: str) -> bool:
        return any(f"blk.{block}.{name}" in self.weights for block in range(self.layers))

    def width(self, name: str, axis: int = -1) -> int:
        """Return a dim of a tensor, or of the first block's that has one."""
        names = [name, *(f"blk.{block}.{name}" for block in range(getattr(self, "layers", 0)))]
        tensor = next((self.weights[one] for one in names if one in self.weights), None)
        if tensor is None or not tensor.shape:
            raise UsageError(f"{self.weights.paths[0]}: there is no tensor {name!r}")
        return int(tensor.shape[axis])

    def common(self) -> dict[str, Any]:
        """Return the fields that all configurations have."""
        found = self.weights.metadata.get
        tokens = {ours: found(f"tokenizer.ggml.{key}") for key, ours in TOKENS.items()}
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context,
            "vocab_size": self.width("token_embd.weight", 0),
            "tie_word_embeddings": "output.weight" not in self.weights,
            **tokens,
        }

    def attention(self) -> dict[str, Any]:
        """Return the fields of attention with grouped heads."""
        self.expect("attention.value_length", self.head_dim)
        return {
            "num_key_value_heads": self.number("attention.head_count_kv", self.heads),
            "head_dim": self.head_dim,
            "rms_norm_eps": self.eps(),
        }

    def eps(self) -> float:
        return self.real("attention.layer_norm_rms_epsilon")

    def dense(self, *, partial: bool = False) -> dict[str, Any]:
        """Return the fields of attention and a feed-forward network in all blocks."""
        return self.attention() | {
            "intermediate_size": self.width("ffn_down.weight"),
            "rope_parameters": self.rope(partial=partial),
        }

    def experts(self) -> dict[str, Any]:
        """Return the fields of networks of experts, as most configurations call them."""
        return {
            "num_experts": self.width("ffn_down_exps.weight", 0),
            "num_experts_per_tok": self.number("expert_used_count"),
            "moe_intermediate_size": self.width("ffn_down_exps.weight"),
            "intermediate_size": self.number("feed_forward_length", 0)  # of no block
            or self.width("ffn_down_exps.weight"),
        }

    def rope(self, *, partial: bool = False, **more: Any) -> dict[str, Any]:
        """Return rope_parameters. partial: also of a part of each head. more: their own fields."""
        theta = self.real("rope.freq_base", 10000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        dims = self.number("rope.dimension_count", self.head_dim)
        if partial:
            rope["partial_rotary_factor"] = dims / self.head_dim
        elif dims != self.head_dim:
            self.refuse("rope.dimension_count", str(self.head_dim), dims)
        kind = self.value("rope.scaling.type", "none")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self.real("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.number(
                "rope.scaling.original_context_length", self.context
            )
            for key in ("yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor"):
                if self.value(f"rope.scaling.{key}") is not None:
                    field = key.replace("yarn_attn", "yarn_attention").removeprefix("yarn_")
                    rope[field] = self.real(f"rope.scaling.{key}")
            self.expect("rope.scaling.yarn_ext_factor", 1.0)
        self.expect("rope.scaling.type", "none", "linear", "yarn", more.get("rope_type"))
        if "rope_freqs.weight" in self.weights:
            rope |= self._llama3(theta, dims)
        return rope | more

    def _llama3(self, theta: float, dims: int) -> dict[str, Any]:
        """Return the parameters that give the file's factors: it has these alone.

        Source: LlamaModel.generate_extra_tensors of llama.cpp's conversion/llama.py.
        """
        found = self.weights["rope_freqs.weight"].dequantize().reshape(-1).tolist()
        low, high, context = LLAMA3
        factor = max(found, default=1.0)
        expected = []
        for index in range(0, dims, 2):
            length = 2 * math.pi * theta ** (index / dims)
            smooth = (context / length - low) / (high - low)
            smooth = min(max(smooth, 0.0), 1.0)
            expected.append(1 / ((1 - smooth) / factor + smooth))
        near = len(found) == len(expected) and all(
            math.isclose(one, other, rel_tol=1e-4)
            for one, other in zip(found, expected, strict=True)
        )
        if not near:
            self.refuse("rope", "factors in rope_freqs.weight as Llama 3's", found[:4])
        names = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        return {"rope_type": "llama3", "factor": factor, **dict(zip(names, LLAMA3, strict=True))}

    def check_unread(self) -> None:
        """Check that no key was passed over. Raises: UsageError."""
        prefix = f"{self.architecture}."
        for key in self.weights.metadata:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in self.read and name not in SILENT:
                self.refuse(name, "no such key", self.weights.metadata[key])


Made = tuple[str, dict[str, Any]]


def _llama(model: _Model) -> Made:
    if not model.has("ffn_down_exps.weight"):
        biases = {
            "attention_bias": model.has("attn_q.bias"),
            "mlp_bias": model.has("ffn_down.bias"),
        }
        return "LlamaConfig", model.dense() | biases
    experts = model.experts()
    return "MixtralConfig", model.attention() | {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "intermediate_size": experts["moe_intermediate_size"],
        "rope_parameters": model.rope(),
    }


def _qwen2(model: _Model) -> Made:
    return "Qwen2Config", model.dense()


def _qwen3(model: _Model) -> Made:
    return "Qwen3Config", model.dense() | {"attention_bias": model.has("attn_q.bias")}


def _qwen2moe(model: _Model) -> Made:
    return "Qwen2MoeConfig", _qwen_experts(model, normed=False) | {
        "shared_expert_intermediate_size": model.width("ffn_down_shexp.weight"),
    }


def _qwen3moe(model: _Model) -> Made:
    biased = {"attention_bias": model.has("attn_q.bias")}
    return "Qwen3MoeConfig", _qwen_experts(model, normed=True) | biased


def _qwen_experts(model: _Model, *, normed: bool) -> dict[str, Any]:
    model.expect("expert_gating_func", SOFTMAX)
    model.expect("expert_weights_scale", 1.0)
    model.expect("expert_weights_norm", normed)
    more = {"rope_parameters": model.rope(), "norm_topk_prob": normed}
    return model.attention() | model.experts() | more


def _qwen35(model: _Model) -> Made:
    values = model.number("ssm.time_step_rank")
    sections = list(model.value("rope.dimension_sections", ()))[:4]
    mrope = {"mrope_section": [one for one in sections if one], "mrope_interleaved": True}
    fields = model.attention() | {
        "rope_parameters": model.rope(partial=True, **mrope),
        "linear_conv_kernel_dim": model.number("ssm.conv_kernel"),
        "linear_key_head_dim": model.number("ssm.state_size"),
        "linear_num_key_heads": model.number("ssm.group_count"),
        "linear_num_value_heads": values,
        "linear_value_head_dim": model.number("ssm.inner_size") // values,
        "layer_types": [
            f"{'linear' if f'blk.{block}.ssm_a' in model.weights else 'full'}_attention"
            for block in range(model.layers)
        ],
    }
    if model.architecture == "qwen35":
        return "Qwen3_5TextConfig", fields | {"intermediate_size": model.width("ffn_down.weight")}
    experts = model.experts() | {
        "shared_expert_intermediate_size": model.width("ffn_down_shexp.weight")
    }
    model.expect("expert_gating_func", SOFTMAX)
    return "Qwen3_5MoeTextConfig", fields | experts


def _gemma(model: _Model) -> Made:
    return "GemmaConfig", model.dense()


def _gemma2(model: _Model) -> Made:
    return "Gemma2Config", model.dense() | {
        "query_pre_attn_scalar": _query_scalar(model, 46),
        "sliding_window": model.number("attention.sliding_window", 4096),
        "attn_logit_softcapping": model.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": model.real("final_logit_softcapping", 30.0),
    }


def _gemma3(model: _Model) -> Made:
    window, full = model.number("attention.sliding_window", 0), model.rope()
    local = {"rope_type": "default", "rope_theta": model.real("rope.freq_base_swa", 10000.0)}
    model.expect("attention.sliding_window_pattern", 6)
    fields: dict[str, Any] = {
        "query_pre_attn_scalar": _query_scalar(model, 62),
        "rope_parameters": {"full_attention": full, "sliding_attention": local},
        "final_logit_softcapping": model.value("final_logit_softcapping"),
        "sliding_window": window or None,
    }
    if not window:
        fields["layer_types"] = ["full_attention"] * model.layers
    return "Gemma3TextConfig", model.dense() | fields


def _query_scalar(model: _Model, largest: int) -> int:
    """Return what queries are scaled by, in no file: llama.cpp knows the largest models."""
    return model.hidden // model.heads if model.layers == largest else model.head_dim


def _phi3(model: _Model) -> Made:
    original = model.number("rope.scaling.original_context_length", model.context)
    scaling: dict[str, Any] = {}
    if "rope_factors_long.weight" in model.weights:
        for kind in ("long", "short"):
            factors = model.weights[f"rope_factors_{kind}.weight"].dequantize()
            scaling[f"{kind}_factor"] = factors.reshape(-1).tolist()
        scaling |= {"rope_type": "longrope", "original_max_position_embeddings": original}
        scaling["factor"] = model.context / original
        scaling["attention_factor"] = model.real("rope.scaling.attn_factor", 1.0)
    return "Phi3Config", model.dense(partial=True) | {
        "rope_parameters": model.rope(partial=True, **scaling),
        "original_max_position_embeddings": original,
        "sliding_window": model.number("attention.sliding_window", 0) or None,
    }


def _gpt_oss(model: _Model) -> Made:
    experts = model.experts()
    model.expect("expert_gating_func", SOFTMAX, 3)
    return "GptOssConfig", model.attention() | {
        "num_local_experts": experts["num_experts"],
        "num_experts_per_tok": experts["num_experts_per_tok"],
        "intermediate_size": experts["moe_intermediate_size"],
        "sliding_window": model.number("attention.sliding_window"),
        "rope_parameters": model.rope(truncate=False),
    }


def _glm4(model: _Model) -> Made:
    return "Glm4Config", model.dense(partial=True) | {"attention_bias": model.has("attn_q.bias")}


def _glm4moe(model: _Model) -> Made:
    model.expect("expert_gating_func", SIGMOID)
    return "Glm4MoeConfig", model.attention() | _routed(model) | {
        "attention_bias": model.has("attn_q.bias"),
        "use_qk_norm": model.has("attn_q_norm.weight"),
        "rope_parameters": model.rope(partial=True),
        "norm_topk_prob": bool(model.value("expert_weights_norm", default=True)),
        "n_group": model.number("expert_group_count", 1),
        "topk_group": model.number("expert_group_used_count", 1),
    }


def _routed(model: _Model) -> dict[str, Any]:
    """Return the fields of experts of which some are shared, after some dense blocks."""
    experts, shared = model.experts(), model.number("expert_shared_count", 0)
    dense = model.number("leading_dense_block_count", 0)
    if dense:
        experts["intermediate_size"] = model.width("ffn_down.weight")
    return experts | {
        "n_routed_experts": experts.pop("num_experts"),
        "n_shared_experts": shared,
        "first_k_dense_replace": dense,
        "routed_scaling_factor": model.real("expert_weights_scale", 1.0),
    }


def _deepseek2(model: _Model) -> Made:
    lora, rope = model.number("attention.kv_lora_rank"), model.number("rope.dimension_count")
    keys = model.number("attention.key_length_mla", model.head_dim)
    values = model.number("attention.value_length", model.head_dim)
    model.value("attention.head_count_kv")  # llama.cpp's way of computing, of no model
    model.head_dim = rope
    parameters = model.rope()
    if parameters["rope_type"] == "yarn":
        scale = model.real("rope.scaling.yarn_log_multiplier") / 0.1
        parameters |= {"mscale": scale, "mscale_all_dim": scale}
    fields = _routed(model) | {
        "rms_norm_eps": model.eps(),
        "num_key_value_heads": model.heads,
        "q_lora_rank": model.number("attention.q_lora_rank", 0) or None,
        "kv_lora_rank": lora,
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": keys - rope,
        "v_head_dim": model.number("attention.value_length_mla", values),
        "rope_parameters": parameters,
    }
    normed = bool(model.value("expert_weights_norm", default=False))
    if model.number("expert_gating_func", SOFTMAX) == SIGMOID:
        return "DeepseekV3Config", fields | {
            "norm_topk_prob": normed,
            "n_group": model.number("expert_group_count"),
            "topk_group": model.number("expert_group_used_count"),
        }
    model.expect("expert_gating_func", SOFTMAX)
    model.expect("expert_weights_norm", False)
    model.expect("expert_group_count", 1)
    model.expect("expert_group_used_count", 1)
    return "DeepseekV2Config", fields | {"topk_method": "greedy"}


ARCHITECTURES: dict[str, Callable[[_Model], Made]] = {
    "llama": _llama, "qwen2": _qwen2, "qwen2moe": _qwen2moe, "qwen3": _qwen3,
    "qwen3moe": _qwen3moe, "qwen35": _qwen35, "qwen35moe": _qwen35, "deepseek2": _deepseek2,
    "gemma": _gemma, "gemma2": _gemma2, "gemma3": _gemma3, "glm4": _glm4, "glm4moe": _glm4moe,
    "gpt-oss": _gpt_oss, "phi3": _phi3,
}  # fmt: skip
