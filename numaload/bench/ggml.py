"""ggml's own conversions, as a baseline, from a library that is installed or named.

Source of the names: ggml-quants.h and ggml.h of llama.cpp.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from numaload.errors import ReadError
from numaload.formats.qtypes import QuantType

LIBRARY = "libggml-base.so"
ROWS = {QuantType.F16: "ggml_fp16_to_fp32_row", QuantType.BF16: "ggml_bf16_to_fp32_row"}
# (address of blocks, address of floats, number of floats)
Convert = Callable[[int, int, int], None]


def installed() -> str | None:
    """The library of an installed llama-cpp-python, without importing that."""
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

    @staticmethod
    def function_name(qtype: QuantType) -> str:
        return ROWS.get(qtype) or f"dequantize_row_{qtype.name.lower().replace('_k', '_K')}"

    def convert(self, qtype: QuantType) -> Convert | None:
        """Its function for a type, None where it has none: F32, and types newer than it."""
        try:
            function = self._library[self.function_name(qtype)]
        except AttributeError:
            return None
        function.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        function.restype = None
        convert: Convert = function
        return convert
