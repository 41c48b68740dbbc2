"""Spans: which stage of the work took how long, for how many bytes, on which node.

``with span("read", nbytes=n, node=1):`` stands around a stage, or around one chunk of it. Spans go
to a file for Perfetto (NUMALOAD_TRACE), to OpenTelemetry where the program uses that, and to
``recording``. Where none of these is, a span is one shared object that does nothing.
"""

from __future__ import annotations

import os
import sys
from _thread import get_native_id
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from time import monotonic_ns
from typing import Any

VARIABLE = "NUMALOAD_TRACE"  # the file for Perfetto
OPENTELEMETRY = "opentelemetry.trace"  # imported by whoever uses it, never for our sake

Event = dict[str, Any]  # a complete event ("ph": "X") of the Chrome trace event format

_takers: tuple[Callable[[Event], object], ...] = ()
_modules = sys.modules


class _Off:
    """Stand for every span while nobody takes any."""

    __slots__ = ("nbytes",)
    nbytes: int | None

    def __enter__(self) -> _Off:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Span:
    """A stage of the work, from entering to leaving the ``with``.

    nbytes: may be set inside, where it is not known before.
    """

    __slots__ = ("_begin", "_told", "file", "name", "nbytes", "node", "tensor")

    def __init__(
        self,
        name: str,
        nbytes: int | None,
        node: int | None,
        file: str | None,
        tensor: str | None,
    ) -> None:
        self.name, self.nbytes, self.node, self.file, self.tensor = name, nbytes, node, file, tensor

    @property
    def attributes(self) -> dict[str, int | str]:
        """Return those that are known, by their names in a trace file."""
        every = {"bytes": self.nbytes, "node": self.node, "file": self.file, "tensor": self.tensor}
        return {name: value for name, value in every.items() if value is not None}

    def __enter__(self) -> Span:
        self._told = None
        if OPENTELEMETRY in _modules:
            from numaload.trace import telemetry

            self._told = telemetry.begin(self.name)
        self._begin = monotonic_ns()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _: object) -> None:
        end = monotonic_ns()
        if self._told is not None:
            from numaload.trace import telemetry

            seconds = (end - self._begin) / 1e9
            telemetry.end(self._told, self.name, seconds, self.attributes, error)
        if not _takers:
            return
        more = {} if error is None else {"error": type(error).__name__}
        event = {
            "name": self.name, "cat": "numaload", "ph": "X",
            "ts": self._begin / 1e3, "dur": (end - self._begin) / 1e3,
            "pid": os.getpid(), "tid": get_native_id(), "args": self.attributes | more,
        }  # fmt: skip
        for take in _takers:
            take(event)


_OFF = _Off()


def span(
    name: str,
    nbytes: int | None = None,
    node: int | None = None,
    file: str | None = None,
    tensor: str | None = None,
) -> Span | _Off:
    """Return a span of this stage; docs/tracing.md lists all.

    node: left out (None) where it is none or several. file: a path.
    """
    if not _takers and OPENTELEMETRY not in _modules:
        return _OFF
    return Span(name, nbytes, node, file, tensor)


def only(nodes: Collection[int]) -> int | None:
    """Return the node of spans for work on these: the one, or None."""
    return next(iter(nodes)) if len(nodes) == 1 else None


def current() -> Any:
    """Return what spans that begin here are nested under; None where nobody would know."""
    if OPENTELEMETRY not in _modules:
        return None
    from numaload.trace import telemetry

    return telemetry.current()


@contextmanager
def _under(parent: Any) -> Iterator[None]:
    from numaload.trace import telemetry

    with telemetry.under(parent):
        yield


def under(parent: Any) -> Any:
    """Nest spans of this thread under ``parent``, which is another thread's ``current()``."""
    return _OFF if parent is None else _under(parent)


@contextmanager
def recording() -> Iterator[list[Event]]:
    """Collect the spans of this process that end inside, of all threads, in the order of ends.

    Each is a dict: "name", "ts" and "dur" (microseconds, CLOCK_MONOTONIC), "pid", "tid", and
    "args" with "bytes", "node", "file", "tensor", "error", as far as they are known.
    """
    global _takers  # noqa: PLW0603 - there is one process
    events: list[Event] = []
    take = events.append
    _takers = (*_takers, take)
    try:
        yield events
    finally:
        _takers = tuple(one for one in _takers if one is not take)


if os.environ.get(VARIABLE):
    from numaload.trace.perfetto import TraceFile

    # From the root: programs started later, such as holders, work in other folders.
    with suppress(OSError):  # the working directory is gone
        os.environ[VARIABLE] = os.path.abspath(os.environ[VARIABLE])
    _takers = (TraceFile(os.environ[VARIABLE]).add,)
