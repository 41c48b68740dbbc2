"""``bench --compare``: what is called a difference, what is not, and which reports are refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from numaload.bench.compare import (
    FASTER,
    FEW,
    LARGEST,
    MOST_VALUES,
    SAME,
    SLOWER,
    Comparison,
    check_same,
    compare,
    load_report,
)
from numaload.bench.machine import Series
from numaload.bench.table import compare_table
from numaload.errors import FormatError, ReadError, UsageError

MACHINE = {"processor": "P", "numaload": "1", "load before": "0"}


def run(seed: int, factor: float = 1, *, rounds: int = 15, rows: int = 6, unit: str = "Gw/s",
        beside: bool = True, drift: float = 0.0) -> list[Series]:  # fmt: skip
    """Rounds that scatter by 5 %, of a machine whose speed drifts by so much within the run."""
    rng = random.Random(seed)
    found = []
    for number in range(rows):
        machine = [rng.uniform(0.9, 1.1) * (1 - drift * i / rounds) for i in range(rounds)]
        values = [10 * factor * speed * rng.gauss(1, 0.05) for speed in machine]
        others = [20 * speed for speed in machine]
        what = ("fill", others) if beside else ("", [])
        found.append(Series(f"row {number}", unit, values, 0.05 if beside else 0.1, *what))
    return found


def compared(old: list[Series], new: list[Series]) -> Comparison:
    return compare({"machine": MACHINE, "series": old}, MACHINE, new)


def verdicts(old: list[Series], new: list[Series]) -> set[str]:
    return {row.verdict for row in compared(old, new).rows}


def test_compare_calls_nothing_a_difference_that_is_none() -> None:
    for seed in range(40):
        assert verdicts(run(seed), run(seed + 1000, drift=0.3)) == {SAME}


@pytest.mark.parametrize(("factor", "expected"), [(1 / 1.2, SLOWER), (1.2, FASTER)])
def test_compare_finds_a_fifth(factor: float, expected: str) -> None:
    for seed in range(20):
        result = compared(run(seed), run(seed + 1000, factor, drift=0.3))
        assert {row.verdict for row in result.rows} == {expected}
        assert result.slower == (expected == SLOWER)
        assert all(row.ratio == pytest.approx(factor, rel=0.1) for row in result.rows)


def test_compare_of_latency_less_is_faster() -> None:
    old, new = (run(i, factor, unit="ns", beside=False) for i, factor in ((1, 1.0), (2, 0.5)))
    (row, *_) = compared(old, new).rows
    assert (row.verdict, row.new < row.old) == (FASTER, True)
    assert row.ratio == pytest.approx(2, rel=0.2)


def test_compare_without_a_baseline_calls_a_drift_of_the_machine_no_difference() -> None:
    """Two runs at different hours: a tenth is what the machine does by itself."""
    assert verdicts(run(1, beside=False), run(2, 0.93, beside=False)) == {SAME}


def test_compare_takes_the_margin_of_the_new_report() -> None:
    """What an older file claims to be noise is not asked."""
    (old, *_), (new, *_) = run(1, rows=1), run(2, 1 / 1.2, rows=1)
    assert verdicts([replace(old, margin=9)], [new]) == {SLOWER}
    assert verdicts([old], [replace(new, margin=9)]) == {SAME}


def test_compare_of_few_rounds_says_so() -> None:
    result = compared(run(1, rounds=3), run(2, 0.5, rounds=3))
    assert {row.verdict for row in result.rows} == {FEW}
    assert "too few rounds" in result.summary
    assert not result.slower


def test_compare_says_what_could_be_seen() -> None:
    few, many = (compared(run(1, rounds=n), run(2, rounds=n)) for n in (9, 200))
    worst = [max(row.seen or 0 for row in found.rows) for found in (few, many)]
    assert 0.05 < worst[1] < worst[0] < 0.3
    assert "differences under " in many.summary


def test_compare_names_what_is_not_the_same_and_what_is_left_out() -> None:
    old = {"machine": MACHINE | {"numaload": "0"}, "series": run(1, rows=3)}
    found = compare(old, MACHINE | {"load before": "7"}, run(2, rows=2))
    assert found.machine == {"numaload": ("0", "1")}
    assert found.left_out == ["row 2"]
    assert compare(old | {"series": []}, MACHINE, run(2)).rows == []


def test_compare_with_one_that_had_no_baseline_compares_the_figures_themselves() -> None:
    rows = compared(run(1, beside=False), run(2)).rows
    assert {row.baseline for row in rows} == {""}


def test_compare_table_has_a_row_for_each_figure() -> None:
    header, rows = compare_table(compared(run(1), run(2, 0.5)))
    assert header[0] == "figure"
    assert [row[-1] for row in rows] == [SLOWER] * 6
    assert all(len(row) == len(header) for row in rows)
    assert "-" in compare_table(compared(run(1, rounds=2), run(2, rounds=2)))[1][0]


# files that anybody may have written --------------------------------------------------------------

ONE: dict[str, Any] = {
    "name": "a", "unit": "ns", "values": [1.0], "baseline": "", "beside": [],
}  # fmt: skip
REPORT: dict[str, Any] = {
    "bench": "read", "parameters": {"file": "/m", "rounds": 3},
    "machine": {"processor": "P"}, "series": [ONE],
}  # fmt: skip

NO_SERIES: dict[str, dict[str, Any]] = {
    "none": {"values": []}, "zero": {"values": [0.0]}, "negative": {"values": [-1]},
    "text": {"values": ["1"]}, "true": {"values": [True]}, "object": {"values": {"1": 1}},
    "huge": {"values": [1e300]}, "integer": {"values": [10**200]},
    "many": {"values": [1.0] * (MOST_VALUES + 1)}, "unit": {"unit": "MB"},
    "unit-list": {"unit": ["ns"]}, "name": {"name": 1}, "long": {"name": "x" * 201},
    "beside": {"baseline": "dd", "beside": [1.0, 2.0]}, "nothing": {"baseline": "dd"},
    "beside-none": {"beside": [1.0]}, "baseline": {"baseline": None},
}  # fmt: skip
WRONG: dict[str, Any] = {
    "no-bench": REPORT | {"bench": None},
    "no-series": REPORT | {"series": {}},
    "no-machine": REPORT | {"machine": []},
    "a-number": 7,
    "a-list": [REPORT],
    "two-names": REPORT | {"series": [ONE, ONE]},
    "many-series": REPORT | {"series": [ONE] * 10_001},
    **{name: REPORT | {"series": [ONE | change]} for name, change in NO_SERIES.items()},
}


@pytest.mark.parametrize("name", WRONG)
def test_load_report_refuses_what_is_none(tmp_path: Path, name: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps(WRONG[name]))
    with pytest.raises(FormatError) as caught:
        load_report(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"bench": NaN}', '{"a": 1, "a": 1}', "[" * 100_000, '{"a": 1e999}',
     '{"a": ' + "9" * 5000 + "}", "\x00\x1b[31m"],
    ids=range(8),
)  # fmt: skip
def test_load_report_refuses_what_is_no_json(tmp_path: Path, text: str) -> None:
    path = tmp_path / "old.json"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        load_report(str(path))
    assert str(caught.value).isprintable()


def test_load_report_reads_no_more_than_a_report_can_have(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(LARGEST + 1)
    with pytest.raises(ReadError, match="expected at most"):
        load_report(str(path))


DIFFERENT: dict[str, tuple[Callable[..., dict[str, Any]], str]] = {
    "bench": (lambda old: old | {"bench": "\x1b[31m"}, "the bench is '\\\\x1b"),
    "file": (lambda old: old | {"parameters": {"file": "/n"}}, "FILE is '/n' there"),
    "more": (lambda old: old | {"parameters": {"file": "/m", "x": 1}}, "--x is 1 there, and None"),
    "machine": (lambda old: old | {"machine": {"processor": "Q"}}, "the processor is 'Q' there"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_check_same_says_what_is_not(name: str) -> None:
    change, said = DIFFERENT[name]
    with pytest.raises(UsageError, match=said):
        check_same("old.json", change(REPORT), "read", {"file": "/m", "rounds": 9}, "P")


@pytest.mark.parametrize(
    ("name", "then", "now", "same"),
    [
        ("qtype", "Q4_0,Q8_0", "q8_0,q4_0", True),
        ("ways", "dd,pread-x4", "pread-x4,dd", True),
        ("nodes", "0,1", "1,0", True),
        ("qtype", "Q4_0,Q8_0", "Q4_0", False),
        ("qtype", "Q4_0", None, False),
        ("file", "/M", "/m", False),
        ("threads", 2, 3, False),
    ],
)
def test_check_same_compares_what_was_measured(name: str, then: Any, now: Any, same: bool) -> None:
    old = REPORT | {"parameters": {name: then}}
    with nullcontext() if same else pytest.raises(UsageError, match=f"{then!r} there, and {now!r}"):
        check_same("old.json", old, "read", {name: now}, "P")


def test_check_same_takes_other_rounds() -> None:
    check_same("old.json", REPORT, "read", {"file": "/m", "rounds": 9}, "P")
