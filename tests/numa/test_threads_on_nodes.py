"""``numaload doctor --pid`` on several nodes: which thread may run beside which memory."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numaload as api
from cgroups import cgroup
from commands import Numaload
from numaload.machine.workers import Workers, finish
from witness import cpus_of


@contextmanager
def waiting(*prepared: Callable[[], object]) -> Iterator[list[int]]:
    """A thread for each, that has run it and waits; their ids."""
    ids: dict[int, int] = {}
    ready, end = threading.Semaphore(0), threading.Event()

    def run(which: int) -> None:
        prepared[which]()
        ids[which] = threading.get_native_id()
        ready.release()
        end.wait()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(prepared))]
    for thread in threads:
        thread.start()
        ready.acquire()
    try:
        yield [ids[which] for which in range(len(prepared))]
    finally:
        end.set()
        for thread in threads:
            thread.join()


def named(name: str, cpus: Collection[int] | None = None) -> Callable[[], object]:
    def prepare() -> None:
        Path("/proc/thread-self/comm").write_text(name)
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    return prepare


def look(numaload: Numaload, pid: int | None = None) -> dict[str, Any]:
    return dict(numaload.doctor("--pid", pid or os.getpid())["threads"])


def findings(found: dict[str, Any], tids: list[int]) -> list[str]:
    return [f["kind"] for f in found["findings"] if set(f["tids"]) & set(tids)]


def test_threads_pinned_to_nodes(numaload: Numaload, nodes: list[int]) -> None:
    every = [named(f"there-{i}", cpus_of(node)) for node in nodes for i in range(2)]
    with waiting(*every) as tids:
        found = look(numaload)
        text = numaload("doctor", "--pid", os.getpid(), status=(0, 1)).stdout
    by_id = {thread["tid"]: thread for thread in found["threads"]}
    for tid, node in zip(tids, sorted(nodes * 2), strict=True):
        assert by_id[tid]["nodes"] == [node]
        assert set(by_id[tid]["cpus"]) == cpus_of(node)
        assert by_id[tid]["cpu"] in cpus_of(node)
        assert set(nodes) <= set(by_id[tid]["mems"])
    pools = [pool for pool in found["pools"] if pool["name"] == "there*"]
    assert [pool["nodes"] for pool in pools] == [[node] for node in nodes]
    assert [pool["tids"] for pool in pools] == [tids[i : i + 2] for i in range(0, len(tids), 2)]
    assert findings(found, tids) == []
    rows = [row.split() for row in text.splitlines() if " there* " in row]
    assert [(row[0], row[3]) for row in rows] == [("2", str(node)) for node in nodes]


def test_numaload_s_own_pools_are_each_in_their_node(numaload: Numaload, nodes: list[int]) -> None:
    machine, started = api.topology(), threading.Barrier(3)
    pools = {node: Workers(machine.cpus_of([node]), 2, f"on-{node}") for node in nodes}
    try:
        for pool in pools.values():
            tasks = [pool.submit(started.wait) for _ in range(2)]  # two threads, not one twice
            started.wait()
            finish(tasks)
        found = look(numaload)
    finally:
        for pool in pools.values():
            pool.close()
    for node in nodes:
        own = [thread for thread in found["threads"] if thread["name"] == f"on-{node}"]
        assert [thread["nodes"] for thread in own] == [[node]] * 2
        assert findings(found, [thread["tid"] for thread in own]) == []


def test_a_thread_in_mirror_pinned(numaload: Numaload, model: str, nodes: list[int]) -> None:
    with api.mirror(api.open(model), nodes=nodes) as mirror:
        for node in nodes:
            with mirror.pinned(node):
                found = look(numaload)
            (main,) = [thread for thread in found["threads"] if thread["main"]]
            assert main["nodes"] == [node]
        (main,) = [thread for thread in look(numaload)["threads"] if thread["main"]]
        assert main["nodes"] == nodes


def test_a_pool_on_all_nodes_is_found(numaload: Numaload, nodes: list[int]) -> None:
    inside = [named("inside", cpus_of(nodes[0]))] * 2
    with waiting(*[named("wide-0"), named("wide-1")], *inside) as tids:
        found = look(numaload)
        text = numaload("doctor", "--pid", os.getpid(), status=1).stdout
    assert findings(found, tids[:2]) == ["spread"]
    assert findings(found, tids[2:]) == []
    (finding,) = [f for f in found["findings"] if f["kind"] == "spread"]
    assert "2 of wide*" in finding["text"]
    assert f"may run on nodes {nodes[0]}-{nodes[-1]}" in finding["text"]
    assert "NL706" in text
    plain = " ".join(text.split())
    assert f"seen {finding['text']} why" in plain
    assert f"fix {finding['fix']}" in plain


def test_memory_of_another_node_is_found(numaload: Numaload, nodes: list[int]) -> None:
    """A cpuset that is wrong, of a process that numaload itself is not in."""
    cpus = ",".join(map(str, sorted(cpus_of(nodes[1]))))
    limits = {"cpuset.cpus": cpus, "cpuset.mems": str(nodes[0])}
    with cgroup(limits) as folder, subprocess.Popen(["sleep", "600"]) as process:
        try:
            Path(folder, "cgroup.procs").write_text(str(process.pid))
            found = look(numaload, process.pid)
        finally:
            process.kill()
    (thread,) = found["threads"]
    assert (thread["nodes"], thread["mems"]) == ([nodes[1]], [nodes[0]])
    (finding,) = found["findings"]
    assert finding["kind"] == "far"
    assert (
        f"may run on node {nodes[1]} only, and have memory of node {nodes[0]} only"
        in (finding["text"])
    )
