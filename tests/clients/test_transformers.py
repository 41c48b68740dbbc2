"""Models of transformers from GGUF files, beside the models converted and its own GGUF loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import hf_conversion as hc
import hf_tiny
import numaload as api
from hf_conversion import Q
from numaload.backends.transformers import from_pretrained
from numaload.errors import CancelledError, StateDictError, UsageError

transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# What transformers itself reads of GGUF files, given the configuration.
THEIRS = (
    "llama", "llama-3.2", "llama-biased", "qwen2", "qwen3", "qwen3moe", "qwen3.5", "qwen3.5-moe",
    "gemma-2", "gemma-3", "phi-3", "phi-4-mini",
)  # fmt: skip
NEW_READER = ("qwen3.5", "qwen3.5-moe")
TOKENS = torch.arange(160).reshape(2, 80) % 80
# Notes of transformers, and one number that its own formula gives, too.
ASIDE = {"_name_or_path", "architectures", "dtype", "head_dim", "attention_factor"}


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS).logits


def check_same(ours: Any, theirs: Any, *, exactly: bool = True) -> None:
    """Parameter by parameter, buffer by buffer."""
    for every in ("named_parameters", "named_buffers"):
        found, expected = dict(getattr(ours, every)()), dict(getattr(theirs, every)())
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            if exactly:
                assert torch.equal(found[name], tensor), name
            else:  # norms of gemma lose a bit as weight + 1, logarithms two
                assert torch.allclose(found[name], tensor, rtol=0, atol=1e-6), name


def leaves(value: Any) -> Any:
    """Numbers as float32, as files have them."""
    if isinstance(value, dict):
        return {key: leaves(one) for key, one in value.items() if key not in ASIDE}
    if isinstance(value, list):
        return [leaves(one) for one in value]
    return float(np.float32(value)) if isinstance(value, float) else value


def lora_of(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("case", hf_tiny.TINY)
def test_the_same_as_the_model_that_was_converted(tmp_path: Path, case: str) -> None:
    """From the file alone: the class, the configuration, what it computes."""
    architecture, model = hc.make(case)
    hc.write(tmp_path / "m.gguf", architecture, model)
    ours = from_pretrained(tmp_path / "m.gguf")
    assert type(ours) is type(model)
    check_same(ours, model, exactly=architecture not in hc.NORMS_PLUS_ONE)
    assert torch.allclose(logits(ours), logits(model), rtol=0, atol=1e-5)
    assert leaves(ours.config.to_dict()) == leaves(model.config.to_dict())
    assert not ours.training


@pytest.mark.parametrize("case", THEIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_as_transformers_own_loading(tmp_path: Path, case: str, dtype: Any) -> None:
    architecture, model = hc.make(case)
    kinds: tuple[Any, ...] = (Q.Q8_0, Q.Q4_1, Q.F16, Q.BF16, Q.Q4_0)
    if case in NEW_READER:  # it rounds in between, and joins tensors of one type alone
        dtype, kinds = torch.float32, (Q.Q8_0,)
    hc.write(tmp_path / "m.gguf", architecture, model, kinds)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=dtype, config=model.config
    )
    ours = from_pretrained(tmp_path / "m.gguf", dtype=dtype)
    check_same(ours, theirs)
    assert torch.equal(logits(ours), logits(theirs))


def test_quantized_types(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
    config = hf_tiny.TINY["llama"][1](**sizes)
    model = transformers.LlamaForCausalLM(config)
    kinds = (Q.Q4_K, Q.Q6_K, Q.Q5_K, Q.Q3_K, Q.Q2_K, Q.IQ4_XS, Q.IQ3_S, Q.IQ2_XXS, Q.IQ1_S)
    hc.write(tmp_path / "m.gguf", "llama", model, kinds)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", dtype=torch.float32, config=config
    )
    check_same(from_pretrained(tmp_path / "m.gguf"), theirs)


def test_dtypes(tmp_path: Path) -> None:
    """By default the configuration's or torch's; some are kept in float32, unrounded."""
    architecture, model = hc.make("deepseek-v3")
    hc.write(tmp_path / "m.gguf", architecture, model)
    key = "model.layers.1.mlp.gate.weight"
    for dtype in (torch.bfloat16, "bfloat16", None, "auto"):
        model.config.dtype = torch.float16 if dtype is None else None
        ours = from_pretrained(tmp_path / "m.gguf", dtype=dtype, config=model.config)
        expected = {None: torch.float16, "auto": torch.float32}.get(dtype, torch.bfloat16)
        assert ours.lm_head.weight.dtype == expected
        assert torch.equal(ours.lm_head.weight, model.lm_head.weight.to(expected))
        assert torch.equal(ours.get_parameter(key), model.get_parameter(key))
    ours = from_pretrained(tmp_path / "m.gguf", torch_dtype=torch.float16)
    assert ours.lm_head.weight.dtype == torch.float16
    refused = {
        "floating-point": {"dtype": torch.int8},
        "expected float32, ": {"dtype": torch.float64},
        "state_dict": {"state_dict": {}},
        "AutoConfig": {"config": str(tmp_path)},
    }
    for said, options in refused.items():
        with pytest.raises(UsageError, match=said):
            from_pretrained(tmp_path / "m.gguf", **options)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft of transformers
@pytest.mark.parametrize("case", ["llama", "qwen3moe"])
def test_merging_an_adapter(tmp_path: Path, case: str) -> None:
    """The parameters are memory that can be written to."""
    architecture, model = hc.make(case)
    hc.write(tmp_path / "m.gguf", architecture, model)
    torch.manual_seed(1)
    expected = lora_of(model)
    adapter = {k: v for k, v in expected.state_dict().items() if "lora_" in k}
    ours = lora_of(from_pretrained(tmp_path / "m.gguf"))
    ours.load_state_dict(adapter, strict=False)
    check_same(ours.merge_and_unload(), expected.merge_and_unload())


@pytest.mark.parametrize("case", ["llama", "qwen3"])  # separate embeddings, and tied ones
def test_resizing_embeddings(tmp_path: Path, case: str) -> None:
    architecture, model = hc.make(case)
    hc.write(tmp_path / "m.gguf", architecture, model)
    ours = from_pretrained(tmp_path / "m.gguf")
    ours.resize_token_embeddings(96, mean_resizing=False)
    assert ours.lm_head.weight.shape == (96, 64)
    assert torch.equal(ours.lm_head.weight[:80], model.lm_head.weight)
    assert ours(torch.tensor([[95]])).logits.shape == (1, 1, 96)


@pytest.mark.parametrize("case", ["llama", "gpt-oss", "qwen3.5-moe"])
def test_a_training_step(tmp_path: Path, case: str) -> None:
    architecture, model = hc.make(case)
    hc.write(tmp_path / "m.gguf", architecture, model)
    after = []
    for one in (from_pretrained(tmp_path / "m.gguf"), model):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        one(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        after.append(one)
    for mine, theirs in zip(after[0].parameters(), after[1].parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-5)


def test_saving_and_loading_again(tmp_path: Path) -> None:
    architecture, model = hc.make("mixtral")
    hc.write(tmp_path / "m.gguf", architecture, model)
    from_pretrained(tmp_path / "m.gguf").save_pretrained(tmp_path / "saved")
    check_same(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), model)


def test_opened_weights_and_split_files(tmp_path: Path) -> None:
    """output.weight is in the second file: the first alone says that embeddings are tied."""
    architecture, model = hc.make("llama")
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), architecture, split_max_tensors=12)
    hc._metadata(writer, architecture, model.config)
    for name, array in hc._tensors(architecture, model):
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_same(from_pretrained(tmp_path / "m-00002-of-00002.gguf"), model)
    with api.open(tmp_path / "m-00001-of-00002.gguf", copy=True) as weights:
        ours = from_pretrained(weights)
    check_same(ours, model)


def test_options_are_the_class_s_own(tmp_path: Path) -> None:
    architecture, model = hc.make("qwen2")
    hc.write(tmp_path / "m.gguf", architecture, model)
    ours, info = from_pretrained(
        tmp_path / "m.gguf", attn_implementation="eager", output_loading_info=True
    )
    assert ours.config._attn_implementation == "eager"
    assert not info["missing_keys"]
    config = model.config
    config.architectures = ["Qwen2Model"]
    base = from_pretrained(tmp_path / "m.gguf", config=config)
    assert type(base) is transformers.Qwen2Model


def test_what_transformers_has_no_module_for(tmp_path: Path) -> None:
    """Blocks of multi-token prediction are left out, as transformers does."""
    architecture, model = hc.make("glm-4.5")
    more: dict[str, Any] = {"blk.2.nextn.eh_proj.weight": np.ones((64, 128), np.float32)}
    more |= {"glm4moe.block_count": 3, "glm4moe.nextn_predict_layers": 1}
    hc.write(tmp_path / "m.gguf", architecture, model, more=more)
    check_same(from_pretrained(tmp_path / "m.gguf"), model)


def test_experts_in_one_tensor(tmp_path: Path) -> None:
    """As llama.cpp's conversion writes them with --fuse-gate-up-exps."""
    architecture, model = hc.make("qwen3moe")
    parts = [f"blk.{block}.ffn_{part}_exps.weight" for block in (0, 1) for part in ("gate", "up")]
    fused = {
        f"blk.{block}.ffn_gate_up_exps.weight": layer.mlp.experts.gate_up_proj.detach().numpy()
        for block, layer in enumerate(model.model.layers)
    }
    hc.write(tmp_path / "m.gguf", architecture, model, more=fused, without=tuple(parts))
    check_same(from_pretrained(tmp_path / "m.gguf"), model)


def test_kv_b_in_one_tensor(tmp_path: Path) -> None:
    """As files of before April 2025 have it, without lengths of MLA."""
    architecture, model = hc.make("deepseek-v2-lite")
    more: dict[str, Any] = {
        f"blk.{block}.attn_kv_b.weight": layer.self_attn.kv_b_proj.weight.detach().numpy()
        for block, layer in enumerate(model.model.layers)
    }
    more |= {"deepseek2.attention.key_length": 48, "deepseek2.attention.value_length": 32}
    parts = [f"blk.{block}.attn_{part}_b.weight" for block in (0, 1) for part in ("k", "v")]
    lengths = ("attention.key_length_mla", "attention.value_length_mla")
    hc.write(tmp_path / "m.gguf", architecture, model, more=more, without=(*parts, *lengths))
    check_same(from_pretrained(tmp_path / "m.gguf"), model)


def test_llama_4_by_its_configuration(tmp_path: Path) -> None:
    config = transformers.Llama4TextConfig(
        **hf_tiny.BASE, **hf_tiny.HEAD, intermediate_size_mlp=128, num_local_experts=4,
        interleave_moe_layer_step=2,
    )  # fmt: skip
    model = transformers.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
    hc.write(tmp_path / "m.gguf", "llama4", model)
    ours = from_pretrained(tmp_path / "m.gguf", config=config)
    check_same(ours, model)
    assert torch.equal(logits(ours), logits(model))
    with pytest.raises(UsageError, match=r"llama4.*give config="):
        from_pretrained(tmp_path / "m.gguf")


def test_progress_and_cancelling(tmp_path: Path) -> None:
    architecture, model = hc.make("llama")
    hc.write(tmp_path / "m.gguf", architecture, model)
    seen: list[tuple[int, int]] = []
    from_pretrained(tmp_path / "m.gguf", progress=lambda *now: seen.append(now))
    assert seen[0] == (0, seen[-1][1])
    assert seen[-1][0] == seen[-1][1]
    with pytest.raises(CancelledError):
        from_pretrained(tmp_path / "m.gguf", progress=lambda done, _: done == 0)


REFUSED: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "a key that nobody reads": (
        "llama", {"llama.logit_scale": 0.5}, (), "llama.logit_scale: expected no such key"
    ),
    "a scaling that is not known": (
        "qwen2", {"qwen2.rope.scaling.type": "ntk"}, (), "rope.scaling.type: expected 'none' or"
    ),
    "other factors than Llama 3's": (
        "llama-3.2", {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32)}, (),
        "rope_freqs.weight",
    ),
    "heads for each block": (
        "llama", {"llama.attention.head_count_kv": [2, 1]}, (), "head_count_kv: expected a number"
    ),
    "rotating a part of each head": (
        "llama", {"llama.rope.dimension_count": 8}, (), "rope.dimension_count: expected 16, found 8"
    ),
    "groups that old files do not name": (
        "deepseek-v3", {}, ("expert_group_count",), "expert_group_count: .* found nothing"
    ),
    "groups of DeepSeek V2": (
        "deepseek-v2-lite", {"deepseek2.expert_group_count": 4}, (), "expected 1, found 4"
    ),
    "another function of experts": (
        "glm-4.5", {"glm4moe.expert_gating_func": 1}, (), "expert_gating_func: expected 2, found 1"
    ),
    "no number of blocks": ("llama", {}, ("block_count",), "block_count: .* found nothing"),
    "too many blocks": ("llama", {"llama.block_count": 50_000}, (), "1 to 512, found 50000"),
    "a number that is none": (
        "llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, (), "a positive number"
    ),
    "what transformers refuses": (
        "llama", {"llama.attention.head_count": 3}, (), "LlamaConfig refuses its numbers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_configurations_that_are_refused(tmp_path: Path, why: str) -> None:
    """Rather than guessed; the caller can give the original model's."""
    case, more, without, said = REFUSED[why]
    architecture, model = hc.make(case)
    hc.write(tmp_path / "m.gguf", architecture, model, more=more, without=without)
    with pytest.raises(UsageError, match=said):
        from_pretrained(tmp_path / "m.gguf")
    check_same(from_pretrained(tmp_path / "m.gguf", config=model.config), model)


@pytest.mark.parametrize("architecture", ["gpt2", "clip"])
def test_architectures_that_are_refused(tmp_path: Path, architecture: str) -> None:
    _, model = hc.make("llama")
    hc.write(tmp_path / "m.gguf", "llama", model, more={"general.architecture": architecture})
    for config in (None, model.config):
        with pytest.raises(UsageError, match=rf"'{architecture}'.*known here for llama, llama4"):
            from_pretrained(tmp_path / "m.gguf", config=config)


def test_tensors_and_parameters_that_do_not_fit(tmp_path: Path) -> None:
    path, (architecture, model) = tmp_path / "m.gguf", hc.make("llama")
    hc.write(path, architecture, model, without=("blk.1.ffn_up.weight",))
    with pytest.raises(StateDictError, match=r"of no tensor: \"model\.layers\.1\.mlp\.up") as no:
        from_pretrained(path)
    assert no.value.missing == ["model.layers.1.mlp.up_proj.weight"]
    more = {"blk.1.attn_q.scale": np.ones(1, np.float32)}
    hc.write(path, architecture, model, more=more)
    with pytest.raises(StateDictError, match=r"of no parameter: \"blk\.1\.attn_q\.scale") as no:
        from_pretrained(path)
    assert no.value.unexpected == ["blk.1.attn_q.scale"]
    hc.write(path, architecture, model)
    for name, value in (("intermediate_size", 128), ("num_key_value_heads", 4), ("head_dim", 8)):
        other = hf_tiny.TINY["llama"][1](**{name: value})
        with pytest.raises(StateDictError, match=r"model\.layers\.0.*"):
            from_pretrained(path, config=other)


def test_configurations_without_a_language_model(tmp_path: Path) -> None:
    architecture, model = hc.make("llama")
    hc.write(tmp_path / "m.gguf", architecture, model)
    with pytest.raises(UsageError, match="no language model for ViTConfig"):
        from_pretrained(tmp_path / "m.gguf", config=transformers.ViTConfig())


def test_safetensors_are_transformers_own(tmp_path: Path) -> None:
    _, model = hc.make("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match=r"no GGUF file.*numaload\.prewarm"):
        from_pretrained(tmp_path)


def test_sizes_that_no_memory_could_hold(tmp_path: Path) -> None:
    architecture, model = hc.make("llama")
    much = {"llama.attention.head_count": 1 << 30, "llama.attention.key_length": 1 << 30}
    much |= {"llama.attention.value_length": 1 << 30, "llama.rope.dimension_count": 1 << 30}
    hc.write(tmp_path / "m.gguf", architecture, model, more=much)
    with pytest.raises((UsageError, StateDictError), match=r"LlamaForCausalLM|LlamaConfig"):
        from_pretrained(tmp_path / "m.gguf")
