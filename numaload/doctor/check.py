"""What every check of the doctor has: it looks, explains, prices, mends and undoes.

A check is made for one ``System`` and used once: ``available``, then ``measure``, and where that
found something, the rest. What it found it keeps in itself. No method changes anything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

if TYPE_CHECKING:
    from numaload.doctor.system import System

MEASURED, ESTIMATED = "measured", "estimated"
# What the seconds are lost on: reading the file once, using every weight of it, each time or only
# the next one, or putting a replica on every node.
LOAD, PASS, COPY = "each load", "each token of a dense model", "each mirror"
ONCE = "the next token of a dense model"
PASSES = 10  # that follow a load, at least: an answer of ten words by a dense model


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: "1 core", "2 cores"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class Unknown(Exception):  # noqa: N818 - it is an answer, not a failure
    """Raise it where what a check looks at cannot be read: that is not the same as "none"."""


class Price(NamedTuple):
    """Seconds that are lost on this file. how: by a rate that was MEASURED now, or ESTIMATED."""

    seconds: float
    how: str = ESTIMATED
    on: str = LOAD  # or PASS, ONCE, COPY

    @property
    def weight(self) -> float:
        """Return the seconds by which findings are put in order."""
        return self.seconds * (PASSES if self.on == PASS else 1)


class Finding(NamedTuple):
    """One thing to mend. ``price`` is None where no file was given, or nobody can tell."""

    id: str
    title: str
    seen: str
    why: str
    price: Price | None
    fix: str  # a command, or what to do
    undo: str  # a command; empty: there is nothing to undo
    root: bool  # whether the command needs root

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"price": self.price and self.price._asdict()}


class Check(ABC):
    """One thing that can make a model slow to load or to use.

    ``id``: stable, NL and three digits, a section in docs/findings.md. ``title``: what is wrong, in
    a few words. ``source``: where its threshold comes from, with year and month.
    """

    id: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    root: bool = False  # whether the command that mends it needs root

    def __init__(self, system: System) -> None:
        self.system = system

    def available(self) -> bool:
        """Return whether there is anything to look at: a file, a GPU, several nodes."""
        return True

    @abstractmethod
    def measure(self) -> str:
        """Look; return what is wrong in a sentence with figures, "" where nothing is.

        Raises: Unknown where it cannot be read.
        """

    @abstractmethod
    def explain(self) -> str:
        """Say why it matters, to somebody who does not know the term."""

    def price(self) -> Price | None:
        """Return the seconds that it costs on this file; None where nobody can tell."""
        return None

    @abstractmethod
    def fix(self) -> str:
        """Say what to do: "COMMAND  # remark", "sentence: COMMAND  # remark", or a sentence.

        The command is for sh, by root where ``root`` is set.
        """

    def undo(self) -> str:
        """Return the command that takes the remedy back; "" where it changes nothing lasting."""
        return ""

    def finding(self, seen: str) -> Finding:
        return Finding(
            self.id,
            self.title,
            seen,
            self.explain(),
            self.price(),
            self.fix(),
            self.undo(),
            self.root,
        )
