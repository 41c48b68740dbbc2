"""A process that uses a model: its threads, and where its memory is."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from functools import cached_property
from typing import NamedTuple

from numaload.doctor.check import ESTIMATED, PASS, Check, Finding, Price, Unknown
from numaload.doctor.findings import ThreadFinding, hardest
from numaload.linux.lists import format_list, parse_list
from numaload.linux.placement import Area
from numaload.linux.syscalls import PAGE
from numaload.machine.threads import nodes_of

# Less memory than this on another node is left alone: bytes, and a share of what is looked at.
LEAST, SHARE = 64 << 20, 0.2
LOCAL_RATE = 100e9  # bytes a second that a node reads of its own memory: eight channels of DDR4
SWAPPED = 64 << 20  # bytes
BOUND = re.compile(r"(?:bind|prefer)\b[^:]*:([\d,-]+)")  # policies that name where memory shall be
# Ends of models' names, as files or as blobs in the caches of the hub and of ollama.
MODEL = re.compile(
    r"(?:\.gguf|\.safetensors|/blobs/(?:sha256-)?[0-9a-f]{64})(?:\\040\(deleted\))?$"
)
REPLICA = re.compile(r"/numaload-\d+/")  # numaload keeps several, on a node each


class _Threads(Check):
    """Findings of one kind about the threads of a process; see ``findings.py``."""

    kind = ""
    why = ""
    source = "measured in docs/threads.md, 2026-10"

    def available(self) -> bool:
        return self.system.pid is not None

    def measure(self) -> str:
        return "; ".join(finding.text for finding in self._found())

    def explain(self) -> str:
        return self.why

    def fix(self) -> str:
        text = "; ".join(dict.fromkeys(finding.fix for finding in self._found()))
        with suppress(OSError):  # nobody but root moves threads of others
            owner = os.stat(f"{self.system.proc}/{self.system.pid}").st_uid
            self.root = ": taskset -" in text and owner != self.system.uid
        return text

    def _found(self) -> list[ThreadFinding]:
        return [one for one in self.system.threads.findings if one.kind == self.kind]


class MainPinned(_Threads):
    id, title, kind = "NL701", "The main thread is pinned to one core", "main-pinned"
    why = "Threads and processes that it starts inherit that one core, and all work there."


class SharedCpus(_Threads):
    id, title, kind = "NL702", "Pools of threads fight for the same CPUs", "shared"
    why = "Two libraries compute at once on the same CPUs: each waits for the other."


class Overloaded(_Threads):
    id, title, kind = "NL703", "A pool has more threads at work than CPUs", "overloaded"
    why = "Threads that are too many take turns, and each turn costs a switch and its caches."


class Quota(_Threads):
    id, title, kind = "NL704", "More threads have work than the CPU quota allows", "quota"
    why = "Once the quota of a period is used up, all threads stand still until the next one."


class Crowded(_Threads):
    id, title, kind = "NL705", "A pool has more threads than CPUs", "crowded"
    why = "When all of them have work at the same time, they wait for each other."


class Spread(_Threads):
    id, title, kind = "NL706", "A pool may run on several nodes", "spread"
    why = "The kernel may move a thread away from the memory that it first touched."


class Far(_Threads):
    id, title, kind = "NL707", "CPUs of one node, memory of another", "far"
    why = "A cpuset allows CPUs of one node and memory of another: every access is remote."


class Misplaced(NamedTuple):
    """Bytes of a process by the node that they lie on, where they should be on ``home``."""

    found: Counter[int]
    home: frozenset[int]
    total: int  # bytes that were looked at

    @property
    def nbytes(self) -> int:
        return self.found.total()

    @property
    def matters(self) -> bool:
        return self.nbytes >= max(LEAST, SHARE * self.total)

    def __str__(self) -> str:
        share = self.nbytes / max(1, self.total)
        return f"{_mib(self.nbytes)} of {_mib(self.total)} ({share:.0%})"


class _Memory(Check):
    """Memory of a process on a node where it should not be.

    Left out are nodes without CPUs, to which no thread is near, and memory that is interleaved.
    """

    def available(self) -> bool:
        return self.system.pid is not None and len(self.places) > 1

    def look(self) -> Misplaced:
        raise NotImplementedError

    @cached_property
    def misplaced(self) -> Misplaced:
        return self.look()

    @cached_property
    def places(self) -> frozenset[int]:
        """Return the nodes that have CPUs and memory."""
        nodes = self.system.machine.nodes.values()
        return frozenset(node.id for node in nodes if node.cpus and node.has_memory)

    @property
    def pid(self) -> int:
        return self.system.threads.pid

    def count(self, area: Area, home: Collection[int]) -> dict[int, int]:
        """Return {node: bytes} of what is not on ``home``."""
        wrong = self.places.difference(home)
        return {node: pages * PAGE for node, pages in area.counts.items() if node in wrong}

    def nodes(self, cpus: frozenset[int]) -> frozenset[int]:
        return self.places.intersection(nodes_of(cpus, self.system.machine))

    def price(self) -> Price:
        """Estimate that memory takes longer by its distance, twice as long at most."""
        nodes, lost = self.system.machine.nodes, 0.0
        for node, nbytes in self.misplaced.found.items():
            far = min(nodes[node].distances.get(home, 20) for home in self.misplaced.home)
            lost += nbytes / LOCAL_RATE * min(1.0, max(0, far - 10) / 10)
        return Price(lost, ESTIMATED, PASS)

    def fix(self) -> str:
        home, again = self.misplaced.home, self.start()
        if home & self.misplaced.found.keys():  # some shall be on one node, some on another
            return again
        return f"{self._move(self.misplaced.found, home)}  # next time start it so: {again}"

    def start(self) -> str:
        """Return the command that starts such a process where its memory shall be."""
        home = self.misplaced.home
        if len(home) == 1:
            model = shlex.quote(self.system.path or "MODEL")
            return f"numaload exec --node {min(home)} {model} -- PROGRAM -m {{model}}"
        nodes = format_list(home)
        return f"numactl --cpunodebind={nodes} --membind={nodes} PROGRAM"

    def finding(self, seen: str) -> Finding:
        """Add what crosses between nodes, which is counted only where something was found."""
        return super().finding(f"{seen}; {self.system.interconnect}")

    def undo(self) -> str:
        home, found = self.misplaced.home, self.misplaced.found
        return "" if home & found.keys() else self._move(home, found)

    def _move(self, origin: Collection[int], target: Collection[int]) -> str:
        return f"migratepages {self.pid} {format_list(origin)} {format_list(target)}"


class BoundLate(_Memory):
    id, title = "NL709", "The process was bound after it had its memory"
    source = "TensorRT-LLM #18117, 2026: 22 % of its memory on other nodes"

    def look(self) -> Misplaced:
        found, wanted, total = Counter[int](), set[int](), 0
        for area in _anonymous(self.system.areas):
            total += sum(area.counts.values()) * PAGE
            home = _named(area.policy) or self.kept_to
            wrong = self.count(area, home) if home else {}
            if wrong:
                found.update(wrong)
                wanted |= home
        return Misplaced(found, frozenset(wanted), total)

    @cached_property
    def kept_to(self) -> frozenset[int]:
        """Return the nodes that its cpuset, or else its CPUs, keep it to; none where all may be."""
        threads = self.system.threads.threads
        mems = frozenset[int]().union(*(thread.mems for thread in threads)) & self.places
        if mems and mems < self.places:
            return mems
        if not all(thread.cpus for thread in threads):  # not known of each
            return frozenset()
        nodes = self.nodes(self.system.threads.cpus)
        return nodes if nodes < self.places else frozenset()

    def measure(self) -> str:
        if not self.misplaced.matters:
            return ""
        return (
            f"the process is bound to node {format_list(self.misplaced.home)} now, but"
            f" {self.misplaced} of its anonymous memory lie on node"
            f" {format_list(self.misplaced.found)}"
        )

    def explain(self) -> str:
        return (
            "Binding a process moves nothing: what it touched before stays where it is, and every"
            " access goes to the other node. So does what found no room on its own node."
        )


class RemoteShare(_Memory):
    id, title = "NL708", "Memory lies on nodes where no thread works"
    source = "TensorRT-LLM #18117, 2026: 22 % of its memory on other nodes"

    def look(self) -> Misplaced:
        home, found, total = self.home, Counter[int](), 0
        areas = [area for area in self.system.areas if _is_model(area.file)]
        if not BoundLate(self.system).misplaced.matters:  # else these seconds are claimed there
            areas += _anonymous(self.system.areas)
        for area in areas if home else ():
            total += sum(area.counts.values()) * PAGE
            found.update(self.count(area, home))
        return Misplaced(found, home, total)

    @cached_property
    def home(self) -> frozenset[int]:
        """Return the nodes that its threads work on; none where that is not known."""
        seen = self.system.threads
        worked = seen.busy or hardest(seen.threads)
        if not all(thread.cpus for thread in worked):
            return frozenset()
        may = self.nodes(frozenset[int]().union(*(thread.cpus for thread in worked)))
        if may == self.places and seen.busy:  # they may run anywhere: where they do
            return self.nodes(frozenset(thread.cpu for thread in seen.busy))
        return may

    def measure(self) -> str:
        if not self.misplaced.matters:
            return ""
        return (
            f"its threads work on node {format_list(self.misplaced.home)}, but {self.misplaced} of"
            f" its memory and the model's pages lie on node {format_list(self.misplaced.found)}"
        )

    def explain(self) -> str:
        return (
            "Memory of another node is read through the link between the sockets, which is slower"
            " than the node's own memory and shared by all cores."
        )


class Swapped(Check):
    id, title, root = "NL710", "Part of the process is in swap", True
    source = "Linux Documentation/filesystems/proc.rst (VmSwap), 2026-11; 64 MiB is our choice"

    # No price: what of it is on a disk, NL204 counts.

    def available(self) -> bool:
        return self.system.pid is not None

    def measure(self) -> str:
        path = f"/proc/{self.system.pid}/status"
        rows = self.system.fields(path)
        if "VmSwap" not in rows:
            raise Unknown(f"{path}: does not say VmSwap")
        nbytes = rows["VmSwap"]
        return f"{_mib(nbytes)} of it are in swap" if nbytes > SWAPPED else ""

    def explain(self) -> str:
        return (
            "The kernel moved memory of the process to swap to have room for something else."
            " Each page comes back, one after the other, when it is used."
        )

    def fix(self) -> str:
        again = "swapoff -a && swapon -a"
        with suppress(Unknown):
            rows = [f"swapoff {shlex.quote(one.name)} && {one.swapon}" for one in self.system.swaps]
            again = " && ".join(rows) or again
        if self._fits():
            return again
        return f"end what else takes memory, then: {again}"

    def _fits(self) -> bool:
        """Return whether there is room for all that is in swap; not where that is not known."""
        with suppress(Unknown, KeyError):
            rows = self.system.meminfo
            return rows["SwapTotal"] - rows["SwapFree"] < rows["MemAvailable"]
        return False


def _anonymous(areas: Collection[Area]) -> list[Area]:
    return [area for area in areas if not area.file and "interleave" not in area.policy]


def _is_model(file: str) -> bool:
    return bool(MODEL.search(file)) and not REPLICA.search(file)


def _named(policy: str) -> frozenset[int]:
    """Return the nodes that a policy names; none where it is first touch."""
    words = BOUND.match(policy)
    with suppress(ValueError):
        return frozenset(parse_list(words[1] if words else ""))
    return frozenset()


def _mib(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB"


CHECKS: tuple[type[Check], ...] = (
    MainPinned,
    SharedCpus,
    Overloaded,
    Quota,
    Crowded,
    Spread,
    Far,
    RemoteShare,
    BoundLate,
    Swapped,
)
