"""New torch tensors of a node's view lie on that node; numpy's are in tests/numa."""

from __future__ import annotations

from pathlib import Path

import pytest

import numaload as api
from commands import sparse_model
from witness import PAGE, by_move_pages

pytest.importorskip("torch")


def test_torch_results_lie_on_the_node_of_the_view(tmp_path: Path) -> None:
    path = sparse_model(tmp_path / "m.gguf", 24 << 20)
    with api.mirror(path) as mirror:
        for node in mirror.nodes:
            found = mirror.view(node)["big.weight"].torch("bfloat16")
            nbytes = found.numel() * found.element_size()
            assert by_move_pages(found.data_ptr(), nbytes) == {node: nbytes // PAGE}
