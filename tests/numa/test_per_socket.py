"""Point 3: one replica per socket, interleaved over its nodes. On four nodes in two sockets."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import numaload as api
from commands import Numaload, sparse_model
from confined import DOCKER
from numaload.replicas.arena import private_memory
from numaload.replicas.layout import Layout
from witness import PAGE, by_move_pages, cpus_of

MIB = 1 << 20
SOCKETS = [(0, 1), (2, 3)]


@pytest.fixture(autouse=True)
def two_sockets() -> None:
    if api.topology().sockets != SOCKETS:
        pytest.skip("needs four nodes in two sockets")


@pytest.fixture
def small(tmp_path: Path) -> str:
    return sparse_model(tmp_path / "small.gguf", 40 * MIB)


def shares(address: int, nbytes: int) -> dict[int, float]:
    counts = by_move_pages(address, nbytes)
    return {node: pages / sum(counts.values()) for node, pages in sorted(counts.items())}


def half_each(found: dict[int, float], socket: tuple[int, ...]) -> bool:
    return set(found) == set(socket) and all(0.4 < share < 0.6 for share in found.values())


def test_what_it_costs_is_said(numaload: Numaload, small: str) -> None:
    note = "all is 4 nodes in 2 sockets: 4 copies; --per socket makes 2"
    assert note in numaload("nodes").stdout
    assert note in numaload("plan", small, status=0).stderr
    found = numaload.json("plan", small, "--per", "socket")
    assert found["builds"][0]["replicas"] == [list(socket) for socket in SOCKETS]
    assert found["nbytes"] < 2 * 41 * MIB
    per_node = [need["needed"] for need in found["needs"] if need["node"] is not None]
    assert len(per_node) == 4
    assert max(per_node) < 21 * MIB


def test_two_replicas_half_on_each_node(numaload: Numaload, small: str) -> None:
    done = numaload("mirror", small, "--per", "socket")
    assert "nodes 0-1: " in done.stdout
    assert "by node: node 0 " in done.stdout
    (row,) = numaload.json("status")["replicas"]
    assert sorted(row["replicas"]) == ["0-1", "2-3"]
    for (path,), socket in zip(row["replicas"].values(), SOCKETS, strict=True):
        memory = np.memmap(path, np.uint8, mode="r")
        assert int(memory[::PAGE].sum()) > 0
        assert half_each(shares(memory.ctypes.data, len(memory)), socket)
    assert "all checksums right" in numaload("verify").stdout


def test_views_of_a_shared_replica(numaload: Numaload, small: str) -> None:
    numaload("mirror", small, "--per", "socket")
    with api.attach(small) as mirror:
        assert mirror.nodes == [0, 1, 2, 3]
        assert mirror.report.groups == SOCKETS
        addresses = mirror.addresses("big.weight")
        assert addresses[0] == addresses[1] != addresses[2] == addresses[3]
        for node in mirror.nodes:
            with mirror.pinned(node) as view:
                assert mirror.local() is view
                assert view.workers().cpus == cpus_of(node) | cpus_of(node ^ 1)
        assert mirror.verify().right
        assert mirror.report.placements[1].asked == [0, 1]
    with api.attach(small, nodes=3) as mirror:
        assert mirror.report.groups == [(2, 3)]


def test_a_node_s_own_replica_comes_first(numaload: Numaload, small: str) -> None:
    numaload("mirror", small, "--per", "socket")
    numaload("mirror", small, "--nodes", 1)
    with api.attach(small) as mirror:
        assert mirror.view(1).nodes == (1,)
        assert mirror.view(0).nodes == (0, 1)
    numaload("verify")


def test_private_and_unbound(small: str) -> None:
    with api.mirror(small, per="socket") as mirror:
        for node, socket in ((0, SOCKETS[0]), (2, SOCKETS[1])):
            tensor = mirror.view(node)["big.weight"]
            assert tensor.node is None
            assert half_each(shares(tensor.address, tensor.nbytes), socket)


def test_pages_stay_where_threads_of_another_node_read_them() -> None:
    """While it is filled: the kernel moved all of such memory to its readers within a second."""
    balancing = Path("/proc/sys/kernel/numa_balancing").read_text()
    assert balancing.strip() == "1"  # Debian's default
    arena, cpus = private_memory()(16 * MIB, Layout((0, 1)), 0), os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, cpus_of(0))
        arena.prepare(0, 8 * MIB)
        arena.prepare(8 * MIB, 16 * MIB)
        os.sched_setaffinity(0, cpus_of(2))
        with arena.mapping.view(0, 16 * MIB) as view:
            bytes_there, end = np.frombuffer(view, np.uint8), time.monotonic() + 3
            while time.monotonic() < end:
                assert not bytes_there[::PAGE].any()
            del bytes_there
        assert by_move_pages(arena.mapping.address, 16 * MIB) == {0: 2048, 1: 2048}
    finally:
        os.sched_setaffinity(0, cpus)
        arena.close()


@pytest.mark.usefixtures("free_nodes")
def test_interleaved_by_first_touch(numaload: Numaload, small: str) -> None:
    """Where binding is refused, threads of both nodes fill every other chunk."""
    (report,) = numaload.within(deny=DOCKER).json("mirror", small, "--per", "socket")
    assert report["unbound"] == [0, 1, 2, 3]
    for node in report["asked"]:
        placement = report["placements"][str(node)]
        assert placement["elsewhere"] == 0
        assert min(placement["on"].values()) > placement["pages"] / 4


def test_page_cache_on_one_node_of_a_socket(
    numaload: Numaload, small: str, fill_with_page_cache: Callable[[int], None]
) -> None:
    """The kernel's own interleaving would take the other nodes' free pages instead."""
    fill_with_page_cache(1)
    numaload("mirror", small, "--per", "socket")
    with api.attach(small) as mirror:
        assert mirror.report.placed
        for node, socket in ((1, SOCKETS[0]), (3, SOCKETS[1])):
            tensor = mirror.view(node)["big.weight"]
            assert half_each(shares(tensor.address, tensor.nbytes), socket)


def test_part_of_a_socket(numaload: Numaload, small: str) -> None:
    done = numaload("mirror", small, "--per", "socket", "--nodes", "0-2")
    assert "to build interleaved over nodes 0-1; on node 2" in done.stderr
    numaload("verify")


def test_held_per_socket(numaload: Numaload, small: str) -> None:
    numaload("mirror", small, "--per", "socket", "--hold")
    (row,) = numaload.json("status")["replicas"]
    assert row["holder"]
    assert sorted(row["replicas"]) == ["0-1", "2-3"]
    numaload("verify")
    assert "released" in numaload("release").stdout
