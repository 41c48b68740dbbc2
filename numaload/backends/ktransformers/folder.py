"""Files of models as classic ktransformers finds them: all of a kind below a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from numaload.errors import ModelNotFoundError, NotCopyable, UsageError
from numaload.files.source import absolute
from numaload.replicas.views import Mirror
from numaload.weights import Weights, open_weights

Replica = Weights | Mirror | Sequence["Weights | Mirror"] | None


def folder_of(path: str | os.PathLike[str]) -> str:
    """Return the folder itself, or that of a file. Raises: ModelNotFoundError."""
    given = absolute(os.fsdecode(path))
    if not os.path.exists(given):
        raise ModelNotFoundError("no such file or folder", path=given)
    return given if os.path.isdir(given) else os.path.dirname(given)


def files_below(folder: str, suffix: str) -> Iterator[str]:
    """List files in the folder and those below, ordered by name so that it stays the same.

    What is hidden is no model: macOS leaves ._NAME beside files, the hub .cache in folders.
    """
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found = (name for name in sorted(files) if name.endswith(suffix))
        yield from (os.path.join(root, name) for name in found if not name.startswith("."))


class FolderLoader(NotCopyable):
    """A loader of every file of a kind below a folder, from replicas where there are some."""

    suffix = ""
    replica: Replica = None  # for loaders that ktransformers makes: see install()
    safetensor_loader = None  # looked for in either loader by some of ktransformers' operators

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = folder_of(path)
        self.tensor_file_map: dict[str, str] = {}
        self.tensor_device_map: dict[str, Any] = {}  # written by ktransformers
        self._opened: list[Weights] = []

    def _open_file(self, path: str) -> Weights:
        return open_weights(path)

    def _open_all(self, replica: Replica) -> Iterator[Weights]:
        """Open all files, or take the views that have them. Raises: UsageError for other views."""
        views = _views(self.replica if replica is None else replica)
        done: set[str] = set()
        used: set[int] = set()
        for path in files_below(self.folder, self.suffix):
            real = os.path.realpath(path)
            if real in done:
                continue
            weights = next((view for view in views if real in _real_paths(view)), None)
            if weights is None:
                weights = self._open_file(path)
                self._opened.append(weights)
            for part in weights.parts:  # a replica may be of a file that had this name before
                part.file.check_name()
            used.add(id(weights))
            done |= {real, *_real_paths(weights)}
            yield weights
        for view in views:
            if id(view) not in used:
                raise UsageError(
                    f"replica of {view.paths[0]}: none of its files is below {self.folder}"
                )

    def _close_files(self) -> None:
        for weights in self._opened:
            weights.close()


def _views(replica: Replica) -> list[Weights]:
    given = [] if replica is None else replica
    several = [given] if isinstance(given, (Weights, Mirror)) else given
    return [one.local() if isinstance(one, Mirror) else one for one in several]


def _real_paths(weights: Weights) -> set[str]:
    return set(map(os.path.realpath, weights.paths))
