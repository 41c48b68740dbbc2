"""What is tested of network file systems, in a guest and wherever FUSE can be mounted.

The server is tests/fuse_server.py. Both test files that take these cases over have a skip of their
own; ENDS_S is theirs to have too: how long Ctrl-C may take.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import numaload as api
from commands import LIMIT_S, Numaload, used_bytes, wait_for
from fuse_server import FuseServer, served
from numaload.files import network
from numaload.files.residency import map_quietly
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import populate_read

MIB = 1 << 20
PAGE = 4096
EIO = os.strerror(errno.EIO)
READING = ["prewarm", "mirror"]
# A limit is the point here. Emulated, Python alone takes some seconds to start and to end; so there
# less is repeated, too.
EMULATED = "NUMALOAD_GUEST" in os.environ
ENDS_S = 60.0  # 2 s here and 10 in emulation, when nothing else keeps the CPUs busy
ANSWERS_S = 3  # what a busy server still answers takes 1 s at times
CTRL_C = [(verb, times) for verb in READING for times in (1, 2)][:: 3 if EMULATED else 1]
CALLS = ["open", "prewarm", "mirror", "opened", "stream"]
PROGRAMS = ["mirror", "stream"] if EMULATED else ["prewarm", "mirror", "stream", "copy"]


class Volume(NamedTuple):
    """A model on a file system whose server does as it is told."""

    server: FuseServer
    files: list[str]
    originals: list[str]

    @property
    def model(self) -> str:
        return self.files[0]

    def forget(self) -> None:
        """Nothing of it is in RAM."""
        for path in self.files:
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@pytest.fixture
def volume(tmp_path: Path, model_files: list[str], store: Path) -> Iterator[Volume]:
    folder, point = tmp_path / "served", tmp_path / "mounted"
    folder.mkdir()
    for path in model_files:
        (folder / os.path.basename(path)).symlink_to(path)
    with served(folder, point) as server:
        files = [str(point / os.path.basename(path)) for path in model_files]
        yield Volume(server, files, model_files)


def asks(job: subprocess.Popen[str]) -> bool:
    """Whether it has a thread that asks a network file system."""
    try:
        names = [task.read_text() for task in Path(f"/proc/{job.pid}/task").glob("*/comm")]
    except OSError:  # one of them ended just now
        return False
    return f"{network.NAME}\n" in names


def entries(numaload: Numaload) -> list[str]:
    """What is left in the store but for its locks and the list of models used."""
    names = (str(path.relative_to(numaload.store)) for path in numaload.store.rglob("*"))
    return [
        name
        for name in names
        if not name.startswith(("known", "lock", "numaload", "pools", "reading"))
    ]


def nothing_left(numaload: Numaload, before: int) -> None:
    assert entries(numaload) == []
    if EMULATED:  # elsewhere others use it too
        assert used_bytes(numaload.store.parent) - before < MIB


def failed(numaload: Numaload, *words: object) -> str:
    """A verb that fails in good order: exit status 1, one error, nothing left of it."""
    before = used_bytes(numaload.store.parent)
    text = numaload(*words, status=1).stderr
    assert "Traceback" not in text
    nothing_left(numaload, before)
    (line,) = errors_in(text)
    return line


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("numaload: error:")]


def begun(volume: Volume, numaload: Numaload, verb: str, *words: object) -> subprocess.Popen[str]:
    """A verb that waits for an answer which does not come."""
    job = numaload.start(verb, volume.model, *words)
    return waits(volume, job)


def waits(volume: Volume, job: subprocess.Popen[str]) -> subprocess.Popen[str]:
    wait_for(lambda: volume.server.waiting() > 0 or job.poll() is not None, "the reading")
    assert job.poll() is None, job.communicate()
    return job


def interrupted(job: subprocess.Popen[str], times: int = 1) -> str:
    """Ctrl-C, once or more often; what it said, and it said so in time."""
    begin = time.monotonic()
    for _ in range(times):
        job.send_signal(signal.SIGINT)
        time.sleep(0.05)
    _, text = job.communicate(timeout=LIMIT_S)
    took = time.monotonic() - begin
    assert job.returncode == 130, text
    assert "interrupted" in text
    assert "Traceback" not in text
    assert took < ENDS_S
    return text


def test_every_byte(volume: Volume, numaload: Numaload) -> None:
    (report,) = numaload.json("mirror", volume.model)
    assert report["placed"]
    with api.attach(volume.model) as mirror:
        for i, original in enumerate(volume.originals):
            assert bytes(mirror.view(mirror.nodes[0]).image(i)) == Path(original).read_bytes()
    numaload("release")
    assert numaload.json("prewarm", volume.model)["done"]


def test_every_tensor(volume: Volume) -> None:
    """Streamed, copied and looked at, as from files of this machine."""
    expected = dict(api.stream(api.open(volume.originals[0])))
    with api.open(volume.model) as far, api.open(volume.model, copy=True) as copied:
        for name, array in api.stream(far):
            assert np.array_equal(array, expected[name])
        for name in expected:
            assert np.array_equal(copied[name].blocks, far[name].blocks)


def test_what_is_resident_is_not_read(volume: Volume, numaload: Numaload) -> None:
    volume.forget()
    report = numaload.json("prewarm", volume.model)
    assert report["done"]
    assert report["read"] > 0.9 * report["size"]
    with ExitStack() as locked:  # or some machines page out what is idle
        for path in volume.files:
            file = locked.enter_context(SourceFile(path))
            mapping = locked.enter_context(map_quietly(file))
            syscalls.mlock_on_fault(mapping.address, mapping.length)
            populate_read(mapping)
        volume.server.tell("stall", "reads")
        again = numaload.json("prewarm", volume.model, "--nodes", "all")
    assert again["read"] == 0
    assert sum(again["on_nodes"].values()) >= again["size"]


@pytest.mark.parametrize("verb", ["inspect", "prewarm", "plan", "mirror", "store path"])
def test_a_server_that_says_nothing(volume: Volume, numaload: Numaload, verb: str) -> None:
    volume.server.freeze()
    line = failed(numaload, *verb.split(), volume.model, "--io-timeout", 1)
    volume.server.thaw()
    assert f"{volume.model}: no answer for 1 s from test-server (fuse, mounted at" in line
    assert str(volume.server.point) in line
    assert "--io-timeout SECONDS" in line


def said(job: subprocess.Popen[str]) -> str:
    """Its next error, which comes before it ends."""
    assert job.stderr is not None
    for line in job.stderr:
        if errors_in(line):
            return line
    pytest.fail("it ended without an error")


def test_a_question_that_the_server_took_holds_the_exit(volume: Volume, numaload: Numaload) -> None:
    """The kernel keeps who asked until there is an answer, also when killed: as it does cat."""
    volume.server.tell("stall", "all")
    job = numaload.start("inspect", volume.model, "--io-timeout", 1)
    assert "no answer for 1 s" in said(job)
    volume.server.tell("work")
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 1


@pytest.mark.parametrize("verb", READING)
def test_ctrl_c_while_the_server_has_the_question(
    volume: Volume, numaload: Numaload, verb: str
) -> None:
    """It is undone and said at once; the process ends with the answer."""
    volume.server.tell("stall", "all")
    job = begun(volume, numaload, verb)
    job.send_signal(signal.SIGINT)
    assert "interrupted" in said(job)
    assert entries(numaload) == []
    volume.server.tell("work")
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130


@pytest.mark.parametrize("verb", READING)
def test_a_server_that_falls_silent(volume: Volume, numaload: Numaload, verb: str) -> None:
    numaload("inspect", volume.model)  # that much is in RAM then
    volume.server.tell("stall", "reads")
    line = failed(numaload, verb, volume.model, "--io-timeout", ANSWERS_S)
    assert f"no answer for {ANSWERS_S} s" in line
    assert " at byte " in line
    volume.server.tell("work")
    assert numaload.json("prewarm", volume.model)["done"]


def test_the_variable_and_what_is_no_time(
    volume: Volume, numaload: Numaload, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("0", "soon", "nan"):
        assert "seconds" in numaload("inspect", volume.model, "--io-timeout", text, status=2).stderr
    volume.server.freeze()
    monkeypatch.setenv("NUMALOAD_IO_TIMEOUT", "1")
    numaload = Numaload(numaload.store)  # with this environment
    assert "no answer for 1 s" in numaload("inspect", volume.model, status=1).stderr
    volume.server.thaw()
    monkeypatch.setenv("NUMALOAD_IO_TIMEOUT", "later")
    done = numaload("inspect", volume.model, status=2)
    assert "NUMALOAD_IO_TIMEOUT: 'later', expected a number of seconds" in done.stderr


@pytest.mark.parametrize("what", CALLS)
def test_the_api_names_it(volume: Volume, store: Path, what: str) -> None:
    weights = api.open(volume.model)
    limited = api.open(volume.model, io_timeout=ANSWERS_S)
    volume.server.tell("stall", "reads")
    volume.forget()
    calls: dict[str, Callable[[], Any]] = {
        "open": lambda: api.open(volume.model, io_timeout=ANSWERS_S),
        "prewarm": lambda: api.prewarm(weights, io_timeout=ANSWERS_S),
        "mirror": lambda: api.mirror(volume.model, io_timeout=ANSWERS_S, shared=True),
        "opened": lambda: api.mirror(weights, io_timeout=ANSWERS_S, shared=True),
        "stream": lambda: list(api.stream(limited)),
    }
    with weights, limited, pytest.raises(api.errors.StalledError) as caught:
        calls[what]()
    error = caught.value
    assert isinstance(error, TimeoutError)
    assert error.path in volume.files
    assert error.offset is not None
    assert (error.seconds, error.server) == (ANSWERS_S, "test-server")
    assert error.mount == str(volume.server.point)


@pytest.mark.parametrize(("verb", "times"), CTRL_C)
def test_ctrl_c(volume: Volume, numaload: Numaload, verb: str, times: int) -> None:
    before = used_bytes(numaload.store.parent)
    volume.forget()
    volume.server.tell("stall", "reads")
    interrupted(begun(volume, numaload, verb), times)
    nothing_left(numaload, before)
    volume.server.tell("work")
    assert numaload.json("prewarm", volume.model)["done"]


def test_ctrl_c_where_closing_waits_too(volume: Volume, numaload: Numaload) -> None:
    """As of most servers, which are told of every descriptor that is closed."""
    volume.server.tell("flushes")
    numaload("inspect", volume.model)
    volume.forget()
    volume.server.tell("stall", "reads")
    job = begun(volume, numaload, "mirror")
    volume.server.tell("stall", "all")
    job.send_signal(signal.SIGINT)
    assert "interrupted" in said(job)
    assert entries(numaload) == []
    volume.server.tell("work")
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130


@pytest.mark.parametrize("verb", ["inspect", *READING][:: 2 if EMULATED else 1])
def test_ctrl_c_where_the_server_does_not_run(
    volume: Volume, numaload: Numaload, verb: str
) -> None:
    volume.server.freeze()
    job = numaload.start(verb, volume.model)
    wait_for(lambda: asks(job), "the question")
    interrupted(job)
    volume.server.thaw()


NAMES = """
import os, sys
from numaload.cli import files, main
files.inspect = lambda options: print("ready", flush=True) or os.stat(options.file)
sys.argv[1:] = ["inspect", sys.argv[1]]
sys.exit(main.main())
"""


def test_ctrl_c_inside_the_kernel(volume: Volume) -> None:
    """Of names, this process may ask itself: no handler runs while the kernel waits."""
    volume.server.freeze()
    program = [sys.executable, "-c", NAMES, str(volume.server.point / "absent")]
    with subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == "ready\n"
        time.sleep(0.2)
        assert job.poll() is None
        interrupted(job)
    volume.server.thaw()


API = """
import json, os, sys, threading, time
import numaload
KEPT = "numaload_"  # pools that stay
threads = threading.active_count()
work = {
    "prewarm": lambda path: numaload.prewarm(path),
    "mirror": lambda path: numaload.mirror(path, shared=True),
    "stream": lambda path: list(numaload.stream(numaload.open(path))),
    "copy": lambda path: numaload.open(path, copy=True),
}[sys.argv[1]]
print("ready", flush=True)
try:
    work(sys.argv[2])
except (KeyboardInterrupt, numaload.errors.CancelledError) as error:
    came = time.monotonic()
    for _ in range(6000):  # one that was being started finds nothing to do
        kept = [t.name for t in threading.enumerate()[threads:] if not t.name.startswith(KEPT)]
        if not kept:
            break
        time.sleep(0.01)
    print(json.dumps({"came": came, "threads": kept, "error": type(error).__name__}))
"""


@pytest.mark.parametrize("what", PROGRAMS)
def test_ctrl_c_in_a_program(volume: Volume, numaload: Numaload, what: str) -> None:
    volume.forget()
    numaload("inspect", volume.model)
    volume.server.tell("stall", "reads")
    with subprocess.Popen(
        [sys.executable, "-c", API, what, volume.model], env=numaload.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        waits(volume, job)
        sent = time.monotonic()
        job.send_signal(signal.SIGINT)
        out, errors = job.communicate(timeout=LIMIT_S)
    said = json.loads(out.splitlines()[-1])
    assert said["came"] - sent < ENDS_S, errors
    assert said["threads"] == []
    assert entries(numaload) == []


def test_a_slow_server_is_waited_for(
    volume: Volume, monkeypatch: pytest.MonkeyPatch, store: Path
) -> None:
    monkeypatch.setattr(network, "SAY_S", 0.3)
    monkeypatch.setattr(network, "TICK_S", 0.05)
    monkeypatch.setattr(api.errors, "_said", set())
    volume.forget()
    volume.server.tell("slow", 0.6)
    with pytest.warns(api.errors.NumaloadWarning) as said:
        weights = api.open(volume.model)
    weights.close()
    (warning,) = said
    text = str(warning.message)
    assert f"waiting for test-server (fuse, mounted at {volume.server.point})" in text
    assert "--io-timeout SECONDS" in text
    assert "Ctrl-C" in text


def test_a_slow_server_has_its_time_for_each_answer(volume: Volume, numaload: Numaload) -> None:
    volume.server.tell("slow", 0.01)
    volume.forget()
    assert numaload.json("prewarm", volume.model, "--io-timeout", 20)["done"]


@pytest.mark.parametrize("verb", READING)
def test_an_error_of_the_server_s(volume: Volume, numaload: Numaload, verb: str) -> None:
    path = volume.files[1]
    offset = os.path.getsize(path) // 2 // PAGE * PAGE
    volume.server.tell("break", os.path.basename(path), offset)
    volume.forget()
    line = failed(numaload, verb, volume.model)
    where, _, at = line.partition(f"{path}: {EIO} at byte ")
    assert where
    # The kernel reads some pages at once, and gives back none of those that lack one.
    assert offset - MIB < int(at) <= offset


@pytest.mark.parametrize("verb", READING)
def test_a_file_that_becomes_shorter(volume: Volume, numaload: Numaload, verb: str) -> None:
    path = volume.files[1]
    volume.forget()
    numaload("inspect", volume.model)
    before = used_bytes(numaload.store.parent)
    volume.server.tell("stall", "reads")
    job = begun(volume, numaload, verb)
    volume.server.tell("size", os.path.basename(path), PAGE)
    volume.server.tell("answer")
    _, text = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 1, text
    assert path in text
    assert "ends early" in text or "changed while in use (size" in text
    nothing_left(numaload, before)


def test_mirrors_outlive_their_server(volume: Volume, numaload: Numaload) -> None:
    numaload("mirror", volume.model)
    volume.server.freeze()
    (entry,) = numaload.json("status", "--io-timeout", 1)["replicas"]
    assert entry["source"] == "unreadable"
    (row,) = numaload.json("verify", "--io-timeout", 1)
    assert row["right"]
    numaload("release", volume.model, "--io-timeout", 1)
    volume.server.thaw()
    assert entries(numaload) == []


def test_many_threads_at_once(volume: Volume) -> None:
    original = Path(volume.files[0]).read_bytes()
    wrong: list[int] = []
    with api.open(volume.model) as weights:
        file = weights.parts[0].file

        def read(seed: int) -> None:
            offset = seed * 1_234_567 % (file.size - 3 * MIB)
            places = range(offset, offset + 2 * MIB, 300_007)
            wrong.extend(
                at for at in places if file.read_at(at, 300_007) != original[at : at + 300_007]
            )

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    ("opened", "why"),
    [("direct", "keeps no pages in RAM"), ("anew", "FUSE without keep_cache")],
)
def test_a_file_system_that_keeps_no_pages_is_named(
    volume: Volume, numaload: Numaload, opened: str, why: str
) -> None:
    """With memory enough, it is not short."""
    volume.server.tell("open", opened)
    done = numaload("prewarm", volume.model, status=1)
    assert why in done.stderr
    assert "memory is short" not in done.stderr
    numaload("mirror", volume.model)
    assert "all checksums right" in numaload("verify", volume.model).stdout
