"""The processes that ask network file systems, on files of this machine: they know no difference.

What only a network does, staying silent in the middle of a read, is in tests/network_cases.py.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from commands import evict, running, wait_for
from numaload.errors import (
    CancelledError,
    FileChangedError,
    NumaError,
    NumaloadWarning,
    ReadError,
    StalledError,
    UsageError,
)
from numaload.numa import syscalls
from numaload.numa.netmounts import Network
from numaload.numa.stopping import until
from numaload.storage import files, netreader
from numaload.storage.files import SourceFile, io_timeout, reached, real_path
from numaload.storage.netreader import pool
from numaload.storage.netreader_main import MEMORY, PIECE
from numaload.storage.residency import residency

SERVER = Network("nfs4", "server:/models", "/models", "0:99")
SIZE = 2 * MEMORY + 12_345


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A file that is taken for one of a network."""
    monkeypatch.setattr(files, "network_of", lambda _: SERVER)
    monkeypatch.setattr(files, "mount_on", lambda _: None)
    monkeypatch.setattr(netreader, "REAP_S", 60.0)  # a busy machine takes its time
    (tmp_path / "file").write_bytes(random.Random(6).randbytes(SIZE))
    yield str(tmp_path / "file")
    assert pool.idle == []
    assert not pool.busy


def stopped() -> int:
    """The one idle process, which answers nothing from now on."""
    (reader,) = pool.idle
    os.kill(reader.pid, signal.SIGSTOP)
    return reader.pid


def test_every_byte(path: str) -> None:
    expected, dice = Path(path).read_bytes(), random.Random(7)
    with SourceFile(path) as file:
        assert file.is_network
        assert file.size == SIZE
        assert file.read_at(0, SIZE) == expected
        for _ in range(30):
            start = dice.randrange(SIZE)
            nbytes = min(SIZE - start, dice.choice([0, 1, 4095, PIECE, PIECE + 1, MEMORY + 1]))
            assert file.read_at(start, nbytes) == expected[start : start + nbytes]
        assert len(pool.idle) == 1
        file.check_unchanged()


def test_it_is_the_file_that_this_process_sees(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    evict([path])  # written, too
    with SourceFile(path) as far:
        assert os.pread(far.fd, 100, 50) == far.read_at(50, 100)
        far.drop_cache(0, 0)
        assert residency(far).resident == 0
        far.read_at(0, PIECE)
        monkeypatch.setattr(files, "network_of", lambda _: None)
        with SourceFile(path) as near:
            assert near.opened == far.opened
            assert near.identity() == far.identity()
            assert residency(near) == residency(far)
    assert far.fd == -1


def test_the_end_comes_early(path: str) -> None:
    with SourceFile(path) as file:
        os.truncate(path, 3 * PIECE + 5)
        with pytest.raises(FileChangedError, match="ends early") as caught:
            file.read_at(PIECE, 4 * PIECE)
        assert caught.value.offset == 3 * PIECE + 5
        with pytest.raises(FileChangedError, match="size"):
            file.check_unchanged()


def test_another_file_of_that_name_is_not_taken_for_it(path: str) -> None:
    with SourceFile(path) as file:
        Path(path).rename(f"{path}.old")
        Path(path).write_bytes(b"another")
        assert len(file.read_at(0, 100)) == 100  # it is open there
        netreader.end([pool.idle.pop()])
        with pytest.raises(FileChangedError, match="replaced"):
            file.read_at(0, 1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: None, "No such file or directory"),
        (Path.mkdir, "expected a file, found a directory"),
        (os.mkfifo, "expected a file, found a FIFO"),
        (lambda p: p.symlink_to(p), "Too many levels of symbolic links"),
    ],
)
def test_what_is_no_file(path: str, make: Callable[[Path], None], words: str) -> None:
    odd = Path(path).with_name("odd")
    make(odd)
    with pytest.raises(ReadError, match=words) as caught:
        SourceFile(str(odd))
    assert caught.value.path == str(odd)


def test_names_that_are_no_text(path: str) -> None:
    odd = os.fsdecode(os.fsencode(path) + b" \xff\n")
    os.rename(path, odd)
    with SourceFile(odd) as file:
        assert file.read_at(0, 1) == Path(odd).read_bytes()[:1]
    with pytest.raises(ReadError, match="null byte"):
        SourceFile(f"{path}\0")
    os.symlink(odd, path)
    assert real_path(path) == os.path.realpath(path)


def test_no_answer_in_time(path: str) -> None:
    with io_timeout(0.3), SourceFile(path) as file:
        pid = stopped()
        with pytest.raises(StalledError) as caught:
            file.read_at(PIECE, 2 * PIECE)
        error = caught.value
        assert (error.path, error.offset, error.seconds) == (path, PIECE, 0.3)
        assert (error.server, error.mount) == ("server:/models", "/models")
        for words in ("0.3 s", "server:/models", "nfs4", "umount -f -l /models", "--io-timeout"):
            assert words in str(error)
        assert not running(pid)
        assert len(file.read_at(0, PIECE)) == PIECE  # another one is asked


def test_also_for_files_that_are_open(path: str) -> None:
    with SourceFile(path) as file:
        stopped()
        with io_timeout(0.2, [file]), pytest.raises(StalledError):
            file.check_unchanged()
        file.check_unchanged()


def test_names_are_waited_for_too(path: str) -> None:
    with SourceFile(path):
        stopped()
        with io_timeout(0.2), pytest.raises(StalledError), reached(path):
            pytest.fail("there was no answer")


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon"])
def test_what_is_no_time(seconds: float) -> None:
    with pytest.raises(UsageError, match="seconds"), io_timeout(seconds):
        pass


def test_waiting_is_said_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said_so: set[str] = set()
    monkeypatch.setattr("numaload.errors._said", said_so)

    def go_on() -> None:
        wait_for(lambda: bool(said_so), "it to be said")
        os.kill(pid, signal.SIGCONT)

    with SourceFile(path) as file:
        pid = stopped()
        monkeypatch.setattr(netreader, "SAY_S", 0.2)
        goes_on = threading.Thread(target=go_on)
        goes_on.start()
        with pytest.warns(NumaloadWarning, match="waiting for server:/models") as said:
            assert len(file.read_at(0, SIZE)) == SIZE
        goes_on.join()
    assert len(said) == 1
    assert "Ctrl-C ends it" in str(said[0].message)


def when_asked(then: Callable[[], object]) -> threading.Thread:
    """A thread that does this once a process is being asked."""

    def run() -> None:
        wait_for(lambda: bool(pool.busy), "a question")
        then()

    return threading.Thread(target=run)


def test_starting_one_is_not_the_server_s_time(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "python"
    slow.write_text(f'#!/bin/sh\nsleep 0.5\nexec {sys.executable} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    looks = itertools.count()

    def clock() -> float:
        """Half a minute passes while the first one starts, and none afterwards."""
        return 0.0 if next(looks) < 2 else netreader.START_S / 2

    monkeypatch.setattr(netreader, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(netreader, "SAY_S", netreader.START_S)
    with io_timeout(netreader.START_S / 3), SourceFile(path) as file:
        assert len(file.read_at(0, SIZE)) == SIZE
    assert next(looks) > 3


def test_ctrl_c(path: str) -> None:
    with SourceFile(path) as file:
        pid = stopped()
        comes = when_asked(lambda: signal.raise_signal(signal.SIGINT))
        comes.start()
        with pytest.raises(KeyboardInterrupt):
            file.read_at(0, 1)
        comes.join()
        assert not running(pid)


def test_what_nobody_wants_any_more(path: str) -> None:
    over = threading.Event()
    with SourceFile(path) as file:
        pid = stopped()
        when_asked(over.set).start()
        with until(over.is_set), pytest.raises(CancelledError):
            file.read_at(0, 1)
        assert not running(pid)


def test_giving_pages_back_is_not_worth_a_wait(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numaload.storage.netfile.DROP_S", 0.1)
    with SourceFile(path) as file:
        pid = stopped()
        file.drop_cache(0, 0)
        assert not running(pid)
        file.drop_cache(0, 0)  # by none: that would have to be started


def test_an_idle_one_that_was_killed_is_replaced(path: str) -> None:
    with SourceFile(path) as file:
        (reader,) = pool.idle
        os.kill(reader.pid, signal.SIGKILL)
        reader.job.wait()
        assert len(file.read_at(0, SIZE)) == SIZE
        assert pool.idle[0].pid != reader.pid


def test_one_that_nothing_can_be_asked(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then this process reads, as it does where there is no network, and says so."""
    monkeypatch.setattr("numaload.errors._said", set())
    monkeypatch.setattr(sys, "executable", "/bin/true")
    with pytest.warns(NumaloadWarning, match="cannot be stopped"):
        opened = SourceFile(path)
    with opened as file:
        assert file.is_network
        assert file.far is None
        assert file.read_at(5, 5) == Path(path).read_bytes()[5:10]


def test_on_this_machine_after_all(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link there that leads back."""
    monkeypatch.setattr(files, "mount_on", lambda _: Network("ext4", "/dev/sda1", "/", "8:1"))
    with SourceFile(path) as file:
        assert not file.is_network
        assert file.far is None
        assert len(file.read_at(0, SIZE)) == SIZE


def test_each_thread_its_own(path: str) -> None:
    expected = Path(path).read_bytes()
    wrong: list[int] = []

    def read(seed: int) -> None:
        dice = random.Random(seed)
        for _ in range(20):
            start = dice.randrange(SIZE - PIECE)
            if file.read_at(start, PIECE) != expected[start : start + PIECE]:
                wrong.append(start)

    with SourceFile(path) as file:
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert 1 <= len(pool.idle) <= 5
    assert wrong == []


def test_pages_land_where_this_thread_s_would(path: str) -> None:
    """What it may run on is followed; what its memory policy is, others have not."""
    own = os.sched_getaffinity(0)
    try:
        syscalls.set_mempolicy(syscalls.MPOL_PREFERRED, [0])
    except NumaError:
        pytest.skip("no memory policies here: --cap-add SYS_NICE")
    try:
        with SourceFile(path) as file:
            os.sched_setaffinity(0, {min(own)})
            file.read_at(0, 1)
            (reader,) = pool.idle
            assert os.sched_getaffinity(reader.pid) == {min(own)}
            syscalls.set_mempolicy(syscalls.MPOL_DEFAULT, [])
            file.read_at(0, 1)
            assert len(pool.idle) == 2
            assert len({one.policy for one in pool.idle}) == 2
    finally:
        syscalls.set_mempolicy(syscalls.MPOL_DEFAULT, [])
        os.sched_setaffinity(0, own)


def test_forgotten_files_are_closed_with_the_next(path: str) -> None:
    first = SourceFile(path)
    (reader,) = pool.idle
    with SourceFile(path) as second:
        del first
        second.read_at(0, 1)
        wait_for(lambda: len(descriptors(reader.pid, path)) == 1, "the other to be closed")


def descriptors(pid: int, path: str) -> list[str]:
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):  # closed just now
            found += [fd] * (os.readlink(f"/proc/{pid}/fd/{fd}") == path)
    return found


PARENT = """
import os, sys, time
from numaload.numa.netmounts import Network
from numaload.storage.netfile import NetworkFile
from numaload.storage.netreader import pool
file = NetworkFile(sys.argv[1], Network("nfs", "a:/b", "/b", "0:9"))
file.open()
if sys.argv[2] == "forks":
    if os.fork() == 0:
        os.closerange(0, 3)
        time.sleep(100)
print(pool.idle[0].pid, flush=True)
time.sleep(0 if sys.argv[2] == "ends" else 100)
"""


@pytest.mark.parametrize("how", ["ends", "is killed", "forks"])
def test_none_outlives_its_process(tmp_path: Path, how: str) -> None:
    (tmp_path / "file").write_bytes(b"x")
    job = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path / "file"), how], stdout=subprocess.PIPE,
        text=True, start_new_session=True,
    )  # fmt: skip
    assert job.stdout
    pid = int(job.stdout.readline())
    if how != "ends":
        assert running(pid)
        job.kill()
    job.wait()
    wait_for(lambda: not running(pid), "it to end")
    job.stdout.close()
    try:
        os.killpg(job.pid, signal.SIGKILL)  # what was forked
    except ProcessLookupError:
        assert how != "forks"


FORKED = """
import os, sys
from numaload.numa.netmounts import Network
from numaload.storage.netfile import NetworkFile
from numaload.storage.netreader import pool
file, view = NetworkFile(sys.argv[1], Network("nfs", "a:/b", "/b", "0:9")), memoryview(bytearray(9))
file.open()
first = pool.idle[0].pid
child = os.fork()
if child == 0:
    read = file.read(view, 0)
    other = pool.idle[0].pid
    file.close()
    os._exit(0 if (read, pool.idle) == (9, []) and other != first else 1)
status = os.waitpid(child, 0)[1]
print(status, file.read(view, 0), pool.idle[0].pid == first)
"""


def test_a_forked_process_asks_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456789")
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(tmp_path / "file")], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0 9 True\n", "")


def test_the_working_directory_may_change(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SourceFile("file") as file:
        monkeypatch.chdir("/")
        netreader.end([pool.idle.pop()])
        assert file.read_at(0, 9) == Path(path).read_bytes()[:9]
