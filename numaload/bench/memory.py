"""Memory to measure in: touched before, in huge pages where the kernel gives them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from numaload.numa import memory
from numaload.numa.mapping import map_private


def prefaulted(nbytes: int) -> NDArray[np.uint8]:
    """``nbytes`` that begin at a huge page, written once. Raises: NodeMemoryError."""
    memory.require(nbytes, "memory to measure in", "measure less: --size, --threads")
    touched = np.frombuffer(map_private(nbytes).view(write=True), np.uint8)
    touched[:] = 1
    return touched


def huge_pages() -> str:
    """What the kernel gives who advises: "madvise", "always", or "never"."""
    try:
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as file:
            return file.read().partition("[")[2].partition("]")[0]
    except OSError:
        return "unknown"
