"""Ctrl-C and kills at any moment: a named end, nothing lost, nothing left, no traceback.

Many random moments are tried by scripts/kill-builders, here a few of them (8: one of each of the
turns that verbs take there) and the awkward ones.
"""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from commands import LIMIT_S, Numaload, wait_for
from forked import ForkedNumaload
from numaload.demo import write_model

SCRIPT = Path(__file__).parents[2] / "scripts" / "kill-builders"


@pytest.mark.parametrize(("how", "count"), [("KILL", 6), ("INT", 6), ("TERM", 3), ("HUP", 3)])
def test_random_moments(how: str, count: int) -> None:
    words = ["--kills", count, "--signal", how, "--seed", 3, "--size", "40M"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], capture_output=True, text=True,
        timeout=LIMIT_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"SIG{how}: {count} sent (seed 3)" in done.stdout
    assert "lost: nothing" in done.stdout


def test_random_moments_with_a_holder() -> None:
    words = ["--kills", "5", "--seed", "4", "--size", "40M", "--hold"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *words], capture_output=True, text=True, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "SIGKILL (--hold): 5 sent (seed 4)" in done.stdout


def command(program: str, *words: object) -> subprocess.Popen[str]:
    """A program in another process, which prints when it is ready."""
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def ignore_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


SLOW = """
import sys, time
from numaload.cli import interrupts
interrupts.GRACE_S = int(sys.argv[1])
interrupts.take_over()
try:
    print("ready", flush=True)
    time.sleep(100)
finally:
    print("undoing", flush=True)
    time.sleep(100)  # as for a disk that does not answer
"""


@pytest.mark.parametrize(("grace", "signals"), [(100, 2), (1, 1)], ids=["again", "never mind"])
def test_what_does_not_end_is_ended(grace: int, signals: int) -> None:
    with command(SLOW, grace) as job:
        assert job.stdout
        assert job.stdout.readline() == "ready\n"
        job.send_signal(signal.SIGINT)
        assert job.stdout.readline() == "undoing\n"
        for _ in range(signals - 1):
            job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (130, "numaload: error: interrupted\n")


LOST = """
import os, signal
from numaload.cli import interrupts
class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
interrupts.take_over()
Dropped()
signal.pause()
"""
SWALLOWED = """
import os, signal, sys
from numaload.cli import files
from numaload.cli.main import main
def run(options):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # as some libraries do while they are imported
        raise ImportError("odd")
files.inspect = run
sys.argv[1:] = ["inspect", "x"]
sys.exit(main())
"""
AFTER = """
import atexit, os, signal, sys
from numaload.cli.main import main
atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv[1:] = ["nodes"]
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("program", "status", "said"),
    [
        (LOST, 130, "numaload: error: interrupted\n"),
        (SWALLOWED, 130, "numaload: error: interrupted\n"),
        (AFTER, 0, ""),
    ],
    ids=["in __del__", "swallowed", "after the end"],
)
def test_ctrl_c_where_python_loses_it(program: str, status: int, said: str) -> None:
    with command(program) as job:
        _, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (status, said)


def test_ctrl_c_that_is_ignored_stays_ignored(numaload: Numaload, model: str) -> None:
    """As below nohup, and for background jobs of scripts."""
    with numaload.start("mirror", model, preexec_fn=ignore_ctrl_c) as job:
        while job.poll() is None:
            job.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                job.wait(0.01)
    assert job.returncode == 0
    assert "all checksums right" in numaload("verify", model).stdout


def test_ctrl_c_while_waiting_for_another_builder(numaload: Numaload, model: str) -> None:
    numaload.store.mkdir(mode=0o700)
    with open(numaload.store / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = numaload.start("mirror", model)
        assert job.stderr
        wait_for(lambda: waits_for_lock(job.pid), "the builder to wait")
        job.send_signal(signal.SIGINT)
        _, errors = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "another process is building" in errors
    assert "Traceback" not in errors


def waits_for_lock(pid: int) -> bool:
    """By the kernel's list of locks: ``1: -> FLOCK  ADVISORY  WRITE 4711 ...``."""
    return bool(re.search(rf"-> FLOCK .* {pid} ", Path("/proc/locks").read_text()))


API = """
import json, os, signal, sys, threading, time
import numaload

def anonymous():
    (line,) = (x for x in open("/proc/self/status") if x.startswith("RssAnon"))
    return int(line.split()[1]) << 10

path, call, every = sys.argv[1], sys.argv[2], sys.argv[3] == "every"
calls = {
    "copy": lambda p: numaload.open(path, copy=True, progress=p),
    "mirror": lambda p: numaload.mirror(path, shared=True, progress=p),
    "prewarm": lambda p: numaload.prewarm(path, progress=p),
}
fd = os.open(path, os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
handler = signal.getsignal(signal.SIGINT)
before, fds = anonymous(), len(os.listdir("/proc/self/fd"))
sent = []

def progress(done, total):
    if (done or every) and (every or not sent):
        sent.append(done)
        os.kill(os.getpid(), signal.SIGINT)

raised = None
try:
    calls[call](progress)
except BaseException as error:
    raised = type(error).__name__
# Not joined: the interrupt may have come between a thread's making and its first step.
until = time.monotonic() + 60
while threading.active_count() > 1 and time.monotonic() < until:
    time.sleep(0.005)
import gc
gc.collect()
print(json.dumps({
    "raised": raised,
    "memory": anonymous() - before,
    "descriptors": len(os.listdir("/proc/self/fd")) - fds,
    "handler": signal.getsignal(signal.SIGINT) is handler,
    "threads": threading.active_count(),
    "again": calls[call](None) is not None,
}))
"""


@pytest.mark.parametrize("call", ["copy", "mirror", "prewarm"])
@pytest.mark.parametrize("often", ["once", "every"])
def test_ctrl_c_in_the_api(numaload: Numaload, model: str, call: str, often: str) -> None:
    """Users' programs go on: nothing is held back, and the next call works."""
    found = numaload.python(API, model, call, often)
    assert found["raised"] in ("CancelledError", "KeyboardInterrupt")
    assert found["memory"] < 16 << 20
    assert found["descriptors"] == 0
    assert found["handler"]
    assert found["threads"] == 1
    assert found["again"]


STEP = """
import os, signal, sys
left, how = int(sys.argv[1]), int(sys.argv[2])
steps = ("mkdir", "link", "rename", "remove", "rmdir")
def hook(event, _):
    global left
    left -= event.startswith("os.") and event[3:] in steps
    if not left:
        left = -1
        os.kill(os.getpid(), how)
from numaload.cli.main import main
sys.argv[1:] = sys.argv[3:]
sys.addaudithook(hook)
sys.exit(main())
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "ctrl-c"])
@pytest.mark.parametrize("verb", ["mirror", "release"])
def test_before_every_step_that_changes_the_store(
    store: Path, tmp_path: Path, verb: str, how: signal.Signals
) -> None:
    """Every change of a name in the store, one after the other, until one run needs no more."""
    numaload = ForkedNumaload(store)  # for what comes before and after, many times
    small = write_model(str(tmp_path / "small.gguf"), 1)[0]
    stopped = 0
    while True:
        numaload(*(["mirror", small] if verb == "release" else ["release"]))
        done = subprocess.run(
            [sys.executable, "-c", STEP, str(stopped + 1), str(int(how)), verb, small],
            capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr
        if done.returncode == 0:
            break
        assert done.returncode == (130 if how is signal.SIGINT else -how), done.stderr
        stopped += 1
        entries = numaload.json("status")["replicas"]
        numaload("prewarm", small)  # makes the store, if it was not reached
        names = [name for name in os.listdir(store) if "." in name]
        assert len(names) == len(entries) <= 1
        assert not any(name.startswith(".") for name in names)
        numaload("mirror", small)
        assert "all checksums right" in numaload("verify", small).stdout
    assert stopped >= 5


def test_leftovers_of_records_are_cleared(numaload: Numaload, model: str) -> None:
    """As a kill leaves them that came while a record was written."""
    numaload("prewarm", model)
    folder = numaload.store / "known"
    (folder / f".{'0' * 32}.json.abcdabcd").touch()
    numaload("status")
    assert [name for name in os.listdir(folder) if name.startswith(".")] == []
    (folder / f".{'2' * 32}.json.abcdabcd").touch()
    fd = os.open(folder, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)  # as somebody holds it who is writing
    numaload("status")
    assert (folder / f".{'2' * 32}.json.abcdabcd").exists()
    os.close(fd)
    numaload("prewarm", model)
    assert not (folder / f".{'2' * 32}.json.abcdabcd").exists()
