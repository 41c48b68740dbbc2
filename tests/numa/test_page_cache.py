"""Page cache on real nodes: which tensor is where, counted by others too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import numaload as api
from commands import Numaload
from confined import DOCKER
from numaload.numa.syscalls import MPOL_BIND, set_mempolicy
from numaload.pagecache import located
from numaload.pagecache.residency import TensorResidency
from witness import PAGE, by_move_pages

EDGES = 2 * PAGE  # bytes of a tensor that may be on pages which a neighbour brought in


def read_on(node: int, path: str, offset: int, nbytes: int) -> None:
    """Into the page cache, on this node; nothing is read ahead."""

    def read() -> None:
        set_mempolicy(MPOL_BIND, [node])
        fd = os.open(path, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(fd, nbytes, offset)) == nbytes
        os.close(fd)

    with ThreadPoolExecutor(1) as pool:  # policies are a thread's own
        pool.submit(read).result()


@pytest.fixture
def placed(model_files: list[str], nodes: list[int]) -> Iterator[dict[str, int]]:
    """{tensor: node}: one after another on another node, and every fifth nowhere."""
    with api.open(model_files[0]) as weights:
        places = [(t.name, t.path, t.offset, t.nbytes) for t in weights.values()]
    assert api.evict(model_files).done
    on = {}
    for i, (name, *place) in enumerate(places):
        if i % 5 != 4:
            on[name] = nodes[i % len(nodes)]
            read_on(on[name], *place)
    yield on
    api.evict(model_files)


def check(tensors: dict[str, TensorResidency], placed: dict[str, int]) -> None:
    for name, tensor in tensors.items():
        if name in placed:
            assert tensor.resident == tensor.nbytes
            there = tensor.on_nodes.get(placed[name], 0)
            assert there >= tensor.nbytes - EDGES - tensor.nodes_error
        else:
            assert tensor.resident <= EDGES
        assert sum(tensor.on_nodes.values()) == tensor.resident


def test_tensors_by_node(model_files: list[str], placed: dict[str, int]) -> None:
    report = api.residency(model_files[0])
    assert len(set(placed.values())) == 2
    check(report.tensors, placed)
    assert all(tensor.nodes_error == 0 for tensor in report.tensors.values())
    # As the kernel says of a mapping of ours, of each file.
    for file in report.files:
        memory = np.memmap(file.path, np.uint8, mode="r")
        with api.open(file.path) as weights:
            its = [t for t in weights.values() if t.path == file.path and t.name in placed]
            for tensor in its:
                part = memory[tensor.offset : tensor.offset + tensor.nbytes]
                assert int(part[::PAGE].sum()) >= 0  # maps it
                truth = by_move_pages(part.ctypes.data, len(part))
                found = report.tensors[tensor.name].on_nodes
                for node, pages in truth.items():
                    share = pages / sum(truth.values())
                    assert abs(found.get(node, 0) - share * tensor.nbytes) <= 1 + len(truth)


def test_nothing_is_brought_in(model_files: list[str], placed: dict[str, int]) -> None:
    before = api.residency(model_files[0])
    again = api.residency(model_files[0])
    assert before.resident == again.resident < before.size
    assert before.on_nodes == again.on_nodes
    assert set(placed) < set(before.tensors)


def test_tensors_by_node_from_samples(
    model_files: list[str], placed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(located, "SAMPLED_FROM", 0)
    report = api.residency(model_files[0])
    check(report.tensors, placed)
    for file in report.files:
        assert 0 < file.nodes_error < file.resident / 5
        assert sum(file.on_nodes.values()) == file.resident


def test_status_tells_it(
    numaload: Numaload, model_files: list[str], placed: dict[str, int]
) -> None:
    rows = numaload.json("status", model_files[0], "--tensors")["page_cache"]
    seen = 0
    for row in rows:
        assert row["how"] == "mincore"  # of Linux 6.1, which has no cachestat(2)
        for tensor in row["tensors"]:
            node = placed.get(tensor["name"])
            if node is not None:
                assert tensor["on_nodes"].get(str(node), 0) >= tensor["nbytes"] - EDGES
                seen += 1
    assert seen == len(placed)


def test_where_move_pages_is_refused_files_are_told(
    numaload: Numaload, model_files: list[str], placed: dict[str, int]
) -> None:
    done = numaload.within(deny=DOCKER)("status", model_files[0], "--tensors")
    assert "nodes are told of whole files, not of tensors" in done.stderr
    rows = numaload.within(deny=DOCKER).json("status", model_files[0], "--tensors")["page_cache"]
    usual = numaload.json("status", model_files[0])["page_cache"]
    assert [row["on_nodes"] for row in rows] == [row["on_nodes"] for row in usual]
    assert all(tensor["on_nodes"] == {} for row in rows for tensor in row["tensors"])
    assert len(placed) > 2
