"""Every block of docs/transformers.md runs as it stands there, in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import hf_models
from commands import LIMIT_S
from hf_configs import config_of

PAGE = (Path(__file__).parents[2] / "docs/transformers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
# What each block prints, by a word that only it has.
SAYS = {
    "gguf_file": "<All keys matched successfully>\ntorch.Size([1, 3, 96])",
    '"checkpoint"': "torch.bfloat16",
    "name_map": "[] 29",
}


@pytest.mark.parametrize("word", SAYS)
def test_blocks(tmp_path: Path, word: str) -> None:
    hf_models.write(tmp_path / "model.gguf", "llama")
    LlamaForCausalLM(config_of("llama")).to(torch.float16).save_pretrained(tmp_path / "checkpoint")
    (block,) = (block for block in BLOCKS if word in block)
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SAYS[word] in done.stdout


def test_every_block_is_run() -> None:
    assert [sum(word in block for block in BLOCKS) for word in SAYS] == [1] * len(BLOCKS)
