"""LoRA adapters for tests, in the ways that programs write them; all halves are random floats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

import safetensors_builder as sb

Arrays = Mapping[str, NDArray[np.float32]]
MODULES = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
TENSORS = [f"blk.{i}.{m}" for i in (0, 1) for m in ("attn_q", "attn_v")]
RANK, ALPHA, WIDTH, ROWS = 4, 6.0, 16, 24
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base", "use_rslora": False, "task_type": "CAUSAL_LM",
}  # fmt: skip


def halves(
    modules: list[str],
    ends: tuple[str, str],
    rank: int = RANK,
    shape: tuple[int, int] = (WIDTH, ROWS),
) -> dict[str, NDArray[np.float32]]:
    """{module + end: random array} of both halves of each module; shape: (columns, rows)."""
    rng = np.random.default_rng(7)
    found = {}
    for module in modules:
        found[module + ends[0]] = rng.standard_normal((rank, shape[0]), np.float32)
        found[module + ends[1]] = rng.standard_normal((shape[1], rank), np.float32)
    return found


def write_safetensors(path: Path, arrays: Arrays, metadata: dict[str, str] | None = None) -> Path:
    rows: dict[str, sb.Row] = {name: ("F32", array.shape) for name, array in arrays.items()}
    head = {} if metadata is None else {"__metadata__": metadata}
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(sb.build(head | sb.table(rows), data))
    return path


def write_peft(folder: Path, arrays: Arrays | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    names = [f"base_model.model.{module}" for module in MODULES]
    ends = (".lora_A.weight", ".lora_B.weight")
    write_safetensors(folder / "adapter_model.safetensors", arrays or halves(names, ends))
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_gguf(
    path: Path,
    arrays: Arrays,
    architecture: str = "qwen2",
    alpha: float | None = ALPHA,
    **said: str,
) -> Path:
    """As convert_lora_to_gguf.py of llama.cpp does."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | said).items():
        writer.add_string(key.replace("__", "."), value)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


PEFT_ENDS, KOHYA_ENDS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
)
GGUF_ENDS = (".weight.lora_a", ".weight.lora_b")
KOHYA = ["lora_unet_down_blocks_0_attn_to_q", "lora_te1_text_model_layers_0_q_proj"]
DIFFUSERS = ["unet.down.attn1.to_q", "unet.down.attn1.to_out.0"]


def peft_folder(folder: Path) -> Path:
    return write_peft(folder / "adapter")


def peft_file(folder: Path) -> Path:
    return write_peft(folder / "adapter") / "adapter_model.safetensors"


def bare(folder: Path) -> Path:
    return write_safetensors(folder / "x.safetensors", halves(MODULES, PEFT_ENDS))


def kohya(folder: Path) -> Path:
    alphas = {name + ".alpha": np.array(ALPHA, np.float32) for name in KOHYA}
    arrays = halves(KOHYA, KOHYA_ENDS) | alphas
    return write_safetensors(folder / "x.safetensors", arrays, {"ss_network_dim": "4"})


def diffusers(folder: Path) -> Path:
    arrays = halves(DIFFUSERS, (".lora.down.weight", ".lora.up.weight"))
    return write_safetensors(folder / "x.safetensors", arrays)


def gguf_file(folder: Path) -> Path:
    arrays = halves(TENSORS, GGUF_ENDS)
    return write_gguf(folder / "x.gguf", arrays, general__base_model__0__name="Base")
