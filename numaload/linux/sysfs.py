"""Files of /sys and /proc: what is odd about one is noted, not raised.

Files are absent on older kernels, masked or empty in containers, edited in recorded trees, and they
vanish while nodes and devices are unplugged.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from errno import ENODEV, ENOENT, ENOTDIR, ENXIO

from numaload.errors import check_limits, warn_once
from numaload.linux.lists import BLANK, parse_list

NOT_THERE = (ENOENT, ENOTDIR, ENODEV, ENXIO)  # also of what is being unplugged
MOST = 1 << 20  # characters; the longest list of 65536 ids has less
NUMBER = re.compile(r"-?[0-9]{1,18}")


class SysFiles:
    """``problems``: a sentence on every file that is there but could not be understood."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def note(self, path: str, what: str) -> None:
        self.problems.append(f"{path}: {what}")

    def report(self) -> None:
        for problem in self.problems:
            warn_once(problem, problem)

    def text(self, path: str) -> str | None:
        """Return a file's text, stripped; None where it is not there or cannot be read."""
        try:
            with open(path, encoding="utf-8", errors="surrogateescape", newline="\n") as file:
                return file.read(MOST).strip(BLANK)
        except OSError as error:
            check_limits(error, path)
            if error.errno not in NOT_THERE:
                self.note(path, f"{error.strerror}: taken as absent")
        return None

    def names(self, path: str) -> list[str]:
        """Return the names in a folder, in order; none where it is not there."""
        try:
            return sorted(os.listdir(path))
        except OSError as error:
            check_limits(error, path)
            if error.errno not in NOT_THERE:
                self.note(path, f"{error.strerror}: taken as empty")
        return []

    def ids(self, path: str, parse: Callable[[str], list[int]] = parse_list) -> list[int] | None:
        """Return the ids in a file; None where it is not there or holds no such list."""
        text = self.text(path)
        return None if text is None else self.listed(path, text, parse)

    def listed(
        self, path: str, text: str, parse: Callable[[str], list[int]] = parse_list
    ) -> list[int] | None:
        try:
            return parse(text)
        except ValueError:
            self.note(path, f"{_short(text)} is no list of ids: taken as absent")
        return None

    def numbers(self, path: str) -> list[int] | None:
        """Return the numbers of one line; None where it is not there or a word is no number."""
        words = (self.text(path) or "").split()
        found = [number for number in map(number_in, words) if number is not None]
        if len(found) == len(words):
            return found or None
        self.note(path, f"{_short(' '.join(words))} are no numbers: taken as absent")
        return None

    def number(self, path: str) -> int | None:
        """Return the number in a file; None where it holds anything else, such as ``max``."""
        return number_in(self.text(path) or "")


def number_in(text: str) -> int | None:
    return int(text) if NUMBER.fullmatch(text) else None


def _short(text: str) -> str:
    return repr(text[:40] + "..." if len(text) > 40 else text)
