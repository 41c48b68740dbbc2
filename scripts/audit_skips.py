"""Fail if a test was skipped in every job, unless a file lists it with a reason.

audit_skips.py NEVER_HERE RESULTS.xml...   (junit files; NEVER_HERE: ``test id  # reason`` lines)
"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path


def outcomes(path: str) -> dict[str, bool]:
    """Return {test id: whether it ran} of one job."""
    cases = ET.parse(path).getroot().iter("testcase")
    return {f"{c.get('classname')}::{c.get('name')}": c.find("skipped") is None for c in cases}


def excused(path: str) -> set[str]:
    lines = (line.partition("#") for line in Path(path).read_text().splitlines())
    return {name.strip() for name, _, reason in lines if name.strip() and reason.strip()}


def main() -> int:
    allowed, ran = excused(sys.argv[1]), dict[str, bool]()
    for path in sys.argv[2:]:
        for test, did in outcomes(path).items():
            ran[test] = ran.get(test, False) or did
    never = sorted(test for test, did in ran.items() if not did and test not in allowed)
    for test in never:
        print(f"skipped in every job: {test}")
    print(f"{len(ran)} tests in {len(sys.argv) - 2} jobs, {len(never)} never ran")
    return 1 if never else 0


if __name__ == "__main__":
    sys.exit(main())
