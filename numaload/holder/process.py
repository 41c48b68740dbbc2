"""Start, know and end the processes that keep memory alive: holders.

A holder is started for a task, which is imported in the holder and not here. What it keeps, and
what it publishes so that others find it, is the task's affair. It belongs to no terminal, survives
the logout, and lives until SIGTERM or until its task is done.

Process ids are used again. So a holder is also known by when it began, by its name, and by the
namespace in which its id counts; no other process is ever signalled.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from numaload import errors
from numaload.errors import NumaloadError, StoreError, reason
from numaload.machine import userdir

# {name of the process, at most 15 characters: the module whose ``run`` is its task}
TASKS = {
    "numaload-hold": "numaload.replicas.hold",
    "numaload-warm": "numaload.pagecache.background_task",
}
MAIN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
FAILED = "no holder can be started"
ANSWER_S, END_S = 60.0, 10.0
PAUSE_S = 0.01


class HolderProcess(NamedTuple):
    """A process that keeps memory alive."""

    pid: int
    start: int  # in clock ticks since boot, field 22 of /proc/PID/stat
    namespace: str  # of the process id: elsewhere the number means another process

    @classmethod
    def checked(cls, pid: Any, start: Any, namespace: Any) -> HolderProcess:
        """Check the fields of a record that anybody may have written. Raises: ValueError."""
        number = userdir.number
        return cls(number(pid, least=1, below=1 << 31), number(start), str(namespace))

    @classmethod
    def current(cls) -> HolderProcess:
        """Describe this process. Raises: OSError."""
        pid = os.getpid()
        return cls(pid, _stat(pid)[2], namespace())

    @property
    def foreign(self) -> bool:
        """Return whether it is of another container: from here it cannot be seen or ended."""
        return self.namespace != namespace()

    def alive(self) -> bool:
        """Return whether it is there, and a holder. Raises: StoreError where that is unknown."""
        try:
            if os.stat(f"/proc/{self.pid}").st_uid != os.geteuid():
                return False
            name, state, start = _stat(self.pid)
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError as error:
            where = f"/proc/{self.pid}"
            raise StoreError(
                f"{where}: {reason(error)}: cannot tell whether this holder still lives"
            ) from error
        # A dead one stays a zombie until its parent looks.
        return name in TASKS and start == self.start and state not in ("Z", "X")

    def end(self) -> bool:
        """End it and wait until it is gone; return whether it was there.

        Raises: StoreError if it cannot be ended.
        """
        try:  # what this leads to does not change, also if another process gets the id
            fd = os.pidfd_open(self.pid)
        except (AttributeError, OSError):  # Linux before 5.3, a seccomp filter, or no such process
            fd = -1
        try:
            return self._end(fd)
        finally:
            if fd >= 0:
                os.close(fd)

    def _end(self, fd: int) -> bool:
        if not self.alive():
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                if fd >= 0:
                    signal.pidfd_send_signal(fd, number)
                else:
                    os.kill(self.pid, number)
            end = time.monotonic() + END_S
            while time.monotonic() < end:
                if not self.alive():
                    return True
                time.sleep(PAUSE_S)
        raise StoreError(f"holder {self.pid} does not end: what it holds is not freed")


# Those that somebody here waits for: they end with this process, also where it ends at once.
awaited: set[HolderProcess] = set()


def end_awaited() -> None:
    """Have them end, without waiting for it."""
    for process in list(awaited):  # other threads may begin to wait for one
        with suppress(OSError, StoreError):
            if process.alive():
                os.kill(process.pid, signal.SIGTERM)


def _stat(pid: int) -> tuple[str, str, int]:
    """Return a process's name, state and start. Raises: OSError."""
    path = f"/proc/{pid}/stat"
    try:
        with open(path, "rb") as file:
            head, _, tail = file.read().rpartition(b")")
    except OSError as error:
        error.filename = path
        raise
    fields = tail.split()
    return head.partition(b"(")[2].decode(errors="replace"), fields[0].decode(), int(fields[19])


def namespace() -> str:
    """Name the namespace of this process's id. Raises: StoreError where that cannot be read."""
    path = "/proc/self/ns/pid"
    try:
        return os.readlink(path)
    except OSError as error:
        raise StoreError(
            f"{path}: {reason(error)}: cannot tell which process is the holder"
        ) from error


def start(
    name: str, arguments: dict[str, Any], fds: Sequence[int] = ()
) -> tuple[HolderProcess, dict[str, Any]]:
    """Start the holder of this name; return it, and what its task answered when it was ready.

    arguments: of the task, as JSON takes them, paths ``portable``. fds: that it gets under the same
    numbers, all above 2.
    Raises: the error that its task met before it was ready; StoreError.
    """
    request = {
        "name": name, "task": TASKS[name], "arguments": arguments,
        "path": [portable(os.path.abspath(folder)) for folder in sys.path],
        "store": portable(userdir.path()),
    }  # fmt: skip
    answer = _ask(json.dumps(request).encode() + b"\n", fds)
    if answer["error"] is not None:
        raise unpacked(answer["error"])
    return HolderProcess(*answer["process"]), answer["told"]


def _ask(line: bytes, fds: Sequence[int]) -> Any:
    """Return what a new process answers; without an answer it is ended. Raises: StoreError."""
    if not sys.executable:
        raise StoreError(f"{FAILED}: sys.executable does not name this Python")
    try:
        job = subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", MAIN], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds, cwd="/",
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise StoreError(f"{FAILED}: {sys.executable}: {reason(error)}") from error
    try:
        # It closes all three with its answer, and the process that was started here has ended.
        out, err = job.communicate(line, timeout=ANSWER_S)
        return json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        why = f"its process ended without an answer (status {job.returncode})"
        raise StoreError(f"{FAILED}: {why}: {last}") from None
    except subprocess.TimeoutExpired:
        _abandon(job)
        raise StoreError(f"{FAILED}: no answer in {ANSWER_S:.0f} s") from None
    except BaseException:
        _abandon(job)
        raise


def _abandon(job: subprocess.Popen[bytes]) -> None:
    """End a holder whose answer was not heard, its child included: both are in one group.

    SIGTERM has it take away what it may have published just now.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(job.pid, number)
        with suppress(subprocess.TimeoutExpired):
            job.communicate(timeout=END_S)
            break


def portable(path: str) -> str:
    """Return a path, also one that is no text, as a holder decodes it, which knows UTF-8 only."""
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def packed(error: BaseException) -> dict[str, Any]:
    """Return an error as JSON takes it; one that is not numaload's becomes a StoreError."""
    if not isinstance(error, NumaloadError):
        path = getattr(error, "filename2", None) or getattr(error, "filename", None)
        what = type(error).__name__ if path is None else path
        said = reason(error) if isinstance(error, OSError) else str(error)
        error = StoreError(f"{what}: {said}")
    _, (kind, args, fields) = error.__reduce__()
    plain = json.loads(json.dumps({"args": list(args), "fields": fields}, default=str))
    return {"kind": kind.__name__, "text": str(error), **plain}


def unpacked(data: dict[str, Any]) -> NumaloadError:
    """Return the error that was packed; a StoreError of its text for one that is not known here."""
    kind = getattr(errors, str(data.get("kind")), None)
    with suppress(*userdir.UNREADABLE):  # it lacks what its text is made of
        if isinstance(kind, type) and issubclass(kind, NumaloadError):
            given = tuple(data["args"]), dict(data["fields"])
            error: NumaloadError = errors._rebuilt(kind, *given)  # noqa: SLF001
            if str(error):
                return error
    return StoreError(str(data.get("text", "failed")))
