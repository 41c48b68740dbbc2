"""``numaload bench bandwidth``: how fast each node's CPUs reach each node's memory.

The CPUs are threads pinned to one each. The memory is bound to its node, and the kernel counts its
pages before it is used and once more at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from numaload.bench.machine import (
    EMULATED,
    LOAD_AFTER,
    Progress,
    Series,
    check_rounds,
    describe,
    load,
)
from numaload.errors import UsageError
from numaload.kernels import registry
from numaload.kernels.jit.loads import READ_STEP
from numaload.kernels.jit.objects import Loop
from numaload.kernels.loops import STEP
from numaload.linux.mapping import MappedMemory, bind, map_private
from numaload.linux.placement import Asked, Placement, locate
from numaload.linux.sysfs import SysFiles
from numaload.machine import memory
from numaload.machine.probe import why_not_bound
from numaload.machine.topology import Topology, topology
from numaload.machine.workers import Workers, finish

READ, WRITE, PAST, LATENCY = "read", "write", "write past caches", "latency"
MOVING = (READ, WRITE, PAST)  # by all CPUs
FIGURES = dict.fromkeys(MOVING, "GB/s") | {LATENCY: "ns"}
# See machine.Series. Two CPUs of a virtual machine reached 43 and, minutes later, 75 GB/s together,
# and each of them 44 alone: hosts move them. The latency of one stayed the same.
MARGIN, MARGIN_VIRTUAL = 0.1, 1.0
LINE = 64  # bytes of a cache line
LEAST, DEFAULT = 1 << 20, 256 << 20  # bytes
BEYOND = 4  # times the caches: with so much, hardly anything is still there when it is read again
# Seconds of a timing, and more for each thread, since they do not begin at the same moment. The
# best of TRIES undisturbed ones counts, as far as there are so many within TRYING_S.
LEAST_S, EACH_S, TRIES, TRYING_S = 0.002, 0.0005, 5, 0.15
UNDISTURBED = 0.9  # of the time, the threads ran: other processes did not take their CPUs
PARTS = 8  # of the memory, which follow each other
CHASE_S = 0.03
STEPS, MOST_PASSES = 1 << 14, 10_000  # STEPS: of addresses, of the first look at how long it takes
NODES = "/sys/devices/system/node"
PUBLISHED = ("read_bandwidth", "write_bandwidth", "read_latency", "write_latency")

Array = NDArray[np.uint64]


@dataclass
class Pair:
    """One node's CPUs and one node's memory. cpus, memory: the nodes; threads: one for each CPU.

    pages: {node: pages}, as the kernel counts them, of ``memory``; huge: bytes of it in huge pages.
    rounds: {figure: in order}: GB/s, of latency ns. disturbed: {figure: numbers of the rounds in
    which other processes took the CPUs}.
    """

    cpus: int
    memory: int
    threads: int
    distance: int | None
    pages: dict[int, int] = field(default_factory=dict)
    huge: int = 0
    rounds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIGURES})
    disturbed: dict[str, list[int]] = field(default_factory=lambda: {name: [] for name in FIGURES})

    @property
    def name(self) -> str:
        return f"node {self.cpus} to node {self.memory}"

    def median(self, figure: str) -> float:
        """Return that of the rounds that count; of all where there is none, which is noted."""
        return median(self.undisturbed(figure) or self.rounds[figure])

    def undisturbed(self, figure: str) -> list[float]:
        left_out = set(self.disturbed[figure])
        return [value for i, value in enumerate(self.rounds[figure]) if i not in left_out]


@dataclass
class BandwidthReport:
    """size: bytes of a node's memory that are read and written; as much is chased through.

    published: {memory node: {what: figure}} of what the firmware says (HMAT): MB/s and ns.
    """

    machine: dict[str, str]
    size: int
    rounds: int
    pairs: list[Pair]
    published: dict[int, dict[str, int]]
    notes: list[str] = field(default_factory=list)

    @property
    def series(self) -> list[Series]:
        """Return the rounds that can be compared: those that nobody disturbed."""
        apart = MARGIN if self.machine["hypervisor"] == "none" else MARGIN_VIRTUAL
        return [
            Series(f"{pair.name}, {name}", unit, rounds, MARGIN if name == LATENCY else apart)
            for pair in self.pairs
            for name, unit in FIGURES.items()
            if (rounds := pair.undisturbed(name))
        ]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"series": [asdict(one) for one in self.series]}


def measure(
    nodes: str | None = None,
    size: int | None = None,
    rounds: int = 15,
    progress: Progress | None = None,
) -> BandwidthReport:
    """Measure every pair of nodes: ``nodes``' memory by the CPUs that work for them.

    nodes: as of ``--nodes``; all CPUs and all usable memory unless given. size: bytes on each node;
    four times the caches of the largest node, at least 256 MiB, unless given.
    Raises: UsageError; NodeMemoryError where a node lacks the room; NumaUnavailableError where
    memory cannot be bound; PlacementError for a pair whose pages are elsewhere.
    """
    machine, notes = topology(), list[str]()
    caches = max(cache_bytes(node.usable_cpus) for node in machine.nodes.values())
    if size is None:
        size = max(DEFAULT, BEYOND * caches)
    threads = max(len(node.usable_cpus) for node in machine.nodes.values())
    least = max(LEAST, threads * PARTS * READ_STEP)
    check_rounds(rounds)
    if size < least:
        raise UsageError(f"size {size}: expected at least {least}")
    if registry.interpreted():
        raise UsageError("there is nothing to measure with NUMBA_DISABLE_JIT: kernels are Python")
    if size < BEYOND * caches:
        notes.append(f"{size} bytes are less than {BEYOND} times the caches ({caches}): some of"
                     " what is measured is theirs")  # fmt: skip
    columns = machine.usable if nodes is None else machine.select(nodes)
    rows = sorted({machine.threads_node(node) for node in columns})
    if nodes is None:
        rows = [node.id for node in machine.nodes.values() if node.usable_cpus]
    described = describe()
    if described["hypervisor"] == EMULATED:
        notes.append("this machine is emulated: its speeds mean nothing, only the placement does")
    pairs = [
        Pair(row, column, len(machine.nodes[row].usable_cpus),
             machine.nodes[row].distances.get(column))
        for row in rows
        for column in columns
    ]  # fmt: skip
    report = BandwidthReport(described, size, rounds, pairs, published(columns), notes)
    with ExitStack() as opened:
        bench = _Bench(report, machine, opened)
        bench.run(progress or (lambda _: None))
    report.machine[LOAD_AFTER] = load()
    return report


def cache_bytes(cpus: Sequence[int] | frozenset[int], root: str = "/sys") -> int:
    """Return the bytes of all second and third level caches of these CPUs; 0 if it is hidden."""
    files, found = SysFiles(), dict[tuple[str, str], int]()
    for cpu in cpus:
        base = f"{root}/devices/system/cpu/cpu{cpu}/cache"
        for name in files.names(base):
            level, size = (files.text(f"{base}/{name}/{leaf}") or "" for leaf in ("level", "size"))
            if level in ("2", "3") and size.removesuffix("K").isdecimal():
                shared = files.text(f"{base}/{name}/shared_cpu_list") or str(cpu)
                found[level, shared] = int(size.removesuffix("K")) << 10
    return sum(found.values())


def published(nodes: Sequence[int], root: str = NODES) -> dict[int, dict[str, int]]:
    """Return what the firmware says of each node's memory, from the nearest CPUs (HMAT).

    Source: Documentation/admin-guide/mm/numaperf.rst.
    """
    files, found = SysFiles(), dict[int, dict[str, int]]()
    for node in nodes:
        base = f"{root}/node{node}/access0/initiators"
        figures = {name: files.number(f"{base}/{name}") for name in PUBLISHED}
        known = {name: figure for name, figure in figures.items() if figure}
        if known:
            found[node] = known
    return found


class _NodeMemory:
    """``size`` bytes bound to a node for reading and writing, and a random cycle as large."""

    def __init__(self, node: int, size: int, opened: ExitStack, *, bound: bool) -> None:
        self.node = node
        self.mappings = [opened.enter_context(map_private(size)) for _ in range(2)]
        for mapping in self.mappings if bound else ():
            bind(mapping, [node])
        plain, cycle = (_words(mapping) for mapping in self.mappings)
        self.part = 0  # that is moved next
        plain[:] = 1
        cycle[:] = 0
        _make_cycle(cycle, self.mappings[1].address)
        self.plain, self.at = self.mappings[0].address, self.mappings[1].address

    def prove(self, what: str) -> Placement:
        """Ask the kernel where it is. Raises: PlacementError."""
        (found,) = locate([Asked([self.node], self.mappings)])
        found.check(what)
        return found


def _words(mapping: MappedMemory) -> Array:
    words: Array = np.frombuffer(mapping.view(write=True), np.uint64)
    return words


def _make_cycle(words: Array, address: int) -> None:
    """Have every cache line begin with the address of the next one of a random cycle."""
    lines = words.reshape(-1, LINE // 8)
    order = np.random.default_rng().permutation(len(lines))
    lines[order, 0] = address + LINE * np.roll(order, -1).astype(np.uint64)


class _Bench:
    def __init__(self, report: BandwidthReport, machine: Topology, opened: ExitStack) -> None:
        self.report, self.machine = report, machine
        self.size = report.size // STEP // LINE * STEP * LINE
        columns = sorted({pair.memory for pair in report.pairs})
        bound = self._may_bind(columns, machine)
        whole = 2 * self.size
        way_out = "measure less: --size, --nodes"
        for node in columns:
            memory.require(whole, f"memory to measure on node {node}", way_out, node=node)
        # Making a cycle takes three more numbers for each of its lines, for a moment.
        memory.require(len(columns) * whole + self.size // 2, "memory to measure in", way_out)
        self.memory = {node: _NodeMemory(node, self.size, opened, bound=bound) for node in columns}
        self.threads = {
            node: [
                opened.enter_context(closing(Workers([cpu], 1, "numaload-bench")))
                for cpu in sorted(machine.nodes[node].usable_cpus)
            ]
            for node in sorted({pair.cpus for pair in report.pairs})
        }
        self.read, self.fill, self.chase = Loop("read"), registry.load_fill(), Loop("chase")
        self.floats = np.ones(STEP, np.float32)  # what is written

    def _may_bind(self, columns: Sequence[int], machine: Topology) -> bool:
        """Return whether memory is bound. Raises: NumaUnavailableError where it has to be."""
        why = why_not_bound(columns)
        if why is None:
            return True
        if len(machine.usable) > 1:
            raise why
        self.report.notes.append(f"memory is not bound, there is only one node to be on: {why}")
        return False

    def run(self, progress: Progress) -> None:
        rng = np.random.default_rng()
        todo = [(pair, figure) for pair in self.report.pairs for figure in FIGURES]
        for pair in self.report.pairs:
            found = self.memory[pair.memory].prove(f"{pair.name}, before")
            pair.pages, pair.huge = found.on, found.huge_pages
        for number in range(self.report.rounds):
            for index in rng.permutation(len(todo)):
                pair, figure = todo[index]
                progress(f"round {number + 1} of {self.report.rounds}: {pair.name}, {figure}")
                if figure == LATENCY:
                    pair.rounds[figure].append(self._latency(pair))
                else:
                    self._move(pair, figure, number)
        self._note_disturbed()
        for pair in self.report.pairs:
            self.memory[pair.memory].prove(f"{pair.name}, after it was measured")

    def _note_disturbed(self) -> None:
        count = sum(len(d) for pair in self.report.pairs for d in pair.disturbed.values())
        if count:
            total = len(MOVING) * len(self.report.pairs) * self.report.rounds
            self.report.notes.append(
                f"{count} of {total} rounds do not count: {self._why_disturbed()}"
            )
        none = [
            f"{pair.name}, {figure}"
            for pair in self.report.pairs
            for figure in MOVING
            if not pair.undisturbed(figure)
        ]
        if none:
            self.report.notes.append(f"too low, since no round counts: {'; '.join(none)}")

    def _why_disturbed(self) -> str:
        quota, cpus = self.machine.quota, len(self.machine.cpus)
        if quota is None or quota >= cpus:
            return "other processes took the CPUs"
        return f"the CPU quota (cgroup) of {quota:.4g} of {cpus} CPUs stopped the threads"

    def _move(self, pair: Pair, figure: str, number: int) -> None:
        """Measure GB/s of all CPUs together."""
        there, threads = self.memory[pair.memory], self.threads[pair.cpus]
        each = self.size // len(threads) // PARTS // READ_STEP * READ_STEP
        best = _best(threads, lambda parts: self._moving(figure, there, each, parts))
        pair.rounds[figure].append(best.rate * each)
        if not best.undisturbed:
            pair.disturbed[figure].append(number)

    def _moving(
        self, figure: str, there: _NodeMemory, each: int, parts: int
    ) -> Callable[[int], None]:
        """Return what each thread does: to go on where it ended, in memory that is its own.

        each: bytes of a part.
        """
        first, past = there.part, int(figure == PAST)
        there.part += parts

        def move(thread: int) -> None:
            for part in range(first, first + parts):
                start = there.plain + each * (thread * PARTS + part % PARTS)
                if figure == READ:
                    self.read(start, each // READ_STEP)
                else:
                    self.fill(self.floats.ctypes.data, start, each // (4 * STEP), past)

        return move

    def _latency(self, pair: Pair) -> float:
        """Return ns that one load takes; go on where the last one ended."""
        there, thread = self.memory[pair.memory], self.threads[pair.cpus][0]

        def follow(steps: int) -> float:
            begin = time.thread_time()  # what others take of the CPU meanwhile is not in it
            there.at = self.chase(there.at, steps)
            return max(time.thread_time() - begin, 1e-9)

        (seconds,) = finish([thread.submit(follow, STEPS)])
        steps = STEPS * min(MOST_PASSES, 1 + int(CHASE_S / seconds))
        (seconds,) = finish([thread.submit(follow, steps)])
        return 1e9 * seconds / steps


class _Timing(NamedTuple):
    """seconds: from the first thread's begin to the last one's end. rate: 10^9 parts a second, of
    all together. undisturbed: whether no other process took their CPUs.
    """

    seconds: float
    rate: float
    undisturbed: bool


def _best(threads: Sequence[Workers], work: Callable[[int], Callable[[int], None]]) -> _Timing:
    """Return the fastest of TRIES undisturbed timings, or of those that there are.

    work(parts) -> what a thread does, called with its number. The first timing says how long it
    takes and leaves the caches as they will be.
    """
    looked = _timed(threads, work, PARTS)
    least = LEAST_S + EACH_S * len(threads)
    parts = min(MOST_PASSES * PARTS, 1 + int(least * PARTS / looked.seconds))
    found, until = list[_Timing](), time.perf_counter() + TRYING_S
    while not found or (
        sum(one.undisturbed for one in found) < TRIES and time.perf_counter() < until
    ):
        found.append(_timed(threads, work, parts))
    return max(found, key=lambda one: (one.undisturbed, one.rate))


def _timed(
    threads: Sequence[Workers], work: Callable[[int], Callable[[int], None]], parts: int
) -> _Timing:
    run = work(parts)

    def timed(number: int) -> tuple[float, float, float]:
        cpu, begin = time.thread_time(), time.perf_counter()
        run(number)
        return begin, time.perf_counter(), time.thread_time() - cpu

    took = finish([thread.submit(timed, i) for i, thread in enumerate(threads)])
    begins, ends, cpu = zip(*took, strict=True)
    seconds = max(max(ends) - min(begins), 1e-9)
    undisturbed = sum(cpu) >= UNDISTURBED * len(took) * seconds
    return _Timing(seconds, parts * len(took) / seconds / 1e9, undisturbed)
