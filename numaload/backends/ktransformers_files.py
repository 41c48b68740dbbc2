"""Files of models as classic ktransformers finds them: all of a kind below a folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from numaload.errors import ModelNotFoundError, UsageError
from numaload.replicas.views import Mirror
from numaload.storage.files import absolute
from numaload.weights import Weights

Replica = Weights | Mirror | Sequence["Weights | Mirror"] | None


def folder_of(path: str | os.PathLike[str]) -> str:
    """The folder itself, or that of a file. Raises: ModelNotFoundError, a FileNotFoundError."""
    given = absolute(os.fsdecode(path))
    if not os.path.exists(given):
        raise ModelNotFoundError("no such file or folder", path=given)
    return given if os.path.isdir(given) else os.path.dirname(given)


def files_below(folder: str, suffix: str) -> Iterator[str]:
    """All of them, in folders below too; in the order of their names, so that it stays the same."""
    for root, folders, files in os.walk(folder):
        folders.sort()
        yield from (os.path.join(root, name) for name in sorted(files) if name.endswith(suffix))


def open_below(
    folder: str, suffix: str, replica: Replica, open_file: Callable[[str], Weights]
) -> Iterator[tuple[Weights, bool]]:
    """(weights, whether they were opened here) for all files: replicas of those that have one.

    Raises: UsageError for a replica of other files.
    """
    views = _views(replica)
    done: set[str] = set()
    used: set[int] = set()
    for path in files_below(folder, suffix):
        real = os.path.realpath(path)
        if real in done:
            continue
        view = next((v for v in views if real in _real(v)), None)
        weights = open_file(path) if view is None else view
        for part in weights.parts:  # a replica may be of a file that had this name before
            part.file.check_name()
        used.add(id(view))
        done |= {real, *_real(weights)}
        yield weights, view is None
    for view in views:
        if id(view) not in used:
            raise UsageError(f"replica of {view.paths[0]}: no file of it is below {folder}")


def _views(replica: Replica) -> list[Weights]:
    given = [] if replica is None else replica
    several = [given] if isinstance(given, (Weights, Mirror)) else given
    return [one.local() if isinstance(one, Mirror) else one for one in several]


def _real(weights: Weights) -> set[str]:
    return set(map(os.path.realpath, weights.paths))
