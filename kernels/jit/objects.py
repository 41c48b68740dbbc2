"""Compiled kernels as functions: taken from the cache or compiled, linked by llvmlite, called.

Nothing here imports numba, except to compile what the cache does not have.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import llvmlite.binding as llvm

from numaload.forks import compiling
from numaload.kernels.jit import cache as kept
from numaload.kernels.jit import loads
from numaload.kernels.jit.target import machine

if TYPE_CHECKING:
    from numaload.kernels.loops import Parts

# numba's calling convention: (where the result goes, where an exception would go, the arguments):
# (address of blocks, address of floats, n_blocks, past the caches, address of scales or 0). ctypes
# gives up the GIL.
PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.POINTER(ctypes.c_int64),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int64,
    ctypes.c_int64,
    ctypes.c_void_p,
)

# What `loads.py` has: (address, count) -> number.
LOOP_PROTOTYPE = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64)

# A loop around any kernel that reads its blocks from a file. Between two reads by Python a thread
# waits until others let it run again, which takes as long as converting some hundred thousand
# weights. In LLVM's own language parts of the file can be as small as the caches that hold them.
# (kernel, descriptor, offset, bytes, bytes of a step, bytes of its floats, bytes of a part, memory
# for a part, floats, past the caches, scales, scales of a step) -> bytes that were converted: fewer
# where pread(2) gave nothing, or an error. ``kernel`` is of PROTOTYPE.
FROM_FILE = "from_file"
FROM_FILE_PROTOTYPE = ctypes.CFUNCTYPE(
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int,
    *[ctypes.c_int64] * 5,
    *[ctypes.c_void_p] * 2,
    ctypes.c_int64,
    ctypes.c_void_p,
    ctypes.c_int64,
)
FROM_FILE_CODE = f"""
declare i64 @pread(i32, ptr, i64, i64)

define i64 @{FROM_FILE}(ptr %kernel, i32 %fd, i64 %offset, i64 %nbytes, i64 %step, i64 %floats_step,
                   i64 %part, ptr %blocks, ptr %floats, i64 %past, ptr %scales,
                   i64 %scales_step) {{
entry:
  %result = alloca i64
  %exception = alloca ptr
  br label %next
next:
  %done = phi i64 [ 0, %entry ], [ %converted, %call ]
  %left = sub i64 %nbytes, %done
  %last = icmp ult i64 %left, %part
  %want = select i1 %last, i64 %left, i64 %part
  %over = icmp eq i64 %left, 0
  br i1 %over, label %end, label %read
read:
  %got = phi i64 [ 0, %next ], [ %sum, %more ]
  %to = getelementptr i8, ptr %blocks, i64 %got
  %missing = sub i64 %want, %got
  %begin = add i64 %offset, %done
  %at = add i64 %begin, %got
  %count = call i64 @pread(i32 %fd, ptr %to, i64 %missing, i64 %at)
  %failed = icmp sle i64 %count, 0
  br i1 %failed, label %end, label %more
more:
  %sum = add i64 %got, %count
  %full = icmp uge i64 %sum, %want
  br i1 %full, label %call, label %read
call:
  %steps = udiv i64 %want, %step
  %before = udiv i64 %done, %step
  %bytes = mul i64 %before, %floats_step
  %out = getelementptr i8, ptr %floats, i64 %bytes
  %number = mul i64 %before, %scales_step
  %scale = getelementptr float, ptr %scales, i64 %number
  %status = call i32 %kernel(ptr %result, ptr %exception, ptr %blocks, ptr %out, i64 %steps,
                             i64 %past, ptr %scale)
  %converted = add i64 %done, %want
  br label %next
end:
  ret i64 %done
}}
"""


def object_code(name: str, dtype: str, parts: Parts) -> bytes:
    """Return an object file with the function ``name``, from the cache on disk or compiled now."""

    def compiled() -> bytes:
        from numaload.kernels.jit.compile import compile_kernel

        return compile_kernel(name, dtype, parts)

    return _kept(name, compiled)


def _from_file_code() -> bytes:
    """Return the object file of the loop that reads from files."""
    return _assembled(FROM_FILE, FROM_FILE_CODE)


def _assembled(name: str, source: str) -> bytes:
    """Return the object file of a function in LLVM's own language."""
    return _kept(name, lambda: machine().emit_object(llvm.parse_assembly(source)))


def _kept(name: str, make: Callable[[], bytes]) -> bytes:
    code = kept.load(name)
    if code is None:
        code = bytes(make())
        kept.save(name, code)
    return code


class _Linked:
    """``address`` of a function in an object file, which lives as long as this does."""

    def __init__(self, code: bytes, name: str) -> None:
        """Link it. Raises: ValueError, RuntimeError if the object file has no such function."""
        engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine())
        engine.add_object_file(llvm.ObjectFileRef.from_data(code))
        engine.finalize_object()
        self.address: int = engine.get_function_address(name)
        if not self.address:
            raise ValueError(f"no function {name} in the object file")
        self._engine = engine


@cache
def _from_file() -> tuple[_Linked, Callable[..., int]]:
    linked = _Linked(_from_file_code(), FROM_FILE)
    return linked, FROM_FILE_PROTOTYPE(linked.address)


class Function(_Linked):
    """A linked kernel: (addresses of blocks and floats, n_blocks, past the caches, scales)."""

    def __init__(self, code: bytes, name: str) -> None:
        super().__init__(code, name)
        self._call = PROTOTYPE(self.address)
        self._read: Callable[..., int] | None = None

    def from_file(self, fd: int, offset: int, nbytes: int, *how: int) -> int:
        """Read and convert bytes of a file; return how many. For the rest see FROM_FILE."""
        if self._read is None:
            with compiling:  # once, whichever threads ask
                _, self._read = _from_file()
        return self._read(self.address, fd, offset, nbytes, *how)

    def __call__(
        self, blocks: int, floats: int, n_blocks: int, past_caches: int, scales: int = 0
    ) -> None:
        done, exception = ctypes.c_int64(), ctypes.c_void_p()
        results = ctypes.byref(done), ctypes.byref(exception)
        status = self._call(*results, blocks, floats, n_blocks, past_caches, scales)
        if status or done.value != n_blocks:
            raise RuntimeError(f"a kernel ended with {status} after {done.value} blocks")


class Loop(_Linked):
    """A function of `loads.SOURCES`: (address, count) -> number. Calls give up the GIL."""

    def __init__(self, name: str) -> None:
        with compiling:
            super().__init__(_assembled(name, loads.SOURCES[name]), name)
        self._call = LOOP_PROTOTYPE(self.address)

    def __call__(self, address: int, count: int) -> int:
        result: int = self._call(address, count)
        return result


def cpuid(leaf: int) -> tuple[int, int, int, int] | None:
    """Return eax, ebx, ecx and edx of the instruction; None on processors without it."""
    if not loads.has_cpuid():
        return None
    registers = (ctypes.c_uint32 * 4)()
    Loop("cpuid")(ctypes.addressof(registers), leaf)
    return tuple(registers)
