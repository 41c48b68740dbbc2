"""Tensors of torch, whichever call gave them, have a storage of their own bytes.

torch.save, pickle and deepcopy take the storage, and safetensors refuses to save shared ones.
"""

from __future__ import annotations

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from numaload.backends.kt_kernel.loader import Loader
from numaload.backends.ktransformers import GGUFLoader
from typed_models import numbers, write

torch = pytest.importorskip("torch")
safetensors = pytest.importorskip("safetensors.torch")
pytestmark = pytest.mark.filterwarnings("ignore:.*share read-only memory")


def by_torch(path: str) -> dict[str, Any]:
    return {name: tensor.torch() for name, tensor in api.open(path).items()}


def by_copy(path: str) -> dict[str, Any]:
    return {name: tensor.torch() for name, tensor in api.open(path, copy=True).items()}


def by_replica(path: str) -> dict[str, Any]:
    with api.mirror(path, shared=True) as mirror:
        return {name: tensor.torch() for name, tensor in mirror.local().items()}


def converted(path: str) -> dict[str, Any]:
    return {name: tensor.torch("float32") for name, tensor in api.open(path).items()}


def streamed(path: str) -> dict[str, Any]:
    with api.open(path) as weights:
        return dict(api.stream(weights, torch.bfloat16))


def as_in_the_file(path: str) -> dict[str, Any]:
    with api.open(path) as weights:
        return dict(api.stream(weights, "torch"))


def parameters(path: str) -> dict[str, Any]:
    with torch.device("meta"):
        module = torch.nn.ParameterDict({n: torch.nn.Parameter(torch.empty(s)) for n, s in SIZES})
    with api.open(path) as weights:
        api.load_state_dict(module, weights)
    return dict(module.state_dict())


def by_ktransformers(path: str) -> dict[str, Any]:
    loader = GGUFLoader(os.path.dirname(path))
    return {name: loader.get_undequanted_tensor_and_ggml_type(name)[0] for name, _ in SIZES}


def by_kt_kernel(path: str) -> dict[str, Any]:
    loader = Loader([api.open(path)])
    return {name: loader.get_undequanted_tensor_and_ggml_type(name)[0] for name, _ in SIZES}


SIZES = [("small", (4,)), ("large", (1100, 512)), ("last", (3, 8))]
WAYS = [by_torch, by_copy, by_replica, converted, streamed, as_in_the_file, parameters,
        by_ktransformers, by_kt_kernel]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_what_is_saved_or_copied_is_one_tensor_s_bytes(
    tmp_path: Path, store: Path, way: Callable[[str], dict[str, Any]]
) -> None:
    """Not those of all the file around it, whichever call gave the tensor."""
    tensors = way(
        write(tmp_path / "m.gguf", {name: numbers("F32", shape) for name, shape in SIZES})
    )
    for name, _ in SIZES:
        tensor = tensors[name]
        saved, nbytes = io.BytesIO(), tensor.nbytes
        torch.save(tensor, saved)
        assert nbytes < len(saved.getvalue()) < nbytes + 4096, name
        assert nbytes < len(pickle.dumps(tensor)) < nbytes + 4096
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)  # noqa: S301
        copied = copy.deepcopy(tensor)
        assert torch.equal(copied, tensor)
        assert copied.untyped_storage().nbytes() == tensor.untyped_storage().nbytes() == nbytes
    safetensors.save_file(dict(tensors), tmp_path / "out.safetensors")
    for name, tensor in safetensors.load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, tensors[name])
