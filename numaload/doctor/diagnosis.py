"""Run every check on a machine, a model and a process: what costs most comes first."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from numaload.doctor import (
    cpu,
    disks,
    engines,
    gpu,
    memory,
    numa,
    process,
    reading,
    storage,
)
from numaload.doctor.check import Check, Finding, Unknown
from numaload.doctor.findings import ThreadReport
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import System
from numaload.errors import NumaloadError
from numaload.machine.devices import Device
from numaload.weights import Weights

# Every check, by subject.
CHECKS: tuple[type[Check], ...] = (
    *reading.CHECKS,
    *disks.CHECKS,
    *storage.CHECKS,
    *memory.CHECKS,
    *numa.CHECKS,
    *gpu.CHECKS,
    *cpu.CHECKS,
    *engines.CHECKS,
    *process.CHECKS,
)


class NotSeen(NamedTuple):
    """A check that could not look, and why."""

    id: str
    title: str
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """What was found, most seconds lost first. ``checked``: how many checks looked.

    ``load_s``: seconds until a program that maps the file has it; None where that is not known.
    """

    path: str | None
    pid: int | None
    size: int  # bytes of the model; 0 without one
    resident: int | None  # bytes of it in RAM; None: not known
    storage: str  # what it lies on
    source: str  # the server, bucket or pool in that; empty: a disk, or memory
    speeds: Speeds
    load_s: float | None
    best_s: float | None  # at what the disk gives
    findings: tuple[Finding, ...]
    unknown: tuple[NotSeen, ...]
    checked: int
    seconds: float  # that looking took
    machine: tuple[str, ...] = ()  # it in a few lines
    threads: ThreadReport | None = None  # of the process

    def to_dict(self) -> dict[str, Any]:
        rows = [finding.to_dict() for finding in self.findings]
        return {
            **self.__dict__,
            "threads": self.threads and self.threads.to_dict(),
            "speeds": self.speeds._asdict(),
            "findings": rows,
            "unknown": [one._asdict() for one in self.unknown],
        }


def diagnose(
    path: str | os.PathLike[str] | Weights | None = None,
    *,
    pid: int | None = None,
    deep: bool = False,
) -> Diagnosis:
    """Find what makes a model slow to load on this machine, or a process slow to use it.

    path: any file of the model, or its weights; without it only the machine is looked at. pid: of
    a process that has loaded it. deep: also check every tensor, split and checksum, and measure
    for longer.
    It changes nothing, and what it reads is not in RAM afterwards unless it was before.
    Raises: ReadError where the file cannot be opened; NumaError where the process is not shown.
    """
    if isinstance(path, Weights):
        path = path.paths[0]
    system = System(None if path is None else os.fsdecode(path), pid=pid, deep=deep)
    try:
        return examine(system)
    finally:
        system.close()


def examine(system: System, checks: Iterable[type[Check]] = CHECKS) -> Diagnosis:
    """Run these checks on a system that may be constructed. Raises: as ``diagnose``."""
    begin = time.perf_counter()
    size = system.size  # opens the files
    if system.pid is not None:
        _ = system.threads
    found: list[Finding] = []
    unknown: list[NotSeen] = []
    checked = 0
    for kind in checks:
        check = kind(system)
        try:
            if not check.available():
                continue
            seen = check.measure()
            checked += 1
            if seen:
                found.append(check.finding(seen))
        except (Unknown, NumaloadError, OSError) as error:
            unknown.append(NotSeen(check.id, check.title, str(error)))
    # Sorting is stable: where nobody knows the price, the order is that of the checks.
    found.sort(key=lambda finding: -finding.price.weight if finding.price else 0.0)
    speeds = system.speeds if size else Speeds()
    return Diagnosis(
        path=system.path,
        pid=system.pid,
        size=size,
        resident=_resident(system),
        storage=str(system.device) if system.path is not None else "",
        source=_source(system.device) if system.path is not None else "",
        speeds=speeds,
        load_s=system.load_seconds,
        best_s=system.best_seconds,
        findings=tuple(found),
        unknown=tuple(unknown),
        checked=checked,
        seconds=time.perf_counter() - begin,
        machine=tuple(_machine(system)),
        threads=system.threads if system.pid is not None else None,
    )


def _machine(system: System) -> Iterator[str]:
    """Describe the machine in a few lines."""
    yield f"processor: {system.processor or 'unknown'}, {len(system.machine.cpus)} CPUs usable"
    nodes = system.machine.nodes.values()
    rows = (f"{node.id}: {node.memory_total >> 30} GiB, {len(node.cpus)} CPUs" for node in nodes)
    yield f"nodes: {'; '.join(rows)}"
    cards = ", ".join(f"{card.id} on node {card.node}" for card in system.gpus)
    yield f"GPUs: {cards or 'none on PCI'}; memory is bound by {system.binding}"


def _source(device: Device) -> str:
    return "" if device.disks or device.kind == "memory" else device.name


def _resident(system: System) -> int | None:
    try:
        return system.size - system.absent
    except Unknown:
        return None
