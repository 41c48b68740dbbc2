"""``bench read``: all ways of reading a file beside each other."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload, command_lines, evict
from numaload import prewarm
from numaload.bench.read import measure
from numaload.bench.ways import METHODS, ReadMethod, Turn, Unavailable, chosen
from numaload.demo import write_model
from numaload.errors import ReadError
from numaload.files.source import SourceFile

MIB = 1 << 20
FEW = "direct,direct-prepared,cat,prewarm"


@pytest.fixture
def file(tmp_path: Path) -> str:
    """9 MiB and a bit: a read and a part of one, and no read size divides it."""
    path = tmp_path / "file.bin"
    path.write_bytes(os.urandom(9 * MIB + 4321))
    return str(path)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that has all programs that can be found: none."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def check(row: dict[str, Any]) -> None:
    for figures in row["states"].values():
        assert len(figures["rates"]) == len(figures["cpu"]) == 1
        assert figures["cpu_per_gib"] >= 0
        assert figures["rate"] > 0


def test_every_way_reads_the_file(numaload: Numaload, model_files: list[str]) -> None:
    """One file of a model, and not the others; programs that are not here are named."""
    names = {method.name for method in METHODS}
    done = numaload.json("bench", "read", model_files[-1], "--rounds", 1, "--threads", 2)
    assert done["nbytes"] == done["size"] == os.path.getsize(model_files[-1])
    rows = {row["family"]: row for row in done["rows"]}
    assert {*rows, *done["left_out"]} == names
    # Of several files a stream is no reading of one of them.
    assert set(done["left_out"]) <= {"vmtouch", "cat", "dd", "stream"}
    for row in done["rows"]:
        check(row)
    for name in (name for name, row in rows.items() if row["sink"] == "page cache"):
        (share,) = rows[name]["states"]["cold"]["loaded"]
        assert share is None or share > 0.9, name
    assert rows["direct"]["states"]["warm"]["rate"] > 0
    assert all("warm" not in rows[name]["states"] for name in ("touch-huge", "readahead"))
    # A bare ``mirror`` works on what was used, and could do nothing with one file of several.
    assert "no models known" in numaload("mirror", status=2).stderr


def test_streams_of_a_model(store: Path, tmp_path: Path) -> None:
    (path,) = write_model(str(tmp_path / "model.gguf"), 12 * MIB)
    done = measure(path, ["stream", "copy"], states=["cold"], rounds=1)
    assert [row.way for row in done.rows] == ["copy", "stream"]
    assert done.left_out == {}


def test_pairs_that_cannot_be_measured_are_said(store: Path, file: str) -> None:
    for ways in (["pread-x1", "pread-x2"], ["prewarm"]):
        done = measure(file, ways, rounds=1, states=["cold"], pairs=1)
        assert any(note.startswith("pairs are not measured: ") for note in done.notes)
        assert done.pairs == []


@pytest.mark.fast
def test_it_says_what_is_chosen_why_and_how_that_compares(numaload: Numaload, file: str) -> None:
    words = ("--ways", FEW, "--rounds", 1, "--threads", 1, "--pairs", 6)
    done = numaload("bench", "read", file, *words)
    assert re.search(
        r"numaload prewarm chose: (mapped|buffered), \d+ threads?, .* because: ", done.stdout
    )
    assert "cold ceiling, direct reads into prepared memory: " in done.stdout
    assert "cold, direct reads into one buffer: " in done.stdout
    assert re.search(r"^it reaches \d.* of the best of numaload's own", done.stdout, re.MULTILINE)
    assert re.search(r"^page cache: cat +\d", done.stdout, re.MULTILINE)
    pairs = re.findall(r"^(?:cold|warm), .*: (\S+) \[(\S+), (\S+)\] \(.*, 6 pairs\)$", done.stdout,
                       re.MULTILINE)  # fmt: skip
    assert pairs
    assert all(float(least) <= float(middle) <= float(most) for middle, least, most in pairs)
    for level in ("must", "goal", "MISSED", "wanted"):  # the maintainers' scripts know those
        assert level not in done.stdout


def test_the_plan_is_prewarm_s(store: Path, file: str) -> None:
    done = measure(file, ["prewarm", "pread-x1"], rounds=1, states=["cold"])
    evict([file])
    plan = prewarm(file).plan
    assert plan is not None
    expected = plan.to_dict()
    for key in ("way", "threads", "chunk"):
        assert done.plan[key] == expected[key]
    assert all(set(row.states) == {"cold"} for row in done.rows)
    assert (done.plan_share() or 0) > 0


def test_wrong_words_are_refused_and_ways_are_listed(numaload: Numaload, file: str) -> None:
    wrong = {
        ("--ways", "fast"): "fast",
        ("--threads", "x"): "expected numbers",
        ("--rounds", "0"): "rounds",
        ("--pairs", "-1"): "pairs",
        ("--pairs", "1000000000"): "expected at least 0 and at most 500",
    }
    lines = [("bench", "read", file, *words) for words in wrong]
    *refused, missing, listed = command_lines(
        numaload, [*lines, ("bench", "read"), ("bench", "read", "--list")]
    )
    for said, (status, _, told) in zip(wrong.values(), refused, strict=True):
        assert (status, said in told) == (2, True), told
    assert missing[0] == 2
    assert "FILE is missing" in missing[2]
    assert all(method.name in listed[1] for method in METHODS)


def test_what_cannot_be_read_is_named(numaload: Numaload, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    expected = {
        tmp_path: "a directory",
        tmp_path / "fifo": "a FIFO",
        tmp_path / "none": "No such file",
        tmp_path / "empty": "empty",
    }
    lines = [("bench", "read", str(path)) for path in expected]
    for said, (status, _, told) in zip(
        expected.values(), command_lines(numaload, lines), strict=True
    ):
        assert (status, said in told) == (1, True), told


def test_what_stays_in_memory_is_measured_warm_only(file: str) -> None:
    """The tests have it mapped, so the kernel keeps it."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        bytes(mapped)
        with pytest.raises(ReadError, match=r"\d+ of \d+ bytes stay in the page cache: .*--warm"):
            measure(file, ["dd"], rounds=1)
        warm = measure(file, ["dd"], rounds=1, states=["warm"])
        assert [set(row.states) for row in warm.rows] == [{"warm"}]


def test_missing_programs_are_named(numaload: Numaload, file: str, programs: Path) -> None:
    done = numaload("bench", "read", file, "--ways", "cat,vmtouch,pread-x1", "--rounds", 1)
    assert "cat is not measured: not installed" in done.stderr
    assert "vmtouch is not measured: not installed: apt-get install vmtouch" in done.stderr
    assert "pread-x1" in done.stdout


def test_a_program_that_fails_is_an_error(file: str, programs: Path) -> None:
    program = programs / "dd"
    program.write_text("#!/bin/sh\necho no disk today >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(ReadError, match="dd: no disk today"):
        measure(file, ["dd"], rounds=1)
    program.write_text("#!/bin/sh\necho '5 bytes copied' >&2\n")
    with pytest.raises(ReadError, match=f"dd read 5 bytes, expected {os.path.getsize(file)}"):
        measure(file, ["dd"], rounds=1)


@pytest.mark.parametrize("way", ["touch", "map-populate", "mmap-copy", "touch-huge-x1", "pread-x1"])
def test_a_file_that_is_cut_meanwhile_is_an_error(file: str, way: str) -> None:
    """Before the clock starts and after all was opened. This process, and what reads, go on."""
    with SourceFile(file) as source, Turn(source) as turn:
        run = chosen([way])[0].start(turn)
        os.truncate(file, 1 * MIB)
        with pytest.raises(ReadError, match=re.escape(file)):
            run()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method.name))
def test_ways_read_the_first_bytes_or_say_that_they_cannot(file: str, method: ReadMethod) -> None:
    if method.name == "vmtouch" and shutil.which("vmtouch") is None:
        pytest.skip("vmtouch is not installed")
    with SourceFile(file) as source:
        source.size = 9 * MIB
        with Turn(source, whole=False) as turn:
            if method.name in ("cat", "prewarm", "stream"):
                with pytest.raises(Unavailable, match="whole"):
                    method.start(turn, 2)
            else:
                assert method.start(turn, 2)().nbytes == 9 * MIB
