"""Every block of docs/transformers.md runs as it stands there, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import tokenizers
from transformers import PreTrainedTokenizerFast

import hf_conversion as hc
from commands import LIMIT_S

PAGE = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# What each block prints, by a word that only it has.
SAYS = {
    "import from_pretrained": "LlamaForCausalLM torch.Size([1, 3, 80])",
    "gguf_reader.install()": "llama 81",
    "prewarm_async": "LlamaForCausalLM torch.bfloat16",
}
TOKENS = ["<unk>", "<s>", "</s>", *(chr(33 + number) for number in range(76)), "ab"]


@pytest.mark.parametrize("word", SAYS)
def test_blocks(tmp_path: Path, word: str) -> None:
    architecture, model = hc.make("llama")
    key = "tokenizer.ggml."
    special, plain = int(gguf.TokenType.CONTROL), int(gguf.TokenType.NORMAL)
    more = {
        f"{key}model": "gpt2", f"{key}pre": "default", f"{key}tokens": TOKENS,
        f"{key}token_type": [special] * 3 + [plain] * 77, f"{key}merges": ["a b"],
    }  # fmt: skip
    hc.write(tmp_path / "model.gguf", architecture, model, more=more)
    model.save_pretrained(tmp_path / "checkpoint")
    words = tokenizers.models.WordLevel({token: i for i, token in enumerate(TOKENS)}, "<unk>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words))
    fast.save_pretrained(tmp_path / "checkpoint")
    (block,) = (block for block in BLOCKS if word in block)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS[word] in done.stdout


def test_every_block_is_run() -> None:
    assert [sum(word in block for block in BLOCKS) for word in SAYS] == [1] * len(BLOCKS)
