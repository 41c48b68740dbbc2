"""docs/torch.md and docs/safetensors.md: their blocks run as they stand there."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload
from numaload.demo import write_model
from pages import blocks, fences, run
from scaled_models import mxfp4
from scaled_models import write as write_quantized

torch = pytest.importorskip("torch")
library: Any = pytest.importorskip("safetensors.torch")

# What each block prints, by a word that only it has; nothing where it asserts by itself.
TORCH = {
    "floats = tensor": "torch.uint8 (1024, 576) torch.bfloat16 (1024, 1024)",
    "mirror.pinned": "0 torch.Size([1024, 576])",
    "norm().item()": "blk.0.attn_q.weight (1024, 1024)",
    "layer0.pt": "",
    "name_map": "[] ",
    "mirror.local(), ": "blk.0.attn_q.weight bfloat16 2097152",
}
SAFETENSORS = {
    "dict(weights.metadata)": "4 tensors in 2 files {'format': 'pt'}",
    "safe_open": "",
    "quantized.safetensors": "mlp.experts.down_proj_blocks U8 MXFP4 (2, 96, 64)",
    "numaload.attach": "layers.1.norm 0 torch.Size([64])",
}
SAYS = {"torch.md": TORCH, "safetensors.md": SAFETENSORS}
EVERY = [(page, word) for page, words in SAYS.items() for word in words]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_model(str(tmp_path / "model.gguf"), 3 << 20)
    (tmp_path / "checkpoint").mkdir()
    where: dict[str, str] = {}
    for number in (1, 2):
        shapes = {"proj": (64, 64), "norm": (64,)}
        part = {f"layers.{number}.{n}": torch.randn(s).bfloat16() for n, s in shapes.items()}
        name = f"model-{number:05d}-of-00002.safetensors"
        library.save_file(part, tmp_path / "checkpoint" / name, {"format": "pt"})
        where |= dict.fromkeys(part, name)
    index = tmp_path / "checkpoint/model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    quantized = mxfp4("mlp.experts.down_proj", 2, 64, 3)
    write_quantized(tmp_path / "quantized.safetensors", quantized.parts)
    library.save_file({"a": torch.randn(3, 5), "b": torch.randn(7)}, tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.parametrize(("page", "word"), EVERY)
def test_a_block(page: str, word: str, folder: Path, numaload: Numaload) -> None:
    (block,) = [block for block in blocks(page) if word in block]
    assert SAYS[page][word] in run([sys.executable, "-c", block], folder, numaload)


def test_no_block_is_left_out() -> None:
    for page, words in SAYS.items():
        assert len(blocks(page)) == len(words)
        assert len(blocks(page)) + len(blocks(page, "sh")) == fences(page)


def test_the_layer_that_was_saved(folder: Path, numaload: Numaload) -> None:
    (block,) = [block for block in blocks("torch.md") if "layer0.pt" in block]
    run([sys.executable, "-c", block], folder, numaload)
    saved = torch.load(folder / "layer0.pt")
    assert saved["blk.0.attn_q.weight"].dtype == torch.float16
    assert all(name.startswith("blk.0.") for name in saved)


def test_the_commands(folder: Path, numaload: Numaload) -> None:
    (lines,) = blocks("safetensors.md", "sh")
    said = [run(["sh", "-c", line], folder, numaload) for line in lines.splitlines()]
    inspected, warmed, mirrored, status, verified, released = said
    assert "format (string) = 'pt'" in inspected
    assert "model-00001-of-00002.safetensors (2 files): " in warmed
    assert "pages there (100 %)" in mirrored
    assert "checkpoint/model-00001-of-00002.safetensors" in status
    assert "all checksums right" in verified
    assert "released" in released
