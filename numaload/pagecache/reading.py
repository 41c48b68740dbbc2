"""Read into the page cache: on the nodes asked for, and only what memory has room for."""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numaload import trace
from numaload.errors import NodeMemoryError, NumaUnavailableError, warn_once
from numaload.files.plan import CHUNK, ReadMethod, ReadPlan
from numaload.files.reader import Chunk, Progress, Reading
from numaload.files.residency import (
    AbsentRange,
    Residency,
    length,
    map_present,
    map_quietly,
    present,
    residency,
    steps,
)
from numaload.files.source import SourceFile
from numaload.files.ways import IntoCache
from numaload.linux import syscalls
from numaload.linux.lists import format_list
from numaload.linux.syscalls import HUGE, PAGE
from numaload.machine import memory
from numaload.machine.affinity import allowed, pin, pinned_to

if TYPE_CHECKING:
    from numaload.machine.topology import Topology

POLICIES = {"bind": syscalls.MPOL_BIND, "interleave": syscalls.MPOL_INTERLEAVE}
LOOK_EVERY = 128 << 20  # bytes read between two looks at what memory is left
NOT_KEPT = (
    "its file system keeps no pages in RAM (such as FUSE with direct_io, 9p without a cache, DAX):"
    " there is nothing to prewarm"
)
HEAD = 8 << 20  # bytes of what was read first: if they go, memory is full


@dataclass(frozen=True)
class Placing:
    """Name the nodes that page cache shall be on. move: pages elsewhere are moved there."""

    machine: Topology
    nodes: list[int]
    policy: str
    move: bool = False

    @property
    def everywhere(self) -> bool:
        return self.nodes == self.machine.usable


@contextmanager
def landing(placing: Placing | None) -> Iterator[None]:
    """Have this thread's own reads land on these nodes too: it reads headers before the rest."""
    if placing is None:
        yield
        return
    with ExitStack() as undone:
        try:
            before = syscalls.get_mempolicy()
            syscalls.set_mempolicy(POLICIES[placing.policy], placing.nodes)
            undone.callback(syscalls.set_mempolicy, *before)
        except NumaUnavailableError:  # which the reading threads tell
            undone.enter_context(pinned_to(placing.machine.cpus_of(placing.nodes)))
        yield


class CacheBudget:
    """Bytes that fit without evicting what this call has already read.

    The kernel counts all page cache as free, also what this call brought in: so room is needed for
    all of it, not only for what is still to be read.
    """

    def __init__(
        self,
        files: Sequence[SourceFile],
        absent: Sequence[Sequence[AbsentRange]],
        resident: int,
        placing: Placing | None,
    ) -> None:
        self.files, self.resident = files, resident
        self.absent = sum(map(length, absent))
        # All nodes together are the machine, whose own estimate is better than a sum.
        self.nodes = placing.nodes if placing and not placing.everywhere else []
        self.head: Chunk | None = None
        self.next_look, self.stopped = LOOK_EVERY, ""

    @property
    def is_enough(self) -> bool:
        return self.absent + self.resident <= self._tightest().free

    def check(self) -> None:
        """Check that all of it fits. Raises: NodeMemoryError, with numbers."""
        if not self.is_enough:
            tightest = self._tightest()
            gib = self.absent / 2**30
            raise NodeMemoryError(
                f"{self.absent} bytes ({gib:.1f} GiB) are to be read"
                + (f" beside {self.resident} that are in RAM already" if self.resident else "")
                + f"; {tightest.name} has room for {tightest.free}"
                f" ({tightest.free / 2**30:.1f} GiB); --force reads what fits",
                needed=self.absent,
                free=tightest.free,
            )

    def _tightest(self) -> memory.Limit:
        limits = [memory.available()]
        if self.nodes:
            free = [memory.node_free(node) for node in self.nodes]
            if (known := [nbytes for nbytes in free if nbytes is not None]) and known == free:
                limits.append(memory.Limit(f"node {format_list(self.nodes)}", sum(known)))
        return memory.tightest(limits)

    def look(self, done: int, chunk: Chunk) -> bool:
        """Return whether there is room for more after ``chunk``. ``done``: bytes read so far."""
        if self.head is None:
            self.head = chunk
            found = residency(self.files[chunk.which], chunk.offset, chunk.stop)
            if found.known and not found.resident:
                self.stopped = NOT_KEPT
        if self.stopped or done < self.next_look or done >= self.absent:
            return not self.stopped
        self.next_look = done + LOOK_EVERY
        tightest = self._tightest()
        more = min(LOOK_EVERY, self.absent - done)
        if tightest.free < self.resident + done + more:
            self.stopped = (
                f"{tightest.name} has room for {tightest.free} bytes, and these files take"
                f" {self.resident + done} of them already"
            )
        elif self._head_is_going():
            self.stopped = "the kernel already gives up what was read first"
        return not self.stopped

    def _head_is_going(self) -> bool:
        if self.head is None:
            return False
        stop = min(self.head.stop, self.head.offset + HEAD)
        found = residency(self.files[self.head.which], self.head.offset, stop)
        return found.known and found.resident < found.size // 2


def read_into_cache(
    files: Sequence[SourceFile],
    absent: Sequence[Sequence[AbsentRange]],
    plan: ReadPlan,
    budget: CacheBudget,
    progress: Progress | None,
    *,
    placing: Placing | None,
    rate: int | None,
    exact: bool = False,
) -> tuple[int, ReadPlan]:
    """Return (bytes read, the plan as carried out). Reading stops where ``budget`` says so."""
    reading = Reading(sum(map(length, absent)), progress, rate=rate)
    threads = _Threads(files, reading, budget, placing, exact=exact)
    cpus = placing.machine.cpus_of(placing.nodes) if placing else allowed()
    try:
        plan = reading.run(absent, plan, threads.read, cpus, "numaload-prewarm")
    finally:
        for into in threads.into:
            into.close()  # an error that somebody keeps would keep them open
    return reading.done, plan


class _Threads:
    """Give each thread of one reading its memory policy, which ends with the thread."""

    def __init__(
        self,
        files: Sequence[SourceFile],
        reading: Reading,
        budget: CacheBudget,
        placing: Placing | None,
        *,
        exact: bool,
    ) -> None:
        self.files, self.reading, self.budget, self.placing = files, reading, budget, placing
        self.exact = exact
        self.own = threading.local()
        self.into: list[IntoCache] = []

    def read(self, chunk: Chunk, way: ReadMethod) -> None:
        if not hasattr(self.own, "into"):
            self.own.bound = self._bind()
            self.own.into = IntoCache(exact=self.exact)
            self.into.append(self.own.into)
        if self.placing and not self.own.bound:
            node = self.placing.nodes[chunk.offset // CHUNK % len(self.placing.nodes)]
            pin(self.placing.machine.cpus_of([node]))
        file, nodes = self.files[chunk.which], self.placing.nodes if self.placing else ()
        with trace.span("read", chunk.nbytes, nodes, file.path):
            self.own.into.read(file, chunk.offset, chunk.stop, way.name)
        with self.reading.lock:
            more = self.budget.look(self.reading.done + chunk.nbytes, chunk)
        if not more:
            self.reading.token.cancel()

    def _bind(self) -> bool:
        """Set this thread's policy. False where that is refused: pages land where they are read."""
        if self.placing is None:
            return True
        try:
            syscalls.set_mempolicy(POLICIES[self.placing.policy], self.placing.nodes)
        except NumaUnavailableError as error:
            warn_once("set_mempolicy", f"{error}; read by threads on these nodes and counted after")
            return False
        return True


def move_pages(
    files: Sequence[SourceFile], found: Sequence[Residency], placing: Placing
) -> tuple[int, dict[str, int]]:
    """Move pages that are on other nodes; return bytes moved, and {why bytes stayed: bytes}.

    Only pages that no other process maps can be moved.
    """
    moved, stayed = 0, Counter[str]()
    try:
        for file, resident in zip(files, found, strict=True):
            with map_quietly(file) as mapping:
                for start, stop in steps(present(resident)):
                    map_present(mapping, start, stop)
                    wrong = _wrong(mapping.address, start, stop, placing.nodes)
                    moved += _move(wrong, placing.nodes, stayed)
    except NumaUnavailableError as error:
        warn_once(
            "move_pages", f"page cache cannot be moved: {error}: numaload evict, then prewarm"
        )
    return moved, dict(stayed)


def _wrong(base: int, start: int, stop: int, nodes: Sequence[int]) -> list[int]:
    """Return addresses of pages that are on other nodes."""
    pages = range(base + start, base + stop, PAGE)
    where = syscalls.pages_nodes(pages)
    return [a for a, node in zip(pages, where, strict=True) if node >= 0 and node not in nodes]


def _move(pages: Sequence[int], nodes: Sequence[int], stayed: Counter[str]) -> int:
    if not pages:
        return 0
    # Huge pages move as one: all of one go to one node.
    wanted = [nodes[page // HUGE % len(nodes)] for page in pages]
    moved = 0
    for status in syscalls.move_pages(pages, wanted):
        if status in nodes:
            moved += PAGE
        else:
            stayed[os.strerror(-status) if status < 0 else "the kernel does not say why"] += PAGE
    return moved
