"""The command line without starting Python each time, which takes seconds in an emulated machine.

Every verb still runs in a process of its own, forked from a server that has numaload loaded.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from commands import LIMIT_S, Numaload
from confined import Confined

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["__main__", "forked", "numaload.replicas.mirror", "numaload.cli.stored"]
)


class ForkedNumaload(Numaload):
    def __call__(self, *words: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            arguments = ([str(word) for word in words], str(self.store), str(out), str(err))
            job = SERVER.Process(target=run_verb, args=(self.confined, *arguments))
            job.start()
            job.join(LIMIT_S)
            assert job.exitcode == status, (
                f"{words}: {job.exitcode}\n{out.read_text()}{err.read_text()}"
            )
            return subprocess.CompletedProcess(
                arguments[0], status, out.read_text(), err.read_text()
            )


def run_verb(confined: Confined, words: list[str], store: str, out: str, err: str) -> None:
    os.environ["NUMALOAD_STORE"] = store
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(fd, stream.fileno())
    confined.enter()
    from numaload.cli.main import main

    status = main(words)
    sys.stdout.flush()
    sys.exit(status)
