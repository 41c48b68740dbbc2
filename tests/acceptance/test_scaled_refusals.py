"""Weights whose scales numaload cannot apply: refused by name, never wrong numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import numaload as api
import scaled_models as sm
from commands import Numaload
from numaload import errors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")

REFUSED: dict[str, tuple[dict[str, sm.Part], str]] = {
    "GPTQ": (
        sm.plain("a.qweight", "I32", (4, 4)) | sm.plain("a.scales", "F16", (4,)),
        r"a\.scales .*GPTQ or AWQ",
    ),
    "GPTQ alone": (sm.plain("a.qweight", "I32", (4, 4)), "GPTQ or AWQ"),
    "compressed-tensors": (
        sm.plain("a.weight_packed", "U8", (4, 4)) | sm.plain("a.weight_scale", "F8_E4M3", (4,)),
        "compressed-tensors",
    ),
    "bitsandbytes of 4 bits": (
        sm.plain("a.weight", "U8", (8, 1)) | sm.plain("a.weight.absmax", "F32", (1,)),
        r"a\.weight\.absmax .*bitsandbytes",
    ),
    "bitsandbytes of 8 bits": (
        sm.plain("a.weight", "I8", (4, 4)) | sm.plain("a.SCB", "F32", (4,)),
        r"a\.SCB .*bitsandbytes",
    ),
    "FP8 by rows": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale", "F32", (4, 1)),
        r"a\.weight_scale .*unknown layout",
    ),
    "FP8 of others": (
        sm.plain("a.weight", "F8_E5M2", (4, 32)) | sm.plain("a.scale_weight", "F32", (1,)),
        r"a\.scale_weight .*unknown layout",
    ),
    "FP8, its scale missing": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("b.weight_scale_inv", "F32", (1, 1)),
        r"a\.weight_scale_inv is missing",
    ),
    "FP8, of another shape": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale_inv", "F32", (5, 1)),
        r"a\.weight_scale_inv of shape \(5, 1\) for \(4, 32\)",
    ),
    "FP8, of fewer dims": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale_inv", "F32", (4,)),
        r"a\.weight_scale_inv of shape \(4,\)",
    ),
    "FP8, no scales": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale_inv", "F32", (0, 1)),
        r"a\.weight_scale_inv of shape \(0, 1\)",
    ),
    "FP8, narrow blocks": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale_inv", "F32", (1, 2)),
        "multiples of 32",
    ),
    "FP8, whole numbers": (
        sm.plain("a.weight", "F8_E4M3", (4, 32)) | sm.plain("a.weight_scale_inv", "I32", (1, 1)),
        r"a\.weight_scale_inv is I32",
    ),
    "MXFP4 without scales": (sm.plain("a_blocks", "U8", (2, 3, 1, 16)), r"a_scales is missing"),
    "MXFP4, of another shape": (
        sm.plain("a_blocks", "U8", (2, 3, 2, 16)) | sm.plain("a_scales", "U8", (2, 3, 1)),
        r"a_scales of shape \(2, 3, 1\)",
    ),
    "NVFP4, half of it": (
        sm.plain("a.weight", "U8", (4, 8)) | sm.plain("a.weight_scale", "F8_E4M3", (4, 1)),
        r"a\.weight_scale .*unknown layout",
    ),
    "NVFP4, of another shape": (
        sm.plain("a.weight", "U8", (4, 8))
        | sm.plain("a.weight_scale", "F8_E4M3", (4, 2))
        | sm.plain("a.weight_scale_2", "F32", ()),
        r"a\.weight_scale of shape \(4, 2\)",
    ),
    "NVFP4, factors of nobody": (
        sm.plain("a.weight", "U8", (4, 8))
        | sm.plain("a.weight_scale", "F8_E4M3", (4, 1))
        | sm.plain("a.weight_scale_2", "F32", (4,)),
        r"a\.weight_scale_2 has 4 factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_unknown_scales_are_refused(numaload: Numaload, tmp_path: Path, case: str) -> None:
    """By name, wherever floats are asked for; the bytes are there, and all other tensors."""
    parts, words = REFUSED[case]
    name = next(iter(parts))
    path = sm.write(tmp_path / "m.safetensors", parts | sm.plain("z.weight", "F32", (3,)))
    with api.open(path) as weights:
        tensor = weights[name]
        module = sm.module({name: tensor.shape}, torch.float32)
        uses = (
            tensor.dequantize,
            lambda: tensor.torch("bfloat16"),
            lambda: dict(api.stream(weights, "float32", names=[name])),
            lambda: api.load_state_dict(module, weights, strict=False),
        )
        for use in uses:
            with pytest.raises(errors.UnsupportedTypeError, match=words) as caught:
                use()
            assert f"tensor {name!r}" in str(caught.value)
        assert tensor.torch().numel() * tensor.torch().itemsize == tensor.nbytes
        assert dict(api.stream(weights, None)).keys() == set(weights)
        assert tensor.layout == "unknown scales"
        assert weights["z.weight"].dequantize().shape == (3,)
    assert f"tensor {name!r}" in numaload("inspect", path).stderr


@pytest.mark.parametrize(
    "parts",
    [
        sm.plain("a.weight", "F8_E4M3", (4, 32)),  # what diffusion models are cast to
        sm.plain("a.weight", "F8_E5M2", (4, 32)) | sm.plain("logit_scale", "F32", ()),
        sm.plain("a.position_ids", "I64", (1, 4)) | sm.plain("a.scale", "F32", ()),
        sm.plain("a.mask", "U8", (4,)),
    ],
)
def test_numbers_without_scales_are_what_they_are(
    tmp_path: Path, parts: dict[str, sm.Part]
) -> None:
    with api.open(sm.write(tmp_path / "m.safetensors", parts)) as weights:
        assert dict(api.stream(weights, "float32")).keys() == set(weights)
        for tensor in weights.values():
            assert tensor.layout == ""
            assert tensor.torch("float32").shape == tensor.shape


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_a_factor_that_is_no_number_is_refused(tmp_path: Path, value: float) -> None:
    case = sm.nvfp4("a.weight", (4, 32), np.array(value))
    with api.open(sm.write(tmp_path / "m.safetensors", case.parts)) as weights:
        module = sm.module({case.name: (4, 32)}, torch.float32)
        before = module.a.weight.clone()
        for use in (
            weights[case.name].dequantize,
            lambda: dict(api.stream(weights)),
            lambda: api.load_state_dict(module, weights),
        ):
            with pytest.raises(errors.UnsupportedTypeError, match=r"a\.weight_scale_2.*finite"):
                use()
        assert torch.equal(module.a.weight.view(torch.int32), before.view(torch.int32))
