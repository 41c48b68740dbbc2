"""Checkpoints that are quantized give what transformers' own functions make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import numaload as api
import scaled_models as sm

pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = {
    "usual": sm.fp8("a.weight", (256, 640)),
    "experts": sm.fp8("a.gate_up_proj", (3, 256, 128)),
    "exponents": sm.fp8("a.weight", (128, 384), kind="F8_E8M0"),
    "plain bytes": sm.fp8("a.weight", (128, 384), kind="U8"),
    "of all": sm.fp8("a.weight", (64, 96), (64, 96)),
}


def same(ours: Any, theirs: Any) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(ours.isnan(), theirs.isnan())
    kind = torch.int32 if ours.dtype == torch.float32 else torch.int16
    numbers = ~ours.isnan()
    assert torch.equal(ours.view(kind)[numbers], theirs.contiguous().view(kind)[numbers])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 64, 3), (3, 96, 45), (1, 32, 1)])
def test_mxfp4(tmp_path: Path, shape: tuple[int, int, int], dtype: Any) -> None:
    case = sm.mxfp4("mlp.experts.gate_up_proj", *shape)
    with api.open(sm.write(tmp_path / "m.safetensors", case.parts)) as weights:
        blocks, scales = (weights[name].torch() for name in case.parts)
        theirs = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
        same(weights[case.name].torch(dtype), theirs)
        same(dict(api.stream(weights, dtype))[case.name], theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", FP8)
def test_fp8(tmp_path: Path, kind: str, dtype: Any) -> None:
    case = FP8[kind]
    with api.open(sm.write(tmp_path / "m.safetensors", case.parts)) as weights:
        codes, scales = (weights[name].torch() for name in case.parts)
        theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=dtype)
        same(weights[case.name].torch(dtype), theirs)
