"""Reads a file through a mapping, alone in a process: where a page cannot be read, that is killed.

    python read_child.py JSON    {"fd", "nbytes", "flags", "advice", "copy"}

It says that it is ready, waits for a line, reads, and prints the CPU seconds that took. Only the
standard library: starting is not what is measured, but it is waited for.
"""

from __future__ import annotations

import json
import mmap
import sys
import time
from contextlib import suppress


def main() -> None:
    wanted = json.loads(sys.argv[1])
    _say("ready")
    sys.stdin.readline()
    begin = time.process_time()
    flags = mmap.MAP_SHARED | wanted["flags"]
    mapped = mmap.mmap(wanted["fd"], wanted["nbytes"], flags=flags, prot=mmap.PROT_READ)
    if wanted["advice"] is not None:
        mapped.madvise(wanted["advice"])
    if wanted["copy"]:
        memory = mmap.mmap(-1, wanted["nbytes"], flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        memory[:] = memoryview(mapped)
    elif not wanted["flags"] & mmap.MAP_POPULATE:
        memoryview(mapped)[:: mmap.PAGESIZE].tobytes()
    _say(str(time.process_time() - begin))
    sys.stdin.readline()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
