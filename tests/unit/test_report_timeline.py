"""Lanes of a report's timeline, from trace files that anybody may have written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from numaload import trace
from numaload.errors import FormatError
from numaload.report import timeline as timeline_module
from numaload.report.timeline import CELLS, LANES, Timeline, read_trace, timeline_of
from numaload.trace.perfetto import HEAD, TraceFile
from report_facts import event


def read(folder: Path, text: str) -> Timeline:
    path = folder / "trace.json"
    path.write_text(text)
    return read_trace(str(path))


def test_events_become_lanes_of_stages_and_threads() -> None:
    events = [
        event("read", 100, 50, 1, {"bytes": 7, "node": 1}),
        event("read", 150, 50, 1, {"bytes": 5, "node": 0}),
        event("read", 100, 100, 2),
        event("open", 0, 1, 1),
        {"ph": "M", "name": "thread_name", "pid": 9, "tid": 1, "args": {"name": "reader"}},
    ]
    found = timeline_of(events, None)
    assert found.seconds == pytest.approx(200e-6)
    assert [(lane.stage, lane.thread, lane.times) for lane in found.lanes] == [
        ("open", "reader", 1),
        ("read", "reader", 2),
        ("read", "thread 2", 1),
    ]
    assert found.lanes[0].runs == [(0, 2, -1)]
    assert found.lanes[1].runs == [(200, 300, 1), (300, 400, 0)]
    assert found.lanes[1].nbytes == 12
    assert found.lanes[1].busy_s == pytest.approx(100e-6)


def test_a_trace_of_no_time_is_drawn() -> None:
    assert timeline_of([event("read", 0, 5e-324, 1)], None).lanes[0].runs == [(0, 1, -1)]


def test_of_many_lanes_the_busiest_are_drawn_and_the_others_told() -> None:
    found = timeline_of((event("read", 0, 10 + i, i) for i in range(LANES + 5)), None)
    assert len(found.lanes) == LANES
    assert found.others == 5
    assert found.others_s == pytest.approx(60e-6)


def test_a_lane_has_few_runs_however_many_events() -> None:
    found = timeline_of((event("read", 10 * i, 5, 1, {"node": i % 3}) for i in range(5000)), None)
    assert len(found.lanes[0].runs) <= CELLS
    assert found.lanes[0].times == 5000


@pytest.mark.parametrize(
    "text", ["[{}]", '{"traceEvents": [{}], "a": [1, {}]}', ' {"a": 1, "traceEvents":[{}]}\n']
)
def test_both_forms_of_trace_files_are_read(tmp_path: Path, text: str) -> None:
    found = read(tmp_path, text.replace("{}", json.dumps(event("read", 3, 4)), 1))
    assert [lane.stage for lane in found.lanes] == ["read"]
    assert found.source == str(tmp_path / "trace.json")


ODD: list[Any] = [
    None, 1, "x", [], {}, {"ph": "X"}, {"ph": "M", "name": "thread_name"},
    event("read", -1, 1), event("read", 1, -1), event("read", 1e300, 1),
    event("read", "1", 1), event("read", True, 1),  # type: ignore[arg-type]
    event("read", 1, 1, [1]),  # type: ignore[arg-type]
    event("read", 1, 1, 1, {"bytes": -1}), event("read", 1, 1, 1, {"bytes": 1 << 70}),
    event("read", 1, 1, 1, {"node": 1 << 20}), event("read", 1, 1, 1, {"node": "0"}),
    event("read", 1, 1) | {"args": [1]}, event(None, 1, 1),  # type: ignore[arg-type]
]  # fmt: skip


def test_events_that_are_odd_are_counted_and_left_out(tmp_path: Path) -> None:
    found = read(tmp_path, json.dumps([*ODD, event("read", 1, 1)]))
    assert found.odd == len(ODD)
    assert len(found.lanes) == 1


def test_a_stage_of_odd_events_alone_has_no_lane() -> None:
    found = timeline_of([event("read", 1, 1, 1, {"bytes": -1}), event("open", 1, 1)], None)
    assert ([lane.stage for lane in found.lanes], found.odd) == (["open"], 1)
    assert timeline_of(ODD, None).odd == len(ODD)


def test_times_since_1970_are_drawn() -> None:
    found = timeline_of([event("read", 1732900000000000.1 + 50 * i, 50) for i in (0, 1)], None)
    assert found.odd == 0
    assert found.lanes[0].runs == [(0, CELLS, -1)]
    assert found.seconds == pytest.approx(100e-6, rel=0.01)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected [ of trace events"),
        ("no trace", "expected [ of trace events"),
        ('[{"a": 1}', "expected , or ]"),
        ("[" * 100_000, "expected a trace event of at most"),
        ('["' + "x" * 20_000 + '"]', "expected a trace event of at most"),
        ('[{"ts": NaN}]', "expected a trace event.*: NaN is no number"),
        ('[{"a": 1, "a": 2}]', "a name appears twice in an object"),
        ('[{"a": "b', "Unterminated string"),
        ("[1] 2", "expected nothing after the trace"),
        ("[]", "expected trace events, found none"),
        ('{"traceEvents": []}', "expected trace events, found none"),
        ('{"bench": "read", "series": []}', "expected trace events, found none"),
        (HEAD.decode(), "expected trace events, found none"),
        ("[1" + "0" * 5000 + "]", "expected a trace event"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FormatError, match=r"trace\.json.*" + said.replace("[", r"\[")):
        read(tmp_path, text)


def test_a_trace_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timeline_module, "MOST_BYTES", 10)
    with pytest.raises(FormatError, match="11 bytes, expected at most 10"):
        read(tmp_path, "[" + " " * 9 + "]")


@pytest.mark.parametrize("left", [1, 40, len(b'"dur":5}\n]\n'), len(b"\n]\n"), 2])
def test_a_trace_is_read_up_to_an_event_that_is_cut(tmp_path: Path, left: int) -> None:
    """As it is while a process adds to it, and after one that was killed meanwhile."""
    path, stages = tmp_path / "trace.json", ["read", "copy", "hash"]
    file = TraceFile(str(path))
    for stage in stages:
        file.add(event(stage, 1, 5))
    file.write()
    assert not read_trace(str(path)).cut
    os.truncate(path, path.stat().st_size - left)
    found = read_trace(str(path))
    assert {lane.stage for lane in found.lanes} == {"read", "copy"}
    assert (found.cut, found.odd) == (True, 0)


def test_what_this_process_did_is_drawn_as_well() -> None:
    with trace.recording() as events, trace.span("read", 5):
        pass
    (lane,) = timeline_of(events, None).lanes
    assert (lane.stage, lane.nbytes) == ("read", 5)
