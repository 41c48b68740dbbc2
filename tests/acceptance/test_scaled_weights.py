"""Checkpoints that are quantized, as their users load them: the scales of other tensors applied."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import numaload as api
import scaled_models as sm
from commands import Numaload
from numaload import errors

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")

ONE = np.float32(0.37)
THREE = np.array([0.3, -7, 1e30], np.float32)
SCALED = {
    "fp8": sm.fp8("fp8.weight", (576, 1024)),
    "fp8 ragged": sm.fp8("ragged.weight", (200, 300), kind="BF16"),
    "fp8 other blocks": sm.fp8("other.weight", (96, 256), (32, 64)),
    "fp8 a row": sm.fp8("row.weight", (48, 160), (1, 160), "F16"),
    "fp8 of all": sm.fp8("all.weight", (33, 65), (33, 65)),
    "fp8 experts": sm.fp8("experts.gate_up_proj", (3, 256, 384), kind="F8_E8M0"),
    "fp8 bytes": sm.fp8("bytes.weight", (256, 256), kind="U8"),
    "mxfp4": sm.mxfp4("mlp.experts.down_proj", 3, 96, 5),
    "nvfp4": sm.nvfp4("nv.weight", (64, 144), np.array(ONE)),
    "nvfp4 experts": sm.nvfp4("nv.experts", (3, 32, 64), THREE),
}
LAYOUTS = {
    "fp8": "FP8 128x128", "fp8 other blocks": "FP8 32x64", "fp8 of all": "FP8",
    "mxfp4": "MXFP4", "nvfp4": "NVFP4",
}  # fmt: skip

each_layout = pytest.mark.parametrize("case", SCALED)
each_dtype = pytest.mark.parametrize("dtype", sm.DTYPES)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    parts = {name: part for case in SCALED.values() for name, part in case.parts.items()}
    parts |= sm.plain("nv.input_scale", "F32", ()) | sm.plain("norm.weight", "F32", (64,))
    return sm.write(tmp_path_factory.mktemp("scaled") / "model.safetensors", parts)


@pytest.fixture
def weights(path: str) -> Iterator[api.Weights]:
    with api.open(path) as opened:
        yield opened


@each_layout
@each_dtype
def test_dequantize(weights: api.Weights, case: str, dtype: str) -> None:
    name, expected = SCALED[case].name, sm.rounded(SCALED[case].expected, dtype)
    tensor = weights[name]
    assert (tensor.shape, tensor.has_kernel) == (expected.shape, True)
    assert tensor.dims == expected.shape[::-1]
    sm.check_same(tensor.dequantize(dtype), expected)
    sm.check_same(tensor.torch(dtype), expected)


@each_layout
@each_dtype
def test_parts(weights: api.Weights, case: str, dtype: str) -> None:
    tensor, expected = weights[SCALED[case].name], sm.rounded(SCALED[case].expected, dtype)
    flat = expected.reshape(-1, expected.shape[-1])
    for first, last in ((0, 1), (1, 30), (31, len(flat)), (5, 5)):
        sm.check_same(tensor.dequantize(dtype, rows=(first, last)), flat[first:last])
    if expected.ndim == 3:
        sm.check_same(tensor.dequantize(dtype, expert=2), expected[2])
        sm.check_same(tensor.dequantize(dtype, expert=1, rows=(3, 31)), expected[1, 3:31])
        between = slice(expected.shape[1] - 2, expected.shape[1] + 3)  # of two experts
        sm.check_same(tensor.dequantize(dtype, rows=between), flat[between])


@each_dtype
def test_stream(weights: api.Weights, dtype: str) -> None:
    """Under the weights' names; scales that were applied do not come."""
    found = dict(api.stream(weights, dtype))
    expected = {case.name: sm.rounded(case.expected, dtype) for case in SCALED.values()}
    assert found.keys() == {*expected, "norm.weight", "nv.input_scale"}
    for name, values in expected.items():
        sm.check_same(found[name], values)
    one = SCALED["fp8"].name
    names = [one, f"{one}_scale_inv", "mlp.experts.down_proj"]
    assert {name for name, _ in api.stream(weights, dtype, names=names)} == set(names)


def test_stream_as_in_the_file(weights: api.Weights) -> None:
    found = dict(api.stream(weights, None))
    assert found.keys() == set(weights)
    for case in SCALED.values():
        for name, part in case.parts.items():
            assert found[name].shape == part.shape
            assert found[name].tobytes() == part.raw.tobytes()


def test_bytes_stay_bytes(weights: api.Weights) -> None:
    for case in SCALED.values():
        stored, part = next(iter(case.parts.items()))
        tensor = weights[stored]
        raw = tensor.torch()
        assert tuple(raw.shape) == part.shape
        assert raw.view(torch.uint8).numpy().tobytes() == part.raw.tobytes()
        assert tensor.blocks.tobytes() == part.raw.tobytes()
        assert tensor.as_stored().shape == part.shape


@each_dtype
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_load_state_dict(weights: api.Weights, dtype: str, device: str) -> None:
    """Strictly: scales are no unexpected keys. A half has other values in float16: none is lost."""
    shapes = {case.name: case.expected.shape for case in SCALED.values()}
    module = sm.module(shapes | {"norm.weight": (64,)}, getattr(torch, dtype)).to(device)
    result = api.load_state_dict(module, weights)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    found = module.state_dict()
    for case in SCALED.values():
        sm.check_same(found[case.name], sm.rounded(case.expected, dtype))


def test_load_state_dict_into_what_is_quantized_itself(tmp_path: Path) -> None:
    """Such a module has its own scales, and wants the numbers as they are."""
    case = SCALED["mxfp4"]
    with api.open(sm.write(tmp_path / "m.safetensors", case.parts)) as weights:
        module = sm.module({name: part.shape for name, part in case.parts.items()}, torch.uint8)
        api.load_state_dict(module, weights)
    for name, values in module.state_dict().items():
        assert values.numpy().tobytes() == case.parts[name].raw.tobytes()


def test_inspect(numaload: Numaload, path: str) -> None:
    shown = numaload("inspect", path).stdout
    data = {one["name"]: one for one in numaload.json("inspect", path)["tensors"]}
    for case, layout in LAYOUTS.items():
        stored, *scales = SCALED[case].parts
        assert (data[stored]["layout"], data[stored]["scales"]) == (layout, scales)
        (line,) = (row for row in shown.splitlines() if row.startswith(f"{stored} "))
        assert f"({layout})" in line
        assert line.split()[-len(scales) :] == scales
        assert "x".join(map(str, SCALED[case].expected.shape)) in line
    assert data["norm.weight"]["layout"] == ""


def test_scales_of_another_shard(tmp_path: Path) -> None:
    case = SCALED["fp8"]
    (name, codes), (scale, values) = case.parts.items()
    shards = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    sm.write(tmp_path / shards[0], {name: codes})
    sm.write(tmp_path / shards[1], {scale: values})
    index = {"weight_map": {name: shards[0], scale: shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for copy in (False, True):
        with api.open(tmp_path, copy=copy) as weights:
            sm.check_same(weights[name].dequantize(), case.expected)
            sm.check_same(dict(api.stream(weights))[name], case.expected)


def test_blocks_of_the_config(tmp_path: Path) -> None:
    """100 rows and 2 scales: blocks of 64, which no shape could tell."""
    case = sm.fp8("a.weight", (100, 200), (64, 64))
    path = sm.write(tmp_path / "model.safetensors", case.parts)
    with (
        api.open(path) as weights,
        pytest.raises(errors.UnsupportedTypeError, match="weight_block_size"),
    ):
        weights[case.name].dequantize()
    for config in ("[]", '{"quantization_config": 3}', "\xff", '{"quantization_config":'):
        (tmp_path / "config.json").write_text(config, encoding="latin-1")
        with api.open(path) as weights, pytest.raises(errors.UnsupportedTypeError):
            weights[case.name].dequantize()
    told = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(told))
    with api.open(path) as weights:
        sm.check_same(weights[case.name].dequantize(), case.expected)


def test_scaled_false_of_numbers_that_are_none_without(weights: api.Weights) -> None:
    for case in SCALED.values():
        with pytest.raises(errors.UnknownQuantTypeError):
            weights[case.name].dequantize(scaled=False)
