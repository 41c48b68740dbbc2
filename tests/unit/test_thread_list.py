"""The threads of a process as the kernel lists them: odd names, ended ones, other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EACCES, ESRCH
from pathlib import Path

import pytest

from commands import LIMIT_S, wait_for
from machines import EVERY_CPU, MACHINES
from numaload.errors import NumaError, UsageError
from numaload.linux.syscalls import name_thread
from numaload.machine.threads import Thread, nodes_of, threads
from numaload.machine.topology import topology

HERE = frozenset(os.sched_getaffinity(0))
NAMES = [b"plain", b"a) S (b", b"two words", b"new\nline", b"back\\slash", b"\xff\xfe", b"(", b")"]
STAT = "{tid} ({name}) {state} 1 1 0 0 -1 0 0 0 0 0 250 50" + " 0" * 23 + " 3 0 0\n"
STATUS = "Name:\t{name}\nTgid:\t{pid}\n"


@contextmanager
def started(prepare: Callable[[], object] = lambda: None) -> Iterator[int]:
    """A thread that has run ``prepare`` and waits; its id."""
    ids: list[int] = []
    ready, end = threading.Event(), threading.Event()

    def run() -> None:
        prepare()
        ids.append(threading.get_native_id())
        ready.set()
        end.wait()

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait()
    try:
        yield ids[0]
    finally:
        end.set()
        thread.join()


def by_id(pid: int | None = None) -> dict[int, Thread]:
    return {thread.tid: thread for thread in threads(pid)}


@contextmanager
def child(program: str) -> Iterator[int]:
    """Another process that runs this and has printed a line; its id."""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


# This process.


def tasks() -> set[int]:
    return set(map(int, os.listdir("/proc/self/task")))


def test_its_threads_are_python_s_and_the_main_one_is_known() -> None:
    with started() as tid:
        before, found = tasks(), by_id()
        assert {tid, os.getpid()} <= set(found) <= before | tasks()  # idle ones may end meanwhile
        assert [thread.tid for thread in threads() if thread.main] == [os.getpid()]
        assert list(found) == sorted(found)
    wait_for(lambda: tid not in by_id(), "the kernel to forget it")


def test_where_each_may_run_is_the_kernel_s_answer() -> None:
    cpu = max(HERE)
    with started(lambda: os.sched_setaffinity(0, {cpu})) as tid:
        found = by_id()
        assert found[tid].cpus == {cpu}
        assert found[tid].cpu == cpu
        assert all(t.cpus == os.sched_getaffinity(t.tid) for t in found.values())
        assert all(t.mems for t in found.values())


def test_time_and_state() -> None:
    def busy() -> None:
        while time.thread_time() < 0.05:
            pass

    with started(busy) as tid:
        assert 0.04 <= by_id()[tid].cpu_s < 5
        wait_for(lambda: by_id()[tid].state == "S", "a thread that waits to be asleep")
    me = by_id()[os.getpid()]
    assert me.state == "R"
    assert me.cpu in HERE


@pytest.mark.parametrize("name", NAMES)
def test_names_may_be_anything(name: bytes) -> None:
    with started(lambda: Path("/proc/thread-self/comm").write_bytes(name)) as tid:
        thread = by_id()[tid]
        assert os.fsencode(thread.name) == name
        assert thread.cpus == HERE
        assert thread.to_dict()["cpus"] == sorted(HERE)


def test_threads_can_be_named() -> None:
    with started(lambda: name_thread("numaload of a name too long")) as tid:
        assert by_id()[tid].name == "numaload of a n"


@pytest.mark.slow
def test_threads_that_end_meanwhile_are_left_out() -> None:
    end = threading.Event()

    def breed() -> None:
        while not end.is_set():
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()

    breeders = [threading.Thread(target=breed) for _ in range(2)]
    for breeder in breeders:
        breeder.start()
    try:
        for _ in range(200):
            assert all(thread.cpus and thread.cpus <= HERE for thread in threads())
            assert {os.getpid(), *(b.native_id for b in breeders)} <= set(by_id())
    finally:
        end.set()
        for breeder in breeders:
            breeder.join()


# Another process.


def test_another_process_by_any_of_its_threads() -> None:
    program = (
        "import os, threading, sys; cpu = max(os.sched_getaffinity(0))\n"
        "def run():\n    os.sched_setaffinity(0, {cpu})\n    print('ready', flush=True)\n"
        "    sys.stdin.read()\n"
        "threading.Thread(target=run).start(); sys.stdin.read()"
    )
    with child(program) as pid:
        main, other = threads(pid)
        assert (main.tid, main.main, other.main) == (pid, True, False)
        assert (main.cpus, other.cpus) == (HERE, frozenset({max(HERE)}))
        assert [thread.tid for thread in threads(other.tid)] == [main.tid, other.tid]


def test_a_main_thread_that_left_the_others_is_no_thread_any_more() -> None:
    program = (
        "import ctypes, os, threading, time\n"
        "def run():\n    time.sleep(0.2); print('ready', flush=True); time.sleep(600)\n"
        "threading.Thread(target=run).start()\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with child(program) as pid:
        wait_for(lambda: not any(t.main for t in threads(pid)), "the main thread to be gone")
        assert len(threads(pid)) == 1


def test_a_process_that_is_only_an_exit_status() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(NumaError, match=f"process {process.pid}: it has ended, and its par"):
            threads(process.pid)
    with pytest.raises(NumaError, match=f"no process {process.pid}") as caught:
        threads(process.pid)
    assert caught.value.errno == ESRCH


@pytest.mark.parametrize("pid", [0, -1, -(1 << 70), 1 << 31, 1 << 70])
def test_what_can_be_no_process(pid: int) -> None:
    with pytest.raises(UsageError, match="expected a process id"):
        threads(pid)


def test_no_process_of_that_id() -> None:
    with pytest.raises(NumaError, match="no process 2147483647"):
        threads((1 << 31) - 1)


def test_somebody_else_s_process_is_there_though_it_is_hidden(tmp_path: Path) -> None:
    """As under hidepid=2: /proc has no folder of it, and the kernel refuses to signal it."""
    if os.stat("/proc/1").st_uid == os.getuid() != 0:
        pytest.skip("the first process here is this user's own")
    program = (
        "import os, sys\n"
        "if not os.getuid():\n    os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "from numaload.errors import NumaError\n"
        "from numaload.machine.threads import threads\n"
        "try:\n    threads(1, proc_root=sys.argv[1])\n"
        "except NumaError as error:\n    print(error.errno, error)\n"
    )
    # Imported before the user changes, who may not read it: the folders on the way may be private.
    program = "import numaload.machine.threads, encodings.idna\n" + program
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=LIMIT_S,
    )  # fmt: skip
    assert done.stdout.startswith(f"{EACCES} {tmp_path}/1/task: another user's, and not shown")


# What other kernels write.


def process(root: Path, status: dict[str, str], stat: str = STAT, **values: object) -> Path:
    words = {"tid": 7, "pid": 7, "name": "x", "state": "S"} | values
    folder = root / "proc/7/task/7"
    folder.mkdir(parents=True)
    (folder / "stat").write_text(stat.format(**words))
    rows = "".join(f"{key}:\t{value}\n" for key, value in status.items())
    (folder / "status").write_text(STATUS.format(**words) + rows)
    online = root / "sys/devices/system/cpu/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-3\n")
    return root


def read(root: Path) -> list[Thread]:
    return threads(7, proc_root=f"{root}/proc", sys_root=f"{root}/sys")


def test_cpus_that_are_offline_do_not_count(tmp_path: Path) -> None:
    """With no mask, some kernels list every CPU that they could ever have."""
    listed = {"Cpus_allowed_list": "2-8191", "Mems_allowed_list": "0-1023"}
    (thread,) = read(process(tmp_path, listed))
    assert thread.cpus == {2, 3}
    assert thread.mems == frozenset(range(1024))
    assert (thread.main, thread.cpu) == (True, 3)
    assert thread.cpu_s == 300 / os.sysconf("SC_CLK_TCK")


@pytest.mark.parametrize("stat", ["", "7 (x", "7 (x) S 1 1", "7 (x) S" + " ?" * 50])
def test_what_is_not_said_is_unknown(stat: str, tmp_path: Path) -> None:
    (thread,) = read(process(tmp_path, {"Mems_allowed_list": "what?"}, stat))
    assert (thread.cpu, thread.cpu_s, thread.mems) == (-1, 0, frozenset())


@pytest.mark.parametrize("state", "ZXx")
def test_ended_threads_are_left_out(state: str, tmp_path: Path) -> None:
    with pytest.raises(NumaError, match="process 7: it has ended"):
        read(process(tmp_path, {}, state=state))


def test_nodes_of_cpus(tmp_path: Path) -> None:
    machine = topology(**MACHINES["epyc-nps4"].write(tmp_path), allowed=EVERY_CPU)
    for node in machine.nodes.values():
        assert nodes_of(node.cpus, machine) == [node.id]
    assert nodes_of(machine.nodes[5].cpus | {min(machine.nodes[2].cpus)}, machine) == [2, 5]
    assert nodes_of(frozenset(), machine) == nodes_of(frozenset({99999}), machine) == []
