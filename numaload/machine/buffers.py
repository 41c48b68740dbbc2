"""Lend memory for results; it comes back with the last array over it, and is used again.

New memory costs more than what is written into it: the kernel clears every page first, and where a
hypervisor has to find it, that costs many times as much again.
"""

from __future__ import annotations

import os
import weakref
from collections import deque
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from numaload import trace
from numaload.errors import NodeMemoryError, NumaError, warn_once
from numaload.linux.mapping import MappedMemory, bind, map_private
from numaload.linux.syscalls import HUGE, memory_at
from numaload.machine import memory
from numaload.machine.memory import Promise

WAY_OUT = "drop tensors not needed any more, give a smaller ahead=, or stream to a smaller dtype"
LESS = "dequantize less of it at a time (rows=, expert=), or to a smaller dtype"
LEAST_FREE = 4 << 20  # bytes beside the buffers: threads, and what Python needs
WASTE = 2  # times what is needed: larger ranges are left for larger tensors
# Bytes of a result from which on it is lent: a huge page. Up to 8 MiB malloc uses memory again as
# fast, but of any node; larger results cost 2 to 4 times as much there (docs/measurements.md).
LENT = HUGE
KEPT, SHARE = 1 << 30, 16  # bytes of results that are kept at most, and what part of those free


class Buffers:
    """Give arrays out; keep at most ``most`` bytes of those that came back.

    way_out: said where memory is short. least: bytes that are to stay free. waste: how many times
    as large as needed a range may be.
    """

    def __init__(
        self, most: int, way_out: str = WAY_OUT, least: int = LEAST_FREE, waste: int = WASTE
    ) -> None:
        self.most, self.way_out, self.least, self.waste = most, way_out, least, waste
        self._free: deque[MappedMemory] = deque()  # arrays die in any thread, at any time: no locks

    def take(
        self, nbytes: int, what: str = "a tensor", nodes: Collection[int] = ()
    ) -> tuple[NDArray[np.uint8], Promise | None]:
        """Return ``nbytes`` of uninitialized memory; it comes back with the last array over it.

        nodes: where it is bound to, if it can be bound; none: it lies where it is first touched.
        Returns: it, and the promise of what is not touched yet; None where it was used before.
        Raises: NodeMemoryError.
        """
        if nbytes < HUGE:
            promise = memory.promise(nbytes, what, self.way_out, least=self.least)
            return np.empty(nbytes, np.uint8), promise
        mapping, new = self._found(nbytes, tuple(nodes)), None
        if mapping is None:
            mapping, new = self._mapped(nbytes, what, tuple(nodes))
        lease: Any = memory_at(mapping.address, nbytes)
        weakref.finalize(lease, self._back, mapping).atexit = False
        return np.frombuffer(memoryview(lease).cast("B"), np.uint8), new

    def _mapped(
        self, nbytes: int, what: str, nodes: tuple[int, ...]
    ) -> tuple[MappedMemory, Promise]:
        node = nodes[0] if len(nodes) == 1 else None
        try:
            promise = memory.promise(nbytes, what, self.way_out, node=node, least=self.least)
        except NodeMemoryError:
            if not self._free:
                raise
            self.clear()  # none of them was large enough
            promise = memory.promise(nbytes, what, self.way_out, node=node, least=self.least)
        try:
            mapping = map_private(nbytes)
            if nodes:
                mapping.nodes = nodes
                try:
                    bind(mapping, nodes)
                except NumaError as error:
                    warn_once(
                        "first touch",
                        f"{error}; threads on each node place new results by first touch; in a"
                        " container, --cap-add SYS_NICE allows binding",
                    )
        except BaseException:
            promise.end()
            raise
        return mapping, promise

    def _found(self, nbytes: int, nodes: tuple[int, ...]) -> MappedMemory | None:
        for _ in range(len(self._free)):
            try:
                mapping = self._free.popleft()
            except IndexError:
                break
            if nbytes <= mapping.length <= self.waste * nbytes and mapping.nodes == nodes:
                return mapping
            self._free.append(mapping)
        return None

    def _back(self, mapping: MappedMemory) -> None:
        self._free.append(mapping)
        while self._free and sum(one.length for one in list(self._free)) > self.most:
            with suppress(IndexError):  # another thread was faster
                self._free.popleft()  # the oldest: its memory goes with it

    def clear(self) -> bool:
        """Give back what nobody holds; return whether there was any."""
        there = bool(self._free)
        self._free.clear()
        return there

    def close(self) -> None:
        self.most = 0
        self.clear()


class _Results(Buffers):
    """Memory of what users own: ranges of just the size, kept while there is plenty."""

    def _mapped(
        self, nbytes: int, what: str, nodes: tuple[int, ...]
    ) -> tuple[MappedMemory, Promise]:
        found = super()._mapped(nbytes, what, nodes)
        self.most = min(KEPT, memory.left() // SHARE)
        return found


_results = _Results(0, LESS, memory.LEAST_FREE, waste=1)
memory.on_shortage.append(_results.clear)
os.register_at_fork(before=_results.clear)  # the child's copies would cost both


@contextmanager
def result(
    nbytes: int, what: str, nodes: Collection[int] = ()
) -> Iterator[NDArray[np.uint8] | None]:
    """Lend memory for a result, to be filled inside. nodes: as for ``Buffers.take``.

    Returns: None for small ones, which numpy and torch allocate. Raises: NodeMemoryError.
    """
    if nbytes < LENT:
        with memory.promise(nbytes, what, LESS):
            yield None
        return
    with trace.span("prepare", nbytes, nodes):
        lent, promise = _results.take(nbytes, what, nodes)
    with promise or nullcontext():
        yield lent
