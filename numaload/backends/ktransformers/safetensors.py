"""Classic ktransformers' SafeTensorLoader over numaload's weights.

The contract is the class of that name in ``ktransformers/util/custom_loader.py``. Where it differs:
a damaged file is an error, not a line of print and keys that are missing later; of two files of one
name the second counts too; scaled FP8 becomes float on the CPU as well.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload import torch_memory
from numaload.backends.ktransformers.folder import FolderLoader, Replica
from numaload.backends.ktransformers.names import translate_name_to_gguf
from numaload.dtypes import NAMES, item_shape, numpy_dtype
from numaload.errors import (
    ModelNotFoundError,
    TensorInfoError,
    TensorNotFoundError,
    UnsupportedTypeError,
)
from numaload.files.source import SourceFile
from numaload.formats.qtypes import QuantType
from numaload.formats.safetensors import parse_header
from numaload.pipeline import Target, fill
from numaload.weights import Tensor, Weights
from numaload.weights.model import Part
from numaload.weights.opening import read_header
from numaload.weights.scales import CONFIG, Companions

PROJECTIONS = ("up", "gate", "down")
GATE = ("weight", "e_score_correction_bias")


class SafeTensorLoader(FolderLoader):
    """Read every safetensors file below a folder.

    ``tensor_file_map``: {tensor: file}; ``file_handle_map``: {file: its Weights}. A file is named
    by its base name, or by its path below the folder where two files share that.
    """

    suffix = ".safetensors"

    def __init__(self, file_path: str | os.PathLike[str], *, replica: Replica = None) -> None:
        """file_path: the folder, or a file in it. replica: as of GGUFLoader.

        Raises: ModelNotFoundError (a FileNotFoundError), the FormatErrors of a header, UsageError.
        A folder without safetensors files is no error: ``tensor_file_map`` is empty.
        """
        super().__init__(file_path)
        self.tensor_type_map: dict[str, Any] = {}  # empty in the original, too
        self.file_handle_map: dict[str, Weights] = {}
        for weights in self._open_all(replica):
            self._add(weights)

    def _open_file(self, path: str) -> Weights:
        """Open one file, whatever its name and index say of others: merge scripts count from 0."""
        file = SourceFile(path)
        try:
            return Weights([Part(file, read_header(file, parse_header))])
        except BaseException:
            file.close()
            raise

    def _add(self, weights: Weights) -> None:
        files = [self._file(path) for path in weights.paths]
        self.file_handle_map.update(dict.fromkeys(files, weights))
        for name, tensor in weights.items():
            self.tensor_file_map[name] = files[tensor.place_in_files[0]]

    def _file(self, path: str) -> str:
        name = os.path.basename(path)
        return os.path.relpath(path, self.folder) if name in self.file_handle_map else name

    def has_tensor(self, name: str) -> bool:
        return self._key(name) is not None

    def load_tensor(self, key: str, device: str = "cpu") -> Any:
        """Return a tensor in the type that it has, in memory of its own.

        Raises: TensorNotFoundError (a KeyError), ModelNotFoundError after ``close_all_handles``.
        """
        return _copied([self._find(key)])[0].to(device)

    def load_dequantized_tensor(self, key: str, device: str = "cpu") -> Any:
        """Return the same; weights whose scales are in any file as torch's default float type.

        Raises: UnsupportedTypeError for scales that are not known, or of other shapes.
        """
        tensor = self._find(key)
        is_scaled = f"{tensor.name}_scale_inv" in self.tensor_file_map
        scales = self._companions.of(tensor) if is_scaled else None
        if scales is None:
            return self.load_tensor(key, device)
        dtype = torch_memory.import_torch().get_default_dtype()
        return tensor.scaled_by(scales).torch(dtype, device)

    @cached_property
    def _companions(self) -> Companions:
        """Look for scales in all files: a model's weights and scales may be in different ones."""
        files = self.tensor_file_map.items()
        tensors = {name: self.file_handle_map[file][name] for name, file in files}
        return Companions(tensors, os.path.join(self.folder, CONFIG))

    def load_experts(self, key: str, device: str = "cpu") -> dict[str, Any]:  # noqa: ARG002
        """Return {"up", "gate", "down": numpy arrays, "up_type" and so on: the type's id in GGML}.

        key: of files that ktransformers' merge scripts wrote, the layer: blocks, zero-copy; else
        the experts, "model.layers.3.mlp.experts": floats of 16 bits as uint16, (experts, ...).
        Both in CPU memory, whatever the device. Raises: ModelNotFoundError, TensorNotFoundError,
        UnsupportedTypeError.
        """
        layer = translate_name_to_gguf(key)
        if self.has_tensor(f"{layer}.ffn_gate_exps.weight"):
            return self._merged(layer)
        short = self.has_tensor(f"{key}.0.up.weight")
        ending = ".weight" if short else "_proj.weight"
        count = 0
        while self.has_tensor(f"{key}.{count}.up{ending}"):
            count += 1
        if not count:
            message = f"found no experts {key!r} in the files below"
            raise ModelNotFoundError(message, path=self.folder)
        found: dict[str, Any] = {}
        for name in PROJECTIONS:
            names = [f"{key}.{number}.{name}{ending}" for number in range(count)]
            found[name], found[f"{name}_type"] = self._stacked(names)
        return found

    def _merged(self, layer: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in PROJECTIONS:
            stem = f"{layer}.ffn_{name}_exps"
            found[name] = _array(self._find(f"{stem}.weight"))
            found[f"{name}_type"] = _array(self._find(f"{stem}.ggml_type")).item()
        return found

    def _stacked(self, names: list[str]) -> tuple[NDArray[np.uint16], QuantType]:
        first = self._find(names[0])
        if first.type_name not in {"F32", "F16", "BF16"}:
            raise UnsupportedTypeError(f"{first.name}: {first.type_name} experts have no GGML type")
        tensors = [self._find(name) for name in names]
        for tensor in tensors:
            if (tensor.shape, tensor.type_name) != (first.shape, first.type_name):
                raise TensorInfoError(
                    f"tensor {tensor.name!r}: {tensor.type_name} {tensor.shape}, expected as"
                    f" {first.name!r}: {first.type_name} {first.shape}",
                    path=tensor.path,
                )
        torch = torch_memory.import_torch()
        stacked = _copied(tensors).view(torch.uint16)
        return stacked.numpy(), first.qtype

    def load_gate(self, key: str, device: str = "cpu") -> dict[str, Any]:
        """Return {"weight", "e_score_correction_bias": tensor, or None where there is none}."""
        names = {what: f"{key}.{what}" for what in GATE}
        return {
            what: self.load_tensor(name, device) if self.has_tensor(name) else None
            for what, name in names.items()
        }

    def close_all_handles(self) -> None:
        """Let go of the files. Arrays stay valid; replicas are the caller's."""
        self._close_files()
        self.file_handle_map.clear()

    def _key(self, name: str) -> str | None:
        names = (translate_name_to_gguf(name), name)
        return next((one for one in names if one in self.tensor_file_map), None)

    def _find(self, name: str) -> Tensor:
        key = self._key(name)
        if key is None:
            raise TensorNotFoundError(name, self.tensor_file_map)
        file = self.tensor_file_map[key]
        if file not in self.file_handle_map:
            raise ModelNotFoundError(f"{file} was closed", path=self.folder)
        return self.file_handle_map[file][key].as_stored()


def _array(tensor: Tensor) -> NDArray[Any]:
    """View a tensor's numbers, zero-copy, read-only."""
    dtype = numpy_dtype(NAMES[tensor.type_name], tensor.name)
    return np.frombuffer(tensor.buffer, dtype).reshape(tensor.shape)


def _copied(tensors: Sequence[Tensor]) -> Any:
    """Copy tensors of one type and shape into one of (tensors, *shape), by threads of their node.

    What a program is given to keep is its own to write to: the file's memory is not.
    """
    first = tensors[0]
    first.check_type()
    shape = item_shape(first.type_name, first.shape, first.name)
    out = torch_memory.new(
        (len(tensors), *shape), torch_memory.torch_type(first.type_name), first.name
    )
    arrays = map(torch_memory.array_of, out)
    fill([Target(*one, None) for one in zip(tensors, arrays, strict=True)])
    return out
