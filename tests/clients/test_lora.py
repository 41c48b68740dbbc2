"""Adapters that PEFT wrote, or llama.cpp would: what PEFT makes of them is what it makes itself.

docs/lora.md: its blocks of code run as they stand there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lora_files as lf
from numaload.backends.lora import open_adapter

ROOT = Path(__file__).parents[2]
torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

# What PEFT does and transformers would rather not have.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

PAGE = (ROOT / "docs/lora.md").read_text(encoding="utf-8")
HEADS, KEY_HEADS, WIDTH = 4, 2, 32
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def block(heading: str) -> str:
    (section,) = re.findall(rf"^## {heading}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(code)


def llama() -> Any:
    """The same small model whenever it is asked for."""
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def train(folder: Path, **options: Any) -> Path:
    """An adapter that PEFT writes, its halves random."""
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=LINEAR, task_type="CAUSAL_LM")
    for key, value in options.items():
        setattr(config, key, value)
    model = peft.get_peft_model(llama(), config)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    embeddings = "embed_tokens" in config.target_modules
    model.save_pretrained(folder, save_embedding_layers=embeddings)
    return folder


def outputs(model: Any) -> Any:
    tokens = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        return model.eval()(tokens).logits


def by_peft(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(llama(), folder)


def by_us(path: Path, base: Any = None, **options: Any) -> Any:
    base = base or llama()
    with open_adapter(path) as adapter:
        model = peft.get_peft_model(base, peft.LoraConfig(**adapter.lora_config(base)))
        result = peft.set_peft_model_state_dict(model, adapter.state_dict(model=model, **options))
    assert not result.unexpected_keys
    return model


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 20}},
    "dora": {"use_dora": True},
    "one-expression": {"target_modules": r".*\.[qv]_proj"},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "saved-modules": {"modules_to_save": ["lm_head"]},
    "some-layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_peft(tmp_path: Path, kind: str) -> None:
    folder = train(tmp_path / "adapter", **KINDS[kind])
    expected, found = by_peft(folder), by_us(folder)
    ours, theirs = found.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(outputs(found), outputs(expected))
    assert not torch.equal(outputs(found), outputs(llama()))


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_peft_reads(tmp_path: Path, kind: str) -> None:
    folder = train(tmp_path / "adapter", **KINDS[kind])
    expected = peft.load_peft_weights(str(folder), device="cpu")
    with open_adapter(folder) as adapter:
        found = adapter.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def as_gguf(folder: Path, path: Path, architecture: str) -> Path:
    """What convert_lora_to_gguf.py makes of an adapter of PEFT."""
    arrays = {}
    for name, tensor in peft.load_peft_weights(str(folder), device="cpu").items():
        found = re.fullmatch(
            r"base_model\.model\.model\.layers\.(\d+)\.(.+)\.lora_(A|B).weight", name
        )
        assert found is not None
        layer, module, half = found.groups()
        heads = {"self_attn.q_proj": HEADS, "self_attn.k_proj": KEY_HEADS}.get(module)
        if half == "B" and heads and architecture == "llama":
            pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, -1)
            array = pairs.swapaxes(1, 2).reshape(tensor.shape).numpy()
        else:
            array = tensor.numpy()
        arrays[f"blk.{layer}.{GGUF_NAMES[module]}.weight.lora_{half.lower()}"] = array
    return lf.write_gguf(path, arrays, architecture, alpha=6.0)


def test_a_gguf_adapter_of_a_llama(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter")
    path = as_gguf(folder, tmp_path / "adapter.gguf", "llama")
    expected = outputs(by_peft(folder))
    assert torch.equal(outputs(by_us(path)), expected)
    with open_adapter(path) as adapter:  # as much is known without the model
        state = adapter.state_dict(heads=(HEADS, KEY_HEADS))
    theirs = peft.load_peft_weights(str(folder), device="cpu")
    assert state.keys() == theirs.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.items())


def test_in_another_type(tmp_path: Path) -> None:
    folder = train(tmp_path / "adapter")
    with open_adapter(folder) as adapter:
        found = adapter.state_dict(torch.bfloat16)
    for name, tensor in peft.load_peft_weights(str(folder), device="cpu").items():
        assert torch.equal(found[name], tensor.bfloat16())


def test_kohya_names_find_their_modules(tmp_path: Path) -> None:
    """An adapter of PEFT under the names that kohya's tools give."""
    folder = train(tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    arrays = {}
    for name, tensor in peft.load_peft_weights(str(folder), device="cpu").items():
        module, _, half = name.removeprefix("base_model.model.").rpartition(".lora_")
        flat = "lora_te_" + module.replace(".", "_")
        ending = {"A.weight": "down", "B.weight": "up"}[half]
        arrays[f"{flat}.lora_{ending}.weight"] = tensor.numpy()
        arrays[f"{flat}.alpha"] = torch.tensor(6.0).numpy()
    path = lf.write_safetensors(tmp_path / "kohya.safetensors", arrays)
    assert torch.equal(outputs(by_us(path)), outputs(by_peft(folder)))


@pytest.fixture
def paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the page calls "adapter" and "adapter.gguf"."""
    folder = train(tmp_path / "adapter")
    as_gguf(folder, tmp_path / "adapter.gguf", "llama")
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(
    "heading", ["Hand it to PEFT", "A GGUF adapter for a model of transformers"]
)
def test_the_page_hands_it_to_peft(paths: Path, heading: str) -> None:
    names: dict[str, Any] = {"base": llama()}
    exec(block(heading), names)  # noqa: S102 - what the page says
    assert torch.equal(outputs(names["model"]), outputs(by_peft(paths)))
    for parameter in names["model"].parameters():  # its own memory, not the file's
        parameter.data.add_(1)


def test_the_page_looks_at_one(paths: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exec(block("Look at one"), {})  # noqa: S102
    out = capsys.readouterr().out
    assert out.startswith("peft 4 6.0 1.5\n")
    assert "model.layers.1.mlp.down_proj (4, 48) (32, 4) F32 1.5" in out
