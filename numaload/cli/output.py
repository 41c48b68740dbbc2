"""What people see: tables and JSON on stdout, progress and messages on stderr."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

from numaload.errors import printable

SIZE = r"(\d{1,12}(?:\.\d{1,6})?)([kKmMgGtT]?)(?:i?[bB])?"
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
WIDEST = 200  # characters to which a column is padded; a longer cell goes over
LONGEST_S = 1e9  # 30 years: the system cannot count waits that are much longer
WORTH_A_BAR = 64 << 20  # bytes; less is over before a bar is drawn
TIMES = ((86400, "days"), (3600, "h"), (60, "min"))  # units of durations over their double


def say(text: object) -> None:
    """Print a line. All that verbs print goes through here or print_table, or is JSON."""
    print(printable(text))


def complain(text: object) -> None:
    _tell(f"error: {printable(text)}")


def note(text: object) -> None:
    _tell(printable(text))


def _tell(line: str) -> None:
    """Print a message on stderr. A full disk there, or a reader that left, stops no work."""
    try:
        print(f"numaload: {line}", file=sys.stderr, flush=True)
    except OSError:
        drop(sys.stderr)


def drop(stream: TextIO) -> None:
    """Send to /dev/null what cannot be written: closing the stream must not fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), stream.fileno())


def show_step(name: object) -> None:
    """Show on a terminal what is being done now, in place of the last step; "" clears it."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":  # which clears no line
        print(f"\r\x1b[K{printable(name)}", end="", file=sys.stderr, flush=True)


def show_warnings() -> None:
    """Show warnings as one line each, without Python's file and line."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        _tell(f"warning: {printable(message)}")

    warnings.showwarning = show
    warnings.simplefilter("always")


def size(nbytes: float) -> str:
    """Write bytes for people: 1536 is "1.5 KiB"."""
    for unit in UNITS:
        if abs(nbytes) < 1024 or unit == UNITS[-1]:
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"


def count(number: int, noun: str) -> str:
    """Write a number with its noun: "1 file", "2 files"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def files_of(paths: Sequence[str]) -> str:
    """Name a model by its first file, and say how many files it has if there are several."""
    return f"{paths[0]} ({len(paths)} files)" if len(paths) > 1 else paths[0]


def on_nodes(nodes: Collection[int]) -> str:
    """Write nodes with their noun: "node 0", "nodes 0-1"."""
    from numaload.linux.lists import format_list

    return f"{'node' if len(nodes) == 1 else 'nodes'} {format_list(nodes)}"


def duration(seconds: float) -> str:
    """Write seconds for people: 90 is "90 s", 7200 is "2 h"."""
    for unit, name in TIMES:
        if seconds >= 2 * unit:
            return f"{seconds // unit:.0f} {name}"
    return f"{max(seconds, 0):.0f} s"


def rate(nbytes: int, seconds: float) -> str:
    return f"{nbytes / max(seconds, 1e-9) / 1e9:.2f} GB/s"


def byte_count(text: str) -> int:
    """Read an option's value: "8M" is 8 MiB. Raises: ArgumentTypeError."""
    import re

    match = re.fullmatch(SIZE, text)
    if match is None:
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{text!r}: expected bytes, as 8M or 1.5G")
    return int(float(match[1]) * 1024 ** "BKMGT".index(match[2].upper() or "B"))


def seconds(text: str, *, zero: bool = False) -> float:
    """Read an option's value. zero: it may be 0. Raises: ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = -1
    if not 0 <= found < float("inf") or (found == 0 and not zero):
        from argparse import ArgumentTypeError

        least = ", 0 or more" if zero else " above 0"
        raise ArgumentTypeError(f"expected a number of seconds{least}, found {text!r}")
    return min(found, LONGEST_S)


def interval(text: str) -> float:
    """Read the value of --watch, which need not have one. Raises: ArgumentTypeError."""
    from argparse import ArgumentTypeError

    try:
        return seconds(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{error}; a FILE goes before --watch") from None


def add_io_timeout(parser: Any, default: Any = None) -> None:
    parser.add_argument(
        "--io-timeout",
        metavar="SECONDS",
        type=seconds,
        default=default,
        help="fail when a network file system does not answer for so long (default: wait)",
    )


def print_json(data: Any, *, a_line: bool = False) -> None:
    import json

    indent = None if a_line else 2
    try:
        text = json.dumps(data, indent=indent, default=_plain, allow_nan=False)
    except ValueError:  # metadata may hold numbers that JSON has no words for
        text = json.dumps(_finite(data), indent=indent, default=_plain, allow_nan=False)
    print(text)


def _finite(value: Any) -> Any:
    """Return the same value with NaN and infinities as strings."""
    import math

    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return value if isinstance(value, (str, int, bool, type(None))) else _finite(_plain(value))


def _plain(value: Any) -> Any:
    for method in ("to_dict", "tolist"):
        if hasattr(value, method):
            return getattr(value, method)()
    return str(value)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[Any]], *, figures: bool = False
) -> None:
    """Print columns aligned to the left, and numbers to the right, for terminals and for grep.

    figures: all columns but the first are numbers, though written as text.
    """
    names, *cells = [[printable(cell) for cell in row] for row in (header, *rows)]
    # One long name shall not pad a hundred thousand others.
    widths = [min(max(len(h), *(len(r[i]) for r in cells), 0), WIDEST) for i, h in enumerate(names)]
    right = [
        (figures and i > 0) or (all(isinstance(row[i], int) for row in rows) and bool(rows))
        for i in range(len(header))
    ]
    for line in [names, *cells]:
        parts = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(line, widths, right, strict=True)
        ]
        print("  ".join(parts).rstrip())


@contextmanager
def progress_bar(label: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Give a callback for the API that draws a bar, on a terminal and for large work only."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with ExitStack() as stack:
        yield _Bar(label, stack)


class _Bar:
    """A bar that begins with the first call: the API announces its plan before it."""

    def __init__(self, label: str, stack: ExitStack) -> None:
        self.label, self.stack = label, stack
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        if self.bar is None and total >= WORTH_A_BAR:
            self.bar = self.stack.enter_context(_rich_bar())
            self.task = self.bar.add_task(self.label, total=total)
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)


def _rich_bar() -> Any:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress("{task.description}", *columns, console=Console(stderr=True))
