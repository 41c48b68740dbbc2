"""One tensor of opened weights: what it is, and ways to its blocks and floats."""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

from numaload.dtypes import KERNEL_DTYPES, NAMES, dtype_name, item_shape, kernel_dtype
from numaload.errors import UnknownQuantTypeError, UnsupportedTypeError, UsageError, printable
from numaload.formats.gguf import TensorInfo
from numaload.formats.qtypes import BLOCKS, FLOATS, QuantType
from numaload.formats.safetensors import SafeTensorInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from numaload.files.source import SourceFile
    from numaload.machine.workers import Workers
    from numaload.weights.model import Weights

Rows = slice | range | tuple[int, int]


class Tensor:
    """One tensor: a description, and zero-copy access to its blocks.

    dims are in GGUF order (fastest first), shape in numpy order; nbytes and offset are bytes.
    """

    def __init__(self, info: TensorInfo | SafeTensorInfo, weights: Weights, part: int) -> None:
        self._info, self._weights, self._part = info, weights, part

    name = property(lambda self: self._info.name)
    dims = property(lambda self: self._info.dims)
    nbytes = property(lambda self: self._info.nbytes)
    offset = property(lambda self: self._info.offset)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(reversed(self._info.dims))

    @property
    def size(self) -> int:
        """Return the number of elements."""
        return prod(self.dims)

    @property
    def qtype(self) -> QuantType:
        """Raises: UnknownQuantTypeError; ``type_name`` names those too."""
        found = self._info.qtype
        if found is None:
            raise UnknownQuantTypeError(
                f"tensor {self.name!r} cannot be used, the rest of the file can:"
                f" {self._info.problem}",
                path=self.path,
            )
        return found

    @property
    def type_name(self) -> str:
        return self._info.type_name

    def check_type(self) -> None:
        """Check that the type, and so the end, is known. Raises: UnknownQuantTypeError."""
        if not self._info.known:
            self.qtype  # noqa: B018

    @property
    def in_blocks(self) -> bool:
        """Return whether it is quantized: its items are blocks, not numbers."""
        return self._info.qtype is not None and BLOCKS[self._info.qtype][0] > 1

    @property
    def has_kernel(self) -> bool:
        """Return whether kernels turn it to float: not integers, nor float64."""
        return self.in_blocks or self._info.qtype in FLOATS

    @property
    def path(self) -> str:
        """Return the file that holds it: the source, also where this view is of a replica."""
        return self._weights._parts[self._part].file.path  # noqa: SLF001

    @property
    def byte_order(self) -> str:
        """Return the byte order in the file, and so in ``blocks``: "little", or "big" (rare)."""
        return self._weights._parts[self._part].header.byte_order  # noqa: SLF001

    @property
    def node(self) -> int | None:
        """Return the node whose memory this view is in; None for page cache and copies."""
        return self._weights.node

    @property
    def address(self) -> int:
        """Return the address of the blocks, valid until the weights are closed."""
        self.check_type()
        return self._weights._mapping(self._part).address + self.offset  # type: ignore[no-any-return]  # noqa: SLF001

    @property
    def buffer(self) -> memoryview:
        """Return the blocks as flat read-only bytes, zero-copy."""
        return self.memory().toreadonly()

    def memory(self) -> memoryview:
        """Return the same bytes, said to be writable, for torch: it warns of others."""
        self.check_type()
        info = self._info
        return self._weights._mapping(self._part).view(info.offset, info.nbytes, write=True)  # noqa: SLF001

    @property
    def is_file(self) -> bool:
        """Return whether ``read_into`` reads a file; replicas and copies are memory."""
        return self._weights.in_files

    @property
    def file(self) -> SourceFile:
        """Return the opened file that holds it."""
        return self._weights.parts[self._part].file

    @property
    def place_in_files(self) -> tuple[int, int]:
        """Return the key that sorts tensors in file order."""
        return self._part, self.offset

    def workers(self) -> Workers:
        """Return the threads that work on it: on its node, or everywhere."""
        return self._weights.workers()

    def read_into(self, view: memoryview, start: int = 0) -> None:
        """Fill ``view`` with the tensor's bytes from ``start``, read from the file.

        Raises: ReadError, FileChangedError, ClosedError, UsageError for bytes outside the tensor.
        """
        self.check_type()
        if not 0 <= start <= start + view.nbytes <= self.nbytes:
            raise UsageError(
                f"tensor {self.name!r}: bytes {start} to {start + view.nbytes} of {self.nbytes}"
            )
        self._weights.read_into(self._part, view, self.offset + start)

    def read_by(self, read: Callable[[SourceFile], None]) -> None:
        """Call ``read`` with the file that holds it, for reading from its descriptor.

        Raises: what it raises, FileChangedError, ClosedError.
        """
        self._weights.read_by(self._part, read)

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """Return (rows, bytes per row) uint8, read-only, zero-copy; experts one after another.

        The bytes as they are in the file, which may be a big-endian one: see ``byte_order``.
        """
        import numpy as np

        block_size, type_size = BLOCKS[self.qtype]
        row_bytes = self._columns // block_size * type_size
        return np.frombuffer(self.buffer, np.uint8).reshape(self._rows, row_bytes)

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Return ``shape`` in bytes in its last dim; flat where rows share bytes."""
        row_bytes, rest = divmod(self.nbytes, max(1, self._rows))
        return (self.nbytes,) if rest else (*self.shape[:-1], row_bytes)

    @property
    def _columns(self) -> int:
        return self.dims[0] if self.dims else 1

    @property
    def _rows(self) -> int:
        return prod(self.dims[1:])

    def dequantize(
        self,
        dtype: Any = "float32",
        out: Any = None,
        rows: Rows | None = None,
        expert: int | None = None,
    ) -> Any:
        """Return floats of the whole tensor, of rows, of one expert, or of rows of one expert.

        dtype: "float32", "float16" or "bfloat16" (an ml_dtypes array), or numpy's or torch's.
        rows: (start, stop) or a slice; of a tensor of three dims they count through all experts.
        out: any C-contiguous buffer of that item size and element count, torch tensors included.
        Returns: ``out``, or a new array: ``shape``, or (rows, columns), or ``shape[1:]``.
        Bit-exact with ggml. Raises: UnsupportedTypeError (naming the tensor, its type and why),
        UnknownQuantTypeError, UsageError, NodeMemoryError where a new array does not fit.
        """
        from numaload.dequantize import as_output, dequantize_blocks, dtype_of, new_array

        wanted = dtype_of(dtype)
        start, stop, shape = self._selection(rows, expert)
        qtype = self.qtype
        _, type_size = BLOCKS[qtype]
        blocks = self.blocks[start:stop].reshape(-1, type_size)
        what = f"tensor {self.name!r}"
        with new_array(shape, wanted, what) if out is None else nullcontext(out) as result:
            flat = as_output(result, wanted, prod(shape))
            if flat.size:
                dequantize_blocks(
                    blocks, qtype, wanted, flat, self._weights.workers(),
                    name=self.name, byte_order=self.byte_order,
                )  # fmt: skip
        return result

    def torch(self, dtype: Any = None, device: Any = "cpu") -> Any:
        """Return the weights as a torch tensor, zero-copy where nothing is to be converted.

        dtype None: the type that they have in the file, in ``shape``; blocks of quantized types as
        uint8, (..., bytes per row). Read-only memory: writing to it ends the process.
        dtype: a name, torch's or numpy's; converted in parallel into memory of its own.
        device: other than "cpu" it is copied there.
        Raises: UsageError without torch, UnsupportedTypeError, UnknownQuantTypeError,
        NodeMemoryError for what is converted and does not fit.
        """
        if dtype is None:
            found = self._raw_tensor()
            return found if device == "cpu" else found.to(device)
        from numaload import torch_memory

        name = dtype_name(dtype)
        wanted = torch_memory.torch_dtype(name, self.name)
        if not self._has_kernel_to(name):
            return torch_memory.converted(self._own_order(), device, wanted, self.name)
        made = kernel_dtype(name)
        kind = torch_memory.torch_dtype(made, self.name)
        with torch_memory.promise(self.size * kind.itemsize, self.name):
            out = torch_memory.empty(self.shape, kind)
            self.dequantize(made, out=out)
        return torch_memory.converted(out, device, wanted, self.name, copy=False)

    def _has_kernel_to(self, dtype: str) -> bool:
        """Return whether a kernel makes ``dtype`` directly: float32 between may hold less."""
        return self.in_blocks or (self.has_kernel and dtype in KERNEL_DTYPES)

    def _own_order(self) -> Any:
        """Return the numbers as they are, in this machine's byte order."""
        if self.byte_order != "big":
            return self._raw_tensor()
        import numpy as np

        from numaload.torch_memory import of_bytes, promise, torch_type

        dtype = torch_type(self.type_name)
        with promise(self.nbytes, self.name):
            numbers = np.frombuffer(self.buffer, f"u{dtype.itemsize}").byteswap()
        return of_bytes(numbers.view(np.uint8), dtype, self.shape)

    def _raw_tensor(self) -> Any:
        # Models have hundreds of thousands of tensors: a call more is worth counting.
        from numaload import torch_memory

        memory, type_name = self.memory(), self._info.type_name
        if type_name in NAMES:
            self.check_native()
            shape = item_shape(type_name, self.shape, self.name)
        elif self.in_blocks:
            type_name, shape = "U8", self.byte_shape
        else:
            message = f"tensor {self.name!r}: torch has no type for {type_name}"
            raise UnsupportedTypeError(f"{message}; buffer has the bytes")
        return torch_memory.mapped(memory, torch_memory.torch_type(type_name), shape)

    def check_native(self) -> None:
        """Refuse numbers of a big-endian file. Raises: UnsupportedTypeError."""
        if self.byte_order == "big":
            raise UnsupportedTypeError(
                f"tensor {self.name!r}: {self.type_name} of a big-endian file, which torch cannot"
                " read in place: give a dtype, or take dequantize()"
            )

    def _selection(self, rows: Rows | None, expert: int | None) -> tuple[int, int, tuple[int, ...]]:
        """Return the first row, the row after the last, and the shape of the result."""
        first, count, shape = 0, self._rows, self.shape
        if expert is not None:
            if len(shape) != 3:
                raise UsageError(
                    f"{self.name}: shape {shape} has no experts, three dims are needed"
                )
            if not 0 <= expert < shape[0]:
                raise UsageError(f"{self.name}: expert {expert}, expected 0 to {shape[0] - 1}")
            first, count, shape = expert * shape[1], shape[1], shape[1:]
        if rows is None:
            return first, first + count, shape
        start, stop = _row_range(rows, count, self.name)
        return first + start, first + stop, (stop - start, self._columns)

    def __repr__(self) -> str:
        return printable(f"<Tensor {self.name} {self.type_name} {self.shape}>")


def _row_range(rows: Rows, count: int, name: str) -> tuple[int, int]:
    wanted = slice(*rows) if isinstance(rows, tuple) and len(rows) == 2 else rows
    if isinstance(wanted, (slice, range)):
        start = 0 if wanted.start is None else index(wanted.start)
        stop = count if wanted.stop is None else index(wanted.stop)
        if wanted.step in (None, 1) and 0 <= start <= stop <= count:
            return start, stop
    raise UsageError(f"{name}: rows {rows} of {count}; a range inside, in steps of 1, is needed")
