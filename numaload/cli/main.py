"""Run verbs. Exit status: 0 done, 1 failed or not placed as asked, 2 usage, 130 Ctrl-C."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from numaload import trace
from numaload._version import __version__
from numaload.cli import interrupts

if TYPE_CHECKING:
    import argparse

# {verb: the module of numaload.cli that adds it}: only that one is imported.
VERBS = {
    "inspect": "files",
    "nodes": "machine",
    "plan": "replicas",
    "prewarm": "prewarming",
    "evict": "pagecache",
    "status": "stored",
    "mirror": "replicas",
    "verify": "stored",
    "release": "stored",
    "store": "pools",
    "exec": "exec",
    "bench": "bench",
    "doctor": "doctor",
    "report": "report",
    "tune": "tune",
}
RUNS = "exec"  # the verb with a program and its arguments behind --, which are not ours to read
IO_TIMEOUT = "NUMALOAD_IO_TIMEOUT"  # seconds, for this process and those that it starts
TO_TRY = """
Three lines to try:
  numaload inspect MODEL.gguf    what is in the model
  numaload prewarm MODEL.gguf    read it into RAM, so that the next program starts at once
  numaload nodes                 NUMA nodes of this machine, and what this process may use"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; return its exit status.

    Without ``argv`` this process is the command, and its signals and streams are set up for that.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv is None:
            interrupts.open_standard()
            interrupts.take_over()
            interrupts.raise_open_files()
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
    """Say what went wrong; return the exit status. Imports only now: --version has no time."""
    from numaload.cli.output import complain, drop, size
    from numaload.errors import CancelledError, NumaloadError, UsageError

    if isinstance(error, CancelledError):
        complain(f"{error} after {size(error.done)} of {size(error.total)}")
        return interrupts.INTERRUPTED
    if not isinstance(error, (NumaloadError, OSError)):
        raise error
    if not isinstance(error, BrokenPipeError):  # or else whoever read our output has seen enough
        complain(error)
    if not isinstance(error, NumaloadError):
        try:
            sys.stdout.flush()
        except OSError:
            drop(sys.stdout)
    return 2 if isinstance(error, UsageError) else 1


def _status(arguments: list[str]) -> int:
    if arguments in (["--version"], ["-V"]):  # before anything that takes time to load
        print(f"numaload {__version__}")
        return 0
    if not trace.span("command").is_on:
        return _run_verb(arguments)
    from numaload.cli.output import show_warnings
    from numaload.trace.imports import spanned_imports

    show_warnings()  # the first span is written at once, which may fail
    with spanned_imports():
        return _run_verb(arguments)


def _run_verb(arguments: list[str]) -> int:
    try:
        with trace.span("import"):  # above all
            options = _parse(arguments)
    except SystemExit:  # of argparse, which may have printed help
        sys.stdout.flush()
        raise
    if options is None:
        return 0
    from numaload.cli.output import show_warnings

    if getattr(options, "io_timeout", None) is not None:
        os.environ[IO_TIMEOUT] = f"{options.io_timeout:g}"
    interrupts.guard()
    show_warnings()
    with trace.span("command"):
        return int(options.run(options))


def _parse(arguments: list[str]) -> argparse.Namespace | None:
    """Return the options of a verb; without any arguments print the help and return None."""
    first = arguments[0] if arguments else ""
    named = {first} if first in VERBS else VERBS.keys()  # help tells of all verbs
    parser = _parser(named)
    if not arguments:
        parser.print_help()
        print(TO_TRY)
        return None
    if first not in VERBS and not first.startswith("-"):
        parser.error(_no_verb(first))
    if first != RUNS:
        return parser.parse_args(arguments)
    if "--" not in arguments and not {"-h", "--help"} & set(arguments):
        parser.error("no program: write it behind --: numaload exec MODEL -- PROGRAM -m {model}")
    at = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:at])
    options.program = arguments[at + 1 :]
    return options


def _no_verb(word: str) -> str:
    from difflib import get_close_matches

    close = get_close_matches(word[:100], VERBS, n=1)  # comparing takes the square of the length
    meant = f"did you mean {close[0]}?" if close else f"expected one of {', '.join(VERBS)}"
    return f"no verb {word!r}: {meant}"


def _parser(named: Iterable[str]) -> argparse.ArgumentParser:
    import argparse
    from importlib import import_module

    from numaload.errors import printable

    class Formatter(argparse.HelpFormatter):
        """Ask the terminal for its width only for help: argparse formats while it adds options."""

        def __init__(self, prog: str, **options: Any) -> None:
            super().__init__(prog, **{"width": _width()} | options)

    class Parser(argparse.ArgumentParser):
        def __init__(self, **options: Any) -> None:
            super().__init__(**{"formatter_class": Formatter} | options)

        def error(self, message: str) -> NoReturn:
            super().error(printable(message))  # it repeats what was given

    parser = Parser(
        prog="numaload",
        description="Get every weight from storage into the right memory, and prove where it went.",
        epilog="Nodes are written as in numactl: all, local, 0,2-3, !1.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"numaload {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, prog="numaload")
    for module in dict.fromkeys(VERBS[verb] for verb in named):
        import_module(f"numaload.cli.{module}").add_verbs(verbs)
    for verb, its in verbs.choices.items():
        _add_common(verb, its)
    return parser


def _add_common(verb: str, parser: argparse.ArgumentParser) -> None:
    """Add the options of all verbs but bench, which has parsers below its own."""
    from numaload.cli.output import add_io_timeout

    if verb == "bench":
        return
    if verb != RUNS:  # its stdout is the program's
        parser.add_argument("--json", action="store_true", help="print the API's report")
    if verb != "nodes":  # it reads no file, and its disks are looked up in /sys
        add_io_timeout(parser)


def _width() -> int:
    """Return the columns of help: as argparse has it, without importing shutil."""
    try:
        return max(int(os.environ.get("COLUMNS", "")), 40) - 2
    except ValueError:
        pass
    try:
        return max(os.get_terminal_size().columns, 40) - 2
    except OSError:
        return 78
