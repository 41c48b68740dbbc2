"""Find threads of a process that get in each other's way, and say what helps."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from numaload.doctor.pools import ThreadPool, overloaded, pools, watch
from numaload.errors import printable
from numaload.linux.cgroups import cpu_quota
from numaload.linux.lists import format_list
from numaload.machine.affinity import BINDING, binding_variables, binds_threads, core_of
from numaload.machine.threads import Thread, environment, nodes_of
from numaload.machine.topology import Topology, topology

# A thread counts that worked so many seconds, and such a share of the busiest thread's.
WORKED_S, SHARE = 1.0, 0.1
# Variables that are shown of a process; what else is in its environment is nobody's business.
OPENMP = (*BINDING, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY")


class ThreadFinding(NamedTuple):
    """``kind``: main-pinned, shared, overloaded, quota, crowded, spread or far."""

    kind: str
    text: str
    fix: str
    tids: tuple[int, ...]


@dataclass(frozen=True)
class ThreadReport:
    """The threads of a process during a tenth of a second, and what is wrong with them."""

    pid: int
    threads: tuple[Thread, ...]
    runnable: frozenset[int]  # ids of those that had something to do
    machine: Topology  # its nodes; usable CPUs are those that some thread may run on
    variables: dict[str, str] | None  # that it was started with; None where that is not shown
    quota: float | None  # CPUs' time that its cgroups allow

    @cached_property
    def pools(self) -> list[ThreadPool]:
        return pools(self.threads, self.machine)

    @cached_property
    def cpus(self) -> frozenset[int]:
        """Return the CPUs that any of its threads may run on."""
        return frozenset().union(*(thread.cpus for thread in self.threads))

    @cached_property
    def bound_by(self) -> str:
        """List the variables that tell OpenMP to pin threads; empty where nothing does."""
        told = self.variables or {}
        return binding_variables(told) if binds_threads(told) else ""

    @cached_property
    def main(self) -> Thread | None:
        """Return the thread that the process began with; None where it ended before the others."""
        return next((thread for thread in self.threads if thread.main), None)

    @cached_property
    def pool_of(self) -> dict[int, ThreadPool]:
        return {thread.tid: pool for pool in self.pools for thread in pool.threads}

    @cached_property
    def overloads(self) -> list[tuple[frozenset[int], list[Thread]]]:
        return overloaded(self.busy)

    @cached_property
    def busy(self) -> list[Thread]:
        return [thread for thread in self.threads if thread.tid in self.runnable]

    @cached_property
    def findings(self) -> list[ThreadFinding]:
        found = [finding for check in CHECKS for finding in check(self)]
        return [f._replace(text=printable(f.text), fix=printable(f.fix)) for f in found]

    def told(self, found: Iterable[Thread]) -> str:
        """Count threads by pool: ``2 of numaload, 1 of python (main)``."""
        counts = Counter(str(self.pool_of[thread.tid]) for thread in found)
        return ", ".join(f"{count} of {name}" for name, count in counts.items())

    def to_dict(self) -> dict[str, Any]:
        rows = [
            thread.to_dict()
            | {"nodes": nodes_of(thread.cpus, self.machine)}
            | {"runnable": thread.tid in self.runnable}
            for thread in self.threads
        ]
        told = self.variables
        return {
            "pid": self.pid,
            "threads": rows,
            "pools": [pool.to_dict() for pool in self.pools],
            "findings": [finding._asdict() for finding in self.findings],
            "openmp": None if told is None else {k: v for k, v in told.items() if k in OPENMP},
            "cpu_quota": self.quota,
        }


def hardest(found: Sequence[Thread]) -> list[Thread]:
    """Return the threads that worked over their lives, and not far less than the busiest one."""
    most = max((thread.cpu_s for thread in found), default=0.0)
    return [thread for thread in found if thread.cpu_s >= max(WORKED_S, SHARE * most)]


def inspect_threads(pid: int | None = None) -> ThreadReport:
    """Watch a process, by default this one, for a tenth of a second.

    Raises: UsageError where ``pid`` can be no process's, NumaError where it cannot be read.
    """
    found, runnable = watch(pid)
    main = next((thread.tid for thread in found if thread.main), pid or os.getpid())
    return ThreadReport(
        pid=main,
        threads=tuple(found),
        runnable=runnable,
        machine=topology(allowed=frozenset().union(*(t.cpus for t in found))),
        variables=environment(main),
        quota=cpu_quota(process=str(main)),
    )


def _main_pinned(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find a main thread on one core: OpenMP libraries pin the thread that loads them."""
    main, wide = seen.main, seen.cpus
    if main is None or not main.cpus:
        return
    if seen.bound_by and wide == main.cpus:  # there is nobody to compare it with
        wide = frozenset().union(*(node.cpus for node in seen.machine.nodes.values()))
    if main.cpus < wide and main.cpus <= core_of(min(main.cpus)):
        why = f", as OpenMP pins it with {seen.bound_by}" if seen.bound_by else ""
        unset = "unset that, or " if seen.bound_by else ""
        yield ThreadFinding(
            "main-pinned",
            f"the main thread may run on {_cpus(main.cpus)} only{why}, of {_cpus(wide)}: the"
            " threads and processes that it starts inherit that",
            f"import numaload before torch; {unset}give the CPUs back before it starts any:"
            f" taskset -pc {format_list(wide)} {main.tid}",
            (main.tid,),
        )


def _too_many_runnable(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find CPUs for which more threads have work just now than there are CPUs."""
    for cpus, inside in seen.overloads:
        several = len({id(seen.pool_of[thread.tid]) for thread in inside}) > 1
        waited = sum(thread.waited_s for thread in inside)
        yield ThreadFinding(
            "shared" if several else "overloaded",
            f"{len(inside)} threads have work for {_cpus(cpus)} ({seen.told(inside)}): they wait"
            f" for each other, {waited:.1f} s so far",
            _remedy(seen, cpus, inside, several=several),
            _ids(inside),
        )


def _beyond_quota(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find more threads with work than the cgroup's quota has CPUs."""
    quota = seen.quota
    if quota is not None and len(seen.busy) > max(1, quota):
        yield ThreadFinding(
            "quota",
            f"{len(seen.busy)} threads have work ({seen.told(seen.busy)}), but the cgroup allows"
            f" {quota:.4g} CPUs' time: once that is used up, all of them must wait",
            f"{_fewer(max(1, int(quota)))}, or raise cpu.max as root",
            _ids(seen.busy),
        )


def _crowded(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find pools with more threads than CPUs, if all of them work at the same time."""
    told = {thread.tid for _, inside in seen.overloads for thread in inside}
    for pool in seen.pools:
        worked = hardest(pool.threads)
        if told.issuperset(_ids(worked)):
            continue
        for cpus, inside in overloaded(worked):
            yield ThreadFinding(
                "crowded",
                f"{len(inside)} threads of {pool} work on {_cpus(cpus)}",
                _remedy(seen, cpus, inside, several=False),
                _ids(inside),
            )


def _spread(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find pools whose threads the kernel may move from node to node."""
    wide: dict[tuple[int, ...], list[ThreadPool]] = {}
    for pool in seen.pools:
        if len(pool.threads) > 1 and len(pool.nodes) > 1:
            wide.setdefault(pool.nodes, []).append(pool)
    for nodes, its in wide.items():
        inside = [thread for pool in its for thread in pool.threads]
        yield ThreadFinding(
            "spread",
            f"{seen.told(inside)} may run on nodes {format_list(nodes)}: the kernel may move"
            " them away from the memory that they first touched",
            "run a process per node (taskset -c, numactl --cpunodebind), or start the threads in"
            " mirror.pinned(node)",
            _ids(inside),
        )


def _far(seen: ThreadReport) -> Iterator[ThreadFinding]:
    """Find cpusets that allow CPUs of one node and memory of another."""
    has_memory = {node.id for node in seen.machine.nodes.values() if node.has_memory}
    for pool in seen.pools:
        nodes, mems = has_memory.intersection(pool.nodes), pool.threads[0].mems
        if nodes and mems and not nodes & mems:
            yield ThreadFinding(
                "far",
                f"{seen.told(pool.threads)} may run on node {format_list(nodes)} only, and have"
                f" memory of node {format_list(mems)} only (cpuset)",
                f"as root put node {format_list(nodes)} into cpuset.mems, or CPUs of node"
                f" {format_list(mems)} into cpuset.cpus",
                _ids(pool.threads),
            )


CHECKS = (_main_pinned, _too_many_runnable, _beyond_quota, _crowded, _spread, _far)


def _cpus(cpus: frozenset[int]) -> str:
    return f"CPU{'s' * (len(cpus) > 1)} {format_list(cpus)}"


def _remedy(
    seen: ThreadReport, cpus: frozenset[int], inside: Sequence[Thread], *, several: bool
) -> str:
    """Say what helps threads that are too many for these CPUs. several: of several pools."""
    if cpus < seen.cpus:
        unset = f"unset {seen.bound_by}, or " if seen.bound_by else ""
        one = f"taskset -pc {format_list(seen.cpus)} {inside[-1].tid}"
        return f"{unset}let some of them run on other CPUs too: {one}"
    fewer = _fewer(len(cpus))
    if several:
        return f"let them take turns, or give each its own CPUs; {fewer}"
    return f"{fewer}, or allow them more CPUs: taskset -apc LIST {seen.pid}"


def _fewer(count: int) -> str:
    return f"run fewer (torch.set_num_threads({count}) or OMP_NUM_THREADS={count})"


def _ids(found: Sequence[Thread]) -> tuple[int, ...]:
    return tuple(thread.tid for thread in found)
