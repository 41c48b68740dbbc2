"""``load_state_dict`` of modules that load in ways of their own: as torch's own, or refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from numaload.errors import StateDictError, UsageError

torch = pytest.importorskip("torch")

from torch_modules import check, module_of, tensors_file, values  # noqa: E402 - needs torch


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


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_keys_that_are_no_paths_of_attributes(tmp_path: Path, device: str) -> None:
    weights, module = two_tensors(tmp_path / "m.gguf"), wrapped(device)
    api.load_state_dict(module, weights, dtype="bfloat16")
    check(module, {k: t.dequantize() for k, t in weights.items()}, torch.bfloat16)
    assert {one.dtype for one in module.parameters()} == {torch.bfloat16}
    assert not list(module.buffers())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_filled_in_place(tmp_path: Path) -> None:
    weights = tensors_file(tmp_path / "m.gguf", a__weight=values(4, 8))
    names = {"0.weight": "a.weight"}
    module = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False)))
    with pytest.raises(StateDictError, match=r'"0.weight" cannot be replaced'):
        api.load_state_dict(module, weights, names, dtype="bfloat16")
    api.load_state_dict(module, weights, names)
    assert torch.equal(next(module.parameters()), weights["a.weight"].torch("float32"))


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    """Has ``a.weight``, and loads it in the way that a test wants."""

    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(8, 4, bias=False)
        self.b = torch.nn.Linear(2, 1, bias=False)


def renaming() -> Any:
    """As modules have it whose names changed."""
    module = Layer()
    module.c = module.a
    del module.a

    def rename(state: Any, prefix: str, *_: Any) -> None:
        state["c.weight"] = state.pop("a.weight")

    module._register_load_state_dict_pre_hook(rename)
    return module


class Transposed(Layer):
    """Its files hold the transpose of an older layout."""

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        state[prefix + "a.weight"] = 2 * state[prefix + "a.weight"].flip(0).contiguous()
        super()._load_from_state_dict(state, prefix, *rest)


class Joined(Layer):
    """Two tensors of the file become one parameter; one of them is read in part."""

    def __init__(self) -> None:
        super().__init__()
        self.joined = torch.nn.Parameter(torch.zeros(5, 8))
        del self.a, self.b

    def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
        rows = [state.pop(prefix + "a.weight"), state.pop(prefix + "b.weight").repeat(1, 4)]
        state[prefix + "joined"] = torch.cat(rows)
        super()._load_from_state_dict(state, prefix, *rest)


def lazy() -> Any:
    module = Layer()
    module.a = torch.nn.LazyLinear(4, bias=False)
    return module


def forgiving() -> Any:
    """A hook takes back what is missing."""
    module = Layer()
    module.more = torch.nn.Linear(2, 2)
    module.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
    return module


class Keeps(Layer):
    """Has something to keep that is no tensor of its own."""

    kept: Any = None

    def set_extra_state(self, state: Any) -> None:
        self.kept = state

    def get_extra_state(self) -> Any:
        return self.kept


# What is forgiven would stay on meta.
@pytest.mark.parametrize(
    ("made", "device"),
    [*product([renaming, Transposed, Joined, lazy], ["cpu", "meta"]), (forgiving, "cpu")],
)
def test_hooks_and_ways_of_their_own_are_torchs(tmp_path: Path, made: Any, device: str) -> None:
    arrays = {"a__weight": values(4, 8), "b__weight": values(1, 2)}
    weights = tensors_file(tmp_path / "m.gguf", **arrays)
    with torch.device(device):
        ours = made()
    theirs = made()
    found = api.load_state_dict(ours, weights)
    expected = theirs.load_state_dict({n: t.torch("float32") for n, t in weights.items()})
    assert found == expected
    for key, tensor in theirs.state_dict().items():
        if not key.startswith("more"):
            assert torch.equal(ours.state_dict()[key], tensor), key


def test_extra_state_is_handed_on(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.ones(4, 8), "b.weight": torch.ones(1, 2)}
    save_file(tensors, str(tmp_path / "m.safetensors"))
    with (
        api.open(tmp_path / "m.safetensors") as weights,
        pytest.raises(StateDictError, match=r'Missing key\(s\).*"_extra_state"'),
    ):
        api.load_state_dict(Keeps(), weights)
    tensors["_extra_state"] = torch.arange(3)
    save_file(tensors, str(tmp_path / "m.safetensors"))
    module = Keeps()
    with api.open(tmp_path / "m.safetensors") as weights:
        api.load_state_dict(module, weights)
    module.kept += 1  # memory of its own
    assert module.kept.tolist() == [1, 2, 3]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counters_that_old_files_lack(tmp_path: Path, device: str) -> None:
    """torch adds BatchNorm's to a state without a version."""
    arrays = {"weight": values(3), "bias": values(3), "running_mean": values(3)}
    weights = tensors_file(tmp_path / "m.gguf", **arrays, running_var=values(3))
    with torch.device(device):
        module = torch.nn.BatchNorm1d(3)
    assert str(api.load_state_dict(module, weights)) == "<All keys matched successfully>"
    assert module.num_batches_tracked.item() == 0
    assert torch.equal(module.running_mean, torch.from_numpy(values(3)))


class Derives(Layer):
    """Computes something from what it has just loaded."""

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.total = self.scale.sum()

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(2))


def by_hook() -> Any:
    module = Layer()
    module.scale = torch.nn.Parameter(torch.zeros(2))
    module.register_load_state_dict_post_hook(lambda one, _: setattr(one, "total", one.scale.sum()))
    return module


@pytest.mark.parametrize("made", [Derives, by_hook])
def test_computing_with_what_was_just_loaded_is_refused(tmp_path: Path, made: Any) -> None:
    arrays = {"a__weight": values(4, 8), "b__weight": values(1, 2), "scale": values(2)}
    weights, module = tensors_file(tmp_path / "m.gguf", **arrays), made()
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(StateDictError, match="computes with parameters that were just loaded"):
        api.load_state_dict(module, weights)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[key])


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
    with torch.device("meta"):
        module = torch.nn.ModuleDict({"a": torch.nn.Embedding(4, 8), "x": kind()})
    with pytest.raises(StateDictError, match="left on the meta device") as caught:
        api.load_state_dict(module, weights, strict=False)
    names = ["weight", "kept"] if kind is Hidden else ["one", "two"]
    assert caught.value.missing == [f"x.{name}" for name in names]
    assert {one.device.type for one in (*module.parameters(), *module.buffers())} == {"meta"}


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
    "uninitialized": (lambda: torch.nn.LazyLinear(4).weight, "uninitialized parameter"),
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
    with pytest.raises(StateDictError, match=rf"copying the parameter named \"a.weight\".*{said}"):
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
