"""Object files to functions that can be called, through llvmlite's linker and without numba."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import llvmlite.binding as llvm

from numaload.forks import compiling
from numaload.kernels import fromfile
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


# What `fromfile.py` describes.
FROM_FILE = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int,
    *[ctypes.c_int64] * 5,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int64,
)


class _Linked:
    """``address`` of a function in an object file, which lives as long as this does."""

    def __init__(self, code: bytes, name: str) -> None:
        """Raises: ValueError, RuntimeError if it is no object file or has no such function."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self.address: int = engine.get_function_address(name)
        if not self.address:
            raise ValueError(f"no function {name} in the object file")
        self._engine = engine


@cache
def _from_file() -> tuple[_Linked, Callable[..., int]]:
    with compiling:
        linked = _Linked(fromfile.object_code(), fromfile.NAME)
    return linked, FROM_FILE(linked.address)


class Function(_Linked):
    """A linked kernel: (address of blocks, address of floats, n_blocks, past the caches)."""

    def __init__(self, code: bytes, name: str) -> None:
        """Raises: ValueError, RuntimeError if it is no object file or has no such function."""
        super().__init__(code, name)
        self._call = PROTOTYPE(self.address)

    def from_file(self, fd: int, offset: int, nbytes: int, *how: int) -> int:
        """Bytes of a file that were read and converted; see `fromfile.py` for the rest of it."""
        _, call = _from_file()
        return call(self.address, fd, offset, nbytes, *how)

    def __call__(self, blocks: int, floats: int, n_blocks: int, past_caches: int) -> None:
        done, exception = ctypes.c_int64(), ctypes.c_void_p()
        status = self._call(
            ctypes.byref(done), ctypes.byref(exception), blocks, floats, n_blocks, past_caches
        )
        if status or done.value != n_blocks:
            raise RuntimeError(f"a kernel ended with {status} after {done.value} blocks")
