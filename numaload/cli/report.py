"""``numaload report``: one page about a model, its machine and its load, to read or to send."""

from __future__ import annotations

import argparse
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from numaload.cli.output import print_json, say, size
from numaload.machine.userdir import write_whole


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser(
        "report",
        help="one page of HTML: the machine, where the model is, what slows its load",
        description="Write one page about a model: the machine, findings, speeds, where each tensor"
        " is, and the load over time. It loads nothing from elsewhere and runs no script.",
    )
    parser.add_argument("file", metavar="FILE", help="any file of the model")
    parser.add_argument(
        "-o", "--output", metavar="PAGE", help="the file to write; - prints the page"
    )
    parser.add_argument(
        "--trace", metavar="FILE", help="draw the load that NUMALOAD_TRACE wrote to this file"
    )
    parser.set_defaults(run=report)


def report(options: argparse.Namespace) -> int:
    from numaload.cli.page.sections import page_of
    from numaload.errors import UsageError
    from numaload.report.collect import collect

    output = options.output
    if (output is None) != options.json:
        raise UsageError("expected either -o PAGE.html, or --json for the facts alone")
    if options.json:
        print_json(collect(options.file, options.trace))
        return 0
    words = ["numaload", "report", options.file, "-o", output]
    command = shlex.join([*words, "--trace", options.trace] if options.trace else words)
    if output == "-":
        print(page_of(collect(options.file, options.trace), command), end="")
        return 0
    with _folder_of(output) as folder:  # what is wrong with it is said before the work
        page = page_of(collect(options.file, options.trace), command).encode()
        with _named(output):
            write_whole(os.path.basename(output), page, folder)
    say(f"{output}: {size(len(page))}")
    return 0


@contextmanager
def _folder_of(output: str) -> Iterator[int]:
    """Open the folder of the page. Raises: UsageError for what is no page; OSError."""
    from numaload.errors import UsageError

    where, name = os.path.dirname(output) or ".", os.path.basename(output)
    if not name:
        raise UsageError(f"{output}: expected the name of a file")
    with _named(output):
        folder = os.open(where, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with _named(output):
            if not os.access(".", os.W_OK | os.X_OK, dir_fd=folder):  # which does not say why
                os.close(os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, dir_fd=folder))
            with suppress(FileNotFoundError):
                if not _is_page(name, folder):
                    raise UsageError(
                        f"{output} is there and is no page: give another name, or remove it"
                    )
        yield folder
    finally:
        os.close(folder)


@contextmanager
def _named(output: str) -> Iterator[None]:
    """Say which page cannot be written. Raises: OSError."""
    from numaload.errors import reason

    try:
        yield
    except OSError as error:
        raise OSError(f"{output}: no page can be written there: {reason(error)}") from error


def _is_page(name: str, folder: int) -> bool:
    """Return whether numaload wrote it. Raises: OSError."""
    from numaload.cli.page.markup import START

    if not stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        return False
    with open(os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=folder), "rb") as file:
        return file.read(len(START)) == START.encode()
