"""What holds on a machine of any shape: nodes without CPUs or memory, near and far, one or many.

Ids are discovered, and what is expected is read from the kernel's files here, not by numaload.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import Numaload
from numaload.demo import write_model
from numaload.files.ways import IntoMemory
from witness import PAGE, by_move_pages, by_numa_maps, cpus_of

NODES = Path("/sys/devices/system/node")
NAME = "blk.0.attn_q.weight"
CGROUPS = Path("/sys/fs/cgroup")
MAY_GROUP = os.geteuid() == 0 and (CGROUPS / "cgroup.controllers").exists()

# What a guest was started with: {distances to others}, and per node whether it has CPUs and memory.
SHAPES = {
    "four-nodes": ({12, 32}, [(True, True)] * 4),
    "eight-nodes": ({21}, [(True, True)] * 8),
    "memory-less": ({21}, [(True, False), (True, True)]),
    "one-node": (set(), [(True, True)]),
    "cpu-less": ({21}, [(False, True), (True, True), (True, True)]),
}


def ids() -> list[int]:
    return sorted(int(path.name[4:]) for path in NODES.glob("node[0-9]*"))


def memory(node: int) -> int:
    text = (NODES / f"node{node}/meminfo").read_text()
    return int(re.findall(r"MemTotal:\s+(\d+) kB", text)[0]) << 10


def distance(node: int, other: int) -> int:
    row = (NODES / f"node{node}/distance").read_text().split()
    return int(row[ids().index(other)])


def nearest(node: int, among: list[int]) -> int:
    """The first of the nearest."""
    return min(sorted(among), key=lambda other: (distance(node, other), other))


def with_memory() -> list[int]:
    return [node for node in ids() if memory(node)]


def with_cpus() -> list[int]:
    return [node for node in ids() if cpus_of(node)]


def everything() -> list[int]:
    """Nodes that get a replica: the memory nearest to each CPU."""
    return sorted({nearest(node, with_memory()) for node in with_cpus()})


def pages_of(path: str) -> int:
    return -(-os.path.getsize(path) // PAGE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of some MB: the guest's files lie in its nodes' memory, which is small."""
    folder = tmp_path_factory.mktemp("small")
    return write_model(str(folder / "small.gguf"), 2 << 20)[0]


@pytest.fixture
def mirror(numaload: Numaload, small: str) -> Iterator[api.Mirror]:
    """What another process put into the store, on all nodes."""
    numaload("mirror", small, "--nodes", "all")
    with api.attach(small) as attached:
        assert attached.report.placed  # which maps all pages
        yield attached


def test_the_guest_is_what_it_is_called(guest: str) -> None:
    if guest not in SHAPES:
        pytest.skip(f"nothing is known of a guest called {guest}")
    distances, kinds = SHAPES[guest]
    assert sorted((bool(cpus_of(n)), bool(memory(n))) for n in ids()) == sorted(kinds)
    assert {distance(a, b) for a in ids() for b in ids() if a != b} == distances


def test_the_topology_is_the_kernel_s() -> None:
    machine = api.topology()
    assert list(machine.nodes) == ids()
    for node in machine.nodes.values():
        assert node.cpus == node.usable_cpus == cpus_of(node.id)
        assert node.memory_total == memory(node.id)
        assert node.has_memory == (memory(node.id) > 0)
        assert node.distances == {other: distance(node.id, other) for other in ids()}
    assert machine.all == everything()
    assert machine.usable == with_memory()
    assert machine.problems == ()


def test_who_is_left_out_and_why(numaload: Numaload) -> None:
    report, text = numaload.json("nodes"), numaload("nodes").stdout
    assert report["all"] == everything()
    reasons = {row["id"]: row["why_not"] for row in report["nodes"]}
    for node in ids():
        if node in everything():
            assert reasons[node] == ""
        else:
            assert reasons[node] == ("has no CPUs" if memory(node) else "has no memory")
            assert "left out of all: " + reasons[node] in text
    assert sorted(n for group in report["sockets"] for n in group) == everything()


def test_the_nearest_node_is_the_kernel_s() -> None:
    machine = api.topology()
    for node in ids():
        others = [other for other in with_memory() if other != node]
        if others:
            assert machine.nearest(node, others) == nearest(node, others)
        assert machine.threads_node(node) == nearest(node, with_cpus())


def test_every_page_of_a_mirror_is_on_its_node(mirror: api.Mirror, numaload: Numaload) -> None:
    (entry,) = numaload.json("status")["replicas"]
    assert {int(node) for node in entry["replicas"]} == set(everything())
    assert mirror.verify().right
    for node, (path,) in entry["replicas"].items():
        assert by_numa_maps("self", path) == {int(node): pages_of(path)}
        tensor = mirror.view(int(node))[NAME]
        assert set(by_move_pages(tensor.address, tensor.nbytes)) == {int(node)}


def test_every_thread_reads_the_nearest_replica(mirror: api.Mirror) -> None:
    """On a node without memory too; how near is what the kernel's distances say."""
    before = os.sched_getaffinity(0)
    for node in with_cpus():
        os.sched_setaffinity(0, cpus_of(node))
        try:
            tensor = mirror.local()[NAME]
            assert api.topology().local() == nearest(node, with_memory())
        finally:
            os.sched_setaffinity(0, before)
        found = set(by_move_pages(tensor.address, tensor.nbytes))
        assert found == {nearest(node, everything())}


def test_a_replica_is_built_by_the_nearest_cpus(
    store: Path, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if len(with_memory()) < 2:
        pytest.skip("nothing is copied within a process here")
    seen: list[set[int]] = []
    read = IntoMemory.read

    def noting(self: IntoMemory, *place: Any) -> None:
        seen.append(set(os.sched_getaffinity(0)))
        read(self, *place)

    monkeypatch.setattr(IntoMemory, "read", noting)
    for node in with_memory():
        seen.clear()
        with api.mirror(small, nodes=node) as mirror:
            assert mirror.report.kind == "private"
            tensor = mirror.view(node)[NAME]
            assert set(by_move_pages(tensor.address, tensor.nbytes)) == {node}
        assert seen
        assert all(cpus == cpus_of(nearest(node, with_cpus())) for cpus in seen)


def test_with_one_node_the_api_copies_nothing(store: Path, small: str) -> None:
    with api.mirror(small) as mirror:
        assert (mirror.report.kind == "mapped") == (len(with_memory()) == 1)
        if mirror.report.kind == "mapped":
            assert mirror.report.built == []
            assert "nothing was copied" in mirror.report.note
            assert mirror.local()[NAME].blocks.tobytes() in Path(small).read_bytes()
    assert not store.exists()


def test_the_command_line_builds_a_replica_per_node(numaload: Numaload, small: str) -> None:
    (report,) = numaload.json("mirror", small)
    assert report["kind"] == "shared"
    assert report["built"] == everything()
    assert {int(node): row["on"] for node, row in report["placements"].items()} == {
        node: {str(node): pages_of(small)} for node in everything()
    }


SEEN = """
import json, os, sys, warnings
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as libgomp does it
warnings.simplefilter("ignore")
import numaload
machine = numaload.topology()
print(json.dumps({"cpus": sorted(machine.cpus), "all": machine.all, "quota": machine.quota}))
"""


@pytest.mark.skipif(not MAY_GROUP, reason="needs root and cgroup version 2")
def test_a_pinned_main_thread_may_still_use_its_cpuset(numaload: Numaload) -> None:
    """The last node's CPUs are the cpuset, the quota is 1.5 CPUs, one CPU is left to the thread."""
    node = with_cpus()[-1]
    (CGROUPS / "cgroup.subtree_control").write_text("+cpu +cpuset")
    group = CGROUPS / "numaload-shapes"
    group.mkdir()
    try:
        (group / "cpuset.cpus").write_text(",".join(map(str, sorted(cpus_of(node)))))
        (group / "cpu.max").write_text("150000 100000")
        enter = 'echo $$ > "$0"; exec "$@"'
        line = ["sh", "-c", enter, f"{group}/cgroup.procs", sys.executable, "-c", SEEN]
        done = subprocess.run(
            line, capture_output=True, text=True, check=True, timeout=300,
            env=os.environ | {"OMP_PROC_BIND": "true"},
        )  # fmt: skip
    finally:
        group.rmdir()
    found = json.loads(done.stdout)
    assert found["cpus"] == sorted(cpus_of(node))
    assert found["all"] == [nearest(node, with_memory())]
    assert found["quota"] == 1.5
