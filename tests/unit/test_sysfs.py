"""Constructed machines of every kind, read from their /sys."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest

from machines import EVERY_CPU, MACHINES, OFFLINE, XEON, Machine, write_proc
from numaload.errors import NumaloadWarning, UsageError
from numaload.machine.topology import Topology, topology

HERE = frozenset(os.sched_getaffinity(0))


def read(root: Path, machine: Machine, allowed: frozenset[int] = EVERY_CPU) -> Topology:
    return topology(**machine.write(root), allowed=allowed)


def written_cpus(cpus: str) -> frozenset[int]:
    """Written out, so that the reader's own parser is not its judge."""
    edges = [part.split("-") for part in cpus.split(",") if part]
    return frozenset(cpu for e in edges for cpu in range(int(e[0]), int(e[-1]) + 1))


each_machine = pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)


@each_machine
def test_nodes_are_read_as_they_were_written(machine: Machine, tmp_path: Path) -> None:
    nodes = read(tmp_path, machine).nodes
    assert list(nodes) == list(machine.nodes)
    for node, (cpus, mib) in machine.nodes.items():
        expected = written_cpus(cpus)
        assert nodes[node].cpus == nodes[node].usable_cpus == expected
        assert nodes[node].memory_total == mib << 20
        assert nodes[node].memory_free == mib << 19
        # Only CPUs sit in a socket, -1 is none, and some nodes are in several.
        sockets = {machine.sockets.get(node, 0)} - {-1} if expected else set()
        assert bool(nodes[node].packages) == bool(sockets)
        assert sockets <= set(nodes[node].packages)


@each_machine
def test_distances_belong_to_ids_not_to_columns(machine: Machine, tmp_path: Path) -> None:
    nodes = read(tmp_path, machine).nodes
    for node, row in zip(machine.nodes, machine.rows, strict=True):
        expected = dict(zip(machine.nodes, map(int, row.split()), strict=True))
        assert nodes[node].distances == expected


def without_warnings(root: Path, machine: Machine) -> Topology:
    """Of trees that have something to be told of; ``problems`` has it as well."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumaloadWarning)
        return read(root, machine)


SELECTIONS = {  # machine: (all, usable, left out of all)
    "one-node": ([0], [0], []),
    "dual-xeon": ([0, 1], [0, 1], []),
    "snc2": ([0, 1, 2, 3], [0, 1, 2, 3], []),
    "epyc-nps4": (list(range(8)), list(range(8)), []),
    "power-gpus": ([0, 8], [0, 8, *range(250, 256)], list(range(250, 256))),
    "old-power": ([0, 1, 4, 5], [0, 1, 4, 5], []),
    "cxl": ([0, 1], [0, 1, 2], [2]),
    "memory-less": ([0, 2], [0, 2], [1]),
    "memory-apart": ([2, 3], [2, 3, 4], [0, 1, 4]),
    "offline": ([1], [1], []),
    "snc2-in-order": ([0, 1, 2, 3], [0, 1, 2, 3], []),
    "epyc-nps0": ([0], [0], []),
    "epyc-nps1": ([0, 1], [0, 1], []),
    "epyc-l3-as-numa": (list(range(16)), list(range(16)), []),
    "gh200": ([0], [0, 1], list(range(1, 9))),
    "gb200": ([0, 1], [0, 1, 2, 10], [2, 10]),
    "first-memory-less": ([1], [1], [0]),
    "movable": ([0, 1], [0, 1], []),
    "largest-id": ([0, 1023], [0, 1023], []),
    "cpus-offline": ([0, 1], [0, 1], []),
    "cpuset": ([1], [1], [0]),
}


@pytest.mark.parametrize("name", MACHINES)
def test_what_all_means(name: str, tmp_path: Path) -> None:
    machine = read(tmp_path, MACHINES[name])
    assert (machine.all, machine.usable, list(machine.left_out)) == SELECTIONS[name]
    assert machine.select("all") == machine.all
    assert all(machine.left_out.values())


@pytest.mark.parametrize(
    ("name", "node", "why"),
    [
        ("power-gpus", 250, "has no CPUs"),
        ("memory-less", 1, "has no memory"),
        ("cpuset", 0, "its memory is not allowed"),
    ],
)
def test_left_out_nodes_say_why(name: str, node: int, why: str, tmp_path: Path) -> None:
    machine = read(tmp_path, MACHINES[name])
    assert why in machine.left_out[node]
    rows = {row["id"]: row["why_not"] for row in machine.to_dict()["nodes"]}
    assert why in rows[node]
    assert not any(rows[included] for included in machine.all)


@pytest.mark.parametrize(
    ("name", "cpus", "everything"),
    [
        ("dual-xeon", {16, 17}, [1]),
        ("epyc-nps4", {0, 9, 63}, [0, 1, 7]),
        ("memory-less", {5}, [2]),  # the nearest memory, though none of its own CPUs is allowed
        ("cpuset", {0, 1}, [1]),  # memory only there
    ],
)
def test_affinity_smaller_than_the_machine(
    name: str, cpus: set[int], everything: list[int], tmp_path: Path
) -> None:
    machine = read(tmp_path, MACHINES[name], frozenset(cpus))
    assert machine.cpus == cpus
    assert machine.all == everything
    assert everything[0] not in machine.left_out


def test_affinity_smaller_than_a_node(tmp_path: Path) -> None:
    machine = read(tmp_path, XEON, frozenset({1, 40}))
    assert machine.nodes[0].usable_cpus == {1, 40}
    assert len(machine.nodes[0].cpus) == 32
    assert "none of its CPUs are allowed" in machine.left_out[1]


def test_offline_row_with_a_column_per_possible_node(tmp_path: Path) -> None:
    files = {**OFFLINE.files, "node1/distance": "21 10\n"}
    machine = read(tmp_path, Machine(OFFLINE.nodes, OFFLINE.rows, files=files))
    assert machine.nodes[1].distances == {1: 10}


ODD_FILES = {
    "recorder's-nul": ("node1/cpulist", "4-7\n\0", {"cpus": [4, 5, 6, 7]}),
    "nul-in-online": ("online", "1\n\0", {"id": 1}),
    "row-of-no-known-length": ("node1/distance", "10 10 10\n", {"distances": {}}),
    "no-distances": ("node1/distance", None, {"distances": {}}),
    "no-possible": ("possible", None, {"distances": {1: 10}}),
    "no-meminfo": ("node1/meminfo", None, {"memory_total": 0, "has_memory": True}),
    "empty-cpulist": ("node1/cpulist", "", {"why_not": ""}),  # of all nodes: it is hidden
    "no-online": ("online", None, {"id": 1}),
    "folder-of-offline-node": ("node2/cpulist", "8-11\n", {"id": 1}),
    "folder-of-another-name": ("nodes/cpulist", "8-11\n", {"id": 1}),
}


@pytest.mark.parametrize(("file", "text", "changed"), ODD_FILES.values(), ids=ODD_FILES)
def test_odd_files(file: str, text: str | None, changed: dict[str, object], tmp_path: Path) -> None:
    files = {**OFFLINE.files, file: text}
    machine = Machine(OFFLINE.nodes, OFFLINE.rows, files=files)
    rows = without_warnings(tmp_path, machine).to_dict()["nodes"]
    assert len(rows) == 1
    assert {key: rows[0][key] for key in changed} == changed


@pytest.mark.parametrize("folder", [False, True], ids=["no-folder", "empty-folder"])
def test_kernel_without_numa_is_one_node(folder: bool, tmp_path: Path) -> None:
    roots = write_proc(tmp_path, 8000)
    (tmp_path / "sys/devices/system" / ("node" if folder else "cpu")).mkdir(parents=True)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        machine = topology(**roots, allowed=frozenset({2, 3}))
    # Kernels without NUMA have no such folder: an empty one was masked.
    assert len(said) == len(machine.problems) == folder
    assert machine.all == machine.usable == [0]
    assert machine.nodes[0].cpus == machine.cpus == {2, 3}
    assert machine.nodes[0].memory_total == 8000 << 20
    assert machine.nodes[0].distances == {0: 10}
    assert machine.source == f"{tmp_path}/proc/meminfo"


def test_no_proc_status_allows_all_memory(tmp_path: Path) -> None:
    roots = XEON.write(tmp_path)
    (tmp_path / "proc/self/status").unlink()
    assert topology(**roots, allowed=EVERY_CPU).usable == [0, 1]


@pytest.mark.parametrize(
    ("name", "node", "among", "nearest"),
    [
        ("snc2", 1, [0, 2, 3], 3),
        ("snc2", 1, [0, 1, 2, 3], 1),
        ("snc2", 1, [0, 2], 0),
        ("power-gpus", 253, [0, 8], 0),
        ("cxl", 2, [0, 1], 0),
        ("memory-less", 1, [0, 2], 2),
    ],
)
def test_nearest(name: str, node: int, among: list[int], nearest: int, tmp_path: Path) -> None:
    assert read(tmp_path, MACHINES[name]).nearest(node, among) == nearest


def test_unknown_distances_are_far(tmp_path: Path) -> None:
    files = {"node0/distance": None}
    machine = read(tmp_path, Machine(XEON.nodes, XEON.rows, files=files))
    assert machine.nearest(0, [0, 1]) == 0
    assert machine.nearest(0, [1]) == 1


@pytest.mark.parametrize(
    ("name", "node", "threads"),
    [("cxl", 2, 0), ("power-gpus", 255, 0), ("memory-apart", 3, 1), ("snc2", 3, 3)],
)
def test_threads_for_a_node_without_cpus(
    name: str, node: int, threads: int, tmp_path: Path
) -> None:
    assert read(tmp_path, MACHINES[name]).threads_node(node) == threads


def test_no_cpu_allowed_for_any_node(tmp_path: Path) -> None:
    machine = read(tmp_path, XEON, frozenset({999}))
    assert machine.all == []
    with pytest.raises(UsageError, match="no node is left; usable: 0-1"):
        machine.select("all")
    with pytest.raises(UsageError, match="no usable node"):
        machine.threads_node(0)


def test_nothing_usable_at_all(tmp_path: Path) -> None:
    machine = read(tmp_path, Machine(XEON.nodes, XEON.rows, mems_allowed=""))
    assert machine.all == machine.usable == []
    with pytest.raises(UsageError, match="no usable node"):
        machine.select("all")


def test_cpus_know_their_node(tmp_path: Path) -> None:
    machine = read(tmp_path, XEON)
    assert [machine.node_of_cpu(cpu) for cpu in (0, 16, 47, 48, 64)] == [0, 1, 0, 1, None]


def cpus_text(cpus: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cpus)))


def test_local_is_where_this_thread_may_run(tmp_path: Path) -> None:
    nodes = {3: (cpus_text(HERE), 1000), 5: ("900-901", 1000)}
    machine = read(tmp_path, Machine(nodes, ["10 20", "20 10"]))
    assert machine.local() == 3
    assert machine.select("local") == [3]


def test_local_memory_of_a_thread_on_a_node_without(tmp_path: Path) -> None:
    nodes = {3: (cpus_text(HERE), 0), 5: ("900-901", 1000), 7: ("902-903", 1000)}
    machine = read(tmp_path, Machine(nodes, ["10 20 15", "20 10 20", "15 20 10"]))
    assert machine.local() == 7


def test_local_of_a_thread_on_no_known_cpu(tmp_path: Path) -> None:
    nodes = {3: ("900-901", 1000), 5: ("902-903", 1000)}
    assert read(tmp_path, Machine(nodes, ["10 20", "20 10"])).local() in {3, 5}


@pytest.mark.parametrize(
    ("nodes", "selected"),
    [
        ("all", [0, 8]),
        ("0", [0]),
        (8, [8]),
        ([8, 0, 8], [0, 8]),
        ("!0", [8]),
        ("!250", [0, 8]),
        ("250-251", [250, 251]),  # memory of a GPU: only when named
    ],
)
def test_select(nodes: str | int | list[int], selected: list[int], tmp_path: Path) -> None:
    assert read(tmp_path, MACHINES["power-gpus"]).select(nodes) == selected


@pytest.mark.parametrize("nodes", ["1", 1, -1, [0, 1], [], "0-8", "!0,8", "", "both", "local,0"])
def test_select_refuses(nodes: str | int | list[int], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        read(tmp_path, MACHINES["power-gpus"]).select(nodes)


def test_this_machine() -> None:
    machine = topology()
    assert machine.all
    assert machine.cpus == HERE
    assert machine.local() in machine.usable
