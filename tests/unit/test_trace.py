"""Spans, and the file for Perfetto that they are written to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from numaload import trace

PROGRAM = """
import os, sys
from numaload import trace
with trace.span("read", 5, node=1, file="/m.gguf", tensor="a\\x1b"):
    pass
"""


def traced(path: Path | str, program: str = PROGRAM, status: int = 0) -> str:
    """Run a program with NUMALOAD_TRACE; return what it says on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"NUMALOAD_TRACE": str(path)},
        capture_output=True, text=True, check=False, cwd=Path(path).parent,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stderr


def spans(path: Path) -> list[dict[str, Any]]:
    return [event for event in json.loads(path.read_text()) if event["ph"] == "X"]


def test_recording_collects_spans_of_all_threads() -> None:
    def work() -> None:
        with trace.span("copy", node=1):
            pass

    with trace.recording() as events:
        with trace.span("read", file="m") as span:
            span.nbytes = 3
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    work()
    assert [event["name"] for event in events] == ["read", "copy"]
    read, copy = events
    assert read["args"] == {"bytes": 3, "file": "m"}
    assert copy["args"] == {"node": 1}
    assert read["pid"] == copy["pid"] == os.getpid()
    assert read["tid"] != copy["tid"]
    assert 0 <= read["dur"] <= copy["ts"] + copy["dur"] - read["ts"]


def test_span_of_a_failure_names_the_error() -> None:
    with trace.recording() as events, pytest.raises(KeyError), trace.span("open"):
        raise KeyError
    assert events[0]["args"] == {"error": "KeyError"}


def test_span_is_one_shared_object_while_nobody_takes_any() -> None:
    assert trace.span("read", 1) is trace.span("copy")


def test_file_is_an_array_of_events_with_names_of_process_and_threads(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    assert traced(path) == ""
    first, second, span = json.loads(path.read_text())
    assert (first["name"], second["name"]) == ("process_name", "thread_name")
    assert second["args"] == {"name": "MainThread"}
    assert span["args"] == {"bytes": 5, "node": 1, "file": "/m.gguf", "tensor": "a\\x1b"}
    assert {first["pid"], second["tid"]} == {span["pid"]} == {span["tid"]}


def test_processes_add_to_one_file_at_the_same_time(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    program = (
        "from numaload import trace\n"
        "trace._takers[0].__self__._begun = False\n"
        "for i in range(25000):\n"
        "    with trace.span('read', i): pass"
    )
    jobs = [threading.Thread(target=traced, args=(path, program)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = spans(path)
    assert len({event["pid"] for event in found}) == 4
    assert len(found) == 4 * 25000
