"""Switching bases and LoRAs through the store, in real diffusers, transformers and peft.

Everything is loaded by these programs themselves, by paths that numaload gives; what comes out is
compared with what they load from disk. The models are small, with random weights.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import numaload

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

pytestmark = pytest.mark.filterwarnings("default")  # what diffusers, peft and torch deprecate

RANK = 4
Folder = Callable[[Path, str], str]


def base(folder: Path, seed: int) -> Path:
    """Write a pipeline of Stable Diffusion's kind."""
    torch.manual_seed(seed)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder)
    return folder


def lora(folder: Path, unet: Any, seed: int) -> Path:
    """Write an adapter of that unet, as diffusers names it."""
    unet.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_out.0"]))
    torch.manual_seed(seed)
    found = {}
    for name, layer in unet.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            for half in "AB":
                weight = getattr(layer, f"lora_{half}")["default"].weight
                found[f"unet.{name}.lora_{half}.weight"] = torch.randn(weight.shape) * 0.3
    unet.delete_adapters("default")
    folder.mkdir()
    save_file(found, folder / "pytorch_lora_weights.safetensors")
    return folder


def from_disk(source: Path, pool: str) -> str:
    del pool
    return str(source)


def from_store(source: Path, pool: str) -> str:
    """Attach the model, or build it, and return the folder that programs load it from."""
    (file,) = source.glob("*.safetensors")
    with numaload.mirror(str(file), nodes="local", shared=True, pool=pool) as mirror:
        return mirror.folder(mirror.nodes[0])


def run(folder: Path, adapter: Path, load: Folder, *, merged: bool) -> Any:
    """Load a pipeline and an adapter, and make an image of it."""
    parts = {
        "unet": diffusers.UNet2DConditionModel.from_pretrained(load(folder / "unet", "base")),
        "vae": diffusers.AutoencoderKL.from_pretrained(load(folder / "vae", "base")),
    }
    without = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")
    parts |= dict.fromkeys(without)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, **parts)
    pipe.load_lora_weights(load(adapter, "lora"))
    if merged:
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(5)
    states = {
        "prompt_embeds": torch.randn(1, 7, 32),
        "negative_prompt_embeds": torch.randn(1, 7, 32),
    }
    return pipe(
        **states, num_inference_steps=2, output_type="pt", generator=torch.manual_seed(6)
    ).images


@pytest.mark.parametrize("merged", [False, True], ids=["unmerged", "merged"])
def test_two_bases_and_three_loras_in_diffusers(store: Path, tmp_path: Path, merged: bool) -> None:
    bases = [base(tmp_path / f"base{number}", number) for number in range(2)]
    unet = diffusers.UNet2DConditionModel.from_pretrained(bases[0] / "unet")
    loras = [lora(tmp_path / f"lora{number}", unet, 10 + number) for number in range(3)]
    expected, took = {}, {"disk": 0.0, "store": 0.0}
    turns = [(b, a) for a in loras for b in bases] * 2
    for turn in turns:
        begin = time.perf_counter()
        expected[turn] = run(*turn, from_disk, merged=merged)
        took["disk"] += time.perf_counter() - begin
    images = [image.flatten() for image in expected.values()]
    assert len({tuple(image[:99].tolist()) for image in images}) == 6
    for turn in turns:
        begin = time.perf_counter()
        assert torch.equal(run(*turn, from_store, merged=merged), expected[turn])
        took["store"] += time.perf_counter() - begin
    print(
        f"{len(turns)} switches: {took['disk']:.2f} s from disk, {took['store']:.2f} s by the store"
    )
    table = numaload.store.table()
    assert sorted(row.pool for row in table.rows) == ["base"] * 4 + ["lora"] * 3
    assert table.gone == []


def test_a_pool_that_is_too_small_for_all_adapters(store: Path, tmp_path: Path) -> None:
    """Adapters take turns in it; bases stay."""
    folder = base(tmp_path / "base", 1)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    loras = [lora(tmp_path / f"lora{number}", unet, 10 + number) for number in range(3)]
    size = max(next(one.glob("*.safetensors")).stat().st_size for one in loras)
    numaload.store.budget("lora", 2 * size + 8192)
    for adapter in loras * 2:
        expected = run(folder, adapter, from_disk, merged=False)
        assert torch.equal(run(folder, adapter, from_store, merged=False), expected)
    table = numaload.store.table()
    assert sorted(row.pool for row in table.rows) == ["base", "base", "lora", "lora"]
    assert len(table.gone) == 4
    assert all("room for" in gone.why for gone in table.gone)


def test_transformers_and_peft(store: Path, tmp_path: Path) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    bases, loras = [], []
    for number in range(2):
        torch.manual_seed(number)
        model = transformers.LlamaForCausalLM(config)
        model.save_pretrained(tmp_path / f"base{number}")
        bases.append(tmp_path / f"base{number}")
    for number in range(3):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["q_proj"]))
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        adapted.save_pretrained(tmp_path / f"lora{number}")
        loras.append(tmp_path / f"lora{number}")
        model = adapted.unload()
    tokens = torch.arange(8)[None]

    def logits(load: Folder, folder: Path, adapter: Path, *, merged: bool) -> Any:
        found = transformers.LlamaForCausalLM.from_pretrained(load(folder, "base"))
        found = peft.PeftModel.from_pretrained(found, load(adapter, "lora"))
        found = found.merge_and_unload() if merged else found
        with torch.no_grad():
            return found(tokens).logits

    for merged in (False, True):
        for folder in bases:
            for adapter in loras:
                expected = logits(from_disk, folder, adapter, merged=merged)
                assert torch.equal(logits(from_store, folder, adapter, merged=merged), expected)
    assert len(numaload.store.table().rows) == 5
