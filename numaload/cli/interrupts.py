"""Ctrl-C on the command line: the first stops what is going on, the second ends at once.

Python raises KeyboardInterrupt wherever the main thread happens to be, which undoes what was begun
from nearly everywhere. Nearly: it is lost inside ``__del__``, and between taking a lock and the
block that gives it back it leaves others waiting. So it is raised once, and if the process is still
there after GRACE_S it just ends. That is safe at any moment: memory and nameless files go with the
process, and what has a name is cleared by the next verb, as after a kill.

Only the process whose command line this is does that; users of the API keep their own handlers.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, what shells say
GRACE_S = 10  # a thread may be waiting for a slow disk

_came = _over = False
_ends_with = INTERRUPTED


def take_over() -> None:
    """Handle Ctrl-C from now on, unless it is ignored, as below nohup and in background jobs."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGALRM, _end)
        sys.unraisablehook = _lost
        signal.signal(signal.SIGINT, _first)


def came() -> bool:
    """Whether Ctrl-C came: then every error is a consequence of it."""
    return _came


def finished(status: int) -> int:
    """Nothing is left to stop: from now on Ctrl-C does not change how this ends."""
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
    """No buffers are flushed, nothing is waited for."""
    shown = b"\x1b[?25h" if os.isatty(2) else b""  # a progress bar hides the cursor
    said = b"" if _over else b"numaload: error: interrupted\n"
    try:
        os.write(2, shown + said)
    finally:
        os._exit(_ends_with)


def _lost(what: Any) -> None:
    if what.exc_type is KeyboardInterrupt:
        _end()
    sys.__unraisablehook__(what)
