"""``numaload status --threads``: pools that fight, and processes that cannot be looked at."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from commands import LIMIT_S, Numaload

HERE = sorted(os.sched_getaffinity(0))
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
        found = numaload.json("status", "--threads", busy.pid)
        text = numaload("status", "--threads", busy.pid).stdout
        busy.kill()
    (finding,) = [f for f in found["findings"] if f["kind"] in ("shared", "overloaded")]
    assert finding["kind"] == kind
    working = {t["tid"] for t in found["threads"] if t["name"] in names}
    assert set(finding["tids"]) == working
    assert {t["tid"] for t in found["threads"] if t["runnable"]} == working
    rows = [(len(pool["tids"]), pool["name"], pool["cpus"]) for pool in found["pools"]]
    assert (each, "left*", HERE) in rows
    assert f"\n{kind}: {len(names)} threads have work for CPU" in text
    assert f"torch.set_num_threads({len(HERE)})" in text


def test_processes_that_cannot_be_looked_at(numaload: Numaload) -> None:
    with subprocess.Popen(["true"]) as ended:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        done = numaload("status", "--threads", ended.pid, status=1)
        assert done.stderr.startswith(f"numaload: error: process {ended.pid}: it has ended")
    done = numaload("status", "--threads", ended.pid, "--json", status=1)
    assert (done.stdout, done.stderr) == ("", f"numaload: error: no process {ended.pid}\n")


@pytest.mark.parametrize(
    "words", [["0"], ["-1"], ["x"], [], [str(os.getpid()), "model.gguf"], [str(1 << 40)]]
)
def test_what_is_no_process_is_usage(words: list[str], numaload: Numaload) -> None:
    assert numaload("status", "--threads", *words, status=2).stdout == ""


def test_a_process_that_ends_while_it_is_looked_at(numaload: Numaload) -> None:
    """It is there at the start, and the answer is one or the other."""
    for delay in ("0.3", "0.4", "0.5"):
        with subprocess.Popen(["sleep", delay]) as process:
            looking = numaload.start("status", "--threads", process.pid)
            _, said = looking.communicate(timeout=LIMIT_S)
        assert looking.returncode in (0, 1)
        assert "Traceback" not in said
