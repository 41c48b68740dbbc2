"""The command line without starting Python each time, which takes seconds in an emulated machine.

Every verb still runs in a process of its own, forked from a server that has numaload loaded.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from commands import LIMIT_S, Numaload
from forked_verb import run_verb

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "__main__",
        *(f"numaload.cli.{file}" for file in ("main", "interrupts", "replicas", "stored")),
        *(f"numaload.pagecache.{file}" for file in ("background", "residency")),
        "numaload.cli.doctor",
        "numaload.doctor.diagnosis",
        "numaload.replicas.mirror",
    ]
)


class ForkedNumaload(Numaload):
    def __call__(
        self, *words: object, status: int | Sequence[int] = 0
    ) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            arguments = ([str(word) for word in words], str(self.store), str(out), str(err))
            job = SERVER.Process(target=run_verb, args=(self.confined, *arguments))
            job.start()
            job.join(LIMIT_S)
            ended = -1 if job.exitcode is None else job.exitcode  # it hangs
            expected = [status] if isinstance(status, int) else status
            assert ended in expected, f"{words}: {ended}\n{out.read_text()}{err.read_text()}"
            return subprocess.CompletedProcess(
                arguments[0], ended, out.read_text(), err.read_text()
            )
