"""Point 6 of storage: ``bench read``, all ways of reading a file beside each other."""

from __future__ import annotations

import mmap
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload
from numaload.bench.read_turn import Subject, Turn, Unavailable
from numaload.bench.read_ways import FAMILIES, Family, chosen
from numaload.demo import write_model
from numaload.errors import ReadError
from numaload.storage.files import SourceFile

MIB = 1 << 20
FEW = "direct,cat,touch-huge,pread,direct-memory,prewarm,copy"


@pytest.fixture
def file(tmp_path: Path) -> str:
    """24 MiB and a bit: no read size divides it."""
    path = tmp_path / "file.bin"
    path.write_bytes(os.urandom(24 * MIB + 4321))
    return str(path)


def check(row: dict[str, Any]) -> None:
    for figures in row["states"].values():
        assert len(figures["rates"]) == len(figures["cpu"]) == 1
        assert figures["cpu_per_gib"] >= 0
        if row["loads"]:
            assert figures["rate"] > 0


def test_every_way_reads_the_file(numaload: Numaload, model_files: list[str]) -> None:
    """One file of a model, and not the others; programs that are not here are named."""
    names = [family.name for family in FAMILIES]
    done = numaload.json("bench", "read", model_files[-1], "--ways", ",".join(names), "--rounds", 1)
    assert done["nbytes"] == done["size"] == os.path.getsize(model_files[-1])
    rows = {row["family"]: row for row in done["rows"]}
    assert {*rows, *done["left_out"]} == set(names)
    # Of several files a stream is no reading of one of them.
    assert set(done["left_out"]) <= {"vmtouch", "cat", "dd", "stream"}
    for row in done["rows"]:
        check(row)
    cached = {name for name, row in rows.items() if row["sink"] == "page cache"}
    for name in cached - {"willneed", "touch-random"}:
        (share,) = rows[name]["states"]["cold"]["loaded"]
        assert share is None or share > 0.9, name
    assert rows["direct"]["states"]["warm"]["rate"] > 0


def test_streams_of_a_model(numaload: Numaload, tmp_path: Path) -> None:
    (path,) = write_model(str(tmp_path / "model.gguf"), 12 * MIB)
    done = numaload.json("bench", "read", path, "--ways", "stream,copy", "--rounds", 1, "--cold")
    assert [row["way"] for row in done["rows"]] == ["copy", "stream"]
    assert done["left_out"] == {}


def test_it_says_what_is_chosen_and_why(numaload: Numaload, file: str) -> None:
    done = numaload("bench", "read", file, "--ways", FEW, "--rounds", 1, "--threads", 1)
    assert re.search(
        r"numaload prewarm chose: (mapped|buffered), \d+ threads?, .* because: ", done.stdout
    )
    assert "cold ceiling: " in done.stdout
    assert "beside the best of numaload's own ways" in done.stdout
    assert re.search(r"^page cache: cat +\d", done.stdout, re.MULTILINE)


def test_the_plan_is_prewarm_s(numaload: Numaload, file: str) -> None:
    done = numaload.json("bench", "read", file, "--ways", FEW, "--rounds", 1, "--cold")
    numaload("evict", file)
    plan = numaload.json("prewarm", file)["plan"]
    chosen = {key: done["plan"][key] for key in ("way", "threads", "chunk")}
    assert chosen == {key: plan[key] for key in chosen}
    assert all(set(row["states"]) == {"cold"} for row in done["rows"])
    assert done["plan_share"] > 0


def test_pairs(numaload: Numaload, file: str) -> None:
    done = numaload.json(
        "bench", "read", file, "--ways", FEW, "--rounds", 1, "--threads", 1, "--pairs", 6
    )
    assert done["pairs"]
    for pairs in done["pairs"]:
        assert len(pairs["ratios"]) == 6
        least, most = pairs["interval"]
        assert least <= pairs["median"] <= most
    told = numaload(
        "bench", "read", file, "--ways", FEW, "--rounds", 1, "--threads", 1, "--pairs", 6
    ).stdout
    assert re.search(r"^must: .* \[\d.*, 6 pairs\), wanted", told, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--ways", "fast"), "fast"),
        (("--threads", "x"), "expected numbers"),
        (("--rounds", "0"), "rounds"),
        (("--pairs", "-1"), "pairs"),
    ],
    ids=str,
)
def test_what_cannot_be(numaload: Numaload, file: str, words: tuple[str, str], said: str) -> None:
    assert said in numaload("bench", "read", file, *words, status=2).stderr


def test_what_cannot_be_read_is_named(numaload: Numaload, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    expected = {
        tmp_path: "a directory",
        tmp_path / "fifo": "a FIFO",
        tmp_path / "none": "No such file",
        tmp_path / "empty": "empty",
    }
    for path, text in expected.items():
        done = numaload("bench", "read", path, status=1)
        assert text in done.stderr
        assert "Traceback" not in done.stderr
    assert "FILE is missing" in numaload("bench", "read", status=2).stderr


def test_what_stays_in_memory_is_measured_warm_only(numaload: Numaload, file: str) -> None:
    """The tests have it mapped, so the kernel keeps it."""
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        bytes(mapped)
        done = numaload("bench", "read", file, "--ways", "dd", "--rounds", 1, status=1)
        assert re.search(r"\d+ of \d+ bytes stay in the page cache: .*--warm", done.stderr)
        warm = numaload.json("bench", "read", file, "--ways", "dd", "--rounds", 1, "--warm")
        assert [set(row["states"]) for row in warm["rows"]] == [{"warm"}]


def test_missing_programs_are_named(
    numaload: Numaload, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = numaload("bench", "read", file, "--ways", "cat,vmtouch,pread-x1", "--rounds", 1)
    assert "cat is not measured: not installed" in done.stderr
    assert "vmtouch is not measured: not installed: apt-get install vmtouch" in done.stderr
    assert "pread-x1" in done.stdout


def test_a_program_that_fails_is_an_error(
    numaload: Numaload, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/dd"
    program.write_text("#!/bin/sh\necho no disk today >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    done = numaload("bench", "read", file, "--ways", "dd", "--rounds", 1, status=1)
    assert "dd: no disk today" in done.stderr
    program.write_text("#!/bin/sh\necho '5 bytes copied' >&2\n")
    done = numaload("bench", "read", file, "--ways", "dd", "--rounds", 1, status=1)
    assert f"dd read 5 bytes, expected {os.path.getsize(file)}" in done.stderr


@pytest.mark.parametrize("way", ["touch", "map-populate", "mmap-copy", "touch-huge-x1", "pread-x1"])
def test_a_file_that_is_cut_meanwhile_is_an_error(file: str, way: str) -> None:
    """Before the clock starts and after all was opened. This process, and what reads, go on."""
    with SourceFile(file) as source, Turn(Subject(source, file, whole=True, files=(file,))) as turn:
        run = chosen([way])[0].start(turn)
        os.truncate(file, 1 * MIB)
        with pytest.raises(ReadError, match=re.escape(file)):
            run()


def test_one_file_of_several_is_not_remembered_as_a_model(
    numaload: Numaload, model_files: list[str]
) -> None:
    """A bare ``mirror`` works on what was used, and could do nothing with it."""
    numaload.json("bench", "read", model_files[0], "--ways", "prewarm", "--rounds", 1)
    assert "no models known" in numaload("mirror", status=2).stderr


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: str(family.name))
def test_ways_read_the_first_bytes_or_say_that_they_cannot(file: str, family: Family) -> None:
    if family.name == "vmtouch" and shutil.which("vmtouch") is None:
        pytest.skip("vmtouch is not installed")
    with SourceFile(file) as source:
        source.size = 16 * MIB
        with Turn(Subject(source, file, whole=False, files=(file,))) as turn:
            if family.name in ("cat", "prewarm", "stream"):
                with pytest.raises(Unavailable, match="whole"):
                    family.start(turn, 2)
            else:
                assert family.start(turn, 2)().nbytes == 16 * MIB


def test_ways_are_listed(numaload: Numaload) -> None:
    text = numaload("bench", "read", "--list").stdout
    assert all(family.name in text for family in FAMILIES)
