"""GGUF LoRA adapters: put together to pairs, named and laid out as PEFT has them; or refused."""

from __future__ import annotations

import os
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import gguf_builder as gb
import lora_files as lf
from numaload import errors
from numaload.backends.lora import Adapter, open_adapter
from numaload.errors import AdapterError, UnsupportedTypeError, UsageError

HEADS = (6, 2)
Q8 = gguf.GGMLQuantizationType.Q8_0


class Named:
    """What is asked of a torch module: names, and the configuration of transformers."""

    def __init__(self, names: list[str], heads: tuple[int, int] | None = None) -> None:
        self.names = names
        if heads:
            self.config = type("Config", (), {"num_attention_heads": heads[0],
                                              "num_key_value_heads": heads[1]})  # fmt: skip

    def named_modules(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self.names]


MODEL = Named(lf.MODULES, HEADS)


def loaded(adapter: Adapter, *args: Any, **options: Any) -> dict[str, NDArray[Any]]:
    pytest.importorskip("torch")
    return {n: t.float().numpy() for n, t in adapter.state_dict(*args, **options).items()}


def assert_equal(found: dict[str, NDArray[Any]], expected: lf.Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_what_an_adapter_says(tmp_path: Path) -> None:
    path = lf.write_gguf(tmp_path / "x.gguf", general__base_model__0__name="Base")
    with open_adapter(path) as adapter:
        assert (adapter.architecture, adapter.base_model) == ("qwen2", "Base")
        assert (adapter.rank, adapter.alpha) == (lf.RANK, lf.ALPHA)
        assert list(adapter.pairs) == lf.TENSORS
        for pair in adapter.pairs.values():
            assert (pair.a.shape, pair.b.shape) == ((lf.RANK, lf.WIDTH), (lf.ROWS, lf.RANK))
            assert (pair.rank, pair.alpha, pair.scaling) == (lf.RANK, lf.ALPHA, 1.5)
        assert "4 modules, rank 4, alpha 6.0" in repr(adapter)


def test_tensors_and_configuration_are_named_as_the_model_is(tmp_path: Path) -> None:
    expected = lf.halves([lf.PREFIX + module for module in lf.MODULES], lf.PEFT_ENDS)
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf")) as adapter:
        assert_equal(loaded(adapter, model=MODEL), expected)
        config = adapter.lora_config(MODEL)
        wrapped = Named([f"{lf.PREFIX}{name}.base_layer" for name in lf.MODULES])
        assert adapter.lora_config(wrapped) == config
    assert config == {
        "r": lf.RANK, "lora_alpha": lf.ALPHA, "target_modules": lf.MODULES, "rank_pattern": {},
        "alpha_pattern": {}, "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip


@pytest.mark.parametrize("alpha", [0.0, None, 6.0])
def test_scales_are_those_of_llama_cpp(tmp_path: Path, alpha: float | None) -> None:
    """Alpha by each pair's own rank; without alpha 1."""
    arrays = lf.halves(lf.TENSORS[:3], lf.GGUF_ENDS) | lf.halves(lf.TENSORS[3:], lf.GGUF_ENDS, 8)
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays, alpha=alpha)) as adapter:
        config, pairs = adapter.lora_config(MODEL), adapter.pairs.values()
    for module, pair in zip(lf.MODULES, pairs, strict=True):
        key = "^" + module.replace(".", r"\.")
        rank = config["rank_pattern"].get(key, config["r"])
        assert rank == pair.rank
        scale = config["alpha_pattern"].get(key, config["lora_alpha"]) / rank
        assert scale == pair.scaling == (alpha / rank if alpha else 1.0)


def test_what_activates_an_alora_is_handed_on(tmp_path: Path) -> None:
    path = lf.write_gguf(tmp_path / "x.gguf", adapter__alora__invocation_tokens=[7, 8, 9])
    with open_adapter(path) as adapter:
        config = adapter.lora_config(MODEL)
    assert config["alora_invocation_tokens"] == [7, 8, 9]
    assert config["task_type"] == "CAUSAL_LM"
    for said in ([1] * 5000, "text"):
        path = lf.write_gguf(tmp_path / "y.gguf", adapter__alora__invocation_tokens=said)
        with open_adapter(path) as adapter, pytest.raises(AdapterError, match="expected 1 to 4096"):
            adapter.lora_config(MODEL)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    wanted = getattr(torch, dtype)
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf")) as adapter:
        by_name, found = (adapter.state_dict(one, model=MODEL) for one in (dtype, wanted))
        for name, tensor in adapter.state_dict(model=MODEL).items():
            assert tensor.dtype == torch.float32
            assert found[name].dtype == by_name[name].dtype == wanted
            assert torch.equal(found[name], tensor.to(wanted))
            assert torch.equal(by_name[name], found[name])


def test_types_in_the_file(tmp_path: Path) -> None:
    """As convert_lora_to_gguf.py --outtype q8_0: rows of A are whole blocks, those of B are not."""
    torch = pytest.importorskip("torch")
    a, b = lf.halves(["blk.0.attn_v"], lf.GGUF_ENDS, shape=(64, 8)).values()
    names, blocks = ["blk.0.attn_v" + end for end in lf.GGUF_ENDS], gguf.quants.quantize(a, Q8)
    arrays = dict(zip(names, (blocks, b.astype(np.float16)), strict=True))
    path = lf.write_gguf(tmp_path / "q.gguf", arrays, types={names[0]: Q8})
    with open_adapter(path) as adapter:
        first, second = adapter.state_dict(model=MODEL).values()
    assert (first.dtype, second.dtype) == (torch.float32, torch.float16)
    np.testing.assert_array_equal(first.numpy(), gguf.quants.dequantize(blocks, Q8))
    np.testing.assert_array_equal(second.numpy(), arrays[names[1]])
    numbers = {name: array.astype(np.int32) for name, array in zip(names, (a, b), strict=True)}
    with (
        open_adapter(lf.write_gguf(tmp_path / "i.gguf", numbers)) as adapter,
        pytest.raises(UnsupportedTypeError, match="I32 is no float"),
    ):
        adapter.state_dict(model=MODEL)


def by_hand(path: Path, a: tuple[int, ...], b: tuple[int, ...], data: bytes = b"") -> Path:
    """An adapter of blk.0.attn_q, its halves float32 of these dims; without data a sparse file."""
    said = {"general.architecture": "qwen2", "general.type": "adapter", "adapter.type": "lora"}
    entries = [gb.entry(key, gb.STRING, gb.string(value)) for key, value in said.items()]
    rows = [gb.tensor("blk.0.attn_q.weight.lora_a", a),
            gb.tensor("blk.0.attn_q.weight.lora_b", b, offset=4 * prod(a))]  # fmt: skip
    path.write_bytes(gb.build(entries, rows, data))
    if not data:
        os.truncate(path, path.stat().st_size + 4 * (prod(a) + prod(b)))
    return path


def test_a_big_endian_adapter(tmp_path: Path) -> None:
    expected = lf.halves([lf.PREFIX + lf.MODULES[0]], lf.PEFT_ENDS)
    a, b = expected.values()
    data = a.astype(">f4").tobytes() + b.astype(">f4").tobytes()
    with gb.big_endian():
        path = by_hand(tmp_path / "m.gguf", a.shape[::-1], b.shape[::-1], data)
    with open_adapter(path) as adapter:
        assert_equal(loaded(adapter, model=MODEL), expected)


def test_tensors_outlive_the_adapter_and_can_be_written_to(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf")) as adapter:
        state = adapter.state_dict(model=MODEL)
    for tensor in state.values():
        tensor.add_(1)
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    with pytest.raises(errors.ClosedError):
        adapter.state_dict(model=MODEL)


def permuted(b: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Written as LlamaModel.permute of llama.cpp describes it: halves of a head interleaved."""
    rows = b.shape[0] // heads
    order = [h * rows + half * (rows // 2) + i
             for h in range(heads) for i in range(rows // 2) for half in (0, 1)]  # fmt: skip
    return b[order]


def write_permuted(path: Path, architecture: str) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """A GGUF adapter of an attention whose rows llama.cpp permutes, and what it shall become."""
    modules = [f"{lf.PREFIX}model.layers.1.self_attn.{which}_proj" for which in "qkv"]
    expected = lf.halves(modules, lf.PEFT_ENDS)
    tensors = [f"blk.1.attn_{which}" for which in "qkv"]
    names = (t + e for t in tensors for e in lf.GGUF_ENDS)
    arrays = dict(zip(names, expected.values(), strict=True))
    for tensor, heads in zip(tensors, HEADS, strict=False):
        arrays[tensor + lf.GGUF_ENDS[1]] = permuted(arrays[tensor + lf.GGUF_ENDS[1]], heads)
    return lf.write_gguf(path, arrays, architecture), expected


QKV = {f"blk.1.attn_{which}": f"model.layers.1.self_attn.{which}_proj" for which in "qkv"}


def test_rows_of_heads_are_put_back(tmp_path: Path) -> None:
    path, expected = write_permuted(tmp_path / "x.gguf", "llama")
    with open_adapter(path) as adapter:
        assert_equal(loaded(adapter, model=Named(list(QKV.values()), HEADS)), expected)
        assert_equal(loaded(adapter, heads=HEADS, name_map=QKV), expected)
        with pytest.raises(UsageError, match=r"llama\.cpp permutes .* give model=, or heads="):
            adapter.state_dict(name_map=QKV)
        with pytest.raises(UsageError, match="24 rows do not divide into 5 attention heads"):
            adapter.state_dict(heads=(5, 5), name_map=QKV)


def test_whether_rows_are_permuted_must_be_said_where_it_is_not_known(tmp_path: Path) -> None:
    path, expected = write_permuted(tmp_path / "x.gguf", "granite")
    with open_adapter(path) as adapter:
        with pytest.raises(UsageError, match=r"may permute .* \(0, 0\) where none are"):
            adapter.state_dict(model=Named([], HEADS), name_map=QKV)
        assert_equal(loaded(adapter, heads=HEADS, name_map=QKV), expected)
        as_it_is = loaded(adapter, heads=(0, 0), name_map=QKV)
        assert not np.array_equal(as_it_is[list(expected)[1]], list(expected.values())[1])


def test_embeddings(tmp_path: Path) -> None:
    """llama.cpp keeps A of the token embedding transposed."""
    a, b = np.ones((4, 9), np.float32), np.arange(32, dtype=np.float32).reshape(8, 4)
    a[2, 3] = 7
    ends, name = (".lora_embedding_A", ".lora_embedding_B"), "model.embed_tokens"
    expected = {lf.PREFIX + name + end: x for end, x in zip(ends, (a, b), strict=True)}
    arrays = {"token_embd.weight.lora_a": np.ascontiguousarray(a.T), "token_embd.weight.lora_b": b}
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays)) as adapter:
        assert adapter.rank == 4
        assert_equal(loaded(adapter, model=Named([name])), expected)


@pytest.mark.parametrize("by", ["dict", "function"])
def test_a_name_map_is_all_that_counts(tmp_path: Path, by: str) -> None:
    table = {tensor: f"h.{i}" for i, tensor in enumerate(lf.TENSORS)}
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", architecture="nobody's")) as adapter:
        config = adapter.lora_config(name_map=table if by == "dict" else table.get)
        assert config["target_modules"] == list(table.values())
        with pytest.raises(UsageError, match=r"no module for 'blk\.0\.attn_q'"):
            adapter.lora_config(name_map={})
        with pytest.raises(UsageError, match="two modules of the adapter would both become 'c'"):
            adapter.state_dict(name_map=lambda _: "c")


UNTRANSLATED: dict[str, tuple[str, str, Any, str]] = {
    "no-model": ("qwen2", "blk.0.attn_q", None, "give model=, or name_map="),
    "other-model": ("qwen2", "blk.0.attn_q", Named(["other"]), r"q_proj, .* and has 0"),
    "two-fit": ("qwen2", "output", Named(["lm_head", "embed_out"]), "should have one, and has 2"),
    "architecture": ("nobody's", "blk.0.attn_q", MODEL, "'blk.0.attn_q' of nobody's: .* not known"),
    "tensor": ("llama", "blk.0.ssm_in", MODEL, "'blk.0.ssm_in' of llama: .* not known"),
    "no-layer": ("llama", f"blk.{'9' * 300}.attn_q", MODEL, "not known here"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNTRANSLATED)
def test_modules_that_cannot_be_named(tmp_path: Path, kind: str) -> None:
    architecture, module, model, words = UNTRANSLATED[kind]
    path = lf.write_gguf(tmp_path / "x.gguf", lf.halves([module], lf.GGUF_ENDS), architecture)
    with open_adapter(path) as adapter:
        with pytest.raises(UsageError, match=words):
            adapter.lora_config(model)
        with pytest.raises(UsageError, match=words):
            adapter.state_dict(model=model)


def test_matrices_of_integers_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = lf.write_gguf(tmp_path / "x.gguf", lf.halves(["blk.0.attn_q"], lf.GGUF_ENDS), "qwen2")
    with open_adapter(path) as adapter, pytest.raises(UsageError, match="floating-point"):
        adapter.state_dict("int8", model=MODEL)


def test_stacked_experts_are_refused_and_stay_pairs(tmp_path: Path) -> None:
    name = "blk.0.ffn_up_exps.weight"
    arrays = {f"{name}.lora_a": np.ones((3, 4, 8), np.float32),
              f"{name}.lora_b": np.ones((3, 6, 4), np.float32)}  # fmt: skip
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays, "qwen3moe")) as adapter:
        assert adapter.pairs["blk.0.ffn_up_exps"].rank == 4
        with pytest.raises(UnsupportedTypeError, match="no names for adapters of stacked experts"):
            adapter.lora_config(name_map=lambda module: module)


def changed(**arrays: NDArray[np.float32] | None) -> dict[str, NDArray[np.float32]]:
    """The halves of one module, some replaced or left out."""
    found: dict[str, Any] = lf.halves(["m"], lf.GGUF_ENDS)
    found |= {f"m.weight.lora_{end}": array for end, array in arrays.items()}
    return {name: array for name, array in found.items() if array is not None}


ZEROS = np.zeros((3, 3), np.float32)
UNFIT: dict[str, tuple[lf.Arrays, str]] = {
    "no-pairs": ({"blk.0.attn_norm.weight": ZEROS[0]}, "attn_norm.weight' is no half of a LoRA"),
    "more": (changed() | {"n.weight": ZEROS}, "'n.weight' is no half of a LoRA pair"),
    "no-b": (changed(b=None), "'m.weight.lora_a' has no other half"),
    "no-a": (changed(a=None), "'m.weight.lora_b' has no other half"),
    "no-rank": (changed(a=ZEROS), r"shape \(3, 3\) and .* of \(24, 4\) share no rank"),
    "one-dim": (changed(a=np.zeros(4, np.float32)), "share no rank"),
    "experts": (changed(a=np.zeros((2, 4, 3), np.float32)), "share no rank"),
    "twice": (changed() | {"m.lora_a": ZEROS}, "'m' has two tensors for a"),
}


@pytest.mark.parametrize("kind", UNFIT)
def test_tensors_that_are_no_adapter(tmp_path: Path, kind: str) -> None:
    arrays, words = UNFIT[kind]
    path = lf.write_gguf(tmp_path / "x.gguf", arrays)
    with pytest.raises(AdapterError, match=words) as caught:
        open_adapter(path)
    assert caught.value.path == str(path)


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "model": ({"general.type": "model"}, "general.type: expected 'adapter', found 'model'"),
    "other": ({"adapter.type": "aloha"}, "adapter.type: expected 'lora', found 'aloha'"),
    "alpha-nan": ({"alpha": float("nan")}, "adapter.lora.alpha is nan"),
    "alpha-inf": ({"alpha": float("inf")}, "adapter.lora.alpha is inf"),
}


@pytest.mark.parametrize("kind", SAID)
def test_gguf_files_that_are_no_adapter(tmp_path: Path, kind: str) -> None:
    said, words = SAID[kind]
    path = lf.write_gguf(tmp_path / "x.gguf", **said)
    with pytest.raises(AdapterError, match=words):
        open_adapter(path)


def test_a_gguf_model_is_no_adapter(model: str) -> None:
    with pytest.raises(AdapterError, match=r"general\.type: expected 'adapter', found"):
        open_adapter(model)


@pytest.mark.parametrize("given", [".", "adapter_model.safetensors"])
def test_safetensors_adapters_are_loaded_by_others(tmp_path: Path, given: str) -> None:
    folder = lf.write_peft(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"PeftModel\.from_pretrained.*load_lora_weights"):
        open_adapter(folder / given)


def test_progress_and_cancelling(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    seen: list[tuple[int, int]] = []
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf")) as adapter:
        adapter.state_dict(model=MODEL, progress=lambda *done: seen.append(done))
        assert seen[-1][0] == seen[-1][1] == adapter.weights.nbytes
        with pytest.raises(errors.CancelledError):
            adapter.state_dict(model=MODEL, progress=lambda *_: False)


def test_more_than_the_memory_is_refused_with_numbers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path = by_hand(tmp_path / "x.gguf", (1 << 36, 4), (4, 8))
    with open_adapter(path) as adapter, pytest.raises(errors.NodeMemoryError) as caught:
        adapter.state_dict(model=MODEL)
    assert caught.value.needed > 16 << 36
    assert "nothing was copied" in str(caught.value)
