"""Every error that numaload raises on purpose.

::

    NumaloadError
    |- FormatError (ValueError)                 .path .offset: the file is not what it says
    |  |- NotGGUFError                          the first bytes are no GGUF magic
    |  |- UnsupportedVersionError               a GGUF version or byte order that is not read
    |  |- TruncatedError                        the file ends before what it announces
    |  |- MetadataError                         a key, value type, string or array that cannot be
    |  |- TensorInfoError                       name, dims, offset or overlap of a tensor
    |  |- UnknownQuantTypeError                 a type id that no table here knows
    |  `- SplitError                            split files missing, or not of one model
    |- UnsupportedTypeError (NotImplementedError)  no way to float
    |- TensorNotFoundError (KeyError)           .name, with close matches
    |- MetadataKeyError (KeyError)              .name
    |- ReadError (OSError)                      .path .offset: the storage failed or ended early
    |  `- FileChangedError                      the file is not the one that was opened
    |- NumaError (OSError)                      .call .node: the kernel refused
    |  |- NumaUnavailableError                  no memory policy calls here
    |  `- PlacementError                        .placements: pages are not where they were asked for
    |- NodeMemoryError (MemoryError)            .node .needed .free: no room, nothing was built
    |- ChecksumError                            .path .chunk: bytes differ from the source
    |- StoreError (OSError)                     the replica store is unsafe or unusable
    |  `- ReplicaNotFoundError                  nothing in the store for this file
    |- CancelledError                           .done .total: stopped by the caller
    |- ClosedError (RuntimeError)               used after close()
    `- UsageError (ValueError)                  an argument that cannot mean anything here

Fallbacks are no errors: they are reported once each, as a NumaloadWarning.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any


class NumaloadError(Exception):
    """What all errors of numaload have in common."""


class FormatError(NumaloadError, ValueError):
    """A file does not keep its own format. ``offset`` is a byte position in ``path``."""

    def __init__(self, message: str, *, path: str | None = None, offset: int | None = None) -> None:
        where = "" if path is None else f"{path}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{message}{at}")
        self.path, self.offset = path, offset


class NotGGUFError(FormatError): ...


class UnsupportedVersionError(FormatError): ...


class TruncatedError(FormatError): ...


class MetadataError(FormatError): ...


class TensorInfoError(FormatError): ...


class UnknownQuantTypeError(FormatError): ...


class SplitError(FormatError): ...


class UnsupportedTypeError(NumaloadError, NotImplementedError): ...


class _LookupError(NumaloadError, KeyError):
    """KeyError prints the repr of its argument; these print a sentence."""

    kind = "name"

    def __init__(self, name: str, known: Any = ()) -> None:
        super().__init__(name)
        self.name, self._known = name, known

    def __str__(self) -> str:
        # Only when it is shown: ``get`` of what may be absent is no error to anyone.
        close = get_close_matches(self.name, [str(k) for k in self._known], n=3)
        hint = f"; close: {', '.join(close)}" if close else ""
        return f"no {self.kind} {self.name!r}{hint}"


class TensorNotFoundError(_LookupError):
    kind = "tensor"


class MetadataKeyError(_LookupError):
    kind = "metadata key"


class ReadError(NumaloadError, OSError):
    def __init__(self, message: str, *, path: str, offset: int | None = None) -> None:
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{path}: {message}{at}")
        self.path, self.offset = path, offset


class FileChangedError(ReadError): ...


class NumaError(NumaloadError, OSError):
    def __init__(
        self, message: str, *, call: str = "", node: int | None = None, errno: int = 0
    ) -> None:
        super().__init__(errno, message)
        self.call, self.node = call, node

    def __str__(self) -> str:
        return str(self.args[1])


class NumaUnavailableError(NumaError): ...


class PlacementError(NumaError):
    """``placements``: {node asked for: {node found, or -1 for not in RAM: pages}}."""

    def __init__(
        self, message: str, placements: Mapping[int, Mapping[int, int]] | None = None
    ) -> None:
        super().__init__(message)
        self.placements = placements or {}


class NodeMemoryError(NumaloadError, MemoryError):
    """``needed`` and ``free`` are bytes; ``node`` is None where the limit is not a node's."""

    def __init__(
        self, message: str, *, node: int | None = None, needed: int = 0, free: int = 0
    ) -> None:
        super().__init__(message)
        self.node, self.needed, self.free = node, needed, free


class ChecksumError(NumaloadError):
    def __init__(self, message: str, *, path: str, chunk: int | None = None) -> None:
        super().__init__(message)
        self.path, self.chunk = path, chunk


class StoreError(NumaloadError, OSError): ...


class ReplicaNotFoundError(StoreError): ...


class CancelledError(NumaloadError):
    def __init__(self, message: str, *, done: int = 0, total: int = 0) -> None:
        super().__init__(message)
        self.done, self.total = done, total


class ClosedError(NumaloadError, RuntimeError): ...


class UsageError(NumaloadError, ValueError): ...


class NumaloadWarning(UserWarning):
    """Something was done in a lesser way than asked; the text says how to get the better one."""


_said: set[str] = set()


def warn_once(key: str, text: str) -> None:
    """Report a fallback the first time it happens in this process; ``key`` names the fallback."""
    if key not in _said:
        _said.add(key)
        warnings.warn(text, NumaloadWarning, stacklevel=3)
