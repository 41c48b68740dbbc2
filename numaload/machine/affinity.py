"""The CPUs this process may use, read before any other library can narrow them.

OpenMP libraries pin the main thread while torch is imported, if environment variables tell them to.
So what was allowed is read when numaload is first imported. Where a library was faster, its doing
is undone: libgomp pins the thread that loads it to its first place, and children inherit that. It
must not be mistaken for taskset, numactl or a batch system, which narrow a process on purpose.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
# Values of OMP_PLACES that mean all CPUs the library saw; any other value names some.
WHOLE = ("", "threads", "cores", "sockets", "ll_caches", "numa_domains")
KMP_BINDING = ("compact", "scatter", "balanced", "explicit", "logical", "physical")
MOST_CPUS = 8192  # NR_CPUS of the largest kernels


def before_binding(
    mask: frozenset[int], environment: Mapping[str, str] = os.environ
) -> tuple[frozenset[int], str]:
    """Return the CPUs that count instead of ``mask``, and why; no reason where ``mask`` counts."""
    if not binds_threads(environment):
        return mask, ""
    cpuset = allowed_by_cpuset()
    if mask >= cpuset:
        return mask, ""
    from numaload.linux.lists import format_list
    from numaload.linux.syscalls import openmp_places

    cpus = undo_binding(mask, cpuset, openmp_places(), environment)
    if cpus == mask:
        return mask, ""
    return cpus, (
        f"with {binding_variables(environment)}, CPU {format_list(mask)} is taken as where an"
        f" OpenMP library pinned the main thread: CPUs {format_list(cpus)} count as allowed; for"
        " fewer, use a cpuset or unset the variable"
    )


def undo_binding(
    mask: frozenset[int],
    cpuset: frozenset[int],
    places: Sequence[frozenset[int]] | None,
    environment: Mapping[str, str],
    *,
    sys_root: str = "/sys",
) -> frozenset[int]:
    """Return what was allowed before an OpenMP library pinned the main thread to ``mask``.

    places: of the OpenMP libraries in this process, empty if they bind nothing; None: no such.

    Unless they were listed by hand, all places together are what the library was allowed to use,
    so that a process that was narrowed on purpose stays so. Where that says nothing, a main thread
    on one of the places listed, or on one core, was pinned, and the whole cpuset counts.
    """
    whole, listed = frozenset().union(*places or ()) & cpuset, _places_are_listed(environment)
    if whole > mask and not listed:
        return whole
    on_first = listed and mask in (places or ())
    binds_nothing = places is not None and not places
    if on_first or (not binds_nothing and mask <= core_of(min(mask), sys_root)):
        return cpuset
    return mask


def allowed_by_cpuset() -> frozenset[int]:
    """Ask for all CPUs: the kernel cuts every wish down to the cpuset. Nothing where it refuses."""
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, range(MOST_CPUS))
    except OSError:
        return frozenset()
    try:
        return frozenset(os.sched_getaffinity(0))
    finally:
        os.sched_setaffinity(0, before)


def binds_threads(environment: Mapping[str, str]) -> bool:
    """Return whether these variables tell an OpenMP library to pin threads."""
    told = any(environment.get(name) for name in BINDING[:3])
    # OMP_PROC_BIND=false overrules the other two, whatever they say.
    refused = environment.get("OMP_PROC_BIND", "").strip().lower() in ("false", "0")
    intel = environment.get("KMP_AFFINITY", "").lower()
    return (told and not refused) or any(word in intel for word in KMP_BINDING)


def binding_variables(environment: Mapping[str, str]) -> str:
    """List the variables that tell OpenMP to pin threads, as they were written."""
    return ", ".join(f"{name}={environment[name]}" for name in BINDING if environment.get(name))


def _places_are_listed(environment: Mapping[str, str]) -> bool:
    by_omp = environment.get("OMP_PLACES", "").strip().lower() not in WHOLE
    return by_omp or bool(environment.get("GOMP_CPU_AFFINITY"))


def core_of(cpu: int, sys_root: str = "/sys") -> frozenset[int]:
    """Return the CPU and the other hardware threads of its core."""
    from numaload.linux.sysfs import SysFiles

    path = f"{sys_root}/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return frozenset({cpu, *(SysFiles().ids(path) or ())})


# What this process may use, and a sentence where that is more than its affinity says.
ALLOWED, WIDENED = before_binding(frozenset(os.sched_getaffinity(0)))


def allowed() -> frozenset[int]:
    """Return the CPUs this process may use; say it where that is more than its affinity."""
    if WIDENED:
        from numaload.errors import warn_once

        warn_once("affinity", WIDENED)
    return ALLOWED


def pin(cpus: frozenset[int]) -> None:
    """Run the calling thread on these CPUs only. Raises: NumaError where none of them is left."""
    try:
        os.sched_setaffinity(0, cpus)
    except OSError as error:
        from numaload.errors import NumaError
        from numaload.linux.lists import format_list

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
