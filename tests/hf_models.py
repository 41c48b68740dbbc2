"""Small models as llama.cpp converts them, and what a module of transformers must hold of them.

What is expected is made by gguf-py's dequantization and plain numpy, block by block and name by
name: another way than numaload's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import QuantType
from numaload.samples import random_blocks

Q = QuantType
HIDDEN, INNER, VOCABULARY, LAYERS, HEADS, KV_HEADS = 256, 512, 96, 3, 4, 2
MOE = ("qwen2moe", "qwen3moe")
EXPERTS, EXPERT_INNER, SHARED_INNER = 4, 256, 256
KV_LORA, NOPE, ROPE, VALUE, Q_LORA = 256, 64, 32, 64, 256
KV_A = "kv_a_proj_with_mqa.weight"
TYPES = (Q.Q4_K, Q.Q6_K, Q.Q5_K, Q.Q3_K, Q.Q8_0, Q.Q2_K, Q.BF16, Q.F16, Q.F32)


@dataclass
class Made:
    """A GGUF file, and the float32 arrays of the module's keys."""

    path: Path
    expected: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Writer:
    """Adds tensors with random blocks, types in turn; says what they are as float32."""

    def __init__(self, path: Path, architecture: str, seed: int = 0) -> None:
        self.rng, self.count = np.random.default_rng(seed), 0
        self.writer = gguf.GGUFWriter(str(path), architecture)

    def add(self, name: str, shape: tuple[int, ...], qtype: QuantType | None = None) -> Any:
        if qtype is None:
            qtype = Q.F32 if len(shape) == 1 or "norm" in name else TYPES[self.count % len(TYPES)]
            self.count += len(shape) > 1
        rows = int(np.prod(shape[:-1]))
        blocks = random_blocks(qtype, rows, shape[-1], self.rng)
        if qtype is Q.F32:
            values = blocks.view(np.float32).reshape(shape)
            self.writer.add_tensor(name, values)
            return values
        raw = gguf.GGMLQuantizationType(qtype)
        self.writer.add_tensor(name, blocks.reshape(*shape[:-1], -1), raw_dtype=raw)
        return gguf.dequantize(blocks, raw).reshape(shape).astype(np.float32)

    def close(self) -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def common_metadata(writer: Any, **sizes: int) -> None:
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(sizes.get("kv_heads", KV_HEADS))
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCABULARY)


def permuted_back(array: Any, heads: int) -> Any:
    """Row r of a head comes from row 2 * (r % half) + r // half of llama.cpp's."""
    rows = len(array) // heads
    half = rows // 2
    order = [h * rows + 2 * (r % half) + r // half for h in range(heads) for r in range(rows)]
    return array[order]


def write(
    path: Path,
    architecture: str,
    *,
    tied: bool = False,
    fused: bool = True,
    old_kv_b: bool = False,
    experts: bool = False,
) -> Made:
    """One of the architectures that load_state_dict knows.

    fused: experts are expected as transformers 5 has them, else one by one. old_kv_b: as files of
    before llama.cpp split kv_b_proj. experts: also where the architecture needs none (Mixtral).
    """
    made, out = Made(path), Writer(path, architecture)
    deepseek, moe = architecture == "deepseek2", experts or architecture in MOE
    common_metadata(out.writer, kv_heads=HEADS if deepseek else KV_HEADS)
    expected = made.expected
    expected["model.embed_tokens.weight"] = out.add("token_embd.weight", (VOCABULARY, HIDDEN))
    for number in range(LAYERS):
        layer = Layer(out, f"blk.{number}.", f"model.layers.{number}.", architecture)
        expected |= layer.norms()
        expected |= layer.mla(old_kv_b=old_kv_b) if deepseek else layer.attention()
        has_experts = moe or (deepseek and number > 0)
        expected |= layer.experts(fused=fused) if has_experts else layer.mlp()
    expected["model.norm.weight"] = out.add("output_norm.weight", (HIDDEN,))
    expected["lm_head.weight"] = expected["model.embed_tokens.weight"]
    if not tied:
        expected["lm_head.weight"] = out.add("output.weight", (VOCABULARY, HIDDEN))
    if architecture == "llama":
        out.add("rope_freqs.weight", (32,))  # of Llama 3.1; no module has it
    if moe or deepseek:
        out.writer.add_expert_count(EXPERTS)
        out.writer.add_expert_used_count(2)
        out.writer.add_expert_feed_forward_length(EXPERT_INNER)
    out.close()
    return made


class Layer:
    def __init__(self, out: Writer, here: str, there: str, architecture: str) -> None:
        self.out, self.here, self.there, self.architecture = out, here, there, architecture

    def plain(self, name: str, key: str, *shape: int) -> tuple[str, Any]:
        return self.there + key, self.out.add(self.here + name, shape)

    def norms(self) -> dict[str, Any]:
        return dict([
            self.plain("attn_norm.weight", "input_layernorm.weight", HIDDEN),
            self.plain("ffn_norm.weight", "post_attention_layernorm.weight", HIDDEN),
        ])  # fmt: skip

    def attention(self) -> dict[str, Any]:
        head = HIDDEN // HEADS
        found: dict[str, Any] = {}
        for part, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            names = ["weight"] + ["bias"] * self.architecture.startswith("qwen2")
            for what in names:
                shape = (heads * head, HIDDEN) if what == "weight" else (heads * head,)
                array = self.out.add(f"{self.here}attn_{part}.{what}", shape)
                if self.architecture == "llama" and part != "v":
                    array = permuted_back(array, heads)
                found[f"{self.there}self_attn.{part}_proj.{what}"] = array
            if self.architecture.startswith("qwen3") and part != "v":
                found |= [
                    self.plain(f"attn_{part}_norm.weight", f"self_attn.{part}_norm.weight", head)
                ]
        found |= [self.plain("attn_output.weight", "self_attn.o_proj.weight", HIDDEN, HIDDEN)]
        return found

    def mla(self, *, old_kv_b: bool) -> dict[str, Any]:
        attn = "self_attn."
        found = dict([
            self.plain("attn_q_a.weight", attn + "q_a_proj.weight", Q_LORA, HIDDEN),
            self.plain("attn_q_a_norm.weight", attn + "q_a_layernorm.weight", Q_LORA),
            self.plain("attn_q_b.weight", attn + "q_b_proj.weight", HEADS * (NOPE + ROPE), Q_LORA),
            self.plain("attn_kv_a_mqa.weight", attn + KV_A, KV_LORA + ROPE, HIDDEN),
            self.plain("attn_kv_a_norm.weight", attn + "kv_a_layernorm.weight", KV_LORA),
            self.plain("attn_output.weight", attn + "o_proj.weight", HIDDEN, HEADS * VALUE),
        ])  # fmt: skip
        key = f"{self.there}self_attn.kv_b_proj.weight"
        if old_kv_b:
            found[key] = self.out.add(
                f"{self.here}attn_kv_b.weight", (HEADS * (NOPE + VALUE), KV_LORA)
            )
            return found
        # Rows of 64: only types with small blocks.
        keys = self.out.add(f"{self.here}attn_k_b.weight", (HEADS, KV_LORA, NOPE), Q.Q8_0)
        values = self.out.add(f"{self.here}attn_v_b.weight", (HEADS, VALUE, KV_LORA))
        heads = [np.concatenate([keys[h].T, values[h]]) for h in range(HEADS)]
        found[key] = np.concatenate(heads)
        return found

    def mlp(self) -> dict[str, Any]:
        return dict([
            self.plain("ffn_gate.weight", "mlp.gate_proj.weight", INNER, HIDDEN),
            self.plain("ffn_up.weight", "mlp.up_proj.weight", INNER, HIDDEN),
            self.plain("ffn_down.weight", "mlp.down_proj.weight", HIDDEN, INNER),
        ])  # fmt: skip

    def experts(self, *, fused: bool) -> dict[str, Any]:
        add, here = self.out.add, self.here
        gate = add(f"{here}ffn_gate_exps.weight", (EXPERTS, EXPERT_INNER, HIDDEN))
        up = add(f"{here}ffn_up_exps.weight", (EXPERTS, EXPERT_INNER, HIDDEN))
        down = add(f"{here}ffn_down_exps.weight", (EXPERTS, HIDDEN, EXPERT_INNER))
        found = dict(self._router())
        at = f"{self.there}mlp.experts."
        if fused:
            both = [np.concatenate([gate[e], up[e]]) for e in range(EXPERTS)]
            return found | {at + "gate_up_proj": np.stack(both), at + "down_proj": down}
        for expert in range(EXPERTS):
            for name, array in (("gate", gate), ("up", up), ("down", down)):
                found[f"{at}{expert}.{name}_proj.weight"] = array[expert]
        return found

    def _router(self) -> Iterator[tuple[str, Any]]:
        yield self.plain("ffn_gate_inp.weight", "mlp.gate.weight", EXPERTS, HIDDEN)
        shared = {"qwen2moe": "shared_expert", "deepseek2": "shared_experts"}.get(self.architecture)
        if self.architecture == "deepseek2":
            yield self.plain("exp_probs_b.bias", "mlp.gate.e_score_correction_bias", EXPERTS)
        if shared:
            mlp = f"mlp.{shared}."
            yield self.plain(
                "ffn_gate_shexp.weight", mlp + "gate_proj.weight", SHARED_INNER, HIDDEN
            )
            yield self.plain("ffn_up_shexp.weight", mlp + "up_proj.weight", SHARED_INNER, HIDDEN)
            yield self.plain(
                "ffn_down_shexp.weight", mlp + "down_proj.weight", HIDDEN, SHARED_INNER
            )
        if self.architecture == "qwen2moe":
            key, array = self.plain(
                "ffn_gate_inp_shexp.weight", "mlp.shared_expert_gate.weight", HIDDEN
            )
            yield key, array[None]
