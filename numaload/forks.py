"""A fork waits for what it would break in the child: a lock that another thread holds, of which
the child's copy stays closed for ever.
"""

from __future__ import annotations

# They take locks before a fork, in the order opposite to that of imports. Ours must come first, as
# those who compile and import need theirs.
import concurrent.futures.thread  # noqa: F401
import logging  # noqa: F401
import os
import sys
import threading
from contextlib import suppress
from importlib import _bootstrap
from typing import Any

# Held while kernels are compiled or linked: numba has locks of its own.
compiling = threading.RLock()
# LLVM's own lock, held through a fork: garbage that LLVM made is freed in any thread.
_llvm: list[Any] = []
# Whose imports end by themselves. A program's own module may run a server while it is imported.
_AWAITED = sys.stdlib_module_names | {
    "gguf", "llvmlite", "ml_dtypes", "numaload", "numba", "numpy", "psutil", "rich", "torch",
    "xxhash",
}  # fmt: skip


def _before() -> None:
    compiling.acquire()
    while locks := _imports_elsewhere() or _llvm_elsewhere():
        compiling.release()  # an import, or a destructor, may need it to end
        for lock in locks:
            lock.acquire()
            lock.release()
        compiling.acquire()


def _imports_elsewhere() -> list[Any]:
    """Return the locks of modules that other threads are importing."""
    known: dict[str, Any] = vars(_bootstrap)["_module_locks"]  # nothing public tells
    found = [reference() for reference in list(known.values())]
    held = [lock for lock in found if lock is not None and lock.owner is not None]
    if any(lock.owner == threading.get_ident() for lock in held):
        return []  # the others may wait for what this thread imports
    return [lock for lock in held if lock.name.partition(".")[0] in _AWAITED]


def _llvm_elsewhere() -> list[Any]:
    """Take LLVM's lock, or return it if another thread has it."""
    lib = getattr(sys.modules.get("llvmlite.binding.ffi"), "lib", None)
    if lib is None:
        return []
    lock = lib._lock._lock  # noqa: SLF001 - what is public takes it for one call of LLVM
    if not lock.acquire(blocking=False):
        return [lock]
    _llvm.append(lock)
    return []


def _after() -> None:
    while _llvm:
        _llvm.pop().release()
    with suppress(RuntimeError):  # imported while this very fork waited for that
        compiling.release()


os.register_at_fork(before=_before, after_in_parent=_after, after_in_child=_after)
