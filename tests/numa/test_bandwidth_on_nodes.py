"""``bench bandwidth`` on real nodes: every pair, memory where the kernel says, nodes without CPUs.

What it measures means nothing in an emulated machine, and it says so.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload
from numaload.bench import bandwidth
from numaload.errors import PlacementError
from numaload.linux.mapping import MappedMemory, bind
from witness import PAGE, by_move_pages, cpus_of

SIZE = 1 << 20
NODES = Path("/sys/devices/system/node")


def ids() -> list[int]:
    return sorted(int(path.name[4:]) for path in NODES.glob("node[0-9]*"))


def with_cpus() -> list[int]:
    return [node for node in ids() if cpus_of(node)]


def with_memory() -> list[int]:
    return [
        n for n in ids() if "MemTotal:       0 kB" not in (NODES / f"node{n}/meminfo").read_text()
    ]


def test_bandwidth_of_every_pair_with_its_nodes_proved(numaload: Numaload) -> None:
    """A node without CPUs is memory only, one without memory is CPUs only."""
    report = numaload.json("bench", "bandwidth", "--size", "1M", "--rounds", 1)
    expected = [(row, column) for row in with_cpus() for column in with_memory()]
    assert [(pair["cpus"], pair["memory"]) for pair in report["pairs"]] == expected
    for pair in report["pairs"]:
        assert pair["pages"] == {str(pair["memory"]): 2 * SIZE // PAGE}
        assert pair["threads"] == len(cpus_of(pair["cpus"]))
        assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in pair["rounds"].values())
    assert report["machine"]["hypervisor"] == "QEMU TCG (emulated)"
    assert any("its speeds mean nothing" in text for text in report["notes"])


def test_bandwidth_of_one_node_is_a_row_of_the_table(numaload: Numaload) -> None:
    """Of the last node: by its own CPUs, or by the nearest where it has none."""
    node = with_memory()[-1]
    done = numaload("bench", "bandwidth", "--nodes", node, "--size", "1M", "--rounds", 1)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("node ")]
    row = api.topology().threads_node(node)
    assert line.split()[:4] == ["node", str(row), "node", str(node)]
    assert f"{2 * SIZE // PAGE} of {2 * SIZE // PAGE}" in line
    assert "its speeds mean nothing" in done.stderr


def test_bandwidth_memory_is_bound_and_on_its_node() -> None:
    for node in with_memory():
        with ExitStack() as opened:
            there = bandwidth._NodeMemory(node, SIZE, opened, bound=True)
            for mapping in there.mappings:
                assert by_move_pages(mapping.address, SIZE) == {node: SIZE // PAGE}
                lines = Path("/proc/self/numa_maps").read_text().splitlines()
                assert any(line.startswith(f"{mapping.address:x} bind:{node} ") for line in lines)


def test_bandwidth_refuses_a_pair_whose_memory_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, other = with_memory()[:2]

    def wrong(mapping: MappedMemory, nodes: Collection[int]) -> None:
        bind(mapping, [other])

    monkeypatch.setattr(bandwidth, "bind", wrong)
    with pytest.raises(
        PlacementError, match=f"node {first} to node {first}, before: .* node {first}"
    ):
        bandwidth.measure(str(first), SIZE, 1)


def test_bandwidth_refuses_a_node_without_the_room(numaload: Numaload) -> None:
    node = with_memory()[-1]
    total = api.topology().nodes[node].memory_total
    done = numaload("bench", "bandwidth", "--nodes", node, "--size", total, status=1)
    assert f"memory to measure on node {node}: needs {2 * total} bytes" in done.stderr
    assert "has room for" in done.stderr
