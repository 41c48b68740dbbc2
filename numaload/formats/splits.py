"""Split files: one model in several files, and what their names, links and headers say of it.

``NAME-00002-of-00009.gguf`` is the naming of llama.cpp's gguf-split: names count from 1, the
metadata key ``split.no`` from 0. Safetensors are named so too, but of the largest models with
other digits (``-00001-of-000163``, ``-1-of-61``), or from 0 on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from numaload.errors import SplitError
from numaload.formats.unusable import absence

if TYPE_CHECKING:
    from numaload.formats.gguf import Header
    from numaload.formats.metadata import ReadAt

NAME = re.compile(r"(?s)(.*)-([0-9]{1,9})-of-([0-9]{1,9})(\.gguf|\.safetensors)")
MAGIC = b"GGUF"
MAX_SPLITS = 99999
MOST_PADDING = 1 << 16  # bytes between joined files
MAX_LINKS = 40  # as the kernel
MOST_MISSING = 1000  # files that are looked for in vain
NAMES = 5  # of files in an error
SHOWN = 60  # characters of a value in an error
ALIGNMENT, TOTAL = "general.alignment", "split.tensors.count"
HUB_ADVICE = ": open the link to it in ../snapshots"


class SplitName(NamedTuple):
    """What the name of one of several files says; ``of`` as written, padded to ``digits``."""

    prefix: str
    number: int
    digits: int
    of: str
    suffix: str

    @property
    def total(self) -> int:
        return int(self.of)

    def sibling(self, number: int) -> str:
        return f"{self.prefix}-{number:0{self.digits}d}-of-{self.of}{self.suffix}"

    def numbering(self) -> tuple[SplitName, range]:
        """Return the form and the range of the files' numbers: those that are there show both."""
        plain = self._replace(digits=1)
        either = self.digits > 1 and self.sibling(self.number) == plain.sibling(self.number)
        # What a dead disk does not tell is no reason to look for other names than usual.
        exists = os.path.exists
        form = plain if either and any(exists(plain.sibling(n)) for n in range(10)) else self
        from_0 = exists(form.sibling(0))
        last = self.total - (from_0 and not is_there(form.sibling(self.total)))
        return form, range(not from_0, last + 1)


def split_name(path: str, suffix: str = ".gguf") -> SplitName | None:
    """Return what the file's name says of its place, or None where it is no split's name."""
    match = NAME.fullmatch(path)
    if match is None or match[4] != suffix:
        return None
    name = SplitName(match[1], int(match[2]), len(match[2]), match[3], suffix)
    return name if name.number <= name.total <= MAX_SPLITS and name.total else None


def split_link(path: str) -> str:
    """Return ``path``, or the first link it leads through that is named as a split file.

    The name given counts first: hub caches link names with a number to files without. Where only
    a link further on has the number (``latest.gguf``), it is the one whose siblings can be found.
    """
    found = path
    for _ in range(MAX_LINKS):
        if split_name(found):
            return found
        try:
            target = os.readlink(found)
        except (OSError, ValueError):  # no link, not there, or a path with a NUL in it
            break
        found = os.path.join(os.path.dirname(found), target)
    return path


def sibling_paths(path: str) -> list[str]:
    """Return all files of ``path``'s model, by name, in order; only itself if it is no split.

    Names are those of ``split_link``. Raises: SplitError naming every file that is not there.
    """
    path = split_link(path)
    name = split_name(path)
    if name is None or name.total == 1:
        return [path]
    form, numbers = name.numbering()
    return all_there(map(form.sibling, numbers), len(numbers), "split files", path)


def all_there(paths: Iterable[str], total: int, what: str, by: str) -> list[str]:
    """Return these paths if each exists. Raises: SplitError that names some that do not.

    A name alone may announce 99,999 files: few of them are looked for where none is there.
    """
    found: list[str] = []
    missing: list[str] = []
    for path in paths:
        (found if is_there(path) else missing).append(path)
        if len(missing) == MOST_MISSING:
            break
    if missing:
        count = f"{'at least ' * (len(missing) == MOST_MISSING)}{len(missing)} of {total}"
        why = absence(missing[0])
        message = f"{count} {what} missing: {some(missing)}{why}"
        raise SplitError(message, path=by, missing=missing)
    return found


def some(names: Sequence[str]) -> str:
    """Return the first of these names, for an error."""
    return ", ".join(names[:NAMES]) + (", ..." if len(names) > NAMES else "")


def is_there(path: str) -> bool:
    """Return whether a file is there. On a dead disk it is: opening it will say what is wrong."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False
    except OSError:
        return True
    return True


def split_count(header: Header, path: str, read_at: ReadAt | None = None) -> int:
    """Return how many files the header says the model has; 1 where it says nothing.

    read_at: of the file, to tell one that was joined from others. Raises: SplitError.
    """
    count = header.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MAX_SPLITS:
        raise SplitError(f"split.count is {count!r}, expected 0 to {MAX_SPLITS}", path=path)
    if count > 1 and split_name(path) is None:
        at = _joined(header, read_at) if read_at else -1
        if at >= 0:
            message = (
                f"the {count} split files of a model, joined with cat: the second begins at byte"
                f" {at}; open any one of the files themselves, or join them with llama.cpp's"
                " gguf-split --merge"
            )
            raise SplitError(message, path=path, offset=at)
        in_hub = os.path.basename(os.path.dirname(os.path.abspath(path))) == "blobs"
        raise SplitError(
            f"part of {count} split files, but not named NAME-00001-of-{count:05d}.gguf,"
            f" so the others cannot be found{HUB_ADVICE if in_hub else ''}",
            path=path,
        )
    return max(count, 1)  # gguf-split --merge leaves a 0


def _joined(header: Header, read_at: ReadAt) -> int:
    """Return the byte after the weights at which another GGUF file begins, or -1."""
    end = max((t.offset + t.nbytes for t in header.tensors), default=header.data_start)
    found = read_at(end, min(MOST_PADDING, header.size - end)).find(MAGIC)
    return end + found if found >= 0 else -1


def check_splits(paths: Sequence[str], headers: Sequence[Header]) -> None:
    """Refuse files that do not belong together. Raises: SplitError naming the file and why."""
    if len(paths) == 1:
        return
    first = _identity(headers[0])
    for index, (path, header) in enumerate(zip(paths, headers, strict=True)):
        number, count = header.metadata.get("split.no"), header.metadata.get("split.count")
        if (number, count) != (index, len(paths)):
            raise SplitError(
                f"expected split.no {index} of {len(paths)}, found {number} of {count}", path=path
            )
        _check_kinship(paths[0], first, path, _identity(header))
        _check_alignment(paths[0], headers[0], path, header)
    total = headers[0].metadata.get("split.tensors.count")
    found = sum(len(header.tensors) for header in headers)
    if total is not None and total != found:
        raise SplitError(f"{total} tensors announced, the files hold {found}", path=paths[0])
    _check_duplicates(paths, headers)


def _check_kinship(
    first_path: str, first: Mapping[str, Any], path: str, said: Mapping[str, Any]
) -> None:
    """Check that two files agree in what both say. Most say little: only the first has a name."""
    for key in said.keys() & first.keys():
        if said[key] != first[key]:
            raise SplitError(
                f"of another model than {first_path}: {key} is {_short(said[key])},"
                f" there {_short(first[key])}",
                path=path,
            )


def _identity(header: Header) -> dict[str, Any]:
    keys = [key for key in header.metadata if key.startswith("general.") or key == TOTAL]
    found = {key: header.metadata[key] for key in keys if key != ALIGNMENT}
    return found | {"byte order": header.byte_order}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def _check_alignment(first_path: str, first: Header, path: str, header: Header) -> None:
    """Check alignment: gguf-py uses general.alignment for all files, but writes it into the first.

    Such a file's weights seem to begin somewhat early. gguf-split aligns them as they say: then
    the file ends where its last tensor does, which tells one from the other.
    """
    wanted = first.alignment
    start = _padded(header.header_end, wanted)
    if ALIGNMENT in header.metadata or start == header.data_start or not header.tensors:
        return
    end = max(tensor.offset + tensor.nbytes for tensor in header.tensors) - header.data_start
    if header.size == start + _padded(end, wanted):
        raise SplitError(
            f"its weights begin at byte {start}, aligned to {wanted} as {first_path} says, but it"
            f" has no {ALIGNMENT} itself, which makes that {header.data_start}: convert the model"
            " again without an alignment, or split it with llama.cpp's gguf-split",
            path=path,
        )


def _padded(position: int, alignment: int) -> int:
    return -(-position // alignment) * alignment


def _check_duplicates(paths: Sequence[str], headers: Sequence[Header]) -> None:
    owner: dict[str, str] = {}
    for path, header in zip(paths, headers, strict=True):
        for tensor in header.tensors:
            if tensor.name in owner:
                raise SplitError(
                    f"tensor {tensor.name!r} is in {owner[tensor.name]} too", path=path
                )
            owner[tensor.name] = path
