"""Which node each range of a replica lies on: one, several in turn, or stripes of every tensor.

A stripe is a run of whole rows or experts of one tensor. Its ends are rounded to pages, so a row at
an end may lie on two nodes. Where patterns place tensors, there are two kinds of layouts: of what
each node has a copy of, and of what there is once; together they are no whole file.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

from numaload.errors import UsageError
from numaload.files.known import Model
from numaload.files.residency import ByteRange
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory
from numaload.linux.placement import Asked, NodeRange
from numaload.linux.syscalls import HUGE, PAGE
from numaload.linux.sysfs import SysFiles
from numaload.weights import Weights
from numaload.weights.tensor import Tensor

CHUNK = 16 << 20  # bytes filled and checksummed at a time; a multiple of a huge page
MIRROR, INTERLEAVE, STRIPE, BIND = POLICIES = ("mirror", "interleave", "stripe", "bind")
MIXED, SKIP = "mixed", "skip"  # placed by patterns; left where the file is
KERNEL_WEIGHTS = "kernel/mm/mempolicy/weighted_interleave"  # below /sys, since Linux 6.9
MOST_WEIGHT = 255  # as the kernel's own
EXPERTS, ROWS = "experts", "rows"

Stripes = tuple[tuple[int, int], ...]  # (end, node) of each range of a file, ascending
Spans = tuple[ByteRange, ...]  # (first byte, end) of parts of a file, ascending, of whole pages
Place = Sequence[tuple[str, str]]  # (pattern of tensor names, policy): the first match counts


@dataclass(frozen=True)
class Layout:
    """Say which node each range of a replica's files lies on.

    turns: the nodes that blocks of 2 MiB of a file go to, one after the other; a node with more
    weight comes more often. stripes: instead of that, the ranges of each file. only: the parts of
    each file that it has; () for whole files.
    """

    turns: Group
    stripes: tuple[Stripes, ...] = ()
    only: tuple[Spans, ...] = ()
    nodes: Group = field(init=False)

    def __post_init__(self) -> None:
        nodes = [*self.turns, *(node for stripes in self.stripes for _, node in stripes)]
        object.__setattr__(self, "nodes", tuple(sorted(set(nodes))))

    def ranges(self, file: int, start: int, stop: int) -> Iterator[NodeRange]:
        """Yield (first byte, end, node) of the ranges within these bytes; start is a page's."""
        for first, last in self.spans(file, stop):
            if first < stop and start < last:
                yield from self._ranges(file, max(first, start), min(last, stop))

    def spans(self, file: int, size: int) -> Spans:
        """Return the parts that it has of a file of this size."""
        if self.only:
            return self.only[file]
        return ((0, size),) if size else ()

    def covers(self, file: int, start: int, stop: int) -> bool:
        """Return whether it has all of these bytes."""
        at = start
        for first, last in self.spans(file, stop):
            if first <= at < last:
                at = last
        return at >= stop

    def pieces(self, file: int, size: int) -> Iterator[ByteRange]:
        """Yield (first byte, end) of what is filled and checksummed at a time."""
        for start, stop in self.spans(file, size):
            for chunk in range(start // CHUNK * CHUNK, stop, CHUNK):
                yield max(start, chunk), min(stop, chunk + CHUNK)

    def _ranges(self, file: int, start: int, stop: int) -> Iterator[NodeRange]:
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
            if self.stripes or self.only:
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

    def run_of(self, tensor: Tensor, node: int) -> ByteRange | None:
        """Return the bytes of its file that a node has of a tensor; None if they are no one run.

        At both ends of the tensor less than a page may be on the node of what is beside it.
        """
        file, first = tensor.place_in_files
        last = first + tensor.nbytes
        runs: list[tuple[int, int]] = []  # (end, node)
        for _, stop, on in self.ranges(file, first // PAGE * PAGE, last):
            if runs and runs[-1][1] == on:
                runs.pop()
            runs.append((stop, on))
        if len(runs) > 1 and runs[0][0] - first < PAGE:
            del runs[0]
        if len(runs) > 1 and last - runs[-2][0] < PAGE:
            del runs[-1]
            runs[-1] = last, runs[-1][1]
        starts = [first, *(stop for stop, _ in runs)]
        found = [
            (start, stop) for start, (stop, on) in zip(starts, runs, strict=False) if on == node
        ]
        return (found or [(first, first)])[0] if len(found) < 2 else None

    def node_at(self, file: int, offset: int) -> int:
        """Return the node of one byte."""
        return next(self.ranges(file, offset // PAGE * PAGE, offset + 1))[2]


def asked_of(group: Group, layout: Layout | None, mappings: Sequence[MappedMemory]) -> Asked:
    """Return what the kernel is asked of a replica.

    layout: None where it was placed by first touch: then every page may be on any node of its.
    """
    if layout is None or (len(group) == 1 and not layout.only):
        return Asked(list(group), mappings)
    ranges = [list(layout.ranges(i, 0, mapping.length)) for i, mapping in enumerate(mappings)]
    return Asked(list(group), mappings, ranges)


def pieces_of(layouts: Iterable[Layout], file: int, size: int) -> list[ByteRange]:
    """Return the pieces of a file that any of these have, each once, ascending.

    Those of layouts that were made together are the same or have no byte in common.
    """
    layouts = list(layouts)
    if not layouts or not layouts[0].only:
        return list(Layout((0,)).pieces(file, size))
    return sorted({piece for layout in layouts for piece in layout.pieces(file, size)})


def sums_of(
    pieces: Sequence[Sequence[ByteRange]], checksums: Sequence[Sequence[int]]
) -> list[list[tuple[int, int, int]]]:
    """Return (first byte, end, checksum) of each piece of each file."""
    return [
        [(start, stop, found) for (start, stop), found in zip(*row, strict=True)]
        for row in zip(pieces, checksums, strict=True)
    ]


class Share(NamedTuple):
    """A run of a tensor's rows, or of its experts: [start, stop). unit: "rows" or "experts"."""

    start: int
    stop: int
    unit: str = ROWS

    @property
    def size(self) -> int:
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
    if not isinstance(weights, Mapping):
        raise UsageError(f"weights {weights!r}: expected {{node: weight}}")
    given = format_list(weights)
    if set(weights) != set(nodes):
        raise UsageError(f"weights for node {given or 'none'}, expected {format_list(nodes)}")
    valid = range(1, MOST_WEIGHT + 1)
    wrong = [node for node in nodes if type(weights[node]) is not int or weights[node] not in valid]
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
    ends = [_ends(tensor, STRIPE, nodes, nodes) for file in _in_files(weights) for tensor in file]
    return Layout((), _stripes(weights, iter(ends), nodes))


def off_node(weights: Weights, layout: Layout) -> int:
    """Return the bytes of a striped replica that lie on another node than their rows.

    Stripes end at pages' borders, rows where they end.
    """
    found = 0
    for file, tensors in enumerate(_in_files(weights)):
        for tensor in tensors:
            start = int(tensor.offset)
            for stop, node in _ends(tensor, STRIPE, layout.nodes, layout.nodes):
                there = layout.ranges(file, start // PAGE * PAGE, stop)
                found += stop - start
                found -= sum(min(b, stop) - max(a, start) for a, b, on in there if on == node)
                start = stop
    return found


def _in_files(weights: Weights) -> list[list[Tensor]]:
    """Return the tensors of each file, as they are stored, by their offsets."""
    found: list[list[Tensor]] = [[] for _ in weights.parts]
    for name in weights:
        tensor = weights[name].as_stored()
        found[tensor.place_in_files[0]].append(tensor)
    return [sorted(file, key=lambda tensor: tensor.offset) for file in found]


def _stripes(
    weights: Weights, ends: Iterator[Sequence[tuple[int, int]]], nodes: Group
) -> tuple[Stripes, ...]:
    """Return the stripes of each file. ends: (end, node) of each tensor's parts, in file order."""
    return tuple(
        _at_pages([end for _ in tensors for end in next(ends)], part.file.size, nodes[0])
        for tensors, part in zip(_in_files(weights), weights.parts, strict=True)
    )


def _ends(tensor: Tensor, policy: str, nodes: Group, turns: Group) -> list[tuple[int, int]]:
    """Return (end, node) of the parts of a tensor that there is once."""
    start, stop = int(tensor.offset), int(tensor.offset + tensor.nbytes)
    if policy == STRIPE:
        _, count = unit_of(tensor, len(nodes))
        each = (stop - start) // max(1, count)
        stops = divided(count, len(nodes))[1:]
        return [(start + each * end, node) for end, node in zip(stops, nodes, strict=True)]
    if policy == INTERLEAVE:
        blocks = range(start // HUGE, -(-stop // HUGE))
        return [(min(stop, (n + 1) * HUGE), turns[n % len(turns)]) for n in blocks]
    return [(stop, int(policy.removeprefix(f"{BIND}:")))]


def check_place(place: Place, nodes: Group) -> None:
    """Check patterns and their policies. Raises: UsageError naming what is wrong."""
    for pair in place:
        if not (isinstance(pair, tuple | list) and [type(one) for one in pair] == [str, str]):
            raise UsageError(f"place: {pair!r}, expected (pattern, policy), both str")
        pattern, policy = pair
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"place {pattern!r}: {error}, expected a regular expression") from None
        bound = policy.removeprefix(f"{BIND}:") if policy.startswith(f"{BIND}:") else ""
        if policy not in (MIRROR, INTERLEAVE, STRIPE, SKIP) and bound not in map(str, nodes):
            raise UsageError(
                f"place {pattern!r}: {policy!r}, expected mirror, interleave, stripe, skip, or"
                f" bind:NODE with one of {format_list(nodes)}"
            )


def placed_by(weights: Weights, place: Place, nodes: Group, turns: Group) -> dict[Group, Layout]:
    """Return the layouts that put each tensor where the first pattern in its name says.

    turns: for what is interleaved. On one node all but "skip" is the same.
    Raises: UsageError for a tensor that no pattern matches, and where all are skipped.
    """
    patterns = [(re.compile(pattern), policy) for pattern, policy in place]
    copied: list[list[ByteRange]] = []
    once: list[list[ByteRange]] = []
    ends: list[list[tuple[int, int]]] = []
    for tensors, part in zip(_in_files(weights), weights.parts, strict=True):
        copied.append([])
        once.append([])
        for tensor in tensors:
            policy = next((p for pattern, p in patterns if pattern.search(tensor.name)), "")
            if not policy:
                raise UsageError(
                    f"place: no pattern matches tensor {tensor.name!r}: end with .*=mirror"
                )
            start, stop = tensor.offset, tensor.offset + tensor.nbytes
            span = start // PAGE * PAGE, min(part.file.size, -(-stop // PAGE) * PAGE)
            single = policy not in (MIRROR, SKIP) and len(nodes) > 1
            if policy != SKIP and span[0] < span[1]:
                (once if single else copied)[-1].append(span)
            ends.append(_ends(tensor, policy, nodes, turns) if single else [])
    only = [_apart(a, b) for a, b in zip(copied, once, strict=True)]
    found: dict[Group, Layout] = {}
    if any(copied):
        spans = tuple(spans for spans, _ in only)
        found = {(node,): Layout((node,), only=spans) for node in nodes}
    if any(once):
        stripes = _stripes(weights, iter(ends), nodes)
        found[nodes] = Layout((), stripes, tuple(spans for _, spans in only))
    if not found:
        raise UsageError("place: every tensor is skipped, expected some to be placed")
    return found


def _apart(first: Sequence[ByteRange], second: Sequence[ByteRange]) -> tuple[Spans, Spans]:
    """Join each kind's spans, and cut them where the other's begin or end.

    So a page that both have is a span of its own in both, and is read once.
    """
    joined = [_joined(first), _joined(second)]
    cuts = sorted({border for spans in joined for span in spans for border in span})

    def cut(spans: Sequence[ByteRange]) -> Spans:
        return tuple(
            piece
            for start, stop in spans
            for piece in pairwise(cuts[bisect_left(cuts, start) : bisect_right(cuts, stop)])
        )

    return cut(joined[0]), cut(joined[1])


def _joined(spans: Sequence[ByteRange]) -> list[ByteRange]:
    found: list[ByteRange] = []
    for start, stop in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(stop, found[-1][1])
        else:
            found.append((start, stop))
    return found


def are_spans(spans: Sequence[Sequence[int]], size: int) -> bool:
    """Return whether these are parts of a file of this size, as ``placed_by`` makes them."""
    ends = [0, *(end for span in spans for end in span)]
    return (
        all(type(end) is int for end in ends)
        and all(start < stop for start, stop in spans)
        and all(before <= after for before, after in pairwise(ends))
        and not any(start % PAGE or (stop % PAGE and stop != size) for start, stop in spans)
        and ends[-1] <= size
    )


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
