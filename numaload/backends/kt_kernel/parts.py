"""A part of every expert: the rows and columns that one of several tensor-parallel parts computes.

The division is kt-kernel's (``moe-tp.hpp``, ``operators/llamafile/moe.hpp`` of kvcache-ai/
ktransformers): the experts' inner dimension in units of 256 weights, the first parts one unit
longer where it does not divide. Gate and up lose rows, down loses columns, and the parts' results
add up to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from numaload.errors import UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.linux.mapping import bind, map_private
from numaload.machine import memory
from numaload.machine.topology import topology
from numaload.machine.workers import pool
from numaload.weights import Tensor, Weights

UNIT = 256  # weights: ggml's QK_K, in which parts are counted
ALIGNMENT = 64  # bytes, of each tensor in memory of its own
EXPERTS = re.compile(r"(?:^|\.)ffn_(gate|up|down)_exps\.weight$")


def tp(weights: Weights, part: int, parts: int) -> dict[str, ExpertPart]:
    """Return one tensor-parallel part of every expert tensor, by name, divided as kt-kernel does.

    Zero-copy and strided; ``place`` makes parts contiguous in a node's memory. Raises: UsageError,
    UnsupportedTypeError for blocks whose factor is in another tensor.
    """
    if parts < 1 or not 0 <= part < parts:
        raise UsageError(f"part {part} of {parts}: expected 0 <= part < parts")
    found = {}
    for name, tensor in weights.items():
        match = EXPERTS.search(name)
        if match:
            found[name] = _expert_part(tensor, part, parts, columns=match[1] == "down")
    return found


def place(parts: Mapping[str, ExpertPart], node: int | None = None) -> dict[str, ExpertPart]:
    """Copy parts, each contiguous, into one node's memory, which goes with the last of them.

    node: strictly bound to it and copied by its threads; None: this process's memory.
    Raises: NodeMemoryError before a page is touched where it does not fit, NumaError, UsageError.
    """
    offsets, total = {}, 0
    for name, part in parts.items():
        offsets[name] = total
        total += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    if node is not None:
        topology().select(node)  # whether it can be used
    way_out = "nothing was copied: divide into more parts, or free memory"
    memory.require(total, "experts' parts", way_out, node=node)
    arrays = {}
    with map_private(total) as mapping:  # the arrays keep its pages
        if node is not None:
            bind(mapping, [node])
        for name, part in parts.items():
            view = mapping.view(offsets[name], part.nbytes, write=True)
            arrays[name] = np.frombuffer(view, np.uint8).reshape(part.blocks.shape)
    copies = [(arrays[name], part.blocks) for name, part in parts.items()]
    workers = pool(topology(), () if node is None else (node,))
    workers.ranges(partial(_copy, copies), len(copies))
    for array in arrays.values():
        array.flags.writeable = False
    return {name: replace(part, placed=arrays[name]) for name, part in parts.items()}


def _copy(copies: list[tuple[NDArray[np.uint8], NDArray[np.uint8]]], start: int, stop: int) -> None:
    for target, source in copies[start:stop]:
        target[...] = source


def _expert_part(tensor: Tensor, part: int, parts: int, *, columns: bool) -> ExpertPart:
    if len(tensor.dims) != 3:
        raise UsageError(f"{tensor.name}: expected experts with three dims, found {tensor.shape}")
    tensor.check_alone()
    inner = tensor.shape[2 if columns else 1]
    return ExpertPart(tensor, part_of(inner, part, parts, tensor.name), columns)


def part_of(total: int, part: int, parts: int, what: str = "the inner dimension") -> range:
    """Return which of ``total`` weights belong to a part. Raises: UsageError if it has no unit."""
    units = total // UNIT
    if total % UNIT or not 0 <= part < parts <= units:
        raise UsageError(
            f"part {part} of {parts} of {what}, {total} weights: expected a part below the number"
            f" of parts, and at most {units} parts of units of {UNIT} weights"
        )
    each, longer = divmod(units, parts)
    first = part * each + min(part, longer)
    return range(first * UNIT, (first + each + (part < longer)) * UNIT)


@dataclass(frozen=True, eq=False)
class ExpertPart:
    """A part of an expert tensor: ``shape`` (numpy order) and ``nbytes`` are the part's.

    Once placed it is contiguous in memory of its own, and has an ``address``.
    """

    tensor: Tensor
    range: range  # the part's weights of the inner dimension
    columns: bool  # of "down", whose columns are divided; of others the rows are
    placed: NDArray[np.uint8] | None = None

    @property
    def name(self) -> str:
        return str(self.tensor.name)

    @property
    def qtype(self) -> QuantType:
        return self.tensor.qtype

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self.tensor.shape
        inner = len(self.range)
        return (experts, rows, inner) if self.columns else (experts, inner, columns)

    @property
    def nbytes(self) -> int:
        experts, rows, columns = self.shape
        return experts * rows * self._row_bytes(columns)

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """Return the part's bytes: (experts, rows, bytes per row) uint8, read-only."""
        if self.placed is not None:
            return self.placed
        experts, rows, _ = self.tensor.shape
        whole = self.tensor.blocks.reshape(experts, rows, -1)
        first, last = self.range.start, self.range.stop
        if not self.columns:
            return whole[:, first:last]
        return whole[:, :, self._row_bytes(first) : self._row_bytes(last)]

    @property
    def address(self) -> int:
        """Return a placed part's address, valid while it lives. Raises: UsageError for others."""
        if self.placed is None:
            raise UsageError(f"{self.name}: a part of a tensor is not contiguous; place() it")
        return self.placed.ctypes.data

    def _row_bytes(self, weights: int) -> int:
        block_size, type_size = BLOCKS[self.qtype]
        if weights % block_size:
            raise UsageError(
                f"{weights} weights of {self.qtype.name} are no whole number of blocks"
            )
        return weights // block_size * type_size

    def __repr__(self) -> str:
        return f"<ExpertPart {self.range} of {self.tensor!r}: {self.shape}>"
