"""Several processes want the same file in RAM: one reads it, the others wait and look again."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import KEPT, LIMIT_S, Numaload, evict, resident, sparse_model, wait_for
from numaload.errors import CancelledError

MIB = 1 << 20
SIZE = 300 * MIB
AGAIN = 1 / 16  # of the bytes at most
SLOWLY = ("--max-rate", "100M")  # so that there is time to be in the middle of it
# What the progress of one that waits is told, and whether it ended by itself: one line of JSON.
WAITER = """
import json, sys, numaload
seen = []
report = numaload.prewarm(sys.argv[1], progress=lambda *step: seen.append(step))
print(json.dumps({"report": report.to_dict(), "seen": seen}))
"""


@pytest.fixture
def big(tmp_path: Path) -> Iterator[str]:
    path = sparse_model(tmp_path / "big.gguf", SIZE)
    evict([path])
    yield path
    evict([path])


def is_free(store: Path) -> bool:
    """Whether nobody has a lock any more."""
    with (store / "reading/locks").open("r+") as file:
        everything = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        try:
            fcntl.fcntl(file, fcntl.F_OFD_SETLK, everything)
        except BlockingIOError:
            return False
        return True


def start_reader(numaload: Numaload, path: str, *words: str) -> subprocess.Popen[str]:
    job = numaload.start("prewarm", path, "--json", *(words or SLOWLY))
    wait_for(lambda: resident(path) > 8 * MIB, "the reader to begin")
    return job


def started(
    numaload: Numaload, reader: subprocess.Popen[str], *words: str, program: Any = None
) -> Any:
    """Another one that follows the reader, which stands still until it does."""
    reader.send_signal(signal.SIGSTOP)
    program = program or numaload.command("prewarm", *words)
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    job = subprocess.Popen(program, text=True, env=numaload.environment, **pipes)
    wait_for(lambda: follows(job.pid) or job.poll() is not None, "it to follow")
    reader.send_signal(signal.SIGCONT)
    return job


def once(report: Any) -> bool:
    """What was absent was read, by nobody else; a little, that was paged out meanwhile, again."""
    again = report["read"] - (report["size"] - report["resident_before"])
    return bool(0 <= again < AGAIN * report["size"])


def answer(job: subprocess.Popen[str], status: int = 0) -> Any:
    out, errors = job.communicate(timeout=LIMIT_S)
    assert job.returncode == status, errors
    return json.loads(out) if out else errors


def test_one_reads_and_the_others_follow(numaload: Numaload, big: str) -> None:
    reader = start_reader(numaload, big)
    followers = [started(numaload, reader, big, "--json") for _ in range(3)]
    told = [answer(job) for job in followers]
    own = answer(reader)
    size = os.path.getsize(big)
    assert own["followed"] is None
    assert once(own)
    for one in told:
        assert one["followed"] in {reader.pid, *(job.pid for job in followers)}
        assert one["read"] < size - KEPT * size
        assert one["resident"] > KEPT * size
        # Each came when something was there, and little has gone since.
        assert 0 < one["read_by_others"] <= size - one["resident_before"]
    assert sum(one["read"] for one in told) < size - KEPT * size
    assert is_free(numaload.store)


def test_progress_is_called_while_it_waits(numaload: Numaload, big: str) -> None:
    reader = start_reader(numaload, big)
    told = answer(started(numaload, reader, program=[sys.executable, "-c", WAITER, big]))
    answer(reader)
    assert told["report"]["followed"] == reader.pid
    waited = told["seen"][0]
    assert waited[0] == 0
    assert 0 < waited[1] <= told["report"]["size"] - told["report"]["resident_before"]
    assert told["seen"].count(waited) > 5


def test_when_the_reader_is_killed_a_follower_goes_on(numaload: Numaload, big: str) -> None:
    reader = start_reader(numaload, big)
    wait_for(lambda: resident(big) > 40 * MIB, "the reader to come some way")
    followers = [started(numaload, reader, big, "--json") for _ in range(2)]
    reader.kill()
    reader.communicate(timeout=LIMIT_S)
    told = [answer(job) for job in followers]
    size = os.path.getsize(big)
    # What the killed one had read is not read again, and the rest once.
    assert 0 < sum(one["read"] for one in told) < size - 30 * MIB
    assert all(one["resident"] > KEPT * size for one in told)
    assert reader.pid in {one["followed"] for one in told}
    assert is_free(numaload.store)


def test_when_the_reader_is_interrupted_a_follower_goes_on(numaload: Numaload, big: str) -> None:
    reader = start_reader(numaload, big)
    follower = started(numaload, reader, big, "--json")
    reader.send_signal(signal.SIGINT)
    assert "interrupted after" in answer(reader, 130)
    told = answer(follower)
    assert told["followed"] == reader.pid
    assert told["read"] > 0
    assert told["resident"] > KEPT * told["size"]
    assert is_free(numaload.store)


@pytest.mark.parametrize("times", [1, 2])
def test_a_follower_ends_alone(numaload: Numaload, big: str, times: int) -> None:
    reader = start_reader(numaload, big)
    follower = started(numaload, reader, big)
    reader.send_signal(signal.SIGSTOP)
    for _ in range(times):
        follower.send_signal(signal.SIGINT)
    _, errors = follower.communicate(timeout=LIMIT_S)
    assert follower.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert reader.poll() is None
    reader.send_signal(signal.SIGCONT)
    own = answer(reader)
    assert once(own)
    assert is_free(numaload.store)


def test_a_callback_ends_a_follower(numaload: Numaload, big: str) -> None:
    reader = start_reader(numaload, big)
    os.environ["NUMALOAD_STORE"] = str(numaload.store)
    with pytest.raises(CancelledError, match=f"while process {reader.pid} was reading") as caught:
        api.prewarm(big, progress=lambda *_: False)
    assert 0 == caught.value.done < caught.value.total
    assert answer(reader)["read"] > 64 * MIB


def test_threads_of_one_process_follow_each_other(store: Path, big: str) -> None:
    reports: list[Any] = []

    def run() -> None:
        reports.append(api.prewarm(big, max_rate=150 * MIB))

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(report.read for report in reports) < 1.3 * SIZE
    assert [report.followed for report in reports].count(os.getpid()) == 2
    assert is_free(store)


def test_files_in_any_order_do_not_block_each_other(numaload: Numaload, tmp_path: Path) -> None:
    files = [sparse_model(tmp_path / f"{i}.gguf", 40 * MIB) for i in range(3)]
    evict(files)
    orders = [files, files[::-1], files[1:], files[:2], [files[2], files[0]]]
    jobs = [numaload.start("prewarm", *order, "--json", "--max-rate", "80M") for order in orders]
    told = [answer(job) for job in jobs]
    assert sum(one["read"] for one in told) < 1.3 * 120 * MIB
    assert is_free(numaload.store)


def test_without_a_folder_everybody_reads(store: Path, big: str) -> None:
    store.mkdir(mode=0o755)
    store.chmod(0o755)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        report = api.prewarm(big)
    assert any("without knowing who else" in str(one.message) for one in said)
    assert report.read > 0.7 * SIZE
    assert report.followed is None


def follows(pid: int) -> bool:
    """Whether the process has the lock's file open, which is somebody else's."""
    with_lock = False
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with suppress(FileNotFoundError):
            with_lock |= "/reading/" in os.readlink(f"/proc/{pid}/fd/{fd}")
    return with_lock
