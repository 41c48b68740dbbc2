"""Names of tensors as classic ktransformers translates them to GGUF's.

Read in ``ktransformers/util/custom_gguf.py``, the same from v0.2 to its archive. Names of GGUF are
left alone; its operators mix both, as in ``blk.3.mlp.experts.0.up_proj``.
"""

from __future__ import annotations

import re

from numaload.backends.kt_kernel import loader as kt_kernel

PARTS = {"w1": "gate", "w2": "down", "w3": "up"}  # Mixtral's words
MIXTRAL = re.compile(r"model.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")
ONE_EXPERT = re.compile(r"(?:model\.layers|blk)\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")
SINGULAR = (".ffn_gate_exp", ".ffn_up_exp", ".ffn_down_exp")


def translate_name_to_gguf(name: str) -> str:
    """Translate a tensor's name to GGUF's, from Hugging Face's, GGUF's, or a mixture of both."""
    name = MIXTRAL.sub(lambda m: f"blk.{m[1]}.ffn_{PARTS[m[3]]}.{m[2]}.weight", name)
    for word in SINGULAR:
        name = name.replace(f"{word}.", f"{word}s.")
    expert = ONE_EXPERT.match(name)
    if expert:
        return f"blk.{expert[1]}.{expert[2]}.ffn_{expert[3]}_exps"
    return kt_kernel.translate_name_to_gguf(name)
