"""Points 4 and 9: the nodes of a real kernel, with and without libnuma, with and without CPUs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload
from witness import cpus_of


def test_nodes_are_the_kernel_s(nodes: list[int]) -> None:
    machine = api.topology()
    assert len(nodes) == 2
    for node in machine.nodes.values():
        assert node.cpus == cpus_of(node.id)
        assert node.memory_total > 400 << 20
        assert node.distances[node.id] == 10
    assert all(machine.nodes[0].distances[other] > 10 for other in machine.nodes if other != 0)


def test_how_memory_is_bound_is_said(numaload: Numaload, guest: str) -> None:
    text = numaload("nodes").stdout
    if guest == "no-libnuma":
        assert "system calls used directly" in text
        assert "apt-get install libnuma1" in text
    elif any(Path(p).exists() for p in ("/usr/lib/x86_64-linux-gnu/libnuma.so.1",)):
        assert "through libnuma.so.1" in text


def test_second_opinion(numaload: Numaload, guest: str) -> None:
    said = numaload.json("nodes")["libnuma_says"]
    if guest == "no-libnuma":
        assert said == "none, libnuma.so.1 is not installed"
    else:
        assert said == "libnuma agrees on CPUs and distances" or "py-libnuma is not" in said


def test_nodes_without_cpus_are_left_out_of_all(numaload: Numaload, model: str) -> None:
    bare = [n.id for n in api.topology().nodes.values() if not n.cpus]
    if not bare:
        pytest.skip("every node here has CPUs")
    assert f"node {bare[0]} is left out of all: has no CPUs" in numaload("nodes").stdout
    done = numaload("mirror", model, "--nodes", "all")
    assert f"node {bare[0]} is left out of all: has no CPUs" in done.stderr
    assert str(bare[0]) not in numaload.json("status")["replicas"][0]["placements"]


def test_a_node_without_cpus_can_be_named(numaload: Numaload, model: str) -> None:
    bare = [n.id for n in api.topology().nodes.values() if not n.cpus]
    if not bare:
        pytest.skip("every node here has CPUs")
    (report,) = numaload.json("mirror", model, "--nodes", bare[0])
    placement = report["placements"][str(bare[0])]
    assert placement["on"] == {str(bare[0]): placement["pages"]}


def test_affinity_smaller_than_a_node(numaload: Numaload, nodes: list[int]) -> None:
    one = min(cpus_of(nodes[1]))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {one})
    try:
        found = Numaload(numaload.store).json("nodes")  # allowed CPUs are read at the start
    finally:
        os.sched_setaffinity(0, before)
    assert found["all"] == [nodes[1]]
    assert [row["usable_cpus"] for row in found["nodes"]][nodes[1]] == [one]
