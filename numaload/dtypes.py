"""What numpy and torch call the types of GGUF and safetensors that are not made of blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from numaload.errors import UnsupportedTypeError, UsageError

if TYPE_CHECKING:
    import numpy as np

# {type in a file: its name in torch, and in numpy or ml_dtypes}
NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
    "F4": "float4_e2m1fn_x2",
}  # fmt: skip
# What kernels write. To everything else it is converted elementwise.
KERNEL_DTYPES = ("float32", "float16", "bfloat16")
ITEMS = {"F4": 2}  # elements in one item of torch


def item_shape(type_name: str, shape: tuple[int, ...], what: str) -> tuple[int, ...]:
    """Return a tensor's shape as torch counts it: its items may hold several elements (F4: 2).

    Raises: UnsupportedTypeError.
    """
    each = ITEMS.get(type_name, 1)
    if each == 1 or not shape:
        return shape
    if shape[-1] % each:
        raise UnsupportedTypeError(
            f"tensor {what!r}: {type_name} in rows of {shape[-1]}, which torch has in {each}s:"
            " buffer has the bytes"
        )
    return (*shape[:-1], shape[-1] // each)


def dtype_name(dtype: Any) -> str:
    """Return the name of a dtype of torch, numpy or ml_dtypes; names pass. Raises: UsageError."""
    name = str(dtype)
    if isinstance(dtype, str) or name.startswith("torch."):
        return name.removeprefix("torch.")
    import numpy as np

    try:
        return str(np.dtype(dtype).name)
    except TypeError:
        raise UsageError(f"dtype {dtype!r}: expected a name or a dtype") from None


def kernel_dtype(name: str) -> str:
    """Return what a kernel makes on the way to a dtype: itself where it can, else float32."""
    return name if name in KERNEL_DTYPES else "float32"


def is_torch(dtype: Any) -> bool:
    return not isinstance(dtype, str) and str(dtype).startswith("torch.")


def is_float(type_name: str) -> bool:
    return NAMES.get(type_name, "").startswith(("float", "bfloat"))


def numpy_dtype(name: str, what: str) -> np.dtype[Any]:
    """Return numpy's dtype of a name. Raises: UnsupportedTypeError where there is none."""
    import ml_dtypes
    import numpy as np

    found = getattr(ml_dtypes, name, None) or getattr(np, name + "_" * (name == "bool"), None)
    try:
        return np.dtype(found or "?" * 2)
    except TypeError:
        raise UnsupportedTypeError(f"{what}: numpy has no dtype {name!r}") from None
