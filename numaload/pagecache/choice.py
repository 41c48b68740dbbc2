"""Choose bytes of a model's files: all, or those of some tensors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from numaload.errors import ReadError, TensorNotFoundError, UsageError
from numaload.files.residency import ByteRange, merged
from numaload.files.source import SourceFile, absolute, model_paths, real_path
from numaload.linux.lists import parse_list
from numaload.linux.syscalls import PAGE

if TYPE_CHECKING:
    from numaload.weights import Tensor, Weights

LAYER = r"(?:^|\.)(?:blk|layers|h|block|blocks)\.(\d{1,9})\."  # compiled when first used


class HasPaths(Protocol):
    """Anything with paths, as opened weights have them."""

    @property
    def paths(self) -> list[str]: ...


Source = str | bytes | os.PathLike[str] | HasPaths


class Chosen(NamedTuple):
    """Name the chosen bytes: {real path: its ranges, in order}; a path that is not there: all.

    tensors: how many were chosen; None: whole files.
    """

    tensors: int | None
    ranges: dict[str, list[ByteRange]]

    def of(self, name: str, file: SourceFile) -> list[ByteRange]:
        """Return the ranges of a file; name: its real path."""
        return self.ranges.get(name, [(0, file.size)] if file.size else [])


def located(what: Source | Sequence[Source]) -> list[Source]:
    """Return each source, with names from the root, for those who open them later."""
    if isinstance(what, (str, bytes, os.PathLike)):
        return [absolute(os.fsdecode(what))]
    if isinstance(what, Sequence) and not isinstance(what, (bytes, bytearray, memoryview)):
        return [one for each in what for one in located(each)]
    return [cast("HasPaths", what)]


def models_of(what: Source | Sequence[Source]) -> list[list[str]]:
    """Return the files of each model, of which several may have been given.

    Raises: UsageError, SplitError, ReadError; FileChangedError for weights whose names other files
    have now.
    """
    return [list(paths) for paths in dict.fromkeys(map(_files, located(what)))]


def _files(what: Source) -> tuple[str, ...]:
    if isinstance(what, (str, bytes, os.PathLike)):
        return tuple(model_paths(os.fsdecode(what)))
    if not hasattr(what, "paths"):
        raise UsageError(f"{type(what).__name__}: expected a path or opened weights")
    for part in getattr(what, "parts", ()):  # none where only paths were given
        part.file.check_name()
    return tuple(what.paths)


def real(path: str) -> str:
    try:
        return real_path(path)
    except ValueError as error:  # a NUL in it
        raise ReadError(str(error), path=path) from error


def choose(
    models: Iterable[Sequence[str]], tensors: str | None, layers: str | int | None
) -> Chosen:
    """Return the bytes of the tensors chosen by name and layer; the headers always.

    tensors: a regular expression that is found in their names. layers: "0-9,12", by the number in
    their names. Without either: whole files.

    Raises: UsageError, TensorNotFoundError where there are none, FormatError.
    """
    if tensors is None and layers is None:
        return Chosen(None, {})
    from numaload.weights import open_weights

    chosen_by = _Filter(tensors, layers)
    count = 0
    ranges: dict[str, list[ByteRange]] = {}
    for paths in models:
        with open_weights(paths[0]) as weights:
            count += _choose(weights, chosen_by, ranges)
    if not count:
        raise TensorNotFoundError(str(chosen_by))
    return Chosen(count, ranges)


class _Filter:
    """Say which tensors are meant, by name and layer. Raises: UsageError."""

    def __init__(self, tensors: str | None, layers: str | int | None) -> None:
        self.tensors, self.layers = tensors, layers
        try:
            self.pattern = re.compile(tensors or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise UsageError(f"tensors {tensors!r}: no regular expression: {error}") from error
        try:
            self.numbers = None if layers is None else frozenset(parse_list(str(layers)))
        except ValueError as error:
            raise UsageError(f"layers {layers!r}: expected a list as 0-9,12") from error

    def __str__(self) -> str:
        given = (("matching", self.tensors), ("of layers", self.layers))
        return " ".join(f"{word} {value}" for word, value in given if value is not None)

    def has(self, name: str) -> bool:
        layer = re.search(LAYER, name)
        of_layer = self.numbers is None or (layer and int(layer[1]) in self.numbers)
        return bool(of_layer and self.pattern.search(name))


def _choose(weights: Weights, chosen_by: _Filter, into: dict[str, list[ByteRange]]) -> int:
    count = 0
    parts: list[list[Tensor]] = [[] for _ in weights.parts]
    for tensor in weights.values():
        parts[tensor.place_in_files[0]].append(tensor)
    for part, its in zip(weights.parts, parts, strict=True):
        chosen = [tensor for tensor in its if chosen_by.has(tensor.name)]
        header = min((tensor.offset for tensor in its), default=part.file.size)
        ranges = [(0, header), *((t.offset, t.offset + t.nbytes) for t in chosen)]
        into[real(part.file.path)] = list(merged(_pages(*r, part.file.size) for r in ranges))
        count += len(chosen)
    return count


def _pages(start: int, stop: int, size: int) -> tuple[int, int]:
    """Return the whole pages around a range: these come and go as one."""
    return start // PAGE * PAGE, min(-(-stop // PAGE) * PAGE, size)
