"""Lend memory for results; it comes back with the last array over it, and is used again.

New memory costs more than what is written into it: the kernel clears every page first.
"""

from __future__ import annotations

import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload.errors import NodeMemoryError
from numaload.linux.mapping import MappedMemory, map_private
from numaload.linux.syscalls import HUGE, memory_at
from numaload.machine import memory
from numaload.machine.memory import Promise

WAY_OUT = "drop tensors not needed any more, give a smaller ahead=, or stream to a smaller dtype"
LEAST_FREE = 4 << 20  # bytes beside the buffers: threads, and what Python needs
WASTE = 2  # times what is needed: larger ranges are left for larger tensors


class Buffers:
    """Give arrays out; keep at most ``most`` bytes of those that came back."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._free: deque[MappedMemory] = deque()  # arrays die in any thread, at any time: no locks

    def take(self, nbytes: int, what: str = "a tensor") -> tuple[NDArray[np.uint8], Promise | None]:
        """Return ``nbytes`` of uninitialized memory; it comes back with the last array over it.

        Returns: it, and the promise of what is not touched yet; None where it was used before.
        Raises: NodeMemoryError.
        """
        if nbytes < HUGE:
            promise = memory.promise(nbytes, what, WAY_OUT, least=LEAST_FREE)
            return np.empty(nbytes, np.uint8), promise
        mapping, new = self._found(nbytes), None
        if mapping is None:
            mapping, new = self._mapped(nbytes, what)
        lease: Any = memory_at(mapping.address, nbytes)
        weakref.finalize(lease, self._back, mapping).atexit = False
        return np.frombuffer(memoryview(lease).cast("B"), np.uint8), new

    def _mapped(self, nbytes: int, what: str) -> tuple[MappedMemory, Promise]:
        try:
            promise = memory.promise(nbytes, what, WAY_OUT, least=LEAST_FREE)
        except NodeMemoryError:
            self._free.clear()  # none of them was large enough
            promise = memory.promise(nbytes, what, WAY_OUT, least=LEAST_FREE)
        try:
            return map_private(nbytes), promise
        except BaseException:
            promise.end()
            raise

    def _found(self, nbytes: int) -> MappedMemory | None:
        for _ in range(len(self._free)):
            try:
                mapping = self._free.popleft()
            except IndexError:
                break
            if nbytes <= mapping.length <= WASTE * nbytes:
                return mapping
            self._free.append(mapping)
        return None

    def _back(self, mapping: MappedMemory) -> None:
        self._free.append(mapping)
        while self._free and sum(one.length for one in list(self._free)) > self.most:
            with suppress(IndexError):  # another thread was faster
                self._free.popleft()  # the oldest: its memory goes with it

    def close(self) -> None:
        self.most = 0
        self._free.clear()
