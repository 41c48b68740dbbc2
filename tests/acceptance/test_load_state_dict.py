"""``load_state_dict``: modules filled from files as torch's own would, in parallel, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import gguf_builder as gb
import hf_models
import numaload as api
from commands import Numaload
from numaload.errors import (
    CancelledError,
    FileChangedError,
    ReadError,
    StateDictError,
    UnknownQuantTypeError,
    UnsupportedTypeError,
    UsageError,
)
from numaload.formats.qtypes import QuantType
from numaload.pipeline.fill import QUEUED

torch = pytest.importorskip("torch")

from torch_modules import module_of  # noqa: E402 - needs torch

DTYPES = ["float32", "float16", "bfloat16"]


def like(expected: Mapping[str, Any], **options: Any) -> Any:
    return module_of({key: array.shape for key, array in expected.items()}, **options)


def check(module: Any, expected: Mapping[str, Any], dtype: Any) -> None:
    found = module.state_dict()
    assert found.keys() == expected.keys()
    for key, array in expected.items():
        wanted = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
        assert found[key].dtype == dtype, key
        assert torch.equal(found[key], wanted), key


def tensors_file(path: Path, **arrays: Any) -> Any:
    """A GGUF file of float32, float16 and integer tensors, opened."""
    writer = gguf.GGUFWriter(str(path), "test")
    for name, array in arrays.items():
        writer.add_tensor(name.replace("__", "."), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return api.open(path)


def values(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CASES = {
    "llama": ("llama", {}),
    "mixtral": ("llama", {"experts": True}),
    "qwen2": ("qwen2", {}),
    "qwen2moe": ("qwen2moe", {}),
    "qwen2moe-expert-by-expert": ("qwen2moe", {"fused": False}),
    "qwen3": ("qwen3", {}),
    "qwen3moe": ("qwen3moe", {}),
    "deepseek2": ("deepseek2", {}),
    "deepseek2-old-kv_b": ("deepseek2", {"old_kv_b": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_architectures(tmp_path: Path, case: str, device: str) -> None:
    """gguf-py's names and llama.cpp's layouts become those of transformers' modules."""
    architecture, options = CASES[case]
    made = hf_models.write(tmp_path / "m.gguf", architecture, **options)
    module = like(made.expected, device=device)
    with api.open(made.path) as weights:
        result = api.load_state_dict(module, weights)
    assert str(result) == "<All keys matched successfully>"
    check(module, made.expected, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["in place", "by name", "torch's"])
def test_dtypes(tmp_path: Path, dtype: str, given: str) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "llama")
    wanted = getattr(torch, dtype)
    module = like(made.expected, dtype=wanted if given == "in place" else torch.float64)
    argument = {"in place": None, "by name": dtype, "torch's": wanted}[given]
    with api.open(made.path) as weights:
        api.load_state_dict(module, weights, dtype=argument)
    check(module, made.expected, wanted)


def test_from_a_replica_and_a_copy(tmp_path: Path, store: Path) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "llama")
    with api.mirror(made.path, shared=True) as mirror:
        module = like(made.expected, device="meta")
        api.load_state_dict(module, mirror.view(mirror.nodes[0]), dtype="bfloat16")
        check(module, made.expected, torch.bfloat16)
    with api.open(made.path, copy=True) as weights:
        module = like(made.expected)
        api.load_state_dict(module, weights)
        check(module, made.expected, torch.float32)


def test_same_parameters_in_place_new_ones_elsewhere(tmp_path: Path) -> None:
    """In place: the memory, the object, requires_grad. On meta: a new Parameter, the same rest."""
    weights = tensors_file(tmp_path / "m.gguf", a=values(600, 2048), b=values(3), c=values(5))
    module = module_of({"a": (600, 2048), "b": (3,), "c": (5,)}, buffers=("c",))
    module.b.requires_grad_(requires_grad=False)
    before = {name: (id(t), t.data_ptr()) for name, t in module.state_dict(keep_vars=True).items()}
    api.load_state_dict(module, weights)
    after = {name: (id(t), t.data_ptr()) for name, t in module.state_dict(keep_vars=True).items()}
    assert before == after
    module = module_of({"a": (600, 2048), "b": (3,), "c": (5,)}, device="meta", buffers=("c",))
    module.b.requires_grad_(requires_grad=False)
    api.load_state_dict(module, weights, dtype="float16")
    assert isinstance(module.a, torch.nn.Parameter)
    assert (module.a.requires_grad, module.b.requires_grad) == (True, False)
    assert "c" in dict(module.named_buffers())
    assert {t.dtype for t in module.state_dict().values()} == {torch.float16}
    module.a.detach().add_(1)  # memory that can be written to
    assert module.a[3, 4].item() == pytest.approx(weights["a"].dequantize()[3, 4] + 1, abs=2e-3)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_parameters_stay_tied_and_need_one_name(tmp_path: Path, device: str) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "qwen2", tied=True)
    module = like(made.expected, device=device)
    module.lm_head.weight = module.model.embed_tokens.weight
    with api.open(made.path) as weights:
        result = api.load_state_dict(module, weights)
    assert result.missing_keys == []
    assert module.lm_head.weight is module.model.embed_tokens.weight
    check(module, made.expected, torch.float32)


def both_say(module: Callable[[], Any], weights: Any, **options: Any) -> tuple[str, str]:
    """The error of torch's own, given the same tensors, and ours, from the second line on."""
    tensors = {name: tensor.torch("float32") for name, tensor in weights.items()}
    with pytest.raises(RuntimeError) as theirs:
        module().load_state_dict(tensors, **options)
    with pytest.raises(StateDictError) as ours:
        api.load_state_dict(module(), weights, **options)
    return str(theirs.value).partition(":")[2].strip(), str(ours.value).partition(":\n")[2].strip()


def test_missing_and_unexpected_are_torchs(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8), more=values(3), b=values(2, 2))

    def module() -> Any:
        return module_of({"a": (4, 8), "b": (2, 2), "x.y": (3,), "x.z": (4,)})

    theirs, ours = both_say(module, weights)
    assert ours == theirs
    loose = module()
    result = api.load_state_dict(loose, weights, strict=False)
    assert result.missing_keys == ["x.y", "x.z"]
    assert result.unexpected_keys == ["more"]
    assert torch.equal(loose.a, weights["a"].torch("float32"))
    assert type(result) is type(module().load_state_dict({}, strict=False))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_sizes_are_refused_before_anything_is_touched(
    tmp_path: Path, device: str, *, strict: bool
) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8), b=values(2, 2))

    def module() -> Any:
        return module_of({"a": (4, 8), "b": (2, 3)}, device=device)

    mine = module()
    with pytest.raises(StateDictError, match=r"size mismatch for b: .*\[2, 2\].*\[2, 3\]"):
        api.load_state_dict(mine, weights, strict=strict)
    assert mine.a.device.type == device
    if device == "cpu":
        assert not mine.a.any()


def test_a_transposed_shape_is_no_match(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(2, 4, 8))
    with pytest.raises(StateDictError, match="size mismatch for a"):
        api.load_state_dict(module_of({"a": (4, 2, 8)}), weights)


def test_attention_heads_that_do_not_divide(tmp_path: Path) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "llama")
    shapes = {key: array.shape for key, array in made.expected.items()}
    shapes["model.layers.0.self_attn.q_proj.weight"] = (6, hf_models.HIDDEN)
    with api.open(made.path) as weights, pytest.raises(StateDictError, match="cannot be made of"):
        api.load_state_dict(module_of(shapes), weights)


@pytest.mark.parametrize("kind", ["dict", "function"])
def test_name_map(tmp_path: Path, kind: str) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8), b=values(2))
    names = {"first": "a", "second": "b"}
    module = module_of({"first": (4, 8), "second": (2,), "third": (1,)})
    name_map: Any = names if kind == "dict" else names.get
    result = api.load_state_dict(module, weights, name_map=name_map, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["third"], [])
    assert torch.equal(module.first, weights["a"].torch("float32"))


def test_an_architecture_whose_layout_is_not_known(tmp_path: Path) -> None:
    """Loading it as if it were like others would give wrong weights and no error."""
    path = tmp_path / "m.gguf"
    (path,) = map(Path, gb.write_good(path, {"t": (QuantType.F32, values(1, 4).view(np.uint8))}))
    raw = path.read_bytes().replace(b"llama", b"gemma")
    path.write_bytes(raw)
    with api.open(path) as weights, pytest.raises(UsageError, match=r"'gemma'.*name_map"):
        api.load_state_dict(module_of({"model.norm.weight": (4,)}), weights)


def test_metadata_that_is_missing_or_odd(tmp_path: Path) -> None:
    writer = hf_models.Writer(tmp_path / "m.gguf", "llama")
    writer.add("output_norm.weight", (8,))
    writer.close()
    module = module_of({"model.norm.weight": (8,)})
    with api.open(tmp_path / "m.gguf") as weights, pytest.raises(UsageError, match="block_count"):
        api.load_state_dict(module, weights)


def test_other_types_are_converted_as_torch_does(tmp_path: Path) -> None:
    ints, doubles = np.arange(6, dtype=np.int32).reshape(2, 3), values(3).astype(np.float64)
    weights = tensors_file(tmp_path / "m.gguf", i=ints, d=doubles, f=values(4), l=ints)
    module = module_of({"i": (2, 3), "d": (3,), "f": (4,), "l": (2, 3)}, dtype=torch.float32)
    module.l = torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.int64), requires_grad=False)
    api.load_state_dict(module, weights, dtype=torch.bfloat16)
    assert torch.equal(module.i, torch.from_numpy(ints).to(torch.bfloat16))
    assert torch.equal(module.d, torch.from_numpy(doubles).to(torch.bfloat16))
    assert torch.equal(module.l, torch.from_numpy(ints).to(torch.int64))
    with pytest.raises(UsageError, match="floating-point"):
        api.load_state_dict(module, weights, dtype=torch.int8)


@pytest.mark.parametrize("type_id", [QuantType.Q8_K, 133], ids=["no kernel", "unknown"])
def test_types_that_cannot_be_converted_are_refused_first(tmp_path: Path, type_id: int) -> None:
    rows = [gb.tensor("a", (8,)), gb.tensor("odd", (256,), type_id, 32)]
    (tmp_path / "m.gguf").write_bytes(gb.build([], rows, values(8).tobytes() + bytes(1024)))
    module = module_of({"a": (8,), "odd": (256,)})
    with (
        api.open(tmp_path / "m.gguf") as weights,
        pytest.raises((UnsupportedTypeError, UnknownQuantTypeError), match="odd"),
    ):
        api.load_state_dict(module, weights)
    assert not module.a.any()


def test_float64_parameters(tmp_path: Path) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "qwen3")
    module = like(made.expected, dtype=torch.float64)
    with api.open(made.path) as weights:
        api.load_state_dict(module, weights)
    check(module, made.expected, torch.float64)


def test_parameters_that_are_not_contiguous(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(300, 500))
    module = module_of({"a": (300, 500)})
    module.a = torch.nn.Parameter(torch.zeros(500, 300).t())
    address = module.a.data_ptr()
    api.load_state_dict(module, weights)
    assert module.a.data_ptr() == address
    assert torch.equal(module.a, weights["a"].torch("float32"))


def test_safetensors(tmp_path: Path) -> None:
    """Its own names; experts one by one in the file, fused in the module."""
    from safetensors.torch import save_file

    made = hf_models.write(tmp_path / "m.gguf", "qwen3moe", fused=False)
    arrays = {k: torch.from_numpy(a.copy()).to(torch.bfloat16) for k, a in made.expected.items()}
    save_file(arrays, str(tmp_path / "model.safetensors"))
    fused = hf_models.write(tmp_path / "m2.gguf", "qwen3moe").expected
    for expected in (made.expected, fused):
        module = like(expected, device="meta")
        with api.open(tmp_path / "model.safetensors") as weights:
            api.load_state_dict(module, weights, dtype=torch.bfloat16)
        check(module, expected, torch.bfloat16)
        assert module.model.norm.weight.dtype == torch.bfloat16


def test_a_big_endian_file(tmp_path: Path) -> None:
    expected = values(3, 5)
    with gb.big_endian():
        raw = gb.build([], [gb.tensor("a", (5, 3))], expected.astype(">f4").tobytes())
    (tmp_path / "m.gguf").write_bytes(raw)
    module = module_of({"a": (3, 5)})
    with api.open(tmp_path / "m.gguf") as weights:
        api.load_state_dict(module, weights)
    assert torch.equal(module.a.detach(), torch.from_numpy(expected))


def test_progress_and_cancelling(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(2000, 2048), b=values(3))
    module = module_of({"a": (2000, 2048), "b": (3,)})
    seen: list[tuple[int, int]] = []
    api.load_state_dict(module, weights, progress=lambda *now: seen.append(now))
    total = sum(t.nbytes for t in weights.values())
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    module = module_of({"a": (2000, 2048), "b": (3,)}, device="meta")
    with pytest.raises(CancelledError):
        api.load_state_dict(module, weights, progress=lambda done, _: done == 0)
    assert module.a.device.type == "meta"


def test_a_file_that_ends_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    names = [f"t{i}" for i in range(QUEUED + 3)]  # the last are begun when the first were told
    weights = tensors_file(path, **{name: values(64, 2048) for name in names})
    module = module_of(dict.fromkeys(names, (64, 2048)), device="meta")

    def cut(done: int, _: int) -> None:
        if done:
            with path.open("r+b") as file:
                file.truncate(1 << 16)

    with pytest.raises((ReadError, FileChangedError)):
        api.load_state_dict(module, weights, progress=cut)
    assert module.t0.device.type == "meta"


def test_what_does_not_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from numaload.errors import NodeMemoryError
    from numaload.machine import memory

    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8))
    monkeypatch.setattr(memory, "available", lambda: memory.Limit("this machine", 1 << 20))
    monkeypatch.setattr(memory, "_trusted", 0)
    module = module_of({"a": (4, 8)}, device="meta")
    with pytest.raises(NodeMemoryError, match="this machine has room for 1048576"):
        api.load_state_dict(module, weights)
    api.load_state_dict(module_of({"a": (4, 8)}), weights)  # in place needs none


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(tmp_path: Path) -> None:
    made = hf_models.write(tmp_path / "m.gguf", "qwen3moe")
    module = like(made.expected, device="meta")
    with api.open(made.path) as weights:
        api.load_state_dict(module, weights, dtype=torch.bfloat16, device="cuda")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cuda"}
    check(module.cpu(), made.expected, torch.bfloat16)


class Angles(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Computed from nothing but itself, as rotary embeddings are."""

    def __init__(self, unknown: str = "") -> None:
        super().__init__()
        self.register_buffer("angles", torch.arange(3.0), persistent=False)
        if unknown:
            dtype = getattr(torch, unknown)
            self.register_buffer("unknown", torch.ones(2, dtype=dtype), persistent=False)


class Embeddings(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Positions beside parameters: its own, or those of a part of it."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.register_buffer("positions", torch.arange(4), persistent=False)
        if own:
            self.weight = torch.nn.Parameter(torch.zeros(4, 8))
        else:
            self.tokens = torch.nn.Embedding(4, 8)


class Model(torch.nn.Module):  # type: ignore[misc, name-defined]
    """It initializes its parts as models of transformers do."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part())

    def _init_weights(self, part: Any) -> None:
        for parameter in part.parameters():
            parameter.normal_()
        if isinstance(part, Angles):
            part.angles.copy_(torch.arange(3.0))
        if isinstance(part, Embeddings):
            part.positions.copy_(torch.arange(4))


def on(device: str, **parts: Any) -> Any:
    with torch.device(device):
        return Model(**parts)


def test_buffers_that_parts_of_their_own_have_are_computed(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module = on("meta", a=lambda: torch.nn.Embedding(4, 8), rotary=Angles)
    api.load_state_dict(module, weights)
    assert torch.equal(module.a.weight, weights["a.weight"].torch("float32"))
    assert module.rotary.angles.tolist() == [0, 1, 2]


REFUSED: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "beside parameters": (
        {"x": lambda: Embeddings(own=True)}, '"x.positions"', {"x__weight": (4, 8)}
    ),
    "above parameters": (
        {"x": lambda: Embeddings(own=False)}, '"x.positions"', {"x__tokens__weight": (4, 8)}
    ),
    "not computed": ({"x": lambda: Angles("float32")}, '"x.unknown"', {}),
    "not computed, integers": ({"x": lambda: Angles("int64")}, '"x.unknown"', {}),
    "not computed, bools": ({"x": lambda: Angles("bool")}, '"x.unknown"', {}),
    "missing parameters": ({"x": lambda: torch.nn.Embedding(4, 8)}, '"x.weight"', {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_left_on_meta_is_refused(tmp_path: Path, case: str) -> None:
    """Before anything is touched: whoever goes on would compute with nothing, or with noise."""
    parts, named, more = REFUSED[case]
    arrays = {name: values(*shape) for name, shape in more.items()}
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8), **arrays)
    parts = {"a": lambda: torch.nn.Embedding(4, 8)} | parts
    module = on("meta", **parts)
    with pytest.raises(StateDictError, match=f"{named} would be left on the meta device") as caught:
        api.load_state_dict(module, weights, strict=False)
    assert caught.value.missing == [named.strip('"')]
    assert {one.device.type for one in (*module.parameters(), *module.buffers())} == {"meta"}
    module = on("cpu", **parts)
    api.load_state_dict(module, weights, strict=False)
    for name, tensor in weights.items():
        assert torch.equal(module.get_parameter(name), tensor.torch("float32"))


def test_buffers_that_nobody_can_compute_are_refused(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8))
    module = module_of({"a": (4, 8)}, device="meta")
    module.register_buffer("angles", torch.zeros(3, device="meta"), persistent=False)
    with pytest.raises(StateDictError, match='"angles" would be left on the meta device'):
        api.load_state_dict(module, weights)
    assert module.a.device.type == "meta"


def holding(tensor: Any, *, buffer: bool = False) -> Any:
    """A module with ``b.weight``, 2 zeros, and this tensor as ``a.weight``."""
    module = module_of({"b.weight": (2,)})
    module.a = torch.nn.Module()
    if buffer:
        module.a.register_buffer("weight", tensor)
    else:
        module.a.weight = torch.nn.Parameter(tensor, requires_grad=False)
    return module


def two_tensors(path: Path) -> Any:
    """Of the parameters of ``holding``. b.weight is first in the file, and so is filled first."""
    return tensors_file(path, b__weight=values(2), a__weight=values(4, 8))


def wrapped(device: str) -> Any:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    module = module_of({"b.weight": (2,)}, device=device)
    module.a = checkpoint_wrapper(torch.nn.Linear(8, 4, bias=False, device=device))
    return module


def renamed(device: str) -> Any:
    module = module_of({"b.weight": (2,), "c.weight": (4, 8)}, device=device)

    def rename(_: Any, state: Any, *__: Any) -> None:
        state["a.weight"] = state.pop("c.weight")

    module._register_state_dict_hook(rename)
    return module


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("made", [wrapped, renamed])
def test_keys_that_are_no_paths_of_attributes(tmp_path: Path, made: Any, device: str) -> None:
    weights, module = two_tensors(tmp_path / "m.gguf"), made(device)
    api.load_state_dict(module, weights, dtype="bfloat16")
    check(module, {k: t.dequantize() for k, t in weights.items()}, torch.bfloat16)
    assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
    assert not list(module.buffers())


def scripted() -> tuple[Any, dict[str, Any]]:
    module = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    return torch.jit.script(module), {"dtype": "bfloat16", "name_map": {"0.weight": "a.weight"}}


def copied() -> tuple[Any, dict[str, Any]]:
    module = module_of({"a.weight": (4, 8)})

    def copy(_: Any, state: Any, *__: Any) -> None:
        state["a.weight"] = state["a.weight"].detach().clone()

    module._register_state_dict_hook(copy)
    return module, {}


@pytest.mark.parametrize("made", [scripted, copied])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cannot_be_put_into_the_module_is_refused(tmp_path: Path, made: Any) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module, options = made()
    (before,) = [one.clone() for one in module.parameters()]
    with pytest.raises(StateDictError, match=r'weight" of state_dict\(\) cannot be put'):
        api.load_state_dict(module, weights, **options)
    assert torch.equal(next(module.parameters()), before)


class Hidden(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Of what it holds state_dict() shows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2))
        self.register_buffer("kept", torch.zeros(2))

    def _save_to_state_dict(self, *_: Any) -> None: ...


class Twice(torch.nn.Module):  # type: ignore[misc, name-defined]
    """One buffer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("one", torch.zeros(3), persistent=False)
        self.register_buffer("two", self.one, persistent=False)


@pytest.mark.parametrize("kind", [Hidden, Twice])
def test_what_state_dict_does_not_show_is_not_left_on_meta(tmp_path: Path, kind: Any) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module = on("meta", a=lambda: torch.nn.Embedding(4, 8), x=kind)
    with pytest.raises(StateDictError, match="left on the meta device") as caught:
        api.load_state_dict(module, weights)
    names = ["weight", "kept"] if kind is Hidden else ["one", "two"]
    assert caught.value.missing == [f"x.{name}" for name in names]
    assert {one.device.type for one in (*module.parameters(), *module.buffers())} == {"meta"}


def test_a_computed_buffer_stays_tied(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module = on("meta", a=lambda: torch.nn.Embedding(4, 8), x=Angles)
    module.x.register_buffer("again", module.x.angles, persistent=False)
    api.load_state_dict(module, weights)
    assert module.x.again is module.x.angles
    assert module.x.angles.tolist() == [0, 1, 2]


@pytest.mark.parametrize("unknown", ["", "float32"], ids=["loaded", "refused"])
def test_computing_buffers_changes_no_others(tmp_path: Path, unknown: str) -> None:
    class Counting(Model):
        def _init_weights(self, part: Any) -> None:
            super()._init_weights(part)
            if isinstance(part, Angles):
                part.count.add_(1)

    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    with torch.device("meta"):
        module = Counting(a=lambda: torch.nn.Embedding(4, 8), x=lambda: Angles(unknown))
    count = torch.zeros(1)
    module.x.register_buffer("count", count, persistent=False)
    if unknown:
        with pytest.raises(StateDictError, match=r"x\.unknown"):
            api.load_state_dict(module, weights)
    else:
        api.load_state_dict(module, weights)
        assert module.x.angles.tolist() == [0, 1, 2]
    assert module.x.count is count
    assert not count.any()


def emptied(nbytes: int) -> Any:
    tensor = torch.zeros(4, 8)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(4, 8)


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "no storage": (lambda: emptied(0), "storage is empty"),
    "half a storage": (lambda: emptied(64), "smaller than it"),
    "uninitialized": (lambda: torch.nn.LazyLinear(4).weight, "not initialized"),
    "sparse": (lambda: torch.zeros(4, 8).to_sparse(), "no plain dense"),
    "expanded": (lambda: torch.zeros(1, 8).expand(4, 8), "overlap"),
    "overlapping": (lambda: torch.zeros(99).as_strided((4, 8), (1, 1)), "overlap"),
    "negated": (lambda: torch._neg_view(torch.zeros(4, 8)), "negated or conjugated"),
    "conjugated": (lambda: torch.zeros(4, 8, dtype=torch.complex64).conj(), "or conjugated"),
    "fake": (fake, "for tracing"),
    "functional": (lambda: torch._to_functional_tensor(torch.zeros(4, 8)), "for tracing"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_tensors_that_cannot_be_filled_are_refused_first(tmp_path: Path, case: str) -> None:
    made, said = UNFIT[case]
    weights, module = two_tensors(tmp_path / "m.gguf"), holding(made(), buffer=True)
    with pytest.raises(StateDictError, match=rf"a\.weight cannot be filled: .*{said}"):
        api.load_state_dict(module, weights)
    assert not module.b.weight.any()


def test_no_array_of_a_tensor_without_memory() -> None:
    from numaload.torch_memory import array_of

    with pytest.raises(UsageError, match="no memory"):
        array_of(emptied(0))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_inference_mode(tmp_path: Path, *, inside: bool, within: bool) -> None:
    """Of the tensors and of the caller; not contiguous: these are filled by torch."""
    weights = two_tensors(tmp_path / "m.gguf")
    with torch.inference_mode(inside):
        module = holding(torch.zeros(8, 4).t())
    module.a.weight.requires_grad_(requires_grad=not inside)
    with torch.inference_mode(within):
        api.load_state_dict(module, weights)
    check(module, {k: t.dequantize() for k, t in weights.items()}, torch.float32)


@pytest.mark.parametrize("device", ["meta", "\x1b[1mjunk", 1.5, "cuda"])
def test_devices_that_cannot_be(tmp_path: Path, device: Any) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    weights, module = two_tensors(tmp_path / "m.gguf"), holding(torch.zeros(4, 8))
    with pytest.raises(UsageError, match="device") as caught:
        api.load_state_dict(module, weights, device=device)
    assert "\x1b" not in caught.value.args[0]
    assert module.a.weight.device.type == "cpu"


@pytest.mark.parametrize("answer", [3, b"a.weight", ("a.weight",), "list"])
def test_name_maps_that_name_nothing(tmp_path: Path, answer: Any) -> None:
    weights, module = two_tensors(tmp_path / "m.gguf"), holding(torch.zeros(4, 8))
    name_map: Any = ["a.weight"] if answer == "list" else lambda _: answer
    with pytest.raises(UsageError, match="name_map"):
        api.load_state_dict(module, weights, name_map, strict=False)


PROGRAM = """
import json, resource, sys, torch
import numaload
sys.path.insert(0, sys.argv[2])
from torch_modules import module_of

MORE = 64 << 20
weights = numaload.open(sys.argv[1])
shapes = {name: tensor.shape for name, tensor in weights.items()}

def load(names):
    module = module_of({name: shapes[name] for name in names}, device="meta")
    numaload.load_state_dict(module, weights, dtype=torch.bfloat16, strict=False)
    return module

small = [name for name in shapes if name.split(".")[1] in "0123456"]
load(small)  # kernels and threads are there
result = 2 * sum(tensor.size for tensor in weights.values())
with open("/proc/self/status") as file:
    data = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmData"))
limit = data + result + MORE
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
module = load(shapes)
try:
    torch.zeros(MORE + (8 << 20), dtype=torch.uint8)
    refused = False
except RuntimeError:
    refused = True
print(json.dumps({"result": result, "refused": refused}))
"""


def test_at_most_64_mib_beyond_the_result(numaload: Numaload, tmp_path: Path) -> None:
    """Enforced by the kernel: more private memory than that is refused."""
    from numaload.demo import write_model

    (path,) = write_model(str(tmp_path / "model.gguf"), 200 << 20)
    found = numaload.python(PROGRAM, path, str(Path(__file__).parents[1]))
    assert found["result"] > 300 << 20
    assert found["refused"], "the limit was none: the test says nothing"
