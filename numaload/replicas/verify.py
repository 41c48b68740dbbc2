"""Verifying replicas again: the kernel's page counts and the checksums of every chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import xxhash

from numaload import trace
from numaload.errors import ChecksumError
from numaload.files.source import SourceFile
from numaload.linux.lists import Group
from numaload.linux.mapping import MappedMemory, populate_read
from numaload.linux.placement import Placement, locate
from numaload.machine.stopping import CancelToken
from numaload.machine.topology import Topology
from numaload.machine.workers import finish, pool
from numaload.replicas.layout import CHUNK, Layout, asked_of


@dataclass
class Verified:
    """What the kernel and the checksums said, by node; nodes that share a replica have the same.

    ``wrong_chunks``: {node: [(path, chunk)]}.
    """

    placements: dict[int, Placement]
    chunks: int
    wrong_chunks: dict[int, list[tuple[str, int]]]

    @property
    def right(self) -> bool:
        return not self.wrong_chunks and all(p.right for p in self.placements.values())

    def check(self) -> None:
        """Check what was found. Raises: PlacementError, ChecksumError."""
        for node, placement in self.placements.items():
            placement.check(f"replica of node {node}")
        for node, chunks in self.wrong_chunks.items():
            path, chunk = chunks[0]
            raise ChecksumError(
                f"{path}: {len(chunks)} chunks of node {node}'s replica differ from what was"
                f" copied, the first is {chunk} (byte {chunk * CHUNK})",
                path=path,
                chunk=chunk,
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "right": self.right,
            "chunks": self.chunks,
            "wrong_chunks": self.wrong_chunks,
            "placements": {node: p.to_dict() for node, p in self.placements.items()},
        }


Replicas = Mapping[Group, Sequence[MappedMemory]]  # {nodes: the mapped files}
Checksum = tuple[int, int, int]  # first byte, end, XXH3-64 of a piece of a file
Layouts = Mapping[Group, Layout | None]  # None: placed by first touch, on any of the nodes


@trace.spanned("prove")
def placements_of(replicas: Replicas, layouts: Layouts) -> dict[Group, Placement]:
    """Ask where the replicas are now, all pages; maps them into this process first."""
    for group, mappings in replicas.items():
        layout = layouts[group] or Layout(group)
        for i, mapping in enumerate(mappings):
            for start, stop in layout.spans(i, mapping.length):
                populate_read(mapping, start, stop)
    asked = [asked_of(group, layouts[group], mappings) for group, mappings in replicas.items()]
    return dict(zip(replicas, locate(asked), strict=True))


T = TypeVar("T")


def by_node(found: Mapping[Group, T]) -> dict[int, T]:
    """Return the same by node, for every node that a replica serves; its own comes first."""
    shared_first = sorted(found, key=len, reverse=True)
    return dict(sorted({node: found[group] for group in shared_first for node in group}.items()))


@trace.spanned("verify")
def verify(
    replicas: Replicas,
    paths: Sequence[str],
    checksums: Mapping[Group, Sequence[Sequence[Checksum]]],
    layouts: Layouts,
    machine: Topology,
) -> Verified:
    """Count the pages and hash every chunk, all replicas at once, by threads on their nodes.

    checksums: {nodes: a row per file}: replicas that were built at different times have their own.
    Those of pieces that a replica has not are left out.
    """
    placements = placements_of(replicas, layouts)
    wrong: list[tuple[Group, int, int]] = []  # (nodes, file, chunk)
    token = CancelToken()
    jobs = [
        job
        for group, mappings in replicas.items()
        for i, mapping in enumerate(mappings)
        for sums in [_of_layout(checksums[group][i], layouts[group], i)]
        for job in pool(machine, group).submit_ranges(
            partial(_check, mapping, sums, wrong, (group, i)), len(sums), token=token
        )
    ]
    finish(jobs, token)
    differ: dict[Group, list[tuple[str, int]]] = {}
    for group, i, chunk in sorted(wrong):
        differ.setdefault(group, []).append((paths[i], chunk))
    chunks = sum(
        len(_of_layout(sums, layouts[group], i))
        for group in replicas
        for i, sums in enumerate(checksums[group])
    )
    return Verified(by_node(placements), chunks, by_node(differ))


def differing(
    paths: Sequence[str], checksums: Sequence[Sequence[Checksum]]
) -> list[tuple[str, int]]:
    """Read the source's files and return [(path, chunk)] of what replicas were not built from.

    Finds what size and times do not tell. Raises: ReadError.
    """
    found = []
    for path, sums in zip(paths, checksums, strict=True):
        with SourceFile(path) as file:
            for start, stop, expected in sums:
                size = min(stop, file.size) - start
                data = file.read_at(start, size) if size > 0 else b""
                if xxhash.xxh3_64_intdigest(data) != expected:
                    found.append((path, start // CHUNK))
    return found


def _of_layout(sums: Sequence[Checksum], layout: Layout | None, file: int) -> Sequence[Checksum]:
    if layout is None or not layout.only:
        return sums
    return [one for one in sums if layout.covers(file, one[0], one[1])]


def _check(
    mapping: MappedMemory,
    sums: Sequence[Checksum],
    wrong: list[tuple[Group, int, int]],
    where: tuple[Group, int],
    first: int,
    last: int,
) -> None:
    for start, stop, expected in sums[first:last]:
        with (
            trace.span("hash", stop - start, where[0]),
            mapping.view(start, stop - start) as view,
        ):
            if xxhash.xxh3_64_intdigest(view) != expected:
                wrong.append((*where, start // CHUNK))
