"""Models of transformers written to GGUF files as llama.cpp's conversion writes them.

Plain numpy and gguf-py's writer, after conversion/*.py of llama.cpp. Only what these small models
need.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from hf_tiny import TINY
from numaload.formats.qtypes import QuantType
from numaload.samples import random_blocks

Q = gguf.GGMLQuantizationType
NORMS_PLUS_ONE = ("gemma", "gemma2", "gemma3", "qwen35", "qwen35moe")


def write(
    path: Path,
    architecture: str,
    model: Any,
    qtypes: tuple[Any, ...] = (),
    more: Mapping[str, Any] | None = None,
    without: tuple[str, ...] = (),
) -> None:
    """qtypes: of the matrices, in turn; of those that gguf-py cannot make: random blocks.

    more: {tensor or metadata key: array or number}. without: keys of metadata, and tensors.
    """
    writer = gguf.GGUFWriter(str(path), architecture)
    _metadata(writer, architecture, model.config)
    for key in without:
        writer.kv_data[0].pop(f"{architecture}.{key}", None)
    tensors = {name: array for name, array in _tensors(architecture, model) if name not in without}
    for key, value in (more or {}).items():
        if isinstance(value, np.ndarray):
            tensors[key] = value
        else:
            writer.kv_data[0].pop(key, None)
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    types, rng = cycle(qtypes or (Q.F32,)), np.random.default_rng(0)
    for name, array in tensors.items():
        qtype = next(types) if array.ndim > 1 and "norm" not in name else Q.F32
        if array.shape[-1] % gguf.GGML_QUANT_SIZES[qtype][0]:
            qtype = Q.F32
        try:
            blocks = gguf.quants.quantize(array, qtype)
        except NotImplementedError:
            rows = array.size // array.shape[-1]
            blocks = random_blocks(QuantType(qtype), rows, array.shape[-1], rng)
            blocks = blocks.reshape(*array.shape[:-1], -1)
        writer.add_tensor(name, blocks, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(case: str) -> tuple[str, Any]:
    """The architecture of a case of TINY, and its model with random weights, norms too."""
    import torch
    from transformers import AutoModelForCausalLM

    architecture, config = TINY[case]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "A_log" in name:
                parameter.uniform_(0, 2)
            else:
                parameter.normal_(0, 0.3 if parameter.ndim < 2 else 0.1)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.3)
    return architecture, model


def _metadata(w: Any, architecture: str, c: Any) -> None:  # noqa: C901 - a row after another
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    if getattr(c, "intermediate_size", None):
        w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(1 if architecture == "deepseek2" else c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_vocab_size(c.vocab_size)
    for token in ("bos", "eos", "pad"):
        if isinstance(getattr(c, f"{token}_token_id", None), int):
            getattr(w, f"add_{token}_token_id")(getattr(c, f"{token}_token_id"))
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    if architecture not in ("gemma", "gemma2"):
        w.add_rope_freq_base(rope["rope_theta"])
    if architecture == "gemma3":
        w.add_rope_freq_base_swa(c.rope_parameters["sliding_attention"]["rope_theta"])
    head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if architecture not in ("deepseek2", "phi3"):
        w.add_key_length(head)
        w.add_value_length(head)
    if architecture == "llama":
        w.add_rope_dimension_count(head)
    if architecture in ("glm4", "glm4moe", "phi3", "qwen35", "qwen35moe"):
        w.add_rope_dimension_count(int(head * rope["partial_rotary_factor"]))
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        w.add_rope_scaling_type(gguf.RopeScalingType(kind))
        w.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        w.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if key in rope:
                getattr(w, f"add_rope_scaling_yarn_{key}")(rope[key])
    _more_metadata(w, architecture, c, rope)


def _more_metadata(w: Any, architecture: str, c: Any, rope: Any) -> None:  # noqa: C901, PLR0912
    if architecture == "gemma2":
        w.add_attn_logit_softcapping(c.attn_logit_softcapping)
        w.add_final_logit_softcapping(c.final_logit_softcapping)
    if architecture in ("gemma2", "gemma3", "gpt-oss", "phi3"):
        w.add_sliding_window(c.sliding_window or 0)
    if architecture == "phi3":
        w.add_rope_scaling_orig_ctx_len(c.original_max_position_embeddings)
        if "long_factor" in rope:
            scale = c.max_position_embeddings / c.original_max_position_embeddings
            factor = math.sqrt(1 + math.log(scale) / math.log(c.original_max_position_embeddings))
            w.add_rope_scaling_attn_factors(factor)
    experts = getattr(c, "n_routed_experts", None) or getattr(c, "num_local_experts", None)
    experts = experts or getattr(c, "num_experts", None)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(c.num_experts_per_tok)
        w.add_expert_feed_forward_length(getattr(c, "moe_intermediate_size", c.intermediate_size))
    if hasattr(c, "shared_expert_intermediate_size"):
        w.add_expert_shared_feed_forward_length(c.shared_expert_intermediate_size)
    if architecture in ("glm4moe", "deepseek2"):
        w.add_expert_shared_count(c.n_shared_experts)
        w.add_leading_dense_block_count(c.first_k_dense_replace)
        w.add_expert_weights_scale(c.routed_scaling_factor)
        if c.norm_topk_prob:
            w.add_expert_weights_norm(value=True)
        if c.n_group:
            w.add_expert_group_count(c.n_group)
            w.add_expert_group_used_count(c.topk_group)
        if c.model_type != "deepseek_v2":
            w.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if architecture == "deepseek2":
        w.add_rope_dimension_count(c.qk_rope_head_dim)
        if c.q_lora_rank:
            w.add_q_lora_rank(c.q_lora_rank)
        w.add_kv_lora_rank(c.kv_lora_rank)
        w.add_key_length(c.kv_lora_rank + c.qk_rope_head_dim)
        w.add_value_length(c.kv_lora_rank)
        w.add_key_length_mla(c.qk_nope_head_dim + c.qk_rope_head_dim)
        w.add_value_length_mla(c.v_head_dim)
        if "mscale_all_dim" in rope:
            w.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if architecture in ("qwen35", "qwen35moe"):
        w.add_ssm_conv_kernel(c.linear_conv_kernel_dim)
        w.add_ssm_state_size(c.linear_key_head_dim)
        w.add_ssm_group_count(c.linear_num_key_heads)
        w.add_ssm_time_step_rank(c.linear_num_value_heads)
        w.add_ssm_inner_size(c.linear_value_head_dim * c.linear_num_value_heads)
        w.add_full_attention_interval(2)
        w.add_rope_dimension_sections([*rope["mrope_section"], 0][:4])


def _tensors(architecture: str, model: Any) -> Iterator[tuple[str, Any]]:
    c = model.config
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, c.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and c.tie_word_embeddings:
            continue
        for name, array in _modified(architecture, c, key, tensor.float().numpy()):
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            yield found or name, np.ascontiguousarray(array, np.float32)
    rope = c.rope_parameters
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(c)
    for kind in ("long", "short"):
        if f"{kind}_factor" in rope:
            yield f"rope_factors_{kind}.weight", np.array(rope[f"{kind}_factor"], np.float32)


def _modified(architecture: str, c: Any, key: str, a: Any) -> Iterator[tuple[str, Any]]:
    stem, _, end = key.rpartition(".")
    if ".experts." in key:
        yield from _experts(architecture, key, a)
    elif end == "e_score_correction_bias":
        yield f"{stem}.e_score_correction.bias", a
    elif end == "sinks":
        yield f"{key}.weight", a
    elif key.endswith("kv_b_proj.weight"):
        heads = a.reshape(c.num_attention_heads, c.qk_nope_head_dim + c.v_head_dim, -1)
        keys, values = np.split(heads, [c.qk_nope_head_dim], 1)
        yield key.replace("kv_b_proj", "k_b_proj"), keys.swapaxes(1, 2)
        yield key.replace("kv_b_proj", "v_b_proj"), values
    elif architecture == "llama" and (".q_proj." in key or ".k_proj." in key):
        heads = c.num_attention_heads if ".q_proj." in key else c.num_key_value_heads
        turned = a.reshape(heads, 2, len(a) // heads // 2, *a.shape[1:]).swapaxes(1, 2)
        yield key, turned.reshape(a.shape)
    elif ".linear_attn." in key:
        yield _linear(c, key, a)
    elif architecture in NORMS_PLUS_ONE and key.endswith("norm.weight"):
        yield key, a + 1
    else:
        yield key, a


def _experts(architecture: str, key: str, a: Any) -> Iterator[tuple[str, Any]]:
    block = key.split(".")[2]
    end = "bias" if key.endswith("_bias") else "weight"
    if architecture in ("gpt-oss", "llama4") and end == "weight":
        a = a.swapaxes(-1, -2)
    if "down_proj" in key:
        yield f"blk.{block}.ffn_down_exps.{end}", a
        return
    half = a.shape[1] // 2
    gate, up = (a[:, ::2], a[:, 1::2]) if architecture == "gpt-oss" else (a[:, :half], a[:, half:])
    yield f"blk.{block}.ffn_gate_exps.{end}", gate
    yield f"blk.{block}.ffn_up_exps.{end}", up


def _tile(a: Any, c: Any, size: int) -> Any:
    """Value heads grouped by key head become tiled, along the first axis."""
    each = c.linear_num_value_heads // c.linear_num_key_heads
    split = a.reshape(c.linear_num_key_heads, each, size, *a.shape[1:])
    return split.swapaxes(0, 1).reshape(a.shape)


def _linear(c: Any, key: str, a: Any) -> tuple[str, Any]:
    part = key.partition(".linear_attn.")[2].partition(".")[0]
    size = c.linear_value_head_dim
    before = 2 * c.linear_key_head_dim * c.linear_num_key_heads
    if part == "conv1d":
        a = a.squeeze(1)
    if part in ("conv1d", "in_proj_qkv"):
        a = np.concatenate([a[:before], _tile(a[before:], c, size)])
    elif part == "in_proj_z":
        a = _tile(a, c, size)
    elif part == "out_proj":
        a = _tile(a.T, c, size).T
    elif part != "norm":
        a = _tile(a, c, 1)
    if part == "A_log":
        a = -np.exp(a)
    return key.replace(".dt_bias", ".dt_proj.bias"), a


def _llama3_factors(c: Any) -> Any:
    rope, dim = c.rope_parameters, c.head_dim
    low, high = (8192 / rope[f"{which}_freq_factor"] for which in ("low", "high"))
    factors = []
    for freq in 1.0 / (rope["rope_theta"] ** (np.arange(0, dim, 2, dtype=np.float32) / dim)):
        length = 2 * math.pi / freq
        if length < high:
            factors.append(1.0)
        elif length > low:
            factors.append(rope["factor"])
        else:
            smooth = 8192 / length - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, np.float32)
