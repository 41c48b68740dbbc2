"""Draw where each tensor's pages are: a strip for the page cache, and one for each replica."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from numaload.cli.output import count, on_nodes, size
from numaload.cli.page.markup import (
    ABSENT,
    COLORS,
    OTHER,
    Part,
    add,
    bar,
    public,
    row,
    share,
    strip,
    table,
)
from numaload.errors import printable
from numaload.report.collect import spread_of

if TYPE_CHECKING:
    from numaload.machine.topology import Topology
    from numaload.report.collect import Facts, Spread, TensorPlace

MOST_ROWS = 1200  # layers, and tensors one by one
MOST_FILES = 64
LONGEST_NAME, LONGEST_SHAPE = 120, 60  # characters


class Palette:
    """Which class of colour a node has."""

    def __init__(self, machine: Topology) -> None:
        self.nodes = {node: f"n{i % COLORS}" for i, node in enumerate(machine.nodes)}

    def kind(self, node: int) -> str:
        return self.nodes.get(node, OTHER)

    def parts(self, spread: Spread, nbytes: int) -> list[Part]:
        """Return the parts of a strip for so many bytes of which these are in RAM."""
        there = [
            Part(n, self.kind(node), f"node {node}" if node >= 0 else "in RAM")
            for node, n in spread.items()
        ]
        return [*there, Part(nbytes - sum(spread.values()), ABSENT, "absent")]


def draw_files(section: Element, facts: Facts, palette: Palette) -> None:
    legend = add(section, "ul", kind="legend")
    nodes = [(kind, f"node {node}") for node, kind in palette.nodes.items()]
    for kind, words in (*nodes, (ABSENT, "not in RAM")):
        its = add(legend, "li")
        add(its, "i", kind=f"dot {kind}")
        add(its, "span", words)
    body = table(section, "Files", "file", "in the page cache")
    for file in facts.files[:MOST_FILES]:
        _, cell = row(body, public(file.path), size(file.size))
        if file.known:
            strip(cell, palette.parts(spread_of(file), file.size))
        else:
            add(cell, "small", "not known: the kernel tells only the file's owner")
    if len(facts.files) > MOST_FILES:
        add(section, "p", f"and {count(len(facts.files) - MOST_FILES, 'further file')}")


class TensorMap:
    """The tensors of a model, in layers that open."""

    def __init__(self, section: Element, facts: Facts, palette: Palette) -> None:
        self.section, self.facts, self.palette = section, facts, palette

    def draw(self) -> None:
        tensors = self.facts.tensors
        layers: dict[int | None, list[TensorPlace]] = {}
        rest: list[TensorPlace] = []
        for tensor in tensors:
            layers.setdefault(tensor.layer, []).append(tensor)
        self._total("All tensors", "the model", tensors)
        order = ", ".join(name for name, _ in self._spreads(tensors[:1]))
        text = f"Each layer has these strips, in this order: {order}. A strip shows shares of the"
        text += " bytes, not where in the file they are. Replicas are drawn as they are laid out;"
        add(self.section, "p", f"{text} what the kernel counts is with the machine.")
        left = MOST_ROWS
        for layer in sorted(layers, key=lambda layer: -1 if layer is None else layer):
            its = layers[layer]
            if left:
                self._layer("not in a layer" if layer is None else f"layer {layer}", its, left)
            rest += its[left:]
            left = max(0, left - len(its) - 1)
        if rest:
            self._total("Not shown one by one", "further tensors", rest)

    def _total(self, caption: str, name: str, its: Sequence[TensorPlace]) -> None:
        body = table(self.section, caption, "what", "where its bytes are")
        about = f"{count(len(its), 'tensor')}, {size(sum(tensor.nbytes for tensor in its))}"
        self._strips(row(body, name, about)[1], its)

    def _layer(self, name: str, its: Sequence[TensorPlace], most: int) -> None:
        """Draw the strips of a layer in one line, and those of its tensors for who opens it."""
        nbytes, spreads = sum(tensor.nbytes for tensor in its), self._spreads(its)
        cached = spreads[0][1]
        there = "" if cached is None else f", {share(sum(cached.values()), nbytes or 1)} cached"
        details = add(self.section, "details")
        summary = add(details, "summary")
        add(summary, "b", f"{name}, {size(nbytes)}{there}")
        strips = add(summary, "span", kind="bars")
        for _, spread in spreads:
            if spread is not None:
                bar(strips, self.palette.parts(spread, nbytes))
        body = table(details, f"Tensors: {name}", "tensor", "where its bytes are")
        for tensor in its[:most]:
            shape = printable("x".join(map(str, tensor.shape)), LONGEST_SHAPE)
            about = f"{printable(tensor.type, LONGEST_SHAPE)} {shape}, {size(tensor.nbytes)}"
            self._strips(row(body, printable(tensor.name, LONGEST_NAME), about)[1], [tensor])

    def _strips(self, cell: Element, its: Sequence[TensorPlace]) -> None:
        cell = add(cell, "span", kind="g")
        nbytes = sum(tensor.nbytes for tensor in its)
        for name, spread in self._spreads(its):
            if spread is None:
                add(cell, "small", f"{name}: not known")
            else:
                strip(cell, self.palette.parts(spread, nbytes), name)

    def _spreads(self, its: Sequence[TensorPlace]) -> list[tuple[str, Spread | None]]:
        """Return where these tensors are together: in the page cache, and in each replica."""
        known = all(tensor.cached is not None for tensor in its)
        cached = _sum([tensor.cached or {} for tensor in its]) if known else None
        return [
            ("page cache", cached),
            *(
                (f"replica on {on_nodes(replica.nodes)}", _sum([t.replicas[i] for t in its]))
                for i, replica in enumerate(self.facts.replicas)
                if replica.source == "unchanged"  # or else the tensors may lie elsewhere in it
            ),
        ]


def _sum(spreads: Sequence[Spread]) -> Spread:
    found: Counter[int] = Counter()
    for spread in spreads:
        found.update(spread)
    return dict(sorted(found.items()))
