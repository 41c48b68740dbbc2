"""NVFP4 in GGUF: the factor of the blocks is in a tensor of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
import scaled_models as sm
from commands import Numaload
from numaload import errors
from numaload.backends import kt_kernel, ktransformers
from numaload.formats.qtypes import QuantType

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")

Q = QuantType
ONE = np.float32(0.37)
THREE = np.array([0.3, -7, 1e30], np.float32)
each_dtype = pytest.mark.parametrize("dtype", sm.DTYPES)

FACTORS = {
    "blk.0.ffn_up.weight": ("blk.0.ffn_up.scale", (64, 256), np.array([ONE])),
    "blk.0.ffn_up_exps.weight": ("blk.0.ffn_up_exps.scale", (3, 16, 128), THREE),
    "blk.0.attn_q.weight": ("blk.0.attn_q.weight.scale", (3, 8, 64), np.array([ONE])),
    "blk.0.plain.weight": ("", (8, 64), np.array([1], np.float32)),
}


def gguf_parts() -> dict[str, tuple[QuantType, Any]]:
    parts: dict[str, tuple[QuantType, Any]] = {}
    for seed, (name, (scale, shape, factors)) in enumerate(FACTORS.items()):
        parts[name] = (Q.NVFP4, gb.random_blocks(Q.NVFP4, shape, seed))
        if scale:
            parts[scale] = (Q.F32, factors.view(np.uint8))
    parts["blk.0.ffn_up.input_scale"] = (Q.F32, np.array([9], np.float32).view(np.uint8))
    return parts


@pytest.fixture
def of_gguf(tmp_path: Path) -> Iterator[api.Weights]:
    with api.open(gb.write_good(tmp_path / "m.gguf", gguf_parts())[0]) as opened:
        yield opened


def test_programs_that_take_blocks_alone_are_refused_them(
    of_gguf: api.Weights, tmp_path: Path
) -> None:
    alone, scaled = "blk.0.plain.weight", "blk.0.ffn_up.weight"
    loaders: list[Any] = [kt_kernel.Loader([of_gguf]), ktransformers.GGUFLoader(str(tmp_path))]
    for loader in loaders:
        data, _ = loader.get_undequanted_tensor_and_ggml_type(alone)
        assert data.numel() == of_gguf[alone].nbytes
        with pytest.raises(errors.UnsupportedTypeError, match=r"factor is in blk.0.ffn_up.scale"):
            loader.get_undequanted_tensor_and_ggml_type(scaled)
    with pytest.raises(errors.UnsupportedTypeError, match=r"blk.0.ffn_up_exps.scale"):
        kt_kernel.tp(of_gguf, 0, 1)


def blocks_alone(name: str) -> sm.Floats:
    """As gguf-py has them, which is as ggml has them."""
    blocks = gguf_parts()[name][1]
    found = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.NVFP4)
    return np.asarray(found, np.float32).reshape(FACTORS[name][1])


def with_factor(name: str) -> sm.Floats:
    factors = FACTORS[name][2]
    shape = (-1, 1, 1) if factors.size > 1 else ()
    return sm.product(blocks_alone(name), factors.reshape(shape))


@pytest.mark.parametrize("name", FACTORS)
@each_dtype
def test_gguf_nvfp4(of_gguf: api.Weights, name: str, dtype: str) -> None:
    tensor, expected = of_gguf[name], sm.rounded(with_factor(name), dtype)
    sm.check_same(tensor.dequantize(dtype), expected)
    sm.check_same(tensor.torch(dtype), expected)
    sm.check_same(dict(api.stream(of_gguf, dtype))[name], expected)
    sm.check_same(
        tensor.dequantize(dtype, rows=(3, 7)), expected.reshape(-1, expected.shape[-1])[3:7]
    )
    if expected.ndim == 3:
        sm.check_same(tensor.dequantize(dtype, expert=1, rows=(1, 4)), expected[1, 1:4])
    alone = sm.rounded(blocks_alone(name), dtype)
    sm.check_same(tensor.dequantize(dtype, scaled=False), alone)
    sm.check_same(tensor.as_stored().dequantize(dtype), alone)


def test_gguf_nvfp4_in_a_module(of_gguf: api.Weights) -> None:
    module = sm.module({name: shape for name, (_, shape, _) in FACTORS.items()}, torch.bfloat16)
    result = api.load_state_dict(module, of_gguf, name_map={})
    assert result.unexpected_keys == []
    for name, values in module.state_dict().items():
        sm.check_same(values, sm.rounded(with_factor(name), "bfloat16"))


def test_gguf_factors_are_shown_and_not_streamed(
    numaload: Numaload, tmp_path: Path, of_gguf: api.Weights
) -> None:
    scales = {scale for scale, _, _ in FACTORS.values() if scale}
    assert {name for name, _ in api.stream(of_gguf)} == set(of_gguf) - scales
    shown = numaload("inspect", of_gguf.paths[0]).stdout
    for name, (scale, _, _) in FACTORS.items():
        (line,) = (row for row in shown.splitlines() if row.startswith(f"{name} "))
        assert line.endswith(f" {scale}") if scale else line.rstrip().endswith("288")


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ([0.5, 0.5], "blk.0.up.scale has 2 factors, expected 1 or one for each of 3 experts"),
        ([np.nan], "blk.0.up.scale.*expected finite factors"),
        ([1.0, np.inf, 1.0], "blk.0.up.scale.*expected finite factors.*inf"),
    ],
)
def test_gguf_factors_that_fit_nothing_are_refused(
    tmp_path: Path, factors: list[float], words: str
) -> None:
    parts = {
        "blk.0.up.weight": (Q.NVFP4, gb.random_blocks(Q.NVFP4, (3, 4, 64))),
        "blk.0.up.scale": (Q.F32, np.array(factors, np.float32).view(np.uint8)),
    }
    with api.open(gb.write_good(tmp_path / "m.gguf", parts)[0]) as weights:
        tensor = weights["blk.0.up.weight"]
        for use in (
            tensor.dequantize,
            lambda: tensor.torch("float16"),
            lambda: dict(api.stream(weights)),
        ):
            with pytest.raises(errors.UnsupportedTypeError, match=words):
                use()
        assert tensor.dequantize(scaled=False).shape == (3, 4, 64)


def test_two_factors_of_one_tensor_are_refused(tmp_path: Path) -> None:
    one = (Q.F32, np.array([2], np.float32).view(np.uint8))
    parts = {
        "a.weight": (Q.NVFP4, gb.random_blocks(Q.NVFP4, (4, 64))),
        "a.scale": one, "a.weight.scale": one,
    }  # fmt: skip
    path, words = gb.write_good(tmp_path / "m.gguf", parts)[0], r"a\.scale and a\.weight\.scale"
    with api.open(path) as weights, pytest.raises(errors.UnsupportedTypeError, match=words):
        weights["a.weight"].dequantize()
