"""Whole files in memory of this process: what anyone does to the files afterwards cannot hurt."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

from numaload import trace
from numaload.files.plan import BUFFERED, DIRECT, MEMORY, ReadMethod, ReadPlan
from numaload.files.reader import Announce, Chunk, Progress, Reading
from numaload.files.residency import Residency, give_back, present, residency
from numaload.files.source import SourceFile
from numaload.files.tuned import plan_reading
from numaload.files.ways import IntoMemory
from numaload.linux.mapping import MappedMemory, map_private, populate_write
from numaload.linux.syscalls import PAGE
from numaload.machine import memory
from numaload.machine.affinity import allowed

PAGE_TABLES = 512  # bytes copied for each byte of these
LOOK_EVERY = 256 << 20  # bytes begun between two looks at what memory is left
MOST_THREADS = 8  # that copy what is in RAM: memory is busy with fewer


def copy_files(
    files: Sequence[SourceFile],
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> list[MappedMemory]:
    """Read these files into private memory, in huge pages where there are some.

    What is in RAM is copied from there; the rest is read past the page cache where that can be.
    It takes the files' size in whole pages and no more: page cache that reading brings in is
    given back, what was there before stays. announce: called with the plan, if something is absent.
    Raises: NodeMemoryError with numbers before a page is touched, or when others took the memory
    meanwhile; ReadError, FileChangedError, CancelledError. Then nothing is left of it.
    """
    _check_room(sum(-(-file.size // PAGE) * PAGE for file in files), "nothing was copied")
    copies: list[MappedMemory] = []
    try:
        copies.extend(map_private(file.size) for file in files)
        _Copying(files, copies, progress).run(announce)
        for file in files:
            file.check_unchanged()
    except BaseException:
        for copied in copies:
            copied.close()
        raise
    return copies


def _check_room(nbytes: int, state: str) -> None:
    way_out = f"{state}: free memory, or open a model without copy=True"
    memory.require(nbytes + nbytes // PAGE_TABLES, "a copy of the files", way_out)


@trace.spanned("plan")
def plan_for(files: Sequence[SourceFile], before: Sequence[Residency]) -> ReadPlan:
    """Plan how the absent bytes of these files are read into memory."""
    absent = [sum(stop - start for start, stop in found.absent) for found in before]
    return plan_reading(MEMORY, files[absent.index(max(absent))], sum(absent))


class _Copying:
    """The state that the threads of one copying share."""

    def __init__(
        self, files: Sequence[SourceFile], copies: Sequence[MappedMemory], progress: Progress | None
    ) -> None:
        self.files, self.copies = files, copies
        self.before = [residency(file) for file in files]
        self.reading = Reading(sum(file.size for file in files), progress)
        self.begun, self.next_look, self.lock = 0, LOOK_EVERY, threading.Lock()
        self.busy = threading.Semaphore(len(allowed()))

    def run(self, announce: Announce | None) -> None:
        if not self.files:
            return
        cpus, plan = allowed(), plan_for(self.files, self.before)
        plan = plan.forced_to([begun_by_copies(way) for way in plan.candidates])
        if announce and any(found.absent for found in self.before):
            announce(plan)
        # What is in RAM first, before reading the rest can push it out.
        there = plan.forced_to([ReadMethod(BUFFERED, min(MOST_THREADS, len(cpus)))])
        run = self.reading.run
        try:
            with ExitStack() as opened:
                planned = plan.way.name == DIRECT  # or only to be tried
                sources = [
                    IntoMemory(file, direct=plan.uses(DIRECT), quiet=not planned)
                    for file in self.files
                ]
                for source in sources:
                    opened.callback(source.close)
                for its, absent in ((there, False), (plan, True)):
                    runs = [found.absent if absent else present(found) for found in self.before]
                    run(runs, its, _Work(self, sources, absent=absent).read, cpus, "numaload-copy")
        finally:  # read-ahead reached beyond chunks, and what failed ended within some
            for file, found in zip(self.files, self.before, strict=True):
                give_back(file, found.absent if found.known else ())

    def look(self, nbytes: int) -> None:
        """Look at memory again: others may take it, and the kernel would kill rather than fail.

        nbytes: that are begun now.
        """
        with self.lock:
            begun, self.begun = self.begun, self.begun + nbytes
            due = begun >= self.next_look
            self.next_look += due * LOOK_EVERY
        if due:
            _check_room(self.reading.total - begun, "all that was copied is given back")


class _Work:
    """What is done with each chunk."""

    def __init__(self, job: _Copying, sources: Sequence[IntoMemory], *, absent: bool) -> None:
        self.job, self.sources, self.absent = job, sources, absent

    def read(self, chunk: Chunk, way: ReadMethod) -> None:
        job = self.job
        job.look(chunk.nbytes)
        stage = "read" if self.absent else "copy"
        source = self.sources[chunk.which]
        fill(job.copies[chunk.which], chunk.offset, source, chunk, way, job.busy, stage)
        if self.absent and job.before[chunk.which].known:  # or it may be what others had read
            job.files[chunk.which].drop_cache(chunk.offset, chunk.nbytes)


def fill(
    memory: MappedMemory,
    at: int,
    source: IntoMemory,
    chunk: Chunk,
    way: ReadMethod,
    busy: threading.Semaphore,
    stage: str = "read",
) -> None:
    """Read a chunk into memory, from byte ``at`` of it on.

    busy: has a place for each CPU. stage: what traces call it.
    """
    if way.name == DIRECT:
        # Pages are cleared before the disk is asked, by no more threads than there are CPUs:
        # reading would clear them one by one, while the disk waits.
        with busy, trace.span("prepare", chunk.nbytes):
            populate_write(memory, at, at + chunk.nbytes)
    # Released at once: a view in the traceback of an error would keep the whole copy.
    with (
        memory.view(at, chunk.nbytes, write=True) as view,
        trace.span(stage, chunk.nbytes, file=source.file.path),
    ):
        source.read(view, chunk.offset, way.name)


def begun_by_copies(way: ReadMethod) -> ReadMethod:
    """Return the way with twice as many threads as read, since each clears its pages first."""
    return way._replace(threads=2 * way.threads)
