"""Point 3: what of a model is in RAM, by tensor; ``status`` shows it, once or again and again."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import KEPT, LIMIT_S, Numaload, evict, resident
from confined import DOCKER
from numaload.cli.pagecache import bar, show_files
from numaload.files.residency import asked_by, map_quietly
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import map_file, populate_read
from numaload.pagecache.residency_report import FileResidency, TensorResidency
from safetensors_builder import model as safetensors_model

TIB = 1 << 40
NAME = "blk.0.attn_q.weight"
UP, HIDE, SHOW = b"\x1b[1A", b"\x1b[?25l", b"\x1b[?25h"  # a line up; the cursor
OTHER = 1000  # a user who owns none of these files


def read_tensor(path: str, name: str) -> None:
    """Its pages and no others."""
    with api.open(path) as weights:
        tensor = weights[name]
        its, offset, nbytes = tensor.path, tensor.offset, tensor.nbytes
    assert api.evict(path).done  # also of what was read ahead of the headers
    fd = os.open(its, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, nbytes, offset)
    os.close(fd)


@pytest.fixture
def cold(model_files: list[str], tmp_path: Path) -> list[str]:
    """Files of this test alone: views that others left of a model keep pages of it in RAM."""
    own = [shutil.copy(path, str(tmp_path)) for path in model_files]
    evict(own)
    return own


def test_of_a_cold_model_nothing_is_there_and_nothing_comes(cold: list[str]) -> None:
    report = api.residency(cold[0])
    assert [file.path for file in report.files] == cold
    assert report.size == sum(map(os.path.getsize, cold))
    assert (report.resident, report.known, report.on_nodes) == (0, True, {})
    assert report.tensors
    assert all(tensor.resident == 0 for tensor in report.tensors.values())
    assert all(tensor.on_nodes == {} for tensor in report.tensors.values())
    assert [resident(path) for path in cold] == [0] * len(cold)  # the headers neither


@pytest.fixture
def warm(cold: list[str]) -> Iterator[list[str]]:
    """Locked in RAM: some machines page out what is idle at any time."""
    with ExitStack() as locked:
        for path in cold:
            fd = os.open(path, os.O_RDONLY)
            locked.callback(os.close, fd)
            mapping = locked.enter_context(map_file(fd, os.path.getsize(path)))
            syscalls.mlock_on_fault(mapping.address, mapping.length)  # as far as one may
            populate_read(mapping)
        yield cold


def test_of_a_warm_model_all_is_there(warm: list[str]) -> None:
    report = api.residency(warm[-1])
    assert report.resident == report.size
    assert all(file.how in ("cachestat", "mincore") for file in report.files)
    assert all(set(file.cells) == {1.0} for file in report.files)
    with api.open(warm[0]) as weights:
        assert {n: t.nbytes for n, t in weights.items()} == {
            n: t.resident for n, t in report.tensors.items()
        }
    for tensor in report.tensors.values():
        assert sum(tensor.on_nodes.values()) == tensor.resident
    assert sum(report.on_nodes.values()) == report.size


def test_one_tensor_is_there(cold: list[str]) -> None:
    read_tensor(cold[0], NAME)
    report = api.residency(cold)
    whole = report.tensors[NAME]
    assert whole.resident == whole.nbytes > 0
    others = sum(t.resident for name, t in report.tensors.items() if name != NAME)
    page = syscalls.PAGE
    assert others <= 2 * page  # the edges that it shares with its neighbours
    assert whole.nbytes <= report.resident <= whole.nbytes + 2 * page
    cells = report.files[0].cells
    assert 0 < sum(cells) * report.files[0].size / len(cells) <= whole.nbytes + 2 * page + 60


def test_many_ways_to_name_it(cold: list[str], tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(cold[0])
    with api.open(cold[0]) as weights:
        report = api.residency([weights, cold[1], Path(cold[0])])
    assert len(report.files) == len(cold)
    assert api.residency(cold[0], tensors=False).tensors == {}


def test_safetensors_and_files_that_are_no_models(tmp_path: Path) -> None:
    weights, text = tmp_path / "model.safetensors", tmp_path / "text"
    weights.write_bytes(safetensors_model({"a": ("F32", [2, 3]), "b": ("BF16", [5])}))
    text.write_text("no model " * 1000)
    report = api.residency([weights, text])
    with api.open(weights) as opened:
        assert set(report.tensors) == set(opened)
    assert report.resident == report.size
    (note,) = report.notes
    assert str(text) in note
    with pytest.raises(api.errors.ReadError):
        api.residency(tmp_path / "none.gguf")


def test_the_report_is_json(cold: list[str]) -> None:
    report = json.loads(json.dumps(api.residency(cold[0]).to_dict()))
    assert set(report) == {"files", "notes", "size", "resident", "known", "on_nodes"}
    assert {"path", "size", "resident", "known", "how", "on_nodes", "nodes_error",
            "cells", "tensors"} == set(report["files"][0])  # fmt: skip
    assert {"name", "nbytes", "resident", "on_nodes", "nodes_error"} == set(
        report["files"][0]["tensors"][0]
    )


# Where the kernel, or a sandbox, tells less.


@pytest.mark.parametrize(
    "deny", ["cachestat=ENOSYS", "cachestat=EPERM", f"cachestat=EPERM,{DOCKER}"]
)
def test_without_cachestat_the_answer_is_the_same(
    cold: list[str], numaload: Numaload, deny: str
) -> None:
    for _ in range(5):  # between two looks the kernel may drop pages that nobody uses
        read_tensor(cold[0], NAME)
        alone = numaload.within(deny=deny).json("status", cold[0], "--tensors")["page_cache"]
        usual = numaload.json("status", cold[0], "--tensors")["page_cache"]
        assert [row.pop("how") for row in alone] == ["mincore"] * len(cold)
        assert {row.pop("how") for row in usual} <= {"cachestat", "mincore"}
        if alone == usual:
            break
    assert alone == usual
    assert alone[0]["resident"] > 0


def test_a_file_of_8_tib_is_looked_at(tmp_path: Path, numaload: Numaload) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 8 * TIB)
    with SourceFile(str(path)) as file:
        if asked_by(file) != "cachestat":
            pytest.skip("this kernel or file system has no cachestat(2)")
    (row,) = numaload.json("status", path)["page_cache"]
    assert (row["how"], row["resident"], row["known"]) == ("cachestat", 0, True)


def test_without_cachestat_every_page_of_a_large_file_is_asked_about(
    tmp_path: Path, numaload: Numaload
) -> None:
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, TIB // 8)
    end = TIB // 8 - syscalls.PAGE
    with SourceFile(str(path)) as file, map_quietly(file) as mapping:
        syscalls.mlock_on_fault(mapping.address + end, syscalls.PAGE)  # or it may be paged out
        populate_read(mapping, end, end + syscalls.PAGE)
        (row,) = numaload.within(deny="cachestat=ENOSYS").json("status", path)["page_cache"]
    assert (row["how"], row["known"]) == ("mincore", True)
    assert row["resident"] == syscalls.PAGE  # one page of 32 million, and it is found
    assert row["cells"][-1] > 0 == sum(row["cells"][:-1])


def as_other_user(ask: Callable[[], Any]) -> Any:
    """In a process of theirs; what it answers."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(OTHER, OTHER, OTHER)
            os.setresuid(OTHER, OTHER, OTHER)
            os.write(theirs, json.dumps(ask()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours, "rb") as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text)


@pytest.fixture
def of_root() -> Iterator[str]:
    """A file that everybody may read, in a folder that everybody may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # noqa: S103
        path = Path(folder, "file")
        path.write_bytes(bytes(1 << 20))
        path.chmod(0o644)
        evict([str(path)])
        yield str(path)


@pytest.mark.parametrize("told", [True, False])
def test_files_of_others_are_known_or_said_to_be_unknown(
    of_root: str, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    """mincore says "resident" for all of them; whether cachestat tells depends on the kernel."""
    if not told:
        monkeypatch.setattr(syscalls, "cachestat", lambda *_: None)
    row = as_other_user(lambda: api.residency(of_root, tensors=False).to_dict())["files"][0]
    assert row["resident"] == 0
    assert row["how"] == ("cachestat" if row["known"] else "unknown")
    assert told or not row["known"]
    assert row["known"] or (row["cells"], row["on_nodes"]) == ([], {})


def test_files_of_others_can_be_given_back(of_root: str) -> None:
    Path(of_root).read_bytes()
    report = as_other_user(lambda: api.evict(of_root).to_dict())
    assert resident(of_root) == 0
    assert report["done"] is True
    assert report["given_back"] == (1 << 20 if report["known"] else 0)


def test_on_an_overlay(tmp_path: Path, numaload: Numaload) -> None:
    """There a file's pages are another file's, of which cachestat knows nothing."""
    folder = tmp_path / "all"
    folder.mkdir()
    program = f"""
        mount -t tmpfs none {folder} && cd {folder} && mkdir l u w m || exit 77
        head -c 1M /dev/zero > l/f
        mount -t overlay none -o lowerdir=l,upperdir=u,workdir=w m || exit 77
        cat m/f > /dev/null && exec {shlex.join(numaload.command("status", "m/f", "--json"))}"""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", program], capture_output=True, text=True,
        env=numaload.environment, timeout=LIMIT_S, check=False,
    )  # fmt: skip
    if done.returncode in (1, 77):
        pytest.skip("an overlay cannot be mounted here: root is needed")
    (row,) = json.loads(done.stdout)["page_cache"]
    assert (row["how"], row["resident"]) == ("mincore", 1 << 20)


# ``status``.


@pytest.mark.fast
def test_status_shows_a_bar_and_tensors(cold: list[str], numaload: Numaload) -> None:
    read_tensor(cold[0], NAME)
    text = numaload("status", cold[0], "--tensors").stdout
    bars = re.findall(r"^  \[([ .oO]{60})\] (\S+) % of (.*)$", text, re.MULTILINE)
    assert [path for *_, path in bars] == cold
    assert float(bars[0][1]) > 0
    assert set(bars[0][0]) > {" "}
    assert bars[1][:2] == (" " * 60, "0")
    (line,) = re.findall(rf"^  {re.escape(NAME)} .*$", text, re.MULTILINE)
    with api.open(cold[0]) as weights:
        names = list(weights)
    resident, unit, size, its_unit = line.split()[1:5]
    assert unit == its_unit
    assert KEPT * float(size) < float(resident) <= float(size)
    assert all(re.search(rf"^  {re.escape(name)} ", text, re.MULTILINE) for name in names)
    assert NAME not in numaload("status", cold[0]).stdout


def test_status_calls_unknown_what_the_kernel_does_not_tell(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensor = TensorResidency("t", 1 << 20, 0)
    show_files([FileResidency("/m", 1 << 20, known=False, tensors=[tensor])])
    said = capsys.readouterr().out
    assert re.findall(r"^  (/m|t) +unknown +1\.0 MiB", said, re.MULTILINE) == ["/m", "t"]
    assert "0 B" not in said


def test_status_names_what_is_not_there(numaload: Numaload, tmp_path: Path) -> None:
    path = tmp_path / "nosuch.gguf"
    for more in ([], ["--json"]):
        assert f"{path}: No such file" in numaload("status", path, *more, status=1).stderr
    path.write_bytes(safetensors_model({"a": ("F32", [2, 3])}))
    model = path.rename(tmp_path / "model.safetensors")
    numaload("mirror", model)
    model.unlink()
    done = numaload("status", model)
    assert str(model) in done.stdout
    assert done.stderr == ""


def test_status_as_json(warm: list[str], numaload: Numaload) -> None:
    for row in numaload.json("status", warm[0])["page_cache"]:
        assert {"path", "size", "resident", "known", "on_nodes"} <= set(row)
        assert "tensors" not in row
        assert row["resident"] == row["size"] == sum(row["on_nodes"].values())
    rows = numaload.json("status", warm[0], "--tensors")["page_cache"]
    assert all(t["resident"] == t["nbytes"] for row in rows for t in row["tensors"])


def test_tensors_of_what_is_no_model(tmp_path: Path, numaload: Numaload) -> None:
    (tmp_path / "text").write_text("no model")
    done = numaload("status", tmp_path / "text", "--tensors")
    assert "no tensors are shown" in done.stderr
    assert "8 B" in done.stdout


def test_watching_as_lines(cold: list[str], numaload: Numaload) -> None:
    """A document a line, each as it is then; Ctrl-C ends it as everywhere."""
    job = numaload.start("status", cold[0], "--watch", "0.05", "--json")
    assert job.stdout is not None
    first = json.loads(job.stdout.readline())
    api.prewarm(cold[0])
    while json.loads(job.stdout.readline())["page_cache"][0]["resident"] == 0:
        pass
    job.send_signal(signal.SIGINT)
    _, errors = job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130
    assert errors == "numaload: error: interrupted\n"
    assert [row["resident"] for row in first["page_cache"]] == [0] * len(cold)
    assert all(0 <= node["memory_free"] <= node["memory_total"] for node in first["nodes"])


def test_watching_on_a_terminal_draws_in_place(
    cold: list[str], numaload: Numaload, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not fit on the terminal is cut, so that each look covers the one before."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 8, 60, 0, 0))
    job = numaload.start("status", cold[0], "--watch=0.05", "--tensors", stdout=theirs)
    os.close(theirs)
    shown = b""
    while shown.count(UP) < 3 * 7:
        shown += os.read(ours, 65536)
    job.send_signal(signal.SIGINT)
    with suppress(OSError):  # how a terminal says that the other side is gone
        while more := os.read(ours, 65536):
            shown += more
    os.close(ours)
    job.communicate(timeout=LIMIT_S)
    assert job.returncode == 130
    assert b"free" in shown
    assert shown.count(HIDE) == shown.count(SHOW) == 1


def test_watching_ends_with_who_reads_it(cold: list[str], numaload: Numaload) -> None:
    job = numaload.start("status", cold[0], "--watch", "0.01")
    assert job.stdout is not None
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(LIMIT_S) == 1
    assert job.stderr is not None
    assert job.stderr.read() == ""
    job.stderr.close()


@pytest.mark.parametrize("words", [("--watch", "model.gguf"), ("--watch=0",), ("--watch=-1",),
                                   ("--watch=nan",), ("--watch=inf",)])  # fmt: skip
@pytest.mark.parametrize("verb", ["status", "mirror"])
def test_what_is_no_interval(numaload: Numaload, verb: str, words: tuple[str, ...]) -> None:
    said = numaload(verb, *words, status=2).stderr
    assert "expected a number of seconds above 0, found" in said
    assert "; a FILE goes before --watch\n" in said


@pytest.mark.parametrize("words", [("--watch",), ("--watch", 1, "--json"), ("--tensors",)])
def test_ready_goes_with_no_other_view(numaload: Numaload, words: tuple[object, ...]) -> None:
    done = numaload("status", "model.gguf", "--ready", *words, status=2)
    assert "leave out --tensors and --watch" in done.stderr
    assert done.stdout == ""


def test_bar_letters() -> None:
    assert bar([0, 0.001, 0.49, 0.5, 0.99, 1]) == " ..ooO"
