"""The ways of reading a file that ``bench read`` measures: how each one reads, and their table.

A way starts in two steps: ``start`` opens, maps and launches what it needs, and returns the call
that is timed.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from errno import EINVAL, EOPNOTSUPP
from functools import partial
from typing import Any, NamedTuple

from numaload.bench.machine import prefaulted
from numaload.errors import FileChangedError, NumaloadError, ReadError, UsageError, reason
from numaload.files import known
from numaload.files.copy import copy_files
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import MappedMemory, map_file, map_private
from numaload.linux.syscalls import HUGE, PAGE
from numaload.machine.memory import require
from numaload.machine.stopping import CancelToken
from numaload.machine.topology import topology
from numaload.machine.workers import Workers, finish
from numaload.pagecache.prewarm import prewarm
from numaload.pipeline.stream import stream
from numaload.weights import open_weights

# Where bytes go. BUFFER: one that is used again, and may stay in the processor's caches. CEILING:
# memory of the file's size that was prepared before: nothing that fills memory can be faster.
BUFFER, CEILING, CACHE, MEMORY = "one buffer", "ceiling", "page cache", "memory"
DIRECT, DIRECT_4K, PREPARED = "direct", "direct-4k", "direct-prepared"
PREWARM, COPY = "prewarm", "copy"
CHUNK = 8 << 20  # bytes a read, where a way does not say otherwise
STEP = 2 << 20  # bytes that one readahead(2) asks for
MIB = 1 << 20
MOST_THREADS = 256
MOST_SAID = 200  # bytes shown of what a program complained of
DD_BYTES = re.compile(rb"^(\d+) bytes", re.MULTILINE)


class Unavailable(Exception):  # noqa: N818 - no error of the user's: this way is left out
    """A way that does not exist here; the text says why, and how to have it."""


class Done(NamedTuple):
    """nbytes: bytes of the file that were read. cpu: seconds, where another process spent them."""

    nbytes: int
    cpu: float | None = None
    plan: Any = None


Run = Callable[[], Done]  # what is timed
Read = Callable[[int, int], int]  # (offset, bytes of the file): bytes that were read


class Turn(ExitStack):
    """One timing of the first ``file.size`` bytes of a file.

    What a way opens, maps and starts is released when the turn ends, after the clock stopped.
    whole: these are all bytes of the file. alone: the file is no part of a larger model.
    """

    def __init__(self, file: SourceFile, *, whole: bool = True, alone: bool = True) -> None:
        super().__init__()
        self.file, self.whole, self.alone = file, whole, alone
        self.nbytes, self.path = file.size, os.path.abspath(file.path)

    def open(self, flags: int = 0) -> int:
        """Open the same file once more, whatever its name leads to by now."""
        try:
            fd = os.open(f"/proc/self/fd/{self.file.fd}", os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as error:
            raise ReadError(reason(error), path=self.path) from error
        self.callback(os.close, fd)
        return fd

    def open_direct(self) -> int:
        """Open it for direct reads. Raises: Unavailable where the file system has none."""
        try:
            fd = self.open(os.O_DIRECT)
            self.fill(fd, _small_pages(PAGE), 0, 1)
        except ReadError as error:
            if getattr(error.__cause__, "errno", None) in (EINVAL, EOPNOTSUPP):
                raise Unavailable("no direct reads (O_DIRECT) on this file system") from error
            raise
        return fd

    def map(self) -> MappedMemory:
        mapped = map_file(self.file.fd, self.nbytes)
        self.callback(mapped.close)
        return mapped

    def fill(self, fd: int, view: memoryview, offset: int, nbytes: int) -> int:
        """Read ``nbytes`` or more into ``view``: direct reads are of whole pages.

        Raises: ReadError, FileChangedError.
        """
        done = 0
        while done < nbytes:
            at = offset + done
            try:
                count = os.preadv(fd, [view[done:]], at)
            except OSError as error:
                raise ReadError(reason(error), path=self.path, offset=at) from error
            if count == 0:
                missing = f"ends early: {nbytes - done} bytes are missing"
                raise FileChangedError(missing, path=self.path, offset=at)
            done += count
        return nbytes

    def by_threads(self, readers: Sequence[Read], chunk: int = CHUNK) -> Run:
        """Return a run with a thread for each reader, which takes the next chunk in file order."""
        cpus = topology().cpus

        def run() -> Done:
            offsets, token = iter(range(0, self.nbytes, chunk)), CancelToken()

            def take(read: Read) -> int:
                done = 0
                for offset in offsets:
                    if token.cancelled():
                        break
                    done += read(offset, min(chunk, self.nbytes - offset))
                return done

            workers = Workers(cpus, len(readers), "numaload-bench")
            self.callback(workers.close)
            jobs = [workers.submit(take, read, token=token) for read in readers]
            return Done(sum(finish(jobs, token)))

        return run


def _whole_pages(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def _small_pages(nbytes: int) -> memoryview:
    memory = mmap.mmap(-1, nbytes)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    for offset in range(0, nbytes, PAGE):
        memory[offset] = 1
    return memoryview(memory)


# threads of this process -------------------------------------------------------------------------


def _into(turn: Turn, fd: int, buffer: memoryview) -> Read:
    def read(offset: int, nbytes: int) -> int:
        return turn.fill(fd, buffer[: _whole_pages(nbytes)], offset, nbytes)

    return read


def _direct(turn: Turn, threads: int, *, huge: bool) -> Run:
    """Read into buffers that are there already."""
    fd = turn.open_direct()
    buffers = [prefaulted(CHUNK).data if huge else _small_pages(CHUNK) for _ in range(threads)]
    return turn.by_threads([_into(turn, fd, buffer) for buffer in buffers])


def _direct_prepared(turn: Turn, threads: int) -> Run:
    """Read into memory of the file's size, all of which was written before the clock starts."""
    fd, view = turn.open_direct(), prefaulted(_whole_pages(turn.nbytes)).data

    def read(offset: int, nbytes: int) -> int:
        return turn.fill(fd, view[offset : offset + _whole_pages(nbytes)], offset, nbytes)

    return turn.by_threads([read] * threads)


def _pread(turn: Turn, threads: int, *, chunk: int = CHUNK, each: bool = False) -> Run:
    """Read with pread. each: a descriptor, and so a read-ahead, for every thread."""
    fds = [turn.open() for _ in range(threads)] if each else [turn.open()] * threads
    return turn.by_threads([_into(turn, fd, prefaulted(chunk).data) for fd in fds], chunk)


def _into_memory(turn: Turn, threads: int, *, direct: bool) -> Run:
    """Read into memory that nobody has touched: a thread makes its chunk's pages, then fills."""
    fd = turn.open_direct() if direct else turn.open()
    require(turn.nbytes, "memory to read the file into", "measure with a smaller file")
    memory = map_private(_whole_pages(turn.nbytes))
    turn.callback(memory.close)
    view = memory.view(write=True)

    def read(offset: int, nbytes: int) -> int:
        length = _whole_pages(nbytes)
        syscalls.madvise(memory.address + offset, length, syscalls.MADV_POPULATE_WRITE)
        return turn.fill(fd, view[offset : offset + length], offset, nbytes)

    return turn.by_threads([read] * threads)


def _populate(turn: Turn, threads: int) -> Run:
    """Populate in one call if alone, as everybody does it; several threads take chunks."""
    mapped = turn.map()

    def read(offset: int, nbytes: int) -> int:
        address, length = mapped.address + offset, _whole_pages(nbytes)
        failed = syscalls.madvise(address, length, syscalls.MADV_POPULATE_READ)
        if failed == EINVAL:
            raise Unavailable("MADV_POPULATE_READ needs Linux 5.14")
        if failed:
            raise ReadError(os.strerror(failed), path=turn.path, offset=offset)
        return nbytes

    return turn.by_threads([read] * threads, turn.nbytes if threads == 1 else CHUNK)


def _touch_huge(turn: Turn, threads: int) -> Run:
    mapped = turn.map()
    if syscalls.madvise(mapped.address, mapped.length, syscalls.MADV_HUGEPAGE):
        raise Unavailable("the kernel has no huge pages for files")
    return turn.by_threads([_touching(turn, mapped.view()) for _ in range(threads)])


def _touching(turn: Turn, view: memoryview) -> Read:
    """Touch by writing to a pipe: what cannot be read is an error there, and would kill us here."""
    pipe = os.pipe2(os.O_CLOEXEC)
    for fd in pipe:
        turn.callback(os.close, fd)

    def read(offset: int, nbytes: int) -> int:
        for at in range(offset, offset + nbytes, HUGE):
            try:
                os.write(pipe[1], view[at : at + 1])
            except OSError as error:
                raise ReadError("cannot be read there", path=turn.path, offset=at) from error
            os.read(pipe[0], 1)
        return nbytes

    return read


def _read_ahead(turn: Turn, _: int) -> Run:
    """Ask for all, then wait for it: since Linux 4.20 WILLNEED and readahead(2) are one."""
    fd, steps = turn.open(), range(0, turn.nbytes, STEP)

    def run() -> Done:
        for offset in steps:
            os.posix_fadvise(fd, offset, STEP, os.POSIX_FADV_WILLNEED)
        last = memoryview(bytearray(1))
        for offset in steps:
            turn.fill(fd, last, min(offset + STEP, turn.nbytes) - 1, 1)
        return Done(turn.nbytes)

    return run


# other processes: programs are timed with their start, mappings without ---------------------------


def _cat(turn: Turn, _: int) -> Run:
    if not turn.whole:
        raise Unavailable("cat reads whole files only")
    return _program(turn, "cat", turn.path)


def _dd(turn: Turn, _: int) -> Run:
    part = [] if turn.whole else [f"count={turn.nbytes // MIB}"]
    return _program(turn, "dd", f"if={turn.path}", "of=/dev/null", "bs=1M", *part)


def _vmtouch(turn: Turn, _: int) -> Run:
    part = [] if turn.whole else ["-p", f"0-{turn.nbytes // MIB}M"]
    return _program(turn, "vmtouch", "-q", "-f", "-t", *part, turn.path)


def _program(turn: Turn, name: str, *words: str) -> Run:
    if shutil.which(name) is None:
        raise Unavailable(f"not installed: apt-get install {name}")

    def run() -> Done:
        done = subprocess.run(
            [name, *words], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, env=os.environ | {"LC_ALL": "C"}, check=False,
        )  # fmt: skip
        if done.returncode:
            why = done.stderr.strip()[-MOST_SAID:] or b"no message, status %d" % done.returncode
            raise ReadError(f"{name}: {why.decode(errors='replace')}", path=turn.path)
        told = DD_BYTES.search(done.stderr)  # of these programs dd alone says how much it read
        return Done(int(told[1]) if told else turn.nbytes)

    return run


# Maps a file alone in a process: where a page cannot be read, that process is killed and not ours.
# It says that it is ready, waits for a line, reads, and prints the CPU seconds that took.
MAPPED = """
import json, mmap, sys, time
from contextlib import suppress

def say(text):
    print(text, flush=True)
    sys.stdin.readline()

fd, nbytes, flags, advice, copy = json.loads(sys.argv[1])
say("ready")
begin = time.process_time()
mapped = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED | flags, prot=mmap.PROT_READ)
if advice is not None:
    mapped.madvise(advice)
if copy:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    memory[:] = memoryview(mapped)
elif not flags & mmap.MAP_POPULATE:
    memoryview(mapped)[:: mmap.PAGESIZE].tobytes()
say(time.process_time() - begin)
"""


def _mapped(
    turn: Turn, _: int, *, flags: int = 0, advice: int | None = None, copy: bool = False
) -> Run:
    """Touch a byte of every page, populate by MAP_POPULATE in ``flags``, or copy to huge pages."""
    fd = turn.open()
    asked = json.dumps([fd, turn.nbytes, flags, advice, copy])
    child = turn.enter_context(
        subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", MAPPED, asked], pass_fds=(fd,),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
    )  # fmt: skip
    turn.callback(child.kill)
    _answer(turn, child)

    def run() -> Done:
        with suppress(BrokenPipeError):  # why it ended is said below
            os.write(child.stdin.fileno(), b"\n")  # type: ignore[union-attr] # a pipe
        return Done(turn.nbytes, float(_answer(turn, child)))

    return run


def _answer(turn: Turn, child: subprocess.Popen[bytes]) -> bytes:
    """Return its next line. Raises: ReadError where it ended instead."""
    line: bytes = child.stdout.readline()  # type: ignore[union-attr] # a pipe
    if line:
        return line
    said = child.stderr.read().strip().splitlines()[-1:]  # type: ignore[union-attr] # a pipe
    status = child.wait()
    if said:
        raise ReadError(said[0][-MOST_SAID:].decode(errors="replace"), path=turn.path)
    how = f"signal {-status}" if status < 0 else f"status {status}"
    why = f"the process that read its mapping ended ({how}): was the file cut short?"
    raise ReadError(why, path=turn.path)


# numaload ----------------------------------------------------------------------------------------


@dataclass
class _OneFile:
    """Pass for opened weights that have one file only: not the other splits of its model."""

    paths: list[str]


def _prewarm(turn: Turn, _: int) -> Run:
    if not turn.whole:
        raise Unavailable("prewarm reads whole files only")
    if not turn.alone:  # a bare ``mirror`` works on known models, and this is only a part of one
        turn.callback(known.forget, (turn.path,))

    def run() -> Done:
        report = prewarm(_OneFile([turn.path]))
        return Done(report.size, plan=report.plan and report.plan.to_dict())

    return run


def _copy(turn: Turn, _: int) -> Run:
    def run() -> Done:
        copies = copy_files([turn.file])
        for one in copies:
            turn.callback(one.close)
        return Done(sum(one.length for one in copies))

    return run


def _stream(turn: Turn, _: int) -> Run:
    if not (turn.whole and turn.alone):
        raise Unavailable("stream reads whole models only, and this is a part of one")
    try:
        weights = turn.enter_context(open_weights(turn.path))
    except NumaloadError as error:
        raise Unavailable(f"stream reads models only: {error}") from error

    def run() -> Done:
        total = sum(array.nbytes for _, array in stream(weights, None))
        return Done(turn.nbytes if total == sum(t.nbytes for t in weights.values()) else total)

    return run


# the table ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadMethod:
    """A way of reading, with one thread or several.

    counts: thread counts that it is measured with; none where it has no such number. warm: False
    where that would measure nothing. ours: numaload's API. own: numaload could choose it.
    """

    name: str
    sink: str
    what: str
    start: Callable[[Turn, int], Run]
    counts: tuple[int, ...] = ()
    warm: bool = True
    ours: bool = False
    own: bool = False


@dataclass(frozen=True)
class Way:
    """One entry of a report: a method with so many threads; 0 where that is not ours to say."""

    method: ReadMethod
    threads: int

    @property
    def name(self) -> str:
        return f"{self.method.name}-x{self.threads}" if self.threads else self.method.name

    def start(self, turn: Turn) -> Run:
        return self.method.start(turn, self.threads or 1)


METHODS = (
    ReadMethod(
        PREPARED, CEILING, "O_DIRECT, 8 MiB a read, into prepared huge pages of the file's size",
        _direct_prepared, (1, 4), warm=False,
    ),
    ReadMethod(
        DIRECT, BUFFER, "the same into one 8 MiB buffer a thread, which stays in the caches",
        partial(_direct, huge=True), (1, 4),
    ),
    ReadMethod(
        DIRECT_4K, BUFFER, "such a buffer of 4 KiB pages: what dd iflag=direct and fio measure",
        partial(_direct, huge=False), (1, 4),
    ),
    ReadMethod("cat", CACHE, "cat FILE > /dev/null, with its start", _cat),
    ReadMethod("dd", CACHE, "dd bs=1M of=/dev/null, with its start", _dd),
    ReadMethod("vmtouch", CACHE, "vmtouch -t, with its start", _vmtouch),
    ReadMethod(
        "map-populate", CACHE, "mmap with MAP_POPULATE, alone in a process",
        partial(_mapped, flags=mmap.MAP_POPULATE),
    ),
    ReadMethod(
        "populate", CACHE, "MADV_POPULATE_READ on a mapping; warm, that is making page tables",
        _populate, (1, 4), own=True,
    ),
    ReadMethod("touch", CACHE, "a byte of every 4 KiB of a mapping, alone in a process", _mapped),
    ReadMethod(
        "touch-sequential", CACHE, "the same after MADV_SEQUENTIAL",
        partial(_mapped, advice=mmap.MADV_SEQUENTIAL),
    ),
    ReadMethod(
        "touch-huge", CACHE, "a byte of every 2 MiB after MADV_HUGEPAGE: the kernel reads 2 MiB",
        _touch_huge, (1, 4), warm=False, own=True,
    ),
    ReadMethod(
        "pread", CACHE, "pread of 8 MiB into a buffer, threads on one descriptor",
        _pread, (1, 2, 4, 8), own=True,
    ),
    ReadMethod(
        "pread-each", CACHE, "the same with a descriptor for each thread",
        partial(_pread, each=True), (2, 4, 8), own=True,
    ),
    ReadMethod(
        "pread-1m", CACHE, "pread of 1 MiB into a buffer, threads on one descriptor",
        partial(_pread, chunk=MIB), (1, 2, 4, 8), own=True,
    ),
    ReadMethod(
        "readahead", CACHE, "readahead(2) in steps of 2 MiB, then a byte of each waited for",
        _read_ahead, warm=False, own=True,
    ),
    ReadMethod(
        "direct-memory", MEMORY, "O_DIRECT into fresh huge pages, each made just before",
        partial(_into_memory, direct=True), (1, 4, 16), own=True,
    ),
    ReadMethod(
        "buffered-memory", MEMORY, "pread into fresh huge pages, each made just before",
        partial(_into_memory, direct=False), (1, 4, 16), own=True,
    ),
    ReadMethod(
        "mmap-copy", MEMORY, "a mapping copied into fresh huge pages, alone in a process",
        partial(_mapped, copy=True),
    ),
    ReadMethod(PREWARM, CACHE, "numaload.prewarm(FILE)", _prewarm, ours=True),
    ReadMethod(
        COPY, MEMORY, "numaload: all of it into private memory, as by open(FILE, copy=True)",
        _copy, ours=True,
    ),
    ReadMethod("stream", MEMORY, "numaload.stream(weights, None)", _stream, ours=True),
)  # fmt: skip


def chosen(names: Sequence[str] = (), counts: Sequence[int] = ()) -> list[Way]:
    """Return the ways to measure in the order of the table: all, or those named.

    names: of methods, or of ways (``pread-x4``). counts: of threads, instead of the table's.
    Raises: UsageError.
    """
    for count in counts:
        if not 1 <= count <= MOST_THREADS:
            raise UsageError(f"threads {count}: expected 1 to {MOST_THREADS}")
    found = [
        Way(method, threads)
        for method in METHODS
        for threads in dict.fromkeys((counts or method.counts) if method.counts else (0,))
    ]
    known_names = {name for way in found for name in (way.name, way.method.name)}
    for name in names:
        if name not in known_names:
            raise UsageError(f"way {name!r}: expected one of {', '.join(m.name for m in METHODS)}")
    return [way for way in found if not names or {way.name, way.method.name} & set(names)]
