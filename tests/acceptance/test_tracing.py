"""Traces of real work: without gaps, of the command line too, and as docs/tracing.md says."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload, evict, running, wait_for
from numaload.demo import write_model
from pages import DOCS

ROOT = Path(__file__).parents[2]
SIZE = 256 << 20
MOST = 0.02  # of all the time, in one gap
TRIES = 5
CALLS = {"prewarm", "mirror", "verify", "dequantize", "command"}
FOUR_CALLS = """
import json, sys
import numaload
from numaload import trace

(path,) = sys.argv[1:]
with trace.recording() as events:
    numaload.prewarm(path)
    with numaload.mirror(path, shared=True) as mirror:
        mirror.verify()
        view = mirror.view(mirror.nodes[0])
        for name in view:
            view[name].dequantize("bfloat16")
json.dump(events, sys.stdout)
"""


def gaps(events: Sequence[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """{(stage before, stage after): the longest time without any, as a share of all the time}."""
    start = min(event["ts"] for event in events)
    end = max(event["ts"] + event["dur"] for event in events)
    stages = [one for one in events if one["name"] not in CALLS]
    stages.append({"name": "the end", "ts": end, "dur": 0})
    found: dict[tuple[str, str], float] = {}
    at, before = start, "the beginning"
    for stage in sorted(stages, key=lambda one: float(one["ts"])):
        where = before, stage["name"]
        found[where] = max(found.get(where, 0.0), (stage["ts"] - at) / (end - start))
        if (ends := stage["ts"] + stage["dur"]) > at:
            at, before = ends, stage["name"]
    return found


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> str:
    (path,) = write_model(str(tmp_path_factory.mktemp("large") / "m.gguf"), SIZE)
    return path


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_trace_of_four_calls_has_no_gap(numaload: Numaload, large: str, state: str) -> None:
    """The same gap in every run is one; others are a busy machine that ran something else."""
    large_gaps: dict[tuple[str, str], float] = {}
    for turn in range(TRIES):
        if state == "cold":
            evict([large])
        events = numaload.python(FOUR_CALLS, large)
        numaload("release")
        assert {event["name"] for event in events} >= CALLS - {"command"}
        found = {where: share for where, share in gaps(events).items() if share > MOST}
        large_gaps = {
            where: min(share, large_gaps.get(where, share))
            for where, share in found.items()
            if where in large_gaps or not turn
        }
        if not large_gaps:
            return
    raise AssertionError(f"shares of the time without a stage, in all runs: {large_gaps}")


def traced(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_verbs_add_to_one_trace(
    numaload: Numaload, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setenv("NUMALOAD_TRACE", str(path))
    for words in (["prewarm", model], ["mirror", model], ["verify"], ["release"]):
        numaload(*words)
    events = traced(path)
    by_process: dict[int, set[str]] = {}
    for event in events:
        by_process.setdefault(event["pid"], set()).add(event["name"])
    assert len(by_process) == 4
    assert all({"process_name", "import", "command"} <= names for names in by_process.values())
    _, mirrored, verified, _ = by_process.values()
    assert {"copy", "prove", "publish"} <= mirrored
    assert {"verify", "hash"} <= verified


def test_holder_writes_what_it_did_before_it_keeps_pages(
    numaload: Numaload, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.json"
    monkeypatch.setenv("NUMALOAD_TRACE", str(path))
    evict([model])
    holder = numaload.json("prewarm", "--lock", model)["holder"]["pid"]

    def is_written() -> bool:
        return any(e["pid"] == holder and e["name"] == "prewarm" for e in traced(path))

    wait_for(is_written, "the holder's spans")
    assert running(holder)
    numaload("release", model)


def test_command_without_a_trace_says_nothing_of_it(numaload: Numaload, model: str) -> None:
    assert numaload("prewarm", model).stderr == ""


@pytest.mark.parametrize("python", ["", "error"])
def test_unusable_trace_is_a_warning_of_the_command(
    numaload: Numaload, monkeypatch: pytest.MonkeyPatch, python: str
) -> None:
    monkeypatch.setenv("NUMALOAD_TRACE", "/nosuch/x")
    monkeypatch.setenv("PYTHONWARNINGS", python)
    (line,) = numaload("nodes").stderr.splitlines()
    assert line.startswith("numaload: warning: NUMALOAD_TRACE: /nosuch/x: No such file")


def table() -> dict[str, str]:
    """{span: its row} of docs/tracing.md."""
    (section,) = re.findall(
        r"^## Spans$(.*?)^## ", (DOCS / "tracing.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return dict(re.findall(r"^\| `(\w+)` (\|.*)$", section, re.MULTILINE))


def spans_in(tree: ast.AST) -> Iterator[str]:
    """Names that are given to ``span`` and ``spanned``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.args:
            function = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if function.lstrip("_") in ("span", "spanned"):
                words = (one for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant))
                yield from (str(one.value) for one in words)


def test_docs_list_every_span_that_the_code_has() -> None:
    trees = [ast.parse(path.read_text()) for path in (ROOT / "numaload").rglob("*.py")]
    assert set(table()) == {name for tree in trees for name in spans_in(tree)}
