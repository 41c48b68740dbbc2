"""Machines of every kind: what is mirrored where, who works for whom, and what people are told.

Through ``numaload.topology()`` and ``numaload nodes``, on constructed /sys trees.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import numaload
from machines import EVERY_CPU, MACHINES, NPS4, SNC2_IN_ORDER, Machine, Roots, write_block
from numaload.cli.main import main
from numaload.errors import UsageError
from numaload.linux.lists import parse_list
from numaload.machine import devices
from numaload.machine.topology import Topology

Gpus = dict[str, tuple[int | None, int | None]]
Capture = pytest.CaptureFixture[str]


class Expected(NamedTuple):
    """Lists as people write them. ``sockets``: of all that may be named, with a blank between."""

    everything: str
    named_too: str
    sockets: str
    threads: dict[int, int]  # {node: where the threads run that work for it}, unless on itself
    nearest: dict[int, int]  # {node: the nearest among ``everything``}, unless itself
    gpus: Gpus = {}  # noqa: RUF012 - {address: (node, its memory)}


EXPECTED = {
    "one-node": Expected("0", "", "0", {}, {}),
    "dual-xeon": Expected("0-1", "", "0 1", {}, {}),
    "snc2": Expected("0-3", "", "0,2 1,3", {}, {}),
    "snc2-in-order": Expected(
        "0-3", "", "0-1 2-3", {}, {},
        {"0000:16:00.0": (0, None), "0000:d8:00.0": (3, None), "0000:04:00.0": (None, None)},
    ),
    "epyc-nps0": Expected("0", "", "0", {}, {}),
    "epyc-nps1": Expected("0-1", "", "0 1", {}, {}, {"0000:c1:00.0": (1, None)}),
    "epyc-nps4": Expected("0-7", "", "0-3 4-7", {}, {}),
    "epyc-l3-as-numa": Expected("0-15", "", "0-7 8-15", {}, {}),
    # Equally far from either socket: not a part of one of them.
    "power-gpus": Expected(
        "0,8", "250-255", "0 8 250 251 252 253 254 255",
        dict.fromkeys(range(250, 256), 0), dict.fromkeys(range(250, 256), 0),
    ),
    "old-power": Expected("0-1,4-5", "", "0 1 4 5", {}, {}),
    "gh200": Expected(
        "0", "1", "0-1", dict.fromkeys(range(1, 9), 0), dict.fromkeys(range(1, 9), 0),
        {"0009:01:00.0": (0, 1)},
    ),
    "gb200": Expected(
        "0-1", "2,10", "0,2 1,10", {2: 0, 10: 1}, {2: 0, 10: 1},
        {"0008:01:00.0": (0, 2), "0018:01:00.0": (1, 10)},
    ),
    "cxl": Expected("0-1", "2", "0,2 1", {2: 0}, {2: 0}),
    "memory-less": Expected("0,2", "", "0,2", {}, {1: 2}),
    "first-memory-less": Expected("1", "", "1", {}, {0: 1}),
    "movable": Expected("0-1", "", "0 1", {}, {}),
    "largest-id": Expected("0,1023", "", "0 1023", {}, {}),
    "cpus-offline": Expected("0-1", "", "0 1", {}, {}),
    "memory-apart": Expected("2-3", "4", "2-4", {2: 0, 3: 1, 4: 0}, {0: 2, 1: 3, 4: 2}),
    "offline": Expected("1", "", "1", {}, {}),
    "cpuset": Expected("1", "", "1", {}, {0: 1}),
}  # fmt: skip
each = pytest.mark.parametrize("name", MACHINES)


def read(name: str, root: Path) -> Topology:
    return numaload.topology(**MACHINES[name].write(root), allowed=EVERY_CPU)


@each
def test_what_all_is_and_why_the_rest_is_left_out(name: str, tmp_path: Path) -> None:
    machine, expected = read(name, tmp_path), EXPECTED[name]
    assert machine.all == parse_list(expected.everything)
    assert set(machine.usable) - set(machine.all) == set(parse_list(expected.named_too))
    assert set(machine.left_out) == set(machine.nodes) - set(machine.all)
    assert all(machine.left_out.values())
    assert machine.problems == ()


@each
def test_one_replica_per_socket(name: str, tmp_path: Path) -> None:
    machine, expected = read(name, tmp_path), EXPECTED[name]
    sockets = [tuple(parse_list(text)) for text in expected.sockets.split()]
    assert machine.groups(machine.usable, "socket") == sockets
    assert machine.groups(machine.usable) == [(node,) for node in machine.usable]
    included = [tuple(n for n in group if n in machine.all) for group in sockets]
    assert machine.sockets == [group for group in included if group]
    report = machine.to_dict()
    assert report["copies"] == {"node": len(machine.all), "socket": len(machine.sockets)}
    assert report["sockets"] == [list(group) for group in machine.sockets]


def test_groups_are_of_the_nodes_asked_for(tmp_path: Path) -> None:
    machine = read("epyc-nps4", tmp_path)
    assert machine.groups([5, 1, 4, 1], "socket") == [(1,), (4, 5)]
    assert machine.groups([5, 1]) == [(1,), (5,)]
    assert machine.groups([], "socket") == []
    with pytest.raises(UsageError, match="per 'package': expected node or socket"):
        machine.groups([0], "package")


@each
def test_who_works_for_whom(name: str, tmp_path: Path) -> None:
    machine, expected = read(name, tmp_path), EXPECTED[name]
    for node in machine.nodes:
        assert machine.threads_node(node) == expected.threads.get(node, node)
        assert machine.nearest(node, machine.all) == expected.nearest.get(node, node)


def test_replicas_of_a_node_that_is_gone_are_served_by_one_that_is_not(tmp_path: Path) -> None:
    machine = read("dual-xeon", tmp_path)
    assert machine.threads_node(77) == 0
    assert machine.cpus_of([77]) == machine.nodes[0].usable_cpus


@each
def test_nearer_nodes_come_first(name: str, tmp_path: Path) -> None:
    machine = read(name, tmp_path)
    for node, here in machine.nodes.items():
        others = [other for other in machine.usable if other != node]
        if others:
            nearest = machine.nearest(node, others)
            assert here.distances[nearest] == min(here.distances[other] for other in others)


@each
def test_gpus(name: str, tmp_path: Path) -> None:
    roots = MACHINES[name].write(tmp_path)
    found: Gpus = {g.address: (g.node, g.memory_node) for g in devices.gpus(**roots)}
    assert found == EXPECTED[name].gpus


COPIES = {
    "epyc-nps4": "all is 8 nodes in 2 sockets: 8 copies; --per socket makes 2, each interleaved",
    "epyc-l3-as-numa": "all is 16 nodes in 2 sockets: 16 copies; --per socket makes 2, each",
    "snc2": "all is 4 nodes in 2 sockets: 4 copies; --per socket makes 2, each interleaved",
    "memory-less": "all is 2 nodes in 1 socket: 2 copies; --per socket makes 1, interleaved over",
    "dual-xeon": "",
    "epyc-nps0": "",
    "epyc-nps1": "",
    "old-power": "",
    "gb200": "",
}


@pytest.mark.parametrize("name", COPIES)
def test_what_all_costs_is_said(name: str, tmp_path: Path) -> None:
    note = read(name, tmp_path).copies_note
    assert note.startswith(COPIES[name])
    assert bool(note) == bool(COPIES[name])


# The command line on another machine than this one.


def on(roots: Roots, monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = partial(numaload.topology, **roots, allowed=EVERY_CPU)
    monkeypatch.setattr("numaload.machine.topology.topology", everywhere)
    monkeypatch.setattr("numaload.machine.devices.gpus", partial(devices.gpus, **roots))
    of = partial(devices.disk_of, **roots, numbers=(259, 2))
    monkeypatch.setattr("numaload.machine.devices.disk_of", of)


def nodes(machine: Machine, root: Path, patch: pytest.MonkeyPatch, *words: str) -> int:
    on(machine.write(root), patch)
    return main(["nodes", *words])


def test_people_see_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert nodes(SNC2_IN_ORDER, tmp_path, monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("GPU")] == [
        "GPU 0000:04:00.0 1a03:2000 (VGA, ast): node unknown (the firmware does not say)",
        "GPU 0000:16:00.0 10de:2330 (3D, nvidia): node 0, CPUs 0-7,32-39",
        "GPU 0000:d8:00.0 10de:2330 (3D, nvidia): node 3, CPUs 24-31,56-63",
    ]


def test_people_see_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    disk = "pci0000:00/0000:05:00.0/nvme/nvme0"
    write_block(tmp_path, "259:1", f"{disk}/nvme0n1", {"../numa_node": "1"})
    write_block(tmp_path, "259:2", f"{disk}/nvme0n1/nvme0n1p2", {"partition": "2"})
    model = tmp_path / "model.gguf"
    mount = f"30 1 259:2 / {tmp_path} rw shared:1 - xfs /dev/nvme0n1p2 rw\n"
    roots = NPS4.write(tmp_path)
    (tmp_path / "proc/self/mountinfo").write_text(mount)
    on(roots, monkeypatch)
    assert main(["nodes", str(model)]) == 0
    assert f"{model}: xfs on nvme0n1p2 (nvme0n1): node 1\n" in capsys.readouterr().out
    assert main(["nodes", "--json", str(model)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["files"] == [
        {"path": str(model), "file_system": "xfs", "device": "nvme0n1p2", "disks": ["nvme0n1"],
         "nodes": [1], "why": ""},
    ]  # fmt: skip
    assert report["copies"] == {"node": 8, "socket": 2}


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "numaload", "nodes", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)


def test_files_of_this_machine(tmp_path: Path) -> None:
    there = tmp_path / "model.gguf"
    there.touch()
    done = command("--json", str(there), "/proc/self/status")
    assert (done.returncode, done.stderr) == (0, "")
    here, proc = json.loads(done.stdout)["files"]
    device = os.stat(there).st_dev
    link = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    assert here["device"] == (link.resolve().name if link.exists() else "")
    assert here["nodes"] or here["why"]
    assert (proc["file_system"], proc["device"]) == ("proc", "")
    assert proc["why"] == "no block device: proc"
    absent = command(str(tmp_path / "absent"), str(there))
    assert absent.returncode == 1
    assert "absent: No such file or directory" in absent.stderr
    assert f"{there}: " in absent.stdout


def test_problems_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    odd = Machine(NPS4.nodes, NPS4.rows, NPS4.sockets, files={"node3/cpulist": "none\n"})
    with pytest.warns(numaload.errors.NumaloadWarning, match="'none' is no list of ids"):
        report = numaload.topology(**odd.write(tmp_path), allowed=EVERY_CPU).to_dict()
    assert [problem for problem in report["problems"] if "node3/cpulist" in problem]
    assert report["nodes"][3]["cpus"] == list(range(24, 32))  # the map beside it says the same


QUOTAS = {  # file below the group: text, and what it means
    "two": ({"a/b/cpu.max": "150000 100000\n", "a/cpu.max": "max 100000\n"}, 1.5),
    "outer-is-tighter": ({"a/b/cpu.max": "400000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
    "none": ({"a/b/cpu.max": "max 100000\n"}, None),
    "odd": ({"a/b/cpu.max": "\n", "a/cpu.max": "1 0\n"}, None),
}


@pytest.mark.parametrize(("files", "quota"), QUOTAS.values(), ids=QUOTAS)
def test_cpu_quota(
    files: dict[str, str], quota: float | None, tmp_path: Path, capsys: Capture
) -> None:
    from numaload.cli.machine import print_nodes

    roots = NPS4.write(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text("0::/a/b\n")
    (tmp_path / "sys/fs/cgroup/a/b").mkdir(parents=True)
    for name, text in files.items():
        (tmp_path / "sys/fs/cgroup" / name).write_text(text)
    machine = numaload.topology(**roots, allowed=EVERY_CPU)
    assert machine.quota == machine.to_dict()["cpu_quota"] == quota
    print_nodes(machine)
    said = f"cpu quota {quota} of 64 CPUs" in capsys.readouterr().out
    assert said == (quota is not None)


def test_cpu_quota_of_version_1(tmp_path: Path) -> None:
    roots = NPS4.write(tmp_path)
    (tmp_path / "proc/self/cgroup").write_text("5:cpuset:/\n4:cpu,cpuacct:/jobs\n0::/\n")
    folder = tmp_path / "sys/fs/cgroup/cpu/jobs"
    folder.mkdir(parents=True)
    for name, text in {"cfs_quota_us": "250000\n", "cfs_period_us": "100000\n"}.items():
        (folder / f"cpu.{name}").write_text(text)
    (folder.parent / "cpu.cfs_quota_us").write_text("-1\n")
    assert numaload.topology(**roots, allowed=EVERY_CPU).quota == 2.5
