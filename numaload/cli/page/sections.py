"""Write the page: what a person who helps needs first comes first."""

from __future__ import annotations

import os
import platform
import time
from collections import Counter
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from numaload._version import __version__
from numaload.cli.doctor import cost, heading, remedy, seconds
from numaload.cli.machine import gpu_line
from numaload.cli.output import count, duration, on_nodes, rate, size
from numaload.cli.page.lanes import draw_lanes
from numaload.cli.page.markup import (
    ABSENT,
    USED,
    Part,
    add,
    document,
    public,
    row,
    share,
    strip,
    table,
    written,
)
from numaload.cli.page.style import STYLE
from numaload.cli.page.tensors import Palette, TensorMap, draw_files
from numaload.cli.replicas import PLACED, where
from numaload.linux.lists import format_list

if TYPE_CHECKING:
    from numaload.doctor.check import Finding
    from numaload.machine.topology import Node
    from numaload.report.collect import Facts, Replica

MOST_DISTANCES = 16  # nodes of a matrix that is still read
TYPES = 4  # of tensors that are named


def page_of(facts: Facts, command: str) -> str:
    """Return the whole page. command: what was asked, in words for a shell."""
    found, palette = facts.diagnosis, Palette(facts.machine)
    name = public(os.path.basename(found.path or ""))
    page, body = document(f"{name}: numaload report", STYLE)
    main = add(body, "main")
    _verdict(add(main, "header"), facts, name)
    _findings(_section(main, "Findings"), facts)
    _speeds(_section(main, "Measured against possible"), facts)
    _machine(_section(main, "The machine"), facts, palette)
    where_it_is = _section(main, "Where the model is")
    draw_files(where_it_is, facts, palette)
    if facts.tensors:
        TensorMap(where_it_is, facts, palette).draw()
    draw_lanes(_section(main, "The load over time"), facts.timeline, palette)
    _asked(_section(main, "What was asked"), facts, command)
    return written(page)


def _section(main: Element, title: str) -> Element:
    section = add(main, "section")
    add(section, "h2", title)
    return section


def _verdict(header: Element, facts: Facts, name: str) -> None:
    found = facts.diagnosis
    add(header, "h1", name)
    add(header, "p", _model(facts))
    for line in heading(found)[:-1] if found.findings else heading(found):
        add(header, "p", public(line).removeprefix(f"{name}: "))
    if found.findings:
        first = found.findings[0]
        price = f", which costs {cost(first)}" if first.price else ""
        text = f"{count(len(found.findings), 'thing')} to mend, first: {first.title}{price}"
        add(header, "p", public(text), "verdict")


def _model(facts: Facts) -> str:
    """Describe the model as far as its header tells."""
    nbytes: Counter[str] = Counter()
    for tensor in facts.tensors:
        nbytes[tensor.type] += tensor.nbytes
    layers = {tensor.layer for tensor in facts.tensors} - {None}
    types = ", ".join(f"{size(n)} of {name}" for name, n in nbytes.most_common(TYPES))
    told = [
        facts.architecture,
        count(len(facts.tensors), "tensor") if facts.tensors else "",
        count(len(layers), "layer") if layers else "",
        types,
    ]
    return ", ".join(filter(None, told))


def _findings(section: Element, facts: Facts) -> None:
    found = facts.diagnosis
    if not found.findings:
        add(section, "p", f"Nothing to mend: {count(found.checked, 'check')} looked.")
    for finding in found.findings:
        _finding(add(section, "article"), finding)
    if found.unknown:
        its = add(section, "details")
        add(add(its, "summary"), "b", f"{count(len(found.unknown), 'check')} could not look")
        many = add(its, "ul")
        for one in found.unknown:
            add(many, "li", public(f"{one.id} {one.title}: {one.why}"))


def _finding(article: Element, finding: Finding) -> None:
    add(article, "h3", f"{finding.id} {finding.title}")
    rows = add(article, "dl")
    told = [("cost", cost(finding)), ("seen", finding.seen), ("why", finding.why)]
    for label, text in told:
        add(rows, "dt", label)
        add(rows, "dd", public(text))
    for label, text in (("fix", finding.fix), ("undo", finding.undo)):
        if text:
            sentence, command, remark = remedy(text, root=finding.root)
            add(rows, "dt", label)
            its = add(rows, "dd")
            if sentence:
                add(its, "p", public(sentence))
            if command:
                add(its, "code", public(command))
            if remark:
                add(its, "p", public(remark))


def _speeds(section: Element, facts: Facts) -> None:
    speeds = facts.diagnosis.speeds
    way = "past the page cache" if speeds.direct else "through the page cache"
    rows = [
        (f"the storage, {way}", "", speeds.disk),
        ("the file, page by page", "as programs read it that map it", speeds.mapped),
        ("a copy from RAM", "by one thread", speeds.warm),
    ]
    built = {(one.built_nbytes, one.built_s, one.age_s) for one in facts.replicas}
    rows += [
        (f"replicas, {size(nbytes)}", f"when they were built, {duration(age)} ago", n)
        for nbytes, took, age in sorted(built)
        if (n := nbytes / took if took else None)
    ]
    known = [(name, about, speed) for name, about, speed in rows if speed]
    if known:
        caption = f"Measured for this report: {size(speeds.nbytes)} in {seconds(speeds.seconds)}"
        body = table(section, caption, "what", "bytes a second")
        most = int(max(speed for *_, speed in known))
        for name, about, speed in known:
            _, cell = row(body, name, about)
            parts = [Part(int(speed), USED, ""), Part(most - int(speed), ABSENT, "")]
            of = speed is speeds.mapped and speeds.disk
            against = f", {share(speed, of)} of what the storage gives" if of else ""
            strip(cell, parts, said=rate(int(speed), 1) + against)
    if speeds.why_not:
        add(section, "p", public(f"Not measured: {speeds.why_not}"))


def _machine(section: Element, facts: Facts, palette: Palette) -> None:
    for line in facts.diagnosis.machine:
        add(section, "p", public(line))
    nodes, cards = facts.machine.nodes, add(section, "div", kind="cards")
    for node in nodes.values():
        _card(add(cards, "article"), node, facts, palette)
    lost = [gpu_line(gpu) for gpu in facts.gpus if gpu.node not in nodes]
    if facts.disks and not facts.disks.nodes:
        lost.append(f"the model's disk: node unknown ({facts.disks.why})")
    if lost:
        card = add(cards, "article")
        add(card, "h3", "Node unknown")
        for line in lost:
            add(card, "p", public(line))
    if 1 < len(nodes) <= MOST_DISTANCES:
        _distances(section, facts)
    for one in facts.replicas:
        add(section, "p", public(_replica(one)))
    for problem in facts.machine.problems:
        add(section, "p", public(problem))


def _card(card: Element, node: Node, facts: Facts, palette: Palette) -> None:
    """Draw a node: its CPUs, what its memory holds, and what is attached to it."""
    sockets = f", socket {format_list(node.packages)}" if node.packages else ""
    head = add(card, "h3")
    add(head, "i", kind=f"dot {palette.kind(node.id)}")
    add(head, "span", f"Node {node.id}{sockets}")
    cpus = f"CPUs {format_list(node.cpus)}" if node.cpus else ""
    add(card, "p", ": ".join(filter(None, (cpus, node.why_not))))
    if node.memory_total:
        copies = sum(one.on_nodes.get(node.id, 0) for one in facts.replicas)
        cached = sum(file.on_nodes.get(node.id, 0) for file in facts.files)
        free = min(node.memory_free, node.memory_total)
        kind, other = palette.kind(node.id), node.memory_total - free - copies - cached
        parts = [
            Part(copies, kind, "replicas of it"),
            Part(cached, f"{kind} light", "page cache of it"),
            Part(max(0, other), USED, "other"),
            Part(free, ABSENT, "free"),
        ]
        said = ", ".join(f"{part.words} {size(part.nbytes)}" for part in parts if part.nbytes)
        strip(card, parts, f"{size(node.memory_total)} of memory", said)
    else:
        add(card, "p", "memory unknown" if node.has_memory else "no memory")
    for gpu in facts.gpus:
        if gpu.node == node.id:
            add(card, "p", f"GPU {gpu.address} {gpu.id} ({gpu.driver or 'no driver'})")
    if facts.disks and node.id in facts.disks.nodes:
        add(card, "p", f"disk {', '.join(facts.disks.disks)}: the model lies on it")


def _distances(section: Element, facts: Facts) -> None:
    nodes = facts.machine.nodes
    every = sorted({d for node in nodes.values() for d in node.distances.values()})
    body = table(
        add(section, "div", kind="wide"), "Distances between nodes (10: its own memory)",
        "from", *(f"{other}" for other in nodes), kind="matrix",
    )  # fmt: skip
    for node in nodes.values():
        its = add(body, "tr")
        add(its, "th", f"node {node.id}", scope="row")
        for other in nodes:
            far = node.distances.get(other)
            level = 0 if far is None else 3 * every.index(far) // max(1, len(every) - 1)
            add(its, "td", "?" if far is None else far, f"far{level}")


def _replica(one: Replica) -> str:
    text = where(one.placement) if one.placement else f"the kernel cannot be asked: {one.error}"
    how = "" if one.bound else f", {PLACED}"
    state = "" if one.source == "unchanged" else f"; the file is {one.source} since"
    return f"Replica on {on_nodes(one.nodes)} ({one.policy}{how}): {text}{state}"


def _asked(section: Element, facts: Facts, command: str) -> None:
    found = facts.diagnosis
    versions = f"numaload {__version__}, Linux {platform.release()}"
    versions += f", Python {platform.python_version()}"
    rows = add(section, "dl")
    for label, text in (
        ("command", command),
        ("when", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.when))),
        ("files", ", ".join(file.path for file in facts.files) or found.path),
        ("with", versions),
        ("took", f"{count(found.checked, 'check')} in {seconds(found.seconds)}"),
    ):  # fmt: skip
        add(rows, "dt", label)
        add(rows, "dd", public(str(text)))
    for note in facts.notes:
        add(section, "p", public(note))
