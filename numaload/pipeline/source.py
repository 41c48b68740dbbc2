"""Where the bytes of a tensor come from: files by reading, replicas and copies where they are.

Files are read rather than mapped: a mapping faults page by page, counts as this process's memory,
and kills the process where a file was cut short or its disk fails.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from numaload.weights import Tensor

_scratch = threading.local()


def scratch(name: str, nbytes: int) -> NDArray[np.uint8]:
    """Memory of this thread that is used again and again: at least ``nbytes``, cut to that."""
    found: NDArray[np.uint8] | None = getattr(_scratch, name, None)
    if found is None or len(found) < nbytes:
        found = np.empty(nbytes, np.uint8)
        setattr(_scratch, name, found)
    return found[:nbytes]


def fetch(tensor: Tensor, start: int, nbytes: int) -> NDArray[np.uint8]:
    """Bytes of the tensor from ``start``, in memory that holds until this thread's next call.

    Raises: ReadError, FileChangedError, ClosedError.
    """
    if not tensor.is_file:
        return np.frombuffer(tensor.buffer[start : start + nbytes], np.uint8)
    buffer = scratch("blocks", nbytes)
    tensor.read_into(buffer.data, start)
    return buffer
