"""Adapters of diffusers' kind in the real diffusers: what docs/lora.md says runs as it stands.

The pipeline is one of Stable Diffusion's kind, small, with random weights, made in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pages import blocks

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
save_file = pytest.importorskip("safetensors.torch").save_file

pytestmark = pytest.mark.filterwarnings("default")  # what diffusers, peft and torch deprecate

RANK = 4
PAGE = next(block for block in blocks("lora.md") if "load_lora_weights" in block)


def pipeline() -> Any:
    """The same small one whenever it is asked for."""
    torch.manual_seed(3)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=16, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), latent_channels=4, norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 48, "vocab_size": 99, "num_hidden_layers": 2,
             "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    return diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=None, unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def adapted(unet: Any) -> dict[str, Any]:
    """Adapt a part of a pipeline by peft alone; return {module: (A, B)}."""
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["to_q", "to_out.0", "conv1"])
    unet.add_adapter(config)
    torch.manual_seed(4)
    found = {}
    for name, layer in unet.named_modules():
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            halves = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            for half in halves:
                torch.nn.init.normal_(half, std=0.3)
            found[name] = tuple(half.detach().clone() for half in halves)
    return found


def as_diffusers(pairs: dict[str, Any]) -> dict[str, Any]:
    return {
        f"unet.{module}.lora_{half}.weight": tensor
        for module, pair in pairs.items()
        for half, tensor in zip("AB", pair, strict=True)
    }


def as_kohya(pairs: dict[str, Any]) -> dict[str, Any]:
    made = {}
    for module, pair in pairs.items():
        flat = f"lora_unet_{module.replace('.', '_')}"
        for half, tensor in zip(("down", "up"), pair, strict=True):
            made[f"{flat}.lora_{half}.weight"] = tensor
        made[f"{flat}.alpha"] = torch.tensor(float(RANK))
    return made


def outputs(pipe: Any) -> Any:
    torch.manual_seed(5)
    latents, states = torch.randn(1, 4, 16, 16), torch.randn(1, 7, 32)
    with torch.no_grad():
        return pipe.unet(latents, 1, states).sample


@pytest.mark.parametrize("write", [as_diffusers, as_kohya])
def test_the_page_loads_one_by_diffusers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    reference, pipe = pipeline(), pipeline()
    save_file(write(adapted(reference.unet)), "lora.safetensors")
    before = outputs(pipe)
    exec(PAGE, {"pipe": pipe})  # noqa: S102 - what the page says
    assert torch.allclose(outputs(pipe), outputs(reference), atol=1e-4)
    assert not torch.allclose(outputs(pipe), before, atol=1e-2)
