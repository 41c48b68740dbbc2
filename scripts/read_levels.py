"""What reading must reach, and how a report of ``bench read`` stands to it.

    numaload bench read FILE --pairs 15 --json | read_levels.py

Exit status 1 if a must is missed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

PLAN_SHARE = 0.9


@dataclass(frozen=True)
class Level:
    """At least ``least`` of the median ratio of a duel. level: must, or goal.

    or_equal: an interval that holds 1 will do as well: they cannot be told apart.
    """

    level: str
    state: str
    what: str  # as the duel in numaload/bench/read.py
    least: float
    or_equal: bool = False


LEVELS = (
    Level("must", "cold", "into the page cache, beside the fastest other way", 0.95, or_equal=True),
    Level("goal", "cold", "into the page cache, beside direct reads into prepared memory", 0.95),
    Level("must", "warm", "what is resident, beside the kernel's own call and vmtouch", 1.0,
          or_equal=True),
    Level("must", "cold", "into private memory, beside direct reads into prepared memory", 0.95),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    level: str
    met: bool
    text: str

    def __str__(self) -> str:
        return f"{self.level}: {self.text}: {'met' if self.met else 'MISSED'}"


def judged(report: dict[str, Any]) -> list[Finding]:
    """Judge the chosen plan, where it was measured cold, and every pair that took place."""
    found = []
    share = report["plan_share"]
    if share is not None:
        what = "the chosen plan beside the best of numaload's own ways"
        text = f"{what}: {share:.2f} ({report['own_best']}), wanted {PLAN_SHARE:.2f}"
        found.append(Finding("must", share >= PLAN_SHARE, text))
    for pairs in report["pairs"]:
        (level,) = (one for one in LEVELS if one.what == pairs["what"])
        low, high = pairs["interval"] or (2.0, 0.0)
        met = pairs["median"] >= level.least or (level.or_equal and low <= 1 <= high)
        interval = f" [{low:.2f}, {high:.2f}]" if pairs["interval"] else ""
        text = (
            f"{level.state} {level.what}: {pairs['median']:.2f}{interval}"
            f" ({pairs['ours']} / {pairs['theirs']}, {len(pairs['ratios'])} pairs),"
            f" wanted {level.least:.2f}"
        )
        found.append(Finding(level.level, met, text))
    return found


def main() -> int:
    found = judged(json.load(sys.stdin))
    print(*found, sep="\n")
    return int(any(one.level == "must" and not one.met for one in found))


if __name__ == "__main__":
    sys.exit(main())
