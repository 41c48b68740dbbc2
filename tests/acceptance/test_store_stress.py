"""Processes that mirror, attach, read, release and collect the same models at once, for a moment.

scripts/stress_store.py does it for longer.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from commands import LIMIT_S

STRESS = Path(__file__).parents[2] / "scripts" / "stress_store.py"


def test_nobody_sees_other_bytes_and_nothing_is_left() -> None:
    done = subprocess.run(
        [sys.executable, str(STRESS), "--processes", "6", "--seconds", "4"], capture_output=True,
        text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 failed; left: []" in done.stdout
