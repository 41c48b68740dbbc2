"""What an adapter says of itself: adapter_config.json of PEFT, metadata of GGUF, or nothing."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

from numaload.errors import AdapterError
from numaload.files.source import read_whole
from numaload.formats.jsontext import parse_object
from numaload.formats.metadata import Metadata

NAME = "adapter_config.json"
MOST = 16 << 20  # bytes
MAX_RANK = 1 << 20
# Fields that PEFT's LoraConfig is given as they are in the file.
PASSED = (
    "base_model_name_or_path", "bias", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_dropout", "modules_to_save", "target_modules",
    "target_parameters", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip


class Said(NamedTuple):
    """rank and alpha are None where nothing says them."""

    rank: int | None = None
    alpha: float | None = None
    rslora: bool = False
    base_model: str | None = None
    target_modules: tuple[str, ...] = ()
    rank_pattern: dict[str, int] = {}  # noqa: RUF012 - never written to
    alpha_pattern: dict[str, float] = {}  # noqa: RUF012
    config: dict[str, Any] = {}  # noqa: RUF012 - all of the file


def scaling(alpha: float | None, rank: int, *, rslora: bool) -> float:
    """Return the factor of B @ A; 1 without an alpha, as in llama.cpp and kohya's tools."""
    if not alpha:
        return 1.0
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def from_file(path: str) -> Said:
    """Read adapter_config.json. Raises: AdapterError, ReadError."""
    config = parse_object(read_whole(path, MOST), path, AdapterError)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"peft_type is {kind!r}, expected 'LORA'", path=path)
    rank = _field(config, path, "r", int)
    if rank is not None and not 0 < rank < MAX_RANK:
        raise AdapterError(f"r is {rank}, expected 1 to {MAX_RANK}", path=path)
    targets = config.get("target_modules")
    return Said(
        rank,
        _number(config, path, "lora_alpha"),
        bool(_field(config, path, "use_rslora", bool)),
        _field(config, path, "base_model_name_or_path", str),
        (targets,) if isinstance(targets, str) else _strings(targets, path),
        _pattern(config, path, "rank_pattern"),
        _pattern(config, path, "alpha_pattern"),
        config,
    )


def from_metadata(metadata: Metadata, path: str) -> Said:
    """Read the metadata of a GGUF file. Raises: AdapterError where it is no LoRA adapter."""
    for key, expected in (("general.type", "adapter"), ("adapter.type", "lora")):
        found = metadata.get(key)
        if found != expected:
            what = "nothing" if found is None else repr(found)
            raise AdapterError(f"{key}: expected {expected!r}, found {what}", path=path)
    alpha = metadata.get("adapter.lora.alpha", 0.0)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(f"adapter.lora.alpha is {alpha!r}, expected a number", path=path)
    base = metadata.get("general.base_model.0.name")
    return Said(alpha=alpha or None, base_model=base if isinstance(base, str) else None)


def config_beside(path: str) -> str | None:
    """Return the adapter_config.json in a folder or beside a file; None where there is none."""
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    found = os.path.join(folder, NAME)
    return found if os.path.exists(found) else None


def _field(config: dict[str, Any], path: str, key: str, kind: type) -> Any:
    value = config.get(key)
    if value is not None and type(value) is not kind:
        raise AdapterError(
            f"{key}: expected {kind.__name__}, found {type(value).__name__}", path=path
        )
    return value


def _number(config: dict[str, Any], path: str, key: str) -> float | None:
    value = config.get(key)
    if value is not None and not _is_number(value):
        raise AdapterError(f"{key}: expected a number, found {str(value)[:60]}", path=path)
    return None if value is None else float(value)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not


def _strings(value: Any, path: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise AdapterError("target_modules: expected names, or one pattern", path=path)
    return tuple(value)


def _pattern(config: dict[str, Any], path: str, key: str) -> dict[str, Any]:
    value = config.get(key) or {}
    if not isinstance(value, dict) or not all(map(_is_number, value.values())):
        raise AdapterError(f"{key}: expected names with a number each", path=path)
    return value
