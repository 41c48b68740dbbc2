"""How fast replicas are filled, beside plain reads of the same warm file in the same run.

Rounds alternate over all rows; before each timing as much memory as it needs is touched and freed,
since memory that a hypervisor has not backed yet is several times slower to touch.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from numaload.demo import parse_size, write_model
from numaload.numa.mapping import map_private
from numaload.numa.topology import topology
from numaload.pagecache.prewarm import prewarm
from numaload.replicas.arena import private_memory, store_memory
from numaload.replicas.build import CHUNK, Allocate, build
from numaload.storage import userdir
from numaload.storage.files import SourceFile


def touch(nbytes: int) -> None:
    """Have the host back this much memory, in huge pages, and free it again."""
    with map_private(nbytes) as mapping:
        view = mapping.view(write=True)
        for offset in range(0, nbytes, 4096):
            view[offset] = 1


def read_fresh(files: Sequence[SourceFile]) -> None:
    """The least a replica costs: one thread, pread into fresh private huge pages."""
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


def replica(files: Sequence[SourceFile], allocate: Allocate) -> None:
    machine = topology()
    build(files, [(machine.all[0],)], allocate, machine).close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=parse_size, default="1G")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="numaload-bench-", dir="/var/tmp"))
    try:
        files = [SourceFile(p) for p in write_model(str(folder / "m.gguf"), options.size)]
        prewarm([file.path for file in files])
        with userdir.opened() as store:
            assert store is not None
            rows: dict[str, Callable[[], None]] = {
                "pread, one small buffer": lambda: read_reused(files),
                "pread, fresh huge pages": lambda: read_fresh(files),
                "replica, private": lambda: replica(files, private_memory()),
                "replica, shared": lambda: replica(files, store_memory(store)),
            }
            measure(rows, sum(file.size for file in files), options.rounds)
    finally:
        shutil.rmtree(folder)


def measure(rows: dict[str, Callable[[], None]], nbytes: int, rounds: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(rounds):
        for name, run in rows.items():
            touch(nbytes + (64 << 20))
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    base = median(times["pread, fresh huge pages"])
    print(f"{nbytes / 2**30:.2f} GiB, warm, {rounds} rounds; median [least, most]")
    for name, row in times.items():
        low, mid, high = (nbytes / t / 1e9 for t in (max(row), median(row), min(row)))
        print(
            f"{name:26}{mid:6.2f} [{low:.2f}, {high:.2f}] GB/s  {base / median(row):.2f} of fresh"
        )


if __name__ == "__main__":
    main()
