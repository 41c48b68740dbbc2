"""Gather the facts of a report: what the doctor finds, the machine, replicas, and every tensor."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from numaload.doctor.check import Unknown
from numaload.doctor.diagnosis import Diagnosis, examine
from numaload.doctor.system import System
from numaload.errors import NumaError, NumaloadError, StoreError
from numaload.linux.lists import Group
from numaload.linux.placement import Placement
from numaload.linux.syscalls import PAGE
from numaload.machine.devices import FileDevice, Gpu
from numaload.machine.topology import Topology
from numaload.pagecache.choice import LAYER
from numaload.pagecache.residency_report import FileResidency, Span, TensorResidency, look
from numaload.replicas.entry import Entry
from numaload.replicas.layout import Layout
from numaload.replicas.mirror import placements_of_entry
from numaload.report.timeline import Timeline, read_trace, timeline_of
from numaload.trace import recording
from numaload.weights import Weights

SOMEWHERE = -1  # in a Spread: in RAM, on a node that is not known

Spread = dict[int, int]  # {node: bytes}; what is missing to all bytes is not in RAM


class TensorPlace(NamedTuple):
    """Where one tensor's bytes are. cached: in the page cache; None: not known.

    replicas: in each replica, in the order of ``Facts.replicas``. layer: None where it has none.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int
    layer: int | None
    cached: Spread | None
    replicas: tuple[Spread, ...]


class Replica(NamedTuple):
    """One replica in the store: whole files on a group of nodes, or what patterns placed there.

    on_nodes: bytes of it. built_nbytes, built_s: of all that were built with it. placement: what
    the kernel says; None with ``error``. source: whether the files are "unchanged", "changed",
    "gone" or "unreadable" since.
    """

    nodes: Group
    policy: str
    on_nodes: Spread
    bound: bool
    source: str
    age_s: float
    built_nbytes: int
    built_s: float
    placement: Placement | None
    error: str


@dataclass(frozen=True)
class Facts:
    """All that a report shows. ``when``: seconds since the epoch. notes: what is not shown, why."""

    diagnosis: Diagnosis
    machine: Topology
    gpus: list[Gpu]
    disks: FileDevice | None
    architecture: str = ""
    files: list[FileResidency] = field(default_factory=list)
    tensors: list[TensorPlace] = field(default_factory=list)
    replicas: list[Replica] = field(default_factory=list)
    timeline: Timeline | None = None
    when: float = 0.0
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        replicas = [
            one._asdict() | {"placement": one.placement and one.placement.to_dict()}
            for one in self.replicas
        ]
        timeline = self.timeline and vars(self.timeline) | {
            "lanes": [lane._asdict() for lane in self.timeline.lanes]
        }
        return vars(self) | {
            "files": [{k: v for k, v in vars(one).items() if k != "tensors"} for one in self.files],
            "tensors": [one._asdict() for one in self.tensors],
            "replicas": replicas,
            "timeline": timeline,
        }


def collect(path: str | os.PathLike[str], trace: str | None = None) -> Facts:
    """Look at a model and the machine; like the doctor, change nothing.

    path: any file of the model. trace: a file that NUMALOAD_TRACE wrote while it was loaded;
    without it the timeline is of this looking. Raises: ReadError where a file cannot be opened,
    FormatError for what is no trace.
    """
    timeline = None if trace is None else read_trace(trace)
    with recording() as events:
        system = System(os.fsdecode(path))
        try:
            facts = facts_of(system)
        finally:
            system.close()
    return replace(facts, timeline=timeline or timeline_of(events, None))


def facts_of(system: System) -> Facts:
    """Return the facts of a system that may be constructed. Raises: ReadError."""
    when, notes = time.time(), list[str]()
    diagnosis, weights = examine(system), system.weights
    if weights is None:
        notes.append(f"no tensors are shown: {system.damage}")
    entries: list[Entry] = []
    try:
        entries = system.replicas
    except StoreError as error:
        notes.append(f"no replicas are shown: {error}")
    disks = None
    try:
        disks = system.disks
    except (Unknown, NumaloadError) as error:
        notes.append(f"no disks are shown: {error}")
    replicas = [one for entry in entries for one in _replicas(entry, when)]
    layouts = [(e.model.paths, e.layout(group)) for e in entries for group in e.groups]
    files = list(_files(weights, system.machine, notes)) if weights else []
    named = weights.metadata.get("general.architecture") if weights else ""
    return Facts(
        diagnosis=diagnosis,
        machine=system.machine,
        gpus=system.gpus,
        disks=disks,
        architecture=named if isinstance(named, str) else "",
        files=files,
        tensors=list(_tensors(weights, files, layouts)) if weights else [],
        replicas=replicas,
        when=when,
        notes=notes,
    )


def _replicas(entry: Entry, when: float) -> Iterator[Replica]:
    placements, why = dict[Group, Placement](), ""
    try:
        placements = placements_of_entry(entry)
    except NumaloadError as error:  # the others are still worth showing
        why = str(error)
    for group in entry.groups:
        yield Replica(
            nodes=group,
            policy=entry.policy,
            on_nodes=entry.layout(group).on_nodes(entry.model),
            bound=entry.bound,
            source=entry.model.state(),
            age_s=when - entry.created,
            built_nbytes=entry.nbytes,
            built_s=entry.seconds,
            placement=placements.get(group),
            error=why,
        )


def _files(weights: Weights, machine: Topology, notes: list[str]) -> Iterator[FileResidency]:
    """Ask what of each file, and of each tensor in it, is in the page cache."""
    nodes = [node.id for node in machine.nodes.values() if node.has_memory] or [0]
    for part in weights.parts:
        spans = [Span(info.name, info.offset, info.nbytes) for info in part.header.tensors]
        try:
            yield look(part.file, spans, nodes)
        except NumaError as error:
            notes.append(f"{part.file.path}: what of it is in RAM is not known: {error}")
            yield FileResidency(part.file.path, part.file.size, known=False)


def _tensors(
    weights: Weights,
    files: Sequence[FileResidency],
    layouts: Sequence[tuple[Sequence[str], Layout]],
) -> Iterator[TensorPlace]:
    for part, file in zip(weights.parts, files, strict=True):
        found = iter(file.tensors)  # none where the kernel does not tell
        for info in part.header.tensors:
            layer = re.search(LAYER, info.name)
            start, stop = info.offset, info.offset + info.nbytes
            yield TensorPlace(
                info.name,
                info.type_name,
                info.dims[::-1],
                info.nbytes,
                int(layer[1]) if layer else None,
                spread_of(next(found)) if file.tensors else None,
                tuple(_within(*each, file.path, start, stop) for each in layouts),
            )


def spread_of(found: FileResidency | TensorResidency) -> Spread:
    return found.on_nodes or ({SOMEWHERE: found.resident} if found.resident else {})


def _within(paths: Sequence[str], layout: Layout, path: str, start: int, stop: int) -> Spread:
    """Return how much of a file's range a replica of these files has on which node."""
    found: Counter[int] = Counter()
    if path in paths and start < stop:
        for first, last, node in layout.ranges(paths.index(path), start // PAGE * PAGE, stop):
            found[node] += last - max(first, start)
    return dict(sorted(found.items()))
