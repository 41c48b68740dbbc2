"""Lists of ids as the kernel and numactl write them: ``0,2-3``; node strings: ``all``, ``!1``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from numaload.errors import UsageError

Group = tuple[int, ...]  # ascending ids of the nodes that share one replica

MAX_ID = 1 << 16
BLANK = "\0\n\t "  # around lists; recorded files end in NULs
RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
WORDS = re.compile(rf"[0-9a-fA-F]{{0,{MAX_ID // 4}}}")


def parse_list(text: str) -> list[int]:
    """Return ids in ascending order. ``text``: ``"0,2-3"``. Raises: ValueError.

    Ranges may overlap, as long as they have no more than MAX_ID ids together.
    """
    ids: set[int] = set()
    total = 0
    for part in text.strip(BLANK).split(","):
        if not part.strip():
            continue
        match = RANGE.fullmatch(part.strip())
        start, stop = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not start <= stop < MAX_ID:
            raise ValueError(f"{part!r} is no range of ids")
        total += stop - start + 1
        if total > MAX_ID:
            raise ValueError(f"more than {MAX_ID} ids")
        ids.update(range(start, stop + 1))
    return sorted(ids)


def format_list(ids: Iterable[int]) -> str:
    """Return the inverse: ``[0, 2, 3]`` is ``"0,2-3"``."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_map(text: str) -> list[int]:
    """Return the ids of a ``cpumap``: comma-separated 32-bit hexadecimal words, highest first.

    Raises: ValueError.
    """
    words = text.strip(BLANK).replace(",", "")
    if not WORDS.fullmatch(words):
        raise ValueError(f"{text[:40]!r} is no map of ids below {MAX_ID}")
    bits = int(words or "0", 16)
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def select(
    text: str, *, everything: Collection[int], known: Collection[int], local: int
) -> list[int]:
    """Return the ids that a node string means: ``all``, ``local``, ``0,2-3``, ``!1`` (not 1).

    everything: what ``all`` means. known: what may be named. Raises: UsageError.
    """
    if text == "local":
        return [local]
    ids = sorted(everything) if text == "all" else _named(text, everything)
    unknown = sorted(set(ids) - set(known))
    if unknown or not ids:
        have = format_list(known)
        what = f"node {format_list(unknown)} is not usable here" if unknown else "no node is left"
        raise UsageError(f"nodes {text!r}: {what}; usable: {have or 'none'}")
    return ids


def _named(text: str, everything: Collection[int]) -> list[int]:
    try:
        ids = parse_list(text.removeprefix("!"))
    except ValueError:
        ids = []
    if not ids:
        raise UsageError(f"nodes {text!r}: expected all, local, 0,2-3 or !1")
    return sorted(set(everything) - set(ids)) if text.startswith("!") else ids
