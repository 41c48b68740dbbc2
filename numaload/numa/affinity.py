"""The CPUs this process may use, read before any other library can narrow them.

OpenMP libraries pin the main thread, as while torch is imported, when they are told to by variables
of the environment; so what was allowed is read when numaload is first imported. Where a library was
faster, ``openmp.py`` finds what was allowed before it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def _allowed() -> tuple[frozenset[int], str]:
    """The CPUs, and what there is to say of them or an empty string."""
    mask = frozenset(os.sched_getaffinity(0))
    if not any(os.environ.get(name) for name in BINDING):
        return mask, ""
    from numaload.numa.openmp import before_binding

    return before_binding(mask)


ALLOWED, WIDENED = _allowed()


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
        pin(frozenset(before))
