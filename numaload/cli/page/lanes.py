"""Draw the load over time: a lane for each stage in each thread, coloured by node."""

from __future__ import annotations

from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element

from numaload.cli.doctor import seconds
from numaload.cli.output import count, rate, size
from numaload.cli.page.markup import OTHER, add, drawing, public, row, table
from numaload.report.timeline import CELLS, NO_NODE

if TYPE_CHECKING:
    from numaload.cli.page.tensors import Palette
    from numaload.report.timeline import Lane, Timeline

RATED = {"read", "copy", "hash", "convert"}  # stages that go through all their bytes
HOW = "For the timeline of a real load: NUMALOAD_TRACE=trace.json PROGRAM, then --trace trace.json."


def draw_lanes(section: Element, timeline: Timeline | None, palette: Palette) -> None:
    if timeline and timeline.source is None:
        add(section, "p", f"This is what making the report did. {HOW}")
    if timeline and timeline.odd:
        add(section, "p", f"Left out: {count(timeline.odd, 'event')} not as expected.")
    if timeline and timeline.cut:
        add(section, "p", "Left out: the last event of the file, of which not all is written.")
    if not (timeline and timeline.lanes):
        add(section, "p", "No stage was recorded.")
        return
    where = "of this report" if timeline.source is None else f"in {public(timeline.source)}"
    caption = f"Stages {where}, over {seconds(timeline.seconds)} from left to right"
    body = table(section, caption, "stage", "when it worked", kind="lanes")
    for lane in timeline.lanes:
        _, cell = row(body, public(lane.stage), public(lane.thread))
        kinds = {NO_NODE: OTHER}
        runs = [(a, b, kinds.get(node) or palette.kind(node)) for a, b, node in lane.runs]
        its = add(cell, "span", kind="k")
        drawing(its, runs, CELLS)
        add(its, "small", _told(lane))
    if timeline.others:
        text = f"{count(timeline.others, 'event')} of further stages and threads"
        add(section, "p", f"Not drawn: {text}, {seconds(timeline.others_s)} together.")


def _told(lane: Lane) -> str:
    nodes = sorted({node for *_, node in lane.runs} - {NO_NODE})
    told = [count(lane.times, "time"), seconds(lane.busy_s)]
    if lane.nbytes:
        told += [size(lane.nbytes)]
        told += [rate(lane.nbytes, lane.busy_s)] if lane.stage in RATED else []
    where = f"node {', '.join(map(str, nodes))}: " if nodes else ""
    return where + ", ".join(told)
