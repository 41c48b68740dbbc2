"""Where replicas are, in words, as ``mirror``, ``status`` and ``verify`` print them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from numaload.cli.output import size

PLACED = "placed, not bound"
ALLOW = (
    "memory may move later; in a container, --cap-add SYS_NICE (or seccomp=unconfined) allows"
    " binding"
)


def node_list(nodes: Iterable[int]) -> str:
    from numaload.numa.lists import format_list

    return format_list(nodes)


def by_replica(placements: Any) -> list[tuple[str, Any]]:
    """[(nodes, their placement)]: nodes that share a replica once."""
    nodes: dict[int, list[int]] = {}
    for node, placement in placements.items():
        nodes.setdefault(id(placement), []).append(node)
    return [(node_list(them), placements[them[0]]) for them in nodes.values()]


def where(placement: Any) -> str:
    share = 100 * placement.placed / max(placement.pages, 1)
    sample = sum(placement.sampled.values())
    witness = f"move_pages agrees on {sample} pages" if sample else "move_pages was not asked"
    others = {n: c for n, c in placement.on.items() if n not in placement.asked}
    text = f"{placement.placed} of {placement.pages} pages there ({share:.4g} %), {witness}"
    huge = f", {size(placement.huge_pages)} in huge pages"
    if len(placement.asked) > 1:
        huge += f", interleaved: {_shares(placement)}"
    return text + huge + (f"; ELSEWHERE by node: {others}" if others else "")


def _shares(placement: Any) -> str:
    return ", ".join(
        f"node {n} {100 * placement.on.get(n, 0) / max(placement.pages, 1):.3g} %"
        for n in placement.asked
    )
