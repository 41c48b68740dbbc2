"""Run a task in a process of its own: the script that ``process.start`` starts.

It gets one line of JSON on its standard input, and answers with one line when its task is ready,
or has ended or failed before:

    {"name": "numaload-hold", "task": "numaload.replicas.hold", "arguments": {...},
     "path": sys.path, "store": path}
    {"error": null, "process": [pid, start, namespace], "told": {...}}

Only then does it import numaload, so that the process is small, and only what its task needs.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numaload.holder.process import HolderProcess

INTERVAL_S = 1.0


class Published(Protocol):
    """Name what a task has published, as the host looks after it."""

    def tend(self) -> None:
        """Publish again what somebody removed. What it raises is ignored: it is called again."""


class Host:
    """Stand for the holder process towards its task."""

    def __init__(self, process: HolderProcess) -> None:
        self.process = process
        self.answered = False
        self.ended = False  # by SIGTERM, or since nobody waits for it

    def answer(self, **told: Any) -> None:
        """Tell who started this that the task is ready, and let go of its pipes.

        Raises: BrokenPipeError where nobody waits any more.
        """
        null = os.open(os.devnull, os.O_RDWR)
        self.answered = True
        try:
            _write({"error": None, "process": self.process, "told": told})
        finally:
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            os.close(null)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Have SIGTERM end this block by KeyboardInterrupt; elsewhere it waits for ``keep``."""
        signal.signal(signal.SIGTERM, self._interrupt)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def _interrupt(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once
        self.ended = True
        raise KeyboardInterrupt

    def keep(self, published: Published) -> None:
        """Wait for SIGTERM, and look once a second whether what was published is still there."""
        from numaload.trace import flush

        flush()
        while not self.ended and signal.sigtimedwait({signal.SIGTERM}, INTERVAL_S) is None:
            # A full tmpfs, say: a second later again. No error makes it give memory up.
            with suppress(Exception):
                published.tend()


def _write(answer: dict[str, Any]) -> None:
    os.write(1, json.dumps(answer, default=str).encode() + b"\n")


def _take_name(name: str) -> None:
    """Take the name by which holders are known. Raises: OSError."""
    path = "/proc/self/comm"
    try:
        with open(path, "w", encoding="ascii") as file:
            file.write(name)
    except OSError as error:
        error.filename = path
        raise


def _run(line: bytes) -> int:
    """Run the task; report an error before it was ready to whoever started the holder."""
    from numaload.holder.process import HolderProcess, packed

    host = None
    try:
        request = json.loads(line)
        sys.path += request["path"]
        os.environ["NUMALOAD_STORE"] = request["store"]
        _take_name(request["name"])
        host = Host(HolderProcess.current())
        import_module(request["task"]).run(host, **request["arguments"])
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        if host is None or not host.answered:
            with suppress(BrokenPipeError):
                _write({"error": packed(error)})
        return 1
    return 0


def main() -> int:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Waited for where nothing can be left half done.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    os.umask(0o077)
    with open(0, "rb", closefd=False) as file:
        line = file.readline()
    if not line.endswith(b"\n"):  # who asked has gone
        return 1
    # A child of init's: nobody has to wait for it, and no shell has it among its jobs.
    if os.fork():
        return 0
    # After Python's own the package that this script lies in: an editable installation is found by
    # a hook that this process does not have.
    sys.path.append(os.path.dirname(os.path.dirname(os.path.dirname(__file__))))
    return _run(line)


if __name__ == "__main__":
    sys.exit(main())
