"""Page cache on real nodes: which tensor is where, counted by others too."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import numaload as api
from cgroups import cgroup
from commands import Numaload
from confined import DOCKER
from numaload.linux.syscalls import MPOL_BIND, set_mempolicy
from numaload.pagecache import residency_report
from numaload.pagecache.residency_report import TensorResidency
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
                assert int(part[::PAGE].sum()) + int(part[-1]) >= 0  # maps it
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
    monkeypatch.setattr(residency_report, "SAMPLED_FROM", 0)
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


def counted(files: list[str]) -> dict[int, int]:
    """{node: pages} of the page cache, as move_pages says of mappings made here."""
    total: Counter[int] = Counter()
    for path in files:
        memory = np.memmap(path, np.uint8, mode="r")
        assert int(memory[::PAGE].sum()) >= 0  # maps it
        total.update(by_move_pages(memory.ctypes.data, len(memory)))
    return dict(total)


def test_pages_on_the_wrong_node_are_told_and_moved(
    numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    assert api.evict(model_files).done
    first, second = nodes[:2]
    size = sum(map(os.path.getsize, model_files))
    assert numaload.json("prewarm", model_files[0], "--nodes", first)["done"]
    wrong = numaload("prewarm", model_files[0], "--nodes", second, status=1)
    assert "are on other nodes" in wrong.stderr
    assert "--move" in wrong.stderr
    moved = numaload.json("prewarm", model_files[0], "--nodes", second, "--move")
    assert moved["moved"] >= size
    assert moved["read"] == moved["elsewhere"] == 0
    assert moved["unmoved"] == {}
    assert moved["done"]
    assert set(counted(model_files)) == {second}


def test_what_others_map_cannot_be_moved(
    numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    assert api.evict(model_files).done
    first, second = nodes[:2]
    numaload("prewarm", model_files[0], "--nodes", first)
    assert set(counted(model_files)) == {first}
    memory = np.memmap(model_files[0], np.uint8, mode="r")
    assert int(memory[::PAGE].sum()) >= 0  # and keeps it mapped
    report = numaload.json("prewarm", model_files[0], "--nodes", second, "--move", status=1)
    assert report["elsewhere"] >= len(memory) - PAGE
    assert sum(report["unmoved"].values()) >= len(memory) - PAGE
    assert not report["done"]


def test_some_layers_on_a_node(
    numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    """Their header too, which is read first, wherever that thread runs: so on each node."""
    for node in nodes:
        assert api.evict(model_files).done
        report = numaload.json("prewarm", model_files[0], "--layers", "0", "--nodes", node)
        assert report["done"]
        assert list(report["on_nodes"]) == [str(node)]
        found = report["on_nodes"][str(node)]
        assert report["size"] <= found < sum(map(os.path.getsize, model_files))


@pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
def test_it_stops_before_it_pushes_out_its_own_head(
    numaload: Numaload, model_files: list[str], limit: str
) -> None:
    """A group's memory is too small for the file: it is refused, or forced as far as it goes."""
    filler = os.path.join(os.path.dirname(model_files[0]), "filler")
    api.evict(filler)
    with cgroup({limit: str(400 << 20)}) as folder:
        there = numaload.within(cgroup=folder)
        refused = there("prewarm", filler, status=1)
        assert limit in refused.stderr
        assert "--force" in refused.stderr
        assert api.residency(filler).resident < 16 << 20
        report = there.json("prewarm", filler, "--force", status=1)
        events = Path(folder, "memory.events").read_text().split()
        assert events[events.index("oom_kill") + 1] == "0"
        assert report["stopped"]
        assert 64 << 20 < report["read"] < 400 << 20
        # All that was read is still there: that is what it stopped for.
        assert api.residency(filler).resident >= 0.9 * report["read"]
    api.evict(filler)


def test_processes_on_other_nodes_wait_and_then_look(
    numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    """Each byte is read once, and whoever wanted it elsewhere is told where it is."""
    assert api.evict(model_files).done
    jobs = [numaload.start("prewarm", model_files[0], "--nodes", n, "--json") for n in nodes[:2]]
    outputs = [job.communicate(timeout=300)[0] for job in jobs]
    reports = [json.loads(text) for text in outputs]
    size = sum(map(os.path.getsize, model_files))
    assert sum(report["read"] for report in reports) < 1.1 * size
    assert sorted(job.returncode for job in jobs) == [0, 1]
