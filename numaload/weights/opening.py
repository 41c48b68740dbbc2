"""Opening a model by any one of its files."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from numaload.errors import ClosedError, SplitError
from numaload.formats.gguf import parse_header
from numaload.formats.splits import check_splits, sibling_paths, split_count, split_link
from numaload.numa.mapping import Mapping as MemoryMapping
from numaload.storage.files import SourceFile
from numaload.storage.parallel import Progress
from numaload.weights.model import Part, Weights


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
