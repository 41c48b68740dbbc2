"""``exec``: unmodified programs from replicas, their output, signals and ends. On one node.

What each node's program gets of several is tested in tests/numa.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

import numaload as api
from commands import LIMIT_S, Numaload, resident, running, wait_for
from confined import DOCKER
from numaload.errors import ProgramError, UsageError
from numaload.linux import syscalls
from numaload.replicas import exec as programs

PYTHON = (sys.executable, "-c")
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
WORDS = "import json, sys; print(json.dumps(sys.argv[1:]))"
# What the kernel says of a program that knows nothing of numaload.
SHOW = ("sh", "-c", "cat /proc/self/status /proc/self/numa_maps", "{model}")
CATCH = """
import os, signal, sys, time
caught = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, lambda number, _: caught.append(number))
print("ready", os.getpid(), flush=True)
while not caught:
    time.sleep(0.01)
time.sleep(0.5)  # another one would come
print("caught", caught, flush=True)
sys.exit(7)
"""


@pytest.fixture
def mirrored(numaload: Numaload, model: str) -> str:
    numaload("mirror", model)
    return model


def words_of(numaload: Numaload, model: str, *words: str) -> list[str]:
    """The words of a program, as it gets them."""
    found: list[str] = json.loads(numaload("exec", model, "--", *PYTHON, WORDS, *words).stdout)
    return found


def field(shown: str, name: str) -> str:
    (found,) = re.findall(rf"^{name}:\t(\S+)$", shown, re.MULTILINE)
    return str(found)


def signals(shown: str, name: str) -> list[int]:
    mask = int(field(shown, name), 16)
    return [number for number in range(1, 32) if mask >> number - 1 & 1]


# By this process, which Python ignores SIGPIPE and SIGXFSZ for: a shell may have started it so.
IGNORED = [
    number
    for number in signals(Path("/proc/self/status").read_text(), "SigIgn")
    if number not in (signal.SIGPIPE, signal.SIGXFSZ)
]


# What a program gets


def test_a_program_reads_the_replica_under_the_models_name(
    numaload: Numaload, model_files: list[str], mirrored: str
) -> None:
    folder, path, node, index = words_of(
        numaload, mirrored, "{folder}", "{model}", "{node}", "{index}"
    )
    assert folder == numaload("store", "path", mirrored).stdout.strip()
    assert path == f"{folder}/{Path(model_files[0]).name}"
    assert (node, index) == ("0", "0")
    for source in model_files:
        replica = Path(folder, Path(source).name)
        assert not replica.is_symlink()
        assert replica.read_bytes() == Path(source).read_bytes()


def test_what_is_no_form_stays_as_it_is(numaload: Numaload, mirrored: str) -> None:
    words = [
        '{"a": {"b": 1}}', "{{model}}", "{{ node }}", "{modle}", "{port:}", "{port:99999999}", "{}",
        "%d", "\\", "", "--", "-h", "--json", "{ model }", "\udcff",
    ]  # fmt: skip
    forms = ("{model}", '{"port":{port:8080}}', "a{node}b{index}")
    found = words_of(numaload, mirrored, *words, *forms)
    assert found[: len(words)] == words
    assert found[-2:] == ['{"port":8080}', "a0b0"]


def test_a_program_is_on_the_nodes_cpus_and_prefers_its_memory(
    numaload: Numaload, mirrored: str
) -> None:
    cpus = as_listed(api.topology().nodes[0].usable_cpus)
    for options, policy in (
        ((), "prefer:0"),
        (("--memory", "bind"), "bind:0"),
        (("--memory", "none"), "default"),
        (("--node", "0", "--memory", "bind"), "bind:0"),
    ):
        shown = numaload("exec", *options, mirrored, "--", *SHOW).stdout
        policies = re.findall(r"^[0-9a-f]{8,} (\S+) ", shown, re.MULTILINE)
        assert set(policies) == {policy}
        assert field(shown, "Cpus_allowed_list") == cpus
        assert signals(shown, "SigBlk") == []
        assert signals(shown, "SigIgn") == IGNORED


def as_listed(cpus: frozenset[int]) -> str:
    """As the kernel lists the affinity of a process that may run on all of these."""
    shows = (
        f"import os; os.sched_setaffinity(0, {set(cpus)}); print(open('/proc/self/status').read())"
    )
    done = subprocess.run([*PYTHON, shows], text=True, capture_output=True, check=True)
    return field(done.stdout, "Cpus_allowed_list")


def test_a_missing_replica_is_built_first_and_stays(numaload: Numaload, model: str) -> None:
    words = ("exec", model, "--", "sh", "-c", "true", "{model}")
    assert "no replica on node 0 yet: building it, as mirror does" in numaload(*words).stderr
    assert numaload(*words).stderr == ""
    (row,) = numaload.json("store")["rows"]
    assert row["nodes"].keys() == {"0"}


def test_no_byte_of_the_source_is_read(
    numaload: Numaload, model_files: list[str], mirrored: str
) -> None:
    read = """
import os, sys
folder, *sources = sys.argv[1:]
for path in sources:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    for _ in range(5):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
print(sum(len(open(os.path.join(folder, os.path.basename(path)), "rb").read()) for path in sources))
parent = f"/proc/{os.getppid()}"
opened = {os.readlink(f"{parent}/fd/{fd}") for fd in os.listdir(f"{parent}/fd")}
assert not opened & set(sources)
assert not any(path in open(f"{parent}/maps").read() for path in sources)
"""
    done = numaload("exec", mirrored, "--", *PYTHON, read, "{folder}", *model_files)
    assert int(done.stdout) == sum(map(os.path.getsize, model_files))
    assert resident(model_files) == 0


def test_a_program_has_a_lease_while_it_runs(numaload: Numaload, mirrored: str) -> None:
    waits = "import sys; print(1, flush=True); sys.stdin.read()"  # it has nothing of it open
    with numaload.start("exec", mirrored, "--", *PYTHON, waits, "{model}", **PIPES) as job:
        assert job.stdout
        assert job.stdout.readline() == "1\n"
        (row,) = numaload.json("store")["rows"]
        assert [user.endswith(f"({job.pid})") for user in row["users"]] == [True]
        assert numaload.json("store", "gc", "--idle", "0.001") == []
        job.communicate(timeout=LIMIT_S)
    assert numaload.json("store")["rows"][0]["users"] == []


def test_only_what_shall_be_inherited_is(numaload: Numaload, mirrored: str, tmp_path: Path) -> None:
    listing = "import os; print({os.path.realpath(f'/proc/self/fd/{n}') for n in range(3, 99)"
    listing += " if os.path.exists(f'/proc/self/fd/{n}')})"
    (tmp_path / "given").touch()
    with open(tmp_path / "given", encoding="ascii") as given:
        done = subprocess.run(
            numaload.command("exec", mirrored, "--", *PYTHON, listing, "{model}"), text=True,
            env=numaload.environment, pass_fds=[given.fileno()], capture_output=True, check=True,
        )  # fmt: skip
    assert done.stdout.count(str(tmp_path / "given")) == 1
    assert str(numaload.store) not in done.stdout
    assert "pipe" not in done.stdout


# What is refused


def test_a_program_that_would_read_the_source_is_refused(numaload: Numaload, model: str) -> None:
    said = numaload("exec", model, "--", "cat", model, status=2).stderr
    assert "cat: no argument has {model} or {folder}" in said
    assert numaload.json("store")["rows"] == []  # before anything was built


@pytest.mark.parametrize("words", [(), ("cat", "{model}"), ("--nodes", "0")])
def test_a_program_that_is_not_behind_dashes_is_asked_for(
    numaload: Numaload, model: str, words: tuple[str, ...]
) -> None:
    said = numaload("exec", model, *words, status=2).stderr
    assert "no program: write it behind --: numaload exec MODEL -- PROGRAM -m {model}" in said
    assert "expected a list of words" in numaload("exec", model, "--", status=2).stderr


def test_programs_that_would_all_do_the_same_are_refused() -> None:
    for ways in ("{node}", "{index}", "{port:8080}", "{port:65534}"):
        programs._check(["server", "{model}", ways], "prefer", 2)
    programs._check(["server", "{folder}"], "prefer", 1)
    with pytest.raises(UsageError, match=r"in each other's way.*\{port:8080\}, \{node\} or \{inde"):
        programs._check(["server", "{model}", "--port", "8080"], "prefer", 2)
    for port in ("{port:65535}", "{port:0}", "{port:99999}"):
        with pytest.raises(UsageError, match="expected a port from 1 to 65534"):
            programs._check(["server", "{model}", port], "prefer", 2)


def test_wrong_arguments_are_named(numaload: Numaload, model: str) -> None:
    assert (
        "node 7 is not usable" in numaload("exec", "--node", 7, model, "--", "x", status=2).stderr
    )
    numaload("exec", "--node", 0, "--all-nodes", model, "--", "cat", "{model}", status=2)
    numaload("exec", "--memory", "some", model, "--", "cat", "{model}", status=2)
    absent = f"{model}.absent"
    assert absent in numaload("exec", absent, "--", "cat", "{model}", status=1).stderr
    with pytest.raises(UsageError, match="memory 'some': expected prefer, bind, none"):
        api.exec(model, ["cat", "{model}"], memory="some")
    odd: tuple[Any, ...] = ("cat {model}", b"cat", 3, Path("cat"), [], ["", "{model}"])
    for wrong in odd:
        with pytest.raises(UsageError, match="expected a list of words"):
            api.exec(model, wrong)
    words: tuple[Any, ...] = ("x\0", 3, b"{model}", Path("x"), "\ud800")
    for word in words:
        with pytest.raises(UsageError, match=r"word .*: expected a str that has no NUL"):
            api.exec(model, ["cat", "{model}", word])


def test_where_policies_are_refused_cpus_alone_are_set_and_that_is_said(
    numaload: Numaload, mirrored: str
) -> None:
    refused = numaload.within(deny=DOCKER)
    done = refused("exec", mirrored, "--", *SHOW)
    assert done.stderr.count("warning: get_mempolicy") == 1
    assert "--cap-add SYS_NICE" in done.stderr
    assert "on their node's CPUs alone" in done.stderr
    assert field(done.stdout, "Cpus_allowed_list")
    done = refused("exec", "--memory", "bind", mirrored, "--", "echo", "{model}", status=1)
    assert done.stdout == ""
    assert "--cap-add SYS_NICE" in done.stderr
    assert refused("exec", "--memory", "none", mirrored, "--", "true", "{model}").stderr == ""


# How it ends


def test_the_status_is_the_programs(numaload: Numaload, mirrored: str, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no interpreter")
    script.chmod(0o755)
    for program, status, said in (
        (("sh", "-c", "exit 41", "{model}"), 41, ""),
        (("sh", "-c", "kill -9 $$", "{model}"), 137, "ended by signal 9 (Killed)"),
        (("sh", "-c", "kill -13 $$", "{model}"), 141, ""),
        (("no-such-program", "{model}"), 127, "no-such-program: cannot be started: No such file"),
        (("/etc/passwd", "{model}"), 126, "/etc/passwd: cannot be started: Permission denied"),
        ((str(script), "{model}"), 126, "cannot be started: Exec format error"),
    ):
        stderr = numaload("exec", mirrored, "--", *program, status=status).stderr
        assert said in stderr
        assert bool(stderr) == bool(said)


def test_an_old_kernel_tells_the_end_as_well(numaload: Numaload, mirrored: str) -> None:
    old = numaload.within(deny="pidfd_open=ENOSYS")
    done = old("exec", "--all-nodes", mirrored, "--", "sh", "-c", "exit 3", "{model}", status=3)
    assert done.stderr == "numaload: node 0: sh ended with status 3\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_passed_on_once(
    numaload: Numaload, mirrored: str, number: signal.Signals
) -> None:
    words = ("exec", mirrored, "--", *PYTHON, CATCH, "{model}")
    with numaload.start(*words, start_new_session=True) as job:
        assert job.stdout
        assert job.stdout.readline().startswith("ready")
        job.send_signal(number)
        out, err = job.communicate(timeout=LIMIT_S)
    assert (job.returncode, out, err) == (7, f"caught [{int(number)}]\n", "")


def own_the_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("labelled", [False, True])
def test_ctrl_c_in_a_terminal_reaches_the_program_once(
    numaload: Numaload, mirrored: str, labelled: bool
) -> None:
    ours, its = pty.openpty()
    words = ("exec", *["--all-nodes"] * labelled, mirrored, "--", *PYTHON, CATCH, "{model}")
    streams = {"stdin": its, "stdout": its, "stderr": its}
    with numaload.start(
        *words, start_new_session=True, preexec_fn=own_the_terminal, **streams
    ) as job:
        os.close(its)
        shown = b""
        with suppress(OSError):  # which says that nobody has the terminal any more
            while data := os.read(ours, 4096):
                if b"ready" in data:
                    os.write(ours, b"\x03")
                shown += data
        assert job.wait(LIMIT_S) == 7
    os.close(ours)
    assert b"caught [2]\r\n" in shown


def test_ignored_signals_stay_ignored(numaload: Numaload, mirrored: str) -> None:
    """As below nohup."""
    with numaload.start(
        "exec", mirrored, "--", *SHOW,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    ) as job:  # fmt: skip
        out, _ = job.communicate(timeout=LIMIT_S)
    assert signals(out, "SigIgn") == sorted({*IGNORED, signal.SIGINT})


def test_if_the_supervisor_is_killed_the_program_gets_sigterm(
    numaload: Numaload, mirrored: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    words = ("exec", mirrored, "--", *PYTHON, CATCH, "{model}")
    with (
        log.open("w") as out,
        numaload.start(*words, stdout=out, stderr=subprocess.DEVNULL) as job,
    ):
        wait_for(lambda: "ready" in log.read_text(), "the program")
        pid = int(log.read_text().split()[1])
        job.kill()
    wait_for(lambda: not running(pid), "the end of the program")
    assert log.read_text().splitlines()[-1] == f"caught [{int(signal.SIGTERM)}]"


# What it writes


def labelled(numaload: Numaload, model: str, program: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        numaload.command("exec", "--all-nodes", model, "--", *PYTHON, program, "{model}"),
        capture_output=True, env=numaload.environment, timeout=LIMIT_S, check=False, input=b"typed",
    )  # fmt: skip


def test_lines_begin_with_the_node_and_keep_their_bytes(numaload: Numaload, mirrored: str) -> None:
    writes = r"""
import os, sys
os.write(1, b"one\n\xff\x00 two\r\n\nthr")
os.write(2, b"to stderr")
os.write(1, b"ee" + sys.stdin.buffer.read())
"""
    done = labelled(numaload, mirrored, writes)
    assert done.returncode == 0
    assert done.stdout == b"[node 0] one\n[node 0] \xff\x00 two\r\n[node 0] \n[node 0] three\n"
    ended = f"numaload: node 0: {sys.executable} ended with status 0\n"
    assert done.stderr == b"[node 0] to stderr\n" + ended.encode()


def test_long_lines_and_much_output_come_whole(numaload: Numaload, mirrored: str) -> None:
    writes = "import sys; sys.stdout.write('x' * 300_000 + '\\n' + 'y' * 70 + '\\n' * 5000)"
    lines = labelled(numaload, mirrored, writes).stdout.split(b"\n")
    assert lines.pop() == b""
    assert all(line.startswith(b"[node 0] ") for line in lines)
    texts = [line.removeprefix(b"[node 0] ") for line in lines]
    (y,) = (number for number, text in enumerate(texts) if b"y" in text)
    assert b"".join(texts[:y]) == b"x" * 300_000
    assert max(map(len, texts)) < 200_000  # none was waited for
    assert texts[y:] == [b"y" * 70, *[b""] * 4999]


def test_a_line_is_shown_when_it_is_written(numaload: Numaload, mirrored: str) -> None:
    with numaload.start(
        "exec", "--nodes", "0", mirrored, "--", *PYTHON, CATCH, "{model}"
    ) as job:  # fmt: skip
        assert job.stdout
        assert job.stdout.readline().startswith("[node 0] ready")
        job.terminate()
        out, err = job.communicate(timeout=LIMIT_S)
    assert out == "[node 0] caught [15]\n"
    assert err.endswith("ended with status 7\n")


def test_a_process_that_keeps_the_output_open_keeps_nobody(
    numaload: Numaload, mirrored: str, tmp_path: Path
) -> None:
    leaves = "import os, subprocess; print(subprocess.Popen(['sleep', '1000']).pid)"
    done = labelled(numaload, mirrored, leaves)
    assert done.returncode == 0
    pid = int(done.stdout.removeprefix(b"[node 0] "))
    assert running(pid)
    os.kill(pid, signal.SIGKILL)


def test_a_reader_that_leaves_ends_the_program_as_without_numaload(
    numaload: Numaload, mirrored: str
) -> None:
    for options in ((), ("--all-nodes",)):
        with numaload.start("exec", *options, mirrored, "--", "yes", "{model}") as job:
            assert job.stdout
            assert job.stdout.readline().endswith(".gguf\n")
            job.stdout.close()
            assert job.wait(LIMIT_S) == 128 + signal.SIGPIPE


def test_a_signal_is_passed_on_while_nobody_reads(
    numaload: Numaload, mirrored: str, tmp_path: Path
) -> None:
    impatient = """
import sys
from numaload.cli.main import main
from numaload.replicas import exec
exec.END_S = 0.0
writes = 'echo something; touch "$0"; exec sleep 1000'
sys.exit(main(["exec", "--nodes", "0", sys.argv[1], "--", "sh", "-c", writes, *sys.argv[2:]]))
"""
    ours, its = os.pipe()
    os.set_blocking(its, False)
    with suppress(BlockingIOError):
        while True:
            os.write(its, bytes(4096))
    os.set_blocking(its, True)
    wrote = tmp_path / "wrote"
    words = [*PYTHON, impatient, mirrored, str(wrote), "{model}"]
    with subprocess.Popen(
        words, env=numaload.environment, stdout=its, stderr=subprocess.PIPE
    ) as job:
        try:
            wait_for(wrote.exists, "its output")
            job.terminate()
            assert job.wait(LIMIT_S) == 128 + signal.SIGTERM
        finally:
            job.kill()
        assert b"ended by signal 15" in job.communicate()[1]
    os.close(ours)
    os.close(its)


# From Python


def children() -> set[int]:
    """The processes of this one, which other tests may have left running."""
    return {child.pid for child in psutil.Process().children()}


def test_the_api_returns_how_programs_ended_and_leaves_nothing(
    store: Path, model: str, capfd: pytest.CaptureFixture[str], descriptors: Callable[[], int]
) -> None:
    affinity, policy, others = os.sched_getaffinity(0), syscalls.get_mempolicy(), children()
    asked: list[Any] = []

    @contextmanager
    def building(nodes: list[int]) -> Iterator[Any]:
        asked.append(nodes)
        yield lambda done, _: asked.append(done)

    told: list[Any] = []
    (ended,) = api.exec(
        model, ["sh", "-c", "echo $PPID; exit 3", "{model}"], "all", labelled=True, memory="bind",
        building=building, ended=told.append,
    )  # fmt: skip
    assert (ended.node, ended.code, ended.status) == (0, 3, 3)
    assert capfd.readouterr().out == f"[node 0] {os.getpid()}\n"
    assert (asked[0], len(asked) > 1, told) == ([0], True, [ended])
    before = descriptors()
    with api.open(model) as weights:
        (ended,) = api.exec(weights, ["sh", "-c", "kill -9 $$", "{model}"])
    assert (ended.code, ended.status) == (-9, 137)
    with pytest.raises(ProgramError, match="no-such-program") as caught:
        api.exec(model, ["no-such-program", "{model}"], labelled=True)
    assert caught.value.status == 127
    assert descriptors() == before
    assert (os.sched_getaffinity(0), syscalls.get_mempolicy()) == (affinity, policy)
    assert children() == others


def test_what_is_raised_meanwhile_ends_the_programs(store: Path, model: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before, others = signal.signal(signal.SIGALRM, interrupted), children()
    try:
        signal.setitimer(signal.ITIMER_REAL, 2)
        with pytest.raises(KeyboardInterrupt):
            api.exec(model, ["sh", "-c", "exec sleep 1000", "{model}"], labelled=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert children() == others
