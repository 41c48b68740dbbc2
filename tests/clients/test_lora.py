"""LoRA adapters in real peft and diffusers: what docs/lora.md says runs as it stands there.

GGUF adapters are made by llama.cpp's own converter where NUMALOAD_LLAMA_CPP says where that is
(scripts/clients does), else by what it was read to do.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lora_files as lf
from commands import LIMIT_S, Numaload
from numaload.backends.lora import open_adapter

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# What PEFT does and transformers would rather not have.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

CONVERTER = os.environ.get("NUMALOAD_LLAMA_CPP", "")
PAGE = (ROOT / "docs/lora.md").read_text(encoding="utf-8")
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 16, "first_k_dense_replace": 2, "num_key_value_heads": 4,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 16}),
    "deepseek2": ("DeepseekV2ForCausalLM", DEEPSEEK),
}


def block(heading: str) -> str:
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(code)


def base_model(architecture: str = "llama") -> Any:
    """The same small model whenever it is asked for."""
    torch.manual_seed(3)
    name, more = MODELS[architecture]
    kind = getattr(transformers, name)
    return kind(kind.config_class(**(SIZES | more))).eval()


def train(folder: Path, architecture: str = "llama", **options: Any) -> Path:
    """An adapter that PEFT writes, its halves random."""
    targets = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"]
    given = {"target_modules": targets if architecture == "deepseek2" else LINEAR} | options
    config = peft.LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **given)
    model = peft.get_peft_model(base_model(architecture), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def outputs(model: Any) -> Any:
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(tokens).logits


def by_peft(folder: Path, architecture: str = "llama") -> Any:
    return peft.PeftModel.from_pretrained(base_model(architecture), folder)


def by_us(path: Path, architecture: str = "llama") -> Any:
    base = base_model(architecture)
    with open_adapter(path) as adapter:
        model = peft.get_peft_model(base, peft.LoraConfig(**adapter.lora_config(base)))
        result = peft.set_peft_model_state_dict(model, adapter.state_dict(model=model))
    assert not result.unexpected_keys
    return model


def convert(folder: Path, architecture: str, out_type: str = "f32") -> Path:
    """Convert an adapter of PEFT by llama.cpp's own convert_lora_to_gguf.py."""
    if not CONVERTER:
        pytest.skip("NUMALOAD_LLAMA_CPP does not say where llama.cpp's converter is")
    base, path = folder / "base", folder / "adapter.gguf"
    config = base_model(architecture).config
    config.architectures = [MODELS[architecture][0]]
    config.save_pretrained(base)
    words = [sys.executable, f"{CONVERTER}/convert_lora_to_gguf.py", "--base", str(base),
             "--outfile", str(path), "--outtype", out_type, str(folder)]  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    return path


OPTIONS: dict[str, dict[str, Any]] = {
    "ranks": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "some-layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_converted_adapter_is_the_one_that_peft_loads(tmp_path: Path, kind: str) -> None:
    folder = train(tmp_path / "adapter", **OPTIONS[kind])
    path = convert(folder, "llama")
    expected, found = by_peft(folder), by_us(path)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(outputs(found), outputs(expected))
    assert not torch.equal(outputs(found), outputs(base_model()))


@pytest.mark.parametrize("architecture", MODELS)
def test_architectures(tmp_path: Path, architecture: str) -> None:
    folder = train(tmp_path / "adapter", architecture)
    found = by_us(convert(folder, architecture), architecture)
    assert torch.equal(outputs(found), outputs(by_peft(folder, architecture)))


def test_types_of_the_converter(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter")
    theirs = peft.load_peft_weights(str(folder), device="cpu")
    for out_type, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        with open_adapter(convert(folder, "llama", out_type)) as adapter:
            found = adapter.state_dict(model=base_model())
        for name, tensor in theirs.items():
            assert torch.equal(found[name], tensor.to(dtype))
    with open_adapter(convert(folder, "llama", "q8_0")) as adapter:
        found = adapter.state_dict(model=base_model())
    for name, tensor in theirs.items():
        assert found[name].dtype in (torch.float32, torch.float16)  # B has no whole blocks
        assert (found[name] - tensor).abs().max() < tensor.abs().max() / 100


def test_an_alora_is_active_only_after_its_tokens(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter", alora_invocation_tokens=[5, 6])
    with open_adapter(convert(folder, "llama")) as adapter:
        config = peft.LoraConfig(**adapter.lora_config(base_model()))
    assert config.alora_invocation_tokens == [5, 6]


def as_gguf(folder: Path, path: Path) -> Path:
    """What convert_lora_to_gguf.py makes of an adapter of PEFT, by its description."""
    names = dict(zip(LINEAR, ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up",
                              "ffn_down"], strict=True))  # fmt: skip
    arrays = {}
    for name, tensor in peft.load_peft_weights(str(folder), device="cpu").items():
        found = re.fullmatch(r".*layers\.(\d+)\.\w+\.(\w+)\.lora_(A|B).weight", name)
        assert found is not None
        layer, module, half = found.groups()
        heads = {"q_proj": 4, "k_proj": 2}.get(module)
        if half == "B" and heads:
            pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            tensor = pairs.swapaxes(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        arrays[f"blk.{layer}.{names[module]}.weight.lora_{half.lower()}"] = tensor.numpy()
    return lf.write_gguf(path, arrays, "llama", alpha=6.0)


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page calls "adapter" and "adapter.gguf"."""
    folder = train(tmp_path / "adapter")
    as_gguf(folder, tmp_path / "adapter.gguf")
    monkeypatch.chdir(tmp_path)
    return folder


def test_the_page_loads_one_by_peft(paths: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outputs(by_peft(paths).merge_and_unload())
    base_model().save_pretrained("base")
    names: dict[str, Any] = {}
    exec(block("An adapter of PEFT"), names)  # noqa: S102 - what the page says
    assert torch.equal(outputs(names["model"]), expected)


def test_the_page_puts_a_gguf_adapter_into_peft(paths: Path) -> None:
    names: dict[str, Any] = {"base": base_model()}
    exec(block("A GGUF adapter for a model of transformers"), names)  # noqa: S102
    assert torch.equal(outputs(names["model"]), outputs(by_peft(paths)))
    for parameter in names["model"].parameters():  # its own memory, not the file's
        parameter.data.add_(1)


def test_a_gguf_adapter_is_merged(paths: Path) -> None:
    found = by_us(paths.parent / "adapter.gguf").merge_and_unload()
    assert torch.equal(outputs(found), outputs(by_peft(paths).merge_and_unload()))


def test_the_page_s_first_line_is_what_inspect_says(numaload: Numaload, paths: Path) -> None:
    said = numaload("inspect", "adapter").stdout.splitlines()[0]
    assert said == (
        "LoRA adapter (PEFT), rank 4, 14 modules; load it with"
        f" peft: PeftModel.from_pretrained(model, '{paths}')"
    )
    words = re.sub(r"'.*'|org/base|\d+", "X", said.replace("modules;", "modules, base model X;"))
    assert words in re.sub(r"'/models/adapter'|org/base|\d+", "X", PAGE)
