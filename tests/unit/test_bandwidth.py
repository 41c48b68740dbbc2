"""The parts of ``bench bandwidth``: loops, the cycle, what /sys says, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import reduce
from operator import xor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from numaload.bench import bandwidth
from numaload.bench.bandwidth import (
    FIGURES,
    LATENCY,
    READ,
    WRITE,
    cache_bytes,
    measure,
    published,
)
from numaload.bench.machine import describe, hypervisor
from numaload.bench.table import bandwidth_table
from numaload.errors import NodeMemoryError, PlacementError, UsageError
from numaload.kernels.jit.loads import READ_STEP
from numaload.kernels.jit.objects import Loop
from numaload.linux.mapping import map_private
from numaload.machine.topology import topology
from witness import PAGE, by_move_pages

SIZE = 1 << 20
NODE = topology().usable[0]


@pytest.fixture(scope="module")
def report() -> bandwidth.BandwidthReport:
    return measure(size=SIZE, rounds=2)


def test_the_loop_reads_every_word() -> None:
    with map_private(SIZE) as mapping, mapping.view(write=True) as view:
        words = np.frombuffer(view, np.uint64)
        words[:] = np.random.default_rng(1).integers(0, 1 << 63, len(words), np.uint64)
        read = Loop("read")
        for count in (1, 2, SIZE // READ_STEP):
            part = words[: count * READ_STEP // 8].reshape(-1, 8)
            lanes = np.bitwise_xor.reduce(part, axis=0).tolist()
            assert read(mapping.address, count) % (1 << 64) == reduce(xor, lanes)
        del words, part


def test_the_cycle_comes_to_every_line_once() -> None:
    with ExitStack() as opened:
        there = bandwidth._NodeMemory(NODE, SIZE, opened, bound=False)
        chase, lines, at, seen = Loop("chase"), SIZE // bandwidth.LINE, there.at, set()
        for _ in range(lines):
            at = chase(at, 1)
            seen.add(at)
        assert seen == {there.at + bandwidth.LINE * i for i in range(lines)}
        assert at == there.at == chase(there.at, lines)


def test_every_pair_has_all_its_rounds_and_its_pages(report: bandwidth.BandwidthReport) -> None:
    machine = topology()
    with_cpus = [node.id for node in machine.nodes.values() if node.usable_cpus]
    assert [(pair.cpus, pair.memory) for pair in report.pairs] == [
        (row, column) for row in with_cpus for column in machine.usable
    ]
    for pair in report.pairs:
        assert pair.pages == {pair.memory: 2 * SIZE // PAGE}
        assert pair.threads == len(machine.nodes[pair.cpus].usable_cpus)
        assert {name: len(rounds) for name, rounds in pair.rounds.items()} == dict.fromkeys(
            FIGURES, 2
        )
        assert all(value > 0 for rounds in pair.rounds.values() for value in rounds)
    assert "caches" in " ".join(report.notes)


def test_rounds_that_others_disturbed_are_not_compared(report: bandwidth.BandwidthReport) -> None:
    pair = replace(report.pairs[0], rounds={name: [1.0, 2.0, 9.0] for name in FIGURES})
    pair.disturbed = {name: [] for name in FIGURES} | {READ: [2], WRITE: [0, 1, 2]}
    its = {one.name: one for one in replace(report, pairs=[pair]).series}
    assert its[f"{pair.name}, {READ}"].values == [1.0, 2.0]
    assert f"{pair.name}, {WRITE}" not in its
    assert (pair.median(READ), pair.median(WRITE), pair.median(LATENCY)) == (1.5, 2.0, 2.0)


@pytest.mark.parametrize(("hypervisor", "margin"), [("none", 0.1), ("KVM", 1.0)])
def test_bandwidth_of_a_virtual_machine_may_double_by_itself(
    report: bandwidth.BandwidthReport, hypervisor: str, margin: float
) -> None:
    pair = replace(report.pairs[0], disturbed={name: [] for name in FIGURES})
    machine = report.machine | {"hypervisor": hypervisor}
    series = replace(report, machine=machine, pairs=[pair]).series
    assert [one.margin for one in series] == [margin, margin, margin, 0.1]


def test_the_table_has_a_row_for_each_pair(report: bandwidth.BandwidthReport) -> None:
    header, rows = bandwidth_table(report)
    assert len(rows) == len(report.pairs)
    assert all(len(row) == len(header) for row in rows)
    pages = 2 * SIZE // PAGE
    assert [row[-2] for row in rows] == [f"{pages} of {pages}"] * len(rows)


def test_memory_is_where_the_kernel_says_it_is() -> None:
    with ExitStack() as opened:
        there = bandwidth._NodeMemory(NODE, SIZE, opened, bound=False)
        assert by_move_pages(there.plain, SIZE) == {NODE: SIZE // PAGE}
        there.prove("here")
        there.node = 63
        with pytest.raises(PlacementError, match="node 0 to node 63: 512 pages asked for on node"):
            there.prove("node 0 to node 63")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rounds": 0}, "rounds 0"), ({"size": 4096}, "size 4096"), ({"nodes": "77"}, "77"),
        ({"nodes": "x"}, "x"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        measure(**arguments)


def test_a_node_without_the_room_is_refused_with_figures() -> None:
    with pytest.raises(NodeMemoryError, match="has room for") as caught:
        measure(size=1 << 45)
    assert caught.value.needed > caught.value.free


def written(root: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return str(root)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 0),
        ({"cpu0/cache/index2/level": "2", "cpu0/cache/index2/size": "1024K"}, 1 << 20),
        ({"cpu0/cache/index0/level": "1", "cpu0/cache/index0/size": "48K"}, 0),
        ({"cpu0/cache/index3/level": "3", "cpu0/cache/index3/size": "huge"}, 0),
        (  # one that both share counts once
            {f"cpu{n}/cache/index3/{leaf}": text for n in (0, 1)
             for leaf, text in (("level", "3"), ("size", "32768K"), ("shared_cpu_list", "0-1"))},
            32 << 20,
        ),
    ],
    ids=["hidden", "own", "first-level", "odd", "shared"],
)  # fmt: skip
def test_cache_bytes(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    root = {f"devices/system/cpu/{name}": text for name, text in files.items()}
    assert cache_bytes([0, 1], written(tmp_path, root)) == expected


def test_what_the_firmware_publishes_is_shown(tmp_path: Path) -> None:
    base = "node1/access0/initiators"
    files = {f"{base}/read_bandwidth": "102400", f"{base}/read_latency": "90",
             f"{base}/write_latency": "none"}  # fmt: skip
    found = published([0, 1], written(tmp_path, files))
    assert found == {1: {"read_bandwidth": 102400, "read_latency": 90}}


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [
        ({}, "unknown"),
        ({1: (0, 0, 0, 0)}, "none"),
        ({1: (0, 0, 1 << 31, 0), 0x40000000: (0, *np.frombuffer(b"TCGTCGTCGTCG", "<u4"))},
         "QEMU TCG (emulated)"),
        ({1: (0, 0, 1 << 31, 0), 0x40000000: (0, *np.frombuffer(b"KVMKVMKVM\0\0\0", "<u4"))},
         "KVM"),
        ({1: (0, 0, 1 << 31, 0), 0x40000000: (0, *np.frombuffer(b"\x1b[31m\xff567890", "<u4"))},
         "\x1b[31m\ufffd567890"),
    ],
    ids=["no-cpuid", "bare-metal", "emulated", "kvm", "odd"],
)  # fmt: skip
def test_hypervisor_is_what_cpuid_says(
    monkeypatch: pytest.MonkeyPatch, leaves: dict[int, Sequence[int]], expected: str
) -> None:
    monkeypatch.setattr("numaload.bench.machine.cpuid", leaves.get)
    assert hypervisor() == expected


def test_describe_explains_a_figure() -> None:
    found = describe()
    for what in ("processor", "system", "hypervisor", "governor", "most kHz", "huge pages",
                 "in huge pages", "date", "load before", "numaload", "numpy"):  # fmt: skip
        assert found[what]
