"""The threads that ask network file systems, on files of this machine: they know no difference.

What only a network does, staying silent inside the kernel, is in tests/network_cases.py.
"""

from __future__ import annotations

import _thread
import gc
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import LIMIT_S, evict, wait_for
from numaload.errors import (
    CancelledError,
    FileChangedError,
    NumaError,
    NumaloadWarning,
    ReadError,
    StalledError,
    UsageError,
)
from numaload.files import network
from numaload.files import source as files
from numaload.files.network import NAME, PIECE, NetworkPath
from numaload.files.residency import residency
from numaload.files.source import SourceFile, io_timeout, reach, real_path
from numaload.linux import syscalls
from numaload.linux.mounts import Mount
from numaload.machine.stopping import CancelToken
from numaload.machine.threads import threads
from numaload.pagecache.job import prewarm_async

SERVER = Mount("0:99", "/models", "nfs4", source="server:/models")
SIZE = 5 * PIECE + 12_345


# Time limit of files that are also read while the server answers: a busy machine answers late.
SOON_S = 1.5


class Server:
    """Holds back the system calls of the threads that ask, while it is silent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.works = threading.Event()
        self.works.set()
        self.held = 0
        for name in ("preadv", "stat", "fstat", "posix_fadvise", "fdatasync"):
            monkeypatch.setattr(os, name, self._slow(getattr(os, name)))

    def _slow(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if getattr(network._local, "asks", False) and not self.works.is_set():
                self.held += 1
                self.works.wait()
            return real(*arguments, **named)

        return call

    def falls_silent(self) -> None:
        self.works.clear()

    def answers(self) -> None:
        """What was asked while it was silent, and all that is asked from now on."""
        self.works.set()

    def forgets(self) -> None:
        """Answers questions from now on; those it has it keeps until ``answers``."""
        self.old, self.works = self.works, threading.Event()
        self.works.set()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    found = Server(monkeypatch)
    yield found
    found.answers()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server) -> Iterator[str]:
    """A file that is taken for one of a network."""
    monkeypatch.setattr(files, "network_of", lambda _: SERVER)
    monkeypatch.setattr(files, "mount_with", lambda _: None)
    (tmp_path / "file").write_bytes(random.Random(6).randbytes(SIZE))
    before = len(descriptors(str(tmp_path / "file")))
    yield str(tmp_path / "file")
    server.answers()
    wait_for(lambda: len(descriptors(str(tmp_path / "file"))) == before, "it to be closed")


def descriptors(path: str) -> list[int]:
    """Those of this process that are this file's."""
    found = []
    for fd in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):  # closed just now
            found += [fd] * (os.readlink(f"/proc/self/fd/{fd}") == path)
    return found


def test_every_byte(path: str) -> None:
    expected, dice = Path(path).read_bytes(), random.Random(7)
    with SourceFile(path) as file:
        assert file.is_network
        assert file.size == SIZE
        assert file.read_at(0, SIZE) == expected
        for _ in range(30):
            start = dice.randrange(SIZE)
            nbytes = min(SIZE - start, dice.choice([0, 1, 4095, PIECE, PIECE + 1, 3 * PIECE + 1]))
            assert file.read_at(start, nbytes) == expected[start : start + nbytes]
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
    before = Path(path).read_bytes()[:100]
    with SourceFile(path) as file:
        Path(path).rename(f"{path}.old")
        Path(path).write_bytes(b"another")
        assert file.read_at(0, 100) == before
        with pytest.raises(FileChangedError, match="another file"):
            file.check_name()
        Path(path).unlink()
        with pytest.raises(FileChangedError, match="removed"):
            file.check_name()


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
    with pytest.raises(ReadError, match="embedded null"):
        SourceFile(f"{path}\0")
    os.symlink(odd, path)
    assert real_path(path) == os.path.realpath(path)


def test_no_answer_in_time(path: str, server: Server) -> None:
    with io_timeout(SOON_S), SourceFile(path) as file:
        server.falls_silent()
        with pytest.raises(StalledError) as caught:
            file.read_at(PIECE, 2 * PIECE)
        error = caught.value
        assert (error.path, error.offset, error.seconds) == (path, PIECE, SOON_S)
        assert (error.server, error.mount) == ("server:/models", "/models")
        for words in (
            f"{SOON_S} s",
            "server:/models",
            "nfs4",
            "umount -f -l /models",
            "--io-timeout",
        ):
            assert words in str(error)
        server.forgets()
        assert len(file.read_at(0, PIECE)) == PIECE  # another thread asks
        server.old.set()


def test_a_late_answer_is_written_nowhere(path: str, server: Server) -> None:
    memory = bytearray(2 * PIECE)
    with io_timeout(SOON_S), SourceFile(path) as file:
        server.falls_silent()
        with pytest.raises(StalledError):
            file.read_into(memoryview(memory), 0)
        server.forgets()
        file.read_at(PIECE, PIECE)
        server.old.set()
    wait_for(lambda: descriptors(path) == [], "the late answer")
    assert not any(memory)


def test_a_descriptor_that_a_thread_is_inside_with_stays_open(path: str, server: Server) -> None:
    """Its number would be another file's otherwise, which that thread would read."""
    with io_timeout(SOON_S):
        file = SourceFile(path)
    fd = file.fd
    server.falls_silent()
    with pytest.raises(StalledError):
        file.check_unchanged()
    file.close()
    server.forgets()
    SourceFile(path).close()  # which is what is asked next
    wait_for(lambda: len(descriptors(path)) == 1, "the other to be closed")
    assert descriptors(path) == [fd]
    server.old.set()
    wait_for(lambda: descriptors(path) == [], "it to be closed")


def test_an_error_that_is_kept_keeps_no_file_open(path: str, server: Server) -> None:
    server.falls_silent()
    with io_timeout(0.1), pytest.raises(StalledError) as caught:
        SourceFile(path)
    server.answers()
    wait_for(lambda: descriptors(path) == [], "the late answer")
    assert caught.value.path == path


def test_also_for_files_that_are_open(path: str, server: Server) -> None:
    with SourceFile(path) as file:
        server.falls_silent()
        with io_timeout(SOON_S, [file]), pytest.raises(StalledError):
            file.check_unchanged()
        server.answers()
        file.check_unchanged()


def test_names_are_waited_for_too(path: str, server: Server) -> None:
    server.falls_silent()
    with io_timeout(0.2), pytest.raises(StalledError):
        reach(path)
    with io_timeout(0.2), pytest.raises(StalledError):
        SourceFile(path)


def test_a_name_that_nobody_tells_is_as_it_was_given(
    path: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "real", lambda name: os.stat(name) and "/elsewhere")
    assert real_path(path) == "/elsewhere"
    server.falls_silent()
    monkeypatch.setattr(files, "NAME_S", 0.1)
    assert real_path(path) == path


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "soon"])
def test_what_is_no_time(seconds: float) -> None:
    with pytest.raises(UsageError, match="seconds"), io_timeout(seconds):
        pass


def test_waiting_is_said_once(path: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    said_so: set[str] = set()
    monkeypatch.setattr("numaload.errors._said", said_so)

    def go_on() -> None:
        wait_for(lambda: bool(said_so), "it to be said")
        server.answers()

    with SourceFile(path) as file:
        server.falls_silent()
        monkeypatch.setattr(network, "SAY_S", 0.2)
        goes_on = threading.Thread(target=go_on)
        goes_on.start()
        with pytest.warns(NumaloadWarning, match="waiting for server:/models") as said:
            assert len(file.read_at(0, SIZE)) == SIZE
        goes_on.join()
    assert len(said) == 1
    assert "Ctrl-C ends it" in str(said[0].message)


def when_asked(server: Server, then: Callable[[], object]) -> threading.Thread:
    """A thread that does this once the server is being asked."""

    def run() -> None:
        wait_for(lambda: server.held > 0, "a question")
        then()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_ctrl_c(path: str, server: Server) -> None:
    with SourceFile(path) as file:
        server.falls_silent()
        comes = when_asked(server, lambda: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            file.read_at(0, 1)
        comes.join()


def test_ctrl_c_while_dirty_pages_are_written(
    path: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.fdatasync

    def silently(fd: int) -> None:
        server.falls_silent()
        write(fd)

    monkeypatch.setattr(os, "fdatasync", silently)
    comes = when_asked(server, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        api.evict(path)
    comes.join()


def test_what_nobody_wants_any_more(path: str, server: Server) -> None:
    token = CancelToken()
    with SourceFile(path) as file:
        server.falls_silent()
        comes = when_asked(server, token.cancel)
        with token, pytest.raises(CancelledError):
            file.read_at(0, 1)
        comes.join()


def test_a_job_that_is_cancelled_while_the_server_is_silent(path: str, server: Server) -> None:
    evict([path])
    server.falls_silent()
    job = prewarm_async(path)
    wait_for(lambda: bool(server.held), "the server to be asked")
    job.cancel()
    with pytest.raises(CancelledError):
        job.result(timeout=LIMIT_S)


def test_giving_pages_back_is_not_worth_a_wait(
    path: str, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "DROP_S", SOON_S)  # or the thread that asks has not begun
    with SourceFile(path) as file:
        server.falls_silent()
        file.drop_cache(0, 0)
        assert server.held == 1


def test_without_a_thread_this_one_reads(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there is no network, and that is said."""
    monkeypatch.setattr("numaload.errors._said", set())
    monkeypatch.setattr(network, "_threads", network._Threads())  # none is idle

    def refuse(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(_thread, "start_new_thread", refuse)
        with pytest.warns(NumaloadWarning, match="cannot be stopped"):
            file = SourceFile(path)
        assert file.is_network
        assert file.read_at(5, 5) == Path(path).read_bytes()[5:10]
    file.close()


def test_on_this_machine_after_all(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link there that leads back."""
    monkeypatch.setattr(files, "mount_with", lambda _: Mount("8:1", "/", "ext4"))
    with SourceFile(path) as file:
        assert not file.is_network
        assert len(file.read_at(0, SIZE)) == SIZE
    assert descriptors(path) == []


def asking() -> int:
    """Threads of this process that ask networks."""
    return [thread.name for thread in threads()].count(NAME)


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
        at_once = [threading.Thread(target=read, args=(seed,)) for seed in range(5)]
        for thread in at_once:
            thread.start()
        for thread in at_once:
            thread.join()
    assert wrong == []


def test_threads_end_when_nobody_asks(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_threads", network._Threads())
    monkeypatch.setattr(network, "IDLE_S", 0.05)
    with SourceFile(path) as file:
        for _ in range(3):
            assert len(file.read_at(0, SIZE)) == SIZE
            wait_for(network._threads.idle.empty, "it to end")


def test_pages_land_where_this_thread_s_would(path: str) -> None:
    """Whoever asks lends its CPUs and its memory policy to the thread that reads."""
    own = os.sched_getaffinity(0)
    try:
        syscalls.set_mempolicy(syscalls.MPOL_PREFERRED, [0])
    except NumaError:
        pytest.skip("no memory policies here: --cap-add SYS_NICE")
    try:
        with SourceFile(path) as file:
            os.sched_setaffinity(0, {min(own)})
            assert file.ask(os.sched_getaffinity, 0) == {min(own)}
            assert file.ask(syscalls.get_mempolicy) == (syscalls.MPOL_PREFERRED, [0])
            os.sched_setaffinity(0, own)
            syscalls.set_mempolicy(syscalls.MPOL_DEFAULT, [])
            assert file.ask(os.sched_getaffinity, 0) == own
            assert file.ask(syscalls.get_mempolicy) == (syscalls.MPOL_DEFAULT, [])
    finally:
        syscalls.set_mempolicy(syscalls.MPOL_DEFAULT, [])
        os.sched_setaffinity(0, own)


def test_forgotten_files_are_closed(path: str) -> None:
    file: SourceFile | None = SourceFile(path)
    assert len(descriptors(path)) == 1
    del file
    gc.collect()
    wait_for(lambda: descriptors(path) == [], "it to be closed")


STUCK = """
import os, sys, time
from numaload.errors import StalledError
from numaload.linux.mounts import Mount
from numaload.files.network import NetworkPath
path = NetworkPath("x", Mount("0:9", "/b", "nfs"), 0.1)
try:
    path.ask(time.sleep, 10_000)
except StalledError:
    print("stalled", flush=True)
if sys.argv[1] == "forks" and os.fork() == 0:
    print(path._replace(seconds=None).ask(max, 1, 2), flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(("how", "said"), [("ends", "stalled\n"), ("forks", "stalled\n2\n")])
def test_no_exit_waits_for_a_thread_that_was_given_up(how: str, said: str) -> None:
    """A forked process asks threads of its own."""
    done = subprocess.run(
        # Python 3.12 and later warn of every fork beside threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", STUCK, how],
        capture_output=True, text=True, check=False, timeout=LIMIT_S,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, said, "")


def test_the_working_directory_may_change(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with SourceFile("file") as file:
        monkeypatch.chdir("/")
        assert file.read_at(0, 9) == Path(path).read_bytes()[:9]
        file.check_name()


def test_errors_come_from_where_they_were_raised(path: str) -> None:
    asked = NetworkPath(path, SERVER, None)
    with pytest.raises(ZeroDivisionError):
        asked.ask(divmod, 1, 0)
    with pytest.raises(FileNotFoundError):
        asked.ask(os.stat, f"{path}.gone")
