"""Pools, leases and folders on real nodes: what each node has, and what goes for room on one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload, sparse_model
from numaload.errors import NodeMemoryError
from witness import PAGE, by_move_pages

MIB = 1 << 20
NAME = "big.weight"


@pytest.fixture
def two(nodes: list[int], tmp_path: Path) -> list[str]:
    assert len(nodes) >= 2
    return [sparse_model(tmp_path / f"{name}.gguf", 4 * MIB) for name in "ab"]


def test_each_node_has_its_own_part_of_the_table(
    numaload: Numaload, two: list[str], nodes: list[int]
) -> None:
    numaload("mirror", two[0], "--pool", "lora")
    (row,) = numaload.json("store")["rows"]
    size = -(-os.path.getsize(two[0]) // PAGE) * PAGE
    assert row["nodes"] == {str(node): size for node in nodes}
    assert all(found["elsewhere"] == 0 for found in row["placements"].values())
    assert "nodes 0-1: 4.0 MiB" in numaload("store").stdout


def test_opening_a_nodes_replica(numaload: Numaload, two: list[str], nodes: list[int]) -> None:
    numaload("mirror", two[0])
    for node in nodes[:2]:
        with api.open(two[0], replica=node) as weights:
            tensor = weights[NAME]
            assert weights.node == node
            assert tensor.dequantize().sum() == 0  # touches all pages
            assert set(by_move_pages(tensor.address, tensor.nbytes)) == {node}
        folder = Path(api.store.folder(two[0], node))
        assert folder.name == f"node{node}"
        assert (folder / "a.gguf").read_bytes() == Path(two[0]).read_bytes()
        assert (folder / "b.gguf").is_symlink()


def test_a_budget_is_of_each_node(numaload: Numaload, two: list[str], nodes: list[int]) -> None:
    """What takes room on another node alone makes none here."""
    a, b = two
    api.store.budget("lora", 5 * MIB)
    first, second = nodes[:2]
    api.mirror(a, first, shared=True, pool="lora").close()
    api.mirror(b, second, shared=True, pool="lora").close()
    with api.attach(b), pytest.raises(NodeMemoryError, match=rf"pool lora on node {second}"):
        api.mirror(a, second, shared=True, pool="lora")
    with pytest.warns(api.errors.NumaloadWarning, match=r"a\.gguf: its replicas went: room for"):
        api.mirror(b, first, shared=True, pool="lora").close()
    rows = api.store.table().rows
    assert sorted((row.paths[0], *row.nodes) for row in rows) == [(b, first), (b, second)]
