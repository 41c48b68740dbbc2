"""kt-kernel 0.7 on a machine without a GPU, from its public class and from its lowest level.

Imported in a process of its own: kt-kernel keeps its workers, loaders and buffers for the process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import numaload as api
from moe_model import NAMES, Shape

os.environ["KT_FORCE_SYNC_SUBMIT"] = "1"  # no CUDA stream to submit on
BFLOAT16, FLOAT32 = 30, 0
MOST_TOKENS = 64


def without_pinned_memory() -> None:
    """kt-kernel asks for pinned memory, which torch without CUDA refuses."""
    for name in ("zeros", "empty", "full", "ones"):
        original = getattr(torch, name)

        @functools.wraps(original)
        def unpinned(*arguments: Any, original: Any = original, **options: Any) -> Any:
            options.pop("pin_memory", None)
            return original(*arguments, **options)

        setattr(torch, name, unpinned)


without_pinned_memory()

from kt_kernel import KTMoEWrapper, kt_kernel_ext  # noqa: E402 - see above


@dataclass
class Tokens:
    """What goes through the experts: (tokens, hidden), and which experts with which weight."""

    x: Any
    experts: Any
    weights: Any


def tokens(shape: Shape, count: int, seed: int = 1) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, shape.hidden, generator=generator) * 0.1
    order = torch.rand(count, shape.experts, generator=generator).argsort(dim=1)
    weights = torch.rand(count, shape.used, generator=generator) + 0.1
    experts = order[:, : shape.used].contiguous()
    return Tokens(x.to(torch.bfloat16), experts, weights / weights.sum(dim=1, keepdim=True))


def wrapper(path: str, shape: Shape, layer: int = 0, nodes: list[int] | None = None) -> Any:
    """A layer's experts by the public class; one subpool for each of ``nodes``."""
    nodes = [0] if nodes is None else nodes
    made = KTMoEWrapper(
        layer_idx=layer, num_experts=shape.experts, num_experts_per_tok=shape.used,
        hidden_size=shape.hidden, moe_intermediate_size=shape.inner, gpu_experts_mask=None,
        cpuinfer_threads=2 * len(nodes), threadpool_count=len(nodes), weight_path=path,
        chunked_prefill_size=MOST_TOKENS, method="LLAMAFILE", numa_nodes=nodes,
    )  # fmt: skip
    made.load_weights()
    return made


def forward(made: Any, t: Tokens) -> Any:
    """(tokens, hidden) bfloat16. The buffer it comes in is used again: a copy."""
    return made.forward(t.x, t.experts, t.weights, 0).clone()


def pool(nodes: list[int], threads: int = 2) -> Any:
    config = kt_kernel_ext.WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map = len(nodes), nodes
    config.subpool_thread_count = [threads] * len(nodes)
    return kt_kernel_ext.CPUInfer(config)


@dataclass
class Experts:
    """An MOE of the lowest level: kt-kernel has the addresses of these tensors, and nothing else.

    hidden_type: of what goes in and comes out. mask: an MOE keeps the address of that too.
    """

    cpu: Any
    shape: Shape
    inner: int
    addresses: Sequence[int]  # of gate, up and down
    hidden_type: int = BFLOAT16

    def __post_init__(self) -> None:
        shape = self.shape
        self.mask = torch.zeros(shape.experts, dtype=torch.bool)
        config = kt_kernel_ext.moe.MOEConfig(
            shape.experts, shape.used, shape.hidden, self.inner, self.mask.data_ptr()
        )
        config.layer_idx, config.pool = 0, self.cpu.backend_
        config.m_block, config.group_min_len = 32, 10
        config.max_len = config.group_max_len = MOST_TOKENS
        config.gate_proj, config.up_proj, config.down_proj = self.addresses
        config.gate_type, config.up_type, config.down_type = map(int, shape.types)
        config.hidden_type = self.hidden_type
        self.moe = kt_kernel_ext.moe.MOE(config)
        self.cpu.submit(self.moe.load_weights_task())
        self.cpu.sync()

    def __call__(self, t: Tokens) -> Any:
        dtype = {BFLOAT16: torch.bfloat16, FLOAT32: torch.float32}[self.hidden_type]
        x, out = t.x.to(dtype), torch.empty(t.x.shape, dtype=dtype)
        count = torch.tensor([len(x)], dtype=torch.int32)
        pointers = [v.data_ptr() for v in (t.experts, t.weights, x, out)]
        task = self.moe.forward_task(count.data_ptr(), self.shape.used, *pointers, False)
        self.cpu.submit(task)
        self.cpu.sync()
        return out


def names(layer: int = 0) -> list[str]:
    return [f"blk.{layer}.ffn_{name}_exps.weight" for name in NAMES]


def reference(weights: api.Weights, t: Tokens, layer: int = 0) -> Any:
    """The same in float32, (tokens, hidden): silu(x gate) * (x up), through down, weighted."""
    x = t.x.to(torch.float32).numpy()
    gate, up, down = (weights[name].dequantize() for name in names(layer))
    out = np.zeros_like(x)
    for token, experts in enumerate(t.experts.tolist()):
        for k, expert in enumerate(experts):
            g, u = gate[expert] @ x[token], up[expert] @ x[token]
            hidden = g / (1 + np.exp(-g)) * u
            out[token] += float(t.weights[token, k]) * (down[expert] @ hidden)
    return out


def error(found: Any, wanted: Any) -> float:
    """Relative, over all tokens."""
    difference = found.to(torch.float32).numpy() - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))
