"""What this process could use before an OpenMP library pinned its main thread.

libgomp pins the thread that loads it, which is the main thread at ``import torch``, to its first
place when OMP_PROC_BIND, OMP_PLACES or GOMP_CPU_AFFINITY is set; children inherit that. It must not
be mistaken for taskset, numactl or a batch system, which narrow a process on purpose.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence

from numaload.numa.lists import format_list
from numaload.numa.sysfs import Reader

# Places that are made of all CPUs the library saw; any other value names some.
WHOLE = re.compile(r"(threads|cores|sockets|ll_caches|numa_domains)?", re.IGNORECASE)
NO_BINDING = re.compile(r"\s*(false|0)\s*", re.IGNORECASE)
KMP_BINDING = re.compile(r"compact|scatter|balanced|explicit|logical|physical", re.IGNORECASE)
MOST_CPUS = 8192  # NR_CPUS of the largest kernels


def before_binding(
    mask: frozenset[int],
    environment: Mapping[str, str] = os.environ,
    *,
    sys_root: str = "/sys",
) -> tuple[frozenset[int], str]:
    """The CPUs that count instead of ``mask``, and a sentence on it; empty where it counts."""
    if not binds(environment):
        return mask, ""
    cpuset = allowed_by_cpuset()
    if mask >= cpuset:
        return mask, ""
    from numaload.numa.syscalls import openmp_places

    cpus = choose(mask, cpuset, openmp_places(), environment, sys_root=sys_root)
    if cpus == mask:
        return mask, ""
    return cpus, (
        f"with {variables(environment)}, CPU {format_list(mask)} is taken as where an OpenMP"
        f" library pinned the main thread: CPUs {format_list(cpus)} count as allowed; for fewer,"
        " use a cpuset or unset the variable"
    )


def choose(
    mask: frozenset[int],
    cpuset: frozenset[int],
    places: Sequence[frozenset[int]] | None,
    environment: Mapping[str, str],
    *,
    sys_root: str = "/sys",
) -> frozenset[int]:
    """places: of the OpenMP libraries in this process, empty if they bind nothing; None: no such.

    Unless they were listed by hand, all places together are what the library was allowed to use,
    so that a process that was narrowed on purpose stays so. Where that says nothing, a main thread
    on one of the places listed, or on one core, was pinned, and the whole cpuset counts.
    """
    whole, listed = frozenset().union(*places or ()) & cpuset, _listed(environment)
    if whole > mask and not listed:
        return whole
    on_first = listed and mask in (places or ())
    binds_nothing = places is not None and not places
    if on_first or (not binds_nothing and mask <= core(min(mask), sys_root)):
        return cpuset
    return mask


def allowed_by_cpuset() -> frozenset[int]:
    """What the kernel would let this process use: it cuts every wish down to the cpuset.

    Asked in a thread of its own, that ends with it. Nothing where that is refused.
    """
    found: list[frozenset[int]] = []

    def wish() -> None:
        try:
            os.sched_setaffinity(0, range(MOST_CPUS))
            found.append(frozenset(os.sched_getaffinity(0)))
        except OSError:
            pass

    thread = threading.Thread(target=wish, name="numaload-cpuset")
    try:
        thread.start()
    except RuntimeError:  # no more threads allowed
        return frozenset()
    thread.join()
    return found[0] if found else frozenset()


def binds(environment: Mapping[str, str]) -> bool:
    """Whether these variables tell an OpenMP library to pin threads."""
    told = any(environment.get(v) for v in ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"))
    # false says no to the other two as well, whatever they say.
    by_omp = told and not NO_BINDING.fullmatch(environment.get("OMP_PROC_BIND", ""))
    return by_omp or bool(KMP_BINDING.search(environment.get("KMP_AFFINITY", "")))


def _listed(environment: Mapping[str, str]) -> bool:
    by_omp = not WHOLE.fullmatch(environment.get("OMP_PLACES", "").strip())
    return by_omp or bool(environment.get("GOMP_CPU_AFFINITY"))


def core(cpu: int, sys_root: str = "/sys") -> frozenset[int]:
    """The CPU and the other threads of its core."""
    path = f"{sys_root}/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    return frozenset({cpu, *(Reader().ids(path) or ())})


def variables(environment: Mapping[str, str]) -> str:
    """Those that do, as they were written."""
    from numaload.numa.affinity import BINDING

    return ", ".join(f"{v}={environment[v]}" for v in BINDING if environment.get(v))
