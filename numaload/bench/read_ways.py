"""The ways of reading a file that ``bench read`` measures, as a table."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from numaload.bench import read_ours as ours
from numaload.bench import read_programs as programs
from numaload.bench import read_threads as threads
from numaload.bench.read_turn import Run, Turn
from numaload.errors import UsageError

CEILING, CACHE, MEMORY = "ceiling", "page cache", "memory"  # where bytes go; ceiling: nowhere
MOST_THREADS = 256
PREWARM, COPY = "prewarm", "copy"
CEILINGS, DD_LIMIT = "direct", "direct-4k"


@dataclass(frozen=True)
class Family:
    """A way of reading, with one thread or several.

    counts: threads that it is measured with; none where it has no such number.
    copies: of the file, in fresh memory, besides page cache that is read into.
    asked: only where it is named. loads: False where returning does not mean that it has read.
    warm: False where that would measure nothing. ours: numaload's API. own: what numaload could
    choose itself.
    """

    name: str
    sink: str
    what: str
    start: Callable[[Turn, int], Run]
    counts: tuple[int, ...] = ()
    copies: int = 0
    asked: bool = False
    loads: bool = True
    warm: bool = True
    ours: bool = False
    own: bool = False


@dataclass(frozen=True)
class Way:
    """One entry of a report: a family with so many threads; 0 where that is not ours to say."""

    family: Family
    threads: int

    @property
    def name(self) -> str:
        return f"{self.family.name}-x{self.threads}" if self.threads else self.family.name

    def start(self, turn: Turn) -> Run:
        return self.family.start(turn, self.threads or 1)


_buffered, _mapped = threads.buffered, programs.mapped
_MIB = 1 << 20

FAMILIES = (
    Family(
        CEILINGS, CEILING, "O_DIRECT, 8 MiB a read, into huge pages that are used again: the limit",
        partial(threads.direct, huge=True), (1, 4),
    ),
    Family(
        DD_LIMIT, CEILING, "the same into 4 KiB pages: what dd iflag=direct and fio measure",
        partial(threads.direct, huge=False), (1, 4),
    ),
    Family("cat", CACHE, "cat FILE > /dev/null, with its start", programs.cat),
    Family("dd", CACHE, "dd bs=1M of=/dev/null, with its start", programs.dd),
    Family("vmtouch", CACHE, "vmtouch -t, with its start", programs.vmtouch),
    Family(
        "map-populate", CACHE, "mmap with MAP_POPULATE, alone in a process",
        partial(_mapped, flags=mmap.MAP_POPULATE, copy=False),
    ),
    Family(
        "populate", CACHE, "MADV_POPULATE_READ on a mapping; warm, that is making page tables",
        threads.populate, (1, 4), own=True,
    ),
    Family(
        "touch", CACHE, "a byte of every 4 KiB of a mapping, alone in a process",
        partial(_mapped, copy=False),
    ),
    Family(
        "touch-sequential", CACHE, "the same after MADV_SEQUENTIAL",
        partial(_mapped, advice=mmap.MADV_SEQUENTIAL, copy=False),
    ),
    Family(
        "touch-huge", CACHE, "a byte of every 2 MiB after MADV_HUGEPAGE: the kernel reads 2 MiB",
        threads.touch_huge, (1, 4), warm=False, own=True,
    ),
    Family(
        "touch-random", CACHE, "a byte of every 4 KiB after MADV_RANDOM: minutes for some GiB",
        partial(_mapped, advice=mmap.MADV_RANDOM, copy=False), asked=True,
    ),
    Family(
        "pread", CACHE, "pread of 8 MiB into a buffer, threads on one descriptor",
        partial(_buffered, each=False), (1, 2, 4, 8), own=True,
    ),
    Family(
        "pread-each", CACHE, "the same with a descriptor for each thread",
        partial(_buffered, each=True), (2, 4, 8), own=True,
    ),
    Family(
        "pread-1m", CACHE, "pread of 1 MiB into a buffer, threads on one descriptor",
        partial(_buffered, chunk=_MIB, each=False), (1, 2, 4, 8), own=True,
    ),
    Family(
        "pread-1m-each", CACHE, "the same with a descriptor for each thread",
        partial(_buffered, chunk=_MIB, each=True), (2, 4, 8), own=True,
    ),
    Family(
        "readahead", CACHE, "readahead(2) in steps of 2 MiB, then a byte of each waited for",
        threads.read_ahead, own=True,
    ),
    Family(
        "willneed", CACHE, "one posix_fadvise(WILLNEED) for all: see how much that loads",
        threads.will_need, loads=False, warm=False,
    ),
    Family(
        "direct-memory", MEMORY, "O_DIRECT into fresh huge pages, each made just before",
        partial(threads.into_memory, past_cache=True), (1, 4, 16), 1, own=True,
    ),
    Family(
        "buffered-memory", MEMORY, "pread into fresh huge pages, each made just before",
        partial(threads.into_memory, past_cache=False), (1, 4, 16), 1, own=True,
    ),
    Family(
        "mmap-copy", MEMORY, "a mapping copied into fresh huge pages, alone in a process",
        partial(_mapped, copy=True), (), 1,
    ),
    Family(PREWARM, CACHE, "numaload.prewarm(FILE)", ours.prewarmed, ours=True),
    Family(
        COPY, MEMORY, "numaload: all of it into private memory, as by open(FILE, copy=True)",
        ours.copied, (), 1, ours=True,
    ),
    Family("stream", MEMORY, "numaload.stream(weights, None)", ours.streamed, (), 1, ours=True),
)  # fmt: skip


def chosen(names: Sequence[str] = (), counts: Sequence[int] = ()) -> list[Way]:
    """Ways in the order of the table: all but the slowest, or those named.

    names: of families, or of ways (``pread-x4``). counts: of threads, instead of the table's.
    Raises: UsageError.
    """
    for count in counts:
        if not 1 <= count <= MOST_THREADS:
            raise UsageError(f"threads {count}: expected 1 to {MOST_THREADS}")
    found = [way for family in FAMILIES for way in _with_threads(family, counts)]
    known = {name for way in found for name in (way.name, way.family.name)}
    for name in names:
        if name not in known:
            raise UsageError(f"way {name!r}: expected one of {', '.join(f.name for f in FAMILIES)}")
    if names:
        return [way for way in found if way.name in names or way.family.name in names]
    return [way for way in found if not way.family.asked]


def _with_threads(family: Family, counts: Sequence[int]) -> list[Way]:
    if not family.counts:
        return [Way(family, 0)]
    return [Way(family, count) for count in dict.fromkeys(counts or family.counts)]
