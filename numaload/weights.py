"""Weights and Tensor: what users hold. Headers are read at once, weights only when looked at."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from operator import index
from threading import RLock
from typing import TYPE_CHECKING, Any

from numaload.errors import (
    ClosedError,
    SplitError,
    TensorNotFoundError,
    UnknownQuantTypeError,
    UsageError,
)
from numaload.formats.gguf import Header, TensorInfo, parse_header
from numaload.formats.metadata import Metadata
from numaload.formats.qtypes import BLOCKS, QuantType, foreign_type
from numaload.formats.splits import check_splits, sibling_paths, split_count, split_link
from numaload.numa.lists import Group, format_list
from numaload.numa.mapping import Mapping as MemoryMapping
from numaload.numa.mapping import map_file
from numaload.numa.topology import Topology, topology
from numaload.storage.files import SourceFile
from numaload.storage.known import Model
from numaload.storage.parallel import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Rows = slice | range | tuple[int, int]


@dataclass(frozen=True)
class Part:
    """One file of a model, opened, with its parsed header."""

    file: SourceFile
    header: Header


class Tensor:
    """One tensor: a description, and zero-copy access to its blocks.

    dims are in GGUF order (fastest first), shape in numpy order; nbytes and offset are bytes.
    """

    def __init__(self, info: TensorInfo, weights: Weights, part: int) -> None:
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
        """Elements."""
        return prod(self.dims)

    @property
    def qtype(self) -> QuantType:
        """Raises: UnknownQuantTypeError; ``type_name`` names those too."""
        found = self._info.qtype
        if found is None:
            type_id = self._info.type_id
            raise UnknownQuantTypeError(
                f"tensor {self.name!r} cannot be used, the rest of the file can: type {type_id} is"
                f" {foreign_type(type_id).why}",
                path=self.path,
            )
        return found

    @property
    def type_name(self) -> str:
        return self._info.type_name

    @property
    def path(self) -> str:
        """The file that holds it: the source, also where this view is of a replica."""
        return self._weights._parts[self._part].file.path  # noqa: SLF001

    @property
    def byte_order(self) -> str:
        """Of its numbers in the file, and so in ``blocks``: "little", or "big" (rare)."""
        return self._weights._parts[self._part].header.byte_order  # noqa: SLF001

    @property
    def node(self) -> int | None:
        """The node whose memory this view is in; None for page cache, copies and several nodes."""
        return self._weights.node

    @property
    def address(self) -> int:
        """Where the blocks are in this process, valid until the weights are closed."""
        self.qtype  # noqa: B018 - an unknown type has no known extent
        return self._weights._mapping(self._part).address + self.offset  # type: ignore[no-any-return]  # noqa: SLF001

    @property
    def buffer(self) -> memoryview:
        """The blocks as flat read-only bytes, zero-copy."""
        self.qtype  # noqa: B018
        return self._weights._mapping(self._part).view(self.offset, self.nbytes)  # noqa: SLF001

    @property
    def blocks(self) -> NDArray[np.uint8]:
        """(rows, bytes per row) uint8, read-only, zero-copy; experts one after another.

        The bytes as they are in the file, which may be a big-endian one: see ``byte_order``.
        """
        import numpy as np

        block_size, type_size = BLOCKS[self.qtype]
        row_bytes = self._columns // block_size * type_size
        return np.frombuffer(self.buffer, np.uint8).reshape(self._rows, row_bytes)

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
        """Floats of the whole tensor, of rows, of one expert, or of rows of one expert.

        dtype: "float32", "float16" or "bfloat16" (an ml_dtypes array), or numpy's or torch's.
        rows: (start, stop) or a slice; of a tensor of three dims they count through all experts.
        out: any C-contiguous buffer of that item size and element count, torch tensors included.
        Returns: ``out``, or a new array: ``shape``, or (rows, columns), or ``shape[1:]``.
        Bit-exact with ggml. Raises: UnsupportedTypeError (naming the tensor, its type and why),
        UnknownQuantTypeError, UsageError.
        """
        import numpy as np

        from numaload.dequantize import as_output, dequantize_blocks, dtype_of

        wanted = dtype_of(dtype)
        start, stop, shape = self._selection(rows, expert)
        qtype = self.qtype
        _, type_size = BLOCKS[qtype]
        blocks = self.blocks[start:stop].reshape(-1, type_size)
        result = np.empty(shape, wanted) if out is None else out
        flat = as_output(result, wanted, prod(shape))
        if flat.size:
            dequantize_blocks(
                blocks, qtype, wanted, flat, self._weights.workers(),
                name=self.name, byte_order=self.byte_order,
            )  # fmt: skip
        return result

    def _selection(self, rows: Rows | None, expert: int | None) -> tuple[int, int, tuple[int, ...]]:
        """First row, row after the last, shape of the result."""
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
        return f"<Tensor {self.name} {self.type_name} {self.shape}>"


def _row_range(rows: Rows, count: int, name: str) -> tuple[int, int]:
    wanted = slice(*rows) if isinstance(rows, tuple) and len(rows) == 2 else rows
    if isinstance(wanted, (slice, range)):
        start = 0 if wanted.start is None else index(wanted.start)
        stop = count if wanted.stop is None else index(wanted.stop)
        if wanted.step in (None, 1) and 0 <= start <= stop <= count:
            return start, stop
    raise UsageError(f"{name}: rows {rows} of {count}; a range inside, in steps of 1, is needed")


class Weights(Mapping[str, Tensor]):
    """All tensors of a model, in file order, by name; over its files or over one replica.

    ``close()`` gives up the memory; arrays handed out before stay valid, raw addresses do not.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        mappings: Sequence[MemoryMapping] | None = None,
        nodes: Group = (),
    ) -> None:
        self._parts, self.nodes, self._closed = parts, nodes, False
        self._machine: Topology | None = None
        self._mappings: list[MemoryMapping | None] = [None] * len(parts)
        self._mappings[:] = mappings or self._mappings
        self._lock = RLock()
        self._tensors = {
            info.name: Tensor(info, self, index)
            for index, part in enumerate(parts)
            for info in part.header.tensors
        }

    @property
    def node(self) -> int | None:
        """The node whose memory this is; None for the page cache and for what several share."""
        return self.nodes[0] if len(self.nodes) == 1 else None

    @property
    def paths(self) -> list[str]:
        return [part.file.path for part in self._parts]

    @property
    def metadata(self) -> Metadata:
        """Of the first file: the others hold only what says that they are splits."""
        return self._parts[0].header.metadata

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(part.file.size for part in self._parts)

    @property
    def parts(self) -> Sequence[Part]:
        return self._parts

    def model(self) -> Model:
        """The identity under which replicas of these files are kept."""
        paths = tuple(os.path.abspath(path) for path in self.paths)
        return Model(paths, tuple(part.file.identity() for part in self._parts))

    def workers(self) -> Any:
        """The threads that work on these weights: on their node, or everywhere."""
        from numaload.numa.workers import pool

        if self._machine is None:
            self._machine = topology()
        return pool(self._machine, self.nodes)

    def _mapping(self, part: int) -> MemoryMapping:
        with self._lock:  # a mapping that another one replaced would take its addresses with it
            mapping = self._mappings[part]
            if self._closed or (mapping is not None and mapping.closed):
                raise ClosedError(f"the weights of {self.paths[0]} were closed")
            if mapping is None:
                file = self._parts[part].file
                file.check_unchanged()
                mapping = self._mappings[part] = map_file(file.fd, file.size)
            return mapping

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise TensorNotFoundError(name, self._tensors)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for mapping in self._mappings:
                if mapping is not None:
                    mapping.close()
            if not self.nodes:  # files belong to the weights that were opened from them
                for part in self._parts:
                    part.file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" on node {format_list(self.nodes)}" if self.nodes else ""
        return f"<Weights {self.paths[0]}: {len(self)} tensors, {self.nbytes} bytes{where}>"


def open_weights(
    path: str | os.PathLike[str], *, copy: bool = False, progress: Progress | None = None
) -> Weights:
    """Open a GGUF model by any one of its files: headers only, milliseconds.

    copy: read all of it into memory of this process now, in parallel, instead of mapping the files
    when tensors are looked at: then nobody who truncates, rewrites or replaces them can hurt.
    It takes the files' size in memory that no other process shares.
    progress(bytes done, bytes in all): of that reading; returning False cancels.
    Raises: ReadError, and the FormatErrors of a header or of splits that do not fit together; with
    copy also NodeMemoryError if it does not fit, FileChangedError, CancelledError: then nothing is
    left of it.
    """
    given = split_link(os.fsdecode(path))
    parts = {given: _open_part(given)}
    try:
        count = split_count(parts[given].header, given)
        paths = sibling_paths(given) if count > 1 else [given]
        if len(paths) != count:
            raise SplitError(
                f"named as one of {len(paths)} files, split.count is {count}", path=given
            )
        for other in paths:
            if other != given:
                parts[other] = _open_part(other)
        check_splits(paths, [parts[p].header for p in paths])
        opened = [parts[p] for p in paths]
        return _copied(opened, progress) if copy else Weights(opened)
    except BaseException:
        for part in parts.values():
            part.file.close()
        raise


def _copied(parts: Sequence[Part], progress: Progress | None) -> Weights:
    """Weights in memory of this process, metadata included."""
    from numaload.storage.copy import copy_files

    copies = copy_files([part.file for part in parts], progress)
    inside = [
        Part(part.file, parse_header(_reader(copied), copied.length, part.file.path))
        for part, copied in zip(parts, copies, strict=True)
    ]
    return Weights(inside, copies)


def _reader(mapping: MemoryMapping) -> Callable[[int, int], bytes]:
    return lambda offset, nbytes: bytes(mapping.view(offset, nbytes))


def _open_part(path: str) -> Part:
    file = SourceFile(path)

    def read_at(offset: int, nbytes: int) -> bytes:
        """Arrays of the metadata are read when they are asked for: perhaps long after opening."""
        if file.fd < 0:
            raise ClosedError(f"{path} was closed")
        file.check_unchanged()
        return file.read_at(offset, nbytes)

    try:
        return Part(file, parse_header(read_at, file.size, path))
    except BaseException:
        file.close()
        raise
