"""What `bench read` makes of its figures: ratios, champions, what is met."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from numaload.bench.machine import CONFIDENCE, GIB, median_interval
from numaload.bench.read import DUELS, Figures, Pairs, ReadReport, Row, usable
from numaload.bench.table import conclusions, plan_words, read_tables
from numaload.bench.ways import BUFFER, CACHE, CEILING, MEMORY, chosen
from numaload.errors import UsageError
from script_modules import script

LEVELS = script("read_levels")
OR_EQUAL = {level.what for level in LEVELS.LEVELS if level.or_equal}


def row(name: str, rate: float, loaded: float | None = None) -> Row:
    """As the table has it, cold and warm alike."""
    (way,) = [way for way in chosen(counts=(1, 2)) if way.name == name]
    made = Row.of(way)
    made.states = dict.fromkeys(("cold", "warm"), Figures([rate] * 3, [0.1] * 3, [loaded] * 3))
    return made


def report(*rows: Row) -> ReadReport:
    return ReadReport("file", GIB, GIB, 3, {}, list(rows))


def test_ratios_are_to_the_same_sink_and_to_the_ceiling() -> None:
    found = report(
        row("direct-prepared-x1", 4), row("direct-x1", 5), row("direct-4k-x1", 1),
        row("cat", 2, 1.0), row("pread-x1", 3, 1.0), row("mmap-copy", 8), row("copy", 6),
    )  # fmt: skip
    for way, best, ceiling in [("cat", 2 / 3, 0.5), ("pread-x1", 1, 0.75), ("copy", 0.75, 1.5)]:
        one = found.row(way)
        assert one is not None
        assert found.ratios(one, "cold") == pytest.approx({"best": best, "ceiling": ceiling})
    assert found.to_dict()["ceiling_cold"] == "direct-prepared-x1"
    assert found.to_dict()["buffer_limit_cold"] == "direct-x1"
    assert found.to_dict()["dd_limit_cold"] == "direct-4k-x1"
    assert found.to_dict()["champion_cold"] == "pread-x1"


def test_what_did_not_load_the_file_is_no_champion() -> None:
    found = report(row("readahead", 9, 0.5), row("cat", 2, 1.0))
    champion = found.champion("cold")
    assert champion is not None
    assert champion.way == "cat"
    assert found.ratios(found.rows[0], "cold") == {}
    (_, cells), _ = read_tables(found)
    assert cells[0][-1] == "50.00 %"
    assert cells[0][4] == "-"
    assert cells[1][-1] == ""


def test_numaload_is_not_its_own_champion() -> None:
    found = report(row("prewarm", 5, 1.0), row("cat", 2, 1.0), row("pread-x2", 4, 1.0))
    champion, best = found.champion("cold"), found.own_best()
    assert champion is not None
    assert best is not None
    assert (champion.way, best.way) == ("pread-x2", "prewarm")
    assert found.plan_share() == 1


def judged(found: ReadReport) -> list[Any]:
    """As the maintainers' script does it, from ``--json``."""
    return list(LEVELS.judged(json.loads(json.dumps(found.to_dict()))))


def test_a_plan_is_compared_with_ways_that_numaload_has() -> None:
    found = report(row("prewarm", 3.5, 1.0), row("cat", 9, 1.0), row("pread-x2", 4, 1.0))
    assert found.plan_share() == pytest.approx(3.5 / 4)
    assert "it reaches 0.88 of the best of numaload's own ways (pread-x2)" in conclusions(found)
    (finding,) = judged(found)
    assert str(finding).endswith("0.88 (pread-x2), wanted 0.90: MISSED")


def test_without_prewarm_nothing_is_judged() -> None:
    assert judged(report(row("cat", 2, 1.0))) == []
    assert report().own_best() is None
    assert report().plan_share() is None


def test_every_duel_has_a_level() -> None:
    assert [(duel.state, duel.what) for duel in DUELS] == [
        (level.state, level.what) for level in LEVELS.LEVELS
    ]


@pytest.mark.parametrize(
    ("ratios", "met"),
    [
        ([0.96] * 8, (True, False)),  # well enough into the page cache, but not warm
        ([0.8] * 8, (False, False)),
        ([0.8] * 5 + [1.1] * 4, (True, True)),  # they cannot be told apart
        ([0.8, 1.1, 0.8], (False, False)),  # three are too few for that
        ([1.0] * 6, (True, True)),
    ],
    ids=str,
)
def test_pairs_are_judged(ratios: list[float], met: tuple[bool, bool]) -> None:
    found = report()
    duels = [duel for duel in DUELS if duel.what in OR_EQUAL]
    found.pairs = [Pairs(duel.what, duel.state, "prewarm", "cat", ratios) for duel in duels]
    assert tuple(one.met for one in judged(found)) == met


def test_what_is_a_share_of_the_limit_is_not_met_by_doubt() -> None:
    found = report()
    (into_memory,) = (duel for duel in DUELS if duel.ours == "copy")
    ratios = [0.7] * 5 + [1.2] * 4
    found.pairs = [Pairs(into_memory.what, "cold", "copy", "direct-prepared-x1", ratios)]
    (finding,) = judged(found)
    assert not finding.met
    assert "(copy / direct-prepared-x1, 9 pairs)" in str(finding)
    (told,) = conclusions(found)
    beside = "cold, into private memory, beside direct reads into prepared memory"
    assert told.startswith(f"{beside}: 0.70 [0.70, 1.20]")
    assert told.endswith(" (copy / direct-prepared-x1, 9 pairs)")


def test_duels_need_both() -> None:
    for duel in DUELS:
        assert duel.fighters(report()) is None
    found = report(row("prewarm", 5, 1.0), row("vmtouch", 6, 1.0), row("cat", 7, 1.0))
    fights = {duel.state: duel.fighters(found) for duel in DUELS if duel.what in OR_EQUAL}
    assert fights == {"cold": ("prewarm", "cat"), "warm": ("prewarm", "vmtouch")}


def _coverage(count: int, below: int) -> float:
    """Of the order statistics ``below`` from both ends: by the binomial distribution."""
    outside: int = sum(math.comb(count, k) for k in range(below + 1))
    return 1 - float(2 * outside) / float(2**count)


@pytest.mark.parametrize("count", range(1, 60))
def test_intervals_are_the_narrowest_that_hold(count: int) -> None:
    found = median_interval([float(i) for i in range(count)])
    if _coverage(count, 0) < CONFIDENCE:
        assert found is None
        return
    assert found is not None
    below = int(found[0])
    assert below + found[1] == count - 1
    assert _coverage(count, below) >= CONFIDENCE
    inner = below + 1
    assert inner >= count // 2 or _coverage(count, inner) < CONFIDENCE


def test_intervals_of_the_sign_test_s_table() -> None:
    assert median_interval([1.0] * 5) is None
    assert median_interval([3.0, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval([float(i) for i in range(1, 16)]) == (4, 12)


def test_intervals_hold_the_median_as_often_as_they_say() -> None:
    """Of a skewed distribution, whose median is known."""
    rng, hits, tries = np.random.default_rng(1), 0, 2000
    for _ in range(tries):
        low, high = median_interval(rng.exponential(size=15).tolist()) or (1.0, 0.0)
        hits += low <= math.log(2) <= high
    assert 0.95 <= hits / tries <= 0.98  # 0.965 for 15


def test_a_file_is_used_as_far_as_it_fits_twice() -> None:
    assert usable(5 * GIB, 10 * GIB) == 5 * GIB
    assert usable(5 * GIB + 1, 10 * GIB) == 5 * GIB
    assert usable(100 * GIB, 11 * GIB) == 5 * GIB
    assert usable(GIB, GIB + 7) == GIB // 2
    assert usable(100 << 20, 50 << 20) == 24 << 20
    assert usable(100 << 20, 0) == 8 << 20  # not nothing
    assert usable(5, 0) == 5


def test_ways_are_chosen_by_family_or_by_name() -> None:
    def names(*words: str, counts: tuple[int, ...] = ()) -> list[str]:
        return [way.name for way in chosen(words, counts)]

    assert names("pread-x4", "cat") == ["cat", "pread-x4"]
    assert names("pread", counts=(3, 3, 5)) == ["pread-x3", "pread-x5"]
    assert {way.method.sink for way in chosen()} == {BUFFER, CEILING, CACHE, MEMORY}
    with pytest.raises(UsageError, match="way 'pread-x3': expected one of direct-prepared, "):
        names("pread-x3")
    for count in (0, -1, 257):
        with pytest.raises(UsageError, match=f"threads {count}: expected 1 to 256"):
            names(counts=(count,))


def test_plans_in_words() -> None:
    plan = {"way": "buffered", "threads": 1, "chunk": 1 << 19, "why": "a disk", "order": "file"}
    assert plan_words(plan) == "buffered, 1 thread, 0.5 MiB a read, because: a disk"
    assert plan_words({"way": "direct", "threads": 4}) == "direct, 4 threads"


def test_reports_are_json_with_all_that_was_found() -> None:
    found = replace(report(row("cat", 2, 1.0)), pairs=[Pairs("x", "cold", "a", "b", [1.0, 2.0])])
    told = found.to_dict()
    assert told["pairs"][0] == {
        "what": "x", "state": "cold", "ours": "a", "theirs": "b", "ratios": [1.0, 2.0],
        "median": 1.5, "interval": None, "confidence": CONFIDENCE,
    }  # fmt: skip
    figures = told["rows"][0]["states"]["cold"]
    assert figures["rates"] == [2, 2, 2]
    assert figures["rate"] == 2
    assert figures["ratios"] == {"best": 1}
    assert told["ceiling_cold"] is None
