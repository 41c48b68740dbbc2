"""Memory to measure in: touched before, in huge pages where the kernel gives them."""

from __future__ import annotations

import mmap

import numpy as np
from numpy.typing import NDArray

HUGE = 2 << 20


def prefaulted(nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` that begin at a huge page, written once."""
    memory = mmap.mmap(-1, nbytes + HUGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    whole[:] = 1
    first = -whole.ctypes.data % HUGE
    return whole[first : first + nbytes]


def huge_pages() -> str:
    """What the kernel gives who advises: "madvise", "always", or "never"."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"
