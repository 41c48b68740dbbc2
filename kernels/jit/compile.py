"""Compile a kernel's Python functions to an object file. Only this module runs numba.

The code is a plain C function without references to Python or numba, so that `objects.py` can link
it in a process that imports neither.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from numba import njit, types
from numba.extending import register_jitable

from numaload.kernels import lanes
from numaload.kernels.jit import SettingError
from numaload.kernels.jit import halves as _registers_conversions  # noqa: F401
from numaload.kernels.jit import lowering as _registers_the_words  # noqa: F401
from numaload.kernels.jit.target import machine
from numaload.kernels.loops import Parts, build_loop

# No wrappers for calls from Python, which would refer to Python. parallel=True, for one, aborts the
# process when two threads enter; fastmath would change results.
OPTIONS = {
    "nogil": True,
    "fastmath": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
OUTPUTS = {"float32": types.float32, "float16": types.uint16, "bfloat16": types.uint16}


def compile_kernel(name: str, dtype: str, parts: Parts) -> bytes:
    """Return an object file whose function ``name`` takes what `objects.Function` says.

    Raises: SettingError; anything else is a defect of the parts.
    """
    _teach_helpers()
    compiled = njit(**OPTIONS)(build_loop(parts, _inlined))
    if not hasattr(compiled, "compile"):
        raise SettingError(
            "numba's JIT is off, by its configuration: with NUMBA_DISABLE_JIT=1 kernels run without"
        )
    arguments = (types.CPointer(types.uint8), types.CPointer(OUTPUTS[dtype]))
    scales = types.CPointer(types.float32)
    compiled.compile((*arguments, types.int64, types.int64, scales))
    (text,) = compiled.inspect_llvm().values()
    (result,) = compiled.overloads.values()
    return _emit(text, result.fndesc.llvm_func_name, name)


def _inlined(function: Any) -> Any:
    """Make a function callable for compiled code; the words of `lanes.py` already are."""
    if function.__module__ == lanes.__name__:
        return function
    return njit(forceinline=True, **OPTIONS)(function)


_taught: set[Callable[..., Any]] = set()


def _teach_helpers() -> None:
    for function in lanes.HELPERS:
        if function not in _taught:
            register_jitable(forceinline=True)(function)
            _taught.add(function)


def _emit(text: str, function: str, name: str) -> bytes:
    """Return machine code of LLVM's language, with ``function`` as ``name``."""
    module = llvm.parse_assembly(text)
    module.get_function(function).name = name
    code: bytes = machine().emit_object(module)
    return code
