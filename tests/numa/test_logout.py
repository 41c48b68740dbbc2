"""Replicas of an ordinary user whose session ends: hung up, then all of /dev/shm taken away."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import numaload as api
from commands import LIMIT_S, Numaload, running, wait_for
from forked import ForkedNumaload
from numaload.machine.userdir import SHARED_MEMORY
from witness import PAGE, by_move_pages, by_numa_maps

MIB = 1 << 20
ATTACH_AND_WAIT = """
import sys, numaload
m = numaload.attach(sys.argv[1])
print("right" if m.verify().right else "wrong", flush=True)
sys.stdin.read()
"""


class Session:
    """A shell at a terminal of its own, as after a login."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.screen, terminal = pty.openpty()
        self.shell = subprocess.Popen(
            ["sh"], stdin=terminal, stdout=terminal, stderr=terminal, env=environment,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509
        )  # fmt: skip
        os.close(terminal)
        self.seen = ""

    def type(self, line: str) -> None:
        os.write(self.screen, line.encode() + b"\n")

    def read_until(self, pattern: str) -> str:
        end = time.monotonic() + LIMIT_S
        while not (match := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert select.select([self.screen], [], [], max(0, left))[0], self.seen
            self.seen += os.read(self.screen, 4096).decode(errors="replace")
        return match[1]

    def hang_up(self) -> None:
        """Its leader dies: the kernel sends SIGHUP to whatever is at work in the terminal."""
        self.shell.kill()
        self.shell.wait()
        os.close(self.screen)


def as_at_logout(folder: str) -> None:
    """Remove what this user owns, whatever it is called, as logind does in clean-ipc.c."""
    with os.scandir(folder) as found:
        entries = list(found)
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            as_at_logout(entry.path)
        if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
            remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
            remove(entry.path)


def shared_bytes() -> int:
    match = re.search(r"Shmem:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert match
    return int(match[1]) << 10


@pytest.fixture
def usual() -> Iterator[Numaload]:
    """The command line on the store that this user has without asking for one."""
    if os.geteuid() == 0:
        pytest.skip("logind spares what root has in shared memory: an ordinary user is needed")
    usual = ForkedNumaload(Path(f"{SHARED_MEMORY}/numaload-{os.geteuid()}"))
    assert not usual.store.exists()
    yield usual
    usual("release")
    shutil.rmtree(usual.store)


@pytest.fixture
def session(usual: Numaload) -> Iterator[Session]:
    session = Session(usual.environment)
    yield session
    if session.shell.poll() is None:
        session.hang_up()


def test_held_replicas_are_there_after_logout(
    usual: Numaload,
    session: Session,
    model: str,
    model_files: list[str],
    nodes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = shared_bytes()
    size = sum(map(os.path.getsize, model_files)) * len(nodes)
    session.type(shlex.join(usual.command("mirror", "--hold", model)))
    holder = int(session.read_until(r"held by process (\d+)"))
    session.type("echo status $?; sleep 600 & echo left $!; fg")
    assert session.read_until(r"status (\d+)") == "0", session.seen
    other = int(session.read_until(r"left (\d+)"))
    session.read_until(r"left \d+\s+(sleep)")
    assert (usual.store / "known").exists()

    session.hang_up()
    wait_for(lambda: not running(other), "what was at work in the session to be hung up", 60)
    as_at_logout(SHARED_MEMORY)
    assert not (usual.store / "known").exists()

    wait_for(lambda: bool(list(usual.store.glob("*.*/manifest.json"))), "the entry", 60)
    assert running(holder)
    (entry,) = usual.json("status")["replicas"]
    assert entry["holder"] == holder
    assert [int(node) for node in entry["replicas"]] == nodes
    for paths in entry["replicas"].values():
        for path, source in zip(paths, model_files, strict=True):
            assert os.path.basename(path) == os.path.basename(source)
            assert Path(path).read_bytes() == Path(source).read_bytes()
    (row,) = usual.json("verify", model)
    assert row["right"]

    monkeypatch.setenv("NUMALOAD_STORE", str(usual.store))
    check_by_witnesses(usual, model, model_files, nodes)

    (released,) = usual.json("release")
    assert not released["in_use"]
    assert not running(holder)
    assert [name for name in os.listdir(usual.store) if "." in name] == []
    assert shared_bytes() - before < size // 4


def check_by_witnesses(
    usual: Numaload, model: str, model_files: list[str], nodes: list[int]
) -> None:
    """A process of a new session attaches; where its pages are is asked without numaload."""
    job = subprocess.Popen(
        [sys.executable, "-c", ATTACH_AND_WAIT, model], env=usual.environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert job.stdout is not None
    assert job.stdout.readline() == "right\n"
    pages = sum(-(-os.path.getsize(path) // PAGE) for path in model_files)
    assert by_numa_maps(job.pid, "/memfd:") == dict.fromkeys(nodes, pages)
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 0
    with api.attach(model) as mirror:
        assert mirror.report.placed
        for node in nodes:
            for tensor in mirror.view(node).values():
                assert set(by_move_pages(tensor.address, tensor.nbytes)) == {node}


def test_a_session_that_is_hung_up_half_way_leaves_nothing(
    usual: Numaload, session: Session, model: str
) -> None:
    """The builder hears SIGHUP while it fills: no holder, no memory, no entry."""
    before = shared_bytes()
    session.type(shlex.join(usual.command("mirror", "--hold", model)))
    wait_for(lambda: shared_bytes() - before > 12 * MIB, "the build to begin")
    session.hang_up()
    wait_for(lambda: shared_bytes() - before < 4 * MIB, "memory to come back")
    assert usual.json("status")["replicas"] == []
    names = [path.read_text() for path in Path("/proc").glob("[0-9]*/comm") if path.exists()]
    assert "numaload-hold\n" not in names
