"""What a process of forked.py runs. It imports this file, so there is little to import here.

The server cannot do that before: multiprocessing does not tell it where tests are.
"""

from __future__ import annotations

import os
import sys

from confined import Confined


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
