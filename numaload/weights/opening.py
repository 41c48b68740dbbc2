"""Opening a model by any one of its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from numaload import trace
from numaload.errors import ClosedError, FormatError, SplitError
from numaload.files.holes import say_holes
from numaload.files.reader import Announce, Progress
from numaload.files.source import SourceFile, absolute, make_room_for, reach, read_whole
from numaload.files.source import io_timeout as waiting
from numaload.formats import gguf, safetensors
from numaload.formats.metadata import ReadAt
from numaload.formats.shards import SUFFIX, Shards, check_shards, find_shards, is_layout
from numaload.formats.splits import check_splits, sibling_paths, split_count, split_link
from numaload.formats.unusable import unfinished
from numaload.linux.mapping import MappedMemory
from numaload.weights.model import AnyHeader, Part, Weights

HEAD = 9  # bytes that tell one format from the other

Opened = dict[str, SourceFile]  # by the names that were asked for: an error closes all of them
Parse = Callable[[ReadAt, int, str], AnyHeader]
H = TypeVar("H", gguf.Header, safetensors.Header)


def open_weights(
    path: str | os.PathLike[str],
    *,
    copy: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Weights:
    """Open a model by any one of its files: headers only, milliseconds.

    path: a GGUF or safetensors file, of several any one; of safetensors also their index, or the
    folder that a model or a repository of the hub's cache is in.
    copy: read all of it into memory of this process now, in parallel, instead of mapping the files
    when tensors are looked at: then nobody who truncates, rewrites or replaces them can hurt.
    It takes the files' size in memory that no other process shares.
    io_timeout: seconds to wait for an answer of a network file system, then StalledError; also of
    what is read of it later.
    progress(bytes done, bytes in all): of that reading; returning False cancels.
    announce: called with the plan of that reading, if something is not in RAM.
    Raises: ReadError, and the FormatErrors of a header or of files that do not fit together; with
    copy also NodeMemoryError if it does not fit, FileChangedError, CancelledError: then nothing is
    left of it.
    """
    given = absolute(os.fsdecode(path))
    with waiting(io_timeout), trace.span("open", file=given):
        reach(given)
        return _opened(given, progress, announce, copy=copy)


def _opened(
    given: str,
    progress: Progress | None,
    announce: Announce | None,
    *,
    copy: bool,
    paths: Sequence[str] = (),
) -> Weights:
    """Open the model that ``given`` is a file of. paths: of all its shards, where that is known."""
    opened: Opened = {}
    try:
        if is_layout(given) or _is_safetensors(_file(given, opened)):
            parse: Parse = safetensors.parse_header
            shards = Shards(list(paths), None, {}) if paths else find_shards(given, read_whole)
            parts = _shards(shards, opened)
        else:
            parse = gguf.parse_header
            parts = _splits(split_link(given), opened)
        if len(opened) > len(parts):  # what was given is a link to a file of another name
            opened[given].close()
        return _copied(parts, parse, progress, announce) if copy else Weights(parts)
    except BaseException:
        for file in opened.values():
            file.close()
        raise


def reopen(paths: Sequence[str]) -> Weights:
    """Open the model of exactly these files: of some only an index says that they are one.

    Raises: as ``open_weights``.
    """
    reach(paths[0])
    return _opened(paths[0], None, None, copy=False, paths=paths if len(paths) > 1 else ())


def read_header(
    file: SourceFile, parse: Callable[[ReadAt, int, str], H], read_at: ReadAt | None = None
) -> H:
    """Parse the header of an opened file; ``read_at`` is for what its metadata reads later.

    Raises: ReadError, and the parser's FormatErrors with what name and folder say of the reason.
    """
    try:
        with trace.span("parse", file=file.path) as span:
            header = parse(read_at or file.read_at, file.size, file.path)
            span.nbytes = header.data_start
    except FormatError as error:
        why = unfinished(file.path)
        error.add(f"; {why}" if why else "")
        raise
    say_holes(file, header.data_start, header.tensors)
    return header


def _file(path: str, opened: Opened) -> SourceFile:
    if path not in opened:
        opened[path] = SourceFile(path)
    return opened[path]


def _is_safetensors(file: SourceFile) -> bool:
    """Tell the format by the first bytes; where they say nothing, by the name."""
    start = file.read_at(0, min(HEAD, file.size))
    if start.startswith(gguf.MAGIC):
        return False
    if safetensors.looks_like(start):
        return True
    if file.path.endswith(SUFFIX):  # but no header: said before its siblings are missed
        read_header(file, safetensors.parse_header)
    return file.path.endswith(SUFFIX)


def _splits(given: str, opened: Opened) -> list[Part]:
    file, header = _open_file(given, gguf.parse_header, opened)
    files = {given: (file, header)}
    count = split_count(header, given, file.read_at)
    if count == 1:
        return [Part(*files[given])]
    paths = sibling_paths(given)
    if len(paths) != count:
        raise SplitError(f"named as one of {len(paths)} files, split.count is {count}", path=given)
    make_room_for(count)
    for path in paths:
        if path != given:
            files[path] = _open_file(path, gguf.parse_header, opened)
    check_splits(paths, [files[path][1] for path in paths])
    return [Part(*files[path]) for path in paths]


def _shards(shards: Shards, opened: Opened) -> list[Part]:
    make_room_for(len(shards.paths))
    files = [_open_file(path, safetensors.parse_header, opened) for path in shards.paths]
    check_shards(shards, [header for _, header in files])
    return [Part(*file) for file in files]


def _copied(
    parts: Sequence[Part], parse: Parse, progress: Progress | None, announce: Announce | None
) -> Weights:
    """Return weights in memory of this process, metadata included."""
    from numaload.files.copy import copy_files

    copies = copy_files([part.file for part in parts], progress, announce)
    inside = [
        Part(part.file, parse(_reader(copied), copied.length, part.file.path))
        for part, copied in zip(parts, copies, strict=True)
    ]
    return Weights(inside, copies)


def _reader(mapping: MappedMemory) -> Callable[[int, int], bytes]:
    return lambda offset, nbytes: bytes(mapping.view(offset, nbytes))


def _open_file(
    path: str, parse: Callable[[ReadAt, int, str], H], opened: Opened
) -> tuple[SourceFile, H]:
    file = _file(path, opened)

    def read_at(offset: int, nbytes: int) -> bytes:
        """Read metadata arrays when they are asked for: perhaps long after opening."""
        if file.closed:
            raise ClosedError(f"{path} was closed")
        file.check_unchanged()
        return file.read_at(offset, nbytes)

    return file, read_header(file, parse, read_at)
