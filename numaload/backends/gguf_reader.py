"""A reader like gguf-py's, over numaload's: opened in milliseconds, whatever the vocabulary.

Programs that use ``gguf.GGUFReader`` get it by one line, ``install()``. The contract is
``gguf/gguf_reader.py`` of the gguf package, 0.17 and later: the same attributes, the same names,
types, shapes and byte orders. Where it differs:

- a damaged file ends in a FormatError (a ValueError), before memory or time are lost over it;
- ``tensors`` are made when first asked for, parts of fields one by one when they are;
- blocks of Q8_1 have 36 bytes, as in ggml; gguf-py says 40. No model file has any;
- types that gguf-py does not know, but numaload does, are numaload's QuantType.
"""

from __future__ import annotations

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import gguf.gguf_reader
import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFEndian, GGUFValueType
from gguf.gguf_reader import ReaderField, ReaderTensor

from numaload.backends import replacing
from numaload.backends.gguf_fields import (
    ARRAY_HEAD,
    BYTES,
    U32,
    U64,
    Field,
    Image,
    Parts,
    Span,
    array_head_spans,
    array_types,
    body_of,
)
from numaload.errors import (
    FileChangedError,
    MetadataError,
    NotCopyable,
    ReadError,
    UnknownQuantTypeError,
    UsageError,
    reason,
)
from numaload.files.source import SourceFile
from numaload.formats.gguf import Header, TensorInfo, parse_header
from numaload.formats.metadata import BIG, LITTLE, SMALLEST, TYPE_NAMES, MetadataArray
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.weights.opening import read_header

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from numaload.weights import Weights

THEIRS: Any = gguf.gguf_reader.GGUFReader
MODES = ("r", "r+", "c")
TYPE_IDS = {name: type_id for type_id, name in TYPE_NAMES.items()}
FIRST_ENTRY = 24  # byte after magic, version and counts
# Types that gguf-py has as numbers, all others as bytes.
NUMPY = {"F16": "f2", "F32": "f4", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}


class GGUFReader(NotCopyable, THEIRS):  # type: ignore[misc] # an instance of theirs, whoever asks
    """One file: its metadata as ``fields``, its ``tensors``, zero-copy."""

    def __init__(self, path: os.PathLike[str] | str, mode: Literal["r", "r+", "c"] = "r") -> None:
        """Open a file; mode as of numpy.memmap: read, write to the file, or to memory alone.

        Raises: ModelNotFoundError (a FileNotFoundError), ReadError (an OSError), the FormatErrors
        of a header (ValueErrors), UsageError.
        """
        if mode not in MODES:
            raise UsageError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
        with SourceFile(os.fsdecode(path)) as file:
            header = read_header(file, parse_header)
            self._take(header, _mapped(file, mode), file.path)

    @classmethod
    def over(cls, weights: Weights, part: int = 0) -> GGUFReader:
        """Read opened weights, of a replica too: all in that memory, read-only.

        part: which file of a model in several. Raises: UsageError for other formats than GGUF.
        """
        header, path = weights.parts[part].header, weights.paths[part]
        if not isinstance(header, Header):
            raise UsageError(f"{path}: not a GGUF file")
        reader = cls.__new__(cls)
        reader._take(header, np.frombuffer(weights.image(part), np.uint8), path)  # noqa: SLF001
        return reader

    def _take(self, header: Header, data: NDArray[np.uint8], path: str) -> None:
        big = header.byte_order == "big"
        self.data = data
        self.byte_order = "I" if header.byte_order == sys.byteorder else "S"
        self.endianess = GGUFEndian.BIG if big else GGUFEndian.LITTLE
        self.alignment, self.data_offset = header.alignment, header.data_start
        self._infos = header.tensors
        self._image = Image(data.view(np.ndarray), BIG if big else LITTLE, path)
        self.fields: OrderedDict[str, ReaderField] = OrderedDict()
        for field in _counts(self._image):
            self.fields[field.name] = field
        self._infos_start = self._add_fields(header)

    def _add_fields(self, header: Header) -> int:
        """Add a field for each metadata key; return the byte after the last."""
        at = FIRST_ENTRY
        for key, value in header.metadata.items():
            if key in self.fields:
                raise MetadataError(f"key {key!r} appears twice", path=self._image.path, offset=at)
            type_name = header.metadata.type_name(key)
            self.fields[key], at = _field(self._image, at, key, value, type_name)
        return at

    @cached_property
    def tensors(self) -> list[ReaderTensor]:
        """List all tensors. Raises: UnknownQuantTypeError; fields can be read nevertheless."""
        return list(self._tensors())

    def _tensors(self) -> Iterator[ReaderTensor]:
        at = self._infos_start
        for info in self._infos:
            field, at = _tensor_field(self._image, at, info)
            tensor_type, qtype = _types(info, self._image.path)
            yield ReaderTensor(
                name=info.name,
                tensor_type=tensor_type,
                shape=field.parts[3],
                n_elements=prod(info.dims),
                n_bytes=info.nbytes,
                data_offset=info.offset,
                data=self._array(info, qtype),
                field=field,
            )

    def _array(self, info: TensorInfo, qtype: QuantType) -> NDArray[Any]:
        flat, shape = self.data[info.offset : info.offset + info.nbytes], info.dims[::-1]
        if qtype.name in NUMPY:
            return flat.view(self._image.order.sign + NUMPY[qtype.name]).reshape(shape)
        block_size, type_size = BLOCKS[qtype]
        *rows, columns = shape or (1,)
        return flat.reshape(*rows, columns // block_size * type_size)


def _mapped(file: SourceFile, mode: Literal["r", "r+", "c"]) -> NDArray[np.uint8]:
    """Map all of the file, as gguf-py does. Raises: ReadError."""
    try:
        data, same = file.ask(_map, file, mode)
    except ReadError:
        raise
    except OSError as error:
        raise ReadError(reason(error), path=file.path) from error
    if not same:
        raise FileChangedError("replaced while it was opened", path=file.path)
    file.check_unchanged()
    data.filename = os.path.abspath(file.path)  # as if opened by its name
    return data


def _map(file: SourceFile, mode: Literal["r", "r+", "c"]) -> tuple[np.memmap[Any, Any], bool]:
    """Map the file, and compare what its name led to with it. Raises: OSError."""
    fd = os.open(file.path, os.O_RDWR | os.O_CLOEXEC) if mode == "r+" else os.dup(file.fd)
    with os.fdopen(fd, "r+b" if mode == "r+" else "rb") as handle:
        data = np.memmap(handle, np.uint8, mode)
        return data, os.path.samestat(os.fstat(fd), os.fstat(file.fd))


def _counts(image: Image) -> Iterator[ReaderField]:
    """Make fields of the header's version and counts, as gguf-py does."""
    for offset, name, type_id in (
        (4, "GGUF.version", U32),
        (8, "GGUF.tensor_count", U64),
        (16, "GGUF.kv_count", U64),
    ):
        span = Span(offset, image.dtype(type_id), 1)
        yield Field(offset, name, Parts(image, [span]), [0], [GGUFValueType(type_id)])


def _field(image: Image, at: int, key: str, value: Any, type_name: str) -> tuple[Field, int]:
    """Return the field whose entry begins at this byte, and the byte after it."""
    length = len(key.encode())
    start = at + 8 + length + 4
    head = [
        Span(at, image.dtype(U64), 1),
        Span(at + 8, BYTES, length),
        Span(start - 4, image.dtype(U32), 1),
    ]
    if isinstance(value, MetadataArray):
        head += array_head_spans(image, start)
        types, start = array_types(image, start), start + ARRAY_HEAD
        body = body_of(image, value.type_id, start, len(value), value.nbytes)
        data, nbytes = body.data(len(head)), value.nbytes
    else:
        type_id = TYPE_IDS[type_name]
        text = 8 + len(value.encode("utf-8", "surrogateescape")) if type_name == "string" else 0
        nbytes = text or SMALLEST[type_id]
        body = body_of(image, type_id, start, nbytes=nbytes)
        types = [GGUFValueType(type_id)]
        data = [*body.data(len(head))]
    return Field(at, key, Parts(image, head, body), data, types), start + nbytes


def _tensor_field(image: Image, at: int, info: TensorInfo) -> tuple[Field, int]:
    length, n_dims = len(info.name.encode()), len(info.dims)
    numbers = at + 8 + length
    rest = numbers + 4 + 8 * n_dims
    spans = [
        Span(at, image.dtype(U64), 1),
        Span(at + 8, BYTES, length),
        Span(numbers, image.dtype(U32), 1),
        Span(numbers + 4, image.dtype(U64), n_dims),
        Span(rest, image.dtype(U32), 1),
        Span(rest + 4, image.dtype(U64), 1),
    ]
    return Field(at, info.name, Parts(image, spans), [1, 3, 4, 5], []), rest + 12


def _types(info: TensorInfo, path: str) -> tuple[Any, QuantType]:
    """Return gguf-py's type (numaload's where gguf-py has none), and numaload's."""
    if info.qtype is None:
        message = f"tensor {info.name!r}: {info.problem}"
        raise UnknownQuantTypeError(message, path=path)
    known = GGMLQuantizationType.__members__
    return known.get(info.qtype.name, info.qtype), info.qtype


def install() -> replacing.Replaced:
    """Put this GGUFReader where gguf-py's is: in the gguf package, and wherever it was imported to.

    Programs that are started or imported afterwards use it unchanged. The returned object lists
    the places; its ``undo()``, or the end of a with block, puts the originals back.
    """
    return replacing.replace({"GGUFReader": (THEIRS, GGUFReader)})
