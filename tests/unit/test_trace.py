"""Spans, and the file for Perfetto that they are written to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any

import pytest

from numaload import trace
from numaload.errors import NumaloadWarning
from numaload.trace.perfetto import MOST, TraceFile

EVENT = {"name": "read", "ph": "X", "ts": 1.0, "dur": 1.0, "pid": 1, "tid": 1, "args": {}}

PROGRAM = """
import os, sys
from numaload import trace
with trace.span("read", 5, nodes=[1], file="/m.gguf", tensor="a\\x1b"):
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
        with trace.span("copy", nodes=[1]):
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


def test_a_stage_inside_itself_is_one_span() -> None:
    """Or its time would be counted twice."""

    @trace.spanned("store")
    def outer(again: bool) -> None:
        if again:
            outer(again=False)
            inner()

    @trace.spanned("plan")
    def inner() -> None:
        pass

    with trace.recording() as events:
        outer(again=True)
        outer(again=False)
    assert [event["name"] for event in events] == ["plan", "store", "store"]


def test_importing_names_the_module() -> None:
    with trace.recording() as events, trace.importing("numaload.none"):
        pass
    assert events[0]["args"] == {"file": "numaload.none"}


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
    path, each = tmp_path / "t.json", 2 * MOST + 1  # each writes several times
    program = (
        f"from numaload import trace\nfor i in range({each}):\n    with trace.span('read', i): pass"
    )
    jobs = [threading.Thread(target=traced, args=(path, program)) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    found = spans(path)
    assert len(found) == 3 * each
    assert len({event["pid"] for event in found}) == 3


def test_file_that_somebody_removed_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    again = f"os.remove({str(path)!r})\nwith trace.span('copy'): pass\ntrace.flush()\n"
    assert traced(path, f"{PROGRAM}trace.flush()\n{again}with trace.span('hash'): pass") == ""
    assert [event["name"] for event in spans(path)] == ["copy", "hash"]
    assert traced(path) == ""
    assert len(spans(path)) == 3


def test_lock_of_the_file_does_not_stay_with_a_child_forked_meanwhile(tmp_path: Path) -> None:
    path = str(tmp_path / "t.json")
    program = f"""
import os, signal, time
from numaload.trace.perfetto import _locked
with _locked({path!r}):
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
try:
    with _locked({path!r}):
        pass
finally:
    os.kill(pid, signal.SIGKILL)
"""
    assert traced(path, program) == ""


def test_forked_child_writes_its_own_spans_once(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    forking = PROGRAM + "with trace.span('copy'): pass\nif os.fork(): os.wait()\n"
    traced(path, forking + "with trace.span('hash'): pass")
    found = [(event["name"], event["pid"]) for event in spans(path)]
    parent = found[0][1]
    assert sorted(name for name, pid in found if pid == parent) == ["copy", "hash", "read"]
    assert [name for name, pid in found if pid != parent] == ["hash"]


def test_relative_name_means_the_folder_where_the_program_began(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    program = (
        "import os, subprocess, sys; from numaload import trace; os.chdir('below')\n"
        "with trace.span('read'): pass\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], check=True)"
    )
    subprocess.run(
        [sys.executable, "-c", program, PROGRAM], check=True, cwd=tmp_path,
        env=os.environ | {"NUMALOAD_TRACE": "t.json"},
    )  # fmt: skip
    assert len({event["pid"] for event in spans(tmp_path / "t.json")}) == 2


def test_half_an_event_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    traced(path)
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"\n]\n") + b',\n{"name":"read","ph":"X",' + b"9" * 500)
    assert traced(path) == ""
    assert len(spans(path)) == 2


OTHERS = {
    "text": b"no trace",
    "another program's JSON": b'[\n{"name": "x"}\n]\n',
    "a beginning alone": b"[\n",
    "a large file": b"\0" * (1 << 20),
}


@pytest.mark.parametrize("content", OTHERS.values(), ids=OTHERS)
def test_file_that_is_no_trace_is_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    said = traced(path, f"{PROGRAM}\n{PROGRAM}")
    assert said.count("left alone: no trace is written") == 1
    assert path.read_bytes() == content


def make_link(path: Path) -> None:
    (path.parent / "target").touch()
    path.symlink_to(path.parent / "target")


UNUSABLE = {
    "a link": (make_link, "expected a regular file"),
    "a FIFO": (os.mkfifo, "expected a regular file"),
    "a folder": (os.mkdir, "expected a regular file"),
    "no folder": (lambda path: path.parent.rmdir(), "No such file or directory"),
}


@pytest.mark.parametrize(("make", "why"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_path_is_said_once_and_the_work_goes_on(
    tmp_path: Path, make: Callable[[Path], None], why: str
) -> None:
    path = tmp_path / "\x1b[31m" / "t.json"
    path.parent.mkdir()
    make(path)
    done = subprocess.run(
        [sys.executable, "-c", f"{PROGRAM}\n{PROGRAM}print('done')"], capture_output=True,
        env=os.environ | {"NUMALOAD_TRACE": str(path)}, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "done\n"
    assert done.stderr.count(f"{why}: no trace is written") == 1
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize("more", [-3, -2, -1, 0, 50])
def test_full_disk_leaves_what_was_there(tmp_path: Path, more: int) -> None:
    path = tmp_path / "t.json"
    traced(path)
    before = path.read_bytes()
    limit = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + more},) * 2)"
    )
    assert "File too large: no trace is written" in traced(path, f"{limit}\n{PROGRAM}")
    assert path.read_bytes() == before


def test_locked_file_is_given_up_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_said: None
) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setattr("numaload.trace.perfetto.LOCK_S", 0.05)
    file = TraceFile(str(path))
    with path.open("w") as held:
        flock(held, LOCK_EX)
        with pytest.warns(NumaloadWarning, match="locked for 0 s: 1 spans are lost"):
            file.add(EVENT)
    file.add(EVENT)
    file.write()
    assert len(spans(path)) == 1


def test_old_opentelemetry_is_said_once(tmp_path: Path) -> None:
    folder = tmp_path / "opentelemetry"
    folder.mkdir()
    for name in ("__init__.py", "trace.py"):
        (folder / name).touch()
    done = subprocess.run(
        [sys.executable, "-c", f"import opentelemetry.trace\n{PROGRAM}\n{PROGRAM}"], text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"},
        capture_output=True, check=True,
    )  # fmt: skip
    assert done.stderr.count("pip install -U 'numaload[otel]'") == 1


def test_a_provider_that_is_not_there_stops_no_work() -> None:
    pytest.importorskip("opentelemetry.trace")
    done = subprocess.run(
        [sys.executable, "-c", f"import opentelemetry.trace\n{PROGRAM}\n{PROGRAM}"], text=True,
        env=os.environ | {"OTEL_PYTHON_TRACER_PROVIDER": "none-such"}, capture_output=True,
        check=True,
    )  # fmt: skip
    assert done.stderr.count("no spans for OpenTelemetry: ") == 1
    assert "a provider that OTEL_PYTHON_... names" in done.stderr
