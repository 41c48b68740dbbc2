"""Verifying replicas again: the kernel's page counts and the checksums of every chunk."""

from __future__ import annotations

from collections.abc import Mapping as MappingType
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash

from numaload.errors import ChecksumError
from numaload.numa.mapping import Mapping, populate_read
from numaload.numa.placement import Placement, locate
from numaload.numa.topology import Topology
from numaload.numa.workers import finish, pool
from numaload.replicas.build import CHUNK


@dataclass
class Verified:
    """What the kernel and the checksums said. ``wrong_chunks``: {node: [(path, chunk)]}."""

    placements: dict[int, Placement]
    chunks: int
    wrong_chunks: dict[int, list[tuple[str, int]]]

    @property
    def right(self) -> bool:
        return not self.wrong_chunks and all(p.right for p in self.placements.values())

    def check(self) -> None:
        """Raises: PlacementError, ChecksumError."""
        for node, placement in self.placements.items():
            placement.check(f"replica on node {node}")
        for node, chunks in self.wrong_chunks.items():
            path, chunk = chunks[0]
            raise ChecksumError(
                f"{path}: {len(chunks)} chunks on node {node} differ from what was copied,"
                f" the first is {chunk} (byte {chunk * CHUNK})",
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


def placements_of(replicas: MappingType[int, Sequence[Mapping]]) -> dict[int, Placement]:
    """Ask where the replicas are now, all pages; maps them into this process first."""
    for mappings in replicas.values():
        for mapping in mappings:
            populate_read(mapping)
    groups = [([node], mappings) for node, mappings in replicas.items()]
    return dict(zip(replicas, locate(groups), strict=True))


def verify(
    replicas: MappingType[int, Sequence[Mapping]],
    paths: Sequence[str],
    checksums: MappingType[int, Sequence[Sequence[int]]],
    machine: Topology,
) -> Verified:
    """Count the pages and hash every chunk, all nodes at once, each by threads on that node.

    checksums: {node: a row per file}: replicas that were built at different times have their own.
    """
    placements = placements_of(replicas)
    wrong: list[tuple[int, int, int]] = []  # (node, file, chunk)
    jobs = [
        job
        for node, mappings in replicas.items()
        for i, (mapping, sums) in enumerate(zip(mappings, checksums[node], strict=True))
        for job in pool(machine, node).submit_ranges(
            partial(_check, mapping, sums, wrong, (node, i)), len(sums)
        )
    ]
    finish(jobs)
    by_node: dict[int, list[tuple[str, int]]] = {}
    for node, i, chunk in sorted(wrong):
        by_node.setdefault(node, []).append((paths[i], chunk))
    chunks = sum(len(sums) for node in replicas for sums in checksums[node])
    return Verified(placements, chunks, by_node)


def _check(
    mapping: Mapping,
    sums: Sequence[int],
    wrong: list[tuple[int, int, int]],
    where: tuple[int, int],
    first: int,
    last: int,
) -> None:
    for chunk in range(first, last):
        start = chunk * CHUNK
        with mapping.view(start, min(CHUNK, mapping.length - start)) as view:
            if xxhash.xxh3_64_intdigest(view) != sums[chunk]:
                wrong.append((*where, chunk))
