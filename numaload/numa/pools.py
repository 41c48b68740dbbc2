"""The threads of a process as people think of them: in pools, some of which have work just now."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from numaload.numa.affinity import core_of
from numaload.numa.threads import Thread, nodes_of, threads
from numaload.numa.topology import Topology

SAMPLES, EVERY_S = 5, 0.02
NUMBER = re.compile(r"[\W_]*\d+\W*$")  # at the end of a name


@dataclass(frozen=True)
class Pool:
    """``each``: how many of ``cpus`` one thread may run on; fewer than all if each has its own."""

    name: str  # what the names have in common, with a * if they differ
    threads: tuple[Thread, ...]
    cpus: frozenset[int]  # that they may run on, together
    each: int
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
    """The threads, and the ids of those that had something to do in most of a tenth of a second.

    They ran, or waited for a CPU. Raises: as ``threads``.
    """
    had_work: Counter[int] = Counter()
    found = threads(pid)
    for _ in range(SAMPLES):
        had_work.update(thread.tid for thread in found if thread.state == "R")
        time.sleep(EVERY_S)
        found = threads(pid)
    return found, frozenset(tid for tid, times in had_work.items() if 2 * times > SAMPLES)


def pools(found: Iterable[Thread], machine: Topology, *, sys_root: str = "/sys") -> list[Pool]:
    """The main thread, then those of like names and equal CPUs together, by their first ids.

    Threads of like names that are pinned, each to a core of its own on the same node, are a pool.
    """
    rest = sorted(found, key=lambda t: (not t.main, _stem(t.name), sorted(t.cpus), t.tid))
    alike = [list(g) for _, g in groupby(rest, lambda t: (not t.main, _stem(t.name), t.cpus))]
    merged: dict[tuple[Any, ...], list[list[Thread]]] = {}
    for group in alike:
        merged.setdefault(_bound(group[0], machine, sys_root), []).append(group)
    made = [_pool(g, machine) for groups in merged.values() for g in _joined(groups)]
    return sorted(made, key=lambda pool: (not pool.main, pool.threads[0].tid))


def _bound(thread: Thread, machine: Topology, sys_root: str) -> tuple[Any, ...]:
    """What threads have in common that are pinned to cores; other groups have a key each."""
    cpus, stem = thread.cpus, _stem(thread.name)
    if thread.main or not cpus or not cpus <= core_of(min(cpus), sys_root):
        return thread.main, stem, cpus
    return thread.main, stem, len(cpus), *thread.nodes(machine)


def _joined(groups: Sequence[list[Thread]]) -> Iterable[list[Thread]]:
    """As one if no CPU is in two of them: else a core and a part of it would look like two."""
    every = [cpu for group in groups for cpu in group[0].cpus]
    if len(every) != len(set(every)):
        return groups
    return [sorted(thread for group in groups for thread in group)]


def _pool(group: Sequence[Thread], machine: Topology) -> Pool:
    names = {thread.name for thread in group}
    cpus = frozenset().union(*(thread.cpus for thread in group))
    return Pool(
        name=group[0].name if len(names) == 1 else f"{_stem(group[0].name)}*",
        threads=tuple(group),
        cpus=cpus,
        each=len(group[0].cpus),
        nodes=tuple(nodes_of(cpus, machine)),
        main=group[0].main,
    )


def _stem(name: str) -> str:
    return NUMBER.sub("", name) or name


def overloaded(found: Collection[Thread]) -> list[tuple[frozenset[int], list[Thread]]]:
    """(CPUs, threads that may run nowhere else) for each set of CPUs with more threads than CPUs.

    The smallest sets first; who is too many there does not count in larger ones.
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
    """These, and what they are together where they overlap."""
    whole: list[frozenset[int]] = []
    for cpus in sets:
        touching = [one for one in whole if one & cpus]
        whole = [one for one in whole if not one & cpus] + [cpus.union(*touching)]
    return sets | set(whole)
