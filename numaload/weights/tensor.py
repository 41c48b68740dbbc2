"""One tensor of opened weights: what it is, and ways to its blocks and floats."""

from __future__ import annotations

from contextlib import nullcontext
from math import prod
from operator import index
from typing import TYPE_CHECKING, Any

from numaload import trace
from numaload.dtypes import KERNEL_DTYPES, NAMES, dtype_name, item_shape, kernel_dtype
from numaload.errors import UnknownQuantTypeError, UnsupportedTypeError, UsageError, printable
from numaload.formats.gguf import TensorInfo
from numaload.formats.qtypes import BLOCKS, FLOATS, QuantType
from numaload.formats.safetensors import SafeTensorInfo
from numaload.weights.scales import PACKED, Scales

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from numaload.dequantize import Conversion
    from numaload.files.source import SourceFile
    from numaload.linux.lists import Group
    from numaload.machine.workers import Workers
    from numaload.weights.model import Weights

Rows = slice | range | tuple[int, int]
SCALED_TYPES = PACKED | {QuantType.NVFP4.name}  # whose scales other tensors may hold


class Tensor:
    """One tensor: a description, and zero-copy access to its blocks.

    dims are in GGUF order (fastest first), shape in numpy order; nbytes and offset are bytes.
    Where other tensors of the model hold its scales, both are those of the weights.
    """

    def __init__(
        self,
        info: TensorInfo | SafeTensorInfo,
        weights: Weights,
        part: int,
        *,
        stored: bool = False,
        scales: Scales | None = None,
    ) -> None:
        self._info, self._weights, self._part = info, weights, part
        self._scales = scales
        self._refused = ""  # why its scales cannot be applied
        self._looked = stored  # for scales: there are these, or none

    name = property(lambda self: self._info.name)
    nbytes = property(lambda self: self._info.nbytes)
    offset = property(lambda self: self._info.offset)

    @property
    def dims(self) -> tuple[int, ...]:
        return self.shape[::-1]

    @property
    def shape(self) -> tuple[int, ...]:
        stored, scales = self._info.dims[::-1], self.scales
        if scales is None:
            return stored
        _, rows, columns = scales.shape
        if scales.turned:
            return (stored[0], columns, rows)
        return (*stored[:-1], columns) if scales.code.startswith("e2m1") else stored

    @property
    def scales(self) -> Scales | None:
        """Return its scales, where other tensors hold them and how they are applied is known."""
        if not self._looked:
            try:
                if self._info.type_name in SCALED_TYPES:
                    self._scales = self._weights.companions.of(self)
            except UnsupportedTypeError as error:  # for those who want floats of it
                self._refused = str(error.args[0])
            self._looked = True
        return self._scales

    def check_scales(self, dtype: str) -> None:
        """Refuse floats of numbers whose scales cannot be applied. dtype: what they shall become.

        Raises: UnsupportedTypeError.
        """
        converts = "float" in dtype and NAMES.get(self.type_name) != dtype
        if converts and not self.scales and self._refused:
            raise UnsupportedTypeError(self._refused)

    @property
    def weight_name(self) -> str:
        """Return the name of the weights: X where the file has X_blocks and X_scales."""
        scales = self.scales
        name: str = self.name
        return name.removesuffix("_blocks") if scales and scales.turned else name

    @property
    def scale_names(self) -> list[str]:
        """Return the names of tensors that floats of it need no more: scales that are applied."""
        scales = self.scales
        if scales is None:
            return []
        return [*scales.names, *self._weights.companions.activations(self)]

    @property
    def layout(self) -> str:
        """Return what is stored, where scales belong to it: "MXFP4", "FP8 128x128"; else ""."""
        if self.scales is not None:
            return self.scales.title
        return "unknown scales" if self._refused else ""

    def as_stored(self) -> Tensor:
        """Return the same tensor without scales: its numbers as they are in the file."""
        return Tensor(self._info, self._weights, self._part, stored=True)

    def scaled_by(self, scales: Scales) -> Tensor:
        """Return the same tensor with these scales, which may be of another model's files."""
        return Tensor(self._info, self._weights, self._part, stored=True, scales=scales)

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

    def check_alone(self) -> None:
        """Refuse blocks to programs that take these alone, where a factor belongs to them.

        Raises: UnsupportedTypeError.
        """
        if self.in_blocks and self.scales is not None:
            raise UnsupportedTypeError(
                f"tensor {self.name!r}: {self.type_name} whose factor is in"
                f" {', '.join(self.scales.names)}: a program that takes the blocks alone would"
                " compute with other numbers; dequantize() applies it"
            )

    @property
    def in_blocks(self) -> bool:
        """Return whether it is quantized: its items are blocks, not numbers."""
        return self._info.qtype is not None and BLOCKS[self._info.qtype][0] > 1

    @property
    def has_kernel(self) -> bool:
        """Return whether kernels turn it to float: not integers, nor float64."""
        return self.in_blocks or self._info.qtype in FLOATS or self.scales is not None

    @property
    def code(self) -> QuantType | str:
        """Return which kernels turn it to float. Raises: UnknownQuantTypeError."""
        scales = self.scales
        return self.qtype if scales is None else scales.code

    @property
    def block(self) -> tuple[int, int]:
        """Return (weights, bytes) of a block. Raises: UnknownQuantTypeError."""
        from numaload.dequantize import block_of

        return block_of(self.code)

    def conversion(self, dtype: np.dtype[Any]) -> Conversion:
        """Return what converts its blocks.

        Raises: UnknownQuantTypeError, UnsupportedTypeError, UsageError.
        """
        from numaload.dequantize import Conversion

        self.check_scales(dtype.name)
        order, scales = self.byte_order, self.scales
        if scales is not None and scales.factor is not None:
            scales.factors()
        return Conversion(self.code, dtype, name=self.name, byte_order=order, scales=scales)

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
        return self.nodes[0] if len(self.nodes) == 1 else None

    @property
    def nodes(self) -> Group:
        """Return the nodes whose memory this view is in, whose threads work on it."""
        return self._weights.nodes_of(self.name)

    @property
    def address(self) -> int:
        """Return the address of the blocks, valid until the weights are closed."""
        self.check_type()
        return self._weights._mapping(self._part, self.name).address + self.offset  # type: ignore[no-any-return]  # noqa: SLF001

    @property
    def buffer(self) -> memoryview:
        """Return the blocks as flat read-only bytes, zero-copy."""
        return self.memory().toreadonly()

    def memory(self) -> memoryview:
        """Return the same bytes, said to be writable, for torch: it warns of others."""
        self.check_type()
        info = self._info
        mapping = self._weights._mapping(self._part, self.name)  # noqa: SLF001
        return mapping.view(info.offset, info.nbytes, write=True)

    @property
    def is_file(self) -> bool:
        """Return whether ``read_into`` reads a file; replicas and copies are memory."""
        return self._weights.in_files and not self._weights.is_apart(self.name)

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
        return self._weights.workers(self.name)

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

    def fetch(
        self, start: int, nbytes: int, room: Callable[[int], NDArray[np.uint8]] | None = None
    ) -> NDArray[np.uint8]:
        """Return bytes of it: read from the file into ``room``, or where they are in memory.

        Raises: ReadError, FileChangedError, ClosedError, UsageError.
        """
        import numpy as np

        if not self.is_file:
            return np.frombuffer(self.buffer[start : start + nbytes], np.uint8)
        found = room(nbytes) if room else np.empty(nbytes, np.uint8)
        self.read_into(found.data, start)
        return found

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

        dims, is_packed = self._info.dims, self._info.qtype is None and self.scales is not None
        block_size, type_size = (1, 1) if is_packed else BLOCKS[self.qtype]
        row_bytes = (dims[0] if dims else 1) // block_size * type_size
        return np.frombuffer(self.buffer, np.uint8).reshape(prod(dims[1:]), row_bytes)

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Return ``shape`` in bytes in its last dim; flat where rows share bytes."""
        stored = self._info.dims[::-1]
        row_bytes, rest = divmod(self.nbytes, max(1, prod(stored[:-1])))
        return (self.nbytes,) if rest else (*stored[:-1], row_bytes)

    def dequantize(
        self,
        dtype: Any = "float32",
        out: Any = None,
        rows: Rows | None = None,
        expert: int | None = None,
        *,
        scaled: bool = True,
    ) -> Any:
        """Return floats of the whole tensor, of rows, of one expert, or of rows of one expert.

        dtype: "float32", "float16" or "bfloat16" (an ml_dtypes array), or numpy's or torch's.
        rows: (start, stop) or a slice; of a tensor of three dims they count through all experts.
        out: any C-contiguous buffer of that item size and element count, torch tensors included.
        scaled: multiply by scales that other tensors hold, in float32, before rounding. Without,
        NVFP4 is what ggml makes of the blocks alone, and numbers that have no scales of their own
        are refused.
        Returns: ``out``, or a new array: ``shape``, or (rows, columns), or ``shape[1:]``.
        Bit-exact with ggml. Raises: UnsupportedTypeError (naming the tensor, its type and why),
        UnknownQuantTypeError, UsageError, NodeMemoryError where a new array does not fit.
        """
        if not scaled:
            return self.as_stored().dequantize(dtype, out, rows, expert)
        with trace.span("dequantize", nodes=self.nodes, tensor=self.name) as span:
            with trace.importing("numaload.dequantize"):
                from numaload.dequantize import as_output, dtype_of, new_array

            wanted = dtype_of(dtype)
            start, stop, shape = self._selection(rows, expert)
            if span.is_on:
                span.nbytes = self.nbytes * prod(shape) // max(1, self.size)
            self.check_scales(wanted.name)
            self.code  # noqa: B018 - or an error
            what = f"tensor {self.name!r}"
            new = new_array(shape, wanted, what, self.nodes) if out is None else nullcontext(out)
            with new as result:
                flat = as_output(result, wanted, prod(shape))
                if flat.size:
                    self._dequantize(wanted, flat, start, stop)
            return result

    def _dequantize(self, dtype: np.dtype[Any], flat: NDArray[Any], start: int, stop: int) -> None:
        """Make rows [start, stop), counted through all experts."""
        from numaload.dequantize import dequantize_blocks, dequantize_turned

        scales, workers = self.scales, self.workers()
        if scales is None or not scales.turned:
            columns = self.shape[-1] if self.shape else 1
            dequantize_blocks(
                self.blocks[start:stop].reshape(-1, self.block[1]), self.code, dtype, flat, workers,
                name=self.name, byte_order=self.byte_order, scales=scales, first=start * columns,
                nodes=self.nodes,
            )  # fmt: skip
            return
        matrices = self.blocks.reshape(*scales.shape[:2], -1)
        out = flat.reshape(-1, scales.shape.rows)
        dequantize_turned(self.conversion(dtype), matrices, out, workers, start)

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
        self.check_scales(name)
        if not self._has_kernel_to(name):
            return torch_memory.converted(self._own_order(), device, wanted, self.name)
        made = kernel_dtype(name)
        kind = torch_memory.torch_dtype(made, self.name)
        with torch_memory.made(self.shape, kind, self.name, self.nodes) as out:
            self.dequantize(made, out=out)
        return torch_memory.converted(out, device, wanted, self.name, copy=False)

    def _has_kernel_to(self, dtype: str) -> bool:
        """Return whether a kernel makes ``dtype`` directly: float32 between may hold less."""
        if self.scales is not None:
            return NAMES.get(self.type_name) != dtype  # else they are wanted as they are
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
            shape = item_shape(type_name, self._info.dims[::-1], self.name)
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
        shape = self.shape
        first, count, columns = 0, prod(shape[:-1]), shape[-1] if shape else 1
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
        return first + start, first + stop, (stop - start, columns)

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
