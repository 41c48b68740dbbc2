"""Spans: which stage of the work took how long, for how many bytes, on which node.

``with span("read", nbytes=n, nodes=[1]):`` stands around a stage, or around one chunk of it. Spans
go to a file for Perfetto (NUMALOAD_TRACE), to OpenTelemetry where the program uses that, and to
``recording``. Where none of these is, a span is one shared object that does nothing.
"""

from __future__ import annotations

import os
import sys
from _thread import _local, get_native_id
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from time import monotonic_ns
from typing import Any, ParamSpec, TypeVar

VARIABLE = "NUMALOAD_TRACE"  # the file for Perfetto

P = ParamSpec("P")
R = TypeVar("R")
Event = dict[str, Any]  # a complete event ("ph": "X") of the Chrome trace event format

_file: Any = None  # a TraceFile
_takers: tuple[Callable[[Event], object], ...] = ()
_modules = sys.modules
_watched = "opentelemetry.trace"  # a program that uses OpenTelemetry has imported it; "": never
_imported: Any = None  # numaload.trace.telemetry, once it is needed
_here = _local()  # "within": stages of decorated functions that this thread is inside


class _Off:
    """Stand for every span while nobody takes any."""

    __slots__ = ("nbytes",)
    is_on = False
    nbytes: int | None

    def __enter__(self) -> _Off:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Span:
    """A stage of the work, from entering to leaving the ``with``.

    nbytes: may be set inside, where it is not known before.
    """

    __slots__ = ("_begin", "_told", "file", "name", "nbytes", "nodes", "tensor")
    is_on = True

    def __init__(
        self,
        name: str,
        nbytes: int | None,
        nodes: Collection[int],
        file: str | None,
        tensor: str | None,
    ) -> None:
        self.name, self.nbytes, self.nodes, self.file = name, nbytes, nodes, file
        self.tensor = tensor

    @property
    def attributes(self) -> dict[str, int | str]:
        """Return those that are known, by their names in a trace file."""
        from numaload.errors import printable  # --version has no time for it

        node = next(iter(self.nodes)) if len(self.nodes) == 1 else None
        texts = {"file": self.file, "tensor": self.tensor}  # names that need not be text
        shown = {name: printable(text) for name, text in texts.items() if text is not None}
        counts = {"bytes": self.nbytes, "node": node}
        return {name: count for name, count in counts.items() if count is not None} | shown

    def __enter__(self) -> Span:
        telemetry = _telemetry()
        self._told = telemetry.begin(self.name) if telemetry else None
        self._begin = monotonic_ns()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _: object) -> None:
        end = monotonic_ns()
        if self._told is not None and (telemetry := _telemetry()):
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
    nodes: Collection[int] = (),
    file: str | None = None,
    tensor: str | None = None,
) -> Span | _Off:
    """Return a span of this stage; docs/tracing.md lists all.

    nodes: that it is for; only one alone is told. file: a path.
    """
    if not _takers and (_watched not in _modules or not _telemetry()):
        return _OFF
    return Span(name, nbytes, nodes, file, tensor)


def importing(module: str) -> Span | _Off:
    """Return a span of importing this module here; of none where that was done before."""
    return _OFF if module in _modules else span("import", file=module)


def spanned(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate a function: each call of it is a span of this stage, and none inside another one."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            one = span(name)
            if not one.is_on:
                return function(*args, **kwargs)
            within = _here.__dict__.setdefault("within", set())
            if name in within:
                return function(*args, **kwargs)
            within.add(name)
            try:
                with one:
                    return function(*args, **kwargs)
            finally:
                within.discard(name)

        return call

    return decorate


def current() -> Any:
    """Return what spans that begin here are nested under; None where nobody would know."""
    telemetry = _telemetry()
    return telemetry.current() if telemetry else None


def under(parent: Any) -> Any:
    """Nest spans of this thread under ``parent``, which is another thread's ``current()``."""
    telemetry = _telemetry()
    return _OFF if parent is None or not telemetry else telemetry.under(parent)


def _telemetry() -> Any:
    """Return the module that hands spans to OpenTelemetry; None where nobody uses it here."""
    global _watched, _imported  # noqa: PLW0603 - there is one process
    if _watched not in _modules:
        return None
    if _imported is not None:
        return _imported if _imported.is_used() else None
    try:
        from numaload.trace import telemetry
    except Exception as error:  # noqa: BLE001 - also what a provider raises that the environment names
        from numaload.errors import warn_once

        _watched = ""
        why = str(error) or f"{type(error).__name__}, from a provider that OTEL_PYTHON_... names"
        fix = "; pip install -U 'numaload[otel]'" if isinstance(error, ImportError) else ""
        warn_once("opentelemetry", f"no spans for OpenTelemetry: {why}{fix}")
        return None
    _imported = telemetry
    return telemetry if telemetry.is_used() else None


def flush() -> None:
    """Write the spans that wait for that to the trace file: before a long time without any."""
    if _file is not None:
        _file.write()


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
    _file = TraceFile(os.environ[VARIABLE])
    _takers = (_file.add,)
