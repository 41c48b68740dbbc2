"""Read the header of an opened file, and say what is wrong with a file that is not all there."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from numaload.errors import FormatError, warn_once
from numaload.files.source import SourceFile
from numaload.formats import gguf, safetensors
from numaload.formats.metadata import ReadAt
from numaload.formats.splits import some
from numaload.formats.unusable import unfinished

H = TypeVar("H", gguf.Header, safetensors.Header)

LEAST_HOLE = 1 << 20  # bytes; smaller ones are padding, or rows of zeros
MOST_HOLES = 1000  # that are looked at


def read_header(
    file: SourceFile, parse: Callable[[ReadAt, int, str], H], read_at: ReadAt | None = None
) -> H:
    """Parse the header of an opened file; ``read_at`` is for what its metadata reads later.

    Raises: ReadError, and the parser's FormatErrors with what name and folder say of the reason.
    """
    try:
        header = parse(read_at or file.read_at, file.size, file.path)
    except FormatError as error:
        why = unfinished(file.path)
        error.add(f"; {why}" if why else "")
        raise
    say_holes(file, header.data_start, header.tensors)
    return header


def say_holes(
    file: SourceFile,
    start: int = 0,
    tensors: Iterable[gguf.TensorInfo | safetensors.SafeTensorInfo] = (),
) -> None:
    """Warn once of a file with a hole of at least 1 MiB in its tensors, or anywhere without these.

    An unfinished download has holes in a file of full size, which read as zeros. A copy or a file
    system may also make them of zeros that are meant, so it is no error. One system call says of a
    whole file that it has none; a network is not asked.
    """
    if file.asked is not None or start + LEAST_HOLE > file.size or _is_full(file):
        return
    holes = list(_holes(file, start))
    if not holes:
        return
    named = list(_inside(tensors, holes))
    if tensors and not named:
        return
    nbytes, where = sum(stop - begin for begin, stop in holes), holes[0][0]
    of = f", of tensors {some(named)}" if named else ""
    why = unfinished(file.path) or (
        "a download that did not finish, or zeros that a copy or the file system left out: compare"
        " its checksum (sha256sum) with the publisher's"
    )
    text = f"{nbytes} bytes from byte {where} on are on no disk and read as zeros{of}: {why}"
    warn_once(f"hole {file.path}", f"{file.path}: {text}")


def _is_full(file: SourceFile) -> bool:
    """Return whether the file is seen to take all of its bytes, where looking for a hole is slow.

    Those file systems have no device of their own: tmpfs asks every page, btrfs every 128 KiB.
    """
    if os.major(file.opened.device):
        return False
    return os.fstat(file.fd).st_blocks * 512 >= file.size


def _holes(file: SourceFile, at: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the file's large holes from ``at`` on."""
    try:
        for _ in range(MOST_HOLES):
            start = os.lseek(file.fd, at, os.SEEK_HOLE)
            if start >= file.size:
                return
            try:
                at = os.lseek(file.fd, start, os.SEEK_DATA)
            except OSError:  # ENXIO: there is none up to the end
                at = file.size
            if at - start >= LEAST_HOLE:
                yield start, at
    except OSError:  # cut, or a file system that cannot tell
        return


def _inside(
    tensors: Iterable[gguf.TensorInfo | safetensors.SafeTensorInfo], holes: list[tuple[int, int]]
) -> Iterator[str]:
    """Yield the names of tensors with bytes in a hole."""
    for tensor in tensors:
        before = bisect_left(holes, (tensor.offset + tensor.nbytes, 0))
        if before and holes[before - 1][1] > tensor.offset and tensor.nbytes:
            yield tensor.name
