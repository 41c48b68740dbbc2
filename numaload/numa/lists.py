"""Lists of ids as the kernel and numactl write them: ``0,2-3``; node strings: ``all``, ``!1``."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from numaload.errors import UsageError

MAX_ID = 1 << 16


def parse_list(text: str) -> list[int]:
    """Ids in ascending order. ``text``: ``"0,2-3"``, possibly with the NULs of recorded files."""
    ids: set[int] = set()
    for part in text.strip("\0\n\t ").split(","):
        if not part.strip():
            continue
        first, _, last = part.strip().partition("-")
        start, stop = int(first), int(last or first)
        if not 0 <= start <= stop < MAX_ID:
            raise ValueError(f"{part!r} is no range of ids")
        ids.update(range(start, stop + 1))
    return sorted(ids)


def format_list(ids: Iterable[int]) -> str:
    """The inverse: ``[0, 2, 3]`` is ``"0,2-3"``."""
    runs: list[list[int]] = []
    for number in sorted(ids):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def parse_map(text: str) -> list[int]:
    """Ids of a ``cpumap``: comma-separated 32-bit hexadecimal words, highest first."""
    bits = int(text.strip("\0\n\t ").replace(",", "") or "0", 16)
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


def select(
    text: str, *, everything: Collection[int], known: Collection[int], local: int
) -> list[int]:
    """The ids that a node string means: ``all``, ``local``, ``0,2-3``, ``!1`` (all but 1).

    everything: what ``all`` means. known: what may be named. Raises: UsageError.
    """
    if text == "all":
        return sorted(everything)
    if text == "local":
        return [local]
    try:
        ids = parse_list(text.removeprefix("!"))
    except ValueError:
        raise UsageError(f"nodes {text!r}: expected all, local, 0,2-3 or !1") from None
    if text.startswith("!"):
        ids = sorted(set(everything) - set(ids))
    unknown = sorted(set(ids) - set(known))
    if unknown or not ids:
        have = format_list(known)
        what = f"node {format_list(unknown)} is not usable here" if unknown else "no node is left"
        raise UsageError(f"nodes {text!r}: {what}; usable: {have}")
    return ids
