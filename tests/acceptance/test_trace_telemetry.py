"""Spans and metrics as an OpenTelemetry collector gets them, from the official SDK and exporter."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from commands import LIMIT_S, wait_for
from numaload.machine.topology import topology
from numaload.weights import open_weights

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
metrics_service = pytest.importorskip(
    "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2"
)
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

CALLER = """
import os, sys
from opentelemetry import metrics, trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

spans, meters = TracerProvider(), None
spans.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(spans)
meters = MeterProvider([PeriodicExportingMetricReader(OTLPMetricExporter())])
metrics.set_meter_provider(meters)

import numaload

(path,) = sys.argv[1:]
with trace.get_tracer("caller").start_as_current_span("serve"):
    numaload.evict(path)
    numaload.prewarm(path)
    with numaload.mirror(path, shared=True) as mirror:
        mirror.verify()
        view = mirror.view(mirror.nodes[0])
        for name in view:
            view[name].dequantize()
    try:
        numaload.open(path + ".missing")
    except numaload.errors.ReadError:
        pass
spans.shutdown()
meters.shutdown()
"""


class Receiver:
    """A receiver of OTLP over HTTP on loopback."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.metrics: dict[str, Any] = {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                is_packed = self.headers.get("Content-Encoding") == "gzip"
                receiver.take(self.path, gzip.decompress(body) if is_packed else body)
                self.send_response(200)
                self.send_header("Content-Type", "application/x-protobuf")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def take(self, path: str, body: bytes) -> None:
        if path == "/v1/traces":
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            groups = [scope for one in request.resource_spans for scope in one.scope_spans]
            self.spans += [span for scope in groups for span in scope.spans]
        else:
            assert path == "/v1/metrics"
            request = metrics_service.ExportMetricsServiceRequest.FromString(body)
            groups = [scope for one in request.resource_metrics for scope in one.scope_metrics]
            self.metrics |= {metric.name: metric for scope in groups for metric in scope.metrics}

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def call(self, span: Any) -> str:
        """The name of the call, right below the caller's span, that this span belongs to."""
        known = {one.span_id: one for one in self.spans}
        while (above := known[span.parent_span_id]).name != "serve":
            span = above
        return str(span.name)


def attributes(one: Any) -> dict[str, Any]:
    values = {each.key: each.value for each in one.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


def unused() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def answers(address: str) -> bool:
    host, port = address.split(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


@contextmanager
def collecting(endpoint: str) -> Iterator[str]:
    """Run a collector that sends on to ``endpoint`` what it gets; yield where it takes that.

    Rotel is a collector that PyPI has, as a program in a package.
    """
    program = Path(pytest.importorskip("rotel").__file__).with_name("rotel-agent")
    here = unused()
    words = {
        "otlp-http-endpoint": here, "otlp-grpc-endpoint": unused(), "exporter": "otlp",
        "otlp-exporter-endpoint": endpoint, "otlp-exporter-protocol": "http",
    }  # fmt: skip
    agent = subprocess.Popen(
        [program, "start", *(f"--{name}={value}" for name, value in words.items())]
    )
    try:
        wait_for(lambda: answers(here), "the collector")
        yield f"http://{here}"
    finally:
        agent.terminate()  # it sends what it has first
        agent.wait(LIMIT_S)


@pytest.fixture(
    scope="module", params=[nullcontext, collecting], ids=["directly", "by a collector"]
)
def received(request: pytest.FixtureRequest, model_files: list[str]) -> Iterator[Receiver]:
    """What a program that traces itself sent while it worked on a model."""
    receiver = Receiver()
    thread = threading.Thread(target=receiver.server.serve_forever, args=(0.05,))
    thread.start()
    store = tempfile.mkdtemp(prefix="numaload-test-", dir="/dev/shm")
    try:
        with request.param(receiver.endpoint) as endpoint:
            told = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "NUMALOAD_STORE": f"{store}/store"}
            subprocess.run(
                [sys.executable, "-c", CALLER, model_files[0]], check=True,
                env=os.environ | told | {"NO_PROXY": "*"},
            )  # fmt: skip
        yield receiver
    finally:
        receiver.server.shutdown()
        thread.join()
        receiver.server.server_close()
        shutil.rmtree(store)


def test_spans_of_calls_are_nested_under_the_callers(received: Receiver) -> None:
    (serve,) = received.named("serve")
    for name in ("evict", "prewarm", "mirror", "verify", "dequantize", "open"):
        above = {span.parent_span_id for span in received.named(f"numaload.{name}")}
        assert serve.span_id in above, name


@pytest.mark.parametrize(
    ("call", "stage"),
    [
        ("prewarm", "read"), ("prewarm", "plan"), ("mirror", "prepare"), ("mirror", "copy"),
        ("mirror", "prove"), ("mirror", "publish"), ("mirror", "attach"), ("verify", "hash"),
        ("dequantize", "convert"), ("dequantize", "kernel"),
    ],
)  # fmt: skip
def test_spans_of_threads_are_nested_under_the_call_that_gave_them_work(
    received: Receiver, call: str, stage: str
) -> None:
    calls = {received.call(span) for span in received.named(f"numaload.{stage}")}
    assert f"numaload.{call}" in calls


def test_no_span_ends_before_what_is_nested_under_it(received: Receiver) -> None:
    """But for spans that a caller gave its own threads' work to."""
    known = {one.span_id: one for one in received.spans}
    for name in ("read", "hash", "copy", "prepare", "drop"):
        for span in received.named(f"numaload.{name}"):
            above = known[span.parent_span_id]
            assert span.end_time_unix_nano <= above.end_time_unix_nano, (name, above.name)


def test_spans_tell_bytes_node_file_and_tensor(received: Receiver, model_files: list[str]) -> None:
    size = sum(os.path.getsize(path) for path in model_files)
    hashed = [attributes(span) for span in received.named("numaload.hash")]
    assert sum(one["numaload.bytes"] for one in hashed) >= size
    assert {one["numaload.node"] for one in hashed} == {topology().select("all")[0]}
    read = [attributes(span) for span in received.named("numaload.read")]
    assert {one["numaload.file"] for one in read} <= set(model_files)
    made = [attributes(span) for span in received.named("numaload.dequantize")]
    with open_weights(model_files[0]) as weights:
        expected = {(name, tensor.nbytes) for name, tensor in weights.items()}
    assert {(one["numaload.tensor"], one["numaload.bytes"]) for one in made} == expected


def test_span_of_a_failure_has_its_error(received: Receiver) -> None:
    (failed,) = [span for span in received.named("numaload.open") if span.status.code == 2]
    (event,) = failed.events
    kind = {each.key: each.value.string_value for each in event.attributes}["exception.type"]
    assert kind == "numaload.errors.ModelNotFoundError"


def test_metrics_count_what_spans_tell(received: Receiver) -> None:
    spans = received.named("numaload.hash")
    told = sum(attributes(span)["numaload.bytes"] for span in spans)
    counted, timed = received.metrics["numaload.stage.bytes"], "numaload.stage.duration"
    points = [one for one in counted.sum.data_points if attributes(one)["numaload.stage"] == "hash"]
    assert counted.unit == "By"
    assert sum(one.as_int for one in points) == told
    timings = received.metrics[timed].histogram.data_points
    (timing,) = [one for one in timings if attributes(one)["numaload.stage"] == "hash"]
    assert timing.count == len(spans)
    assert set(attributes(timing)) == {"numaload.stage", "numaload.node"}


def test_program_that_does_not_use_opentelemetry_does_not_get_it_imported(model: str) -> None:
    program = (
        "import sys, numaload; numaload.open(sys.argv[1])\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, model], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"
