"""Threads folded into pools, and what is found wrong with them, on machines of several shapes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from machines import EVERY_CPU, MACHINES
from numaload.cli.machine import print_threads
from numaload.doctor.findings import ThreadReport, inspect_threads
from numaload.doctor.pools import ThreadPool, overloaded, pools, watch
from numaload.linux.cgroups import cpu_quota
from numaload.linux.lists import parse_list
from numaload.machine.threads import Thread
from numaload.machine.topology import Topology, topology

ids = count(100)
ONE = "one-node"  # 4 CPUs
TWO = "dual-xeon"  # 0-15,32-47 and 16-31,48-63


def machine(name: str, root: Path) -> Topology:
    return topology(**MACHINES[name].write(root), allowed=EVERY_CPU)


def thread(name: str, cpus: str, **values: Any) -> Thread:
    main = values.pop("main", False)
    mems = frozenset(parse_list(values.pop("mems", "0-1")))
    rest: dict[str, Any] = {"state": "S", "cpu": -1, "cpu_s": 0.0} | values
    return Thread(next(ids), name, main, cpus=frozenset(parse_list(cpus)), mems=mems, **rest)


def several(number: int, name: str, cpus: str, **values: Any) -> list[Thread]:
    return [thread(name.replace("#", str(i)), cpus, **values) for i in range(number)]


def each_own(name: str, cpus: Iterable[int]) -> list[Thread]:
    return [thread(name, str(cpu)) for cpu in cpus]


def shown(found: Iterable[ThreadPool]) -> list[tuple[int, str, int]]:
    return [(len(pool.threads), str(pool), pool.each) for pool in found]


def seen(
    found: list[Thread], on: Topology, busy: Iterable[Thread] = (), **values: Any
) -> ThreadReport:
    rest = {"variables": {}, "quota": None} | values
    return ThreadReport(1, tuple(found), frozenset(t.tid for t in busy), on, **rest)


def kinds(what: ThreadReport) -> list[str]:
    return [finding.kind for finding in what.findings]


# Pools.


def test_threads_that_may_run_alike_and_are_called_alike_are_a_pool(tmp_path: Path) -> None:
    here = machine(TWO, tmp_path)
    found = [
        thread("python", "0-63", main=True), *several(3, "worker_#", "0-63"),
        *several(2, "worker_#", "0-15"), *several(2, "python", "0-63"), thread("worker", "0-63"),
    ]  # fmt: skip
    folded = pools(found, here, sys_root=str(tmp_path / "sys"))
    assert shown(folded) == [
        (1, "python (main)", 64), (4, "worker*", 64), (2, "worker*", 16), (2, "python", 64),
    ]  # fmt: skip
    assert [pool.nodes for pool in folded] == [(0, 1), (0, 1), (0,), (0, 1)]
    assert sorted(t.tid for pool in folded for t in pool.threads) == sorted(t.tid for t in found)


def test_names_keep_what_is_no_number_at_their_end(tmp_path: Path) -> None:
    here = machine(ONE, tmp_path)
    found = [
        thread(name, "0-3") for name in ("numa_0_t_1", "numa_0_t_2", "numa_0_m_0", "7", "", "8")
    ]
    assert [str(pool) for pool in pools(found, here)] == ["numa_0_t*", "numa_0_m_0", "7", "", "8"]


def test_threads_with_a_core_each_are_a_pool_per_node(tmp_path: Path) -> None:
    here = machine(TWO, tmp_path)
    found = each_own("python", [*range(1, 16), *range(16, 32)])
    folded = pools(found, here, sys_root=str(tmp_path / "sys"))
    assert shown(folded) == [(15, "python", 1), (16, "python", 1)]
    assert [pool.cpus for pool in folded] == [set(range(1, 16)), set(range(16, 32))]


def test_cores_of_two_threads(tmp_path: Path) -> None:
    here = machine(TWO, tmp_path)
    for cpu in range(16):
        siblings = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        siblings.write_text(f"{cpu},{cpu + 32}\n")
    cores = [thread("python", f"{cpu},{cpu + 32}") for cpu in range(16)]
    assert shown(pools(cores, here, sys_root=f"{tmp_path}/sys")) == [(16, "python", 2)]
    # One of them beside a thread on half of it are not two cores.
    halves = [thread("python", "0,32"), thread("python", "0"), thread("python", "32")]
    assert shown(pools(halves, here, sys_root=f"{tmp_path}/sys")) == [
        (1, "python", 2), (2, "python", 1),
    ]  # fmt: skip


def test_of_this_process() -> None:
    found, runnable = watch()
    assert os.getpid() in {t.tid for t in found}
    assert runnable <= {t.tid for t in found}
    report = inspect_threads().to_dict()
    assert report["pid"] == os.getpid()
    assert report["pools"][0]["tids"] == [os.getpid()]


# Too many for their CPUs.


def test_nobody_is_too_many_where_each_has_a_cpu() -> None:
    assert overloaded(several(4, "a", "0-3")) == []
    assert overloaded([*several(2, "a", "0-1"), *several(2, "b", "0-3")]) == []
    assert overloaded(several(9, "a", "")) == []  # unknown


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(5, "0-3")], {"0-3": 5}),
        ([(2, "0"), (1, "1")], {"0": 2}),
        ([(2, "0"), (3, "0-3")], {"0": 2}),  # the one that is too many counts once
        ([(2, "0"), (4, "0-3")], {"0": 2, "0-3": 5}),
        ([(3, "0-2"), (2, "2-3")], {"0-3": 5}),  # each has enough, together they have not
        ([(2, "0-1"), (2, "1-2"), (1, "2-3"), (1, "7")], {"0-3": 5}),
    ],
)
def test_too_many(found: list[tuple[int, str]], expected: dict[str, int]) -> None:
    every = [t for number, cpus in found for t in several(number, "a", cpus)]
    assert {frozenset(cpus): len(inside) for cpus, inside in overloaded(every)} == {
        frozenset(parse_list(cpus)): number for cpus, number in expected.items()
    }


def test_pools_that_share_cpus_and_have_work(tmp_path: Path) -> None:
    found = [*several(4, "numaload", "0-3", waited_s=1.5), *several(3, "python", "0-3")]
    assert kinds(seen(found, machine(ONE, tmp_path))) == []  # while nobody has anything to do
    (finding,) = seen(found, machine(ONE, tmp_path), busy=found).findings
    assert finding.kind == "shared"
    assert finding.text == (
        "7 threads have work for CPUs 0-3 (4 of numaload, 3 of python): they wait for each other,"
        " 6.0 s so far"
    )
    assert "torch.set_num_threads(4)" in finding.fix
    assert set(finding.tids) == {t.tid for t in found}


def test_one_pool_with_more_work_than_cpus(tmp_path: Path) -> None:
    found = several(5, "python", "2")
    (finding,) = seen(found, machine(ONE, tmp_path), busy=found[:3]).findings
    assert (finding.kind, finding.tids) == ("overloaded", tuple(t.tid for t in found[:3]))
    assert "3 threads have work for CPU 2 (3 of python)" in finding.text
    assert "taskset -apc LIST 1" in finding.fix


def test_threads_pinned_on_one_another_while_others_have_more(tmp_path: Path) -> None:
    found = [*several(2, "python", "2"), thread("numaload", "0-3")]
    (finding,) = seen(found, machine(ONE, tmp_path), busy=found).findings
    assert finding.fix == f"let some of them run on other CPUs too: taskset -pc 0-3 {found[1].tid}"
    bound = seen(found, machine(ONE, tmp_path), busy=found, variables={"OMP_PROC_BIND": "close"})
    assert [f.fix for f in bound.findings] == [
        (
            "unset OMP_PROC_BIND=close, or let some of them run on other CPUs too:"
            f" taskset -pc 0-3 {found[1].tid}"
        )
    ]


def test_a_pool_that_is_too_large_whenever_it_works(tmp_path: Path) -> None:
    here = machine(ONE, tmp_path)
    idle = several(40, "python", "0-3", cpu_s=0.9)
    assert kinds(seen(idle, here)) == []  # threads that were started and hardly used
    worked = several(5, "python", "0-3", cpu_s=20.0)
    (finding,) = seen([*idle, *worked], here).findings
    assert (finding.kind, finding.text) == ("crowded", "5 threads of python work on CPUs 0-3")
    assert finding.tids == tuple(t.tid for t in worked)
    assert kinds(seen(worked, here, busy=worked)) == ["overloaded"]  # said once


@pytest.mark.parametrize(("quota", "expected"), [(None, []), (4.0, []), (2.5, ["quota"])])
def test_cgroups_that_allow_less_time_than_there_are_cpus(
    quota: float | None, expected: list[str], tmp_path: Path
) -> None:
    found = several(4, "python", "0-3")
    what = seen(found, machine(ONE, tmp_path), busy=found, quota=quota)
    assert kinds(what) == expected
    assert all("allows 2.5 CPUs' time" in f.text for f in what.findings)
    assert all("torch.set_num_threads(2)" in f.fix for f in what.findings)


def test_the_quota_is_that_of_the_process(tmp_path: Path) -> None:
    for process, group, limit in (
        ("7", "limited", "150000 100000"),
        ("self", "free", "max 100000"),
    ):
        (tmp_path / f"proc/{process}").mkdir(parents=True)
        (tmp_path / f"proc/{process}/cgroup").write_text(f"0::/{group}\n")
        (tmp_path / f"sys/fs/cgroup/{group}").mkdir(parents=True)
        (tmp_path / f"sys/fs/cgroup/{group}/cpu.max").write_text(f"{limit}\n")
    roots = (str(tmp_path / "sys"), str(tmp_path / "proc"))
    assert cpu_quota(*roots, process="7") == 1.5
    assert cpu_quota(*roots) is None


# Where they may run.


@pytest.mark.parametrize(
    ("main", "others", "variables", "wide"),
    [
        ("0", "0-3", {}, "0-3"),
        ("0", "0-3", {"OMP_PROC_BIND": "true"}, "0-3"),
        ("0", "1", {"OMP_PLACES": "cores"}, "0-1"),  # each has its own
        ("0", "0", {"GOMP_CPU_AFFINITY": "0"}, "0-3"),  # of a machine with more
        ("0", "0", {"OMP_PROC_BIND": "false"}, ""),
        ("0", "0", {}, ""),  # taskset: on purpose
        ("0", "0", None, ""),
        ("0-3", "0-3", {"OMP_PROC_BIND": "true"}, ""),
        ("0-2", "0-3", {}, ""),  # not a core: on purpose
        ("", "0-3", {}, ""),  # unknown
    ],
)
def test_main_threads_that_openmp_pinned(
    main: str, others: str, variables: dict[str, str] | None, wide: str, tmp_path: Path
) -> None:
    """wide: what it is told to get back, empty where nothing is wrong."""
    found = [thread("python", main, main=True), thread("python", others)]
    what = seen(found, machine(ONE, tmp_path), variables=variables)
    assert kinds(what) == ["main-pinned"] * bool(wide)
    for finding in what.findings:
        assert finding.tids == (found[0].tid,)
        assert f"taskset -pc {wide} {found[0].tid}" in finding.fix
        for name, value in (variables or {}).items():
            assert f"{name}={value}" in finding.text


def test_a_process_without_its_main_thread(tmp_path: Path) -> None:
    assert kinds(seen(several(2, "python", "0"), machine(ONE, tmp_path))) == []


def test_pools_beyond_one_node(tmp_path: Path) -> None:
    here = machine(TWO, tmp_path)
    inside = [*several(2, "a", "0-15"), *several(2, "b", "16-31"), thread("main", "0-63")]
    assert kinds(seen(inside, here)) == []
    wide = [*inside, *several(2, "c", "0-63"), *several(3, "d", "15-16")]
    (finding,) = seen(wide, here).findings
    assert finding.kind == "spread"
    assert finding.text.startswith("2 of c, 3 of d may run on nodes 0-1: ")


@pytest.mark.parametrize(("mems", "expected"), [("0", ["far"]), ("1", []), ("0-1", []), ("", [])])
def test_memory_of_another_node(mems: str, expected: list[str], tmp_path: Path) -> None:
    what = seen(several(2, "a", "16-31", mems=mems), machine(TWO, tmp_path))
    assert kinds(what) == expected
    for finding in what.findings:
        assert finding.text == (
            "2 of a may run on node 1 only, and have memory of node 0 only (cpuset)"
        )
        assert finding.fix.startswith("as root put node 1 into cpuset.mems")


def test_a_node_without_memory_is_no_mistake(tmp_path: Path) -> None:
    here = machine("memory-less", tmp_path)
    (bare,) = [node for node in here.nodes.values() if not node.has_memory]
    found = thread("a", "0", mems="0")._replace(cpus=bare.cpus)
    assert kinds(seen([found], here)) == []


# What people see.


def test_the_table_of_pools(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [
        thread("py\x1b[31m", "0-3", main=True, cpu=2, cpu_s=1.25),
        *several(2, "numaload", "0-1", cpu=1, cpu_s=0.5, waited_s=0.25), thread("lost", ""),
    ]  # fmt: skip
    print_threads(seen(found, machine(ONE, tmp_path)))
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split("  ")[0] == "threads"
    assert [row.split() for row in rows[:3]] == [
        ["1", "py\\x1b[31m", "(main)", "0-3", "0", "2", "0", "1.2", "s", "0.0", "s"],
        ["2", "numaload", "0-1", "0", "1", "0", "1.0", "s", "0.5", "s"],
        ["1", "lost", "unknown", "unknown", "unknown", "0", "0.0", "s", "0.0", "s"],
    ]


def test_json_of_a_process_with_secrets_in_its_environment(tmp_path: Path) -> None:
    what = seen([], machine(ONE, tmp_path), variables={"TOKEN": "x", "OMP_NUM_THREADS": "3"})
    assert what.to_dict()["openmp"] == {"OMP_NUM_THREADS": "3"}
