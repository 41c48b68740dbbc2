"""``prewarm --background`` and ``--lock``: one process that goes on, shown, and ended."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import KEPT, LIMIT_S, Numaload, evict, resident, running, sparse_model, wait_for
from numaload.errors import CancelledError, NodeMemoryError, ReadError, StoreError
from numaload.machine.memory import available
from numaload.pagecache import background, records

MIB = 1 << 20
SIZE = 120 * MIB
SLOWLY = ("--max-rate", "15M")  # 8 s: others start meanwhile, also on a busy machine
SMALL = 40 * MIB  # of private memory: an interpreter, and no numpy
ROOT = os.geteuid() == 0


@pytest.fixture
def big(tmp_path: Path) -> Iterator[str]:
    path = sparse_model(tmp_path / "big.gguf", SIZE)
    evict([path])
    yield path
    evict([path])


@pytest.fixture
def held(numaload: Numaload) -> Iterator[Numaload]:
    """The command line, of which nothing is left running."""
    yield numaload
    numaload("release")


@pytest.fixture
def ends(store: Path) -> Iterator[None]:
    """For the API: holders end with the test."""
    yield
    for record in records.records():
        background.PrewarmHolder.of(record).release()


def lockable(nbytes: int) -> bool:
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    return ROOT or hard == resource.RLIM_INFINITY or hard >= nbytes


needs_lock = pytest.mark.skipif(
    not lockable(2 * SIZE), reason=f"needs ulimit -l {2 * SIZE >> 10} or root"
)


def told(numaload: Numaload, *files: str, status: int = 0) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = numaload.json("status", *files, status=status)["prewarming"]
    return rows


def left(numaload: Numaload) -> list[str]:
    folder = numaload.store / "prewarming"
    return os.listdir(folder) if folder.exists() else []


def memory_of(pid: int) -> dict[str, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    rows = [line.split() for line in lines if line.endswith(" kB")]
    return {row[0].rstrip(":"): int(row[1]) << 10 for row in rows}


def test_in_the_background_it_returns_and_goes_on(held: Numaload, big: str) -> None:
    report = held.json("prewarm", "--background", big, *SLOWLY)
    pid = report["holder"]["pid"]
    assert resident(big) < SIZE // 2
    (row,) = told(held)
    assert (row["pid"], row["state"], row["paths"]) == (pid, "reading", [big])
    assert f"process {pid}: {big}: reading, " in held("status").stdout
    wait_for(lambda: not running(pid), "it to be done")
    assert resident(big) > KEPT * SIZE
    assert told(held) == []
    assert left(held) == []


def test_it_belongs_to_no_terminal_and_is_small(held: Numaload, big: str) -> None:
    report = held.json("prewarm", "--background", big, *SLOWLY)
    pid = report["holder"]["pid"]
    assert os.getsid(pid) not in (os.getsid(0), pid)
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert Path(f"/proc/{pid}/comm").read_text() == "numaload-warm\n"
    for number in (signal.SIGHUP, signal.SIGINT):
        os.kill(pid, number)
    time.sleep(0.2)
    assert memory_of(pid)["RssAnon"] < SMALL
    assert "numpy" not in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    assert stat.S_IMODE(os.stat(held.store / "prewarming").st_mode) == 0o700
    assert told(held)[0]["pid"] == pid


def test_a_foreground_process_follows_it(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    report = held.json("prewarm", big)
    assert report["followed"] == pid
    assert report["read"] < (1 - KEPT) * SIZE


@needs_lock
def test_locked_pages_stay(held: Numaload, big: str) -> None:
    report = held.json("prewarm", "--lock", big)
    size, pid = os.path.getsize(big), report["holder"]["pid"]
    assert report["done"]
    assert report["locked"] == report["resident"] == size
    assert report["read"] > KEPT * size
    used = memory_of(pid)
    assert used["VmLck"] >= size
    assert used["RssFile"] >= size
    assert used["RssAnon"] < SMALL
    evict([big])
    assert resident(big) == size
    (row,) = told(held)
    assert (row["state"], row["locked"]) == ("held", size)
    assert f"process {pid}: {big}: locked " in held("status", big).stdout
    assert f"ended process {pid}" in held("release", big).stdout
    assert not running(pid)
    evict([big])
    assert resident(big) < size // 2
    assert left(held) == []


@needs_lock
def test_one_process_for_a_model(held: Numaload, model_files: list[str]) -> None:
    first = held.json("prewarm", "--lock", model_files[0])["holder"]
    assert first["paths"] == model_files
    again = held("prewarm", "--lock", model_files[-1], "--background")
    assert f"process {first['pid']} has it already" in again.stderr
    other = held.json("prewarm", "--lock", model_files[-1])
    assert other["holder"] | {"new": True} == first
    assert other["already_held"] == dict.fromkeys(model_files, first["pid"])
    assert len(told(held)) == 1


@needs_lock
def test_two_who_ask_at_the_same_time_start_one(held: Numaload, big: str) -> None:
    jobs = [held.start("prewarm", "--lock", "--background", "--json", big) for _ in range(4)]
    answers = [json.loads(job.communicate(timeout=LIMIT_S)[0]) for job in jobs]
    assert len({answer["holder"]["pid"] for answer in answers}) == 1
    assert [answer["holder"]["new"] for answer in answers].count(True) == 1


@needs_lock
def test_reading_in_the_background_then_locked_by_another(held: Numaload, big: str) -> None:
    reader = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    report = held.json("prewarm", "--lock", big)
    assert report["followed"] == reader
    assert report["locked"] == os.path.getsize(big)


@needs_lock
def test_chosen_tensors_alone_are_locked(held: Numaload, model_files: list[str]) -> None:
    with api.open(model_files[0]) as weights:
        name = next(name for name in weights if name.startswith("blk.0."))
        nbytes = weights[name].nbytes
    report = held.json("prewarm", "--lock", "--tensors", f"^{name}$", model_files[0])
    assert nbytes <= report["locked"] < nbytes + 8 * MIB
    assert report["tensors"] == 1


# Runs a command as ordinary users do: 8 MiB may be locked, by root without CAP_IPC_LOCK too.
ORDINARY = """
import ctypes, os, resource, sys
PR_CAPBSET_DROP, CAP_IPC_LOCK = 24, 14
ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, ctypes.c_ulong(CAP_IPC_LOCK), 0, 0, 0)
soft, hard = map(int, sys.argv[1:3])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))
os.execv(sys.argv[3], sys.argv[3:])
"""


def as_ordinary(
    numaload: Numaload, soft: int, hard: int, *words: str
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ORDINARY, str(soft), str(hard), *numaload.command(*words)]
    return subprocess.run(
        command, capture_output=True, text=True, env=numaload.environment, timeout=LIMIT_S,
        check=False,
    )  # fmt: skip


@pytest.mark.parametrize("how", [["--lock"], ["--lock", "--background"]], ids=len)
def test_too_little_may_be_locked(held: Numaload, big: str, how: list[str]) -> None:
    """Nothing is read, and nothing is left."""
    done = as_ordinary(held, 8 * MIB, 8 * MIB, "prewarm", *how, big)
    assert done.returncode == 1
    pages = -(-os.path.getsize(big) // 4096) * 4096
    assert f"{pages} bytes" in done.stderr
    assert f"{8 * MIB} bytes (8.0 MiB)" in done.stderr
    for fix in ("ulimit -l", "limits.conf", "LimitMEMLOCK"):
        assert fix in done.stderr
    assert resident(big) < MIB
    assert left(held) == []


def test_what_may_be_locked_is_raised_as_far_as_anybody_may(held: Numaload, tmp_path: Path) -> None:
    small = sparse_model(tmp_path / "small.gguf", 4 * MIB)
    done = as_ordinary(held, 4096, 8 * MIB, "prewarm", "--lock", small)
    assert done.returncode == 0, done.stderr
    assert told(held)[0]["locked"] == os.path.getsize(small)


@pytest.mark.parametrize("option", ["--background", "--lock"])
def test_errors_come_at_once_and_leave_nothing(held: Numaload, tmp_path: Path, option: str) -> None:
    huge = sparse_model(tmp_path / "huge.gguf", available().free + (1 << 30))
    done = held("prewarm", option, huge, status=1)
    assert "bytes (" in done.stderr
    assert "has room for" in done.stderr
    assert "No such file" in held("prewarm", option, tmp_path / "none.gguf", status=1).stderr
    assert "no regular expression" in held(
        "prewarm", option, huge, "--tensors", "(", status=2
    ).stderr  # fmt: skip
    assert told(held) == []
    assert left(held) == []


def test_the_api_in_the_background(ends: None, big: str) -> None:
    report = api.prewarm(big, background=True, max_rate=40 * MIB)
    one = report.holder
    assert isinstance(one, api.PrewarmHolder)
    assert running(one.pid)
    seen: list[tuple[int, int]] = []
    assert one.wait(lambda *step: seen.append(step)) is None
    assert len({done for done, _ in seen}) > 3
    assert one.progress() is None
    assert not one.release()
    assert api.prewarm(big).resident_before > KEPT * SIZE
    assert report.to_dict()["holder"]["pid"] == one.pid


def test_what_is_resident_needs_no_process(ends: None, big: str) -> None:
    api.prewarm(big)
    report = api.prewarm(big, background=True)
    if report.resident_before == report.size:  # some machines page out what is idle
        assert (report.holder, report.read, report.done) == (None, 0, True)


def test_errors_of_the_api_are_the_same(ends: None, tmp_path: Path) -> None:
    with pytest.raises(ReadError) as missing:
        api.prewarm(str(tmp_path / "none.gguf"), background=True)
    assert missing.value.path == str(tmp_path / "none.gguf")
    huge = sparse_model(tmp_path / "huge.gguf", available().free + (1 << 30))
    for lock in (False, True):
        with pytest.raises(NodeMemoryError) as caught:
            api.prewarm(huge, background=True, lock=lock)
        assert caught.value.needed > caught.value.free > 0


@needs_lock
def test_a_callback_ends_what_was_started_for_it(ends: None, big: str) -> None:
    with pytest.raises(CancelledError) as caught:
        api.prewarm(big, lock=True, max_rate=40 * MIB, progress=lambda done, _: done < 20 * MIB)
    assert caught.value.done >= 20 * MIB
    assert records.records() == []


@pytest.mark.parametrize("pauses", [(), (0,), (0.0002,), (0.0005,)])
@needs_lock
def test_ctrl_c_while_it_reads_to_lock(held: Numaload, big: str, pauses: Sequence[float]) -> None:
    """Also where a second one comes before the process is ended for the first."""
    job = held.start("prewarm", "--lock", big, *SLOWLY)
    wait_for(lambda: resident(big) > 8 * MIB, "it to begin")
    job.send_signal(signal.SIGINT)
    for pause in pauses:
        time.sleep(pause)
        job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    wait_for(lambda: left(held) == [], "the process to end")
    assert told(held) == []


def test_a_killed_one_is_told_once_and_cleared(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not running(pid), "it to die")
    done = held("status", status=1)
    assert f"process {pid}, which was reading {big}, is gone" in done.stderr
    assert "prewarming:" not in held("status").stdout
    assert left(held) == []
    # And without a status between, another one is started.
    pid = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not running(pid), "it to die")
    assert held.json("prewarm", "--background", big, *SLOWLY)["holder"]["new"]


def test_a_failure_in_the_background_is_told_once(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    os.truncate(big, 4096)
    wait_for(lambda: not running(pid), "it to fail")
    (row,) = told(held, status=1)
    assert row["state"] == "failed"
    assert big in row["error"]
    assert told(held) == []
    assert left(held) == []


def test_one_that_does_not_listen_is_killed(
    ends: None, big: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = api.prewarm(big, background=True, max_rate=30 * MIB).holder
    assert one is not None
    os.kill(one.pid, signal.SIGSTOP)
    monkeypatch.setattr("numaload.holder.process.END_S", 0.3)
    assert one.release()
    assert not running(one.pid)
    assert records.records() == []


@needs_lock
def test_it_writes_down_again_what_somebody_removed(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--lock", big)["holder"]["pid"]
    for path in (held.store / "prewarming").iterdir():
        path.unlink()
    (held.store / "prewarming").rmdir()
    wait_for(lambda: [row["pid"] for row in told(held)] == [pid], "it to come back")


@needs_lock
def test_a_file_that_was_replaced_is_said_and_not_taken_for_it(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--lock", big)["holder"]["pid"]
    os.unlink(big)
    sparse_model(Path(big), 8 * MIB)
    assert "CHANGED" in held("status", big).stdout
    other = held.json("prewarm", "--lock", big)["holder"]
    assert other["new"]
    assert other["pid"] != pid
    held("release", big)
    assert not running(pid)
    assert not running(other["pid"])


@needs_lock
def test_release_without_a_file_ends_all(held: Numaload, tmp_path: Path) -> None:
    files = [sparse_model(tmp_path / f"{i}.gguf", 8 * MIB) for i in range(3)]
    pids = [held.json("prewarm", "--lock", path)["holder"]["pid"] for path in files]
    done = held("release", files[0])
    assert f"ended process {pids[0]}" in done.stdout
    assert [running(pid) for pid in pids] == [False, True, True]
    assert "no replicas of it" in held("release", files[0], status=1).stderr
    rows = held.json("release")
    assert {row["pid"] for row in rows} == set(pids[1:])
    assert not any(map(running, pids))
    assert "nothing was in the store" in held("release").stdout


def test_a_reused_id_is_never_signalled(held: Numaload, big: str) -> None:
    pid = held.json("prewarm", "--background", big, *SLOWLY)["holder"]["pid"]
    (path,) = (held.store / "prewarming").iterdir()
    with subprocess.Popen(["sleep", "600"]) as other:
        record = json.loads(path.read_text()) | {"pid": other.pid}
        path.with_name(f"{other.pid}-{record['start']}.json").write_text(json.dumps(record))
        assert f"process {other.pid}, which" in held("status", status=1).stderr
        held("release")
        assert other.poll() is None
        other.kill()
    assert not running(pid)


def test_a_thread_of_this_process(store: Path, big: str) -> None:
    with api.prewarm_async(big, max_rate=60 * MIB) as job:
        wait_for(lambda: job.progress()[0] > 0, "it to read")
        assert not job.done()
        with pytest.raises(TimeoutError):
            job.result(timeout=0.01)
        report = job.result()
    assert job.done()
    done, total = job.progress()
    assert KEPT * SIZE < done == total <= report.read  # what was paged out since was read again


def test_a_thread_that_is_cancelled(store: Path, big: str) -> None:
    with api.prewarm_async(big, max_rate=30 * MIB) as job:
        wait_for(lambda: job.progress()[0] > 0, "it to read")
        job.cancel()
        with pytest.raises(CancelledError):
            job.result()
    with api.prewarm_async(big, max_rate=30 * MIB) as job:
        pass  # the end of the block ends it too
    assert job.done()
    with pytest.raises(ReadError):
        api.prewarm_async(big + ".none").result()


@pytest.mark.parametrize("begun", [False, True])
def test_a_thread_ends_with_its_program(numaload: Numaload, big: str, *, begun: bool) -> None:
    program = (
        "import sys, time, numaload\n"
        "job = numaload.prewarm_async(sys.argv[1], max_rate=1 << 20)\n"
        "while job.progress()[0] < int(sys.argv[2]): time.sleep(0.01)\n"
        "print(len(job.progress()))"
    )
    assert numaload.python(program, big, int(begun)) == 2  # and not two minutes later
    assert resident(big) < SIZE // 2


def test_a_store_that_is_named_from_the_folder_one_is_in(numaload: Numaload, big: str) -> None:
    """The process that goes on is in another one."""
    numaload.store.parent.mkdir(exist_ok=True)
    environment = numaload.environment | {"NUMALOAD_STORE": "store"}
    for words in (["prewarm", "--background", big, *SLOWLY], ["status"], ["release"]):
        done = subprocess.run(
            numaload.command(*words), cwd=numaload.store.parent, env=environment, text=True,
            capture_output=True, check=True, timeout=LIMIT_S,
        )  # fmt: skip
        assert "process " in done.stdout


def test_a_python_that_is_not_there(ends: None, big: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(StoreError, match="does not name this Python"):
        api.prewarm(big, background=True)
