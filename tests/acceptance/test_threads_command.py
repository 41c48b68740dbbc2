"""``numaload doctor --pid``: pools that fight, swap, and processes that cannot be looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from commands import LIMIT_S, Numaload
from numaload.doctor.check import Unknown
from numaload.doctor.system import System
from numaload.linux.syscalls import PAGE

HERE = sorted(os.sched_getaffinity(0))
IDS = {"shared": "NL702", "overloaded": "NL703"}
BUSY = """
import hashlib, os, sys, threading
data = bytes(1 << 26)
def work(name):
    with open("/proc/thread-self/comm", "w") as file:
        file.write(name)
    ready.release()
    while True:
        hashlib.sha256(data)
ready, names = threading.Semaphore(0), sys.argv[1:]
for name in names:
    threading.Thread(target=work, args=(name,), daemon=True).start()
for _ in names:
    ready.acquire()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("kind", ["shared", "overloaded"])
def test_pools_that_fight_are_found(kind: str, numaload: Numaload) -> None:
    each = len(HERE) if kind == "shared" else len(HERE) + 1
    names = [f"{pool}-{i}" for pool in ("left", "right")[: 1 + (kind == "shared")]
             for i in range(each)]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-c", BUSY, *names], text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as busy:  # fmt: skip
        assert busy.stdout
        assert busy.stdout.readline() == "ready\n"
        told = numaload.doctor("--pid", busy.pid)
        text = numaload("doctor", "--pid", busy.pid, status=1).stdout
        busy.kill()
    found = told["threads"]
    (finding,) = [f for f in found["findings"] if f["kind"] in ("shared", "overloaded")]
    assert finding["kind"] == kind
    assert (told["pid"], found["pid"]) == (busy.pid, busy.pid)
    (numbered,) = [f for f in told["findings"] if f["id"] in IDS.values()]
    assert numbered["id"] == IDS[kind]
    assert finding["text"] in numbered["seen"]
    assert numbered["fix"] == finding["fix"]
    working = {t["tid"] for t in found["threads"] if t["name"] in names}
    assert set(finding["tids"]) == working
    assert {t["tid"] for t in found["threads"] if t["runnable"]} == working
    rows = [(len(pool["tids"]), pool["name"], pool["cpus"]) for pool in found["pools"]]
    assert (each, "left*", HERE) in rows
    lines = text.splitlines()
    assert lines[0].startswith(f"process {busy.pid}: python")
    assert all(len(line) <= 80 for line in lines)
    assert f"{IDS[kind]} {numbered['title']}\n   cost not known in seconds\n" in text
    assert f"   seen {len(names)} threads have work for CPU" in text
    assert f"torch.set_num_threads({len(HERE)})" in " ".join(text.split())


def test_a_process_that_sleeps(numaload: Numaload) -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        told = numaload.doctor("--pid", process.pid)
        text = numaload("doctor", "--pid", process.pid, status=(0, 1)).stdout
        process.kill()
    assert [f for f in told["findings"] + told["unknown"] if f["id"].startswith("NL7")] == []
    assert [thread["name"] for thread in told["threads"]["threads"]] == ["sleep"]
    assert text.startswith(f"process {process.pid}: sleep\nthreads  name")


HOLDS = """
import sys
memory = b"x" * (100 << 20)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/numa_maps"), reason="a kernel without NUMA")
def test_memory_of_a_process_by_node() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as holder:  # fmt: skip
        assert holder.stdout
        assert holder.stdout.readline() == "ready\n"
        areas = System(pid=holder.pid).areas
        holder.kill()
    anonymous = sum(sum(area.counts.values()) for area in areas if not area.file) * PAGE
    assert 100 << 20 <= anonymous < 200 << 20
    assert any("libc" in area.file for area in areas)
    assert all(area.policy for area in areas)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user")
def test_another_user_s_memory_is_unknown() -> None:
    with subprocess.Popen(["sleep", "600"]) as process:
        os.seteuid(65534)
        try:
            with pytest.raises(Unknown, match=r"numa_maps: (Permission denied|No such file)"):
                _ = System(pid=process.pid).areas
        finally:
            os.seteuid(0)
            process.kill()


def test_processes_that_cannot_be_looked_at(numaload: Numaload) -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        done = numaload("doctor", "--pid", ended.pid, status=3)
        assert done.stderr.startswith(f"numaload: error: process {ended.pid}: it has ended")
    done = numaload("doctor", "--pid", ended.pid, "--json", status=3)
    assert (done.stdout, done.stderr) == ("", f"numaload: error: no process {ended.pid}\n")


@pytest.mark.parametrize("words", [["0"], ["-1"], ["x"], [], [str(1 << 40)]])
def test_what_is_no_process_is_usage(words: list[str], numaload: Numaload) -> None:
    assert numaload("doctor", "--pid", *words, status=2).stdout == ""


def test_a_process_that_ends_while_it_is_looked_at(numaload: Numaload) -> None:
    """It is there at the start, and the answer is one or the other."""
    for delay in ("0.3", "0.4", "0.5"):
        with subprocess.Popen(["sleep", delay]) as process:
            looking = numaload.start("doctor", "--pid", process.pid)
            _, said = looking.communicate(timeout=LIMIT_S)
        assert looking.returncode in (0, 1, 3)
        assert "Traceback" not in said
