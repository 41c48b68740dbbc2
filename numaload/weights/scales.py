"""Scales in tensors of their own: which belong to which weights, and what they are.

=================  ==============================  ===============================================
layout             numbers, in the file            scales
=================  ==============================  ===============================================
NVFP4 of GGUF      X.weight, blocks                X.scale or X.weight.scale: one, or of an expert
block FP8          X.weight (.., rows, columns)    X.weight_scale_inv, one a block of the matrix
MXFP4 of gpt-oss   X_blocks (E, rows, n, 16)       X_scales (E, rows, n): X is (E, 32 n, rows)
NVFP4 of ModelOpt  X.weight (.., rows, columns/2)  X.weight_scale (.., rows, columns/16), and
                                                   X.weight_scale_2: one, or of an expert
=================  ==============================  ===============================================

A weight is number * scale, or, of ModelOpt's, number * (scale * scale_2), each step in float32.
``input_scale`` is for activations: no weight is multiplied by it. Sources: llama.cpp, src/llama-
graph.cpp, build_lora_mm; transformers, integrations/finegrained_fp8.py and mxfp4.py; ModelOpt,
NVFP4QTensor.dequantize. What has other scales is no weight without them, and refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

from numaload.errors import FormatError, ReadError, UnsupportedTypeError
from numaload.formats.qtypes import FLOATS, QuantType
from numaload.kernels.registry import SCALED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from numaload.weights.tensor import Tensor

    Floats = NDArray[np.float32]
# Types whose numbers may want scales. Integers of 64 bits are none.
PACKED = {
    "U8", "I8", "I32", "F4", "F6_E2M3", "F6_E3M2",
    "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ",
}  # fmt: skip
# What a name ends with that is no weight but belongs to one.
COMPANION = re.compile(r"scale|zero|absmax|quant_map|quant_state|g_idx|SCB|codebook", re.IGNORECASE)
# {part of the name of the weight or of a companion: who writes such files}
WRITERS = {
    "weight_packed": "compressed-tensors",
    "qweight": "GPTQ or AWQ",
    "absmax": "bitsandbytes",
    "SCB": "bitsandbytes",
}
CONFIG = "config.json"
MOST_CONFIG = 16 << 20  # bytes
USUAL = 128  # rows and columns of a block of FP8, where no config says it


class Shape(NamedTuple):
    """Matrices in the order of the file, one after another."""

    experts: int
    rows: int
    columns: int


class Block(NamedTuple):
    """The weights that one scale is for: so many rows and columns."""

    rows: int
    columns: int


class Scales:
    """The scales of one tensor.

    code: of the kernel. title: what users call the layout. block: weights of one of ``scale``.
    factor: one more scale, of all weights or of an expert. turned: weights are given transposed.
    """

    def __init__(
        self,
        code: str,
        title: str,
        shape: Shape,
        block: Block,
        scale: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None:
        self.code, self.title, self.shape, self.block = code, title, shape, block
        self.scale, self.factor, self.turned = scale, factor, code == "e2m1_doubled_by_32"
        self._factors: Floats | None = None
        self.columns, self._group = shape.columns, SCALED[code].group
        self._step = SCALED[code].weights
        self._groups = -(-shape.columns // self._step) * self._step // self._group  # of a row

    @property
    def names(self) -> list[str]:
        """Return the names of the tensors that the weights are multiplied by."""
        return [one.name for one in (self.scale, self.factor) if one is not None]

    def take(self, first: int, count: int) -> Floats:
        """Return the scale of each group of weights, of those from number ``first`` of the file.

        What is no whole number of a kernel's steps in a row is counted as if it were: then both
        must be whole rows.
        Raises: UnsupportedTypeError for a factor that is no number; ReadError, FileChangedError,
        ClosedError.
        """
        import numpy as np

        _, rows, columns = self.shape
        lines = -(-rows // self.block.rows)  # of scales, of a matrix
        start, stop = first // columns, -(-(first + count) // columns)
        row = np.arange(start, stop)
        line = row // rows * lines + row % rows // self.block.rows
        low, high = (int(line[0]), int(line[-1]) + 1) if row.size else (0, 0)
        table: Floats = self._table(low, high)
        if self.factor is not None:
            factors = self.factors()
            expert = np.arange(low, high) // lines if factors.size > 1 else np.zeros(1, int)
            table = table * factors[expert, None]
        if self.block.columns != self._group or table.shape[1] != self._groups:
            column = np.arange(self._groups) * self._group // self.block.columns
            table = table[:, np.minimum(column, table.shape[1] - 1)]
        if self.block.rows > 1:
            table = table[line - low]
        skip = (first - start * columns) // self._group
        size = count // columns * self._groups if columns % self._step else count // self._group
        return np.ascontiguousarray(table).reshape(-1)[skip : skip + size]

    def _table(self, low: int, high: int) -> Floats:
        """Return lines of scales, (high - low, scales of a line)."""
        import numpy as np

        if self.scale is None:
            return np.ones((high - low, 1), np.float32)
        each = -(-self.columns // self.block.columns)
        item = self.scale.nbytes // max(1, self.scale.size)
        raw = self.scale.fetch(low * each * item, (high - low) * each * item)
        kind = self.title if self.turned else self.scale.type_name
        return _as_floats(raw, kind).reshape(high - low, each)

    def factors(self) -> Floats:
        """Return one factor, or one of each expert. Raises: UnsupportedTypeError, ReadError."""
        import numpy as np

        if self._factors is None:
            factor = self.factor
            assert factor is not None  # noqa: S101 - the caller looked
            found = _as_floats(factor.fetch(0, factor.nbytes), factor.type_name)
            if not np.isfinite(found).all():
                raise UnsupportedTypeError(
                    f"tensor {factor.name!r}: expected finite factors of weights, found"
                    f" {found[~np.isfinite(found)][0]}"
                )
            self._factors = found
        return self._factors


@lru_cache
def _values(kind: str) -> Floats:
    """Return the value of each byte as a scale. kind: the type, or MXFP4, whose kernel doubles."""
    import ml_dtypes
    import numpy as np

    byte = np.arange(256, dtype=np.uint8)
    values: NDArray[Any] = byte.view(ml_dtypes.float8_e4m3fn)
    if kind != "F8_E4M3":  # the exponent of a power of 2
        values = np.ldexp(1.0, np.arange(256) - (128 if kind == "MXFP4" else 127))
    if kind == "F8_E8M0":
        values[255] = np.nan
    with np.errstate(over="ignore"):  # 2^128 of plain bytes is infinite
        return values.astype(np.float32)


def _as_floats(raw: NDArray[np.uint8], kind: str) -> Floats:
    import numpy as np

    if kind == "F32":
        return raw.view("<f4")
    if kind == "F16":
        return raw.view("<f2").astype(np.float32)
    if kind == "BF16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return _values(kind)[raw]


class Companions:
    """All tensors of a model, looked through once for what has scales somewhere else.

    config: the path of the model's config.json, which may be missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor], config: str) -> None:
        self.tensors, self._config = tensors, config
        self._block: Block | None = None
        self._asked = False
        # {module: one of its tensors that is no weight but belongs to one}
        self.of_module: dict[str, str] = {}
        self.has_inverse = False
        for name in tensors:
            module, _, leaf = name.rpartition(".")
            if COMPANION.search(leaf):
                self.of_module.setdefault(module, name)
                self.has_inverse = self.has_inverse or leaf.endswith("_scale_inv")

    def of(self, tensor: Tensor) -> Scales | None:
        """Return a tensor's scales; None where it needs none.

        Raises: UnsupportedTypeError, saying why, where its numbers have some that are not known.
        """
        stored = tensor.as_stored()
        if stored.type_name == QuantType.NVFP4.name:
            return self._gguf(stored)
        module, _, leaf = stored.name.rpartition(".")
        if COMPANION.search(leaf) or not stored.size:
            return None
        make = self._known(stored)
        if make is not None:
            return make(stored)
        found = self.of_module.get(module) or self.of_module.get(stored.name)
        if found is not None or leaf in ("qweight", "weight_packed"):
            known = (who for part, who in WRITERS.items() if part in leaf or part in str(found))
            by = next(known, "an unknown layout")
            raise _refused(stored, f"how {found or 'its scale'} is applied is not known ({by})")
        return None

    def _known(self, stored: Tensor) -> Callable[[Tensor], Scales] | None:
        name, known = stored.name, self.tensors.keys()
        if stored.type_name == "U8":
            if name.endswith("_blocks") and len(stored.shape) == 4:
                return self._mxfp4
            return self._nvfp4 if {f"{name}_scale", f"{name}_scale_2"} <= known else None
        is_fp8 = f"{name}_scale_inv" in known or self.has_inverse
        return self._fp8 if is_fp8 and stored.type_name == "F8_E4M3" else None

    def activations(self, tensor: Tensor) -> list[str]:
        """Return the names of scales that only whoever quantizes activations needs."""
        stem = tensor.name.removesuffix(".weight")
        known = (f"{stem}.{one}" for one in ("input_scale", "activation_scale"))
        return [one for one in known if one in self.tensors]

    def _gguf(self, stored: Tensor) -> Scales | None:
        name = stored.name
        spellings = {f"{name.removesuffix('.weight')}.scale", f"{name}.scale"}
        found = [self.tensors[one] for one in sorted(spellings) if one in self.tensors]
        if not found:
            return None
        if len(found) > 1:
            raise _refused(stored, f"{found[0].name} and {found[1].name} are both there")
        shape = _shape(stored, 1)
        _check_factor(stored, found[0], shape)
        block = Block(shape.rows, shape.columns)
        return Scales("nvfp4_by_64", "NVFP4", shape, block, factor=found[0])

    def _mxfp4(self, stored: Tensor) -> Scales:
        scale = self._scale(stored, f"{stored.name.removesuffix('_blocks')}_scales", {"U8"})
        *shape, nbytes = stored.shape
        if nbytes != 16 or scale.shape != tuple(shape):
            raise _unfit(stored, scale, f"{(*shape, 16)} and {tuple(shape)}")
        experts, rows, blocks = shape
        weights = Shape(experts, rows, 32 * blocks)
        return Scales("e2m1_doubled_by_32", "MXFP4", weights, Block(1, 32), scale)

    def _nvfp4(self, stored: Tensor) -> Scales:
        scale = self._scale(stored, f"{stored.name}_scale", {"F8_E4M3"})
        shape, factor = _shape(stored, 2), self.tensors[f"{stored.name}_scale_2"].as_stored()
        wanted = (*stored.shape[:-1], shape.columns // 16)
        if len(wanted) not in (2, 3) or scale.shape != wanted or shape.columns % 16:
            raise _unfit(stored, scale, "one for 16 weights of matrices")
        _check_factor(stored, factor, shape)
        return Scales("e2m1_by_16", "NVFP4", shape, Block(1, 16), scale, factor)

    def _fp8(self, stored: Tensor) -> Scales:
        kinds = {"F32", "F16", "BF16", "F8_E8M0", "U8"}
        scale, shape = self._scale(stored, f"{stored.name}_scale_inv", kinds), _shape(stored, 1)
        if scale.size == 1:  # of all matrices together
            shape = Shape(1, shape.experts * shape.rows, shape.columns)
            return Scales("e4m3_by_32", "FP8", shape, Block(shape.rows, shape.columns), scale)
        outer, own = stored.shape[:-2], scale.shape[:-2]
        if len(outer) > 1 or not len(stored.shape) == len(scale.shape) > 1 or own != outer:
            raise _unfit(stored, scale, "one for a block of each matrix")
        config = self.block_of_config()
        rows = _block_size(shape.rows, scale.shape[-2], config and config.rows)
        columns = _block_size(shape.columns, scale.shape[-1], config and config.columns)
        odd = columns and columns < shape.columns and columns % SCALED["e4m3_by_32"].group
        if not rows or not columns or odd:
            wanted = f"blocks of {USUAL}x{USUAL}, or a weight_block_size that fits in {CONFIG}"
            raise _unfit(stored, scale, f"{wanted}; columns in multiples of 32")
        return Scales("e4m3_by_32", f"FP8 {rows}x{columns}", shape, Block(rows, columns), scale)

    def _scale(self, stored: Tensor, name: str, types: set[str]) -> Tensor:
        found = self.tensors.get(name)
        if found is None:
            raise _refused(stored, f"{name} is missing")
        if found.type_name not in types:
            wanted = " or ".join(sorted(types))
            raise _refused(stored, f"{name} is {found.type_name}, expected {wanted}")
        return found.as_stored()

    def block_of_config(self) -> Block | None:
        """Return what the model's configuration says of blocks of FP8; None where it says nothing.

        Source: transformers, FineGrainedFP8Config.
        """
        if not self._asked:
            self._block, self._asked = _configured(self._config), True
        return self._block


def _refused(stored: Tensor, why: str) -> UnsupportedTypeError:
    return UnsupportedTypeError(
        f"tensor {stored.name!r}: {stored.type_name} that cannot become weights: {why};"
        " torch() and stream(dtype=None) give what is in the file"
    )


def _unfit(stored: Tensor, scale: Tensor, wanted: str) -> UnsupportedTypeError:
    shapes = f"{scale.name} of shape {scale.shape} for {stored.shape}"
    return _refused(stored, f"{shapes}, expected {wanted}")


def _check_factor(stored: Tensor, factor: Tensor, shape: Shape) -> None:
    if factor.type_name not in {one.name for one in FLOATS}:
        raise _refused(stored, f"{factor.name} is {factor.type_name}, expected a float")
    if factor.size not in (1, shape.experts):
        wanted = f"1 or one for each of {shape.experts} experts"
        raise _refused(stored, f"{factor.name} has {factor.size} factors, expected {wanted}")


def config_beside(path: str) -> str:
    return os.path.join(os.path.dirname(path), CONFIG)


def _configured(path: str) -> Block | None:
    from numaload.files.source import read_whole
    from numaload.formats.jsontext import parse_object

    if not os.path.exists(path):
        return None
    try:
        config: Any = parse_object(read_whole(path, MOST_CONFIG), path, FormatError)
    except (ReadError, FormatError):  # then shapes must tell
        return None
    for key in ("quantization_config", "weight_block_size"):
        config = config.get(key) if isinstance(config, dict) else None
    whole = isinstance(config, list) and len(config) == 2 and all(type(n) is int for n in config)
    return Block(*config) if whole and min(config) > 0 else None


def _block_size(size: int, count: int, configured: int | None) -> int | None:
    """Return how much of ``size`` each of ``count`` scales is for; None where nothing fits.

    A size that is not asked for by the configuration and is no power of two is taken for chance.
    """
    if count < 1:
        return None
    for one in (configured, USUAL):
        if one and -(-size // one) == count:
            return min(one, size)
    if count == 1:
        return size
    block, rest = divmod(size, count)
    return block if block and not rest and block & (block - 1) == 0 else None


def _shape(stored: Tensor, each: int) -> Shape:
    """Return what the tensor holds. each: weights of a byte, or of an element."""
    *outer, columns = stored.shape or (1,)
    rows = outer[-1] if outer else 1
    return Shape(prod(outer[:-1]), rows, columns * each)
