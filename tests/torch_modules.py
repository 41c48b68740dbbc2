"""Torch modules for tests: a tree with parameters of given names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

import numaload as api


def module_of(
    shapes: Mapping[str, Any], dtype: Any = None, device: str = "cpu", buffers: tuple[str, ...] = ()
) -> Any:
    """A tree of modules with parameters of these names and shapes, zeros."""
    top = torch.nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        part = top
        for step in path:
            if step not in dict(part.named_children()):
                part.add_module(step, torch.nn.Module())
            part = part.get_submodule(step)
        zeros = torch.zeros(tuple(shape), dtype=dtype or torch.float32, device=device)
        if name in buffers:
            part.register_buffer(leaf, zeros)
        else:
            part.register_parameter(leaf, torch.nn.Parameter(zeros, zeros.is_floating_point()))
    return top


def check(module: Any, expected: Mapping[str, Any], dtype: Any) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        wanted = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        assert found[key].dtype == dtype, key
        assert torch.equal(found[key], wanted), key


def tensors_file(path: Path, **arrays: Any) -> Any:
    """A GGUF file of float32, float16 and integer tensors, opened."""
    writer = gguf.GGUFWriter(str(path), "test")
    for name, array in arrays.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return api.open(path)


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
