"""Headers in memory: parsed from exactly the bytes that were asked for."""

from __future__ import annotations

import tracemalloc

from numaload.errors import FormatError
from numaload.formats.gguf import Header, parse_header
from numaload.formats.metadata import MetadataArray


class Source:
    """A file in memory that notes what is read of it and gives exactly that."""

    def __init__(self, raw: bytes, size: int | None = None) -> None:
        self.raw, self.size, self.reads = raw, len(raw) if size is None else size, 0

    def read_at(self, offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= self.size
        self.reads += nbytes
        return self.raw[offset : offset + nbytes].ljust(nbytes, b"\0")


def parse(raw: bytes, size: int | None = None) -> Header:
    source = Source(raw, size)
    return parse_header(source.read_at, source.size, "model.gguf")


def check_survives(raw: bytes) -> None:
    source = Source(raw)
    try:
        header = parse_header(source.read_at, source.size)
    except FormatError:
        return
    for tensor in header.tensors:
        assert header.data_start <= tensor.offset <= tensor.offset + tensor.nbytes <= len(raw)
    for value in header.metadata.values():
        if isinstance(value, MetadataArray):
            assert len(value.tolist()) == len(value)


def peak(raw: bytes, *, refused: bool = True) -> int:
    """Bytes that parsing, and decoding of all arrays, took at most over the input."""
    source = Source(raw)
    tracemalloc.start()
    try:
        header = parse_header(source.read_at, source.size)
        assert not refused
        for value in header.metadata.values():
            if isinstance(value, MetadataArray):
                len(value[:1])
    except FormatError:
        assert refused
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return peak
