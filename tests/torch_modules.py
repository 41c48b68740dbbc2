"""Torch modules for tests: a tree with parameters of given names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


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
