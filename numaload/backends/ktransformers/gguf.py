"""Classic ktransformers' GGUFLoader (0.2, 0.3, its archive) over numaload's weights.

The contract is ``ktransformers/util/custom_loader.py`` (``custom_gguf.py`` up to 0.3.1): the same
members, keys and value types. Where it differs, it is because the original fails there, or to say
what it does: ``target_dtype`` is honoured for every tensor, all 28 types become floats, files of
version 2 and big-endian ones are read, and files come in the order of their names.
"""

from __future__ import annotations

import os
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload import torch_memory
from numaload.backends.ktransformers.folder import FolderLoader, Replica
from numaload.backends.ktransformers.names import translate_name_to_gguf
from numaload.dequantize import as_output, dequantize_blocks, dtype_of
from numaload.dtypes import dtype_name, kernel_dtype
from numaload.errors import (
    FileChangedError,
    MetadataError,
    MetadataKeyError,
    ModelNotFoundError,
    TensorNotFoundError,
    UsageError,
)
from numaload.formats.metadata import MetadataArray
from numaload.formats.qtypes import BLOCKS
from numaload.weights import Tensor, Weights, open_weights

# Types that are numbers in tensor_info, all others being bytes.
NUMBERS: dict[str, type[np.generic]] = {
    "F32": np.float32, "F16": np.float16, "F64": np.float64,
    "I8": np.int8, "I16": np.int16, "I32": np.int32, "I64": np.int64,
}  # fmt: skip
# Rows of these, of llama, are in another order in GGUF: {part of the name: the count of heads}.
PERMUTED = {".attn_q.": "head_count", ".attn_k.": "head_count_kv"}


class GGUFLoader(FolderLoader):
    """Read every GGUF file below a folder: tensors by name, blocks zero-copy, floats in parallel.

    ``tensor_info``: {GGUF name: see ``_info``}; ``tensor_file_map``: {GGUF name: path};
    ``file_data_map``: {path: the whole file, flat uint8}; ``gguf_file_meta``: metadata as plain
    values. Where two files have the same tensor or key, the last file's counts. Arrays and
    addresses stay valid as long as this object lives, or until ``close()``.
    """

    suffix = ".gguf"

    def __init__(
        self,
        gguf_path: str | os.PathLike[str],
        quantize: str | None = None,  # noqa: ARG002 - for NPUs, as in the original
        *,
        replica: Replica = None,
    ) -> None:
        """gguf_path: the folder, or a file in it. replica: a Mirror (its nearest view) or a view,
        or several: files that they have are taken from their memory.

        Raises: ModelNotFoundError (a FileNotFoundError), the errors of numaload.open, UsageError.
        """
        super().__init__(gguf_path)
        self.gguf_path = self.folder
        self.tensor_info: dict[str, dict[str, Any]] = {}
        self.file_data_map: dict[str, NDArray[np.uint8]] = {}
        self._places: dict[str, tuple[Weights, Tensor]] = {}
        self._metadata: dict[str, Any] = {}
        for weights in self._open_all(replica):
            self._add(weights)
        if not self.file_data_map:
            raise ModelNotFoundError("no .gguf files here or below", path=self.folder)

    def load_gguf(self, file: Any) -> None:
        """Add an opened file, by its name, and its split siblings. Raises: FileChangedError."""
        weights = open_weights(file.name)
        self._opened.append(weights)
        status = os.fstat(file.fileno())
        if (status.st_dev, status.st_ino) not in [p.file.opened[:2] for p in weights.parts]:
            raise FileChangedError("its name leads to another file now", path=file.name)
        self._add(weights)

    def _add(self, weights: Weights) -> None:
        for part, (path, opened) in enumerate(zip(weights.paths, weights.parts, strict=True)):
            self.file_data_map[path] = np.frombuffer(weights.image(part), np.uint8)
            self._metadata.update(opened.header.metadata)
        for name, tensor in weights.items():
            part, _ = tensor.place_in_files
            self._places[name] = weights, tensor
            self.tensor_file_map[name] = tensor.path
            self.tensor_info[name] = _info(tensor, weights.parts[part].header.data_start)

    @cached_property
    def gguf_file_meta(self) -> dict[str, Any]:
        """Metadata as plain values, made when first asked for: vocabularies are long."""
        return {
            key: value.tolist() if isinstance(value, MetadataArray) else value
            for key, value in self._metadata.items()
        }

    def has_tensor(self, name: str) -> bool:
        return translate_name_to_gguf(name) in self._places

    def get_ggml_type(self, name: str) -> int:
        """Return the type's id. Raises: TensorNotFoundError, a KeyError."""
        found: int = self.tensor_info[self._find(name)[1].name]["ggml_type"]
        return found

    def get_mmap_tensor(self, name: str) -> NDArray[np.uint8]:
        """Return the blocks, flat, read-only, zero-copy: of the replica where there is one."""
        _, tensor = self._find(name)
        tensor.check_type()
        image = self.file_data_map[tensor.path]
        return image[tensor.offset : tensor.offset + tensor.nbytes]

    def get_undequanted_tensor_and_ggml_type(self, name: str) -> tuple[Any, int]:
        """Return the blocks as a flat uint8 torch tensor, zero-copy, and the type's id.

        Raises: UnsupportedTypeError for blocks whose factor is in another tensor.
        """
        _, tensor = self._find(name)
        tensor.check_alone()
        flat = torch_memory.mapped(tensor.memory(), torch_memory.torch_type("U8"), (tensor.nbytes,))
        return flat, self.get_ggml_type(name)

    def load_expert_tensor(
        self,
        name: str,
        data: NDArray[Any],
        expert_id: int,
        elements_per_expert: int,
        device: str = "cuda",
        target_dtype: Any = None,
    ) -> Any:
        """Return one expert's floats, ``shape[-2::-1]``, of blocks that ``get_mmap_tensor`` gave.

        target_dtype None: torch's default. Raises: TensorNotFoundError, UsageError, and
        UnsupportedTypeError for types that are no floats.
        """
        _, tensor = self._find(name)
        shape, code = tensor.shape[1:], tensor.code
        blocks = _expert(tensor, data, expert_id, elements_per_expert)
        wanted = torch_memory.torch_dtype(_dtype_name(target_dtype), name)
        made = kernel_dtype(dtype_name(wanted))
        kind = torch_memory.torch_dtype(made, name)
        with torch_memory.made(shape, kind, name, tensor.nodes) as out:
            flat = as_output(out, dtype_of(made), prod(shape))
            dequantize_blocks(
                blocks, code, dtype_of(made), flat, tensor.workers(),
                name=tensor.name, byte_order=tensor.byte_order,
                scales=tensor.scales, first=expert_id * elements_per_expert,
            )  # fmt: skip
        return out.to(device, wanted)

    def load_gguf_tensor(self, name: str, device: str = "cpu", target_dtype: Any = None) -> Any:
        """Return all of a tensor's floats, ``shape[::-1]``, in memory of its own.

        target_dtype None: torch's default. Of llama, attn_q and attn_k get the order of rows that
        transformers has. Raises: TensorNotFoundError, UnsupportedTypeError, MetadataError.
        """
        _, tensor = self._find(name)
        wanted = _dtype_name(target_dtype)
        values = tensor.torch(wanted)
        if not tensor.has_kernel and values.data_ptr() == tensor.address:
            values = values.clone()  # nothing was to be converted: this is the file's memory
        return self._unpermuted(tensor.name, values).to(device)

    def _unpermuted(self, name: str, values: Any) -> Any:
        key = next((key for part, key in PERMUTED.items() if part in name), None)
        if key is None or self._metadata.get("general.architecture") != "llama":
            return values
        heads, rows = self._heads(key), values.shape[0]
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise MetadataError(
                f"llama.attention.{key} is {heads!r}, {name!r} has {rows} rows: expected a number"
                " of heads whose rows come in pairs",
                path=self.tensor_file_map[name],
            )
        pairs = values.reshape(heads, rows // heads // 2, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)

    def _heads(self, key: str) -> Any:
        """Count heads as llama.cpp does: without a count of its own, attn_k has attn_q's."""
        keys = [f"llama.attention.{k}" for k in (key, PERMUTED[".attn_q."])]
        found = next((k for k in keys if k in self._metadata), None)
        if found is None:
            raise MetadataKeyError(keys[0], self._metadata)
        return self._metadata[found]

    def _find(self, name: str) -> tuple[Weights, Tensor]:
        translated = translate_name_to_gguf(name)
        if translated not in self._places:
            raise TensorNotFoundError(translated, self._places)
        return self._places[translated]

    def close(self) -> None:
        """Let go of the files. Arrays stay valid, addresses do not; replicas are the caller's."""
        self._close_files()


def _info(tensor: Tensor, data_start: int) -> dict[str, Any]:
    """Describe a tensor as ktransformers does: shape in GGUF order, np_dims as numpy sees it."""
    item_type = NUMBERS.get(tensor.type_name, np.uint8)
    numbers = tensor.type_name in NUMBERS or not tensor._info.known  # noqa: SLF001
    return {
        "ggml_type": tensor._info.type_id,  # noqa: SLF001
        "shape": list(tensor.dims),
        "bad_offset": tensor.offset - data_start,
        "offset": tensor.offset,
        "item_type": item_type,
        "item_count": tensor.nbytes // np.dtype(item_type).itemsize,
        "np_dims": tensor.shape if numbers else tensor.byte_shape,
    }


def _dtype_name(dtype: Any) -> str:
    torch = torch_memory.import_torch()
    return dtype_name(torch.get_default_dtype() if dtype is None else dtype)


def _expert(tensor: Tensor, data: NDArray[Any], number: int, elements: int) -> NDArray[np.uint8]:
    """Cut out one expert's blocks, as (blocks, bytes of a block). Raises: UsageError."""
    block_size, type_size = BLOCKS[tensor.qtype]
    what = f"{tensor.name}: expert {number} of {elements} elements"
    if elements % block_size or elements != prod(tensor.shape[1:]):
        raise UsageError(
            f"{what}, expected {prod(tensor.shape[1:])} in whole blocks of {block_size}"
        )
    nbytes = elements // block_size * type_size
    flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8)
    if not 0 <= number < max(1, flat.size // max(1, nbytes)) or flat.size < nbytes:
        raise UsageError(f"{what}, the data has {flat.size} bytes, {nbytes} for each")
    return flat[number * nbytes : (number + 1) * nbytes].reshape(-1, type_size)
