"""Split files: one model in several GGUF files, in the naming of llama.cpp's gguf-split.

``NAME-00002-of-00009.gguf``: names count from 1, the metadata key ``split.no`` from 0.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from numaload.errors import SplitError
from numaload.formats.gguf import Header

NAME = re.compile(r"(?s)(?P<prefix>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf")
MAX_SPLITS = 99999


class SplitName(NamedTuple):
    prefix: str
    number: int  # from 1
    total: int

    def sibling(self, number: int) -> str:
        return f"{self.prefix}-{number:05d}-of-{self.total:05d}.gguf"


def split_name(path: str) -> SplitName | None:
    """What the file's name says of its place, or None where it is no split's name."""
    match = NAME.fullmatch(path)
    if match is None:
        return None
    name = SplitName(match["prefix"], int(match["number"]), int(match["count"]))
    return name if 1 <= name.number <= name.total else None


def sibling_paths(path: str) -> list[str]:
    """All files of the model that ``path`` is a part of, by name, in order; itself if no split.

    The name given counts, not what a link points to: hub caches link to names without a number.
    Raises: SplitError naming every file that is not there.
    """
    name = split_name(path)
    if name is None or name.total == 1:
        return [path]
    paths = [name.sibling(number) for number in range(1, name.total + 1)]
    missing = [p for p in paths if not os.path.exists(p)]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise SplitError(f"{len(missing)} of {len(paths)} split files missing: {shown}", path=path)
    return paths


def split_count(header: Header, path: str) -> int:
    """How many files the header says the model has; 1 where it says nothing."""
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_SPLITS:
        raise SplitError(f"split.count is {count!r}, expected 0 to {MAX_SPLITS}", path=path)
    if count > 1 and split_name(path) is None:
        raise SplitError(
            f"part of {count} split files, but not named NAME-00001-of-{count:05d}.gguf,"
            " so the others cannot be found",
            path=path,
        )
    return max(count, 1)  # gguf-split --merge leaves a 0


def check_splits(paths: Sequence[str], headers: Sequence[Header]) -> None:
    """Refuse files that do not belong together. Raises: SplitError."""
    if len(paths) == 1:
        return
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        number, count = header.metadata.get("split.no"), header.metadata.get("split.count")
        if (number, count) != (index, len(paths)):
            raise SplitError(
                f"expected split.no {index} of {len(paths)}, found {number} of {count}", path=path
            )
    total = headers[0].metadata.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise SplitError(f"{total} tensors announced, the files hold {found}", path=paths[0])
    _check_duplicates(paths, headers)


def _check_duplicates(paths: Sequence[str], headers: Sequence[Header]) -> None:
    owner: dict[str, str] = {}
    for path, header in zip(paths, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in owner:
                raise SplitError(
                    f"tensor {tensor.name!r} is in {owner[tensor.name]} too", path=path
                )
            owner[tensor.name] = path
