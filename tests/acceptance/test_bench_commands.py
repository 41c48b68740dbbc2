"""``bench bandwidth``, ``bench mirror`` and ``--compare`` as commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload
from numaload.bench.mirror import measure
from numaload.demo import write_model
from numaload.errors import FormatError, ReadError
from safetensors_builder import model as safetensors_model

BANDWIDTH = ("bench", "bandwidth", "--nodes", "local", "--size", "1M", "--rounds", "8")


@pytest.fixture
def old(numaload: Numaload, tmp_path: Path) -> Path:
    path = tmp_path / "old.json"
    path.write_text(numaload(*BANDWIDTH, "--json").stdout)
    return path


def changed(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_bandwidth_says_where_memory_was_and_compares(numaload: Numaload, old: Path) -> None:
    report = json.loads(old.read_text())
    assert report["bench"] == "bandwidth"
    assert report["parameters"] == {"nodes": "local", "size": 1 << 20, "rounds": 8}
    assert {"load before", "load after", "governor", "hypervisor", "date"} <= set(report["machine"])
    (pair,) = report["pairs"]
    assert list(pair["pages"]) == [str(pair["memory"])]
    assert all(len(rounds) == 8 for rounds in pair["rounds"].values())

    done = numaload(*BANDWIDTH, "--compare", old, status=(0, 1))  # it may have become slower
    assert "times as fast" in done.stdout
    assert "told apart here" in done.stdout.splitlines()[-1]


def test_a_report_of_a_machine_twenty_times_as_fast(numaload: Numaload, old: Path) -> None:
    series = json.loads(old.read_text())["series"]
    for one in series:
        factor = 1 / 20 if one["unit"] == "ns" else 20
        one["values"] = [factor * value for value in one["values"]]
    changed(old, series=series)
    done = numaload(*BANDWIDTH, "--compare", old, "--json", status=1)
    comparison = json.loads(done.stdout)["comparison"]
    assert comparison["slower"]
    verdicts = {row["name"].rpartition(", ")[2]: row["verdict"] for row in comparison["rows"]}
    assert verdicts["latency"] == "slower"
    assert set(verdicts.values()) <= {"slower", "too few rounds"}  # others may take the CPUs


def test_reports_of_something_else_are_refused_before_anything_is_measured(
    numaload: Numaload, old: Path
) -> None:
    said = numaload(
        "bench", "bandwidth", "--nodes", "local", "--size", "1T", "--compare", old, status=2
    ).stderr
    assert "--size is 1048576 there, and 1099511627776 here" in said
    changed(old, bench="read")
    assert "the bench is 'read' there" in numaload(*BANDWIDTH, "--compare", old, status=2).stderr
    old.write_text("{")
    assert "expected JSON" in numaload(*BANDWIDTH, "--compare", old, status=1).stderr


def test_bandwidth_without_the_room_is_refused(numaload: Numaload) -> None:
    done = numaload("bench", "bandwidth", "--size", "100T", status=1)
    assert "has room for" in done.stderr
    assert done.stdout == ""


def test_mirror_is_beside_its_limits(numaload: Numaload, tmp_path: Path) -> None:
    (path,) = write_model(str(tmp_path / "model.gguf"), 4 << 20)
    report = numaload.json("bench", "mirror", path, "--rounds", 2)
    assert list(report["rates"]) == [
        "replicas", "copy, 1 thread", "copy, all CPUs", "clearing", "cp to tmpfs",
    ]  # fmt: skip
    assert all(len(rates) == 2 and min(rates) > 0 for rates in report["rates"].values())
    assert report["ratios"]["copy, 1 thread"] == 1
    assert report["parameters"]["bytes"] == report["nbytes"] == Path(path).stat().st_size
    assert not list(Path("/dev/shm").glob("numaload-bench-*"))  # noqa: S108
    done = numaload("bench", "mirror", path, "--rounds", 1)
    assert "replicas on node" in done.stdout
    assert "of copy, 1 thread" in done.stdout


def test_mirror_of_another_model_in_the_folder_is_not_compared(
    numaload: Numaload, tmp_path: Path
) -> None:
    model = tmp_path / "st" / "model.safetensors"
    model.parent.mkdir()
    model.write_bytes(safetensors_model({"a": ("F32", [1 << 10])}))
    old = tmp_path / "old.json"
    old.write_text(numaload("bench", "mirror", model.parent, "--rounds", 1, "--json").stdout)
    assert json.loads(old.read_text())["parameters"]["files"] == 1
    model.write_bytes(safetensors_model({"a": ("F32", [1 << 11])}))
    done = numaload("bench", "mirror", model.parent, "--rounds", 1, "--compare", old, status=2)
    assert "the size of FILE is" in done.stderr


def test_mirror_without_cp_measures_the_others(
    numaload: Numaload, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = write_model(str(tmp_path / "model.gguf"), 1 << 20)
    monkeypatch.setenv("PATH", "/nonexistent")
    done = numaload("bench", "mirror", path, "--rounds", 1)
    assert "cp to tmpfs is not measured: no cp is installed" in done.stderr
    assert "clearing" in done.stdout


def test_mirror_refuses_what_is_no_model(numaload: Numaload, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    assert "empty" in numaload("bench", "mirror", tmp_path / "empty", status=1).stderr
    (tmp_path / "text").write_text("hello")
    for name, said in {"text": "expected the magic", "none": "No such file or directory"}.items():
        done = numaload("bench", "mirror", tmp_path / name, "--rounds", 1, status=1)
        assert done.stderr.startswith(f"numaload: error: {tmp_path / name}: {said}")
        assert done.stdout == ""
        with pytest.raises((FormatError, ReadError), match=said):
            measure(str(tmp_path / name), rounds=1)
