"""kt-kernel's worker threads: which node each was made for, where it may run and allocate.

kt-kernel (``cpu_backend/worker_pool.cpp``, 0.7.0 to 0.7.2) names them numa_NODE_t_N and
numa_NODE_m_N, binds each to one core and its memory to its node. It counts cores from a number
that it reads beyond the end of a vector wherever node ids do not begin at 0: "Core 0 inside NUMA
node 1 not found", and the thread may run anywhere. The ``m`` thread's memory is bound to the node
whose id is the subpool's place in the list, not to the node it is for.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from numaload.errors import printable
from numaload.linux.lists import format_list, parse_list
from numaload.machine.threads import threads
from numaload.machine.topology import Topology

TASKS = "/proc/self/task"
NAMED = re.compile(r"numa_(\d+)_([mt])_-?\d+")
BOUND = re.compile(r"\S+ bind\S*?:(\S+)")


@dataclass
class Worker:
    """A thread of kt-kernel. ``cpus``: where it may run, as found and before any repair."""

    tid: int
    name: str
    node: int | None  # that it was made for, by its name; None where nothing tells
    cpus: list[int]
    memory: list[int] = field(default_factory=list)  # nodes that it allocates on; empty: any
    repaired: bool = False
    problem: str = ""

    @property
    def right(self) -> bool:
        """Return whether it runs only beside its node now."""
        return self.repaired or not self.problem

    @property
    def far_memory(self) -> bool:
        """Return whether its allocations are bound to another node, which nobody can change."""
        return bool(self.memory) and self.node not in self.memory

    def __str__(self) -> str:
        state = "moved" if self.repaired else "WRONG" if self.problem else "right"
        memory = f", memory of node {format_list(self.memory)}" if self.memory else ""
        if self.far_memory:
            memory += ", which is not its own (kt-kernel's doing)"
        why = f": {self.problem}" if self.problem else ""
        about = f"CPUs {format_list(self.cpus)}{memory}: {state}{why}"
        return printable(f"thread {self.tid} {self.name}: {about}")

    def to_dict(self) -> dict[str, Any]:
        return vars(self) | {"right": self.right, "far_memory": self.far_memory}


def thread_ids() -> frozenset[int]:
    """Read the ids of this process's threads."""
    return frozenset(map(int, os.listdir(TASKS)))


def workers(before: Collection[int] = (), node: int | None = None) -> list[Worker]:
    """List kt-kernel's threads in this process, by thread id.

    before: threads that are not kt-kernel's. A later thread without a worker's name is a worker of
    ``node`` if its memory is bound to one node: Linux refuses names with too long a number.
    """
    every = threads()
    own = next(thread.name for thread in every if thread.main)
    found = []
    for thread in every:
        match = NAMED.fullmatch(thread.name)
        unnamed = thread.name == own and thread.tid not in before
        memory = _memory(thread.tid) if match or unnamed else []
        if match or len(memory) == 1:
            for_node = int(match[1]) if match else node
            found.append(Worker(thread.tid, thread.name, for_node, sorted(thread.cpus), memory))
    return found


def _memory(tid: int) -> list[int]:
    """Read the nodes of a thread's memory policy from ranges that have no policy of their own."""
    try:
        with open(f"{TASKS}/{tid}/numa_maps", encoding="utf-8", errors="replace") as file:
            match = BOUND.match(file.readline())
    except OSError:  # a kernel without NUMA
        return []
    return parse_list(match[1]) if match else []


def check(worker: Worker, machine: Topology, *, repair: bool) -> None:
    """Note whether the worker may run only beside its node; with ``repair``, put it there."""
    if worker.node is None:
        worker.problem = "has no name that says which node it is for; it was left where it is"
        return
    node = machine.nodes.get(worker.node)
    if node is None or not node.usable_cpus:
        why = "is not on this machine" if node is None else node.why_not
        worker.problem = f"node {worker.node}, which it is for, {why}"
    elif not set(worker.cpus) <= node.cpus:
        worker.problem = (
            f"may run on CPUs {format_list(worker.cpus)}, node {worker.node} has"
            f" {format_list(node.cpus)}"
        )
        if repair:
            _move(worker, node.usable_cpus)


def _move(worker: Worker, cpus: frozenset[int]) -> None:
    try:
        os.sched_setaffinity(worker.tid, cpus)
        worker.repaired = set(os.sched_getaffinity(worker.tid)) <= cpus
    except OSError as error:
        worker.problem += f"; it cannot be moved to {format_list(cpus)}: {error.strerror}"
