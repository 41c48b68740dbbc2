"""A process that uses a model: its threads, and where its memory is."""

from __future__ import annotations

from numaload.doctor.check import Check
from numaload.doctor.findings import Finding as ThreadFinding


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
        return "; ".join(dict.fromkeys(finding.fix for finding in self._found()))

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


CHECKS: tuple[type[Check], ...] = (
    MainPinned,
    SharedCpus,
    Overloaded,
    Quota,
    Crowded,
    Spread,
    Far,
)
