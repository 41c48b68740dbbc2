"""``numaload doctor --pid`` on several nodes: memory that is far from the process's threads."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from commands import Numaload
from witness import cpus_of

MEMORY = ("NL708", "NL709")
# Touches memory on some CPUs and goes to others; or stays, while a thread of it works on these.
HOLDS = """
import os, sys, threading
first, then = (set(map(int, word.split(","))) for word in sys.argv[1:3])
everywhere = os.sched_getaffinity(0)
os.sched_setaffinity(0, first)
memory = bytearray(b"x") * (150 << 20)
def work():
    os.sched_setaffinity(0, then)
    print("ready", flush=True)
    while working:
        pass
working = sys.argv[3] == "thread"
os.sched_setaffinity(0, everywhere if working else then)
thread = threading.Thread(target=work)
thread.start()
sys.stdin.read()
working = False
"""


@contextmanager
def process(first: Collection[int], then: Collection[int], who: str = "all") -> Iterator[int]:
    """A process that touched its memory on the CPUs ``first``. who goes on on others: its id."""
    cpus = [",".join(map(str, sorted(its))) for its in (first, then)]
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, *cpus, who], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as running:  # fmt: skip
        assert running.stdout
        assert running.stdout.readline() == "ready\n"
        yield running.pid
        running.kill()


def test_a_process_that_was_bound_late(numaload: Numaload, nodes: list[int]) -> None:
    first, then = nodes[:2]
    with process(cpus_of(first), cpus_of(then)) as pid:
        told = numaload.doctor("--pid", pid)
    (finding,) = [f for f in told["findings"] if f["id"] in MEMORY]
    assert finding["id"] == "NL709"
    assert f"is bound to node {then} now" in finding["seen"]
    assert finding["seen"].endswith(f" of its anonymous memory lie on node {first}")
    assert finding["fix"].startswith(f"migratepages {pid} {first} {then}; ")
    assert f"numaload exec --node {then} " in finding["fix"]
    assert finding["undo"] == f"migratepages {pid} {then} {first}"
    assert finding["price"]["seconds"] > 0


def test_a_process_that_was_bound_before(numaload: Numaload, nodes: list[int]) -> None:
    for node in nodes[:2]:
        with process(cpus_of(node), cpus_of(node)) as pid:
            told = numaload.doctor("--pid", pid)
        assert [f for f in told["findings"] if f["id"] in MEMORY] == []
        assert [f for f in told["unknown"] if f["id"] in MEMORY] == []


def test_a_thread_that_works_far_from_the_memory(numaload: Numaload, nodes: list[int]) -> None:
    first, then = nodes[:2]
    with process(cpus_of(first), cpus_of(then), "thread") as pid:
        told = numaload.doctor("--pid", pid)
    (finding,) = [f for f in told["findings"] if f["id"] in MEMORY]
    assert finding["id"] == "NL708"
    assert f"its threads work on node {then}, " in finding["seen"]
    assert finding["seen"].endswith(f"lie on node {first}")
