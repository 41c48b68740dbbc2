"""Whole files in memory of this process: what anyone does to the files afterwards cannot hurt."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from numaload.errors import NodeMemoryError
from numaload.numa import memory
from numaload.numa.mapping import Mapping, map_private
from numaload.numa.syscalls import PAGE
from numaload.numa.topology import topology
from numaload.storage.files import SourceFile
from numaload.storage.parallel import Job, Progress, pieces
from numaload.storage.residency import present, residency

PAGE_TABLES, LEAST_FREE = 512, 32 << 20  # a byte for so many copied; bytes that stay free
LOOK_EVERY = 256 << 20  # bytes copied between two looks at what memory is left


def copy_files(files: Sequence[SourceFile], progress: Progress | None = None) -> list[Mapping]:
    """The bytes of these files, read into private memory, in huge pages where there are some.

    It takes the files' size in whole pages and no more: page cache that reading brings in is
    given back, what was there before stays.
    Raises: NodeMemoryError with numbers before a page is touched, or when others took the memory
    meanwhile; ReadError, FileChangedError, CancelledError. Then nothing is left of it.
    """
    _check_room(sum(-(-file.size // PAGE) * PAGE for file in files), "nothing was copied")
    copies: list[Mapping] = []
    try:
        copies.extend(map_private(file.size) for file in files)
        _Copying(files, copies, progress).run()
        for file in files:
            file.check_unchanged()
    except BaseException:
        for copied in copies:
            copied.close()
        raise
    return copies


def _check_room(nbytes: int, state: str) -> None:
    room = memory.available()
    if nbytes + nbytes // PAGE_TABLES + LEAST_FREE > room.free:
        raise NodeMemoryError(
            f"{nbytes} bytes ({nbytes / 2**30:.1f} GiB) are to be copied, {room.name} has room for"
            f" {room.free} ({room.free / 2**30:.1f} GiB); {state}: free memory, or open without"
            " copy=True",
            needed=nbytes,
            free=room.free,
        )


class _Copying:
    """The state that the threads of one copying share."""

    def __init__(
        self, files: Sequence[SourceFile], copies: Sequence[Mapping], progress: Progress | None
    ) -> None:
        self.files, self.copies = files, copies
        self.before = [residency(file) for file in files]
        # What is in RAM first, before reading the rest can push it out.
        there = pieces((present(found) for found in self.before), absent=False)
        absent = pieces(found.absent for found in self.before)
        self.job = Job(chain(there, absent), sum(file.size for file in files), progress)
        self.next_look = LOOK_EVERY

    def run(self) -> None:
        cpus = topology().cpus
        self.job.run(self._read, cpus, self.job.threads(cpus), "numaload-copy")
        for which, found in enumerate(self.before):
            for start, stop in found.absent:  # read-ahead reached beyond pieces
                self._give_back(which, start, stop - start)

    def _read(self) -> None:
        for piece in self.job:
            self._look()
            # Released at once: a view in the traceback of an error would keep the whole copy.
            with self.copies[piece.which].view(piece.offset, piece.nbytes, write=True) as view:
                self.files[piece.which].read_into(view, piece.offset)
            if piece.absent:
                self._give_back(piece.which, piece.offset, piece.nbytes)
            self.job.advance(piece.nbytes)

    def _give_back(self, which: int, start: int, nbytes: int) -> None:
        if self.before[which].known:  # or else it may be what others had read
            self.files[which].drop_cache(start, nbytes)

    def _look(self) -> None:
        """Others may take the memory meanwhile, and the kernel would kill rather than fail."""
        with self.job.lock:
            due = self.job.done >= self.next_look
            self.next_look += due * LOOK_EVERY
        if due:
            _check_room(self.job.total - self.job.done, "all that was copied is given back")
