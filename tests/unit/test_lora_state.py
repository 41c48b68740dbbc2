"""LoRA adapters: their tensors and configuration as PEFT wants them, by names that differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import lora_files as lf
import safetensors_builder as sb
from numaload import errors
from numaload.backends.lora import Adapter, open_adapter
from numaload.dtypes import NAMES
from numaload.errors import UnsupportedTypeError, UsageError


def loaded(adapter: Adapter, *args: Any, **options: Any) -> dict[str, NDArray[Any]]:
    pytest.importorskip("torch")
    return {n: t.float().numpy() for n, t in adapter.state_dict(*args, **options).items()}


def assert_equal(found: dict[str, NDArray[Any]], expected: lf.Arrays) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("kind", ["peft_folder", "bare", "gguf_file"])
def test_tensors_have_the_names_that_peft_has(tmp_path: Path, kind: str) -> None:
    expected = lf.halves([f"base_model.model.{module}" for module in lf.MODULES], lf.PEFT_ENDS)
    with open_adapter(getattr(lf, kind)(tmp_path)) as adapter:
        assert_equal(loaded(adapter), expected)
        assert set(adapter.lora_config()["target_modules"]) in (
            {"q_proj", "v_proj"},
            set(lf.MODULES),
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    wanted = getattr(torch, dtype)
    with open_adapter(lf.peft_folder(tmp_path)) as adapter:
        by_name, found = adapter.state_dict(dtype), adapter.state_dict(wanted)
        for name, tensor in adapter.state_dict().items():
            assert tensor.dtype == torch.float32
            assert found[name].dtype == by_name[name].dtype == wanted
            assert torch.equal(found[name], tensor.to(wanted))
            assert torch.equal(by_name[name], found[name])


def test_tensors_outlive_the_adapter_and_can_be_written_to(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with open_adapter(lf.peft_folder(tmp_path)) as adapter:
        state = adapter.state_dict()
    for tensor in state.values():
        tensor.add_(1)
    with pytest.raises(errors.ClosedError):
        adapter.state_dict()


@pytest.mark.filterwarnings("ignore:torch tensors of weights share read-only memory")
@pytest.mark.parametrize("kind", ["peft_folder", "gguf_file"])
def test_without_copying_they_are_where_the_file_is_mapped(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("torch")
    with open_adapter(getattr(lf, kind)(tmp_path)) as adapter:
        mapped, copied = adapter.state_dict(copy=False), adapter.state_dict()
        halves = [half for pair in adapter.pairs.values() for half in (pair.a, pair.b)]
        for half, (name, tensor) in zip(halves, mapped.items(), strict=True):
            assert tensor.data_ptr() == half.address != copied[name].data_ptr()
            assert tensor.equal(copied[name])
        converted = adapter.state_dict("float16", copy=False)
        assert all(tensor.equal(copied[name].half()) for name, tensor in converted.items())


def test_what_peft_saves_besides_pairs_is_handed_on(tmp_path: Path) -> None:
    names = [f"base_model.model.{module}" for module in lf.MODULES]
    norm = {"base_model.model.lm_head.weight": np.ones((3, 5), np.float32)}
    folder = lf.write_peft(tmp_path / "a", lf.halves(names, lf.PEFT_ENDS) | norm)
    with open_adapter(folder) as adapter:
        assert adapter.others == list(norm)
        assert_equal(loaded(adapter), lf.halves(names, lf.PEFT_ENDS) | norm)


def test_what_others_have_besides_pairs_is_said(tmp_path: Path, nothing_said: None) -> None:
    arrays = lf.halves(lf.TENSORS, lf.GGUF_ENDS) | {
        "blk.0.attn_norm.weight": np.ones(4, np.float32)
    }
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays)) as adapter:
        assert adapter.others == ["blk.0.attn_norm.weight"]
        with pytest.warns(errors.NumaloadWarning, match="1 tensors belong to no LoRA pair"):
            assert len(loaded(adapter)) == 2 * len(lf.TENSORS)


def test_quantized_halves(tmp_path: Path) -> None:
    """As convert_lora_to_gguf.py --outtype q8_0: rows of A are whole blocks, those of B are not."""
    torch = pytest.importorskip("torch")
    arrays = lf.halves(["blk.0.attn_v"], lf.GGUF_ENDS, shape=(64, 8))
    a, b = arrays.values()
    blocks = gguf.quants.quantize(a, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(str(tmp_path / "q.gguf"), "qwen2")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_tensor("blk.0.attn_v.weight.lora_a", blocks,
                      raw_dtype=gguf.GGMLQuantizationType.Q8_0)  # fmt: skip
    writer.add_tensor("blk.0.attn_v.weight.lora_b", b.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_adapter(tmp_path / "q.gguf") as adapter:
        first, second = adapter.state_dict().values()
    assert (first.dtype, second.dtype) == (torch.float32, torch.float16)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(first.numpy(), expected)
    np.testing.assert_array_equal(second.numpy(), b.astype(np.float16))


HEADS = (6, 2)


def permuted(b: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Written as LlamaModel.permute of llama.cpp describes it: halves of a head interleaved."""
    rows = b.shape[0] // heads
    order = [h * rows + half * (rows // 2) + i
             for h in range(heads) for i in range(rows // 2) for half in (0, 1)]  # fmt: skip
    return b[order]


def llama(folder: Path) -> tuple[Path, dict[str, NDArray[np.float32]]]:
    """A GGUF adapter of a llama, and what it shall become."""
    modules = [f"model.layers.1.self_attn.{which}_proj" for which in "qkv"]
    expected = lf.halves([f"base_model.model.{module}" for module in modules], lf.PEFT_ENDS)
    tensors = [f"blk.1.attn_{which}" for which in "qkv"]
    arrays = dict(
        zip((t + e for t in tensors for e in lf.GGUF_ENDS), expected.values(), strict=True)
    )
    for tensor, heads in zip(tensors, HEADS, strict=False):
        arrays[tensor + lf.GGUF_ENDS[1]] = permuted(arrays[tensor + lf.GGUF_ENDS[1]], heads)
    return lf.write_gguf(folder / "x.gguf", arrays, "llama"), expected


class Named:
    """What is asked of a torch module: names, and the configuration of transformers."""

    def __init__(self, names: list[str], heads: tuple[int, int] | None = None) -> None:
        self.names = names
        if heads:
            self.config = type("Config", (), {"num_attention_heads": heads[0],
                                              "num_key_value_heads": heads[1]})  # fmt: skip

    def named_modules(self) -> list[tuple[str, None]]:
        return [(name, None) for name in self.names]


def test_rows_of_heads_are_put_back(tmp_path: Path) -> None:
    path, expected = llama(tmp_path)
    names = [name.removeprefix("base_model.model.").partition(".lora")[0] for name in expected]
    with open_adapter(path) as adapter:
        assert_equal(loaded(adapter, heads=HEADS), expected)
        assert_equal(loaded(adapter, model=Named(names, HEADS)), expected)
        with pytest.raises(UsageError, match="give model=, or heads="):
            adapter.state_dict()
        with pytest.raises(UsageError, match="24 rows do not divide into 5 attention heads"):
            adapter.state_dict(heads=(5, 5))


def test_embeddings(tmp_path: Path) -> None:
    """llama.cpp keeps A of the token embedding transposed."""
    a, b = np.ones((4, 9), np.float32), np.arange(32, dtype=np.float32).reshape(8, 4)
    a[2, 3] = 7
    ends = (".lora_embedding_A", ".lora_embedding_B")
    expected = {
        "base_model.model.model.embed_tokens" + end: x for end, x in zip(ends, (a, b), strict=True)
    }
    arrays = {"token_embd.weight.lora_a": np.ascontiguousarray(a.T), "token_embd.weight.lora_b": b}
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays)) as adapter:
        assert adapter.rank == 4
        assert_equal(loaded(adapter), expected)
    with open_adapter(lf.write_peft(tmp_path / "a", expected)) as adapter:
        assert_equal(loaded(adapter), expected)


def test_names_of_kohya_need_the_model(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    wrapped = ["base_model.model.down_blocks.0.attn.to_q", "text_model.layers.0.q_proj.base_layer"]
    with open_adapter(lf.kohya(tmp_path)) as adapter:
        with pytest.raises(UsageError, match="_ for every dot"):
            adapter.state_dict()
        state = adapter.state_dict(model=Named(wrapped))
        config = adapter.lora_config(Named(wrapped))
    modules = ["down_blocks.0.attn.to_q", "text_model.layers.0.q_proj"]
    assert config["target_modules"] == modules
    assert list(state) == [f"base_model.model.{m}{end}" for m in modules for end in lf.PEFT_ENDS]


def test_names_of_diffusers_may_have_the_part_before_them(tmp_path: Path) -> None:
    with open_adapter(lf.diffusers(tmp_path)) as adapter:
        assert adapter.lora_config()["target_modules"] == lf.DIFFUSERS
        inside = [name.partition(".")[2] for name in lf.DIFFUSERS]
        assert adapter.lora_config(Named(inside))["target_modules"] == inside


@pytest.mark.parametrize("by", ["dict", "function"])
def test_a_name_map_is_all_that_counts(tmp_path: Path, by: str) -> None:
    table = {tensor: f"h.{i}" for i, tensor in enumerate(lf.TENSORS)}
    with open_adapter(lf.gguf_file(tmp_path)) as adapter:
        config = adapter.lora_config(name_map=table if by == "dict" else table.get)
        assert config["target_modules"] == list(table.values())
        with pytest.raises(UsageError, match=r"no module for 'blk\.0\.attn_q'"):
            adapter.lora_config(name_map={})


def test_a_model_that_does_not_fit(tmp_path: Path) -> None:
    words = r"no module for 'blk\.0\.attn_q' .*: model\.layers\.0"
    with open_adapter(lf.gguf_file(tmp_path)) as adapter, pytest.raises(UsageError, match=words):
        adapter.lora_config(Named(["other"]))


def test_architectures_that_need_the_model(tmp_path: Path) -> None:
    path = lf.write_gguf(tmp_path / "x.gguf", lf.halves(["blk.0.attn_q"], lf.GGUF_ENDS), "olmo2")
    with open_adapter(path) as adapter:
        with pytest.raises(UsageError, match=r"'blk\.0\.attn_q' of olmo2: .* give model="):
            adapter.lora_config()
        known = Named(["model.layers.0.self_attn.q_proj"])
        assert adapter.lora_config(known)["target_modules"] == known.names
    path = lf.write_gguf(tmp_path / "y.gguf", lf.halves(["blk.0.attn_q"], lf.GGUF_ENDS), "nobody's")
    with open_adapter(path) as adapter, pytest.raises(UsageError, match="unknown to gguf-py"):
        adapter.lora_config()


def test_experts_of_gguf_stay_pairs(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    name = "blk.0.ffn_up_exps.weight"
    arrays = {f"{name}.lora_a": np.ones((3, 4, 8), np.float32),
              f"{name}.lora_b": np.ones((3, 6, 4), np.float32)}  # fmt: skip
    with open_adapter(lf.write_gguf(tmp_path / "x.gguf", arrays, "qwen3moe")) as adapter:
        assert adapter.pairs["blk.0.ffn_up_exps"].rank == 4
        with pytest.raises(UnsupportedTypeError, match="experts of GGUF adapters"):
            adapter.state_dict(name_map=lambda module: module)


def test_progress_and_cancelling(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    seen: list[tuple[int, int]] = []
    with open_adapter(lf.peft_folder(tmp_path)) as adapter:
        adapter.state_dict(progress=lambda *done: seen.append(done))
        assert seen[-1][0] == seen[-1][1] == 4 * (lf.WIDTH + lf.ROWS) * lf.RANK * len(lf.MODULES)
        with pytest.raises(errors.CancelledError):
            adapter.state_dict(progress=lambda *_: False)


def test_two_tensors_that_would_have_one_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ones = np.ones((2, 2), np.float32)
    others = {"norm.weight": ones, "base_model.model.norm.weight": ones}
    arrays = lf.halves(["base_model.model.m"], lf.PEFT_ENDS) | others
    words = r"both become 'base_model\.model\.norm\.weight'"
    folder = lf.write_peft(tmp_path / "a", arrays)
    with open_adapter(folder) as adapter, pytest.raises(errors.AdapterError, match=words):
        adapter.state_dict()
    arrays = lf.halves(["a.m", "b.m"], lf.KOHYA_ENDS)
    path = lf.write_safetensors(tmp_path / "k.safetensors", arrays)
    words = "two modules of the adapter would both become 'c'"
    with open_adapter(path) as adapter, pytest.raises(UsageError, match=words):
        adapter.state_dict(name_map=lambda _: "c")


def test_more_than_the_memory_is_refused_with_numbers(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    path, rows = tmp_path / "x.safetensors", 1 << 36
    table = sb.table({"m.lora_A.weight": ("F32", (4, 8)), "m.lora_B.weight": ("F32", (rows, 4))})
    raw = sb.build(table, b"")
    path.write_bytes(raw)
    os.truncate(path, len(raw) + 4 * 4 * (8 + rows))
    with open_adapter(path) as adapter, pytest.raises(errors.NodeMemoryError) as caught:
        adapter.state_dict()
    assert caught.value.needed > 16 << 36
    assert "nothing was loaded" in str(caught.value)


def test_tensors_that_are_not_aligned_or_lie_apart(tmp_path: Path) -> None:
    """In one file floats at any byte, types between them, and gaps of other tensors."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(3)
    rows: dict[str, sb.Row] = {"pad": ("U8", (3,))}
    for number, dtype in enumerate(["F32", "F16", "BF16", "F64"]):
        rows[f"m{number}.lora_A.weight"] = (dtype, (2, 5))
        rows[f"gap{number}"] = ("U8", (1 + 9000 * (number % 2),))
        rows[f"m{number}.lora_B.weight"] = (dtype, (3, 2))
    data = rng.integers(0, 60, sum(sb.size_of(*row) for row in rows.values()), np.uint8).tobytes()
    raw = sb.build(sb.table(rows), data)
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with open_adapter(path) as adapter:
        for wanted in (None, torch.float32, torch.bfloat16):
            found = adapter.state_dict(wanted)
            for name, tensor in found.items():
                info = adapter.weights[name.removeprefix("base_model.model.")]
                numbers = getattr(torch, NAMES[info.type_name])
                part = bytearray(raw[info.offset : info.offset + info.nbytes])
                expected = torch.frombuffer(part, dtype=numbers).reshape(info.shape)
                assert torch.equal(tensor, expected if wanted is None else expected.to(wanted)), (
                    name
                )
