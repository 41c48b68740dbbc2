"""Point 4 on real nodes: refused calls, cpusets, memory limits, small mounts; counted by others."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import numaload as api
from cgroups import cgroup
from commands import LIMIT_S, Numaload, evict, sparse_model, used_bytes
from confined import DOCKER, NO_NUMA
from numaload.machine.memory import node_free
from witness import PAGE, by_move_pages

MIB = 1 << 20
USER = 1000
REFUSED = pytest.mark.parametrize("deny", [DOCKER, NO_NUMA], ids=["docker", "no-numa"])


def nodes_of(path: str) -> dict[int, int]:
    """{node: pages} of a file in memory, asked of the kernel for every page."""
    memory = np.memmap(path, np.uint8, mode="r")
    assert int(memory[::PAGE].sum()) >= 0  # so that all of it is mapped here
    return by_move_pages(memory.ctypes.data, len(memory))


def replicas(numaload: Numaload) -> dict[int, list[str]]:
    (row,) = numaload.json("status")["replicas"]
    return {int(node): paths for node, paths in row["replicas"].items()}


@REFUSED
def test_placed_not_bound_on_every_node(
    numaload: Numaload, model: str, nodes: list[int], deny: str
) -> None:
    (report,) = numaload.within(deny=deny).json("mirror", model)
    assert report["unbound"] == report["built"] == nodes
    found = replicas(numaload)
    assert sorted(found) == nodes
    for node, paths in found.items():
        for path in paths:
            assert nodes_of(path) == {node: -(-os.path.getsize(path) // PAGE)}


def test_strict_refuses_before_it_plans(numaload: Numaload, model: str) -> None:
    used = used_bytes(numaload.store.parent)
    done = numaload.within(deny=DOCKER)("mirror", model, "--strict", status=1)
    assert "--cap-add SYS_NICE" in done.stderr
    assert "plan:" not in done.stderr
    assert used_bytes(numaload.store.parent) - used < MIB


def test_what_lands_elsewhere_is_rolled_back(
    numaload: Numaload, model: str, nodes: list[int]
) -> None:
    """As under ``numactl --membind`` in a container: the policy cannot be undone there."""
    used = used_bytes(numaload.store.parent)
    there = numaload.within(deny=DOCKER, membind=nodes[0])
    done = there("mirror", model, "--nodes", nodes[1], status=1)
    assert f"pages asked for on node {nodes[1]}, 0 are there" in done.stderr
    assert used_bytes(numaload.store.parent) - used < MIB
    assert numaload.json("status")["replicas"] == []
    # Where binding is allowed, it is stronger than what the process was started under.
    numaload.within(membind=nodes[0])("mirror", model, "--nodes", nodes[1], "--strict")
    numaload("verify")


def test_page_cache_leaves_no_room_for_first_touch(
    numaload: Numaload, model: str, nodes: list[int], fill_with_page_cache: Callable[[int], None]
) -> None:
    fill_with_page_cache(nodes[1])
    done = numaload.within(deny=DOCKER)("mirror", model, "--nodes", nodes[1], status=1)
    assert "page cache, which the kernel gives up only for memory that is bound" in done.stderr
    # The kernel may have given back just so much of it that building begins.
    assert "nothing was built" in done.stderr or "all of it is given back" in done.stderr
    numaload("mirror", model, "--nodes", nodes[1])


def test_a_node_without_cpus_needs_binding(numaload: Numaload, model: str) -> None:
    bare = [n.id for n in api.topology().nodes.values() if not n.cpus]
    if not bare:
        pytest.skip("every node here has CPUs")
    done = numaload.within(deny=DOCKER)("mirror", model, "--nodes", bare[0], status=1)
    assert f"only a node's own CPUs can place memory on it, and node {bare[0]}" in done.stderr


def test_prewarm_by_threads_that_run_there(
    numaload: Numaload, model_files: list[str], nodes: list[int]
) -> None:
    there = numaload.within(deny=DOCKER)
    for policy, wanted in (("bind", nodes[1:2]), ("interleave", nodes)):
        evict(model_files)
        listed = ",".join(map(str, wanted))
        report = there.json("prewarm", model_files[0], "--nodes", listed, "--policy", policy)
        assert report["done"]
        assert {int(node) for node in report["on_nodes"]} == set(wanted)


def test_a_cpuset_leaves_one_node(numaload: Numaload, model: str, nodes: list[int]) -> None:
    with cgroup({"cpuset.mems": str(nodes[1])}) as folder:
        there = numaload.within(cgroup=folder)
        text = there("nodes").stdout
        assert f"all: {nodes[1]}\n" in text
        assert "its memory is not allowed to this process (cpuset)" in text
        done = there("mirror", model, "--nodes", nodes[0], status=2)
        assert f"node {nodes[0]} is not usable here; usable: {nodes[1]}" in done.stderr
        there("mirror", model)
    assert sorted(replicas(numaload)) == [nodes[1]]


@pytest.fixture(params=[0, USER], ids=["root", "user"])
def user(request: pytest.FixtureRequest, numaload: Numaload, tmp_path: Path) -> int:
    """Whose process it is. An ordinary user gets the store, and a way to the interpreter."""
    if request.param:
        if os.geteuid() or "NUMA_VM" not in os.environ:
            pytest.skip("needs root in a virtual machine, to become another user")
        for path in (sys.base_prefix, sys.prefix, __file__, tmp_path / "model"):
            for folder in Path(path).resolve().parents:
                folder.chmod(folder.stat().st_mode | 0o5)
        os.chown(numaload.store.parent, USER, USER)
    return int(request.param)


@pytest.mark.parametrize("limit", ["memory.max", "memory.high"])
def test_a_memory_limit(
    numaload: Numaload, nodes: list[int], tmp_path: Path, limit: str, user: int
) -> None:
    big = sparse_model(tmp_path / "big.gguf", 32 * MIB)
    with cgroup({limit: str(88 * MIB)}) as folder:
        there = numaload.within(cgroup=folder, user=user)
        done = there("mirror", big, "--nodes", "all", status=1)
        assert f"({limit}): needs" in done.stderr
        assert "nothing was built" in done.stderr
        there("mirror", big, "--nodes", nodes[0])
        there("verify")
        there("release")
        events = Path(folder, "memory.events").read_text().split()
        assert events[events.index("oom_kill") + 1] == "0"


def test_the_shared_memory_of_a_container(
    numaload: Numaload, nodes: list[int], tmp_path: Path, user: int
) -> None:
    """64 MB, as docker gives; a holder is not limited by it."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a small tmpfs")
    small = tmp_path / "shm"
    small.mkdir()
    big = sparse_model(tmp_path / "big.gguf", 48 * MIB)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M,mode=1777", "small", small], check=True)
    try:
        there = type(numaload)(small / "store").within(user=user)
        done = there("mirror", big, status=1)
        assert "nothing was built" in done.stderr
        assert "--hold" in done.stderr
        assert used_bytes(small) < MIB
        there("mirror", big, "--hold")
        assert used_bytes(small) < MIB
        (row,) = there.json("status")["replicas"]
        assert set(row["placements"]) == {str(node) for node in nodes}
        there("verify")
        there("release")
    finally:
        subprocess.run(["umount", small], check=True)


HOG = """
import ctypes, mmap, sys
sys.path.insert(0, sys.argv[3])
import confined
confined._membind(int(sys.argv[1]))
memory = mmap.mmap(-1, int(sys.argv[2]))
step = 1 << 20
print("ready", flush=True)
sys.stdin.readline()
for start in range(0, len(memory), step):
    memory[start : start + step] = bytes(len(memory[start : start + step]))
print("full", flush=True)
sys.stdin.read()
"""


def test_someone_else_fills_the_node_half_way(
    numaload: Numaload, nodes: list[int], tmp_path: Path
) -> None:
    """It had room when it was planned; nobody is killed, and all of it comes back."""
    node, tests = nodes[1], os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    big = sparse_model(tmp_path / "big.gguf", 256 * MIB)
    take = (node_free(node) or 0) - 128 * MIB  # leaves less than the replica needs
    hog = subprocess.Popen(
        [sys.executable, "-c", HOG, str(node), str(take), tests], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    to_hog, from_hog = hog.stdin, hog.stdout
    assert to_hog is not None
    assert from_hog is not None
    assert from_hog.readline() == "ready\n"
    used, filled = used_bytes(numaload.store.parent), False

    def hold_up(done: int, _: int) -> None:
        nonlocal filled
        if done and not filled:
            filled = True
            to_hog.write("\n")
            to_hog.flush()
            assert from_hog.readline() == "full\n"

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NUMALOAD_STORE", str(numaload.store))
            with pytest.raises(api.errors.NodeMemoryError, match="ran out while") as caught:
                api.mirror(big, nodes=node, shared=True, progress=hold_up)
        assert caught.value.node == node
        assert used_bytes(numaload.store.parent) - used < MIB
        assert hog.poll() is None  # nobody was killed
    finally:
        hog.communicate(timeout=LIMIT_S)
    numaload("mirror", big, "--nodes", node)
