"""Pages of docs: their blocks of code, to be run as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from commands import LIMIT_S, Numaload

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    """In their order."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def fences(page: str) -> int:
    """Blocks of any kind, so that none can be left out."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall("^ *```", text, re.MULTILINE)
    assert len(found) % 2 == 0, f"{page}: a block has no end"
    assert set(found) <= {"```"}, f"{page}: a block is indented"
    return len(found) // 2


def run(words: list[str], folder: Path, numaload: Numaload) -> str:
    """In ``folder``, on the test's store; what it prints. Warnings are for people: no errors."""
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        words, capture_output=True, text=True, cwd=folder, timeout=LIMIT_S, check=False,
        env=numaload.environment | {"PATH": places},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout
