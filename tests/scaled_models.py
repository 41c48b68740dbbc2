"""Weights whose scales are in other tensors: files of them, and what they are by plain numpy.

Nothing here uses numaload: numbers are looked up in tables made by the definition of their types,
multiplied in float32, and rounded by numpy and ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import safetensors_builder as sb

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
DTYPES: dict[str, Any] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def e4m3(byte: int) -> float:
    """OFP8: a sign, 4 bits of exponent, 3 of mantissa; all ones are NaN, there is no infinity."""
    sign, exponent, mantissa = -1.0 if byte & 0x80 else 1.0, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0**-9
    return float(sign * (8 + mantissa) * 2.0 ** (exponent - 10))


E4M3 = np.array([e4m3(byte) for byte in range(256)], np.float32)
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# 2^128 is infinite in float32, as transformers has it of plain bytes; the type says NaN.
E8M0 = np.array([2.0 ** (byte - 127) for byte in range(255)] + [np.inf], np.float32)


def nibbles(packed: Bytes) -> Floats:
    """The low half of each byte comes first."""
    both = np.stack([E2M1[packed & 15], E2M1[packed >> 4]], -1)
    return both.reshape(*packed.shape[:-1], -1)


def rounded(values: Floats, dtype: str) -> NDArray[Any]:
    with np.errstate(all="ignore"):
        return values.astype(DTYPES[dtype])


def product(numbers: Floats, scales: Floats) -> Floats:
    with np.errstate(all="ignore"):
        return np.asarray(numbers * scales, np.float32)


def check_same(found: Any, expected: NDArray[Any]) -> None:
    """Bit for bit; of a NaN only that it is one. found: numpy's or torch's."""
    if not isinstance(found, np.ndarray):
        view = "float32" if expected.itemsize == 4 else "int16"
        import torch

        found = found.view(getattr(torch, view)).numpy().view(expected.dtype)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    nan = [np.isnan(one.astype(np.float32)) for one in (found, expected)]
    np.testing.assert_array_equal(nan[0], nan[1])
    bits = f"u{expected.itemsize}"
    one, other = (np.ascontiguousarray(array).view(bits)[~nan[0]] for array in (found, expected))
    np.testing.assert_array_equal(one, other)


class Part(NamedTuple):
    """A tensor of a safetensors file: ``raw`` are its bytes."""

    dtype: str
    shape: tuple[int, ...]
    raw: Bytes


class Scaled(NamedTuple):
    """Tensors of a file, and the weights that they are, by the name of the weights."""

    parts: dict[str, Part]
    name: str
    expected: Floats


def _bytes(rng: np.random.Generator, *shape: int) -> Bytes:
    return rng.integers(0, 256, shape, dtype=np.uint8)


def _floats(values: NDArray[Any]) -> Part:
    plain = np.ascontiguousarray(values, np.float32)
    return Part("F32", plain.shape, plain.view(np.uint8).reshape(-1))


SPECIAL = np.array([0, -0.0, 1e-45, -3e-39, 1.5, -2, 3e38, np.inf, np.nan], np.float32)


def special(rng: np.random.Generator, *shape: int) -> Floats:
    """Scales of all sizes, some of them no numbers."""
    found = np.exp2(rng.uniform(-30, 30, shape)).astype(np.float32)
    flat = found.reshape(-1)
    flat[1 : 1 + len(SPECIAL)] = SPECIAL[: max(0, flat.size - 1)]
    return found


def fp8(
    name: str, shape: tuple[int, ...], block: tuple[int, int] = (128, 128), kind: str = "F32"
) -> Scaled:
    """Block FP8. kind: the type of the scales."""
    rng = np.random.default_rng(len(name) + sum(shape))
    codes = _bytes(rng, *shape)
    codes.reshape(-1)[:256] = np.arange(256)[: codes.size]  # every number that there is
    *outer, rows, columns = shape
    grid = (*outer, -(-rows // block[0]), -(-columns // block[1]))
    if kind in ("U8", "F8_E8M0"):
        raw = _bytes(rng, *grid)
        values = E8M0[raw].copy()
        if kind == "F8_E8M0":
            values[raw == 255] = np.nan
        scale = Part(kind, grid, raw)
    else:
        values = special(rng, *grid)
        scale = _floats(values)
        if kind != "F32":
            values = rounded(values, {"BF16": "bfloat16", "F16": "float16"}[kind])
            scale = Part(kind, grid, values.view(np.uint8).reshape(-1))
            values = values.astype(np.float32)
    each = values.repeat(block[0], -2)[..., :rows, :].repeat(block[1], -1)[..., :columns]
    parts = {name: Part("F8_E4M3", shape, codes), f"{name}_scale_inv": scale}
    return Scaled(parts, name, product(E4M3[codes], each))


def mxfp4(name: str, experts: int, rows: int, blocks: int) -> Scaled:
    """gpt-oss: transformers turns each expert's matrix."""
    rng = np.random.default_rng(rows)
    codes, scales = _bytes(rng, experts, rows, blocks, 16), _bytes(rng, experts, rows, blocks)
    scales.reshape(-1)[:4] = [0, 1, 254, 255]
    # As ldexp has it, so half of 2^128 is no infinity.
    with np.errstate(over="ignore"):
        values = np.ldexp(nibbles(codes), scales[..., None].astype(np.int32) - 127)
    matrix = values.astype(np.float32).reshape(experts, rows, -1)
    parts = {
        f"{name}_blocks": Part("U8", codes.shape, codes),
        f"{name}_scales": Part("U8", scales.shape, scales),
    }
    return Scaled(parts, name, np.ascontiguousarray(matrix.swapaxes(1, 2)))


def nvfp4(name: str, shape: tuple[int, ...], factors: NDArray[Any]) -> Scaled:
    """ModelOpt: the two scales are multiplied first. factors: one, or one of each expert."""
    rng = np.random.default_rng(sum(shape))
    *outer, columns = shape
    codes, scales = _bytes(rng, *outer, columns // 2), _bytes(rng, *outer, columns // 16)
    factor = np.asarray(factors, np.float32)
    each = factor.reshape(-1, 1, 1) if factor.size > 1 else factor.reshape(())
    scale = product(E4M3[scales], each)
    expected = product(nibbles(codes).reshape(*scale.shape, 16), scale[..., None])
    parts = {
        name: Part("U8", codes.shape, codes),
        f"{name}_scale": Part("F8_E4M3", scales.shape, scales),
        f"{name}_scale_2": _floats(factor),
    }
    return Scaled(parts, name, expected.reshape(shape))


def plain(name: str, dtype: str, shape: tuple[int, ...]) -> dict[str, Part]:
    """A tensor of any type, its bytes 1."""
    return {name: Part(dtype, shape, np.ones(sb.size_of(dtype, shape), np.uint8))}


def write(path: Path, parts: Mapping[str, Part]) -> str:
    members = sb.table({name: (part.dtype, part.shape) for name, part in parts.items()})
    data = b"".join(part.raw.tobytes() for part in parts.values())
    path.write_bytes(sb.build(members, data))
    return str(path)


def module(shapes: Mapping[str, tuple[int, ...]], dtype: Any) -> Any:
    """A torch module of parameters by dotted names, as the file has its weights."""
    import torch

    made = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        part = made
        for step in path:
            if not hasattr(part, step):
                part.add_module(step, torch.nn.Module())
            part = getattr(part, step)
        values = torch.empty(shape, dtype=dtype)
        part.register_parameter(leaf, torch.nn.Parameter(values, requires_grad=False))
    return made
