"""Floats from classic ktransformers' GGUFLoader over numaload: of one expert, of whole tensors.

Compared with gguf-py's dequantization, and in all types with numaload's own, which other tests
compare with ggml's.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_builder as gb
import numaload
from ktransformers_model import (
    DOWN,
    EXPERTS,
    GATE,
    HIDDEN,
    INNER,
    NORM,
    TENSORS,
    UP,
    K,
    Q,
    blocks_of,
    floats,
    write_model,
)
from numaload import errors
from numaload.backends.ktransformers import GGUFLoader
from numaload.formats.qtypes import BLOCKS, QuantType

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch tensors of weights share read-only memory")

# All 28 that ggml has a conversion for.
OTHERS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
KINDS = [qtype for qtype in BLOCKS if qtype.name not in OTHERS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


@pytest.fixture
def loader(tmp_path: Path) -> GGUFLoader:
    return GGUFLoader(write_model(tmp_path / "model"))


# load_expert_tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [GATE, UP, DOWN])
def test_one_expert(loader: GGUFLoader, name: str, dtype: Any) -> None:
    data = loader.get_mmap_tensor(name)
    elements = INNER * HIDDEN
    for number in range(EXPERTS):
        expert = loader.load_expert_tensor(name, data, number, elements, "cpu", dtype)
        shape = (HIDDEN, INNER) if name == DOWN else (INNER, HIDDEN)
        assert (expert.dtype, tuple(expert.shape)) == (dtype, shape)
        assert torch.equal(expert, floats(name)[number].to(dtype))
        expert.zero_()  # memory of its own


def test_an_experts_blocks_are_those_that_are_given(loader: GGUFLoader) -> None:
    data = np.ascontiguousarray(TENSORS[UP][1][::-1])  # in another order than in the file
    for given in (data, data.ravel()):
        expert = loader.load_expert_tensor(UP, given, 0, INNER * HIDDEN, device="cpu")
        assert torch.equal(expert, floats(UP)[EXPERTS - 1])


@pytest.mark.parametrize(
    ("number", "elements"),
    [(EXPERTS, INNER * HIDDEN), (-1, INNER * HIDDEN), (0, INNER * HIDDEN - 1), (0, 256)],
)
def test_an_expert_that_cannot_be(loader: GGUFLoader, number: int, elements: int) -> None:
    data = loader.get_mmap_tensor(GATE)
    with pytest.raises(errors.UsageError, match=f"expert {number} of {elements} elements, "):
        loader.load_expert_tensor(GATE, data, number, elements, device="cpu")


# load_gguf_tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [GATE, DOWN, NORM])
def test_all_of_a_tensor_in_the_dtype_that_is_asked_for(
    loader: GGUFLoader, name: str, dtype: Any
) -> None:
    found = loader.load_gguf_tensor(name, device="cpu", target_dtype=dtype)
    assert (found.dtype, list(found.shape)) == (dtype, loader.tensor_info[name]["shape"][::-1])
    assert torch.equal(found, floats(name).to(dtype))
    found.zero_()


@pytest.fixture
def bfloat16() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


def test_without_a_dtype_it_is_torchs_default(loader: GGUFLoader, bfloat16: None) -> None:
    data = loader.get_mmap_tensor(UP)
    assert loader.load_gguf_tensor(GATE).dtype == torch.bfloat16
    expert = loader.load_expert_tensor(UP, data, 1, INNER * HIDDEN, device="cpu")
    assert torch.equal(expert, floats(UP)[1].to(torch.bfloat16))


@pytest.mark.parametrize("qtype", KINDS, ids=lambda qtype: qtype.name)
def test_every_type_that_ggml_can_turn_to_float(tmp_path: Path, qtype: QuantType) -> None:
    """Small and large, which are two ways in the original; several cannot be read there."""
    block_size, _ = BLOCKS[qtype]
    shapes = {"small": (2, 3, block_size), "large": (2, 70, 128 * block_size)}
    data = {name: blocks_of(qtype, *shape).tobytes() for name, shape in shapes.items()}
    start = -(-len(data["small"]) // 32) * 32
    rows = [gb.tensor(name, dims[::-1], qtype, start * (name == "large"))
            for name, dims in shapes.items()]  # fmt: skip
    raw = gb.build([], rows, data["small"].ljust(start, b"\0") + data["large"])
    (tmp_path / "m.gguf").write_bytes(raw)
    loader = GGUFLoader(tmp_path)
    for name, shape in shapes.items():
        with numaload.open(tmp_path / "m.gguf") as weights:
            expected = torch.from_numpy(weights[name].dequantize())
        found = loader.load_gguf_tensor(name, target_dtype=torch.float32)
        assert tuple(found.shape) == shape
        assert torch.equal(found, expected)
        elements = shape[1] * shape[2]
        blocks = loader.get_mmap_tensor(name)
        expert = loader.load_expert_tensor(name, blocks, 1, elements, "cpu", torch.float32)
        assert torch.equal(expert, expected[1])


@pytest.mark.parametrize("name", ["I8", "I32", "F64"])
def test_types_that_are_numbers_already(tmp_path: Path, name: str) -> None:
    kind = {"I8": np.int8, "I32": np.int32, "F64": np.float64}[name]
    values = np.arange(6, dtype=kind).reshape(2, 3)
    gb.write_good(tmp_path / "m.gguf", {"t": (QuantType[name], values)})
    loader = GGUFLoader(tmp_path)
    assert loader.load_gguf_tensor("t").tolist() == values.tolist()
    same = loader.load_gguf_tensor("t", target_dtype=str(np.dtype(kind)))
    same.zero_()  # memory of its own
    assert loader.load_gguf_tensor("t", target_dtype=torch.float16).tolist() == values.tolist()


def test_types_without_floats(tmp_path: Path) -> None:
    blocks = np.zeros((1, 292), np.uint8)
    gb.write_good(tmp_path / "m.gguf", {"t": (QuantType.Q8_K, blocks)})
    (tmp_path / "other.gguf").write_bytes(gb.build([], [gb.tensor("odd", (256,), 137)]))
    loader = GGUFLoader(tmp_path)
    with pytest.raises(NotImplementedError, match="'t': Q8_K cannot be turned to float"):
        loader.load_gguf_tensor("t")
    assert loader.tensor_info["odd"]["ggml_type"] == loader.get_ggml_type("odd") == 137
    for use in (loader.load_gguf_tensor, loader.get_mmap_tensor):
        with pytest.raises(errors.UnknownQuantTypeError, match=r"'odd'.* of ik_llama\.cpp"):
            use("odd")


def permuted(rows: Any, heads: int) -> Any:
    """What llama.cpp's converter does to attn_q and attn_k of llama."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def test_rows_of_llamas_attention_are_put_back(loader: GGUFLoader) -> None:
    for name, heads in {Q: 4, K: 2, "blk.0.attn_q.bias": 4}.items():
        found = loader.load_gguf_tensor(name)
        assert not torch.equal(found, floats(name))
        assert torch.equal(permuted(found, heads), floats(name))


def test_other_rows_are_left_alone(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "qwen2")
    writer.add_head_count(4)
    writer.add_tensor(Q, TENSORS[Q][1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert torch.equal(GGUFLoader(tmp_path).load_gguf_tensor(Q), floats(Q))


@pytest.mark.parametrize(
    ("heads", "kind", "words"),
    [
        ({}, KeyError, r"no metadata key 'llama\.attention\.head_count'"),
        ({"llama.attention.head_count": 3}, ValueError, "head_count is 3, .* has 16 rows"),
        ({"llama.attention.head_count": 0}, ValueError, "head_count is 0, .* has 16 rows"),
    ],
)
def test_heads_that_cannot_be(
    tmp_path: Path, heads: dict[str, int], kind: type[Exception], words: str
) -> None:
    gb.write_good(tmp_path / "m.gguf", {Q: TENSORS[Q]}, heads)
    with pytest.raises(kind, match=words) as caught:
        GGUFLoader(tmp_path).load_gguf_tensor(Q)
    assert isinstance(caught.value, errors.NumaloadError)


def test_keys_without_a_count_have_that_of_queries(tmp_path: Path) -> None:
    gb.write_good(tmp_path / "m.gguf", {K: TENSORS[K]}, {"llama.attention.head_count": 4})
    found = GGUFLoader(tmp_path).load_gguf_tensor(K)
    assert torch.equal(permuted(found, 4), floats(K))


def test_device(loader: GGUFLoader) -> None:
    """Every machine has the meta device: what is moved there keeps shape and dtype."""
    found = loader.load_gguf_tensor(Q, device="meta", target_dtype=torch.float16)
    assert (found.device.type, found.dtype, tuple(found.shape)) == ("meta", torch.float16, (16, 8))
    data = loader.get_mmap_tensor(GATE)
    expert = loader.load_expert_tensor(GATE, data, 0, INNER * HIDDEN, device="meta")
    assert (expert.device.type, tuple(expert.shape)) == ("meta", (INNER, HIDDEN))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_device_is_a_gpu(loader: GGUFLoader) -> None:
    data = loader.get_mmap_tensor(GATE)
    expert = loader.load_expert_tensor(GATE, data, 1, INNER * HIDDEN)  # as the original: to cuda
    assert expert.is_cuda
    assert torch.equal(expert.cpu(), floats(GATE)[1])
    assert torch.equal(loader.load_gguf_tensor(DOWN, "cuda").cpu(), floats(DOWN))
