"""Names of tensors as classic ktransformers translates them: the pairs are of its own function."""

from __future__ import annotations

import pytest

from numaload.backends.ktransformers import translate_name_to_gguf

NAMES = {
    "lm_head.weight": "output.weight",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.3.input_layernorm.weight": "blk.3.attn_norm.weight",
    "model.layers.3.post_attention_layernorm.weight": "blk.3.ffn_norm.weight",
    "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
    "model.layers.3.mlp.gate_proj.weight": "blk.3.ffn_gate.weight",
    "model.layers.3.mlp.up_proj.weight": "blk.3.ffn_up.weight",
    "model.layers.12.self_attn.q_proj.bias": "blk.12.attn_q.bias",
    "model.layers.12.self_attn.k_proj.weight": "blk.12.attn_k.weight",
    "model.layers.12.self_attn.v_proj.weight": "blk.12.attn_v.weight",
    "model.layers.12.self_attn.o_proj.weight": "blk.12.attn_output.weight",
    "model.layers.12.self_attn.qkv_proj.weight": "blk.12.attn_qkv.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": "blk.3.attn_kv_a_mqa.weight",
    "model.layers.3.self_attn.kv_a_layernorm.weight": "blk.3.attn_kv_a_norm.weight",
    "model.layers.3.self_attn.kv_b_proj.weight": "blk.3.attn_kv_b.weight",
    "model.layers.3.self_attn.q_a_proj.weight": "blk.3.attn_q_a.weight",
    "model.layers.3.self_attn.q_a_layernorm.weight": "blk.3.attn_q_a_norm.weight",
    "model.layers.3.self_attn.q_b_proj.weight": "blk.3.attn_q_b.weight",
    "model.layers.3.self_attn.q_norm.weight": "blk.3.attn_q_norm.weight",
    "model.layers.3.self_attn.k_norm.weight": "blk.3.attn_k_norm.weight",
    "model.layers.3.attn_k_b.weight": "blk.3.attn_k_b.weight",
    "model.layers.3.mlp.gate.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias": "blk.3.exp_probs_b.bias",
    "model.layers.3.mlp.shared_experts.down_proj.weight": "blk.3.ffn_down_shexp.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight": "blk.3.ffn_gate_shexp.weight",
    "model.layers.3.mlp.shared_expert.up_proj.weight": "blk.3.ffn_up_shexp.weight",
    "model.layers.3.mlp.shared_expert_gate.weight": "blk.3.ffn_gate_inp_shexp.weight",
    "model.layers.3.mlp.experts": "blk.3",
    "model.layers.3.mlp.experts.ffn_up_exps.weight": "blk.3.ffn_up_exps.weight",
    "blk.3.mlp.experts.ffn_down_exps.weight": "blk.3.ffn_down_exps.weight",
    "model.layers.3.mlp.experts.17.gate_proj.weight": "blk.3.17.ffn_gate_exps",
    "model.layers.3.mlp.experts.17.up_proj": "blk.3.17.ffn_up_exps",
    "blk.3.mlp.experts.0.down_proj.weight": "blk.3.0.ffn_down_exps",
    "model.layers.3.mlp.ffn_gate_exp.weight": "blk.3.mlp.ffn_gate_exps.weight",
    "blk.3.ffn_up_exp.0.weight": "blk.3.ffn_up_exps.0.weight",
    "model.layers.3.block_sparse_moe.experts.5.w1.weight": "blk.3.ffn_gate.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w2.weight": "blk.3.ffn_down.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w3.weight": "blk.3.ffn_up.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w4.weight": "blk.3.5.w4.weight",
    "model.layers.3.block_sparse_moe.experts": "blk.3",
    "model.layers.3.block_sparse_moe.gate.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.feed_forward.experts.ffn_up_exps": "blk.3.ffn_up_exps",
    "model.layers.3.feed_forward.router.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.feed_forward.shared_experts.up_proj.weight": "blk.3.ffn_up_shexp.weight",
    "model.layers.3.feed_forward.shared_experts.down_proj.weight": "blk.3.ffn_down_shexp.weight",
    "model.layers.3.feed_forward.shared_experts.gate_proj.weight": "blk.3.ffn_gate_shexp.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_become_ggufs(name: str) -> None:
    assert translate_name_to_gguf(name) == NAMES[name]
    assert translate_name_to_gguf(NAMES[name]) == NAMES[name]
