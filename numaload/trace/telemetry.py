"""Hand spans to OpenTelemetry, which the program has imported and set up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from opentelemetry import context, metrics, trace

from numaload._version import __version__

NAME = "numaload"

# Both load what the environment names, if that is a provider.
trace.get_tracer_provider()
metrics.get_meter_provider()
_meters = metrics._internal  # noqa: SLF001 - nothing public tells for less than a microsecond


class _Begun(NamedTuple):
    span: Any
    token: Any  # of the context before


@cache
def _tracer() -> Any:
    return trace.get_tracer(NAME, __version__)  # without a provider it waits for one


@cache
def _instruments() -> tuple[Any, Any]:
    meter = metrics.get_meter(NAME, __version__)
    nbytes = meter.create_counter(
        "numaload.stage.bytes", unit="By", description="Bytes that a stage worked on"
    )
    seconds = meter.create_histogram(
        "numaload.stage.duration", unit="s", description="Seconds of a stage, or of a chunk of it"
    )
    return nbytes, seconds


def is_used() -> bool:
    """Return whether the program has set up any provider: the API alone records nothing."""
    spans = getattr(trace, "_TRACER_PROVIDER", NAME)
    return spans is not None or getattr(_meters, "_METER_PROVIDER", NAME) is not None


def begin(name: str) -> _Begun:
    span = _tracer().start_span(f"{NAME}.{name}")
    return _Begun(span, context.attach(trace.set_span_in_context(span)))


def end(
    begun: _Begun,
    name: str,
    seconds: float,
    attributes: Mapping[str, int | str],
    error: BaseException | None,
) -> None:
    context.detach(begun.token)
    span = begun.span
    if span.is_recording():
        span.set_attributes({f"{NAME}.{key}": value for key, value in attributes.items()})
        if error is not None:
            span.record_exception(error)
            span.set_status(trace.Status(trace.StatusCode.ERROR, str(error)))
    span.end()
    labels: dict[str, int | str] = {f"{NAME}.stage": name}
    if "node" in attributes:
        labels[f"{NAME}.node"] = attributes["node"]
    counter, histogram = _instruments()
    histogram.record(seconds, labels)
    if "bytes" in attributes:
        counter.add(attributes["bytes"], labels)


def current() -> Any:
    return context.get_current()


@contextmanager
def under(parent: Any) -> Iterator[None]:
    token = context.attach(parent)
    try:
        yield
    finally:
        context.detach(token)
