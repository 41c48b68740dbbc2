"""``load_state_dict``: modules filled from files as torch's own would, in parallel, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
import numaload as api
import random_model
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

from torch_modules import check, module_of, tensors_file, values  # noqa: E402 - needs torch

DTYPES = ["float32", "float16", "bfloat16"]


def like(expected: Mapping[str, Any], **options: Any) -> Any:
    return module_of({key: array.shape for key, array in expected.items()}, **options)


def quantized(path: Path) -> random_model.Made:
    """A file with the module's own names, of many types."""
    made, out = random_model.Made(path), random_model.Writer(path, "test")
    for number in range(2 * len(random_model.TYPES)):
        shape = (48, 256) if number % 4 else (256,)
        made.expected[f"part.{number}.weight"] = out.add(f"part.{number}.weight", shape)
    out.close()
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["in place", "by name", "torch's"])
def test_dtypes(tmp_path: Path, dtype: str, given: str) -> None:
    made = quantized(tmp_path / "m.gguf")
    wanted = getattr(torch, dtype)
    module = like(made.expected, dtype=wanted if given == "in place" else torch.float64)
    argument = {"in place": None, "by name": dtype, "torch's": wanted}[given]
    with api.open(made.path) as weights:
        api.load_state_dict(module, weights, dtype=argument)
    check(module, made.expected, wanted)


def test_from_a_replica_and_a_copy(tmp_path: Path, store: Path) -> None:
    made = quantized(tmp_path / "m.gguf")
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


class Tied(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("names", [("embed",), ("head",), ("embed", "head")])
def test_tied_parameters_stay_tied_and_need_one_name(
    tmp_path: Path, names: tuple[str, ...], device: str
) -> None:
    """Some files hold both, as Qwen3-0.6B's does."""
    arrays = {f"{name}__weight": values(6, 4) for name in names}
    weights = tensors_file(tmp_path / "m.gguf", **arrays)
    with torch.device(device):
        module = Tied()
    assert str(api.load_state_dict(module, weights)) == "<All keys matched successfully>"
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight.detach(), torch.from_numpy(values(6, 4)))


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


@pytest.mark.parametrize("kind", ["dict", "function"])
def test_name_map(tmp_path: Path, kind: str) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a=values(4, 8), b=values(2))
    names = {"first": "a", "second": "b"}
    module = module_of({"first": (4, 8), "second": (2,), "third": (1,)})
    name_map: Any = names if kind == "dict" else names.get
    result = api.load_state_dict(module, weights, name_map=name_map, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["third"], [])
    assert torch.equal(module.first, weights["a"].torch("float32"))


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
    made = quantized(tmp_path / "m.gguf")
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
    from safetensors.torch import save_file

    made = quantized(tmp_path / "m.gguf")
    arrays = {k: torch.from_numpy(a.copy()).to(torch.bfloat16) for k, a in made.expected.items()}
    save_file(arrays, str(tmp_path / "model.safetensors"))
    module = like(made.expected, device="meta")
    with api.open(tmp_path / "model.safetensors") as weights:
        api.load_state_dict(module, weights, dtype=torch.bfloat16)
    check(module, made.expected, torch.bfloat16)


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
    made = quantized(tmp_path / "m.gguf")
    module = like(made.expected, device="meta")
    with api.open(made.path) as weights:
        api.load_state_dict(module, weights, dtype=torch.bfloat16, device="cuda")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"cuda"}
    check(module.cpu(), made.expected, torch.bfloat16)


@pytest.mark.parametrize("device", ["meta", "\x1b[1mjunk", 1.5, "cuda"])
def test_devices_that_cannot_be(tmp_path: Path, device: Any) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module = module_of({"a.weight": (4, 8)})
    with pytest.raises(UsageError, match="device") as caught:
        api.load_state_dict(module, weights, device=device)
    assert "\x1b" not in caught.value.args[0]
    assert module.a.weight.device.type == "cpu"


@pytest.mark.parametrize("answer", [3, b"a.weight", ("a.weight",), "list"])
def test_name_maps_that_name_nothing(tmp_path: Path, answer: Any) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    module = module_of({"a.weight": (4, 8)})
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
