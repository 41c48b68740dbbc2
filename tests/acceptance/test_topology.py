"""Nodes, CPUs, memory and distances from /sys, cut down to what this process may use.

Through ``numaload.topology()`` and ``numaload nodes``, with libnuma and without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import numaload
from machines import EVERY_CPU, MACHINES, Machine
from numaload.errors import UsageError

NODES = Path("/sys/devices/system/node")
HERE = frozenset(os.sched_getaffinity(0))
ONE_CPU = frozenset([min(HERE)])


def nodes(*words: str, cpus: frozenset[int] = HERE, library_path: Path | None = None) -> str:
    """What ``numaload nodes`` prints to a process that may use these CPUs."""
    environment = dict(os.environ)
    if library_path is not None:
        environment["LD_LIBRARY_PATH"] = str(library_path)
    done = subprocess.run(
        [sys.executable, "-m", "numaload", "nodes", *words],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def nodes_json(**options: Any) -> dict[str, Any]:
    return dict(json.loads(nodes("--json", **options)))


@pytest.fixture
def no_libnuma(tmp_path: Path) -> Path:
    """A folder of libraries whose libnuma cannot be loaded, whatever is installed."""
    (tmp_path / "libnuma.so.1").write_bytes(b"no library\n")
    return tmp_path


def kernel_s_nodes() -> list[int]:
    """The folders themselves; without any, the whole machine is node 0."""
    return sorted(int(path.name[4:]) for path in NODES.glob("node[0-9]*")) or [0]


def test_api_and_command_say_the_same() -> None:
    def lasting(report: dict[str, Any]) -> Any:
        moving = ("memory_free", "memory_total")  # from one moment to the next
        rows = [{k: v for k, v in row.items() if k not in moving} for row in report["nodes"]]
        return rows, report["all"], report["source"]

    api = json.loads(json.dumps(numaload.topology().to_dict()))
    assert lasting(nodes_json()) == lasting(api)


def test_every_node_of_the_kernel_is_there() -> None:
    report = nodes_json()
    assert [row["id"] for row in report["nodes"]] == kernel_s_nodes()
    for row in report["nodes"]:
        assert set(row["distances"]) == {str(node) for node in kernel_s_nodes()}
        assert row["distances"][str(row["id"])] == 10


def kernel_s_memory(node: int) -> int:
    path = NODES / f"node{node}/meminfo"
    lines = (path if path.exists() else Path("/proc/meminfo")).read_text().splitlines()
    (kib,) = (line.split()[-2] for line in lines if "MemTotal:" in line)
    return int(kib) << 10


def test_cpus_and_memory_are_the_kernel_s() -> None:
    before = {node: kernel_s_memory(node) for node in kernel_s_nodes()}
    machine = numaload.topology()
    assert {cpu for node in machine.nodes.values() for cpu in node.usable_cpus} == HERE
    for node in machine.nodes.values():
        # Some machines bring memory up while they run.
        edges = sorted([before[node.id], kernel_s_memory(node.id)])
        assert edges[0] <= node.memory_total <= edges[1]
        assert 0 <= node.memory_free <= node.memory_total


@pytest.mark.skipif(len(HERE) < 2, reason="one CPU cannot be divided")
def test_affinity_of_the_process_counts() -> None:
    report = nodes_json(cpus=ONE_CPU)
    assert [row["usable_cpus"] for row in report["nodes"] if row["usable_cpus"]] == [[min(HERE)]]
    assert {cpu for row in report["nodes"] for cpu in row["cpus"]} >= HERE
    assert len(report["all"]) == 1
    assert "more not allowed here)" in nodes(cpus=ONE_CPU)


@pytest.mark.skipif(len(HERE) < 2, reason="one CPU cannot be divided")
def test_affinity_is_the_one_at_the_start() -> None:
    """A library that pins the main thread later must not make the machine look smaller."""
    program = (
        "import json, os, numaload\n"
        "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
        "print(json.dumps(sorted(numaload.topology().cpus)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert json.loads(done.stdout) == sorted(HERE)


def test_without_libnuma_nothing_is_missing(no_libnuma: Path) -> None:
    with_it, without = nodes_json(), nodes_json(library_path=no_libnuma)
    assert without["binding"] == "system calls"
    assert without["all"] == with_it["all"]
    assert [row["cpus"] for row in without["nodes"]] == [row["cpus"] for row in with_it["nodes"]]


def test_without_libnuma_the_output_says_so(no_libnuma: Path) -> None:
    text = nodes(library_path=no_libnuma)
    assert "memory is bound by system calls used directly: libnuma.so.1 not found" in text
    assert "apt-get install libnuma1" in text
    assert "second opinion: none, libnuma.so.1 is not installed" in text


@pytest.mark.fast
def test_people_get_a_line_per_node() -> None:
    lines = nodes().splitlines()
    assert lines[0].split() == ["node", "memory", "free", "distances", "CPUs"]
    count = len(kernel_s_nodes())
    assert [int(line.split()[0]) for line in lines[1 : count + 1]] == kernel_s_nodes()
    assert any(line.startswith("all: ") for line in lines)
    assert any(line.startswith("memory is bound ") for line in lines)


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_other_machines(machine: Machine, tmp_path: Path) -> None:
    found = numaload.topology(**machine.write(tmp_path), allowed=EVERY_CPU)
    assert list(found.nodes) == list(machine.nodes)
    assert found.select("all") == found.all
    assert set(found.all) <= set(found.usable) <= set(machine.nodes)
    # Every CPU has memory to work on, and every node threads to work for it.
    for node in found.nodes.values():
        if node.usable_cpus:
            assert found.nearest(node.id, found.all) in found.all
        assert found.nodes[found.threads_node(node.id)].usable_cpus


def test_nodes_that_are_not_there_are_refused() -> None:
    absent = max(kernel_s_nodes()) + 1
    with pytest.raises(UsageError, match=f"node {absent} is not usable here"):
        numaload.topology().select(absent)
