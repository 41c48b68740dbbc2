"""Compare the policies for a model: what each takes of every node, what fits, and which is best."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numaload.errors import NumaUnavailableError, StoreError
from numaload.linux.lists import format_list
from numaload.machine.topology import Topology
from numaload.replicas.layout import BIND, INTERLEAVE, MIRROR, STRIPE
from numaload.replicas.mirror import MirrorOptions, plan_shared
from numaload.replicas.plan import MirrorPlan, Need, footprint, free_on
from numaload.weights import Weights

NUMBER = re.compile(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])")  # of a layer or an expert
MOST_FAMILIES = 5  # of tensors, that are named


@dataclass
class Choice:
    """One way to place the models. words: of the command; why_not: what refuses it, or "".

    nodes: {node: bytes it takes there}, of replicas that are not there yet.
    """

    words: tuple[str, ...]
    nodes: dict[int, int]
    plan: MirrorPlan | None
    why_not: str = ""

    @property
    def lacks(self) -> list[Need]:
        """Return the limits that are too small."""
        return [need for need in self.plan.needs if not need.fits] if self.plan else []

    @property
    def fits(self) -> bool:
        """Return whether it fits, if need be after others of its pool went."""
        return self.plan is not None and bool(self.plan.fits or self.plan.goes)

    def to_dict(self) -> dict[str, Any]:
        rest = {"words": self.words, "nodes": self.nodes, "why_not": self.why_not}
        return rest | {"fits": self.fits, "goes": self.plan.goes if self.plan else ()}


@dataclass
class Choices:
    """All of them, the best that fits first. Sizes are bytes.

    free: {node: what may be put there}; None where the kernel does not say. memory: all of the
    nodes together, 0 where it does not say of one. families: (names, tensors, bytes), the largest
    first; "*" stands for numbers.
    """

    paths: list[str]
    nbytes: int
    memory: int
    free: dict[int, int | None]
    families: list[tuple[str, int, int]]
    rows: list[Choice] = field(default_factory=list)

    @property
    def best(self) -> Choice | None:
        return next((row for row in self.rows if row.fits), None)

    def command(self, given: Sequence[str] = ()) -> str:
        """Return the command for the best; where nothing fits, the page cache keeps what it can.

        given: words that were said of where and how, besides the policy.
        """
        if self.best is None:
            return shlex.join(["numaload", "prewarm", *self.paths])
        return shlex.join(["numaload", "mirror", *self.paths, *self.best.words, *given])

    def to_dict(self) -> dict[str, Any]:
        rows = [row.to_dict() for row in self.rows]
        return vars(self) | {"rows": rows, "command": self.command()}


def choices(
    models: Sequence[Weights], machine: Topology, nodes: Sequence[int], **options: Any
) -> Choices:
    """Return what every policy takes of these nodes, and whether it fits. Nothing is changed.

    A replica for each node is the fastest to compute from, then one for each socket; then one for
    all nodes, in stripes before blocks in turn; then one that is far from some CPUs.
    options: of ``MirrorOptions``, as ``hold``.
    """
    free = {node: free_on(node, machine) for node in nodes}
    totals = [machine.nodes[node].memory_total for node in nodes]
    ways: list[tuple[str, str, Sequence[int]]] = [(MIRROR, "node", nodes)]
    if len(nodes) > 1:
        if len(machine.groups(nodes, "socket")) < len(nodes):
            ways.append((MIRROR, "socket", nodes))
        roomiest = max(nodes, key=lambda node: free[node] or 0)
        ways += [(STRIPE, "node", nodes), (INTERLEAVE, "node", nodes), (BIND, "node", [roomiest])]
    return Choices(
        [weights.paths[0] for weights in models],
        sum(footprint(weights.model()) for weights in models),
        sum(totals) if all(totals) else 0,
        free,
        _families(models),
        [
            _choice(models, machine, MirrorOptions.of(machine, on, per, policy, **options), words)
            for policy, per, on in ways
            for words in [_words(policy, per, on)]
        ],
    )


def _words(policy: str, per: str, nodes: Sequence[int]) -> tuple[str, ...]:
    if policy == MIRROR:
        return () if per == "node" else ("--per", per)
    return ("--policy", policy, *(("--nodes", format_list(nodes)) if policy == BIND else ()))


def _choice(
    models: Sequence[Weights], machine: Topology, options: MirrorOptions, words: tuple[str, ...]
) -> Choice:
    try:
        found = plan_shared(models, machine, options)
    except (NumaUnavailableError, StoreError) as error:
        return Choice(words, {}, None, str(error))
    taken: Counter[int] = Counter()
    for model, layouts in found.builds:
        for layout in layouts.values():
            taken.update(layout.on_nodes(model))
    return Choice(words, dict(sorted(taken.items())), found, found.why)


def _families(models: Sequence[Weights]) -> list[tuple[str, int, int]]:
    """Return the families of tensors that take the most, by names without their numbers."""
    nbytes: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for weights in models:
        for name, tensor in weights.items():
            family = NUMBER.sub("*", name)
            nbytes[family] += tensor.as_stored().nbytes
            counts[family] += 1
    return [(name, counts[name], size) for name, size in nbytes.most_common(MOST_FAMILIES)]
