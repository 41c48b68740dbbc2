"""Rates of several things in turns, and what they are relative to each other."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True)
class Rates:
    """Amounts per second by name, one per round, rounds in order."""

    rates: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return median(self.rates[name])

    def ratio(self, name: str, baseline: str) -> float:
        """How many times as fast as ``baseline``: neighbours compared, the median over rounds."""
        pairs = zip(self.rates[name], self.rates[baseline], strict=True)
        return median(rate / base for rate, base in pairs)


# (what is run, how much that is)
Thing = tuple[Callable[[], object], float]


def in_turns(things: Mapping[str, Thing], rounds: int) -> Rates:
    """Run one after another, ``rounds`` times; each twice, and the second counts.

    The first leaves the caches as it will find them: what another one wrote there and what is not
    yet in memory would be carried out of them at this one's expense.
    """
    rates: dict[str, list[float]] = {name: [] for name in things}
    for _ in range(rounds):
        for name, (run, amount) in things.items():
            run()
            begin = time.perf_counter()
            run()
            rates[name].append(amount / (time.perf_counter() - begin))
    return Rates(rates)
