"""The map of a report, on a kernel with several nodes: page cache and replicas of each tensor."""

from __future__ import annotations

from pathlib import Path

import numaload as api
from commands import KEPT, Numaload, evict


def test_report_on_nodes_shows_where_each_tensor_is(
    model: str, model_files: list[str], numaload: Numaload, nodes: list[int], tmp_path: Path
) -> None:
    evict(model_files)
    first, last = str(nodes[0]), str(nodes[-1])
    api.prewarm(model, nodes=nodes[-1])
    numaload("mirror", model, "--nodes", first)
    numaload("mirror", model, "--policy", "stripe", "--pool", "striped")
    found = numaload.json("report", model)
    copies = {tuple(one["nodes"]): i for i, one in enumerate(found["replicas"])}
    assert set(copies) == {(nodes[0],), tuple(nodes)}
    for one in found["replicas"]:
        assert one["error"] == ""
        assert one["placement"]["elsewhere"] == 0
    cached = sum(tensor["cached"].get(last, 0) for tensor in found["tensors"])
    assert cached > KEPT * sum(tensor["nbytes"] for tensor in found["tensors"])
    striped = dict.fromkeys(map(str, nodes), 0)
    for tensor in found["tensors"]:
        assert set(tensor["cached"]) <= {last}
        assert tensor["replicas"][copies[nodes[0],]] == {first: tensor["nbytes"]}
        its = tensor["replicas"][copies[tuple(nodes)]]
        assert sum(its.values()) == tensor["nbytes"]
        striped = {node: n + its.get(node, 0) for node, n in striped.items()}
    assert max(striped.values()) < 1.5 * min(striped.values())
    numaload("report", model, "-o", tmp_path / "page.html")
    numaload("release")
    places = ["--place", "blk.0.*=stripe", "--place", ".*=mirror"]
    numaload("mirror", model, *places)
    for one in numaload.json("report", model)["replicas"]:
        assert one["placement"]["asked"] == one["nodes"]
    text = (tmp_path / "page.html").read_text()
    assert f"replica on nodes {first}-{last}: node {first} " in text
