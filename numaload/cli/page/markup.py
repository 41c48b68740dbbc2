"""Build the page's elements. Text is data here: the standard library escapes it when it writes.

Every string that is shown passes ``add``, which also makes control characters visible.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from numaload.doctor.paste import redacted
from numaload.errors import printable

WIDTH = 100  # units of a strip
ABSENT, OTHER, USED = "absent", "unknown", "used"  # classes of parts beside "n0" to "n7"
# How each page begins: what does not is replaced by none.
START = '<!DOCTYPE html>\n<html lang="en"><head><meta name="generator" content="numaload">'
COLORS = 8  # of nodes; beyond, they are used again: words say which node it is


class Part(NamedTuple):
    """A part of a strip. kind: its class. words: what it is, without its share."""

    nbytes: int
    kind: str
    words: str


def add(parent: Element, tag: str, text: object = "", kind: str = "", **more: str) -> Element:
    """Append an element with this text. kind: its class."""
    attributes = more | ({"class": kind} if kind else {})
    element = SubElement(
        parent, tag, {name: printable(value) for name, value in attributes.items()}
    )
    element.text = printable(text)
    return element


@lru_cache(maxsize=4096)
def public(text: str) -> str:
    """Leave out who and where somebody is: the home folder, names of users, hosts and servers."""
    return redacted(printable(text), None)


def document(title: str, style: str) -> tuple[Element, Element]:
    """Return a page and its body, to be filled."""
    page = Element("html", {"lang": "en"})
    head = add(page, "head")
    add(head, "meta", name="generator", content="numaload")
    add(head, "meta", charset="utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    add(head, "meta", **{"http-equiv": "Content-Security-Policy", "content": policy})
    for name, content in (
        ("viewport", "width=device-width, initial-scale=1"),
        ("color-scheme", "light dark"),
        ("referrer", "no-referrer"),
    ):
        add(head, "meta", name=name, content=content)
    add(head, "title", title)
    SubElement(head, "style").text = style
    return page, add(page, "body")


def written(page: Element) -> str:
    return f"<!DOCTYPE html>\n{tostring(page, encoding='unicode', method='html')}\n"


def table(parent: Element, caption: str, *heads: str, kind: str = "") -> Element:
    """Append a table with a caption and a head; return its body."""
    whole = add(parent, "table", kind=kind)
    add(whole, "caption", caption)
    row = add(add(whole, "thead"), "tr")
    for head in heads:
        add(row, "th", head, scope="col")
    return add(whole, "tbody")


def row(body: Element, name: object, about: object = "") -> tuple[Element, Element]:
    """Append a row of two cells: a name with something about it, and what is shown of it."""
    its = add(body, "tr")
    head = add(its, "th", scope="row")
    add(head, "span", name)
    if about:
        add(head, "small", about)
    return head, add(its, "td")


def strip(parent: Element, parts: Sequence[Part], label: str = "", said: str = "") -> None:
    """Append a bar of parts beside each other, and the same in words. said: other words."""
    its = add(parent, "span", kind="k")
    bar(its, parts)
    total = sum(part.nbytes for part in parts)
    shares = (f"{part.words} {share(part.nbytes, total)}" for part in parts if part.nbytes > 0)
    said = said or ", ".join(shares) or "no bytes"
    add(its, "small", f"{label}: {said}" if label else said)


def bar(parent: Element, parts: Sequence[Part]) -> None:
    """Append parts beside each other, without words."""
    there = [part for part in parts if part.nbytes > 0]
    if len(there) == 1:
        add(parent, "i", kind=f"s {there[0].kind}")
        return
    runs, at, total = [], 0, sum(part.nbytes for part in there)
    for part in there:
        start, at = at, at + part.nbytes
        runs.append((WIDTH * start / total, WIDTH * at / total, part.kind))
    drawing(parent, runs, WIDTH)


def drawing(parent: Element, runs: Iterable[tuple[float, float, str]], width: int) -> None:
    """Append a strip of (start, end, class); what is in none of them stays empty."""
    canvas = add(
        parent, "svg", kind="s", viewBox=f"0 0 {width} 1", preserveAspectRatio="none",
        **{"aria-hidden": "true"},
    )  # fmt: skip
    paths: dict[str, list[str]] = {}
    for start, stop, kind in runs:
        paths.setdefault(kind, []).append(f"M{start:.4g} 0H{stop:.4g}V1H{start:.4g}z")
    for kind, lines in paths.items():
        SubElement(canvas, "path", {"class": kind, "d": "".join(lines)})


def share(part: float, whole: float) -> str:
    """Write a share that is never rounded to all or nothing where it is not."""
    percent = 100 * part / whole
    if 0 < percent < 100:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.3g} %"
