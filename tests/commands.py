"""Running numaload as users do, and files that tests need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

import confined
from confined import Confined
from numaload.files.residency import residency
from numaload.files.source import SourceFile

NOTHING = Confined()
# Share of page cache that is there some seconds later: some machines page out what is idle.
KEPT = 0.7
LIMIT_S = 300  # a hang shall fail; no test measures time by it


@dataclass(frozen=True)
class Numaload:
    """The command line on one store."""

    store: Path
    confined: Confined = NOTHING

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"NUMALOAD_STORE": str(self.store)}

    def command(self, *words: object) -> list[str]:
        numaload = [sys.executable, "-m", "numaload", *map(str, words)]
        if self.confined == NOTHING:
            return numaload
        return [sys.executable, confined.__file__, *self.confined.words(), "--", *numaload]

    def within(self, **limits: Any) -> Numaload:
        """The same in a process that is confined so: deny, cgroup, user, membind."""
        return replace(self, confined=Confined(**limits))

    def __call__(
        self, *words: object, status: int | Sequence[int] = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a verb; its exit status must be ``status``, or one of several."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, env=self.environment,
            timeout=LIMIT_S, check=False,
        )  # fmt: skip
        expected = [status] if isinstance(status, int) else status
        assert done.returncode in expected, (
            f"{words}: {done.returncode}\n{done.stdout}{done.stderr}"
        )
        return done

    def json(self, *words: object, status: int | Sequence[int] = 0) -> Any:
        return json.loads(self(*words, "--json", status=status).stdout)

    def doctor(self, *words: object) -> Any:
        """What the doctor found; its exit status must tell whether that is anything."""
        done = self("doctor", *words, "--json", status=(0, 1))
        found = json.loads(done.stdout)
        assert done.returncode == bool(found["findings"])
        return found

    def start(self, *words: object, **options: Any) -> subprocess.Popen[str]:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen(self.command(*words), text=True, env=self.environment, **pipes)

    def python(self, program: str, *arguments: object) -> Any:
        """Run a program in another process; the JSON that it prints."""
        done = subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True,
            env=self.environment, timeout=LIMIT_S, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)


COMMAND_LINES = """
import contextlib, io, json, sys
from numaload.cli.main import main

def run(words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = main(words)
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()

print(json.dumps([run(words) for words in json.loads(sys.argv[1])]))
"""


def command_lines(numaload: Numaload, lines: Sequence[Sequence[str]]) -> list[tuple[int, str, str]]:
    """Run several command lines in one process: starting is what most of them cost."""
    found = numaload.python(COMMAND_LINES, json.dumps(lines))
    return [(status, out, err) for status, out, err in found]


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = LIMIT_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"waited in vain: {what}"
        time.sleep(0.01)


def running(pid: int) -> bool:
    """Whether there is such a process; one that waits for its parent to look is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def evict(paths: list[str]) -> None:
    """Give the page cache of these files back, so that they are cold. Needs no root."""
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            for _ in range(5):  # what the kernel is reading ahead just now stays the first time
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                time.sleep(0.002)
        finally:
            os.close(fd)


def resident(files: str | Path | Sequence[str], start: int = 0, stop: int | None = None) -> int:
    """How many bytes of these files are in RAM; of each from ``start`` to ``stop``."""
    total = 0
    for path in [files] if isinstance(files, (str, Path)) else files:
        with SourceFile(str(path)) as file:
            total += residency(file, start, stop).resident
    return total


def sparse_model(path: Path, nbytes: int) -> str:
    """A valid GGUF of about this size that takes no room on disk: one tensor of zeros."""
    writer = gguf.GGUFWriter(str(path), "llama")
    rows = nbytes // 4096
    writer.add_tensor_info("big.weight", [rows, 1024], np.dtype(np.float32), rows * 4096)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        start = -(-file.tell() // 32) * 32
        file.truncate(start + rows * 4096)
    return str(path)


def used_bytes(path: Path) -> int:
    """What files below ``path`` take, also those that have no name there any more, or had none.

    Counted file by file: others use the same tmpfs meanwhile.
    """
    if path.is_mount():
        room = os.statvfs(path)
        return (room.f_blocks - room.f_bfree) * room.f_frsize
    paths = [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]
    for process in filter(str.isdecimal, os.listdir("/proc")):
        for open_or_mapped in (f"/proc/{process}/fd", f"/proc/{process}/map_files"):
            with suppress(OSError):  # it is gone, or another user's
                paths += [f"{open_or_mapped}/{name}" for name in os.listdir(open_or_mapped)]
    found: dict[tuple[int, int], int] = {}
    for one in paths:
        with suppress(OSError):
            if one.startswith("/proc/") and not os.readlink(one).startswith(f"{path}/"):
                continue
            status = os.stat(one, follow_symlinks=one.startswith("/proc/"))
            found[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(found.values())
