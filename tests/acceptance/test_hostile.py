"""The point "Hostile files: no allocation beyond a small multiple of the file, no recursion bomb,
no quadratic time; one test per leaf error". What single numbers in headers can do is in tests/unit;
here are whole files, processes, and the errors as users get them.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gguf_builder as gb
import numaload as api
from commands import Numaload, command_lines
from every_error import PROVOKED
from numaload import errors

MIB = 1 << 20
TIMES = 32  # what parsing may take of the file's size, as promised


@pytest.mark.parametrize("kind", PROVOKED, ids=lambda kind: kind.__name__)
def test_every_error(kind: type[errors.NumaloadError], tmp_path: Path, store: Path) -> None:
    os.symlink(store, tmp_path / "store")
    with pytest.raises(kind) as caught:
        PROVOKED[kind](tmp_path)
    assert type(caught.value) is kind
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301 - our own
    assert str(again) == str(caught.value)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        folder = os.open(path.parent, os.O_PATH)  # socket names are short, folders of tests are not
        one.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL: dict[str, tuple[Callable[[Path], Any] | str, str]] = {
    "directory": (Path.mkdir, "expected a file, found a directory"),
    "fifo": (fifo, "expected a file, found a FIFO"),
    "socket": (bound_socket, "expected a file, found a socket"),
    "character-device": ("/dev/zero", "expected a file, found a character device"),
    "loop": (loop, "Too many levels of symbolic links"),
    "absent": (lambda _: None, "No such file or directory"),
    "empty": (Path.touch, "the file is empty"),
    "proc": ("/proc/self/status", "the file is empty"),
    "sysfs": ("/sys/kernel/mm/transparent_hugepage/enabled", "expected the magic"),
}
READING = ["inspect", "plan", "mirror"]
EMPTY_STORE = ["verify", "release"]


@pytest.mark.parametrize("name", SPECIAL)
def test_what_is_no_model_is_a_named_error(numaload: Numaload, tmp_path: Path, name: str) -> None:
    """One line, and soon: a FIFO that nobody writes to is not waited for."""
    make, words = SPECIAL[name]
    path = make if isinstance(make, str) else str(tmp_path / "m.gguf")
    if not isinstance(make, str):
        make(Path(path))
    verbs = [*READING, *EMPTY_STORE, "prewarm", "status"]
    found = dict(zip(verbs, command_lines(numaload, [(v, path) for v in verbs]), strict=True))
    for verb in READING:
        status, out, said = found[verb]
        assert (status, out) == (1, ""), verb
        assert said == f"numaload: error: {path}: {said.partition(f'{path}: ')[2]}"
        assert words in said
        assert said.count("\n") == 1
    for verb in EMPTY_STORE:
        status, _, said = found[verb]
        assert status == 1
        assert f"error: {path}: no replicas of it" in said
    if name not in {"empty", "proc", "sysfs"}:  # prewarm reads any file, GGUF or not
        assert found["prewarm"][0] == 1
        assert found["prewarm"][2].startswith(f"numaload: error: {path}: {words}")
    if words.startswith("expected a file"):
        assert f"{path}: {words}" in found["status"][2]


def test_a_name_that_is_no_text(numaload: Numaload, tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.gguf")
    Path(path).write_bytes(gb.build([], [gb.tensor("t")]))
    done = numaload("inspect", path)
    assert "t " in done.stdout
    assert numaload("status", path).returncode == 0
    os.truncate(path, 40)
    assert "numaload: error: " in numaload("inspect", path, status=1).stderr


@pytest.mark.parametrize("use", [api.open, api.prewarm, api.mirror, api.attach])
def test_a_name_with_a_nul_in_it(use: Callable[[str], Any], store: Path) -> None:
    with pytest.raises(errors.ReadError, match="null"):
        use("m\0.gguf")


AS_SOMEBODY_ELSE = """
import os, sys
sys.path[:] = eval(sys.argv[1])
import numaload, numaload.pagecache.prewarm, numaload.weights, numaload.errors
verbs = numaload.open, numaload.prewarm  # imports: Python's own files may be root's alone
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for verb in verbs:
    try:
        verb(sys.argv[2])
    except numaload.errors.ReadError as error:
        print(error)
"""


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(gb.build())
    path.chmod(0)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | stat.S_IXOTH)
    done = subprocess.run(
        [sys.executable, "-c", AS_SOMEBODY_ELSE, repr(sys.path), str(path)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert done.stdout == f"{path}: {os.strerror(errno.EACCES)}\n" * 2


def test_devices_are_not_opened(tmp_path: Path) -> None:
    """Opening alone starts a watchdog or rewinds a tape: a pseudo-terminal shows whether."""
    main, other = os.openpty()
    try:
        name = os.ttyname(other)
        os.close(other)
        with pytest.raises(errors.ReadError, match="a character device"):
            api.open(name)
        # As long as nobody opened the other end again, reading says that nobody has it.
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.read(main, 1)
    finally:
        os.close(main)


def head(*entries: bytes, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, len(entries)) + b"".join(entries)


def array(type_id: int, count: int) -> bytes:
    return gb.entry("a", gb.ARRAY, struct.pack("<IQ", type_id, count))


BOMBS: dict[str, tuple[bytes, bytes, int]] = {
    # What the file begins with, what follows again and again, and its size. Else it is zeros.
    "empty-arrays": (head(array(gb.ARRAY, 20 * MIB)), b"", 256 * MIB),
    "arrays-in-arrays": (head(array(gb.ARRAY, 200_000)), b"", 256 * MIB),
    "empty-strings": (head(array(gb.STRING, MIB)), b"", 16 * MIB),
    "deep": (head(array(gb.ARRAY, 1)), struct.pack("<IQ", gb.ARRAY, 1), 16 * MIB),
    "one-string": (head(gb.entry("s", gb.STRING, struct.pack("<Q", 15 * MIB))), b"", 16 * MIB),
    "entries": (b"GGUF" + struct.pack("<IQQ", 3, 0, 10 * MIB), b"", 256 * MIB),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 10 * MIB, 0), b"", 256 * MIB),
}

# Opens the file and prints what it took: the peak, and what of it was there before.
MEASURED = """
import json, resource, sys
import numaload, numaload.weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    weights = numaload.open(sys.argv[1])
    for value in weights.metadata.values():
        if hasattr(value, "tolist"):
            value.tolist()
    outcome = "opened"
except numaload.errors.FormatError as error:
    outcome = type(error).__name__
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([outcome, (peak - before) * 1024]))
"""


@pytest.mark.parametrize("kind", BOMBS)
def test_memory_follows_the_file(numaload: Numaload, tmp_path: Path, kind: str) -> None:
    start, again, size = BOMBS[kind]
    path = tmp_path / "m.gguf"
    path.write_bytes(start + again * ((MIB if again else 0) // max(1, len(again))))
    os.truncate(path, size)
    outcome, used = numaload.python(MEASURED, path)
    assert outcome in {"opened", "MetadataError", "FormatError"}
    # The header's part of the file: of the sparse ones little is ever read.
    assert used < TIMES * min(size, 16 * MIB)
    assert used < 96 * MIB + 8 * (size if kind == "one-string" else 0)


def many_tensors(count: int, name: str = "{}") -> bytes:
    rows = [gb.tensor(name.format(i), (), 24, i) for i in range(count)]
    return gb.build([gb.u32("general.alignment", 1)], rows, bytes(count), alignment=1)


# Runs two command lines, one after the other, and prints how much more memory the second one took.
COMPARED = """
import json, resource, subprocess, sys
peaks = []
for words in json.loads(sys.argv[1]):
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    peaks.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
print(json.dumps(peaks[1] - peaks[0]))
"""


@pytest.mark.parametrize(("form", "times"), [("--metadata", TIMES), ("--json", 4 * TIMES)])
def test_inspect_takes_a_multiple_too(
    numaload: Numaload, tmp_path: Path, form: str, times: int
) -> None:
    """As JSON a row of 28 bytes is 300 characters."""
    small, large = tmp_path / "small.gguf", tmp_path / "large.gguf"
    small.write_bytes(gb.build())
    large.write_bytes(many_tensors(50_000))
    words = [numaload.command("inspect", path, form) for path in (small, large)]
    assert numaload.python(COMPARED, json.dumps(words)) < times * large.stat().st_size


def test_one_long_name_does_not_pad_all_others(numaload: Numaload, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    rows = [gb.tensor(f"t{i}", (0,)) for i in range(3000)]
    path.write_bytes(gb.build([], [*rows, gb.tensor("x" * 60_000, (0,))]))
    out = numaload("inspect", path).stdout
    assert "...(60000 characters)..." in out
    assert len(out) < 10 * path.stat().st_size


@pytest.mark.parametrize("missing", ["999", "t" * 50])
def test_looking_for_close_names_ends(tmp_path: Path, missing: str) -> None:
    """As much time for four times as many names, where only some of them are compared."""

    def seconds(count: int) -> float:
        path = tmp_path / f"{count}.gguf"
        path.write_bytes(many_tensors(count, "t" * 30 + "{}"))
        with api.open(path) as weights:
            start = time.thread_time()  # of this thread alone: others keep the CPUs busy
            with pytest.raises(errors.TensorNotFoundError) as caught:
                weights[missing]
            str(caught.value)
            return time.thread_time() - start

    few = errors.COMPARED
    assert any(seconds(4 * few) / seconds(few) < 2.5 for _ in range(3))


def test_the_limits_of_this_process_are_enough(tmp_path: Path) -> None:
    """A damaged file does not need more than a quarter of a GiB of addresses, whatever it says."""
    path = tmp_path / "m.gguf"
    program = (
        "import sys, resource\nimport numaload, numaload.weights\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096 + (256 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size, size))\n"
        "for path in sys.argv[1:]:\n"
        "    try: numaload.open(path)\n"
        "    except numaload.errors.FormatError as error: print(type(error).__name__)\n"
    )
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
    path.write_bytes(gb.build([gb.entry("k", gb.STRING, gb.string("v", gb.HUGE))]))
    other = tmp_path / "n.gguf"
    other.write_bytes(gb.build([gb.entry("k", gb.ARRAY, gb.array(gb.U64, count=1 << 61))]))
    done = subprocess.run(
        [sys.executable, "-c", program, path, other], capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("TruncatedError\n" * 2, "")
