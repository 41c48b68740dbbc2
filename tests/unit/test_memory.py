"""Limits of memory, from constructed /sys, /proc and cgroup trees."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from machines import XEON, Roots, write_proc
from numaload.errors import NodeMemoryError
from numaload.machine import memory
from numaload.machine.memory import (
    LEAST_FREE,
    RESERVE_MAX,
    RESERVE_MIN,
    SMALL,
    TRUSTED,
    UNKNOWN,
    available,
    cgroup_limits,
    fields,
    machine_available,
    node_free,
    node_unused,
    promise,
    require,
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


def test_version_1_where_the_groups_above_are_hidden(tmp_path: Path) -> None:
    roots = member_of(tmp_path, "4:memory:/")
    unlimited = "9223372036854771712"
    cgroup(tmp_path, 1, "/", unlimited, 400, "hierarchical_memory_limit 1000\ninactive_file 50")
    assert [limit.free for limit in cgroup_limits(**roots)] == [650]
    cgroup(tmp_path, 1, "/", unlimited, 400, f"hierarchical_memory_limit {unlimited}")
    assert list(cgroup_limits(**roots)) == []


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


@pytest.mark.parametrize("text", [None, ""], ids=["absent", "empty"])
def test_what_the_kernel_does_not_show_is_unknown(text: str | None, tmp_path: Path) -> None:
    roots = XEON.write(tmp_path)
    hidden = [tmp_path / "proc/meminfo", tmp_path / "sys/devices/system/node/node1/meminfo"]
    for path in hidden:
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
    assert machine_available(roots["proc_root"]) is None
    assert (node_free(1, **roots), node_unused(1, roots["sys_root"])) == (None, None)
    assert available(**roots).free == UNKNOWN


def test_nothing_at_all_is_shown(tmp_path: Path) -> None:
    roots = {"sys_root": str(tmp_path / "sys"), "proc_root": str(tmp_path / "proc")}
    assert node_free(0, **roots) is None
    assert available(**roots).free == UNKNOWN


def test_kernels_before_memavailable(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemFree: 100 kB\nActive(file): 50 kB\nDirty: 20 kB\n")
    found = machine_available(str(tmp_path))
    assert found is not None
    assert found.free == 130 << 10


def test_version_2_beside_version_1(tmp_path: Path) -> None:
    roots = member_of(tmp_path, "4:cpu:/job", "0::/job")
    cgroup(tmp_path, 2, "/unified/job", "5000", 1000)
    assert [limit.free for limit in cgroup_limits(**roots)] == [4000]


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each look found: plenty."""
    seen: list[int] = []

    def look() -> memory.Limit:
        seen.append(1 << 40)
        return memory.Limit("this group", seen[-1])

    monkeypatch.setattr(memory, "available", look)
    monkeypatch.setattr(memory, "_trusted", 0)
    return seen


def test_small_results_cost_a_look_once_in_many_bytes(looks: list[int]) -> None:
    for _ in range(2 * TRUSTED // (SMALL // 2)):
        require(SMALL // 2, "a row", "take less")
    assert 2 <= len(looks) <= 4


def test_large_results_are_looked_at_once_each(
    looks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "TRUSTED_S", 0.0)  # as if some time went by
    for _ in range(3):
        require(64 << 20, "a tensor", "take less")
    assert len(looks) == 3


def test_what_does_not_fit_says_numbers_and_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: memory.Limit("this group", GIB))
    monkeypatch.setattr(memory, "_trusted", 0)
    require(GIB - LEAST_FREE, "a tensor", "take less")
    with pytest.raises(
        NodeMemoryError, match=r"this group has room for 1073741824 .*; take less"
    ) as e:
        require(GIB, "a tensor", "take less")
    assert (e.value.needed, e.value.free) == (GIB, GIB)


def test_an_unknown_limit_refuses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: memory.Limit("unknown", UNKNOWN))
    monkeypatch.setattr(memory, "_trusted", 0)
    monkeypatch.setattr(memory, "node_free", lambda _: None)
    require(1 << 50, "a tensor", "take less", node=0)


@pytest.fixture
def gib(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is free, and none of it is touched."""
    monkeypatch.setattr(memory, "available", lambda: memory.Limit("this group", GIB))
    monkeypatch.setattr(memory, "_trusted", 0)
    monkeypatch.setattr(memory, "TRUSTED", 0)


def test_what_is_promised_and_not_touched_is_not_free(gib: None) -> None:
    with promise(GIB // 2, "a tensor", "take less") as first:
        with pytest.raises(NodeMemoryError) as caught:
            require(GIB // 2, "another", "take less")
        assert caught.value.free == GIB // 2
        first.end(GIB // 4)  # a piece was touched
        require(GIB // 2, "another", "take less")
    require(GIB - LEAST_FREE, "another", "take less")
    assert not memory.promised()


def test_a_promise_that_nobody_has_any_more_ends(gib: None) -> None:
    promise(GIB // 2, "a tensor", "take less")
    assert not memory.promised()


def test_ending_a_promise_waits_for_nobody(gib: None) -> None:
    """A finalizer may run inside of a look, and wait for the thread that ends a promise."""
    first = promise(GIB // 2, "a tensor", "take less")
    with memory._lock:
        thread = threading.Thread(target=first.end)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
    assert not memory.promised()


def test_what_another_thread_fills_is_waited_for(gib: None) -> None:
    begun, ended = threading.Event(), threading.Event()

    def fill() -> None:
        with promise(GIB // 2, "a tensor", "take less"):
            begun.set()
            time.sleep(0.2)
            ended.set()

    thread = threading.Thread(target=fill)
    thread.start()
    begun.wait(30)
    require(GIB // 2, "another", "take less")
    assert ended.is_set()
    thread.join()


def test_what_is_never_filled_is_waited_for_only_so_long(
    gib: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "WAIT_S", 0.1)
    held: list[memory.Promise] = []
    thread = threading.Thread(target=lambda: held.append(promise(GIB // 2, "a", "take less")))
    thread.start()
    thread.join()
    with pytest.raises(NodeMemoryError, match="has room for"):
        require(GIB // 2, "another", "take less")


def test_a_node_is_not_charged_with_what_is_promised(
    gib: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available", lambda: memory.Limit("unknown", UNKNOWN))
    monkeypatch.setattr(memory, "node_free", lambda _: GIB)
    with promise(GIB // 2, "a tensor", "take less"):
        require(GIB // 2 + LEAST_FREE, "another", "take less", node=0)
