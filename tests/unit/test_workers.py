"""Pinned threads: where they run, how they fail and how they stop."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

import numaload as api
from machines import APART, XEON, Machine
from numaload.errors import NumaError, UsageError
from numaload.machine.affinity import ALLOWED, pinned_to
from numaload.machine.stopping import CancelToken
from numaload.machine.topology import topology
from numaload.machine.workers import Workers, finish, pool

HERE = frozenset(os.sched_getaffinity(0))
ONE_CPU = frozenset([min(HERE)])
NO_CPU = frozenset([1022, 1023])  # ids that the kernel knows how to refuse


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers(HERE, 2)
    yield workers
    workers.close()


def test_threads_run_on_their_cpus_only() -> None:
    workers = Workers(ONE_CPU, 2)
    try:
        found = finish([workers.submit(os.sched_getaffinity, 0) for _ in range(8)])
    finally:
        workers.close()
    assert all(cpus == ONE_CPU for cpus in found)
    assert os.sched_getaffinity(0) == HERE


def test_a_thread_per_cpu_unless_told() -> None:
    assert Workers(HERE).count == len(HERE)
    assert Workers(HERE, 5).count == 5


def test_cpus_that_are_gone_are_a_named_error(capfd: pytest.CaptureFixture[str]) -> None:
    workers = Workers(NO_CPU, 2)
    ran: list[int] = []
    try:
        for _ in range(2):
            with pytest.raises(NumaError, match="CPUs 1022-1023: Invalid argument") as caught:
                workers.ranges(lambda start, _stop: ran.append(start), 100)
    finally:
        workers.close()
    assert (caught.value.call, caught.value.errno) == ("sched_setaffinity", errno.EINVAL)
    assert ran == []
    assert capfd.readouterr().err == ""


def test_no_cpus_at_all() -> None:
    with pytest.raises(NumaError, match="no CPUs"):
        Workers([])


def test_pinned_to_gives_the_affinity_back() -> None:
    with pinned_to(ONE_CPU):
        assert os.sched_getaffinity(0) == ONE_CPU
    with pytest.raises(KeyError), pinned_to(ONE_CPU):
        raise KeyError
    with pytest.raises(NumaError, match="sched_setaffinity"), pinned_to(NO_CPU):
        pass
    assert os.sched_getaffinity(0) == HERE


@pytest.mark.parametrize(
    ("total", "grain", "most"), [(0, 1, 0), (1, 1, 1), (7, 100, 1), (100, 1, 8), (100, 40, 2)]
)
def test_ranges_cover_everything_once(total: int, grain: int, most: int, workers: Workers) -> None:
    seen: list[tuple[int, int]] = []
    workers.ranges(lambda start, stop: seen.append((start, stop)), total, grain)
    assert [i for start, stop in sorted(seen) for i in range(start, stop)] == list(range(total))
    assert len(seen) <= most
    assert all(stop - start >= min(grain, total) for start, stop in sorted(seen)[:-1])


def test_results_come_in_order(workers: Workers) -> None:
    def late(i: int) -> int:
        time.sleep(0.01 * (3 - i))
        return i

    assert finish([workers.submit(late, i) for i in range(3)]) == [0, 1, 2]
    assert finish([]) == []


def test_first_error_stops_the_rest(workers: Workers) -> None:
    token, begun = CancelToken(), threading.Event()
    ran: list[int] = []

    def fail() -> None:
        begun.wait()
        raise OverflowError("first")

    def wait_for_stop(i: int) -> None:
        begun.set()
        assert token.wait(30)
        ran.append(i)
        time.sleep(0.02)  # time to cancel the next

    futures = [workers.submit(wait_for_stop, 0), workers.submit(fail)]
    futures += [workers.submit(wait_for_stop, i) for i in range(1, 200)]
    with pytest.raises(OverflowError, match="first"):
        finish(futures, token)
    # What ran was waited for; what had not begun never does.
    assert 0 in ran
    assert len(ran) < 200
    assert all(future.done() for future in futures)


def test_the_pool_goes_on_after_an_error(workers: Workers) -> None:
    def fail(start: int, _stop: int) -> None:
        raise OverflowError(start)

    with pytest.raises(OverflowError):
        workers.ranges(fail, 10)
    assert workers.submit(int, "7").result() == 7


def test_a_thread_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is called any more once the error has come: the caller may free what it gave."""
    workers, real, started = Workers(HERE, 2), threading.Thread.start, []

    def start(thread: threading.Thread) -> None:
        started.append(thread)
        if len(started) > 1:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    running = []

    def slow(start: int, _stop: int) -> None:
        running.append(start)
        time.sleep(0.5)

    with pytest.raises(NumaError, match="no thread can be started"):
        workers.ranges(slow, 100)
    seen = len(running)
    time.sleep(0.2)
    assert len(running) == seen < 8


def test_a_thread_that_cannot_start_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what it was given, though its pool stays: replicas would stay mapped."""

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers(HERE, 2)
    given = threading.Event()
    gone = weakref.ref(given)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(NumaError, match="no thread can be started"):
        workers.submit(given.set)
    with pytest.raises(NumaError, match="no thread can be started"):
        api.prewarm_async(__file__)
    del given
    gc.collect()  # the error's traceback
    assert gone() is None


OUTLIVES = """
import os, threading, time
from numaload.machine.workers import Workers
workers = Workers(os.sched_getaffinity(0), 2)
def late():
    time.sleep(0.3)
    seen = []
    workers.ranges(lambda start, stop: seen.extend(range(start, stop)), 100)
    print(sorted(seen) == list(range(100)))
threading.Thread(target=late).start()
"""


def test_a_thread_that_outlives_the_main_thread_works_by_itself() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OUTLIVES], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_closed_pool_takes_no_work() -> None:
    workers = Workers(HERE, 2)
    workers.close()
    with pytest.raises(NumaError, match="after shutdown"):
        workers.submit(int)


TWICE = """
import os, signal, sys, threading, time, traceback
from numaload.machine.workers import Workers
main = threading.get_ident()
workers, running, ended = Workers(os.sched_getaffinity(0), 2), [], []
def slow(start, stop):
    running.append(start)
    time.sleep(0.05)
    ended.append(start)
def twice():
    while "in _settled" not in "".join(traceback.format_stack(sys._current_frames()[main])):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.0003)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=twice).start()
try:
    for _ in range(1000):
        workers.ranges(slow, 1000)
except KeyboardInterrupt:
    count = len(running)
    print(count > 0, count == len(ended))
    time.sleep(0.2)
    print(len(running) == count)
"""


def test_two_ctrl_c_at_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "True True\nTrue\n"


INTERRUPTED = """
import os, signal, sys, threading, time, traceback
signal.signal(signal.SIGINT, signal.default_int_handler)
from numaload.machine.stopping import CancelToken
from numaload.machine.workers import Workers, finish
workers, token = Workers(os.sched_getaffinity(0), 2), CancelToken()
late = []
futures = [workers.submit(token.wait, 600) for _ in range(2)]
futures += [workers.submit(late.append, i) for i in range(100)]
main = threading.get_ident()
def interrupt():
    while "in _settled" not in "".join(traceback.format_stack(sys._current_frames()[main])):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
begin = time.monotonic()
try:
    finish(futures, token)
except KeyboardInterrupt:
    print(token.cancelled(), len(late) < 100, time.monotonic() - begin < 600, flush=True)
workers.close()
"""


def test_ctrl_c_while_waiting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300, check=True
    )
    assert done.stdout.split() == ["True", "True", "True"]


FORKED = """
import json, os, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
from numaload.machine.topology import topology
from numaload.machine.workers import finish, pool
machine = topology()
before = pool(machine)
before.ranges(lambda start, stop: None, 100)
read, write = os.pipe()
if os.fork() == 0:
    again = pool(machine)
    found = finish([again.submit(os.sched_getaffinity, 0)])
    os.write(write, json.dumps([again is before, sorted(found[0])]).encode())
    os._exit(0)
os.wait()
print(os.read(read, 1000).decode())
before.ranges(lambda start, stop: None, 100)
"""


def test_a_forked_child_makes_its_own_pool() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [False, sorted(HERE)]


def test_pools_are_kept_and_belong_to_cpus(tmp_path: Path) -> None:
    machine = topology(**XEON.write(tmp_path), allowed=frozenset({1, 2, 16}))
    assert pool(machine, [0]).cpus == {1, 2}
    assert pool(machine, [1]).cpus == {16}
    assert pool(machine).cpus == {1, 2, 16}
    assert pool(machine, [1]) is pool(machine, [1], 1)
    assert pool(machine, [0]) is not pool(machine, [0], 1)
    assert pool(machine, [0], 7).count == 7


def test_pool_of_a_node_without_cpus_is_the_nearest(tmp_path: Path) -> None:
    machine = topology(**APART.write(tmp_path), allowed=frozenset(range(4)))
    assert pool(machine, [3]).cpus == {2, 3}


def test_pool_where_no_cpu_is_allowed(tmp_path: Path) -> None:
    machine = topology(**Machine(XEON.nodes, XEON.rows).write(tmp_path), allowed=NO_CPU)
    with pytest.raises(UsageError, match="no usable node"):
        pool(machine, [0])
    with pytest.raises(NumaError, match="no CPUs"):
        pool(machine)


def test_allowed_cpus_were_read_at_import() -> None:
    assert HERE == ALLOWED
