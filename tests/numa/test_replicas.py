"""Points 6, 7 and 8 on real nodes: every page of every replica on its node, by two witnesses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import numaload as api
from commands import LIMIT_S, Numaload, evict, sparse_model, used_bytes, wait_for
from witness import PAGE, by_move_pages, by_numa_maps, cpus_of, free_bytes

MIB = 1 << 20
NAME = "blk.0.attn_q.weight"
ATTACH_AND_WAIT = """
import sys, numaload
m = numaload.attach(sys.argv[1])
assert m.report.placed  # which maps all pages
print("attached", flush=True)
sys.stdin.read()
"""


def shell(*words: object) -> None:
    subprocess.run([str(word) for word in words], check=True)


def pages_of(path: str) -> int:
    return int(-(-os.path.getsize(path) // PAGE))


@pytest.fixture
def attached(numaload: Numaload, model: str) -> Iterator[subprocess.Popen[str]]:
    """A second process that has attached what the command line mirrored."""
    numaload("mirror", model, "--nodes", "all")
    job = subprocess.Popen(
        [sys.executable, "-c", ATTACH_AND_WAIT, model], env=numaload.environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "attached\n"
    yield job
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0


def test_a_second_process_has_every_page_on_its_node(
    attached: subprocess.Popen[str], numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    (entry,) = numaload.json("status")["replicas"]
    assert [int(node) for node in entry["replicas"]] == nodes
    for node, paths in entry["replicas"].items():
        for path, source in zip(paths, model_files, strict=True):
            assert by_numa_maps(attached.pid, path) == {int(node): pages_of(source)}
            assert Path(path).read_bytes() == Path(source).read_bytes()


def test_every_page_by_move_pages(numaload: Numaload, model: str, nodes: list[int]) -> None:
    numaload("mirror", model, "--nodes", "all")
    with api.attach(model) as mirror:
        assert mirror.nodes == nodes
        assert mirror.verify().right
        for node in nodes:
            for tensor in mirror.view(node).values():
                assert set(by_move_pages(tensor.address, tensor.nbytes)) == {node}
            placement = mirror.report.placements[node]
            assert placement.on == {node: placement.pages}
            assert set(placement.sampled) == {node}


def test_private_replicas(store: Path, model: str, nodes: list[int]) -> None:
    with api.mirror(model) as mirror:
        assert mirror.report.kind == "private"
        assert mirror.nodes == mirror.report.built == nodes
        assert mirror.verify().right
        addresses = mirror.addresses(NAME)
        assert len(set(addresses.values())) == len(nodes)
        views = [mirror.view(node) for node in nodes]
        for node, view in zip(nodes, views, strict=True):
            tensor = view[NAME]
            assert tensor.node == node
            assert by_move_pages(tensor.address, tensor.nbytes).keys() == {node}
        assert all(np.array_equal(views[0][n].blocks, views[1][n].blocks) for n in views[0])
    assert not store.exists()


def test_a_single_node_is_copied_when_there_are_several(model: str, nodes: list[int]) -> None:
    with api.mirror(model, nodes=nodes[1]) as mirror:
        assert mirror.nodes == [nodes[1]]
        assert mirror.verify().right


def test_pinned_threads_run_and_read_there(store: Path, model: str, nodes: list[int]) -> None:
    node, seen = nodes[1], set[int]()

    def work(mirror: api.Mirror) -> None:
        with mirror.pinned(node) as view:
            assert os.sched_getaffinity(0) == cpus_of(node)
            for _ in range(200):
                seen.add(current_cpu())
                assert int(view[NAME].blocks[0].sum()) >= 0
            assert mirror.local() is view
            address = view[NAME].address
            assert by_move_pages(address, view[NAME].nbytes).keys() == {node}
        assert os.sched_getaffinity(0) == before

    before = os.sched_getaffinity(0)
    with api.mirror(model, shared=True) as mirror:
        threads = [threading.Thread(target=work, args=(mirror,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert seen
    assert seen <= cpus_of(node)
    assert os.sched_getaffinity(0) == before


def current_cpu() -> int:
    return int(Path("/proc/thread-self/stat").read_text().rpartition(")")[2].split()[36])


def test_dequantizing_a_view_works_beside_it(
    store: Path, model: str, nodes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from numaload.machine import workers

    pools: list[workers.Workers] = []
    real = workers.Workers.ranges

    def watched(self: workers.Workers, *arguments: object) -> None:
        pools.append(self)
        real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(workers.Workers, "ranges", watched)
    with api.open(model) as weights, api.mirror(model, shared=True) as mirror:
        name = next(n for n, t in weights.items() if t.type_name == "Q8_0")
        expected = weights[name].dequantize()
        for node in nodes:
            found = mirror.view(node)[name].dequantize()
            assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
            assert pools[-1].cpus == cpus_of(node)


def test_placed_right_where_page_cache_fills_the_node(
    numaload: Numaload, model: str, nodes: list[int], fill_with_page_cache: Callable[[int], None]
) -> None:
    """The state just after reading a model: plain first touch would spill to the other node."""
    fill_with_page_cache(nodes[1])
    (report,) = numaload.json("mirror", model, "--nodes", nodes[1])
    placement = report["placements"][str(nodes[1])]
    assert placement["on"] == {str(nodes[1]): placement["pages"]}


def test_larger_than_a_node_is_refused_untouched(
    numaload: Numaload, nodes: list[int], tmp_path: Path
) -> None:
    node = api.topology().nodes[nodes[0]]
    model = sparse_model(tmp_path / "big.gguf", node.memory_total + 64 * MIB)
    machine = sum(n.memory_total for n in api.topology().nodes.values())
    assert os.path.getsize(model) < machine
    before, used = {n: free_bytes(n) for n in nodes}, used_bytes(numaload.store)
    done = numaload("mirror", model, "--nodes", nodes[0], status=1)
    assert f"node {nodes[0]}: needs" in done.stderr
    assert "nothing was built" in done.stderr
    assert used_bytes(numaload.store) - used < MIB
    assert all(before[n] - free_bytes(n) < 64 * MIB for n in nodes)
    assert numaload.json("status")["replicas"] == []
    with pytest.raises(api.errors.NodeMemoryError) as caught:
        api.mirror(model)
    assert caught.value.node in nodes
    assert caught.value.needed > caught.value.free


def test_larger_than_the_tmpfs_is_refused_untouched(
    numaload: Numaload, nodes: list[int], model_files: list[str], tmp_path: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    size = sum(map(os.path.getsize, model_files))
    small = tmp_path / "small"
    small.mkdir()
    shell("mount", "-t", "tmpfs", "-o", f"size={size + 8 * MIB}", "small", small)
    try:
        there = Numaload(small / f"numaload-{os.geteuid()}")
        done = there("mirror", model_files[0], "--nodes", "all", status=1)
        assert "tmpfs" in done.stderr
        assert "nothing was built" in done.stderr
        assert used_bytes(small) < MIB
        there("mirror", model_files[0], "--nodes", nodes[0])  # one copy does fit
        assert there("verify").returncode == 0
    finally:
        shell("umount", small)


def test_a_killed_builder_leaves_nothing(
    numaload: Numaload, nodes: list[int], model: str, tmp_path: Path
) -> None:
    big = sparse_model(tmp_path / "big.gguf", 256 * MIB)
    used = used_bytes(numaload.store.parent)
    job = numaload.start("mirror", big, "--nodes", "all")
    wait_for(lambda: used_bytes(numaload.store.parent) - used > 48 * MIB, "the build to begin")
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == -signal.SIGKILL
    wait_for(lambda: used_bytes(numaload.store.parent) - used < MIB, "memory to come back")
    assert numaload.json("status")["replicas"] == []
    (report,) = numaload.json("mirror", model)
    assert report["placed"]
    assert report["built"] == nodes


def test_nodes_mirrored_later_join(numaload: Numaload, nodes: list[int], model: str) -> None:
    numaload("mirror", model, "--nodes", nodes[0])
    (report,) = numaload.json("mirror", model, "--nodes", "all")
    assert report["built"] == [nodes[1]]
    with api.attach(model) as mirror:
        assert mirror.nodes == nodes
        assert mirror.verify().right


@pytest.mark.parametrize("policy", ["bind", "interleave"])
def test_prewarm_lands_where_asked(
    numaload: Numaload, nodes: list[int], model_files: list[str], policy: str
) -> None:
    evict(model_files)
    wanted = [nodes[1]] if policy == "bind" else nodes
    listed = ",".join(map(str, wanted))
    report = numaload.json("prewarm", model_files[0], "--nodes", listed, "--policy", policy)
    pages = sum(map(pages_of, model_files))
    assert report["done"]
    assert sum(report["on_nodes"].values()) == pages * PAGE
    assert {int(node) for node in report["on_nodes"]} == set(wanted)
    if policy == "interleave":
        shares = [report["on_nodes"][str(node)] / (pages * PAGE) for node in nodes]
        assert all(0.4 < share < 0.6 for share in shares)


def test_page_cache_on_the_wrong_node_is_reported(
    numaload: Numaload, nodes: list[int], model_files: list[str]
) -> None:
    evict(model_files)
    numaload("prewarm", model_files[0], "--nodes", nodes[0])
    done = numaload("prewarm", model_files[0], "--nodes", nodes[1], status=1)
    assert "are on other nodes" in done.stderr
    assert f"node {nodes[0]}:" in done.stdout
    for row in numaload.json("status", model_files[0])["page_cache"]:
        if row["known"]:
            assert set(row["on_nodes"]) == {str(nodes[0])}
        else:
            assert os.geteuid() not in (0, os.stat(row["path"]).st_uid)
