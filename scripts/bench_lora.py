"""How long it takes to load a LoRA adapter: peft and diffusers alone, after prewarm, and from GGUF.

    python scripts/bench_lora.py [--rank N] [--layers N] [--rounds N]

All in this run, in turns, on the same bytes as safetensors and as GGUF; medians of the rounds,
least and most, in milliseconds, and the median of each ratio to the first way. Cold is dropped
from the page cache by POSIX_FADV_DONTNEED. Before each turn as much memory as any way needs is
touched and freed. What was loaded is read once within the measured time,
since peft maps the file. The models themselves are memory that nobody reads. transformers, peft,
diffusers and gguf are needed.
"""

from __future__ import annotations

import argparse
import gc
import mmap
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import diffusers
import gguf
import numpy as np
import peft
import torch
import transformers
from safetensors.torch import save_file

import numaload
from numaload.backends.lora import open_adapter
from numaload.linux.mapping import map_private

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip
CHEAP = {"low_cpu_mem_usage": True}
TIMES = 4  # an adapter's bytes: peft has several copies
NOTHING = [torch.zeros(1)]
# A way loads, and returns the tensors and what undoes it.
Way = Callable[[], tuple[Iterable[Any], Callable[[], Any]]]


def empty(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind(config).to_empty(device="cpu")


def llama(layers: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, vocab_size=32000,
        num_attention_heads=16, num_key_value_heads=8, dtype=torch.bfloat16,
    )  # fmt: skip
    return empty(transformers.LlamaForCausalLM, config)


def write(folder: str, base: Any, rank: int) -> tuple[str, str]:
    """Write random halves for all linear layers, in both formats; return both paths."""
    paths = os.path.join(folder, "adapter_model.safetensors"), os.path.join(folder, "a.gguf")
    config = peft.LoraConfig(r=rank, target_modules=[m.split(".")[1] for m in NAMES])
    model = peft.get_peft_model(base, config)
    model.save_pretrained(folder)  # its tensors are replaced below
    made, writer = {}, gguf.GGUFWriter(paths[1], "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for name, half in peft.get_peft_model_state_dict(model).items():
        layer, module, which = re.findall(r"layers\.(\d+)\.(.+)\.lora_(.)", name)[0]
        made[name] = torch.randn(half.shape)
        key = f"blk.{layer}.{NAMES[module]}.weight.lora_{which.lower()}"
        writer.add_tensor(key, made[name].numpy())
    save_file(made, paths[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.unload()
    return paths


def pipeline(folder: str, rank: int) -> tuple[Any, str]:
    """Return a pipeline around Stable Diffusion's UNet, and an adapter of its attention."""
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu")
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made = {}
    for name, module in unet.named_modules():
        if re.search(r"attn\d\.to_(q|k|v|out\.0)$", name):
            made[f"unet.{name}.lora_A.weight"] = torch.randn(rank, module.in_features)
            made[f"unet.{name}.lora_B.weight"] = torch.randn(module.out_features, rank)
    path = os.path.join(folder, "lora.safetensors")
    save_file(made, path)
    return pipe, path


def lora_of(model: Any) -> list[Any]:
    return [p for name, p in model.named_parameters() if "lora_" in name]


def ways_of_peft(base: Any, folder: str, path: str) -> dict[str, Way]:
    def tensors() -> Any:
        return peft.load_peft_weights(folder, device="cpu").values(), NOTHING.copy

    def from_gguf() -> Any:
        with open_adapter(path) as adapter:
            return adapter.state_dict(model=base).values(), NOTHING.copy

    def model() -> Any:
        made = peft.PeftModel.from_pretrained(base, folder, **CHEAP)
        return lora_of(made), made.unload

    def model_from_gguf() -> Any:
        with open_adapter(path) as adapter:
            config = peft.LoraConfig(**adapter.lora_config(base))
            made = peft.get_peft_model(base, config, **CHEAP)
            peft.set_peft_model_state_dict(made, adapter.state_dict(model=base), **CHEAP)
        return lora_of(made), made.unload

    return {
        "tensors: peft": tensors,
        "tensors: prewarm, peft": after_prewarm(folder, tensors),
        "tensors: GGUF, numaload": from_gguf,
        "model: peft": model,
        "model: prewarm, peft": after_prewarm(folder, model),
        "model: GGUF, numaload and peft": model_from_gguf,
    }


def ways_of_diffusers(pipe: Any, path: str) -> dict[str, Way]:
    def pipeline() -> Any:
        pipe.load_lora_weights(path)
        return lora_of(pipe.unet), pipe.unload_lora_weights

    return {
        "pipeline: diffusers": pipeline,
        "pipeline: prewarm, diffusers": after_prewarm(path, pipeline),
    }


def after_prewarm(path: str, way: Way) -> Way:
    def both() -> Any:
        numaload.prewarm(path)
        return way()

    return both


def evict(paths: Iterable[str]) -> None:
    """Out of the page cache."""
    for path in paths:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch(nbytes: int) -> None:
    """Take and free memory: hosts of virtual machines take back what is idle."""
    with map_private(nbytes) as mapping:
        np.frombuffer(mapping.view(write=True), np.uint8)[:: mmap.PAGESIZE] = 1


def milliseconds(way: Way, nbytes: int) -> float:
    gc.collect()
    touch(TIMES * nbytes)
    start = time.perf_counter()
    tensors, undo = way()
    for tensor in tensors:
        tensor.sum()
    took = time.perf_counter() - start
    undo()
    return took * 1e3


def measure(ways: dict[str, Way], paths: list[str], rounds: int) -> None:
    for state in ("cold", "warm"):
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):  # the first is for imports
            for name, way in ways.items():
                if state == "cold":
                    evict(paths)
                took = milliseconds(way, max(map(os.path.getsize, paths)))
                if turn:
                    times[name].append(took)
        for name, found in times.items():
            spread = f"[{min(found):.0f}, {max(found):.0f}]"
            alone = times[next(one for one in ways if one.split(":")[0] == name.split(":")[0])]
            ratio = statistics.median(a / b for a, b in zip(found, alone, strict=True))
            median = f"{statistics.median(found):7.1f} ms {spread:14}"
            print(f"{state} {name:32} {median} {ratio:.2f} of alone", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of loading a LoRA adapter.")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        base = llama(options.layers)
        paths = write(folder, base, options.rank)
        print(f"llama, {options.layers} layers: {os.path.getsize(paths[0]) >> 20} MiB")
        measure(ways_of_peft(base, folder, paths[1]), list(paths), options.rounds)
        pipe, path = pipeline(folder, options.rank)
        print(f"UNet of Stable Diffusion: {os.path.getsize(path) >> 20} MiB")
        measure(ways_of_diffusers(pipe, path), [path], options.rounds)


if __name__ == "__main__":
    main()
