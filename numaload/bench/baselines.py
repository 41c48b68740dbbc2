"""What kernels are compared with: the conversions of ggml and of gguf-py.

Source of ggml's names: ggml-quants.h and ggml.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from numaload.errors import ReadError
from numaload.formats.qtypes import BLOCKS, QuantType

LIBRARY = "libggml-base.so"
ROWS = {QuantType.F16: "ggml_fp16_to_fp32_row", QuantType.BF16: "ggml_bf16_to_fp32_row"}
COLUMNS = 4096  # of the tensor: gguf-py works on 16 rows at a time
# (address of blocks, address of floats, number of floats)
Convert = Callable[[int, int, int], None]


def installed() -> str | None:
    """Find the library of an installed llama-cpp-python, without importing that."""
    spec = find_spec("llama_cpp")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, "lib", LIBRARY)
        if os.path.exists(path):
            return path
    return None


class Ggml:
    """ggml-base as a shared library. Raises: ReadError."""

    def __init__(self, path: str) -> None:
        self.path = str(Path(path).resolve())
        try:
            self._library = ctypes.CDLL(self.path)
        except (OSError, ValueError) as error:  # ValueError: a path that is no text
            raise ReadError(f"it cannot be loaded as {LIBRARY}: {error}", path=path) from error
        if self.convert(QuantType.Q8_0) is None:  # every ggml has it
            name = self.function_name(QuantType.Q8_0)
            raise ReadError(f"it has no {name}: expected a {LIBRARY}", path=path)

    @staticmethod
    def function_name(qtype: QuantType) -> str:
        return ROWS.get(qtype) or f"dequantize_row_{qtype.name.lower().replace('_k', '_K')}"

    def convert(self, qtype: QuantType) -> Convert | None:
        """Return its function for a type; None for F32, and for types newer than it."""
        try:
            function = self._library[self.function_name(qtype)]
        except AttributeError:
            return None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
        convert: Convert = function
        return convert


def known_to_gguf(qtype: QuantType) -> bool:
    """Return whether gguf-py converts a type. It only looks at F32 in another way."""
    known = gguf.GGMLQuantizationType.__members__.get(qtype.name)
    return known in gguf.quants._type_traits or qtype is QuantType.F16  # noqa: SLF001


def by_gguf(blocks: NDArray[np.uint8], qtype: QuantType) -> Any:
    """Convert blocks (n, type_size), as rows of COLUMNS weights."""
    rows = blocks.reshape(-1, COLUMNS // BLOCKS[qtype][0] * BLOCKS[qtype][1])
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(qtype.value))
