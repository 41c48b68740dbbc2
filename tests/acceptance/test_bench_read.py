"""Point 6 of storage: ``bench read``, all ways of reading a file beside each other."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload
from numaload.bench.read_report import median_interval
from numaload.bench.read_ways import FAMILIES
from numaload.demo import write_model

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


def test_ways_are_listed(numaload: Numaload) -> None:
    text = numaload("bench", "read", "--list").stdout
    assert all(family.name in text for family in FAMILIES)


def test_intervals_of_medians() -> None:
    assert median_interval([1.0] * 5) is None
    assert median_interval([3.0, 1, 2, 6, 5, 4]) == (1, 6)
    # Of 15 values the fourth and the twelfth, by the sign test's table.
    assert median_interval([float(i) for i in range(1, 16)]) == (4, 12)
