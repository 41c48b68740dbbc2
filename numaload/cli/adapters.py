"""What ``numaload inspect`` says of an adapter: whose it is, its ranks, and which program loads it.

Names of tensors and a few fields of adapter_config.json are all that is looked at. No more is
promised than is shown: what an adapter does is known to the program that loads it.
"""

from __future__ import annotations

import os
import re
import shlex
from typing import TYPE_CHECKING, Any, NamedTuple

from numaload.cli.output import count, note
from numaload.errors import AdapterError, NumaloadError, printable

if TYPE_CHECKING:
    from numaload.weights import Tensor, Weights

CONFIG = "adapter_config.json"
MOST = 1 << 20  # bytes of it
WORD = 80  # characters of a name in the summary
PART = re.compile(
    r"[._](?P<what>lora_(?:embedding_)?[AB]|lora_[ab]|lora(?:_linear_layer)?[._](?:down|up|mid)"
    r"|lora_magnitude_vector|dora_scale|hada_\w\w?_[ab]|lokr_\w\w?(?:_[ab])?|b?oft_\w+|glora_\w+)"
    r"(?:\.|$)"
)
# {part of a name: which dim of that tensor is the rank}, by whose the adapter is.
RANKS = {
    "llama.cpp": {"lora_b": -1},
    "MLX": {"lora_a": -1},
    "LyCORIS": {"hada_w1_b": 0, "lokr_w1_b": 0, "lokr_w2_b": 0},
    "": {
        "lora_A": 0, "lora_embedding_A": 0, "lora_down": 0, "lora.down": 0,
        "lora_linear_layer.down": 0,
    },
}  # fmt: skip
# {whose: the call that loads it}
LOADERS = {
    "PEFT": "peft: PeftModel.from_pretrained(model, {folder!r})",
    "diffusers": "diffusers: pipe.load_lora_weights({path!r})",
    "kohya": "diffusers: pipe.load_lora_weights({path!r})",
    "LyCORIS": "ComfyUI: its LoRA loader",
    "MLX": "mlx_lm: load(MODEL, adapter_path={folder!r})",
    "llama.cpp": "llama.cpp: --lora {word}, or peft: numaload.backends.lora.open_adapter({path!r})",
}
KOHYA = re.compile(r"lora_[a-z0-9]+_")
DIFFUSERS = re.compile(r"(unet|text_encoder(_\d)?|transformer|diffusion_model)\.")


class Described(NamedTuple):
    """One adapter. ranks: all that occur, in order; modules: how many it changes."""

    kind: str
    whose: str
    ranks: list[int]
    modules: int
    base_model: str | None
    load: str

    def line(self) -> str:
        told = [f"{self.kind} adapter ({self.whose})"]
        if self.ranks:
            least, most = self.ranks[0], self.ranks[-1]
            told.append(f"rank {least}" if least == most else f"ranks {least} to {most}")
        if self.modules:
            told.append(count(self.modules, "module"))
        if self.base_model:
            told.append(f"base model {printable(self.base_model, WORD)}")
        return f"{', '.join(told)}; load it with {self.load}"


def describe(weights: Weights) -> Described | None:
    """Say what an adapter is; None for what is none."""
    path, metadata = weights.paths[0], weights.metadata
    parts = {name: match for name in weights if (match := PART.search(name))}
    alone = 2 * sum(weights[name].nbytes for name in parts) > sum(
        t.nbytes for t in weights.values()
    )
    config = {}
    if metadata.get("general.type") == "adapter":
        whose, base = "llama.cpp", metadata.get("general.base_model.0.name")
    elif alone or os.path.basename(path).startswith("adapter_model."):
        config = _config(os.path.join(os.path.dirname(path), CONFIG))
        base = config.get("base_model_name_or_path")
        whose = _whose({match["what"] for match in parts.values()}, parts, config)
    else:
        return None
    found = config.get("peft_type")
    folder, word = os.path.dirname(path), shlex.quote(path)
    load = LOADERS[whose].format(path=path, folder=folder, word=word)
    if whose == "PEFT" and not config:
        load += f", which needs {CONFIG} beside it"
    kind = printable(found, WORD) if isinstance(found, str) and found != "LORA" else "LoRA"
    dims = RANKS.get(whose, RANKS[""])
    ranks = {_rank(weights[name], dims.get(match["what"])) for name, match in parts.items()}
    return Described(
        kind,
        whose,
        sorted(ranks - {0}),
        len({name[: match.start()] for name, match in parts.items()}),
        base if isinstance(base, str) else None,
        load,
    )


def _config(path: str) -> dict[str, Any]:
    """Read the configuration beside an adapter; one that cannot be read is said, and counts not."""
    from numaload.files.source import read_whole
    from numaload.formats.jsontext import parse_object

    if not os.path.exists(path):
        return {}
    try:
        return parse_object(read_whole(path, MOST), path, AdapterError)
    except NumaloadError as error:
        note(error)
        return {}


def _whose(kinds: set[str], names: Any, config: dict[str, Any]) -> str:
    """Return a key of LOADERS."""
    if isinstance(config.get("peft_type"), str):
        return "PEFT"
    if any(kind.startswith(("hada", "lokr", "oft", "boft", "glora")) for kind in kinds):
        return "LyCORIS"
    if any(KOHYA.match(name) for name in names):
        return "kohya"
    if "lora_a" in kinds:
        return "MLX"
    if any("." in kind for kind in kinds) or any(map(DIFFUSERS.match, names)):
        return "diffusers"
    return "PEFT"


def _rank(tensor: Tensor, dim: int | None) -> int:
    """Return a tensor's dim, 0 where it has none that is the rank."""
    return tensor.shape[dim] if dim is not None and len(tensor.shape) > 1 else 0
