"""Become a program that ends with its parent: the script that ``exec`` starts and nobody imports.

Only the new process itself can ask the kernel for that end (PR_SET_PDEATHSIG). Code of ours would
not be safe there between fork and exec, where the parent has threads. So a small Python is started,
asks, and replaces itself. Signals wait until then: exec_start.py REPORT PARENT PROGRAM [ARG...]
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

# What Python ignores or handles itself, and a program shall find as it was before.
HANDLED = (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ)


def main() -> None:
    """Replace this process. If that fails, write the error's number to the descriptor REPORT."""
    report, parent, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    os.set_inheritable(report, False)
    above = os.path.dirname
    sys.path.insert(0, above(above(above(os.path.abspath(__file__)))))
    from numaload.linux.syscalls import end_with_parent

    end_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be asked for
        return
    ignores_ctrl_c = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as below nohup
    for number in HANDLED[ignores_ctrl_c:]:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    try:
        os.execvp(command[0], command)  # noqa: S606 - as it is given
    except OSError as error:
        with suppress(OSError):  # nobody listens
            os.write(report, str(error.errno).encode())
        os._exit(1)


if __name__ == "__main__":
    main()
