"""The process that holds replicas, driven for real: it publishes, stays, publishes again, ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from commands import running, wait_for
from numaload.errors import StoreError
from numaload.holder import process
from numaload.holder.process import TASKS, HolderProcess
from numaload.linux.mounts import mount_of
from numaload.machine.userdir import MARKER
from numaload.replicas import hold as holding
from numaload.replicas.hold import hold

NAME = "0123456789abcdef0123456789abcdef.cafecafe"
MANIFEST = {"version": 1, "model": {"paths": ["/x/m.gguf"]}}
PAGES = os.urandom(3 * 4096 + 5)
INTERVAL_S = 1.0  # between two looks whether the entry is there
SMALL = 20 << 20  # of memory: an interpreter and no more, half of it shared with every other one

Start = Callable[..., HolderProcess]


def memfd(data: bytes = PAGES) -> int:
    fd = os.memfd_create("numaload-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    return fd


def manifest_of(store: Path) -> Any:
    return json.loads((store / NAME / "manifest.json").read_text())


def start_time(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])


@pytest.fixture
def start(store: Path) -> Iterator[Start]:
    """Starts holders that end with the test."""
    started: list[HolderProcess] = []

    def one(files: list[tuple[str, str]] | None = None, **more: Any) -> HolderProcess:
        links = [(node, name, memfd()) for node, name in files or [("node0", "m.gguf")]]
        try:
            paths = [f"/x/{name}" for _, name, _ in links]
            started.append(hold(NAME, MANIFEST | {"model": {"paths": paths}} | more, links))
        finally:
            for _, _, fd in links:
                os.close(fd)
        return started[-1]

    yield one
    for holder in started:
        holder.end()


def listed(store: Path) -> list[str]:
    """What is in the store beside its marker."""
    return sorted(set(os.listdir(store)) - {MARKER})


def test_an_entry_of_links_that_every_process_can_read(store: Path, start: Start) -> None:
    files = [("node0", "m-00001.gguf"), ("node0", "m-00002.gguf"), ("node3", "m-00001.gguf")]
    pid = start(files, seconds=1.5).pid
    for node, name in files:
        path = store / NAME / node / name
        assert os.readlink(path).startswith(f"/proc/{pid}/fd/")
        other = subprocess.run(["cat", path], capture_output=True, check=True)
        assert other.stdout == PAGES
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o400
    found = manifest_of(store)
    assert (found["version"], found["seconds"]) == (1, 1.5)
    assert found["holder"]["pid"] == pid
    assert found["holder"]["start"] == start_time(pid)
    assert found["pid_namespace"] == os.readlink("/proc/self/ns/pid")
    seen = [os.stat(store / NAME / node / name) for node, name in files]
    assert found["holder"]["files"] == [[s.st_dev, s.st_ino] for s in seen]
    assert listed(store) == [NAME]
    assert stat.S_IMODE(os.stat(store / NAME).st_mode) == 0o700


def test_it_is_small_apart_from_us_and_called_by_its_name(start: Start) -> None:
    pid = start().pid
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    assert status["Name"] == holding.NAME
    assert int(status["VmRSS"].split()[0]) << 10 < SMALL
    assert os.getsid(pid) not in (os.getsid(0), pid)  # of no terminal, and cannot get one
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    assert held == {"/dev/null", "/memfd:numaload-test (deleted)"}
    assert "memfd" not in Path(f"/proc/{pid}/maps").read_text()  # so it is not the OOM killer's
    assert (
        Path(f"/proc/{pid}/oom_score_adj").read_text()
        == Path("/proc/self/oom_score_adj").read_text()
    )


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGPIPE])
def test_it_outlives_what_ends_others(store: Path, start: Start, number: signal.Signals) -> None:
    holder = start()
    os.kill(holder.pid, number)
    time.sleep(0.2)
    assert holder.alive()
    assert (store / NAME / "node0" / "m.gguf").read_bytes() == PAGES


BUILDER = """
import json, os, sys
from numaload.replicas.hold import hold
fd = os.memfd_create("numaload-test", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
os.write(fd, b"held")
manifest = {"version": 1, "model": {"paths": ["/x/m.gguf"]}}
holder = hold(sys.argv[1], manifest, [("node0", "m.gguf", fd)])
print(json.dumps(holder), flush=True)
os.kill(os.getpid(), int(sys.argv[2]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_it_outlives_its_builder_and_the_session(store: Path, number: signal.Signals) -> None:
    words = [sys.executable, "-c", BUILDER, NAME, str(int(number))]
    done = subprocess.run(words, stdout=subprocess.PIPE, start_new_session=True, check=False)
    assert done.returncode == -number
    holder = HolderProcess(*json.loads(done.stdout))
    try:
        assert (store / NAME / "node0" / "m.gguf").read_bytes() == b"held"
    finally:
        assert holder.end()
    assert listed(store) == []


def test_ending_it_takes_the_entry_away_and_frees_the_memory(store: Path, start: Start) -> None:
    holder = start()
    reader = os.open(store / NAME / "node0" / "m.gguf", os.O_RDONLY)
    try:
        assert holder.end()
        assert listed(store) == []
        assert not holder.alive()
        assert not holder.end()
        # Whoever has it open keeps it: it hurts nobody.
        assert os.pread(reader, len(PAGES), 0) == PAGES
    finally:
        os.close(reader)


def test_killed_it_leaves_an_entry_that_leads_nowhere(store: Path, start: Start) -> None:
    holder, path = start(), store / NAME / "node0" / "m.gguf"
    os.kill(holder.pid, signal.SIGKILL)
    wait_for(lambda: not holder.alive(), "the holder to die")
    assert os.path.islink(path)
    # Until its parent looks, the dead process is there, with files that nobody may see.
    with pytest.raises((FileNotFoundError, PermissionError)):
        path.read_bytes()


@pytest.mark.slow  # waits until it has looked
@pytest.mark.parametrize("what", ["the store", "the entry", "its manifest", "a link"])
def test_it_publishes_again_what_somebody_removed(store: Path, start: Start, what: str) -> None:
    holder = start([("node0", "a.gguf"), ("node1", "a.gguf")])
    before = manifest_of(store)
    if what == "the store":
        shutil.rmtree(store)  # as at logout
    elif what == "the entry":
        shutil.rmtree(store / NAME)
    else:
        name = {"its manifest": "manifest.json", "a link": "node1/a.gguf"}[what]
        (store / NAME / name).unlink()
    path = store / NAME / "node1" / "a.gguf"
    manifest = store / NAME / "manifest.json"
    wait_for(lambda: manifest.exists() and path.exists(), f"{what} to come back", 60)
    assert path.read_bytes() == PAGES
    assert manifest_of(store) == before
    assert stat.S_IMODE(os.stat(store).st_mode) == 0o700
    assert listed(store) == [NAME, "lock"]
    assert holder.end()
    assert listed(store) == ["lock"]


@pytest.mark.slow  # waits until it has looked twice
def test_it_waits_for_who_builds(store: Path, start: Start) -> None:
    """A sweep would take the folder that it is writing; and it still hears SIGTERM meanwhile."""
    holder = start()
    lock = os.open(store / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(store / NAME)
        time.sleep(2.5 * INTERVAL_S)
        assert listed(store) == ["lock"]
        fcntl.flock(lock, fcntl.LOCK_UN)
        wait_for((store / NAME).exists, "the entry to come back", 60)
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(store / NAME)
        assert holder.end()
        assert listed(store) == ["lock"]
    finally:
        os.close(lock)


@pytest.mark.slow  # waits until it has looked twice
@pytest.mark.parametrize("kind", ["open to others", "a link"])
def test_it_does_not_publish_into_a_folder_that_is_not_safe(
    store: Path, start: Start, kind: str, tmp_path: Path
) -> None:
    start()
    shutil.rmtree(store)
    if kind == "a link":
        tmp_path.chmod(0o700)
        store.symlink_to(tmp_path)
    else:
        store.mkdir()
        store.chmod(0o755)
    time.sleep(2.5 * INTERVAL_S)
    assert listed(store) == []
    if kind == "a link":
        store.unlink()
    else:
        store.chmod(0o700)
    wait_for((store / NAME / "manifest.json").exists, "the entry to come back", 60)


def test_only_this_very_process_is_ended(start: Start) -> None:
    holder = start()
    assert holder.alive()
    other_start = holder._replace(start=holder.start + 1)
    assert not other_start.alive()
    assert not other_start.end()
    # Another process of ours, by its own start time: it is no holder.
    with subprocess.Popen(["sleep", "600"]) as other:
        assert not holder._replace(pid=other.pid, start=start_time(other.pid)).end()
        assert other.poll() is None
        other.kill()
    assert holder.alive()


def test_one_that_does_not_listen_is_killed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = start()
    os.kill(holder.pid, signal.SIGSTOP)
    monkeypatch.setattr(process, "END_S", 0.2)
    assert holder.end()
    assert not holder.alive()


def test_without_pidfds(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    holder = start()
    monkeypatch.setattr(os, "pidfd_open", refuse)
    assert holder.end()


def test_a_hundred_files(store: Path, start: Start, descriptors: Callable[[], int]) -> None:
    files = [(f"node{i % 8}", f"m-{i:05}.gguf") for i in range(100)]
    before = descriptors()
    start(files)
    assert all((store / NAME / node / name).read_bytes() == PAGES for node, name in files)
    assert len(manifest_of(store)["holder"]["files"]) == 100
    assert descriptors() == before


def test_a_manifest_larger_than_a_pipe(store: Path, start: Start) -> None:
    sums = [f"{i:016x}" for i in range(100_000)]
    start(checksums=[sums])
    assert manifest_of(store)["checksums"] == [sums]


def test_names_that_are_no_text(store: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"\xff\n\xe4.gguf")
    inner = store.parent / os.fsdecode(b"\xfe") / store.name
    monkeypatch.setenv("NUMALOAD_STORE", str(inner))
    start([("node0", name)])
    assert (inner / NAME / "node0" / name).read_bytes() == PAGES


COMMAND = [sys.executable, "-I", "-S", process.MAIN]


def run_script(line: bytes) -> subprocess.CompletedProcess[bytes]:
    """The script as it is, with what a builder may send; its standard input ends after that."""
    return subprocess.run(COMMAND, input=line, capture_output=True, check=False)


def request(store: Path) -> bytes:
    row = {
        "name": holding.NAME, "task": TASKS[holding.NAME], "store": str(store), "path": sys.path,
        "arguments": {"name": NAME, "manifest": MANIFEST | {"holder": {"files": []}}, "files": []},
    }  # fmt: skip
    return json.dumps(row).encode() + b"\n"


@pytest.mark.parametrize("cut", [0, 1, -2, -1])
def test_a_builder_that_dies_while_it_asks_leaves_nothing(store: Path, cut: int) -> None:
    store.mkdir(mode=0o700)
    done = run_script(request(store)[:cut])
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")
    assert listed(store) == []


@pytest.mark.parametrize("line", [b"{\n", b"[]\n", b"{}\n", b'{"store": 1}\n', b"\xff\n"])
def test_what_is_no_request_is_refused(line: bytes) -> None:
    done = run_script(line)
    assert json.loads(done.stdout)["error"]["text"]
    assert not done.stderr


@pytest.mark.slow
def test_a_builder_that_does_not_wait_for_the_answer(store: Path) -> None:
    """It may have been stopped by Ctrl-C: nothing stays published, nothing held."""
    read, write = os.pipe()
    os.close(read)
    with subprocess.Popen(
        COMMAND, stdin=subprocess.PIPE, stdout=write, start_new_session=True
    ) as job:
        os.close(write)
        job.communicate(request(store))
    wait_for(lambda: is_gone(job.pid), "the holder to end", 60)
    assert listed(store) == []


def is_gone(session: int) -> bool:
    """Whether no process is left of a session."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # this one is gone
            if int(path.read_text().rpartition(")")[2].split()[3]) == session:
                return False
    return True


@pytest.mark.parametrize("kind", ["missing", "a file", "open to others", "a name too long"])
def test_a_store_that_cannot_be_written_is_an_error(
    store: Path, kind: str, monkeypatch: pytest.MonkeyPatch, descriptors: Callable[[], int]
) -> None:
    where = store
    if kind == "missing":
        where = store / "not" / "there"
        monkeypatch.setenv("NUMALOAD_STORE", str(where))
    elif kind == "a file":
        store.touch(mode=0o600)
    elif kind == "open to others":
        store.mkdir()
        store.chmod(0o755)
    fd, before = memfd(), descriptors()
    name = "x" * 300 if kind == "a name too long" else "m.gguf"
    with pytest.raises(StoreError, match="replicas cannot be held: ") as caught:
        hold(NAME, MANIFEST, [("node0", name, fd)])
    assert str(where) in str(caught.value)
    assert descriptors() == before
    os.close(fd)
    assert not (store / f".{NAME}").exists()
    assert not (store / NAME).exists()


def test_a_python_that_does_not_start_is_an_error(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "MAIN", str(tmp_path / "absent.py"))
    with pytest.raises(StoreError, match=r"ended without an answer \(status 2\).*absent\.py"):
        hold(NAME, MANIFEST, [])


@pytest.mark.slow
def test_a_holder_that_does_not_answer_is_ended(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = tmp_path / "pids"
    silent = tmp_path / "silent.py"
    silent.write_text(
        "import os, time\n"
        f"if not os.fork():\n    open({str(told)!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setattr(process, "MAIN", str(silent))
    monkeypatch.setattr(process, "ANSWER_S", 1.0)
    with pytest.raises(StoreError, match="no answer in"):
        hold(NAME, MANIFEST, [])
    wait_for(lambda: not running(int(told.read_text())), "the other process to end")


def test_ctrl_c_while_it_is_started_leaves_nothing(
    store: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[HolderProcess] = []
    real = subprocess.Popen.communicate

    def stopped(self: subprocess.Popen[bytes], *arguments: Any, **options: Any) -> Any:
        real(self, *arguments, **options)
        if not seen:
            row = manifest_of(store)
            holder = row["holder"]
            seen.append(HolderProcess(holder["pid"], holder["start"], row["pid_namespace"]))
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", stopped)
    with pytest.raises(KeyboardInterrupt):
        start()
    (found,) = seen
    wait_for(lambda: not found.alive(), "the holder to end")
    assert listed(store) == []


def test_descriptors_of_a_process_without_standard_input(store: Path) -> None:
    """The number 0 is then the next one that is opened, and in the holder it is something else."""
    program = BUILDER.replace("fd = ", "os.close(0)\nfd = ").replace(
        "holder = ", "assert os.dup2(fd, 0) == 0\nholder = "
    )
    assert "fd)])" in program
    program = program.replace("fd)])", "0)])")
    words = [sys.executable, "-c", program, NAME, "9"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=False)
    holder = HolderProcess(*json.loads(done.stdout))
    try:
        assert (store / NAME / "node0" / "m.gguf").read_bytes() == b"held"
    finally:
        holder.end()


def test_sealed_memory_stays_what_it_is(store: Path, start: Start) -> None:
    start()
    path = store / NAME / "node0" / "m.gguf"
    fd = os.open(path, os.O_RDONLY)
    seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    os.close(fd)
    assert seals & holding.SEALS == holding.SEALS
    if seals & holding.F_SEAL_FUTURE_WRITE and os.geteuid() == 0:  # whom no mode keeps out
        with open(path, "r+b", buffering=0) as file, pytest.raises(PermissionError):
            file.write(b"x")
    if os.geteuid() == 0:
        with pytest.raises(PermissionError):
            os.truncate(path, 0)
    assert path.read_bytes() == PAGES


def test_seals_where_the_kernel_has_fewer(
    store: Path, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels before 5.1."""
    monkeypatch.setattr(holding, "F_SEAL_FUTURE_WRITE", 1 << 30)  # a seal it does not know
    start()
    fd = os.open(store / NAME / "node0" / "m.gguf", os.O_RDONLY)
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & holding.SEALS == holding.SEALS
    os.close(fd)


def test_the_kernel_keeps_the_whole_name() -> None:
    assert max(map(len, TASKS)) <= 15


@pytest.mark.slow  # waits until it has looked twice
@pytest.mark.parametrize("kind", ["a folder of the user's", "a link to a disk"])
def test_it_publishes_in_no_folder_that_is_not_the_store_s(
    kind: str, store: Path, start: Start, tmp_path: Path
) -> None:
    holder, folder = start(), store.parent
    away = folder.with_name(f"{folder.name}-away")
    if kind == "a link to a disk":
        mount = mount_of(str(tmp_path))
        if mount is not None and mount.kind == "tmpfs":
            pytest.skip("temporary files are on no disk here")
        os.rename(folder, away)
        folder.symlink_to(tmp_path)
    else:
        mine = folder / "mine"
        mine.mkdir(mode=0o700)
        (mine / "thesis.txt").touch()
        os.rename(store, away)
        os.rename(mine, store)
    time.sleep(2.5 * INTERVAL_S)
    assert running(holder.pid)
    assert os.listdir(folder if kind == "a link to a disk" else store) == (
        [] if kind == "a link to a disk" else ["thesis.txt"]
    )
    if kind == "a link to a disk":
        folder.unlink()
        os.rename(away, folder)
    else:
        shutil.rmtree(away)
