"""Holes in a file, which read as zeros: what a download that did not finish may leave."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from numaload.errors import warn_once
from numaload.files.source import SourceFile
from numaload.formats.splits import some
from numaload.formats.unusable import unfinished

if TYPE_CHECKING:
    from numaload.formats.gguf import TensorInfo
    from numaload.formats.safetensors import SafeTensorInfo

LEAST = 1 << 20  # bytes of a hole; smaller ones are padding, or rows of zeros
MOST = 1000  # that are looked at


def say_holes(
    file: SourceFile, start: int = 0, tensors: Sequence[TensorInfo | SafeTensorInfo] = ()
) -> None:
    """Warn once of a file with holes of at least 1 MiB: in these tensors, or else anywhere.

    A download that did not finish has them, in a file of full size. A copy and some file systems
    make them of zeros that are meant, so it is no error. One system call tells of most files that
    there is none. Networks are not asked, and pages that were read once are none to the kernel.
    """
    holes = find_holes(file, start)
    named = tensors_in(tensors, holes) if holes else []
    if not holes or (tensors and not named):
        return
    nbytes = sum(stop - begin for begin, stop in holes)
    where = f" in tensors {some(named)}" if named else ""
    why = unfinished(file.path) or (
        "a download that did not finish, or zeros that a copy or the file system leaves out;"
        " its checksum (sha256sum) tells"
    )
    text = f"{nbytes} bytes from byte {holes[0][0]} on{where} are on no disk and read as zeros"
    warn_once(f"hole {file.path}", f"{file.path}: {text}: {why}")


def find_holes(file: SourceFile, start: int = 0) -> list[tuple[int, int]]:
    """Return (start, stop) of the holes of at least 1 MiB; none of a network's file is known."""
    if file.asked is not None or start + LEAST > file.size or _is_full(file):
        return []
    return list(_holes(file, start))


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
        for _ in range(MOST):
            start = os.lseek(file.fd, at, os.SEEK_HOLE)
            if start >= file.size:
                return
            try:
                at = os.lseek(file.fd, start, os.SEEK_DATA)
            except OSError:  # ENXIO: there is none up to the end
                at = file.size
            if at - start >= LEAST:
                yield start, at
    except OSError:  # cut, or a file system that cannot tell
        return


def tensors_in(
    tensors: Sequence[TensorInfo | SafeTensorInfo], holes: Sequence[tuple[int, int]]
) -> list[str]:
    """Return the names of tensors with bytes in one of these ascending ranges."""
    found = []
    for tensor in tensors:
        before = bisect_left(holes, (tensor.offset + tensor.nbytes, 0))
        if before and tensor.nbytes and holes[before - 1][1] > tensor.offset:
            found.append(tensor.name)
    return found
