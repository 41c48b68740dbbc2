"""Group the threads of a process into thread pools, and see which of them are at work."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from numaload.machine.affinity import core_of
from numaload.machine.threads import Thread, nodes_of, threads
from numaload.machine.topology import Topology

SAMPLES, EVERY_S = 5, 0.02
NUMBER = re.compile(r"[\W_]*\d+\W*$")  # at the end of a name


@dataclass(frozen=True)
class ThreadPool:
    """Threads of like names. ``each``: how many of ``cpus`` one of them may run on."""

    name: str  # what the names have in common, with a * if they differ
    threads: tuple[Thread, ...]
    cpus: frozenset[int]  # that they may run on, together
    each: int  # fewer than all CPUs where each thread has its own
    nodes: tuple[int, ...]  # that these CPUs belong to
    main: bool  # the main thread alone

    def __str__(self) -> str:
        return f"{self.name} (main)" if self.main else self.name

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "main": self.main,
            "tids": [thread.tid for thread in self.threads],
            "cpus": sorted(self.cpus),
            "each": self.each,
            "nodes": list(self.nodes),
            "last_on": sorted({thread.cpu for thread in self.threads} - {-1}),
            "cpu_s": sum(thread.cpu_s for thread in self.threads),
            "waited_s": sum(thread.waited_s for thread in self.threads),
        }


def watch(pid: int | None = None) -> tuple[list[Thread], frozenset[int]]:
    """Watch a process for a tenth of a second: its threads, and the ids of those that had work.

    A thread had work if it ran, or waited for a CPU, most of the time. Raises: as ``threads``.
    """
    had_work: Counter[int] = Counter()
    found = threads(pid)
    for _ in range(SAMPLES):
        had_work.update(thread.tid for thread in found if thread.state == "R")
        time.sleep(EVERY_S)
        found = threads(pid)
    return found, frozenset(tid for tid, times in had_work.items() if 2 * times > SAMPLES)


def pools(
    found: Iterable[Thread], machine: Topology, *, sys_root: str = "/sys"
) -> list[ThreadPool]:
    """Fold threads of like names and equal CPUs into pools: the main thread's first, then by id.

    Threads of like names that are pinned, each to a core of its own on the same node, are a pool.
    """
    rest = sorted(found, key=lambda t: (not t.main, _stem(t.name), sorted(t.cpus), t.tid))
    alike = [list(g) for _, g in groupby(rest, lambda t: (not t.main, _stem(t.name), t.cpus))]
    merged: dict[tuple[Any, ...], list[list[Thread]]] = {}
    for group in alike:
        merged.setdefault(_pool_key(group[0], machine, sys_root), []).append(group)
    made = [_pool(group, machine) for groups in merged.values() for group in _joined(groups)]
    return sorted(made, key=lambda pool: (not pool.main, pool.threads[0].tid))


def _pool_key(thread: Thread, machine: Topology, sys_root: str) -> tuple[Any, ...]:
    """Return a key that is the same for all threads of one pool.

    Threads that are each pinned to a core of their own count as one pool.
    """
    cpus, stem = thread.cpus, _stem(thread.name)
    if thread.main or not cpus or not cpus <= core_of(min(cpus), sys_root):
        return thread.main, stem, cpus
    return thread.main, stem, len(cpus), *nodes_of(cpus, machine)


def _joined(groups: Sequence[list[Thread]]) -> Iterable[list[Thread]]:
    """Join the groups into one pool, unless two of them share a CPU."""
    every = [cpu for group in groups for cpu in group[0].cpus]
    if len(every) != len(set(every)):
        return groups
    return [sorted(thread for group in groups for thread in group)]


def _pool(group: Sequence[Thread], machine: Topology) -> ThreadPool:
    first, cpus = group[0], frozenset().union(*(thread.cpus for thread in group))
    one_name = len({thread.name for thread in group}) == 1
    return ThreadPool(
        name=first.name if one_name else f"{_stem(first.name)}*",
        threads=tuple(group),
        cpus=cpus,
        each=len(first.cpus),
        nodes=tuple(nodes_of(cpus, machine)),
        main=first.main,
    )


def _stem(name: str) -> str:
    return NUMBER.sub("", name) or name


def overloaded(found: Collection[Thread]) -> list[tuple[frozenset[int], list[Thread]]]:
    """Find each set of CPUs that has more threads than CPUs, and the threads bound to it.

    The smallest sets come first; threads too many for a small set do not count in larger ones.
    """
    left, result = sorted(found), []
    for cpus in sorted(_candidates({t.cpus for t in left if t.cpus}), key=len):
        inside = [thread for thread in left if thread.cpus and thread.cpus <= cpus]
        if len(inside) > len(cpus):
            result.append((cpus, inside))
            too_many = set(inside[len(cpus) :])
            left = [thread for thread in left if thread not in too_many]
    return result


def _candidates(sets: set[frozenset[int]]) -> set[frozenset[int]]:
    """Add to these sets the unions of those that overlap."""
    whole: list[frozenset[int]] = []
    for cpus in sets:
        touching = [one for one in whole if one & cpus]
        whole = [one for one in whole if not one & cpus] + [cpus.union(*touching)]
    return sets | set(whole)
