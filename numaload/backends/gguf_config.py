"""transformers' configuration of a model, from the metadata and the tensors of its GGUF file.

Widths are what the tensors have. Where a key is absent, llama.cpp's own default counts, and where
llama.cpp computes in one way whatever a file says, that counts; so a model here is what llama.cpp
runs. A key that nobody reads is refused: it may change what is computed. Source: src/models/*.cpp
of llama.cpp, load_arch_hparams.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import numpy as np

from numaload.backends.gguf_layouts import MOST_LAYERS, check_architecture
from numaload.errors import UsageError, printable
from numaload.weights import Weights

MOST = 1 << 31
# Keys that no number depends on: sizes that tensors have, notes, what is done with the output.
SILENT = {
    "vocab_size", "feed_forward_length", "expert_feed_forward_length", "expert_count",
    "expert_shared_feed_forward_length", "rope.scaling.finetuned", "pooling_type",
    "tensor_data_layout", "full_attention_interval", "attention.head_count_kv",
}  # fmt: skip
SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN = 1, 2, 3  # llama.cpp's numbers of what weighs experts
# What Llama 3.1 to 3.3 have beside a factor.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(weights: Weights) -> Any:
    """Return transformers' configuration. Raises: UsageError for what it cannot be made of."""
    import transformers

    model = _Model(weights)
    row = ROWS.get(model.kind())
    if row is None:
        raise UsageError(
            f"{weights.paths[0]}: what {model.architecture} computes by is not known here from its"
            " file alone: give config=, of the original model"
        )
    for key, values in row.expected.items():
        model.expect(key, *values)
    fields = {name: read(model) for name, read in (COMMON | row.fields).items()}
    model.check_unread()
    try:
        return getattr(transformers, row.config)(**fields)
    except Exception as error:  # each class has checks of its own
        raise UsageError(
            f"{weights.paths[0]}: transformers' {row.config} refuses its numbers:"
            f" {printable(error)}"
        ) from error


class _Model:
    """One GGUF file: its metadata under llama.cpp's names, and which of it was read."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.architecture = weights, check_architecture(weights)
        self.read: set[str] = set()
        self.blocks = self.number("block_count", most=MOST_LAYERS)
        self.layers = self.blocks - self.number("nextn_predict_layers", 0, self.blocks - 1)
        self.hidden = self.width("token_embd.weight")
        self.heads = self.number("attention.head_count")
        self.head_dim = self.number("attention.key_length", self.hidden // self.heads)
        self.rotated = self.number("rope.dimension_count", self.head_dim)
        self.context = self.number("context_length")
        self.expect("embedding_length", self.hidden)

    def kind(self) -> str:
        """Return the name of the architecture's row: two have several."""
        if self.architecture == "llama" and self.has("ffn_down_exps.weight"):
            return "mixtral"
        if self.architecture == "deepseek2" and self.value("expert_gating_func") == SIGMOID:
            return "deepseek3"
        return self.architecture

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

    def same(self, key: str, value: Any) -> Any:
        self.expect(key, value)
        return value

    def has(self, name: str) -> bool:
        return any(f"blk.{block}.{name}" in self.weights for block in range(self.layers))

    def width(self, name: str, axis: int = -1) -> int:
        """Return a dim of a tensor, or of the first block's that has one."""
        names = [name, *(f"blk.{block}.{name}" for block in range(getattr(self, "layers", 0)))]
        tensor = next((self.weights[one] for one in names if one in self.weights), None)
        if tensor is None or not tensor.shape:
            raise UsageError(f"{self.weights.paths[0]}: there is no tensor {name!r}")
        return int(tensor.shape[axis])

    def rope(self, rotated: int, **more: Any) -> dict[str, Any]:
        """Return rope_parameters. rotated: dims of each head. more: what is not in files."""
        if self.rotated != rotated:
            self.refuse("rope.dimension_count", str(rotated), self.rotated)
        theta = self.real("rope.freq_base", 10000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        kind = self.value("rope.scaling.type", "none")
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self.real("rope.scaling.factor")}
        if kind == "yarn":
            key = "rope.scaling.original_context_length"
            rope["original_max_position_embeddings"] = self.number(key, self.context)
            for name in ("beta_fast", "beta_slow", "attn_factor"):
                key = f"rope.scaling.yarn_{name}"
                if self.value(key) is not None:
                    rope[name.replace("attn_", "attention_")] = self.real(key)
            self.expect("rope.scaling.yarn_ext_factor", 1.0)
        self.expect("rope.scaling.type", "none", "linear", "yarn", more.get("rope_type"))
        if "rope_freqs.weight" in self.weights:
            rope |= self._llama3(theta)
        return rope | more

    def partial_rope(self, **more: Any) -> dict[str, Any]:
        """Return the same where a part of each head may be rotated."""
        part = self.rotated / self.head_dim
        return self.rope(self.rotated, partial_rotary_factor=part, **more)

    def _llama3(self, theta: float) -> dict[str, Any]:
        """Return the parameters that give the file's factors: it has these alone.

        Source: LlamaModel.generate_extra_tensors of llama.cpp's conversion/llama.py.
        """
        found = self.weights["rope_freqs.weight"].dequantize().reshape(-1)
        low, high, context = LLAMA3.values()
        factor, dims = float(found.max(initial=1.0)), self.rotated
        lengths = 2 * math.pi * theta ** (np.arange(0, dims, 2) / dims)
        smooth = np.clip((context / lengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4):
            self.refuse("rope", "factors in rope_freqs.weight as Llama 3's", found[:4].tolist())
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}

    def long_rope(self) -> dict[str, Any]:
        """Return the parameters of phi3, whose factors of long contexts are tensors."""
        original = self.number("rope.scaling.original_context_length", self.context)
        if "rope_factors_long.weight" not in self.weights:
            return self.partial_rope()
        factors = {
            f"{kind}_factor": self.weights[f"rope_factors_{kind}.weight"].dequantize().tolist()
            for kind in ("long", "short")
        }
        return self.partial_rope(
            **factors,
            rope_type="longrope",
            original_max_position_embeddings=original,
            factor=self.context / original,
            attention_factor=self.real("rope.scaling.attn_factor", 1.0),
        )

    def mrope(self) -> dict[str, Any]:
        """Return the parameters of qwen35, with dims for each axis, padded to four."""
        sections = list(self.value("rope.dimension_sections", ()))[:4]
        axes = [section for section in sections if section]
        return self.partial_rope(mrope_section=axes, mrope_interleaved=True)

    def mla_rope(self) -> dict[str, Any]:
        """Return the parameters of deepseek2; mscale is in no file: llama.cpp takes it as equal."""
        rope = self.rope(self.rotated)
        if rope["rope_type"] == "yarn":
            scale = round(self.real("rope.scaling.yarn_log_multiplier") / 0.1, 6)
            rope |= {"mscale": scale, "mscale_all_dim": scale}
        return rope

    def gemma3_rope(self) -> dict[str, Any]:
        local = self.real("rope.freq_base_swa", 10000.0)
        return {
            "full_attention": self.rope(self.head_dim),
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }

    def mla_length(self, which: str) -> int:
        """Return the length of "key" or "value", under the name of old files or of new ones."""
        length = self.number(f"attention.{which}_length", self.head_dim)
        return self.number(f"attention.{which}_length_mla", length)

    def query_scalar(self, largest: int) -> int:
        """Return what queries are scaled by, in no file: llama.cpp knows the largest models."""
        return self.hidden // self.heads if self.layers == largest else self.head_dim

    def layer_types(self) -> list[str]:
        linear = [f"blk.{block}.ssm_a" in self.weights for block in range(self.layers)]
        return ["linear_attention" if one else "full_attention" for one in linear]

    def dense_width(self) -> int:
        """Return the width of dense blocks; where there are none, what the file says of it."""
        width = 0 if self.has("ffn_down.weight") else self.number("feed_forward_length", 0)
        return width or self.width("ffn_down.weight")

    def check_unread(self) -> None:
        """Check that no key was passed over. Raises: UsageError."""
        prefix = f"{self.architecture}."
        for key in self.weights.metadata:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in self.read and name not in SILENT:
                self.refuse(name, "no such key", self.weights.metadata[key])


Fields = Mapping[str, Callable[[_Model], Any]]


class Row(NamedTuple):
    """A class of configurations, its fields, and keys with the only values that are known."""

    config: str
    fields: Fields
    expected: Mapping[str, tuple[Any, ...]] = {}


COMMON: dict[str, Callable[[_Model], Any]] = {
    "num_hidden_layers": lambda m: m.layers,
    "hidden_size": lambda m: m.hidden,
    "num_attention_heads": lambda m: m.heads,
    "max_position_embeddings": lambda m: m.context,
    "rms_norm_eps": lambda m: m.real("attention.layer_norm_rms_epsilon"),
    "vocab_size": lambda m: m.width("token_embd.weight", 0),
    "tie_word_embeddings": lambda m: "output.weight" not in m.weights,
    "bos_token_id": lambda m: m.weights.metadata.get("tokenizer.ggml.bos_token_id"),
    "eos_token_id": lambda m: m.weights.metadata.get("tokenizer.ggml.eos_token_id"),
    "pad_token_id": lambda m: m.weights.metadata.get("tokenizer.ggml.padding_token_id"),
}
ATTENTION: Fields = {
    "num_key_value_heads": lambda m: m.number("attention.head_count_kv", m.heads),
    "head_dim": lambda m: m.same("attention.value_length", m.head_dim),
    "rope_parameters": lambda m: m.rope(m.head_dim),
}
DENSE: Fields = {**ATTENTION, "intermediate_size": lambda m: m.width("ffn_down.weight")}
BIASED: Fields = {"attention_bias": lambda m: m.has("attn_q.bias")}
PARTIAL: Fields = {"rope_parameters": lambda m: m.partial_rope()}
EXPERTS: Fields = {
    "num_experts": lambda m: m.width("ffn_down_exps.weight", 0),
    "num_experts_per_tok": lambda m: m.number("expert_used_count"),
    "moe_intermediate_size": lambda m: m.width("ffn_down_exps.weight"),
    "intermediate_size": lambda m: m.dense_width(),
}
SHARED: Fields = {
    "shared_expert_intermediate_size": lambda m: m.width("ffn_down_shexp.weight"),
}
LOCAL_EXPERTS: Fields = {
    "num_local_experts": EXPERTS["num_experts"],
    "num_experts_per_tok": EXPERTS["num_experts_per_tok"],
    "intermediate_size": EXPERTS["moe_intermediate_size"],
}
ROUTED: Fields = {
    **{name: read for name, read in EXPERTS.items() if name != "num_experts"},
    "n_routed_experts": EXPERTS["num_experts"],
    "n_shared_experts": lambda m: m.number("expert_shared_count", 0),
    "first_k_dense_replace": lambda m: m.number("leading_dense_block_count", 0),
    "routed_scaling_factor": lambda m: m.real("expert_weights_scale", 1.0),
}
MLA: Fields = {
    **ROUTED,
    "num_key_value_heads": lambda m: m.heads,  # llama.cpp's computing needs one
    "q_lora_rank": lambda m: m.number("attention.q_lora_rank", 0) or None,
    "kv_lora_rank": lambda m: m.number("attention.kv_lora_rank"),
    "qk_rope_head_dim": lambda m: m.rotated,
    "qk_nope_head_dim": lambda m: m.mla_length("key") - m.rotated,
    "v_head_dim": lambda m: m.mla_length("value"),
    "rope_parameters": lambda m: m.mla_rope(),
}
LINEAR: Fields = {
    **ATTENTION,
    "rope_parameters": lambda m: m.mrope(),
    "layer_types": lambda m: m.layer_types(),
    "linear_conv_kernel_dim": lambda m: m.number("ssm.conv_kernel"),
    "linear_key_head_dim": lambda m: m.number("ssm.state_size"),
    "linear_num_key_heads": lambda m: m.number("ssm.group_count"),
    "linear_num_value_heads": lambda m: m.number("ssm.time_step_rank"),
    "linear_value_head_dim": lambda m: m.number("ssm.inner_size") // m.number("ssm.time_step_rank"),
}
QWEN_EXPERTS: dict[str, Any] = {"expert_gating_func": (SOFTMAX,), "expert_weights_scale": (1.0,)}
ROWS = {
    "llama": Row("LlamaConfig", {**DENSE, **BIASED, "mlp_bias": lambda m: m.has("ffn_down.bias")}),
    "mixtral": Row(
        "MixtralConfig", {**ATTENTION, **LOCAL_EXPERTS}, {"expert_gating_func": (SOFTMAX,)}
    ),
    "qwen2": Row("Qwen2Config", DENSE),
    "qwen2moe": Row(
        "Qwen2MoeConfig",
        {**ATTENTION, **EXPERTS, **SHARED, "norm_topk_prob": lambda _: False},
        {**QWEN_EXPERTS, "expert_weights_norm": (False,)},
    ),
    "qwen3": Row("Qwen3Config", {**DENSE, **BIASED}),
    "qwen3moe": Row(
        "Qwen3MoeConfig",
        {**ATTENTION, **EXPERTS, **BIASED, "norm_topk_prob": lambda _: True},
        {**QWEN_EXPERTS, "expert_weights_norm": (True,)},
    ),
    "qwen35": Row(
        "Qwen3_5TextConfig", {**LINEAR, "intermediate_size": DENSE["intermediate_size"]}
    ),
    "qwen35moe": Row("Qwen3_5MoeTextConfig", {**LINEAR, **EXPERTS, **SHARED}, QWEN_EXPERTS),
    "deepseek2": Row(
        "DeepseekV2Config",
        {**MLA, "topk_method": lambda _: "greedy"},
        {
            "expert_gating_func": (SOFTMAX,), "expert_weights_norm": (False,),
            "expert_group_count": (1,), "expert_group_used_count": (1,),
        },  # fmt: skip
    ),
    "deepseek3": Row(
        "DeepseekV3Config",
        {
            **MLA,
            "norm_topk_prob": lambda m: bool(m.value("expert_weights_norm", default=False)),
            "n_group": lambda m: m.number("expert_group_count"),
            "topk_group": lambda m: m.number("expert_group_used_count"),
        },
    ),
    "gemma": Row("GemmaConfig", DENSE),
    "gemma2": Row(
        "Gemma2Config",
        {
            **DENSE,
            "query_pre_attn_scalar": lambda m: m.query_scalar(46),
            "sliding_window": lambda m: m.number("attention.sliding_window", 4096),
            "attn_logit_softcapping": lambda m: m.real("attn_logit_softcapping", 50.0),
            "final_logit_softcapping": lambda m: m.real("final_logit_softcapping", 30.0),
        },
    ),
    "gemma3": Row(
        "Gemma3TextConfig",
        {
            **DENSE,
            "query_pre_attn_scalar": lambda m: m.query_scalar(62),
            "rope_parameters": lambda m: m.gemma3_rope(),
            "sliding_window": lambda m: m.number("attention.sliding_window"),
            "final_logit_softcapping": lambda m: m.value("final_logit_softcapping"),
        },
        {"attention.sliding_window_pattern": (6,)},
    ),
    "glm4": Row("Glm4Config", {**DENSE, **BIASED, **PARTIAL}),
    "glm4moe": Row(
        "Glm4MoeConfig",
        {
            **ATTENTION, **ROUTED, **BIASED, **PARTIAL,
            "use_qk_norm": lambda m: m.has("attn_q_norm.weight"),
            "norm_topk_prob": lambda m: bool(m.value("expert_weights_norm", default=True)),
            "n_group": lambda m: m.number("expert_group_count", 1),
            "topk_group": lambda m: m.number("expert_group_used_count", 1),
        },
        {"expert_gating_func": (SIGMOID,)},
    ),
    "gpt-oss": Row(
        "GptOssConfig",
        {
            **ATTENTION, **LOCAL_EXPERTS,
            "sliding_window": lambda m: m.number("attention.sliding_window"),
            "rope_parameters": lambda m: m.rope(m.head_dim, truncate=False),
        },
        {"expert_gating_func": (SOFTMAX, SOFTMAX_OF_CHOSEN)},
    ),
    "phi3": Row(
        "Phi3Config",
        {
            **DENSE,
            "rope_parameters": lambda m: m.long_rope(),
            "original_max_position_embeddings": lambda m: m.number(
                "rope.scaling.original_context_length", m.context
            ),
            "sliding_window": lambda m: m.number("attention.sliding_window", 0) or None,
        },
    ),
}  # fmt: skip
