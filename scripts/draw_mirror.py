"""Draw docs/mirror.svg: where a model's bytes are before and after ``numaload mirror``.

draw_mirror.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

PICTURE = Path(__file__).parents[1] / "docs/mirror.svg"
WIDTH, HEIGHT = 860, 366
NODE, GAP = 186, 22  # width of a node, and between two of them
DARK, GREY, PAPER, MODEL, FAR, NEAR = (
    "#1f2933", "#7b8794", "#f5f7fa", "#9fb3c8", "#c81e1e", "#0c7a43",
)  # fmt: skip


def rect(x: float, y: float, width: float, height: float, fill: str, line: str = GREY) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} rx="4" fill="{fill}" stroke="{line}"/>'


def text(x: float, y: float, words: str, *, size: int = 13, fill: str = DARK) -> str:
    about = f'font-size="{size}" fill="{fill}" text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" {about}>{words}</text>'


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    kind = "far" if colour == FAR else "near"
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{colour}" stroke-width="2.5" marker-end="url(#{kind})"/>'


def node(x: float, number: int, held: list[tuple[float, str]]) -> list[str]:
    """Draw a node: its CPUs, and memory of which a model fills these shares from the left."""
    middle = x + NODE / 2
    parts = [
        text(middle, 74, f"NUMA node {number}", fill=GREY),
        rect(x, 84, NODE, 40, PAPER),
        text(middle, 109, "CPUs"),
        rect(x, 184, NODE, 58, PAPER),
    ]
    for share, words in held:
        parts.append(rect(x + 4, 188, (NODE - 8) * share, 50, MODEL))
        parts.append(text(x + 4 + (NODE - 8) * share / 2, 218, words))
    return [*parts, text(middle, 260, f"memory of node {number}", size=12, fill=GREY)]


def panel(x: float, title: str, shares: tuple[list[tuple[float, str]], ...]) -> list[str]:
    whole = 2 * NODE + GAP
    parts = [text(x + whole / 2, 40, title, size=16)]
    for number, held in enumerate(shares):
        parts += node(x + number * (NODE + GAP), number, held)
    parts.append(rect(x + whole / 2 - 100, 292, 200, 34, MODEL))
    return [*parts, text(x + whole / 2, 314, "model.gguf on the disk")]


def drawing() -> str:
    left, right = 18.0, 448.0
    second = left + NODE + GAP
    before = panel(
        left, "before: one copy, where it was first read", ([(0.94, "page cache: model")], [])
    )
    before += [
        arrow(left + NODE / 2, 184, left + NODE / 2, 128, NEAR),
        arrow(left + NODE - 16, 184, second + NODE / 2, 128, FAR),
        text(second + NODE / 2 + 10, 168, "every weight from far", size=12, fill=FAR),
    ]
    whole = [(1.0, "replica, proven")]
    after = panel(right, "after: a replica in each node's own memory", (whole, whole))
    for number in range(2):
        middle = right + number * (NODE + GAP) + NODE / 2
        after += [
            arrow(middle, 184, middle, 128, NEAR),
            text(middle + 44, 160, "from near", size=12, fill=NEAR),
        ]
    proof = "pages counted by the kernel, chunks compared by checksum"
    markers = "".join(
        f'<marker id="{name}" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6"'
        f' markerHeight="6" orient="auto"><path d="M0 0L10 5L0 10z" fill="{colour}"/></marker>'
        for name, colour in (("far", FAR), ("near", NEAR))
    )
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" role="img"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {view}>',
        "<title>Where a model's bytes are before and after numaload mirror</title>",
        f"<defs>{markers}</defs>",
        rect(0, 0, WIDTH, HEIGHT, "white", "white"),
        *before,
        *after,
        text(right + NODE + GAP / 2, 350, proof, size=11, fill=GREY),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    name = sys.argv[1] if len(sys.argv) > 1 else str(PICTURE)
    if name.startswith("-"):
        sys.exit(__doc__)
    Path(name).write_text(drawing(), encoding="utf-8")
