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

Arrays = Mapping[str, NDArray[Any]]
MODULES = [f"model.layers.{i}.self_attn.{m}" for i in (0, 1) for m in ("q_proj", "v_proj")]
TENSORS = [f"blk.{i}.{m}" for i in (0, 1) for m in ("attn_q", "attn_v")]
RANK, ALPHA, WIDTH, ROWS = 4, 6.0, 16, 24
CONFIG: dict[str, Any] = {
    "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "v_proj"],
    "base_model_name_or_path": "org/base", "use_rslora": False, "task_type": "CAUSAL_LM",
}  # fmt: skip
PREFIX = "base_model.model."
PEFT_ENDS, GGUF_ENDS = (".lora_A.weight", ".lora_B.weight"), (".weight.lora_a", ".weight.lora_b")


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


def write_safetensors(path: Path, arrays: Arrays) -> Path:
    rows: dict[str, sb.Row] = {name: ("F32", array.shape) for name, array in arrays.items()}
    data = b"".join(array.tobytes() for array in arrays.values())
    path.write_bytes(sb.build(sb.table(rows), data))
    return path


def write_peft(folder: Path, arrays: Arrays | None = None, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    names = [PREFIX + module for module in MODULES]
    found = arrays or halves(names, PEFT_ENDS)
    write_safetensors(folder / "adapter_model.safetensors", found)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    return folder


def write_gguf(
    path: Path,
    arrays: Arrays | None = None,
    architecture: str = "qwen2",
    alpha: float | None = ALPHA,
    types: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    **said: Any,
) -> Path:
    """As convert_lora_to_gguf.py of llama.cpp does. said: metadata, __ for dots."""
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in ({"general.type": "adapter", "adapter.type": "lora"} | said).items():
        name = key.replace("__", ".")
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            kind, each = gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
            writer.add_key_value(name, value, kind, each)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in (arrays or halves(TENSORS, GGUF_ENDS)).items():
        writer.add_tensor(name, array, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
