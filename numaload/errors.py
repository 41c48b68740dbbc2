"""Every error that numaload raises on purpose.

::

    NumaloadError
    |- FormatError (ValueError)                 .path .offset: the file is not what it says
    |  |- NotGGUFError                          the first bytes are no GGUF magic
    |  |- NotSafetensorsError                   no length and { of a safetensors header
    |  |- UnsupportedVersionError               a GGUF version that is not read
    |  |- TruncatedError                        the file ends before what it announces
    |  |- MetadataError                         an impossible key, value type, string or array
    |  |- TensorInfoError                       a tensor's name, dims or offset, or an overlap
    |  |- UnknownQuantTypeError                 a type id removed from ggml, of a fork, or unknown
    |  |- SplitError                            .missing: split files, or not of one model
    |  `- AdapterError                          no LoRA adapter, or an impossible one
    |- UnsupportedTypeError (NotImplementedError)  no way to float
    |- TensorNotFoundError (KeyError)           .name, with close matches
    |- MetadataKeyError (KeyError)              .name
    |- ReadError (OSError)                      .path .offset: the storage failed or ended early
    |  |- FileChangedError                      the file is not the one that was opened
    |  |- StalledError (TimeoutError)           .seconds .server .mount: a network does not answer
    |  `- ModelNotFoundError (FileNotFoundError)  no weight files where they were said to be
    |- NumaError (OSError)                      .call .node: the kernel refused
    |  |- NumaUnavailableError                  no memory policy calls here
    |  `- PlacementError                        .placements: pages are not where they were asked for
    |- NodeMemoryError (MemoryError)            .node .needed .free: no room, nothing was built
    |- ChecksumError                            .path .chunk: bytes differ from the source
    |- StoreError (OSError)                     the replica store is unsafe or unusable
    |  `- ReplicaNotFoundError                  nothing in the store for this file
    |- ProgramError (OSError)                   .status: a program cannot be started
    |- BackendError (ImportError)               a program to work with is missing, or unknown
    |- CancelledError                           .done .total: stopped by the caller
    |- ClosedError (RuntimeError)               used after close()
    |- StateDictError (RuntimeError)            .missing .unexpected: not the module's parameters
    |- NotCopyableError (TypeError)             has files or memory open, which no copy may share
    `- UsageError (ValueError)                  an argument that cannot mean anything here

Fallbacks are no errors: they are reported once each, as a NumaloadWarning.

Messages name files, tensors, metadata, processes and paths, which anybody may have written. Shown
as text they are safe for a terminal and at most LONGEST characters long; fields and ``args`` hold
the values as they were found.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from errno import EMFILE, ENFILE, ENOENT, ENOTDIR
from itertools import islice
from os import strerror
from typing import Any, NoReturn, SupportsIndex

LONGEST = 2000  # characters of a message, or of a line that is printed


def printable(text: object, most: int = LONGEST) -> str:
    """Escape what a terminal would obey or hide, and leave out the middle of what is too long.

    Names come from files, processes and users that are not trusted. Escaped are control characters,
    line breaks, what turns the direction of text, what has no width, and bytes that are no text.
    Doing it twice changes nothing.
    """
    shown = _shortened(_as_text(text, str), most)
    if shown.isprintable():
        return shown
    return _shortened("".join(c if c.isprintable() else repr(c)[1:-1] for c in shown), most)


def _as_text(value: object, how: Callable[[Any], str]) -> str:
    """Return the text of a value, or its type's name: Python refuses that of very large numbers."""
    try:
        return how(value)
    except ValueError:
        return f"<{type(value).__name__}>"


def _shortened(text: str, most: int) -> str:
    """Keep both ends: a message says what is wrong after the name of the file."""
    if len(text) <= most:
        return text
    left_out = f"...({len(text)} characters)..."
    kept = most - len(left_out)
    return f"{text[: kept - kept // 3]}{left_out}{text[-(kept // 3) :]}"


class NumaloadError(Exception):
    """What all errors of numaload have in common. They can be pickled and copied, fields too."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, self._fields())

    def _fields(self) -> dict[str, Any]:
        return self.__dict__

    def __str__(self) -> str:
        return printable(super().__str__())

    def __repr__(self) -> str:
        return printable(_as_text(self, Exception.__repr__))


def _rebuilt(kind: type[NumaloadError], args: tuple[Any, ...], fields: dict[str, Any]) -> Any:
    """Rebuild an error without ``__init__`` of ``kind``, which takes other arguments."""
    plain: type[Exception] = OSError if issubclass(kind, OSError) else Exception
    error = plain.__new__(kind, *args)
    plain.__init__(error, *args)  # OSError takes its errno from these
    error.__dict__.update(fields)
    return error


def _shown_path(path: str) -> str:
    """Shorten a path so that the message has room for what is wrong."""
    return printable(path, LONGEST // 2)


class FormatError(NumaloadError, ValueError):
    """A file does not keep its own format. ``offset`` is a byte position in ``path``."""

    def __init__(self, message: str, *, path: str | None = None, offset: int | None = None) -> None:
        where = "" if path is None else f"{_shown_path(path)}: "
        at = "" if offset is None else f" (at byte {offset})"
        super().__init__(f"{where}{message}{at}")
        self.path, self.offset = path, offset

    def add(self, more: str) -> None:
        """Say more, such as what to do, once that is known."""
        self.args = (f"{self.args[0]}{more}",)


class NotGGUFError(FormatError): ...


class NotSafetensorsError(FormatError): ...


class UnsupportedVersionError(FormatError): ...


class TruncatedError(FormatError): ...


class MetadataError(FormatError): ...


class TensorInfoError(FormatError): ...


class UnknownQuantTypeError(FormatError): ...


class SplitError(FormatError):
    """Files are not the whole of one model. ``missing``: paths of those that are not there."""

    def __init__(
        self,
        message: str,
        *,
        path: str | None = None,
        offset: int | None = None,
        missing: Iterable[str] = (),
    ) -> None:
        super().__init__(message, path=path, offset=offset)
        self.missing = list(missing)


class AdapterError(FormatError): ...


class UnsupportedTypeError(NumaloadError, NotImplementedError): ...


COMPARED = 10_000  # names, in search of close ones; models have less
LONGEST_COMPARED = 100  # characters of a name: comparing takes the square of it


class _LookupError(NumaloadError, KeyError):
    """KeyError prints the repr of its argument; these print a sentence."""

    kind = "name"

    def __init__(self, name: Any, known: Any = ()) -> None:
        super().__init__(name)
        self.name, self._known = name, known

    def _close(self) -> list[str]:
        # Files that are not trusted have as many names as they like, and comparing takes its time.
        name = _as_text(self.name, str)
        if len(name) > LONGEST_COMPARED:
            return []
        from difflib import get_close_matches

        known = (key for key in map(str, self._known) if len(key) <= LONGEST_COMPARED)
        return get_close_matches(name, islice(known, COMPARED), n=3)

    def _fields(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": self._close()}

    def __str__(self) -> str:
        # Only when it is shown: ``get`` of what may be absent is no error to anyone.
        close = self._close()
        hint = f"; close: {', '.join(close)}" if close else ""
        return printable(f"no {self.kind} {_as_text(self.name, repr)}{hint}")


class TensorNotFoundError(_LookupError):
    kind = "tensor"


class MetadataKeyError(_LookupError):
    kind = "metadata key"


class ReadError(NumaloadError, OSError):
    """``offset``: byte of the file ``path``; ``tensor``: that was being read, where one was."""

    tensor: str | None = None

    def __init__(self, message: str, *, path: str, offset: int | None = None) -> None:
        at = "" if offset is None else f" at byte {offset}"
        super().__init__(f"{_shown_path(path)}: {message}{at}")
        self.path, self.offset = path, offset

    def within(self, tensor: str) -> None:
        """Say which tensor was being read, once that is known."""
        self.tensor = tensor
        self.args = (f"{self.args[0]}, in tensor {tensor!r}",)


class FileChangedError(ReadError): ...


class StalledError(ReadError, TimeoutError):
    """No answer within ``seconds``, as asked for (io_timeout), from what is mounted at ``mount``.

    ``server``: server:/export, //server/share, or the name of a FUSE server; may be empty.
    """

    def __init__(
        self, message: str, *, path: str, offset: int | None = None, advice: str = "",
        seconds: float = 0.0, server: str = "", mount: str = "",
    ) -> None:  # fmt: skip
        super().__init__(message, path=path, offset=offset)
        self.args = (f"{self.args[0]}{advice}",)
        self.seconds, self.server, self.mount = seconds, server, mount


class ModelNotFoundError(ReadError, FileNotFoundError): ...


class NumaError(NumaloadError, OSError):
    def __init__(
        self, message: str, *, call: str = "", node: int | None = None, errno: int = 0
    ) -> None:
        super().__init__(errno, message)
        self.call, self.node = call, node

    def __str__(self) -> str:
        return printable(self.args[1])


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


class ProgramError(NumaloadError, OSError):
    def __init__(self, message: str, errno: int) -> None:
        super().__init__(errno, f"{message}: {strerror(errno)}")

    @property
    def status(self) -> int:
        """Return what shells exit with: 127 where there is no such program, else 126."""
        return 127 if self.errno in (ENOENT, ENOTDIR) else 126

    def __str__(self) -> str:
        return printable(self.args[1])


class BackendError(NumaloadError, ImportError): ...


class CancelledError(NumaloadError):
    def __init__(self, message: str, *, done: int = 0, total: int = 0) -> None:
        super().__init__(message)
        self.done, self.total = done, total


class ClosedError(NumaloadError, RuntimeError): ...


LINES = 5  # of an error that has one for each parameter


def listed(names: list[str]) -> str:
    """Quote names for an error, the first of many."""
    more = f" and {len(names) - LINES} more" if len(names) > LINES else ""
    return ", ".join(f'"{printable(name)}"' for name in names[:LINES]) + more


class StateDictError(NumaloadError, RuntimeError):
    """As torch's load_state_dict has it: ``missing`` module keys, ``unexpected`` tensors."""

    def __init__(
        self, message: str, *, missing: Iterable[str] = (), unexpected: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.missing, self.unexpected = list(missing), list(unexpected)

    def __str__(self) -> str:
        """Print in lines, as torch does."""
        first, *lines = str(self.args[0]).split("\n\t")
        more = [f"and {len(lines) - LINES} more"] if len(lines) > LINES else []
        shown = [first, *lines[:LINES], *more]
        return "\n\t".join(printable(line, LONGEST // 3) for line in shown)


class NotCopyableError(NumaloadError, TypeError): ...


class NotCopyable:
    """A base of what owns descriptors, memory or threads: no copy shares them, and closes them."""

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        """Answer copy.copy, copy.deepcopy and pickle. Raises: NotCopyableError."""
        raise NotCopyableError(
            f"cannot copy or pickle {type(self).__name__}: its open files, memory and threads are"
            " this process's own; pass a path on, to be opened there (numaload.open,"
            " numaload.attach), or values (dequantize(), blocks.copy(), a report)"
        )


class UsageError(NumaloadError, ValueError): ...


class NumaloadWarning(UserWarning):
    """Something was done in a lesser way than asked; the text says how to get the better one."""


# What a process ran out of, where the system's own words do not tell the way out.
WAYS_OUT = {
    EMFILE: "raise this process's limit (ulimit -n), or close files",
    ENFILE: "raise the machine's limit: sysctl fs.file-max",
}


def reason(error: OSError) -> str:
    """Return what the system said, with the way out where this process ran out of something."""
    said = error.strerror or str(error)
    return f"{said}; {WAYS_OUT[error.errno]}" if error.errno in WAYS_OUT else said


def check_limits(error: BaseException, path: str) -> None:
    """Check why a file cannot be opened, for those who go on without it.

    Raises: ReadError if this process or machine may open no more files: that says nothing of it.
    """
    if isinstance(error, OSError) and error.errno in WAYS_OUT:
        raise ReadError(reason(error), path=path) from error


_said: set[str] = set()


def warn_once(key: str, text: str) -> None:
    """Report a fallback the first time it happens in this process; ``key`` names the fallback."""
    if key not in _said:
        _said.add(key)
        warnings.warn(printable(text), NumaloadWarning, stacklevel=3)
