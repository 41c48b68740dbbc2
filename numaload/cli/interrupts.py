"""Ctrl-C on the command line: the first stops what is going on, the second ends at once.

Python raises KeyboardInterrupt wherever the main thread happens to be. Nearly everywhere that
undoes what was begun. But it is lost inside ``__del__``, and between taking a lock and the block
that gives it back it leaves others waiting. So it is raised once, and a process that is still there
after GRACE_S just ends. That is safe at any moment: memory and nameless files go with the process,
and the next verb clears what has a name, as after a kill.

While the main thread waits inside the kernel for a network file system, no handler runs at all.
Then another thread sees that Ctrl-C is not delivered, and ends the process. That is a SIGKILL, to
which most of these waits give way.

Only the process whose command line this is does so; users of the API keep their own handlers.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
from contextlib import suppress
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, what shells say
GRACE_S = 10  # a thread may be waiting for a slow disk
LOOK_S, LOOKS = 0.25, 4  # so often, and as many times, Ctrl-C is found undelivered before that
PENDING = ("ShdPnd:", "SigPnd:")  # of /proc/self/status: proc_pid_status(5)

_came = _over = _taken = False
_ends_with = INTERRUPTED


def take_over() -> None:
    """Handle Ctrl-C from now on, unless it is ignored, as below nohup and in background jobs."""
    global _taken  # noqa: PLW0603 - there is one process
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGALRM, _end)
        sys.unraisablehook = _lost
        signal.signal(signal.SIGINT, _first)
        # Last of all, after threads were waited for: Python itself would give it back its default.
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)
        _taken = True


def open_standard() -> None:
    """Have /dev/null where stdin, stdout or stderr is closed.

    A model's file, or a replica, would get its number, and then what is printed.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            with suppress(OSError):  # then what is printed goes nowhere all the same
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number free
                stream = open(number, "w" if number else "r", closefd=False)  # noqa: SIM115
                setattr(sys, name, stream)


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one, as anybody may: models have many files.

    For this process, the command line, which waits with poll(2): select(2) fails beyond 1024.
    """
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def guard() -> None:
    """Watch for Ctrl-C that is not delivered, where network file systems are mounted."""
    from numaload.linux.mounts import has_networks

    if _taken and has_networks():
        import threading

        thread = threading.Thread(target=_watch, name="numaload-guard", daemon=True)
        with suppress(RuntimeError):  # no more threads allowed: the work may need none
            thread.start()


def _watch() -> None:
    import time

    found = 0
    with suppress(OSError):  # it is hidden: nothing is known
        while found < LOOKS:
            time.sleep(LOOK_S)
            found = found + 1 if _undelivered() else 0
        _end()


def _undelivered() -> bool:
    """Return whether a SIGINT waits until the main thread comes back from the kernel."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        masks = [line.split()[1] for line in file if line.startswith(PENDING)]
    return any(int(mask, 16) >> (signal.SIGINT - 1) & 1 for mask in masks)


def came() -> bool:
    """Return whether Ctrl-C came: then every error is a consequence of it."""
    return _came


def finished(status: int) -> int:
    """Return the exit status; from now on Ctrl-C changes nothing: there is nothing to stop."""
    global _over, _ends_with  # noqa: PLW0603 - there is one process
    _ends_with = INTERRUPTED if _came else status
    _over = True
    return _ends_with


def _first(*_: object) -> None:
    global _came  # noqa: PLW0603
    if _came or _over:
        _end()
    _came = True
    signal.alarm(GRACE_S)
    raise KeyboardInterrupt


def _end(*_: object) -> None:
    """End at once: flush no buffers, wait for nothing. Holders that are waited for end, too."""
    process = sys.modules.get("numaload.holder.process")
    shown = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides the cursor
    said = b"" if _over else b"numaload: error: interrupted\n"
    try:
        os.write(2, shown + said)
        if process is not None:
            process.end_awaited()
    finally:
        os._exit(_ends_with)


def _lost(what: Any) -> None:
    if what.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(what)
