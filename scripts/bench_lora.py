"""How long it takes to load a LoRA adapter: numaload beside PEFT's own loading.

    python scripts/bench_lora.py [--rank N] [--layers N] [--rounds N]

All in this run, in turns, on the same file; medians of the rounds, least and most. What is loaded
is read once within the measured time: PEFT maps the file, and touching it is part of loading. The
model's own weights are memory that nobody writes or reads. transformers and peft are needed.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
import transformers

from numaload.backends.lora import open_adapter

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHEAP = {"low_cpu_mem_usage": True}


def base_model(layers: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=32000,
        num_attention_heads=16, num_key_value_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return model.to_empty(device="cpu")


def write(folder: str, base: Any, rank: int) -> None:
    config = peft.LoraConfig(r=rank, target_modules=LINEAR, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    model.unload()


def read(tensors: Any) -> float:
    return sum(float(tensor.sum()) for tensor in tensors)


def lora_of(model: Any) -> Any:
    return (p for name, p in model.named_parameters() if "lora_" in name)


class Contest:
    """Both ways to the same, on one adapter."""

    def __init__(self, base: Any, folder: str) -> None:
        self.base, self.folder = base, folder

    def peft_tensors(self) -> float:
        return read(peft.load_peft_weights(self.folder, device="cpu").values())

    def our_tensors(self, *, copy: bool) -> float:
        with open_adapter(self.folder) as adapter:
            return read(adapter.state_dict(copy=copy).values())

    def peft_half(self) -> float:
        found = peft.load_peft_weights(self.folder, device="cpu")
        return read([tensor.to(torch.bfloat16) for tensor in found.values()])

    def our_half(self) -> float:
        with open_adapter(self.folder) as adapter:
            return read(adapter.state_dict(torch.bfloat16).values())

    def peft_model(self, **options: Any) -> float:
        model = peft.PeftModel.from_pretrained(self.base, self.folder, **options)
        return self._done(model)

    def our_model(self, *, copy: bool, **options: Any) -> float:
        with open_adapter(self.folder) as adapter:
            config = peft.LoraConfig(**adapter.lora_config())
            model = peft.get_peft_model(self.base, config, **options)
            peft.set_peft_model_state_dict(model, adapter.state_dict(copy=copy), **options)
        return self._done(model)

    def _done(self, model: Any) -> float:
        total = read(lora_of(model))
        model.unload()
        return total


def seconds(work: Callable[[], float]) -> tuple[float, float]:
    gc.collect()
    start = time.perf_counter()
    total = work()
    return time.perf_counter() - start, total


def nothing() -> None:
    """Before a measurement."""


def evict(path: str) -> None:
    """Out of the page cache."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    name: str,
    theirs: Callable[[], float],
    ours: Callable[[], float],
    rounds: int,
    before: Callable[[], None] = nothing,
) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # the first is for imports and the page cache
        totals = []
        for one, work in zip(times, (theirs, ours), strict=True):
            before()
            took, total = seconds(work)
            totals.append(total)
            if turn:
                one.append(took * 1e3)
        if totals[0] != totals[1]:
            raise SystemExit(f"{name}: not the same values: {totals}")
    shown = [f"{statistics.median(t):7.1f} ms [{min(t):.1f}, {max(t):.1f}]" for t in times]
    ratio = statistics.median(times[0]) / statistics.median(times[1])
    print(f"{name:34} PEFT {shown[0]:30} numaload {shown[1]:30} {ratio:5.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of loading a LoRA adapter, beside PEFT.")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    base = base_model(options.layers)
    with tempfile.TemporaryDirectory() as folder:
        write(folder, base, options.rank)
        path = os.path.join(folder, "adapter_model.safetensors")
        size = os.path.getsize(path)
        print(f"{size >> 20} MiB, rank {options.rank}, {options.layers} layers")
        contest, rounds = Contest(base, folder), options.rounds
        for copy in (False, True):
            how = "copied" if copy else "mapped"
            ours = partial(contest.our_tensors, copy=copy)
            measure(f"tensors, {how}", contest.peft_tensors, ours, rounds)
        ours = partial(contest.our_tensors, copy=True)
        measure("tensors, copied, cold", contest.peft_tensors, ours, rounds, partial(evict, path))
        measure("tensors as bfloat16", contest.peft_half, contest.our_half, rounds)
        measure("model", contest.peft_model, partial(contest.our_model, copy=False), rounds)
        for copy in (False, True):
            name = f"model, low_cpu_mem_usage, {'copied' if copy else 'mapped'}"
            theirs = partial(contest.peft_model, **CHEAP)
            measure(name, theirs, partial(contest.our_model, copy=copy, **CHEAP), rounds)


if __name__ == "__main__":
    main()
