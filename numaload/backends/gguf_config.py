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
        model.refuse("*", "config=, since a file of it does not say all", None)
    for key, values in row.expected.items():
        model.expect(key, *values)
    fields = {name: model.field(spec) for name, spec in (COMMON | row.fields).items()}
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

    def field(self, spec: Spec) -> Any:
        if callable(spec):
            return spec(self)
        if isinstance(spec, str):
            return self.width(spec[1:]) if spec.startswith(".") else self.number(spec)
        key, default = spec
        if isinstance(default, bool):
            return bool(self.value(key, default))
        return self.real(key, default) if isinstance(default, float) else self.number(key, default)

    def token(self, which: str) -> Any:
        return self.weights.metadata.get(f"tokenizer.ggml.{which}_token_id")

    def original(self) -> int:
        """Return the context that scaled rotary embeddings were trained with."""
        return self.number("rope.scaling.original_context_length", self.context)

    def number(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self.value(key, default)
        least = 0 if default == 0 else 1
        if type(value) is not int or not least <= value <= most:
            self.refuse(key, f"a number, {least} to {most}", value)
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.value(key, default)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            self.refuse(key, "a positive number", value)
        short = np.float32(value)  # "3e-05" became 2.99999992e-05 when it was written as one
        return float(str(short)) if short == value else float(value)

    def expect(self, key: str, *values: Any) -> Any:
        """Check a key, where it is there, for what alone is known to be computed; return that."""
        found = self.value(key, values[0])
        if found not in values:
            self.refuse(key, " or ".join(map(repr, values)), found)
        return found

    def has(self, name: str) -> bool:
        return any(f"blk.{block}.{name}" in self.weights for block in range(self.layers))

    def width(self, name: str, axis: int = -1) -> int:
        """Return a dim of a tensor, or of the first block's that has one."""
        names = [name, *(f"blk.{block}.{name}" for block in range(getattr(self, "layers", 0)))]
        tensor = next((self.weights[one] for one in names if one in self.weights), None)
        if tensor is None or not tensor.shape:
            raise UsageError(f"{self.weights.paths[0]}: there is no tensor {name!r}")
        return int(tensor.shape[axis])

    def rope(self, rotated: int | None = None, **more: Any) -> dict[str, Any]:
        """Return rope_parameters. rotated: dims of each head; None: any. more: their own fields."""
        theta = self.real("rope.freq_base", 10000.0)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if rotated is None:
            rope["partial_rotary_factor"] = self.rotated / self.head_dim
        else:
            self.expect("rope.dimension_count", rotated)
        kinds = ("none", "linear", "yarn", more.get("rope_type"))
        kind = self.expect("rope.scaling.type", *kinds)
        if kind in ("linear", "yarn"):
            rope |= {"rope_type": kind, "factor": self.real("rope.scaling.factor")}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = self.original()
            for name in ("beta_fast", "beta_slow", "attn_factor"):
                key = f"rope.scaling.yarn_{name}"
                if self.value(key) is not None:
                    rope[name.replace("attn_", "attention_")] = self.real(key)
            self.expect("rope.scaling.yarn_ext_factor", 1.0)
        if "rope_freqs.weight" in self.weights:
            rope |= self._llama3(theta)
        return rope | more

    def _llama3(self, theta: float) -> dict[str, Any]:
        """Return the parameters that give the file's factors: it has these alone.

        Source: LlamaModel.generate_extra_tensors of llama.cpp's conversion/llama.py.
        """
        found = self.weights["rope_freqs.weight"].dequantize().reshape(-1)
        low, high, context = LLAMA3.values()
        factor = float(found.max(initial=1.0))
        lengths = 2 * math.pi * theta ** (np.arange(found.size) / max(found.size, 1))
        smooth = np.clip((context / lengths - low) / (high - low), 0, 1)
        expected = 1 / ((1 - smooth) / factor + smooth)
        if 2 * found.size != self.rotated or not np.allclose(found, expected, rtol=1e-4):
            self.refuse("rope", "factors in rope_freqs.weight as Llama 3's", found[:4].tolist())
        return {"rope_type": "llama3", "factor": factor, **LLAMA3}

    def long_rope(self) -> dict[str, Any]:
        """Return the parameters of phi3, whose factors of long contexts are tensors."""
        names = {f"{kind}_factor": f"rope_factors_{kind}.weight" for kind in ("long", "short")}
        factors = {
            k: self.weights[n].dequantize().tolist() for k, n in names.items() if n in self.weights
        }
        if not factors:
            return self.rope()
        more: dict[str, Any] = {"original_max_position_embeddings": self.original()}
        more |= {"rope_type": "longrope", "factor": self.context / self.original()}
        more["attention_factor"] = self.real("rope.scaling.attn_factor", 1.0)
        return self.rope(**more, **factors)

    def mla_rope(self) -> dict[str, Any]:
        """Return the parameters of deepseek2; mscale is in no file: llama.cpp takes it as equal."""
        rope = self.rope(self.rotated)
        if rope["rope_type"] == "yarn":
            scale = round(self.real("rope.scaling.yarn_log_multiplier") / 0.1, 6)
            rope |= {"mscale": scale, "mscale_all_dim": scale}
        return rope

    def mla_length(self, which: str) -> int:
        """Return the length of "key" or "value", under the name of old files or of new ones."""
        length = self.number(f"attention.{which}_length", self.head_dim)
        return self.number(f"attention.{which}_length_mla", length)

    def query_scalar(self, largest: int) -> int:
        """Return what queries are scaled by, in no file: llama.cpp knows the largest models."""
        return self.hidden // self.heads if self.layers == largest else self.head_dim

    def dense_width(self) -> int:
        """Return the width of dense blocks; where there are none, what the file says of it."""
        if self.has("ffn_down.weight"):
            return self.width("ffn_down.weight")
        return self.number("feed_forward_length", self.width("ffn_down_exps.weight"))

    def check_unread(self) -> None:
        """Check that no key was passed over. Raises: UsageError."""
        prefix = f"{self.architecture}."
        for key in self.weights.metadata:
            name = key.removeprefix(prefix)
            if key.startswith(prefix) and name not in self.read and name not in SILENT:
                self.refuse(name, "no such key", self.weights.metadata[key])


# What a field is read from: a key; a key and a default; ".name", a tensor's width; a function.
Spec = str | tuple[str, float] | Callable[[_Model], Any]


class Row(NamedTuple):
    """A class of configurations, its fields, and keys with the only values that are known."""

    config: str
    fields: dict[str, Spec]
    expected: Mapping[str, tuple[Any, ...]] = {}


COMMON: dict[str, Spec] = {
    "num_hidden_layers": lambda m: m.layers, "hidden_size": lambda m: m.hidden,
    "num_attention_heads": lambda m: m.heads, "max_position_embeddings": lambda m: m.context,
    "rms_norm_eps": lambda m: m.real("attention.layer_norm_rms_epsilon"),
    "vocab_size": lambda m: m.width("token_embd.weight", 0),
    "tie_word_embeddings": lambda m: "output.weight" not in m.weights,
    "bos_token_id": lambda m: m.token("bos"), "eos_token_id": lambda m: m.token("eos"),
    "pad_token_id": lambda m: m.token("padding"),
}  # fmt: skip
ATTENTION: dict[str, Spec] = {
    "num_key_value_heads": lambda m: m.number("attention.head_count_kv", m.heads),
    "head_dim": lambda m: m.expect("attention.value_length", m.head_dim),
    "rope_parameters": lambda m: m.rope(m.head_dim),
}
DENSE: dict[str, Spec] = ATTENTION | {"intermediate_size": ".ffn_down.weight"}
BIASED: dict[str, Spec] = {"attention_bias": lambda m: m.has("attn_q.bias")}
PARTIAL: dict[str, Spec] = {"rope_parameters": _Model.rope}
USED, WIDTH = "expert_used_count", ".ffn_down_exps.weight"
COUNT: Spec = lambda m: m.width(WIDTH[1:], 0)  # noqa: E731 - as the others of the table
EXPERTS: dict[str, Spec] = {
    "num_experts": COUNT, "num_experts_per_tok": USED, "moe_intermediate_size": WIDTH,
    "intermediate_size": _Model.dense_width,
}  # fmt: skip
LOCAL_EXPERTS: dict[str, Spec] = {
    "num_local_experts": COUNT, "num_experts_per_tok": USED, "intermediate_size": WIDTH,
}  # fmt: skip
SHARED: dict[str, Spec] = {"shared_expert_intermediate_size": ".ffn_down_shexp.weight"}
ROUTED: dict[str, Spec] = {
    "n_routed_experts": COUNT, "num_experts_per_tok": USED, "moe_intermediate_size": WIDTH,
    "intermediate_size": _Model.dense_width, "n_shared_experts": ("expert_shared_count", 0),
    "first_k_dense_replace": ("leading_dense_block_count", 0),
    "routed_scaling_factor": ("expert_weights_scale", 1.0),
}  # fmt: skip
MLA: dict[str, Spec] = ROUTED | {
    "num_key_value_heads": lambda m: m.heads,  # llama.cpp's computing needs one
    "q_lora_rank": lambda m: m.number("attention.q_lora_rank", 0) or None,
    "kv_lora_rank": "attention.kv_lora_rank", "qk_rope_head_dim": lambda m: m.rotated,
    "qk_nope_head_dim": lambda m: m.mla_length("key") - m.rotated,
    "v_head_dim": lambda m: m.mla_length("value"), "rope_parameters": _Model.mla_rope,
}  # fmt: skip
LINEAR: dict[str, Spec] = ATTENTION | {
    "rope_parameters": lambda m: m.rope(
        mrope_section=[s for s in list(m.value("rope.dimension_sections", ()))[:4] if s],
        mrope_interleaved=True,
    ),
    "layer_types": lambda m: [
        ("full", "linear")[f"blk.{i}.ssm_a" in m.weights] + "_attention" for i in range(m.layers)
    ],
    "linear_conv_kernel_dim": "ssm.conv_kernel", "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count", "linear_num_value_heads": "ssm.time_step_rank",
    "linear_value_head_dim": lambda m: m.number("ssm.inner_size") // m.number("ssm.time_step_rank"),
}  # fmt: skip
SOFT: dict[str, tuple[Any, ...]] = {
    "expert_gating_func": (SOFTMAX,),
    "expert_weights_scale": (1.0,),
}
DEFAULT = {"rope_type": "default"}
NORMED = ("expert_weights_norm", True)
ROWS = {
    "llama": Row("LlamaConfig", DENSE | BIASED | {"mlp_bias": lambda m: m.has("ffn_down.bias")}),
    "mixtral": Row("MixtralConfig", ATTENTION | LOCAL_EXPERTS, SOFT),
    "qwen2": Row("Qwen2Config", DENSE),
    "qwen2moe": Row(
        "Qwen2MoeConfig", ATTENTION | EXPERTS | SHARED | {"norm_topk_prob": lambda _: False},
        SOFT | {"expert_weights_norm": (False,)},
    ),
    "qwen3": Row("Qwen3Config", DENSE | BIASED),
    "qwen3moe": Row(
        "Qwen3MoeConfig", ATTENTION | EXPERTS | BIASED | {"norm_topk_prob": lambda _: True},
        SOFT | {"expert_weights_norm": (True,)},
    ),
    "qwen35": Row("Qwen3_5TextConfig", LINEAR | {"intermediate_size": ".ffn_down.weight"}),
    "qwen35moe": Row("Qwen3_5MoeTextConfig", LINEAR | EXPERTS | SHARED, SOFT),
    "deepseek2": Row(
        "DeepseekV2Config", MLA | {"topk_method": lambda _: "greedy"},
        {"expert_gating_func": (SOFTMAX,), "expert_weights_norm": (False,)}
        | {"expert_group_count": (1,), "expert_group_used_count": (1,)},
    ),
    "deepseek3": Row(
        "DeepseekV3Config",
        MLA | {"norm_topk_prob": ("expert_weights_norm", False), "n_group": "expert_group_count"}
        | {"topk_group": "expert_group_used_count"},
    ),
    "gemma": Row("GemmaConfig", DENSE),
    "gemma2": Row("Gemma2Config", DENSE | {
        "query_pre_attn_scalar": lambda m: m.query_scalar(46),
        "sliding_window": ("attention.sliding_window", 4096),
        "attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": ("final_logit_softcapping", 30.0),
    }),
    "gemma3": Row("Gemma3TextConfig", DENSE | {
        "query_pre_attn_scalar": lambda m: m.query_scalar(62),
        "rope_parameters": lambda m: {
            "full_attention": m.rope(m.head_dim),
            "sliding_attention": {"rope_theta": m.real("rope.freq_base_swa", 10000.0)} | DEFAULT,
        },
        "sliding_window": "attention.sliding_window",
        "final_logit_softcapping": lambda m: m.value("final_logit_softcapping"),
    }, {"attention.sliding_window_pattern": (6,)}),
    "glm4": Row("Glm4Config", DENSE | BIASED | PARTIAL),
    "glm4moe": Row("Glm4MoeConfig", ATTENTION | ROUTED | BIASED | PARTIAL | {
        "use_qk_norm": lambda m: m.has("attn_q_norm.weight"), "norm_topk_prob": NORMED,
        "n_group": ("expert_group_count", 1), "topk_group": ("expert_group_used_count", 1),
    }, {"expert_gating_func": (SIGMOID,)}),
    "gpt-oss": Row("GptOssConfig", ATTENTION | LOCAL_EXPERTS | {
        "sliding_window": "attention.sliding_window",
        "rope_parameters": lambda m: m.rope(m.head_dim, truncate=False),
    }, {"expert_gating_func": (SOFTMAX, SOFTMAX_OF_CHOSEN)}),
    "phi3": Row("Phi3Config", DENSE | {
        "rope_parameters": _Model.long_rope, "original_max_position_embeddings": _Model.original,
        "sliding_window": lambda m: m.number("attention.sliding_window", 0) or None,
    }),
}  # fmt: skip
