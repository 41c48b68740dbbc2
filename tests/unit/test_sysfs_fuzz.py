"""Damaged trees: whatever is in /sys, the machine is read, and what was odd is said."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machines import CXL, EVERY_CPU, GB200, MEMORYLESS, Machine, Pci, Roots, write_block
from numaload.cli.machine import file_line, gpu_line, print_nodes
from numaload.errors import UsageError
from numaload.machine.devices import disk_of, gpus
from numaload.machine.topology import Topology, topology

pytestmark = pytest.mark.slow  # trees are written and read again and again

SMALL = Machine(
    {0: ("0-1", 1000), 2: ("2-3", 1000), 5: ("", 500)},
    ["10 20 30", "20 10 15", "30 15 10"],
    sockets={0: 0, 2: 1},
    mems_allowed="0-5",
    pci={"0000:01:00.0": Pci("0x030200", 2, "2-3", "nvidia", memory_node=5)},
)
NVME = "pci0000:00/0000:05:00.0/nvme/nvme0"
WORDS = ["", "\0", "x", "-1", "-", "0-", "3-1", "0-99999999", "9" * 5000, "1" * 70000, "0x1f",
         "\u0663", "\udcff", "10 20", "10 20 30 40", "0-3", "5", "1023", "65535", "65536", "max",
         "ffffffff,ffffffff", "zz", "Node 0 MemTotal: x kB", f"Node 0 MemTotal: {'8' * 5000} kB",
         "Node 0 MemTotal: 1000 kB", "\n\n\n", "Mems_allowed_list:\tall", "Mems_allowed_list:\t",
         "0::/../../..", "::::", "4:cpu:", "1 2 3:4 / / - - -", "36 35 8:1 / / rw - ext4",
         "Node: 7", "Node: 0/", "0x030200", "-9223372036854775808"]  # fmt: skip
TEXTS = st.one_of(st.sampled_from(WORDS), st.text("0123456789-, \n:x\0", max_size=30))
# What is done to one file: None takes it away, False puts a folder there.
DAMAGE = st.lists(
    st.tuples(st.integers(0, 10_000), st.one_of(st.none(), st.just(False), TEXTS)),
    min_size=1, max_size=8,
)  # fmt: skip


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tree(root: Path) -> Roots:
    write_block(root, "8:1", f"{NVME}/nvme0n1/nvme0n1p1", {"partition": "1"})
    slaves = [f"{NVME}/nvme0n1/nvme0n1p1"]
    write_block(root, "8:0", f"{NVME}/nvme0n1", {"../numa_node": "1"})
    write_block(root, "253:0", "virtual/block/dm-0", slaves=slaves)
    (root / "sys/fs/cgroup/a").mkdir(parents=True)
    (root / "sys/fs/cgroup/a/cpu.max").write_text("100000 50000\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("0::/a\n")
    (root / "proc/self/mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n")
    return SMALL.write(root)


def damage(root: Path, changes: list[tuple[int, str | bool | None]]) -> None:
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    for number, text in changes:
        path = files[number % len(files)]
        if path.is_dir():
            continue
        path.unlink(missing_ok=True)
        if isinstance(text, str):
            path.write_bytes(text.encode(errors="surrogateescape"))
        elif text is False:
            path.mkdir()


def holds_together(machine: Topology) -> None:
    assert set(machine.all) <= set(machine.usable) <= set(machine.nodes)
    assert machine.nodes
    assert set(machine.left_out) == set(machine.nodes) - set(machine.all)
    assert sorted(n for group in machine.sockets for n in group) == machine.all
    for node in machine.nodes.values():
        assert node.usable_cpus <= node.cpus
    for words in ("all", "0", "local"):
        with contextlib.suppress(UsageError):
            assert set(machine.select(words)) <= set(machine.usable)
    json.dumps(machine.to_dict(), allow_nan=False)
    print_nodes(machine)


@settings(max_examples=150, deadline=None)
@given(DAMAGE)
def test_damaged_trees_are_read(changes: list[tuple[int, str | bool | None]]) -> None:
    root = Path(tempfile.mkdtemp(prefix="numaload-fuzz-", dir="/dev/shm"))
    try:
        roots = tree(root)
        damage(root, changes)
        with quietly():
            holds_together(topology(**roots, allowed=EVERY_CPU))
            for card in gpus(**roots):
                assert card.node is None or card.node >= 0
                gpu_line(card)
            for numbers in ((8, 0), (8, 1), (253, 0), (0, 5)):
                found = disk_of("/some/file", **roots, numbers=numbers)
                assert found.nodes or found.why
                file_line(found)
    finally:
        shutil.rmtree(root)


MISREAD = {  # file: (text, or False for a folder; what is said of it)
    "node0/cpulist": ("none", "'none' is no list of ids: taken as absent"),
    "node0/meminfo": (False, "no MemTotal for node 0: it has memory, how much is unknown"),
    "node2/distance": ("10 ten 20", "'10 ten 20' are no numbers: taken as absent"),
    "node0/distance": ("10 20", "2 numbers for 3 nodes: taken as unknown"),
    "node2/cpulist": (False, "Is a directory: taken as absent"),
    "has_memory": ("0-x", "'0-x' is no list of ids: taken as absent"),
    "online": ("7", "names no node that has a folder: every folder was taken"),
    "possible": ("all", "'all' is no list of ids: taken as absent"),
    "../../../../proc/self/status": ("Mems_allowed_list:\t?", "is no list of ids: taken as absent"),
}


@pytest.mark.parametrize("name", MISREAD)
def test_what_is_odd_is_named(name: str, tmp_path: Path) -> None:
    text, said = MISREAD[name]
    roots = tree(tmp_path)
    path = tmp_path / "sys/devices/system/node" / name
    path.unlink()
    if text is False:
        path.mkdir()
    else:
        path.write_text(f"{text}\n")
    with quietly():
        machine = topology(**roots, allowed=EVERY_CPU)
    (problem,) = [p for p in machine.problems if said in p]
    assert name.rpartition("/")[2] in problem
    assert list(machine.nodes) == [0, 2, 5]
    # The rest of the node is still good.
    assert machine.nodes[0].cpus == {0, 1}
    assert 0 in machine.all


def test_masked_nodes_are_one_and_said(tmp_path: Path) -> None:
    roots = tree(tmp_path)
    shutil.rmtree(tmp_path / "sys/devices/system/node")
    (tmp_path / "sys/devices/system/node").mkdir()
    (tmp_path / "sys/devices/system/cpu/online").write_text("0-2\n")
    with pytest.warns(UserWarning, match="shows no node: the whole machine is taken as one"):
        machine = topology(**roots, allowed=frozenset({1, 2, 3}))
    assert machine.all == [0]
    assert machine.cpus == {1, 2}  # CPU 3 is offline


@pytest.mark.parametrize("machine", [CXL, MEMORYLESS, GB200], ids=["cxl", "memory-less", "gb200"])
def test_nodes_go_while_they_are_read(machine: Machine, tmp_path: Path) -> None:
    """Each is there as a whole or not at all, and the others stay."""
    roots, away = machine.write(tmp_path), tmp_path / "away"
    last = max(machine.nodes)
    folder = tmp_path / f"sys/devices/system/node/node{last}"
    begin = time.monotonic()
    with quietly():
        whole = topology(**roots, allowed=EVERY_CPU).nodes[last]
    takes = time.monotonic() - begin
    for i in range(200):
        thread = threading.Timer(takes * i / 200, folder.rename, [away])
        thread.start()
        with quietly():
            found = topology(**roots, allowed=EVERY_CPU).nodes
        thread.join()
        away.rename(folder)
        assert set(found) - {last} == set(machine.nodes) - {last}
        if last in found:
            assert (found[last].cpus, found[last].memory_total) == (whole.cpus, whole.memory_total)
