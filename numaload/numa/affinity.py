"""The CPUs this process may use, read before any other library can narrow them.

libgomp pins the main thread while torch is imported when OMP_PROC_BIND or GOMP_CPU_AFFINITY is
set, so what was allowed is read when numaload is first imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

ALLOWED = frozenset(os.sched_getaffinity(0))


def pin(cpus: frozenset[int]) -> None:
    """Run the calling thread on these CPUs only. Raises: NumaError where none of them is left."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        from numaload.errors import NumaError
        from numaload.numa.lists import format_list

        raise NumaError(
            f"sched_setaffinity: CPUs {format_list(cpus) or 'none'}: {error.strerror}; they may"
            " have gone offline or out of this process's cpuset",
            call="sched_setaffinity",
            errno=error.errno or 0,
        ) from error


@contextmanager
def pinned_to(cpus: frozenset[int]) -> Iterator[None]:
    """Run the calling thread on these CPUs only; its affinity comes back however this ends."""
    before = os.sched_getaffinity(0)
    pin(cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
