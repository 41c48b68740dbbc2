"""Object files to functions that can be called, through llvmlite's linker and without numba."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm

from numaload.kernels.target import machine

# numba's calling convention: (where the result goes, where an exception would go, the arguments):
# (address of blocks, address of floats, n_blocks, past the caches). ctypes gives up the GIL.
PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
)


class Function:
    """A linked kernel: (address of blocks, address of floats, n_blocks, past the caches)."""

    def __init__(self, code: bytes, name: str) -> None:
        """Raises: ValueError, RuntimeError if it is no object file or has no such function."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        address = engine.get_function_address(name)
        if not address:
            raise ValueError(f"no function {name} in the object file")
        self._engine = engine  # the code lives as long as it does
        self._call = PROTOTYPE(address)

    def __call__(self, blocks: int, floats: int, n_blocks: int, past_caches: int) -> None:
        done, exception = ctypes.c_int64(), ctypes.c_void_p()
        status = self._call(
            ctypes.byref(done), ctypes.byref(exception), blocks, floats, n_blocks, past_caches
        )
        if status or done.value != n_blocks:
            raise RuntimeError(f"a kernel ended with {status} after {done.value} blocks")
