"""Limits of memory, from constructed /sys, /proc and cgroup trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from machines import XEON, Roots, write_proc
from numaload.numa.memory import (
    RESERVE_MAX,
    RESERVE_MIN,
    available,
    cgroup_limits,
    fields,
    machine_available,
    node_free,
    reserve,
)

GIB = 1 << 30


def test_fields_have_units(tmp_path: Path) -> None:
    text = (
        "Node 0 MemFree:  12 kB\nNode 0 HugePages_Free:  3\nMemTotal: 7 kB\nfile 99\n\nodd\nx: y\n"
    )
    (tmp_path / "meminfo").write_text(text)
    found = fields(f"{tmp_path}/meminfo")
    assert found == {"MemFree": 12 << 10, "HugePages_Free": 3, "MemTotal": 7 << 10, "file": 99}
    assert fields(f"{tmp_path}/absent") == {}


@pytest.mark.parametrize(
    ("total", "kept"),
    [
        (0, RESERVE_MIN),
        (1 << 30, RESERVE_MIN),
        (10 << 30, (10 << 30) // 50),
        (1 << 40, RESERVE_MAX),
    ],
)
def test_reserve(total: int, kept: int) -> None:
    assert reserve(total) == kept


def node_meminfo(root: Path, node: int, **kib: int) -> None:
    """The node's file with some rows at other values; ``Active_file`` is ``Active(file)``."""
    rows = {name.replace("_file", "(file)").replace("_", ""): value for name, value in kib.items()}
    path = root / f"sys/devices/system/node/node{node}/meminfo"
    text = path.read_text()
    lines = [line for line in text.splitlines() if line.split()[2].rstrip(":") not in rows]
    lines += [f"Node {node} {name}: {value} kB" for name, value in rows.items()]
    path.write_text("\n".join(lines))


FREE = {"MemTotal": 4 << 20, "MemFree": 1 << 20, "Active_file": 1 << 19, "Inactive_file": 1 << 19}


@pytest.mark.parametrize(
    ("changed", "gib"),
    [
        ({}, 2.0),
        ({"Dirty": 1 << 18, "Writeback": 1 << 18}, 1.5),  # cannot be dropped at once
        ({"Dirty": 1 << 22}, 1.0),
        ({"SReclaimable": 1 << 20}, 2.5),
        ({"FilePages": 3 << 20, "Shmem": 3 << 20}, 2.0),  # shared memory is no cache
        ({"MemFree": 0, "Active_file": 0, "Inactive_file": 0}, 0.0),
    ],
    ids=["clean", "dirty", "all-dirty", "slab", "shared", "full"],
)
def test_node_free(changed: dict[str, int], gib: float, tmp_path: Path) -> None:
    roots = XEON.write(tmp_path)
    node_meminfo(tmp_path, 1, **(FREE | changed))
    expected = gib * GIB - reserve(4 * GIB) if gib else 0
    assert node_free(1, **roots) == expected


def test_node_free_of_a_kernel_without_numa_is_the_machine_s(tmp_path: Path) -> None:
    roots = write_proc(tmp_path, 8192)
    assert node_free(0, **roots) == 6 * GIB - reserve(8 * GIB)


def test_an_absent_node_has_nothing_free(tmp_path: Path) -> None:
    assert node_free(7, **XEON.write(tmp_path)) == 0


def cgroup(root: Path, version: int, group: str, limit: str, used: int, stat: str = "") -> None:
    base = {1: "sys/fs/cgroup/memory", 2: "sys/fs/cgroup"}[version]
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }
    folder = root / base / group.strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names[version], "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


def member_of(root: Path, *rows: str) -> Roots:
    roots = write_proc(root, 8192)
    (root / "proc/self/cgroup").write_text("".join(f"{row}\n" for row in rows))
    return roots


def test_version_2_counts_every_level_and_page_cache(tmp_path: Path) -> None:
    roots = member_of(tmp_path, "0::/user.slice/job")
    cgroup(tmp_path, 2, "/user.slice/job", "max", 1 << 20)
    cache = "anon 5\nfile 700\ninactive_file 300\nactive_file 200\nshmem 200"
    cgroup(tmp_path, 2, "/user.slice", str(GIB), GIB - 1000, cache)
    limits = list(cgroup_limits(**roots))
    assert [limit.free for limit in limits] == [1500]
    assert limits[0].name.endswith("/user.slice (memory.max)")


def test_version_2_inside_a_container_is_at_the_root(tmp_path: Path) -> None:
    roots = member_of(tmp_path, "0::/docker/0123abcd")  # a path that only the host has
    cgroup(tmp_path, 2, "/", "5000", 6000)
    assert [limit.free for limit in cgroup_limits(**roots)] == [0]


def test_version_1(tmp_path: Path) -> None:
    rows = ["5:cpu,cpuacct:/jobs/7", "4:memory:/jobs/7", "1:name=systemd:/jobs/7", "0::/jobs/7"]
    roots = member_of(tmp_path, *rows)
    stat = "inactive_file 1\nactive_file 1\ntotal_inactive_file 30\ntotal_active_file 20"
    cgroup(tmp_path, 1, "/jobs/7", "1000", 400, stat)
    cgroup(tmp_path, 1, "/jobs", "9223372036854771712", 400)  # what no limit looks like there
    limits = list(cgroup_limits(**roots))
    assert [limit.free for limit in limits] == [650]
    assert "memory.limit_in_bytes" in limits[0].name


@pytest.mark.parametrize("rows", [[], ["0::/../../elsewhere"], ["0::/gone (deleted)"]])
def test_no_limit_to_be_found(rows: list[str], tmp_path: Path) -> None:
    assert list(cgroup_limits(**member_of(tmp_path, *rows))) == []


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert list(cgroup_limits(**write_proc(tmp_path, 1000))) == []


def test_available_is_the_tightest(tmp_path: Path) -> None:
    roots = member_of(tmp_path, "0::/job")
    machine = machine_available(roots["proc_root"])
    assert machine is not None
    assert machine.free == 6 * GIB
    cgroup(tmp_path, 2, "/job", str(100 * GIB), GIB)
    assert available(**roots) == machine
    cgroup(tmp_path, 2, "/job", str(2 * GIB), GIB)
    assert available(**roots).free == GIB


def test_this_machine_has_room() -> None:
    machine = machine_available()
    assert machine is not None
    assert 0 < available().free <= machine.free
