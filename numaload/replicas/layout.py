"""Which node each range of a replica lies on: one, several in turn, or stripes of every tensor.

A stripe is a run of whole rows or experts of one tensor. Its ends are rounded to pages, so a row at
an end may lie on two nodes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from numaload.errors import UsageError
from numaload.files.known import Model
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory
from numaload.linux.placement import Asked, NodeRange
from numaload.linux.syscalls import HUGE, PAGE
from numaload.linux.sysfs import SysFiles
from numaload.weights import Weights
from numaload.weights.tensor import Tensor

MIRROR, INTERLEAVE, STRIPE, BIND = POLICIES = ("mirror", "interleave", "stripe", "bind")
KERNEL_WEIGHTS = "kernel/mm/mempolicy/weighted_interleave"  # below /sys, since Linux 6.9
MOST_WEIGHT = 255  # as the kernel's own
EXPERTS, ROWS = "experts", "rows"

Stripes = tuple[tuple[int, int], ...]  # (end, node) of each range of a file, ascending


@dataclass(frozen=True)
class Layout:
    """Say which node each range of a replica's files lies on.

    turns: the nodes that blocks of 2 MiB of a file go to, one after the other; a node with more
    weight comes more often. stripes: instead of that, the ranges of each file.
    """

    turns: Group
    stripes: tuple[Stripes, ...] = ()
    nodes: Group = field(init=False)

    def __post_init__(self) -> None:
        nodes = [*self.turns, *(node for stripes in self.stripes for _, node in stripes)]
        object.__setattr__(self, "nodes", tuple(sorted(set(nodes))))

    def ranges(self, file: int, start: int, stop: int) -> Iterator[NodeRange]:
        """Yield (first byte, end, node) of the ranges within these bytes; start is a page's."""
        if self.stripes:
            yield from self._striped(self.stripes[file], start, stop)
        elif len(self.turns) == 1 and start < stop:
            yield start, stop, self.turns[0]
        else:
            for at in range(start // HUGE * HUGE, stop, HUGE):
                node = self.turns[at // HUGE % len(self.turns)]
                yield max(at, start), min(at + HUGE, stop), node

    @staticmethod
    def _striped(stripes: Stripes, start: int, stop: int) -> Iterator[NodeRange]:
        for end, node in stripes[bisect_right(stripes, start, key=lambda one: one[0]) :]:
            if start >= stop:
                return
            yield start, min(end, stop), node
            start = end

    def on_nodes(self, model: Model) -> dict[int, int]:
        """Return {node: bytes} that a replica takes, in whole pages of each file."""
        found = Counter(dict.fromkeys(self.nodes, 0))
        for file, identity in enumerate(model.identities):
            size = -(-identity.size // PAGE) * PAGE
            if self.stripes:
                for start, stop, node in self.ranges(file, 0, identity.size):
                    found[node] += -(-stop // PAGE) * PAGE - start
                continue
            blocks, rest = divmod(size, HUGE)
            rounds, left = divmod(blocks, len(self.turns))
            for node in self.turns:
                found[node] += rounds * HUGE
            for node in self.turns[:left]:
                found[node] += HUGE
            found[self.turns[left]] += rest
        return dict(found)

    def node_at(self, file: int, offset: int) -> int:
        """Return the node of one byte."""
        return next(self.ranges(file, offset // PAGE * PAGE, offset + 1))[2]


def asked_of(group: Group, layout: Layout | None, mappings: Sequence[MappedMemory]) -> Asked:
    """Return what the kernel is asked of a replica.

    layout: None where it was placed by first touch: then every page may be on any node of its.
    """
    if layout is None or len(group) == 1:
        return Asked(list(group), mappings)
    ranges = [list(layout.ranges(i, 0, mapping.length)) for i, mapping in enumerate(mappings)]
    return Asked(list(group), mappings, ranges)


class Share(NamedTuple):
    """A run of a tensor's rows, or of its experts: [start, stop). unit: "rows" or "experts"."""

    start: int
    stop: int
    unit: str = ROWS

    def __len__(self) -> int:
        return self.stop - self.start


def unit_of(tensor: Tensor, parts: int) -> tuple[str, int]:
    """Return what a tensor is divided by among so many nodes, and how many it has of these.

    Experts where it has three dimensions and one for each node at least; rows if not.
    """
    shape = tensor.as_stored().shape
    if len(shape) == 3 and shape[0] >= parts:
        return EXPERTS, shape[0]
    rows = 1
    for one in shape[:-1]:
        rows *= one
    return ROWS, rows


def divided(count: int, parts: int) -> list[int]:
    """Return where to divide ``count`` into runs whose lengths differ by one at most."""
    return [count * part // parts for part in range(parts + 1)]


def in_turn(nodes: Group, weights: Mapping[int, int] | None = None) -> Layout:
    """Return the layout that gives each node as many blocks in turn as its weight says.

    weights: {node: 1 to 255}, for all of them; None: one each. Raises: UsageError.
    """
    if weights is None:
        return Layout(nodes)
    given = format_list(weights)
    if set(weights) != set(nodes):
        raise UsageError(f"weights for node {given or 'none'}, expected {format_list(nodes)}")
    wrong = [node for node in nodes if not 1 <= weights[node] <= MOST_WEIGHT]
    if wrong:
        node = wrong[0]
        raise UsageError(
            f"weight {weights[node]} of node {node}: expected a number from 1 to {MOST_WEIGHT}"
        )
    return Layout(tuple(node for node in nodes for _ in range(weights[node])))


def kernel_weights(nodes: Group, sys_root: str = "/sys") -> dict[int, int] | None:
    """Return the weights by which the kernel itself interleaves; None where it has none of all.

    Source: Documentation/ABI/testing/sysfs-kernel-mm-mempolicy-weighted-interleave.
    """
    files = SysFiles()
    found = {n: files.number(f"{sys_root}/{KERNEL_WEIGHTS}/node{n}") for n in nodes}
    known = {node: weight for node, weight in found.items() if weight is not None}
    return known if len(known) == len(nodes) else None


def striped(weights: Weights, nodes: Group) -> Layout:
    """Return the layout that gives each node a run of rows or experts of every tensor."""
    offsets: list[list[tuple[int, int]]] = [[] for _ in weights.parts]
    for part, opened in enumerate(weights.parts):
        for name in sorted(
            (info.name for info in opened.header.tensors), key=lambda name: weights[name].offset
        ):
            tensor = weights[name].as_stored()
            _, count = unit_of(tensor, len(nodes))
            each = tensor.nbytes // max(1, count)
            stops = divided(count, len(nodes))[1:]
            ends = [int(tensor.offset + each * stop) for stop in stops]
            offsets[part] += zip(ends, nodes, strict=True)
    sizes = [part.file.size for part in weights.parts]
    found = zip(offsets, sizes, strict=True)
    return Layout((), tuple(_at_pages(ends, size, nodes[0]) for ends, size in found))


def are_stripes(stripes: Sequence[Sequence[int]], size: int, nodes: Group) -> bool:
    """Return whether these are (end, node) of all ranges of a file, as ``striped`` makes them."""
    ends = [end for end, _ in stripes]
    return (
        all(type(end) is int and type(node) is int and node in nodes for end, node in stripes)
        and all(0 < end < after for end, after in pairwise(ends))
        and not any(end % PAGE for end in ends[:-1])
        and (ends[-1] if ends else 0) == size
    )


def _at_pages(ends: Sequence[tuple[int, int]], size: int, first: int) -> Stripes:
    """Round (end, node) to pages, and join neighbours on one node. first: what else is there."""
    found: list[tuple[int, int]] = []
    for end, node in ends:
        stop = min(size, (end + PAGE // 2) // PAGE * PAGE)
        if stop <= (found[-1][0] if found else 0):
            continue
        if found and found[-1][1] == node:
            found.pop()
        found.append((stop, node))
    last = found.pop()[1] if found else first
    return (*found, (size, last)) if size else ()


def elsewhere(layout: Layout, tensor: Tensor, file: int, start: int, nbytes: int, node: int) -> int:
    """Return how many of these bytes of a tensor lie on other nodes than this."""
    begin = tensor.as_stored().offset + start
    pages = layout.ranges(file, begin // PAGE * PAGE, begin + nbytes)
    there = sum(min(b, begin + nbytes) - max(a, begin) for a, b, on in pages if on == node)
    return int(nbytes - there)
