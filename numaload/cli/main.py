"""Arguments to verbs. Exit status: 0 done, 1 failed or not placed as asked, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from numaload._version import __version__
from numaload.cli import interrupts

if TYPE_CHECKING:
    import argparse


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; its exit status. Without ``argv`` this process is the command: see interrupts."""
    if argv is None:
        interrupts.open_standard()
        interrupts.raise_open_files()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None:
            interrupts.take_over()
        return interrupts.finished(_run(arguments))
    except SystemExit as error:  # of argparse
        interrupts.finished(error.code if isinstance(error.code, int) else 0)
        raise
    except BaseException as error:
        if not (interrupts.came() or isinstance(error, KeyboardInterrupt)):
            raise
        from numaload.cli.output import complain

        complain("interrupted")
        return interrupts.finished(interrupts.INTERRUPTED)


def _run(arguments: list[str]) -> int:
    import io

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be text
    try:
        status = _status(arguments)
        sys.stdout.flush()  # a full disk or a reader that left shall be an error here
        return status  # noqa: TRY300 - both belong to the attempt
    except Exception as error:  # noqa: BLE001 - what has no name is raised again
        return _failed(error)


def _failed(error: Exception) -> int:
    """Say what went wrong; the exit status. Imports only now: --version has no time for it."""
    from numaload.cli.output import complain
    from numaload.errors import CancelledError, NumaloadError, UsageError

    if isinstance(error, CancelledError):
        complain(f"{error} after {error.done} of {error.total} bytes")
        return interrupts.INTERRUPTED
    if not isinstance(error, (NumaloadError, OSError)):
        raise error
    if not isinstance(error, BrokenPipeError):  # or else whoever read our output has seen enough
        complain(error)
    if not isinstance(error, NumaloadError):
        _drop_output()
    return 2 if isinstance(error, UsageError) else 1


def _status(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):  # before anything that takes time to load
        print(f"numaload {__version__}")
        return 0
    try:
        options = _parse(arguments)
    except SystemExit:  # of argparse, which may have printed help
        sys.stdout.flush()
        raise
    from numaload.cli import waiting
    from numaload.cli.output import show_warnings

    waiting.obey(options)
    interrupts.guard()
    show_warnings()
    return int(options.run(options))


def _drop_output() -> None:
    from numaload.cli.output import drop

    try:
        sys.stdout.flush()
    except OSError:
        drop(sys.stdout)


def _parse(arguments: list[str]) -> argparse.Namespace:
    import argparse

    from numaload.cli import bench, files, machine, pagecache, replicas, stored, waiting
    from numaload.errors import printable

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            super().error(printable(message))  # it repeats what was given

    parser = Parser(
        prog="numaload",
        description="Get every weight from storage into the right memory, and prove where it went.",
        epilog="Nodes are written as in numactl: all, local, 0,2-3, !1.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"numaload {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for group in (files, pagecache, machine, replicas, stored, bench):
        group.add_verbs(verbs)
    waiting.add_option(verbs)
    return parser.parse_args(arguments)
