"""The page of a report on facts that are constructed: machines of any shape, names of anybody."""

from __future__ import annotations

import getpass
import re
import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from machines import EVERY_CPU, GB200, L3_AS_NUMA, NPS4, ONE, Machine, write_proc
from numaload.cli.page.sections import page_of
from numaload.cli.page.style import COLORS
from numaload.cli.page.tensors import MOST_ROWS
from numaload.errors import NumaloadWarning, printable
from numaload.machine.devices import FileDevice, Gpu
from numaload.machine.topology import topology
from numaload.pagecache.residency_report import FileResidency
from numaload.report.collect import TensorPlace
from numaload.report.timeline import timeline_of
from report_facts import THREE, constructed_facts, event

HOSTILE = (
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</title></style><svg onload=alert(1)>",
    "<!-- ]]> <![CDATA[ -->&lt;b&gt;&#60;b&#62;",
    "\x00\x1b[2J\u202egnp.exe\u2066\ud800",
    "javascript:alert(1) url(https://example.org/x)",
    "x" * 10_000,
)
SECTIONS = [
    "Findings",
    "Measured against possible",
    "The machine",
    "Where the model is",
    "The load over time",
    "What was asked",
]


class Page(HTMLParser):
    """What a browser makes of a page: tags, attributes, headings and text."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes = Counter[str](), set[tuple[str, str]]()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []  # (innermost tag, text)
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes |= {(name, value or "") for name, value in attrs}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data))

    def text_of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]

    @property
    def text(self) -> str:
        return "\n".join(text for _, text in self.texts)


@pytest.fixture
def page(tmp_path: Path) -> Callable[..., Page]:
    def make(shape: Machine = THREE, count: int = 40, **said: Any) -> Page:
        return Page(page_of(constructed_facts(tmp_path, shape, count, **said), "numaload"))

    return make


@pytest.mark.parametrize(
    "machine", [ONE, THREE, NPS4, L3_AS_NUMA, GB200], ids=["1", "3", "8", "16", "apart"]
)
def test_page_shows_every_node_of_a_machine(machine: Machine, page: Callable[..., Page]) -> None:
    shown = page(machine)
    assert shown.open == []
    assert shown.text_of("h2") == SECTIONS
    for node in machine.nodes:
        assert re.search(rf"^Node {node}\b", shown.text, re.MULTILINE)
    assert shown.text.count("Distances between nodes") == (len(machine.nodes) > 1)
    assert all(pci in shown.text for pci in machine.pci)


def test_page_says_what_is_not_known(page: Callable[..., Page], tmp_path: Path) -> None:
    """A container that hides /sys, a file of somebody else, a disk and a GPU without a node."""
    with pytest.warns(NumaloadWarning, match="shows no node"):
        machine = topology(**write_proc(tmp_path / "hidden", 16_000), allowed=EVERY_CPU)
    shown = page(
        machine=machine,
        tensors=[TensorPlace("t", "F32", (2,), 8, None, None, ())],
        gpus=[Gpu("0000:01:00.0", "VGA", "1:2", "", None, frozenset())],
        disks=FileDevice("/m", "overlay", "", (), (), "no block device: overlay"),
        files=[FileResidency("/m", 8, known=False)],
        replicas=[],
        timeline=None,
    )
    for said in (
        "shows no node",
        "Node unknown",
        "GPU 0000:01:00.0",
        "no block device: overlay",
        "the kernel tells only the file's owner",
        "page cache: not known",
        "No stage was recorded.",
    ):
        assert said in shown.text


def test_page_tells_of_odd_events_where_no_other_is(page: Callable[..., Page]) -> None:
    shown = page(timeline=timeline_of([event("read", -1, 1)], "/t.json"))
    assert "Left out: 1 event not as expected.\nNo stage was recorded." in shown.text


def test_page_tells_of_an_event_that_is_cut(page: Callable[..., Page]) -> None:
    shown = page(timeline=replace(timeline_of([event("read", 1, 1)], "/t.json"), cut=True))
    assert "Left out: the last event of the file, of which not all is written." in shown.text


def hostile(text: str) -> dict[str, Any]:
    """Return facts that have this text wherever a file, a kernel or a user gives one."""
    return {
        "architecture": text,
        "tensors": [TensorPlace(text, text, (2, 2), 8, 0, {0: 4}, ({0: 8}, {1: 8}))],
        "files": [FileResidency(f"/{text}", 8, 8, on_nodes={0: 8})],
        "gpus": [Gpu(text, text, text, text, 0, frozenset())],
        "disks": FileDevice(text, text, text, (text,), (0,), text),
        "timeline": timeline_of([event(text, 0, 5, text)], f"/{text}"),
        "notes": [text],
    }


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_no_name_becomes_markup(text: str, page: Callable[..., Page], tmp_path: Path) -> None:
    """The same elements and attributes as of a harmless name, and nothing hidden in the text."""
    facts = constructed_facts(tmp_path / "other", count=4, **hostile(text))
    found = facts.diagnosis.findings[0]._replace(title=text, seen=text, why=text, undo=text)
    diagnosis = replace(facts.diagnosis, path=f"/{text}", findings=(found,), machine=(text,))
    written = page_of(replace(facts, diagnosis=diagnosis), text)
    shown, harmless = Page(written), page(count=4, **hostile("x"))
    assert shown.tags.keys() <= harmless.tags.keys()
    assert {name for name, _ in shown.attributes} == {name for name, _ in harmless.attributes}
    assert not re.search(r"<script|<img|\son\w+=|\shref|\ssrc", re.sub(r">[^<]*<", "><", written))
    assert printable(text, 100)[:30] in shown.text
    assert written.replace("\n", "").isprintable()
    assert len(written) < 100_000
    written.encode()


def test_page_loads_nothing_and_runs_nothing(page: Callable[..., Page]) -> None:
    shown = page()
    assert not {"script", "link", "img", "iframe", "object", "a", "use"} & shown.tags.keys()
    assert not {"style", "href", "src", "xlink:href"} & {name for name, _ in shown.attributes}
    policies = [value for name, value in shown.attributes if "default-src" in value]
    assert policies[0].startswith("default-src 'none'; style-src 'unsafe-inline'")
    assert "url(" not in shown.text_of("style")[0]
    assert "@import" not in shown.text_of("style")[0]


def test_page_names_no_home_folder_user_or_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/zoe")
    monkeypatch.setattr(getpass, "getuser", lambda: "zoe-ann")
    monkeypatch.setattr(socket, "gethostname", lambda: "bigbox")
    timeline = timeline_of([event("/home/zoe/x.py: load", 0, 1, 1)], "/home/zoe/trace.json")
    notes = ["/mnt/zoe-ann on bigbox"]
    facts = constructed_facts(tmp_path, count=4, notes=notes, timeline=timeline)
    written = page_of(facts, "numaload report /home/zoe/m.gguf -o bigbox.html")
    for shown in (
        "~/models/DeepSeek",
        "~/trace.json",
        "~/x.py: load",
        "/mnt/USER on HOST",
        "~/m.gguf -o HOST.html",
    ):
        assert shown in written
    assert not re.search("zoe|bigbox", written)


def test_page_of_1000_tensors_is_small(tmp_path: Path) -> None:
    written = page_of(constructed_facts(tmp_path), "numaload")
    assert len(written.encode()) < 1_000_000
    shown = Page(written)
    assert sum("blk." in text for text in shown.text_of("span")) == 998
    assert "layer 20, 7.0 GiB, 33.3 % cached" in shown.text_of("b")


@pytest.mark.parametrize("layers", [1, 9_998])
def test_page_of_10000_tensors_sums_up_what_it_does_not_show(
    layers: int, page: Callable[..., Page]
) -> None:
    rows = [
        TensorPlace(f"blk.{i % layers}.t{i}", "F32", (2,), 8, i % layers, {0: 8}, ({0: 8}, {1: 8}))
        for i in range(10_000)
    ]
    shown = page(tensors=rows)
    assert "Not shown one by one" in shown.text
    assert shown.tags["tr"] < MOST_ROWS + 100
    assert len(shown.text) < 1_000_000


def luminance(color: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("dark", [False, True])
def test_colors_have_contrast(dark: bool) -> None:
    """WCAG 2.2: 4.5 to 1 of text (AA), 3 to 1 of what is drawn."""
    colors = {name: luminance(pair[dark]) for name, pair in COLORS.items()}
    for ground in ("page", "card"):
        for name, least in (("text", 4.5), ("soft", 4.5), *((f"n{i}", 3.0) for i in range(8))):
            light, low = sorted((colors[name], colors[ground]), reverse=True)
            assert (light + 0.05) / (low + 0.05) >= least, (name, ground)
