"""Count the bytes of any range of a file that are in RAM: by whichever call tells.

cachestat(2) counts a range at once. mincore(2) has to be asked about every page; about a very large
file it is asked about random ones, and the error is stated.
"""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import accumulate
from math import sqrt

from numaload.files.residency import (
    Residency,
    Run,
    asked_by,
    cached_bytes,
    map_quietly,
    present,
    residency,
)
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import Mapping
from numaload.linux.syscalls import PAGE

SAMPLED_FROM = 64 << 30  # bytes of a file; every page of it is asked about in some 0.7 s
FEW = 8  # times as many pages as samples: all of them are asked about, it takes as long
Z = 1.96  # standard deviations that 95 % are within
NONE_OF = 3  # over n: the share of which none being found in n is as likely as 5 %

Counted = tuple[int, int]  # bytes, and the error of that at 95 %


class Counting:
    """Count a file's resident bytes: ``counting(start, stop, samples)``."""

    how, known = "unknown", False

    def __init__(self, file: SourceFile) -> None:
        self.file = file

    def __call__(self, start: int, stop: int, samples: int) -> Counted:  # noqa: ARG002
        return 0, 0

    def runs(self) -> Runs | None:
        """Return the resident runs; None where only samples were taken."""
        return Runs(residency(self.file))

    def close(self) -> None:
        pass

    def __enter__(self) -> Counting:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ByCachestat(Counting):
    how, known = "cachestat", True

    def __call__(self, start: int, stop: int, samples: int) -> Counted:  # noqa: ARG002
        return (cached_bytes(self.file, start, stop - start) or 0) if start < stop else 0, 0


class ByMincore(Counting):
    """Asked once about every page."""

    how, known = "mincore", True

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file)
        self._found = Runs(residency(file))

    def __call__(self, start: int, stop: int, samples: int) -> Counted:  # noqa: ARG002
        return self._found(start, stop), 0

    def runs(self) -> Runs:
        return self._found


class Runs:
    """What is resident, in order; called with a range: how many bytes of it are."""

    def __init__(self, found: Residency) -> None:
        self._runs = list(present(found))
        self._starts = [start for start, _ in self._runs]
        self._before = list(accumulate((b - a for a, b in self._runs), initial=0))

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    def __call__(self, start: int, stop: int) -> int:
        return max(0, self._up_to(stop) - self._up_to(start))

    def _up_to(self, place: int) -> int:
        which = bisect_right(self._starts, place) - 1
        if which < 0:
            return 0
        first, last = self._runs[which]
        return self._before[which] + min(place, last) - first

    def within(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs, cut to a range."""
        first = max(0, bisect_right(self._starts, start) - 1)
        for i in range(first, bisect_left(self._starts, stop)):
            a, b = max(start, self._runs[i][0]), min(stop, self._runs[i][1])
            if a < b:
                yield a, b


class BySamples(Counting):
    how, known = "sampled mincore", True

    def __init__(self, file: SourceFile) -> None:
        super().__init__(file)
        self._mapping = map_quietly(file)

    def __call__(self, start: int, stop: int, samples: int) -> Counted:
        first, end = start // PAGE, -(-stop // PAGE)
        if end - first <= samples * FEW:
            found = residency(self.file, start, stop)
            return found.resident, 0
        there = sum(is_resident(self._mapping, page) for page in spread(first, end, samples))
        share = there / samples
        return round(share * (stop - start)), round(uncertain(share, samples) * (stop - start))

    def runs(self) -> Runs | None:
        return None

    def close(self) -> None:
        self._mapping.close()


def counting(file: SourceFile) -> Counting:
    """Return the way of counting that this kernel has for this file."""
    how = asked_by(file)
    if how == "mincore" and file.size > SAMPLED_FROM:
        how = BySamples.how
    kinds: dict[str | None, type[Counting]] = {
        kind.how: kind for kind in (ByCachestat, ByMincore, BySamples)
    }
    return kinds.get(how, Counting)(file)


def is_resident(mapping: Mapping, page: int) -> bool:
    return syscalls.mincore(mapping.address + page * PAGE, 1) == b"\1"


def spread(first: int, end: int, count: int) -> Iterator[int]:
    """Yield ``count`` random pages, one from each of as many equal parts, in order."""
    each = (end - first) / count
    for i in range(count):
        yield min(end - 1, first + int((i + random.random()) * each))  # noqa: S311


def uncertain(share: float, samples: int) -> float:
    """Return the error of a sampled share at 95 %: at most that of samples not spread."""
    return max(Z * sqrt(share * (1 - share) / samples), NONE_OF / samples)
