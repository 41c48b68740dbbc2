"""Which function turns which type into float32. Importing this table does not import numba."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload.formats.qtypes import QuantType

# (src, out, start, stop). Compiled code checks no bounds: shapes and range are the caller's duty.
Dequantize = Callable[[NDArray[np.uint8], NDArray[np.float32], int, int], None]
Narrow = Callable[[NDArray[np.float32], NDArray[np.uint16], int, int], None]

# {qtype: (module in this package, function)}
KERNELS: dict[QuantType, tuple[str, str]] = {
    QuantType.F16: ("floats", "dequantize_f16"),
    QuantType.BF16: ("floats", "dequantize_bf16"),
    QuantType.Q8_0: ("legacy", "dequantize_q8_0"),
    QuantType.Q4_K: ("kquants", "dequantize_q4_k"),
    QuantType.Q6_K: ("kquants", "dequantize_q6_k"),
}

# {name of the target dtype: (module in this package, function)}
NARROW: dict[str, tuple[str, str]] = {
    "float16": ("floats", "narrow_float16"),
    "bfloat16": ("floats", "narrow_bfloat16"),
}


def load(qtype: QuantType) -> Dequantize | None:
    """The kernel of a type, None if it has none. The first one of a family compiles or reads it."""
    kernel: Dequantize | None = _function(KERNELS.get(qtype))
    return kernel


def load_narrow(dtype_name: str) -> Narrow | None:
    """The kernel from float32 to ``"float16"`` or ``"bfloat16"``, None for any other name."""
    kernel: Narrow | None = _function(NARROW.get(dtype_name))
    return kernel


def _function(row: tuple[str, str] | None) -> Any:
    if row is None:
        return None
    module, name = row
    return getattr(import_module(f"{__package__}.{module}"), name)
