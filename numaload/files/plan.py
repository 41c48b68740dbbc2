"""Choose the way to read a file: by what it lies on, then by trying on the file itself.

Every number here is a starting point of ``Reading``, which times the first bytes of each candidate
and goes on with the fastest. docs/storage.md says what was measured and what was not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from numaload.errors import UsageError
from numaload.linux.syscalls import PAGE
from numaload.machine.devices import Device

MAPPED, BUFFERED, DIRECT = "mapped", "buffered", "direct"
WAYS = {
    MAPPED: "page cache in huge pages, by touching a mapping",
    BUFFERED: "pread through the page cache",
    DIRECT: "O_DIRECT, past the page cache",
}
CACHE, MEMORY = "page cache", "memory"  # where the bytes go
FITTING = {CACHE: (MAPPED, BUFFERED), MEMORY: (DIRECT, BUFFERED)}
FILE_ORDER, STRIPES = "file", "stripes"  # stripes: each thread has a part of the files to itself
ORDERS = (FILE_ORDER, STRIPES)
CHUNK = 8 << 20  # bytes a read; 1 MiB were no faster
LONG = 32 << 20  # of a mapping on a virtual disk: fewer waits in between, 2 % faster
MOST_CHUNK, MOST_THREADS = 1 << 30, 256
CLEARLY = 1.1  # times as fast
MADV_HUGEPAGE_READS = (5, 18)  # the first Linux that reads huge folios for an advised mapping


class ReadMethod(NamedTuple):
    """How bytes are read: ``threads`` that read ``chunk`` bytes each at a time."""

    name: str
    threads: int
    chunk: int = CHUNK

    def __str__(self) -> str:
        count = f"{self.threads} threads" if self.threads > 1 else "1 thread"
        return f"{self.name}, {count}, {self.chunk / 2**20:g} MiB a read"


# By kind of storage and where the bytes go: the first is used unless another proves faster.
# A hard disk is not tried: two streams make it seek. Into fresh memory many threads are at work,
# since the kernel clears each one's pages while the others wait for the disk.
CANDIDATES: dict[str, dict[str, tuple[ReadMethod, ...]]] = {
    "nvme": {
        CACHE: (
            ReadMethod(MAPPED, 4),
            ReadMethod(MAPPED, 1),
            ReadMethod(MAPPED, 8),
            ReadMethod(BUFFERED, 4),
        ),
        MEMORY: (ReadMethod(DIRECT, 16), ReadMethod(DIRECT, 4)),
    },
    "ssd": {
        CACHE: (ReadMethod(MAPPED, 2), ReadMethod(MAPPED, 1), ReadMethod(BUFFERED, 2)),
        MEMORY: (ReadMethod(DIRECT, 8), ReadMethod(DIRECT, 2)),
    },
    "hdd": {
        CACHE: (ReadMethod(MAPPED, 1),),
        MEMORY: (ReadMethod(DIRECT, 1),),
    },
    "virtual": {
        CACHE: (ReadMethod(MAPPED, 1, LONG), ReadMethod(MAPPED, 4, LONG), ReadMethod(BUFFERED, 2)),
        MEMORY: (ReadMethod(DIRECT, 16), ReadMethod(DIRECT, 4)),
    },
    "raid": {
        CACHE: (
            ReadMethod(MAPPED, 4),
            ReadMethod(MAPPED, 1),
            ReadMethod(MAPPED, 16),
            ReadMethod(BUFFERED, 4),
        ),
        MEMORY: (ReadMethod(DIRECT, 16), ReadMethod(DIRECT, 4)),
    },
    "remote": {
        CACHE: (ReadMethod(MAPPED, 8), ReadMethod(MAPPED, 2), ReadMethod(BUFFERED, 8)),
        MEMORY: (ReadMethod(DIRECT, 16), ReadMethod(DIRECT, 4)),
    },
    "network": {
        CACHE: (ReadMethod(BUFFERED, 8), ReadMethod(BUFFERED, 2)),
        MEMORY: (ReadMethod(BUFFERED, 8), ReadMethod(BUFFERED, 2)),
    },
    "share": {
        CACHE: (ReadMethod(BUFFERED, 4), ReadMethod(BUFFERED, 1)),
        MEMORY: (ReadMethod(BUFFERED, 4), ReadMethod(BUFFERED, 1)),
    },
    "memory": {
        CACHE: (ReadMethod(BUFFERED, 2),),
        MEMORY: (ReadMethod(BUFFERED, 8),),
    },
    "unknown": {
        CACHE: (ReadMethod(MAPPED, 2), ReadMethod(BUFFERED, 2), ReadMethod(BUFFERED, 8)),
        MEMORY: (ReadMethod(BUFFERED, 2), ReadMethod(DIRECT, 8), ReadMethod(BUFFERED, 8)),
    },
}
CANDIDATES["card"] = CANDIDATES["ssd"]


class Tried(NamedTuple):
    """``rate``: bytes a second of the first bytes read this way."""

    way: ReadMethod
    rate: float


class Tuned(NamedTuple):
    """A way that ``numaload tune`` found the fastest, ``gain`` times as fast as the default."""

    way: ReadMethod
    gain: float
    date: str  # 2026-11-29

    def __str__(self) -> str:
        how = f"{self.gain:.2g} times the default" if self.gain > 1 else "nothing beats the default"
        return f"tuned {self.date}: {how}"


@dataclass(frozen=True)
class Forced:
    """What the caller insists on; None leaves it to the plan. chunk: bytes a read."""

    way: str | None = None
    threads: int | None = None
    chunk: int | None = None
    order: str | None = None

    def check(self, sink: str) -> None:
        """Check that it can be had for this sink. Raises: UsageError."""
        fitting = FITTING[sink]
        if self.way is not None and self.way not in fitting:
            raise UsageError(
                f"way {self.way!r}: expected {' or '.join(fitting)} to read into {sink}"
            )
        if self.order is not None and self.order not in ORDERS:
            raise UsageError(f"order {self.order!r}: expected {' or '.join(ORDERS)}")
        if self.threads is not None and self.threads < 1:
            raise UsageError(f"threads: {self.threads}, expected at least 1")
        if self.chunk is not None and (self.chunk % PAGE or not PAGE <= self.chunk <= MOST_CHUNK):
            raise UsageError(
                f"chunk: {self.chunk} bytes, expected a multiple of {PAGE} up to {MOST_CHUNK}"
            )


@dataclass(frozen=True)
class ReadPlan:
    """``way`` of ``candidates``, and why. ``tried``: candidates that read the first bytes."""

    sink: str
    device: Device
    candidates: tuple[ReadMethod, ...]
    why: str
    order: str = FILE_ORDER
    tried: tuple[Tried, ...] = field(default=())

    @property
    def way(self) -> ReadMethod:
        return self.candidates[0]

    def uses(self, name: str) -> bool:
        return any(way.name == name for way in self.candidates)

    def with_tried(self, tried: Sequence[Tried]) -> ReadPlan:
        """Put the fastest first: only a clearly faster one, since timings are short."""
        first = tried[0]
        best = max(tried, key=lambda one: one.rate)
        if best.rate < CLEARLY * first.rate:
            best = first
        figures = ", ".join(f"{one.way}: {one.rate / 1e9:.2f} GB/s" for one in tried)
        why = f"{self.why}; tried on this file: {figures}"
        others = tuple(way for way in self.candidates if way != best.way)
        return replace(self, candidates=(best.way, *others), why=why, tried=tuple(tried))

    def forced_to(self, candidates: Sequence[ReadMethod]) -> ReadPlan:
        return replace(self, candidates=tuple(candidates))

    def __str__(self) -> str:
        order = "" if self.order == FILE_ORDER else ", a stripe of the files for each thread"
        return f"{self.way}{order} ({self.why})"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ReadPlan:
        """Return what ``to_dict`` told. Raises: KeyError, TypeError for anything else."""
        tried = [
            Tried(ReadMethod(t["name"], t["threads"], t["chunk"]), t["rate"]) for t in data["tried"]
        ]
        ways = tuple(ReadMethod(**way) for way in data["candidates"])
        device = Device(**data["device"])
        return cls(data["sink"], device, ways, data["why"], data["order"], tuple(tried))

    def to_dict(self) -> dict[str, Any]:
        return {
            "sink": self.sink,
            "way": self.way.name,
            "threads": self.way.threads,
            "chunk": self.way.chunk,
            "order": self.order,
            "why": self.why,
            "device": self.device.to_dict(),
            "candidates": [way._asdict() for way in self.candidates],
            "tried": [one.way._asdict() | {"rate": one.rate} for one in self.tried],
        }


def make_plan(
    sink: str,
    device: Device,
    total: int,
    *,
    forced: Forced | None = None,
    seen: bool = True,
    tuned: Tuned | None = None,
) -> ReadPlan:
    """Plan the reading of ``total`` absent bytes. seen: whether the kernel tells what is in RAM.

    tuned: what was measured on this device; what is forced comes before it.
    Raises: UsageError.
    """
    forced = forced or Forced()
    forced.check(sink)
    candidates: Sequence[ReadMethod] = CANDIDATES[device.kind][sink]
    why = [str(device)]
    limits = _limits(sink, seen=seen)
    if tuned and forced == Forced() and all(usable(tuned.way) for usable, _ in limits):
        candidates = (tuned.way,)
        why.append(str(tuned))
    for usable, reason in limits:
        left = [way for way in candidates if usable(way)]
        if len(left) < len(candidates):
            why.append(reason)
            candidates = left or [ReadMethod(BUFFERED, candidates[0].threads)]
    if forced != Forced():
        why.append("as asked for")
        candidates = _forced(candidates, forced)
    fitting = tuple(dict.fromkeys(no_more_than(way, total) for way in candidates))
    return ReadPlan(sink, device, fitting, "; ".join(why), forced.order or FILE_ORDER)


def _limits(sink: str, *, seen: bool) -> Sequence[tuple[Any, str]]:
    """Return the limits: (what may be used, why the rest may not)."""
    limits: list[tuple[Any, str]] = []
    if not huge_reads():
        limits.append((lambda way: way.name != MAPPED, "Linux before 5.18 has no huge reads"))
    if sink == CACHE and not seen:
        # What a touched mapping did not bring in could not be found afterwards.
        limits.append((lambda way: way.name != MAPPED, "the kernel tells only owners what is read"))
    return limits


def huge_reads() -> bool:
    """Return whether this kernel reads huge folios where an advised mapping is touched."""
    numbers = os.uname().release.split(".")[:2]
    version = tuple(int("".join(filter(str.isdigit, n)) or 0) for n in numbers)
    mm = "/sys/kernel/mm"  # where it is hidden the kernel may have them
    none = os.path.isdir(mm) and not os.path.isdir(f"{mm}/transparent_hugepage")
    return version >= MADV_HUGEPAGE_READS and not none


def _forced(candidates: Sequence[ReadMethod], forced: Forced) -> Sequence[ReadMethod]:
    """Return the one way that is forced, or the ways of a name where only that is."""
    named = [way for way in candidates if forced.way in (None, way.name)]
    named = named or [ReadMethod(forced.way or BUFFERED, candidates[0].threads)]
    if forced.threads:  # of long reads there may be fewer than threads
        named = [way._replace(threads=forced.threads, chunk=min(way.chunk, CHUNK)) for way in named]
    return [way._replace(chunk=forced.chunk or way.chunk) for way in named]


def no_more_than(way: ReadMethod, total: int) -> ReadMethod:
    """Return the way with no more threads than chunks."""
    return way._replace(threads=max(1, min(way.threads, MOST_THREADS, -(-total // way.chunk))))
