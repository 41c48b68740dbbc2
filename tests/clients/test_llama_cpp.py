"""llama.cpp itself, as xllamacpp brings it, on files of the store that it knows nothing of."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numaload

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

WIDTH, LAYERS, HEADS, INNER, CONTEXT = 256, 2, 4, 512, 64
# What it says is the tokens and how sure it was of each, so that equal means equal weights.
GENERATE = """
import json, sys
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 64, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
asked = {"prompt": "hello", "n_predict": 16, "temperature": 0, "n_probs": 1, "ignore_eos": True}
(choice,) = server.handle_completions(asked)["choices"]
print(json.dumps([(one["id"], one["logprob"]) for one in choice["logprobs"]["content"]]))
"""


def write(path: Path, splits: int = 1) -> list[str]:
    """Write a small llama with random weights and a vocabulary of bytes; return its files."""
    per_file = -(-(9 * LAYERS + 3) // splits) if splits > 1 else 0
    writer = gguf.GGUFWriter(str(path), "llama", split_max_tensors=per_file)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    letters = ["\u2581", *map(chr, range(ord("a"), ord("z") + 1))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL]
    writer.add_token_types([*kinds, *[kind.BYTE] * 256, *[kind.NORMAL] * len(letters)])
    rng = np.random.default_rng(0)
    rows = (len(tokens), WIDTH)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": rows, "output": rows, "output_norm": ()}
    for layer in range(LAYERS):
        block: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("attn_q", "attn_k", "attn_v", "attn_output"), (WIDTH, WIDTH)
        )
        block |= dict.fromkeys(("ffn_gate", "ffn_up"), (INNER, WIDTH))
        block |= {"ffn_down": (WIDTH, INNER), "attn_norm": (), "ffn_norm": ()}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        weights = rng.standard_normal(shape or (WIDTH,), np.float32) * 0.3 + (shape == ())
        writer.add_tensor(f"{name}.weight", weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(str(file) for file in path.parent.glob(f"{path.stem}*.gguf"))


def generated(path: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-c", GENERATE, path], capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("splits", [1, 3])
def test_it_generates_the_same_from_a_folder_of_the_store(tmp_path: Path, splits: int) -> None:
    files = write(tmp_path / "m.gguf", splits)
    assert len(files) == splits
    expected = generated(files[0])
    assert len(expected) > 8
    numaload.mirror(files[0], nodes="local", shared=True).close()
    folder = numaload.store.folder(files[0])
    for file in files:  # so that nothing can come from there
        os.unlink(file)
    assert generated(os.path.join(folder, os.path.basename(files[0]))) == expected
