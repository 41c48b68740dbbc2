"""How fast memory is filled from a file, beside plain reads of the same file in the same run.

Warm: replicas beside pread. Cold (--cold): a private copy (open(copy=True)), shared memory filled
as replicas are, and a replica in the store with all that proves and publishes it, beside direct
reads into memory that was prepared before: nothing that fills memory is faster. Rounds alternate
over all rows; before each timing as much memory as it needs is touched and freed, since memory that
a hypervisor has not backed yet is several times slower to touch.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numaload
from numaload.bench.machine import median_interval
from numaload.demo import parse_size, write_model
from numaload.files.copy import copy_files, plan_for
from numaload.files.plan import DIRECT, ReadMethod
from numaload.files.reader import Chunk, Reading
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.files.ways import IntoMemory
from numaload.linux.mapping import map_private
from numaload.linux.syscalls import PAGE
from numaload.machine import userdir
from numaload.machine.topology import topology
from numaload.replicas import reclaim, store
from numaload.replicas.arena import private_memory, store_memory
from numaload.replicas.build import Allocate, build
from numaload.replicas.layout import CHUNK, Layout

Row = Callable[[], float]  # seconds
DIRECT_CHUNK = 8 << 20


def touch(nbytes: int) -> None:
    """Have the host back this much memory, in huge pages, and free it again."""
    with map_private(nbytes) as mapping:
        view = mapping.view(write=True)
        for offset in range(0, nbytes, PAGE):
            view[offset] = 1


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - begin)


def taking(run: Callable[[], None]) -> Row:
    def row() -> float:
        seconds: list[float] = []
        with timed(seconds):
            run()
        return seconds[0]

    return row


def read_fresh(files: Sequence[SourceFile]) -> None:
    """Measure the least a replica costs: one thread, pread into fresh private huge pages."""
    for file in files:
        with map_private(file.size) as mapping:
            for start in range(0, file.size, CHUNK):
                count = min(CHUNK, file.size - start)
                file.read_into(mapping.view(start, count, write=True), start)


def read_reused(files: Sequence[SourceFile]) -> None:
    """Reading alone: pread into one small buffer again and again."""
    buffer = memoryview(bytearray(CHUNK))
    for file in files:
        for start in range(0, file.size, CHUNK):
            file.read_into(buffer[: min(CHUNK, file.size - start)], start)


def read_direct(files: Sequence[SourceFile], *, whole: bool) -> float:
    """Read by O_DIRECT into huge pages written before. whole: one buffer is as large as a file.

    Otherwise it has 8 MiB and stays in the processor's caches: that is what the device gives.
    """
    seconds: list[float] = []
    for file in files:
        room = -(-file.size // DIRECT_CHUNK) * DIRECT_CHUNK if whole else DIRECT_CHUNK
        with map_private(room) as mapping, mapping.view(write=True) as view:
            for page in range(0, room, PAGE):
                view[page] = 1
            fd = os.open(file.path, os.O_RDONLY | os.O_DIRECT)
            with timed(seconds):
                for start in range(0, file.size, DIRECT_CHUNK):
                    into = view[start : start + DIRECT_CHUNK] if whole else view
                    os.preadv(fd, [into], start)
            os.close(fd)
            if whole:
                del into
    return sum(seconds)


def replica(files: Sequence[SourceFile], allocate: Allocate) -> None:
    machine = topology()
    group = (machine.all[0],)
    build(files, {group: Layout(group)}, allocate, machine).close()


def copied(files: Sequence[SourceFile]) -> float:
    """Measure a copy of the file in memory, without giving the memory back."""
    seconds: list[float] = []
    with timed(seconds):
        copies = copy_files(files)
    for copy in copies:
        copy.close()
    return seconds[0]


def mirrored(path: str) -> float:
    """Measure all that ``numaload mirror`` does, without giving the memory back."""
    seconds: list[float] = []
    with timed(seconds):
        made = numaload.mirror(path, shared=True)
    made.close()
    reclaim.release(store.entries())
    return seconds[0]


def filled(files: Sequence[SourceFile], folder: int) -> float:
    """Shared memory in huge pages and the file in it: without checksums, proof and publishing."""
    machine, seconds = topology(), list[float]()
    allocate, cpus = store_memory(folder), machine.cpus
    busy = threading.Semaphore(len(cpus))
    with timed(seconds):
        arenas = [allocate(file.size, Layout((machine.all[0],)), 0) for file in files]
        sources = [IntoMemory(file, direct=True) for file in files]
        plan = plan_for(files, [residency(file) for file in files])
        way = ReadMethod(DIRECT, 2 * plan.way.threads, CHUNK)

        def fill(chunk: Chunk, way: ReadMethod) -> None:
            with busy:
                arenas[chunk.which].prepare(chunk.offset, chunk.stop)
            with arenas[chunk.which].mapping.view(chunk.offset, chunk.nbytes, write=True) as view:
                sources[chunk.which].read(view, chunk.offset, way.name)

        reading = Reading(sum(file.size for file in files))
        runs = [[(0, file.size)] for file in files]
        reading.run(runs, plan.forced_to([way]), fill, cpus, "numaload-bench")
    for one in (*arenas, *sources):
        one.close()
    return seconds[0]


def warm_rows(files: Sequence[SourceFile], folder: int) -> dict[str, Row]:
    return {
        "pread, fresh huge pages": taking(lambda: read_fresh(files)),
        "pread, one small buffer": taking(lambda: read_reused(files)),
        "replica, private": taking(lambda: replica(files, private_memory())),
        "replica, shared": taking(lambda: replica(files, store_memory(folder))),
    }


def cold_rows(files: Sequence[SourceFile], folder: int) -> dict[str, Row]:
    return {
        "direct, prepared memory": lambda: read_direct(files, whole=True),
        "direct, one buffer": lambda: read_direct(files, whole=False),
        "private copy": lambda: copied(files),
        "shared memory, filled": lambda: filled(files, folder),
        "mirror in the store": lambda: mirrored(files[0].path),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default="1G")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cold", action="store_true")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/var/tmp"))
    memory = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/dev/shm"))
    os.environ["NUMALOAD_STORE"] = str(memory / "store")
    try:
        files = [SourceFile(p) for p in write_model(str(folder / "m.gguf"), options.size)]
        with userdir.opened() as opened:
            assert opened is not None
            rows = cold_rows(files, opened) if options.cold else warm_rows(files, opened)
            measure(rows, files, options.rounds, cold=options.cold)
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(memory)


def measure(rows: dict[str, Row], files: Sequence[SourceFile], rounds: int, *, cold: bool) -> None:
    nbytes, paths = sum(file.size for file in files), [file.path for file in files]
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            touch(nbytes + (1 << 30))
            if cold:
                numaload.evict(paths)
            else:
                numaload.prewarm(paths)
            times[name].append(run())
    base = next(iter(times))
    print(f"{nbytes / 2**30:.2f} GiB, {'cold' if cold else 'warm'}, {rounds} rounds; median")
    for name, row in times.items():
        low, mid, high = (nbytes / t / 1e9 for t in (max(row), median(row), min(row)))
        ratios = [b / t for b, t in zip(times[base], row, strict=True)]
        interval = median_interval(ratios)
        print(
            f"{name:26}{mid:6.2f} [{low:.2f}, {high:.2f}] GB/s, {median(ratios):.3f} of {base}"
            f" {interval or ''}"
        )


if __name__ == "__main__":
    main()
