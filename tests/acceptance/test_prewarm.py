"""Point 5, prewarm: parallel reads into the page cache; counted, bounded, interruptible.

Where page cache lands on several nodes is tested in tests/numa.
"""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import numaload as api
from commands import KEPT, Numaload, evict, resident, sparse_model, wait_for
from numaload.cli.output import size
from numaload.machine.memory import available

MIB = 1 << 20


@pytest.fixture
def big(tmp_path: Path) -> Iterator[str]:
    """Large enough to be in the middle of; it takes page cache, so it is given back."""
    path = sparse_model(tmp_path / "big.gguf", 2048 * MIB)
    evict([path])
    yield path
    evict([path])


@pytest.mark.fast
def test_all_split_files_become_resident(numaload: Numaload, model_files: list[str]) -> None:
    evict(model_files)
    size = sum(map(os.path.getsize, model_files))
    report = numaload.json("prewarm", model_files[1])
    assert report["paths"] == model_files
    assert report["resident"] == report["size"] == size
    assert report["read"] == size - report["resident_before"] > size // 2
    assert sum(map(resident, model_files)) > KEPT * size


def test_what_was_resident_is_counted_and_not_read(
    numaload: Numaload, model_files: list[str]
) -> None:
    numaload("prewarm", model_files[0])
    report = numaload.json("prewarm", model_files[0])
    assert report["resident_before"] > KEPT * report["size"]
    assert report["read"] == report["size"] - report["resident_before"]
    assert bool(report["threads"]) == bool(report["read"])
    assert re.search("already in RAM|were in RAM", numaload("prewarm", model_files[0]).stdout)


def test_python_api_takes_paths_and_weights(store: Path, model_files: list[str]) -> None:
    evict(model_files)
    seen: list[tuple[int, int]] = []
    with api.open(model_files[0]) as weights:
        report = api.prewarm(weights, threads=2, progress=lambda *step: seen.append(step))
    assert report.done
    assert seen[-1] == (report.read, report.read)
    assert api.prewarm(model_files).resident_before > KEPT * report.size


@pytest.mark.parametrize("verb", ["--version", "prewarm"])
def test_light_start(numaload: Numaload, model_files: list[str], verb: str) -> None:
    numaload("prewarm", model_files[0])
    words = [verb] if verb == "--version" else [verb, model_files[0]]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "numaload", *words],
        capture_output=True, text=True, env=numaload.environment, check=True,
    )  # fmt: skip
    loaded = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "numaload" in loaded
    assert not loaded & {"numpy", "numba", "torch", "gguf", "rich", "xxhash"}


def test_more_than_memory_is_refused_with_numbers(numaload: Numaload, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "huge.gguf", available().free + (1 << 30))
    evict([path])
    done = numaload("prewarm", path, status=1)
    assert f"{os.path.getsize(path)} bytes" in done.stderr
    assert "MemAvailable" in done.stderr or "cgroup" in done.stderr
    assert "--force" in done.stderr
    assert resident(path) < MIB


def test_ctrl_c_ends_cleanly_and_says_how_far_it_came(numaload: Numaload, big: str) -> None:
    job = numaload.start("prewarm", big, "--threads", 1)
    wait_for(lambda: resident(big) > 64 * MIB, "prewarming to begin")
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "interrupted after" in errors
    assert f"of {size(os.path.getsize(big))}" in errors
    assert "Traceback" not in errors


def test_callback_cancels(store: Path, big: str) -> None:
    with pytest.raises(api.errors.CancelledError) as caught:
        api.prewarm(big, progress=lambda done, _: done < 64 * MIB)
    assert 64 * MIB <= caught.value.done < caught.value.total


def test_progress_bar_on_a_terminal_only(numaload: Numaload, tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "bar.gguf", 160 * MIB)
    ours, theirs = pty.openpty()
    job = numaload.start("prewarm", path, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # how a terminal says that the other side is gone
        pass
    os.close(ours)
    job.communicate(timeout=60)
    assert b"prewarm" in shown
    assert b"MiB" in shown
    evict([path])
    hole, line = numaload("prewarm", path).stderr.splitlines()
    assert hole.startswith("numaload: warning: ")
    assert line.startswith("numaload: plan: ")


def test_bad_input_is_a_named_error(numaload: Numaload, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "x-00001-of-00002.gguf").touch()
    expected = {
        tmp_path: "found a directory",
        tmp_path / "fifo": "found a FIFO",
        tmp_path / "none.gguf": "No such file",
        tmp_path / "x-00001-of-00002.gguf": "x-00002-of-00002.gguf",
    }
    for path, text in expected.items():
        done = numaload("prewarm", path, status=1)
        assert text in done.stderr
        assert str(tmp_path) in done.stderr


@pytest.mark.parametrize(
    ("nodes", "said"),
    [("99", "node 99 is not usable here"), ("one", "expected all, local"), ("!0-63", "no node")],
    ids=["absent", "no-list", "none-left"],
)
def test_nodes_that_cannot_be_are_usage_errors(
    numaload: Numaload, model: str, nodes: str, said: str
) -> None:
    assert said in numaload("prewarm", model, "--nodes", nodes, status=2).stderr


def test_page_cache_on_the_node_asked_for(numaload: Numaload, model_files: list[str]) -> None:
    evict(model_files)
    report = numaload.json("prewarm", model_files[0], "--nodes", "0", "--policy", "bind")
    assert report["done"]
    assert report["on_nodes"].keys() == {"0"}
    assert report["on_nodes"]["0"] >= report["size"]
    assert report["elsewhere"] == 0


def test_output_that_cannot_be_written_is_an_error(numaload: Numaload, model: str) -> None:
    environment = {k: v for k, v in numaload.environment.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w", encoding="ascii") as full:
        done = subprocess.run(
            numaload.command("prewarm", model, "--json"), stdout=full, stderr=subprocess.PIPE,
            env=environment, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Exception" not in done.stderr


def test_threads_that_cannot_be_are_usage_errors(numaload: Numaload, model: str) -> None:
    assert "at least 1" in numaload("prewarm", model, "--threads", "-1", status=2).stderr
