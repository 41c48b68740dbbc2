"""A part of every expert: the rows and columns that one of several tensor-parallel parts computes.

The division is kt-kernel's (``moe-tp.hpp``, ``operators/llamafile/moe.hpp`` of kvcache-ai/
ktransformers): the experts' inner dimension in units of 256 weights, the first parts one unit
longer where it does not divide. Gate and up lose rows, down loses columns, and the parts' results
add up to the whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

from numaload.errors import NotCopyable, TensorNotFoundError, UsageError
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.numa import memory
from numaload.numa.mapping import Mapping as MemoryMapping
from numaload.numa.mapping import bind, map_private
from numaload.weights.tensor import Tensor

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from numaload.weights.model import Weights

UNIT = 256  # weights: ggml's QK_K, in which parts are counted
ALIGNMENT = 64  # bytes, of each tensor in memory of its own
ROWS = re.compile(r"(?:^|\.)ffn_(gate|up)_exps\.weight$")
COLUMNS = re.compile(r"(?:^|\.)ffn_down_exps\.weight$")


def part_of(total: int, part: int, parts: int, what: str = "the inner dimension") -> range:
    """Which of ``total`` weights belong to a part. Raises: UsageError where it has no unit."""
    units = total // UNIT
    if total % UNIT or not 0 <= part < parts <= units:
        raise UsageError(
            f"part {part} of {parts} of {what}, {total} weights: expected a part below the number"
            f" of parts, and at most {units} parts of units of {UNIT} weights"
        )
    each, longer = divmod(units, parts)
    first = part * each + min(part, longer)
    return range(first * UNIT, (first + each + (part < longer)) * UNIT)


class Slice:
    """A part of an expert tensor, described as a Tensor is; dims, shape and nbytes are the part's.

    ``blocks`` is (experts, rows, bytes per row): a strided view of the whole tensor, or contiguous
    in memory of its own after ``Slices.placed``; only then there are ``address`` and ``buffer``.
    """

    def __init__(self, tensor: Tensor, part: int, parts: int) -> None:
        if len(tensor.dims) != 3:
            raise UsageError(f"{tensor.name}: shape {tensor.shape}, experts have three dims")
        self.tensor, self.part, self.parts = tensor, part, parts
        self._columns = COLUMNS.search(tensor.name) is not None
        axis = 0 if self._columns else 1
        self.range = part_of(tensor.dims[axis], part, parts, tensor.name)
        dims = list(tensor.dims)
        dims[axis] = len(self.range)
        self.dims = tuple(dims)
        self._placed: MemoryMapping | None = None
        self._offset = 0

    name = property(lambda self: self.tensor.name)
    qtype = property(lambda self: self.tensor.qtype)
    type_name = property(lambda self: self.tensor.type_name)
    path = property(lambda self: self.tensor.path)
    byte_order = property(lambda self: self.tensor.byte_order)
    shape = property(lambda self: tuple(reversed(self.dims)))
    size = property(lambda self: prod(self.dims))

    @property
    def nbytes(self) -> int:
        return int(prod(self.dims[1:]) * _row_bytes(self.qtype, self.dims[0]))

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """(experts, rows, bytes per row) uint8, read-only."""
        experts, rows, _ = self.shape
        if self._placed is not None:
            import numpy as np

            return np.frombuffer(self.buffer, np.uint8).reshape(experts, rows, -1)
        whole = self.tensor.blocks.reshape(experts, self.tensor.shape[1], -1)
        if not self._columns:
            return whole[:, self.range.start : self.range.stop]
        first, last = (_row_bytes(self.qtype, n) for n in (self.range.start, self.range.stop))
        return whole[:, :, first:last]

    @property
    def buffer(self) -> memoryview:
        """The part as flat read-only bytes. Raises: UsageError where it is not contiguous."""
        return self._memory().view(self._offset, self.nbytes)

    @property
    def address(self) -> int:
        """Where the part is, until its Slices are closed. Raises: UsageError, as ``buffer``."""
        return self._memory().address + self._offset

    def dequantize(self, dtype: Any = "float32") -> Any:
        """Floats of the part, in ``shape``: a new array. Raises: as Tensor.dequantize."""
        from numaload.dequantize import dtype_of, new_array

        part = (self.range.start, self.range.stop)
        with new_array(self.shape, dtype_of(dtype), f"part of tensor {self.name!r}") as out:
            for expert, floats in enumerate(out):
                if self._columns:
                    floats[...] = self.tensor.dequantize(dtype, expert=expert)[:, slice(*part)]
                else:
                    self.tensor.dequantize(dtype, expert=expert, rows=part, out=floats)
        return out

    def _memory(self) -> MemoryMapping:
        if self._placed is None:
            raise UsageError(
                f"{self.name}: a part of a tensor is not contiguous; placed() makes it so"
            )
        return self._placed

    def _place(self, mapping: MemoryMapping, offset: int) -> None:
        """Copy the part to ``offset`` of memory that it has to itself from now on."""
        import numpy as np

        blocks = self.blocks
        with mapping.view(offset, self.nbytes, write=True) as view:
            target = np.frombuffer(view, np.uint8).reshape(blocks.shape)
            target[...] = blocks
            del target  # it holds the view
        self._placed, self._offset = mapping, offset

    def __repr__(self) -> str:
        return f"<Slice {self.part} of {self.parts} of {self.tensor!r}: {self.shape}>"


class Slices(NotCopyable, Mapping[str, Tensor | Slice]):
    """Weights whose expert tensors (blk.N.ffn_gate_exps, up, down) hold only one part."""

    def __init__(self, weights: Weights, part: int, parts: int) -> None:
        if parts < 1 or not 0 <= part < parts:
            raise UsageError(f"part {part} of {parts}: expected a part from 0 below the number")
        self.weights, self.part, self.parts = weights, part, parts
        self.node: int | None = weights.node
        self._memory: MemoryMapping | None = None
        self._slices = {
            name: Slice(tensor, part, parts)
            for name, tensor in weights.items()
            if ROWS.search(name) or COLUMNS.search(name)
        }

    @property
    def metadata(self) -> Any:
        return self.weights.metadata

    @property
    def nbytes(self) -> int:
        """Bytes of the experts' parts, without the other tensors."""
        return sum(part.nbytes for part in self._slices.values())

    def placed(self, node: int | None = None) -> Slices:
        """The same with the experts' parts copied, contiguous, into one node's memory.

        node: strictly bound to it and copied by its threads; None: this process's memory.
        Raises: NodeMemoryError before a page is touched where it does not fit, NumaError.
        """
        made = Slices(self.weights, self.part, self.parts)
        slices = list(made._slices.values())
        offsets, total = _layout(slices)
        way_out = "nothing was copied: divide into more parts, or free memory"
        memory.require(total, "experts' parts", way_out, node=node)
        mapping = map_private(total)
        try:
            if node is not None:
                bind(mapping, [node])
            _fill(slices, offsets, mapping, node)
        except BaseException:
            mapping.close()
            raise
        made._memory, made.node = mapping, node
        return made

    def close(self) -> None:
        """Let go of memory made by ``placed``; arrays of it stay valid, addresses do not."""
        if self._memory is not None:
            self._memory.close()

    def __enter__(self) -> Slices:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getitem__(self, name: str) -> Tensor | Slice:
        if name not in self.weights:
            raise TensorNotFoundError(name, self.weights)
        return self._slices.get(name) or self.weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __repr__(self) -> str:
        return f"<Slices {self.part} of {self.parts} of {self.weights!r}>"


def _row_bytes(qtype: QuantType, weights: int) -> int:
    block_size, type_size = BLOCKS[qtype]
    if weights % block_size:
        raise UsageError(f"{weights} weights of {qtype.name} are no whole number of blocks")
    return weights // block_size * type_size


def _layout(slices: list[Slice]) -> tuple[list[int], int]:
    """Where each part begins in one range, and the range's bytes."""
    offsets, total = [], 0
    for part in slices:
        offsets.append(total)
        total += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, total


def _fill(
    slices: list[Slice], offsets: list[int], mapping: MemoryMapping, node: int | None
) -> None:
    from numaload.numa.topology import topology
    from numaload.numa.workers import pool

    def copy(start: int, stop: int) -> None:
        for i in range(start, stop):
            slices[i]._place(mapping, offsets[i])  # noqa: SLF001

    pool(topology(), () if node is None else (node,)).ranges(copy, len(slices))
