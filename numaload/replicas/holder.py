"""Replicas held by a process: memfds, which neither a tmpfs' size nor a logout takes away.

Shared memory without a name lives as long as somebody has it open. The holder does, and nothing
else; the store's entry points at it by links of the files' own names. It survives the shell and the
logout, not the restart of the machine, and ends when the replicas are released.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from numaload.errors import StoreError, reason
from numaload.replicas import holder_main
from numaload.storage.userdir import MARKER

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since Linux 5.1
ANSWER_S, END_S = 60.0, 10.0
PAUSE_S = 0.01


def start_holder(
    store_path: str,
    name: str,
    manifest: dict[str, Any],
    links: Sequence[tuple[str, str, int]],
) -> int:
    """Have a new process hold these memfds and publish the entry ``name``; its process id.

    links: (folder in the entry, file name, descriptor). The manifest that is written has one key
    more: "holder", with "pid", "start" (see ``alive``) and "files", the (st_dev, st_ino) of each
    link in their order. The caller holds the store's lock, and may close the descriptors after.
    Raises: StoreError: then nothing is published and nothing held.
    """
    with ExitStack() as copies:
        fds = [_above_standard(fd, copies) for _, _, fd in links]
        row = {
            "store": portable(store_path),
            "marker": MARKER,
            "name": name,
            "locked": True,
            "manifest": manifest | {"holder": {"files": [identity(fd) for fd in fds]}},
            "links": [
                (folder, portable(file), fd)
                for (folder, file, _), fd in zip(links, fds, strict=True)
            ],
        }
        said = ask(holder_main.__file__, json.dumps(row).encode() + b"\n", fds)
    if said["error"] is not None:
        raise StoreError(f"{store_path}: replicas cannot be held: {said['error']}")
    return int(said["pid"])


def ask(script: str, line: bytes, fds: Sequence[int] = (), what: str = "replicas") -> Any:
    """What the new process of this script answers; without an answer it is ended.

    Raises: StoreError, which says that ``what`` cannot be held.
    """
    if not sys.executable:
        raise StoreError(f"{what} cannot be held: sys.executable does not name this Python")
    script = os.path.abspath(script)
    job = subprocess.Popen(
        [sys.executable, "-I", "-S", "-X", "utf8", script], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds, cwd="/",
        start_new_session=True,
    )  # fmt: skip
    try:
        # It closes all three with its answer, and the process that was started here has ended.
        out, err = job.communicate(line, timeout=ANSWER_S)
        return json.loads(out)
    except ValueError:
        last = err.decode(errors="replace").strip().rpartition("\n")[2]
        why = f"its process ended without an answer (status {job.returncode})"
        raise StoreError(f"{what} cannot be held: {why}: {last}") from None
    except subprocess.TimeoutExpired:
        _abandon(job)
        raise StoreError(f"{what} cannot be held: no answer in {ANSWER_S:.0f} s") from None
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


def portable(name: str) -> str:
    """A path as the holder decodes it, which knows UTF-8 only: bytes that are no text, too."""
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _above_standard(fd: int, copies: ExitStack) -> int:
    """In a process without standard input that number may be a memfd's; the holder needs it."""
    if fd > 2:
        return fd
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    copies.callback(os.close, copy)
    return copy


def alive(pid: int, start: int, called: str = holder_main.NAME) -> bool:
    """Whether this holder is still there, and not another process that got its id.

    start: when it began, in clock ticks since boot (field 22 of /proc/PID/stat). called: the name
    that holders of this kind give themselves.
    """
    try:
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():
            return False
        with open(f"/proc/{pid}/stat", "rb") as file:
            head, _, tail = file.read().rpartition(b")")
    except (FileNotFoundError, ProcessLookupError):
        return False
    except OSError as error:
        raise StoreError(f"/proc/{pid}: {reason(error)}: whether it holds is unknown") from error
    fields, name = tail.split(), head.partition(b"(")[2].decode(errors="replace")
    if fields[0] in (b"Z", b"X"):  # dead; it waits for a parent that does not look
        return False
    return (name, int(fields[19])) == (called, start)


def namespace() -> str:
    """Of the ids of processes. Raises: StoreError where that cannot be read."""
    path = "/proc/self/ns/pid"
    try:
        return os.readlink(path)
    except OSError as error:
        raise StoreError(f"{path}: {reason(error)}: which process holds is unknown") from error


def end_holder(pid: int, start: int, called: str = holder_main.NAME) -> bool:
    """End this holder, which takes its entry away, and wait until it is gone.

    False where there is none (any more); no other process is ever touched.
    Raises: StoreError if it cannot be ended.
    """
    with ExitStack() as opened:
        send = _sender(pid, opened)
        if not alive(pid, start, called):
            return False
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                send(number)
            end = time.monotonic() + END_S
            while time.monotonic() < end:
                if not alive(pid, start, called):
                    return True
                time.sleep(PAUSE_S)
    raise StoreError(f"holder {pid} does not end: what it holds is not freed")


def _sender(pid: int, opened: ExitStack) -> Any:
    """Sends a signal to the process that has this id now, also if another one gets it later."""
    try:
        fd = os.pidfd_open(pid)
    except (AttributeError, OSError):  # Linux before 5.3, a seccomp filter, or no such process
        return lambda number: os.kill(pid, number)
    opened.callback(os.close, fd)
    return lambda number: signal.pidfd_send_signal(fd, number)


def seal(fd: int) -> None:
    """Nobody may write, shrink or grow this memfd any more; mappings that are there stay.

    Kernels before 5.1 cannot forbid writing: there its mode does, to all but its owner.
    Raises: OSError for what is no memfd that may be sealed.
    """
    os.fchmod(fd, stat.S_IRUSR)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


def identity(fd: int) -> tuple[int, int]:
    """(st_dev, st_ino), by which a memfd is known again."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
