"""Classic ktransformers' loaders over numaload: its contract, member by member.

ktransformers itself cannot be installed here (it builds CUDA extensions); what its loaders do was
read in its source, and run, once. Floats are compared with gguf-py's dequantization.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_builder as gb
import numaload
import seeds
from numaload import errors
from numaload.backends import ktransformers
from numaload.backends.ktransformers import GGUFLoader, SafeTensorLoader, translate_name_to_gguf
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.samples import random_blocks

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:torch tensors of weights share read-only memory")

BYTES = np.dtype(np.uint8)
EXPERTS, INNER, HIDDEN = 3, 256, 512
# All 28 that ggml has a conversion for.
OTHERS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
KINDS = [qtype for qtype in BLOCKS if qtype.name not in OTHERS]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
GATE, UP, DOWN = (f"blk.0.ffn_{name}_exps.weight" for name in ("gate", "up", "down"))
Q, K = "blk.0.attn_q.weight", "blk.0.attn_k.weight"
NORM = "blk.0.attn_norm.weight"


def blocks_of(qtype: QuantType, *shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Of finite floats, so that they can be compared."""
    block_size, type_size = BLOCKS[qtype]
    rows, columns = int(np.prod(shape[:-1])), shape[-1]
    raw: np.ndarray[Any, np.dtype[np.uint8]]
    raw = random_blocks(qtype, rows, columns, np.random.default_rng(seed))
    return raw.reshape(*shape[:-1], columns // block_size * type_size)


TENSORS: dict[str, tuple[QuantType, Any]] = {
    GATE: (QuantType.Q4_K, blocks_of(QuantType.Q4_K, EXPERTS, INNER, HIDDEN)),
    UP: (QuantType.Q8_0, blocks_of(QuantType.Q8_0, EXPERTS, INNER, HIDDEN)),
    DOWN: (QuantType.Q6_K, blocks_of(QuantType.Q6_K, EXPERTS, HIDDEN, INNER)),
    Q: (QuantType.F32, np.arange(16 * 8, dtype=np.float32).reshape(16, 8)),
    K: (QuantType.F16, np.arange(8 * 8, dtype=np.float16).reshape(8, 8).view(np.uint8)),
    NORM: (QuantType.BF16, np.arange(8, dtype=np.uint16).view(np.uint8)),
    "blk.0.attn_q.bias": (QuantType.F32, np.arange(16, dtype=np.float32)),
}
HEADS = {"llama.attention.head_count": 4, "llama.attention.head_count_kv": 2}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model in two files, and one in a folder below that comes later."""
    model = tmp_path / "model"
    (model / "more").mkdir(parents=True)
    gb.write_good(model / "m.gguf", TENSORS, HEADS, per_file=4)
    late = {"late.weight": (QuantType.F32, np.ones(4, np.float32))}
    gb.write_good(model / "more/z.gguf", late, {"llama.block_count": 7})
    return model


@pytest.fixture
def loader(folder: Path) -> GGUFLoader:
    return GGUFLoader(str(folder))


def floats(name: str) -> Any:
    qtype, blocks = TENSORS[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(qtype)))


# GGUFLoader(gguf_path), gguf_path, the walk


def test_a_file_stands_for_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (folder, folder / "m-00001-of-00002.gguf", str(folder / "m-00002-of-00002.gguf")):
        loader = GGUFLoader(path)
        assert loader.gguf_path == str(folder)
        assert list(loader.tensor_file_map) == [*TENSORS, "late.weight"]
    monkeypatch.chdir(folder)
    assert GGUFLoader("m-00001-of-00002.gguf").gguf_path == "."


def test_folders_below_are_walked_and_the_last_one_counts(folder: Path) -> None:
    again = {"late.weight": (QuantType.F32, np.zeros(4, np.float32))}
    gb.write_good(folder / "more/zz.gguf", again, {"llama.block_count": 8})
    loader = GGUFLoader(folder)
    assert loader.tensor_file_map["late.weight"] == str(folder / "more/zz.gguf")
    assert loader.load_gguf_tensor("late.weight").tolist() == [0] * 4
    assert loader.gguf_file_meta["llama.block_count"] == 8


def test_nothing_there_is_a_file_not_found_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FileNotFoundError, match=str(path)) as caught:
            GGUFLoader(path)
        assert isinstance(caught.value, errors.ModelNotFoundError)


def test_damaged_files_are_named(folder: Path) -> None:
    (folder / "more/broken.gguf").write_bytes(gb.build(n_tensors=gb.HUGE))
    with pytest.raises(errors.TruncatedError, match=r"broken\.gguf: .* tensors announced"):
        GGUFLoader(folder)


def test_splits_behind_links(folder: Path, tmp_path: Path) -> None:
    """As in the hub's cache: each split is one entry of the maps, once."""
    cache = tmp_path / "cache"
    cache.mkdir()
    for path in folder.glob("*.gguf"):
        (cache / path.name).symlink_to(path)
    loader = GGUFLoader(cache)
    assert len(loader.file_data_map) == 2
    assert set(loader.tensor_file_map) == set(TENSORS)
    assert set(loader.tensor_file_map.values()) == set(loader.file_data_map)


# tensor_info, tensor_file_map, file_data_map, gguf_file_meta, the rest of the attributes


def test_tensor_info(loader: GGUFLoader) -> None:
    info = loader.tensor_info[GATE]
    assert info["ggml_type"] == 12
    assert type(info["ggml_type"]) is int
    assert (info["shape"], type(info["shape"])) == ([HIDDEN, INNER, EXPERTS], list)
    assert info["item_type"] is np.uint8
    assert info["item_count"] == EXPERTS * INNER * HIDDEN // 256 * 144
    assert info["np_dims"] == (EXPERTS, INNER, HIDDEN // 256 * 144)
    data = loader.file_data_map[loader.tensor_file_map[GATE]]
    assert data[info["offset"] :][:4].tolist() == TENSORS[GATE][1].ravel()[:4].tolist()
    assert info["bad_offset"] == 0
    second = loader.tensor_info[UP]
    assert second["offset"] - info["offset"] == second["bad_offset"] >= info["item_count"]
    plain = {name: loader.tensor_info[name] for name in (Q, K, NORM)}
    assert [info["item_type"] for info in plain.values()] == [np.float32, np.float16, np.uint8]
    assert [info["item_count"] for info in plain.values()] == [128, 64, 16]
    assert [info["np_dims"] for info in plain.values()] == [(16, 8), (8, 8), (16,)]


def test_every_type_has_its_row(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(seeds.every_qtype())
    loader = GGUFLoader(tmp_path)
    for qtype, (block_size, type_size) in BLOCKS.items():
        info = loader.tensor_info[f"blk.0.{qtype.name}"]
        assert (info["ggml_type"], info["shape"]) == (qtype, [block_size])
        assert np.dtype(info["item_type"]).itemsize * info["item_count"] == type_size
        assert loader.get_mmap_tensor(f"blk.0.{qtype.name}").size == type_size


def test_files(loader: GGUFLoader, folder: Path) -> None:
    paths = [str(folder / name) for name in
             ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf", "more/z.gguf")]  # fmt: skip
    assert list(loader.file_data_map) == paths
    for path, data in loader.file_data_map.items():
        assert (data.dtype, data.ndim, data.flags.writeable) == (BYTES, 1, False)
        assert data.tobytes() == Path(path).read_bytes()
    assert [loader.tensor_file_map[name] for name in (GATE, NORM, "late.weight")] == paths
    assert "model.layers.0.mlp.experts.ffn_gate_exps.weight" not in loader.tensor_file_map


def test_metadata_are_plain_values(tmp_path: Path) -> None:
    tokens = [f"token {number}" for number in range(1000)]
    words = gb.array(gb.STRING, *map(gb.string, tokens))
    entries = [gb.entry("tokens", gb.ARRAY, words), gb.u32("n", 5), seeds.text("name", "größer")]
    (tmp_path / "m.gguf").write_bytes(gb.build(entries, [gb.tensor("t")]))
    meta = GGUFLoader(tmp_path).gguf_file_meta
    assert meta == {"tokens": tokens, "n": 5, "name": "größer"}
    assert [type(value) for value in meta.values()] == [list, int, str]


def test_attributes_that_others_use(loader: GGUFLoader) -> None:
    assert loader.safetensor_loader is None
    assert loader.tensor_device_map == {}
    loader.tensor_device_map["blk.0"] = {"generate_device": "cpu"}
    assert GGUFLoader(loader.gguf_path).tensor_device_map == {}
    assert SafeTensorLoader not in type(loader).mro()


# has_tensor, get_ggml_type, get_mmap_tensor, get_undequanted_tensor_and_ggml_type

SAME = {
    GATE: "model.layers.0.mlp.experts.ffn_gate_exps.weight",
    Q: "model.layers.0.self_attn.q_proj.weight",
    NORM: "model.layers.0.input_layernorm.weight",
}


@pytest.mark.parametrize("name", SAME)
def test_names_are_translated_first(loader: GGUFLoader, name: str) -> None:
    other = SAME[name]
    assert loader.has_tensor(name)
    assert loader.has_tensor(other)
    assert loader.get_ggml_type(other) == loader.get_ggml_type(name) == TENSORS[name][0]
    assert loader.get_mmap_tensor(other).ctypes.data == loader.get_mmap_tensor(name).ctypes.data
    assert torch.equal(loader.load_gguf_tensor(other), loader.load_gguf_tensor(name))


def test_missing_tensors_are_key_errors(loader: GGUFLoader) -> None:
    assert not loader.has_tensor("model.layers.9.self_attn.q_proj.weight")
    uses: list[Any] = [
        loader.get_ggml_type, loader.get_mmap_tensor, loader.load_gguf_tensor,
        loader.get_undequanted_tensor_and_ggml_type,
    ]  # fmt: skip
    for use in uses:
        with pytest.raises(KeyError, match=r"no tensor 'blk\.9\.attn_q\.weight'; close: blk\.0"):
            use("model.layers.9.self_attn.q_proj.weight")


@pytest.mark.parametrize("name", TENSORS)
def test_mmap_tensors_are_flat_bytes_zero_copy(loader: GGUFLoader, name: str) -> None:
    data = loader.get_mmap_tensor(name)
    assert (data.dtype, data.ndim, data.flags.writeable) == (BYTES, 1, False)
    assert data.tobytes() == TENSORS[name][1].tobytes()
    whole = loader.file_data_map[loader.tensor_file_map[name]]
    assert np.shares_memory(data, whole)
    assert data.ctypes.data == whole.ctypes.data + loader.tensor_info[name]["offset"]
    tensor, type_id = loader.get_undequanted_tensor_and_ggml_type(name)
    assert (tensor.dtype, tensor.ndim, type_id) == (torch.uint8, 1, TENSORS[name][0])
    assert (tensor.data_ptr(), tensor.numel()) == (data.ctypes.data, data.size)


def test_blocks_outlive_the_loader_and_its_close(folder: Path) -> None:
    loader = GGUFLoader(folder)
    data = loader.get_mmap_tensor(GATE)
    loader.close()
    with pytest.raises(errors.ClosedError):
        loader.load_gguf_tensor(GATE)
    del loader
    assert data.tobytes() == TENSORS[GATE][1].tobytes()


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


def test_load_gguf(loader: GGUFLoader, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    gb.write_good(path, {"other.weight": (QuantType.F32, np.ones(4, np.float32))})
    with path.open("rb") as file:
        loader.load_gguf(file)
    assert loader.has_tensor("other.weight")
    assert loader.tensor_file_map["other.weight"] == str(path)
    assert loader.load_gguf_tensor("other.weight").tolist() == [1] * 4


# Replicas


@pytest.fixture
def own_store(store: Path) -> None:
    """Replicas of this test are in a store of its own."""


def test_blocks_are_in_the_replica(own_store: None, folder: Path) -> None:
    path = folder / "m-00001-of-00002.gguf"
    with numaload.open(path) as weights, numaload.mirror(weights, shared=True) as mirror:
        for replica in (mirror, mirror.local(), [mirror]):
            loader = GGUFLoader(folder, replica=replica)
            for name in TENSORS:
                address = mirror.local()[name].address
                assert loader.get_mmap_tensor(name).ctypes.data == address != weights[name].address
                tensor, _ = loader.get_undequanted_tensor_and_ggml_type(name)
                assert tensor.data_ptr() == address
            assert torch.equal(loader.load_gguf_tensor(DOWN), floats(DOWN))
            assert loader.load_gguf_tensor("late.weight").tolist() == [1] * 4  # has no replica
            loader.close()
            assert mirror.local()[GATE].buffer.nbytes  # the caller's, still open


def test_a_replica_of_another_model(own_store: None, folder: Path, tmp_path: Path) -> None:
    other = shutil.copy(folder / "more/z.gguf", tmp_path / "z.gguf")
    with (
        numaload.mirror(other, shared=True) as mirror,
        pytest.raises(errors.UsageError, match=r"replica of .*z\.gguf: no file of it is below"),
    ):
        GGUFLoader(folder, replica=mirror)


# Names

NAMES = {
    "lm_head.weight": "output.weight",
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.layers.3.input_layernorm.weight": "blk.3.attn_norm.weight",
    "model.layers.3.post_attention_layernorm.weight": "blk.3.ffn_norm.weight",
    "model.layers.3.mlp.down_proj.weight": "blk.3.ffn_down.weight",
    "model.layers.3.mlp.gate_proj.weight": "blk.3.ffn_gate.weight",
    "model.layers.3.mlp.up_proj.weight": "blk.3.ffn_up.weight",
    "model.layers.12.self_attn.q_proj.bias": "blk.12.attn_q.bias",
    "model.layers.12.self_attn.k_proj.weight": "blk.12.attn_k.weight",
    "model.layers.12.self_attn.v_proj.weight": "blk.12.attn_v.weight",
    "model.layers.12.self_attn.o_proj.weight": "blk.12.attn_output.weight",
    "model.layers.12.self_attn.qkv_proj.weight": "blk.12.attn_qkv.weight",
    "model.layers.3.self_attn.kv_a_proj_with_mqa.weight": "blk.3.attn_kv_a_mqa.weight",
    "model.layers.3.self_attn.kv_a_layernorm.weight": "blk.3.attn_kv_a_norm.weight",
    "model.layers.3.self_attn.kv_b_proj.weight": "blk.3.attn_kv_b.weight",
    "model.layers.3.self_attn.q_a_proj.weight": "blk.3.attn_q_a.weight",
    "model.layers.3.self_attn.q_a_layernorm.weight": "blk.3.attn_q_a_norm.weight",
    "model.layers.3.self_attn.q_b_proj.weight": "blk.3.attn_q_b.weight",
    "model.layers.3.self_attn.q_norm.weight": "blk.3.attn_q_norm.weight",
    "model.layers.3.self_attn.k_norm.weight": "blk.3.attn_k_norm.weight",
    "model.layers.3.attn_k_b.weight": "blk.3.attn_k_b.weight",
    "model.layers.3.mlp.gate.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.mlp.gate.e_score_correction_bias": "blk.3.exp_probs_b.bias",
    "model.layers.3.mlp.shared_experts.down_proj.weight": "blk.3.ffn_down_shexp.weight",
    "model.layers.3.mlp.shared_experts.gate_proj.weight": "blk.3.ffn_gate_shexp.weight",
    "model.layers.3.mlp.shared_expert.up_proj.weight": "blk.3.ffn_up_shexp.weight",
    "model.layers.3.mlp.shared_expert_gate.weight": "blk.3.ffn_gate_inp_shexp.weight",
    "model.layers.3.mlp.experts": "blk.3",
    "model.layers.3.mlp.experts.ffn_up_exps.weight": "blk.3.ffn_up_exps.weight",
    "blk.3.mlp.experts.ffn_down_exps.weight": "blk.3.ffn_down_exps.weight",
    "model.layers.3.mlp.experts.17.gate_proj.weight": "blk.3.17.ffn_gate_exps",
    "model.layers.3.mlp.experts.17.up_proj": "blk.3.17.ffn_up_exps",
    "blk.3.mlp.experts.0.down_proj.weight": "blk.3.0.ffn_down_exps",
    "model.layers.3.mlp.ffn_gate_exp.weight": "blk.3.mlp.ffn_gate_exps.weight",
    "blk.3.ffn_up_exp.0.weight": "blk.3.ffn_up_exps.0.weight",
    "model.layers.3.block_sparse_moe.experts.5.w1.weight": "blk.3.ffn_gate.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w2.weight": "blk.3.ffn_down.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w3.weight": "blk.3.ffn_up.5.weight",
    "model.layers.3.block_sparse_moe.experts.5.w4.weight": "blk.3.5.w4.weight",
    "model.layers.3.block_sparse_moe.experts": "blk.3",
    "model.layers.3.block_sparse_moe.gate.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.feed_forward.experts.ffn_up_exps": "blk.3.ffn_up_exps",
    "model.layers.3.feed_forward.router.weight": "blk.3.ffn_gate_inp.weight",
    "model.layers.3.feed_forward.shared_experts.up_proj.weight": "blk.3.ffn_up_shexp.weight",
    "model.layers.3.feed_forward.shared_experts.down_proj.weight": "blk.3.ffn_down_shexp.weight",
    "model.layers.3.feed_forward.shared_experts.gate_proj.weight": "blk.3.ffn_gate_shexp.weight",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_become_ggufs(name: str) -> None:
    """The expected ones were printed by the original's function."""
    assert translate_name_to_gguf(name) == NAMES[name]
    assert translate_name_to_gguf(NAMES[name]) == NAMES[name]


def test_the_factory_knows_gguf(folder: Path) -> None:
    create = ktransformers.ModelLoaderFactory.create_loader
    for path in (folder, folder / "m-00001-of-00002.gguf", folder / "more"):
        assert type(create(str(path))) is GGUFLoader
    (folder / "empty").mkdir()
    for path in (folder / "empty", folder / "absent"):
        with pytest.raises(FileNotFoundError, match=str(path)):
            create(path)
