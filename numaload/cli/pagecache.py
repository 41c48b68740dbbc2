"""``numaload evict``, and the page cache in ``numaload status``, once or again and again."""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from numaload.cli.output import complain, interval, note, print_json, print_table, say, size

if TYPE_CHECKING:
    from numaload.files.source import SourceFile
    from numaload.pagecache.evict import EvictedFile
    from numaload.pagecache.residency_report import FileResidency, Span, TensorResidency

WATCH_S = 2.0  # seconds between two looks, unless given
FILLED = " .oO"  # of a cell: nothing, some of it, at least half, all


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("evict", help="give the page cache of files back, without root")
    parser.add_argument("files", metavar="FILE", nargs="+", help="with its split siblings")
    parser.set_defaults(run=evict)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``status`` that are about the page cache."""
    parser.add_argument(
        "--tensors", action="store_true", help="how much of each tensor is in the page cache"
    )
    parser.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=interval,
        const=WATCH_S,
        help=f"again and again, every {WATCH_S:g} seconds unless given, until Ctrl-C",
    )


def repeat(show: Callable[[], int], every: float | None, *, in_place: bool) -> int:
    """Show once, or until Ctrl-C: in place, as much as fits on the terminal, or one by one."""
    if every is None:
        return show()
    if not in_place:
        while True:
            show()
            sys.stdout.flush()
            time.sleep(every)
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, redirect_stdout=False) as live:
        while True:
            with redirect_stdout(io.StringIO()) as text:
                show()
            shown = Text(text.getvalue().rstrip("\n"), no_wrap=True, overflow="ellipsis")
            live.update(shown, refresh=True)
            time.sleep(every)


class Files:
    """The files that ``status`` shows; headers are read once, however often it looks."""

    def __init__(self, paths: Iterable[str], *, tensors: bool) -> None:
        self.paths, self.tensors = list(paths), tensors
        self._spans: dict[str, Sequence[Span]] = {}

    def look(self) -> list[FileResidency]:
        return [found for found in map(self._look, self.paths) if found]

    def _look(self, path: str) -> FileResidency | None:
        from numaload.errors import NumaError, ReadError
        from numaload.files.source import SourceFile, reach
        from numaload.formats.splits import is_there
        from numaload.pagecache.residency_report import look, nodes_with_memory

        try:
            reach(path)
            if not is_there(path):
                return None
            with SourceFile(path) as file:
                return look(file, self._spans_of(file), nodes_with_memory())
        except (ReadError, NumaError) as error:  # the others are still worth showing
            note(str(error))
            return None

    def _spans_of(self, file: SourceFile) -> Sequence[Span]:
        from numaload.errors import FormatError
        from numaload.pagecache.residency_report import spans_of

        if self.tensors and file.path not in self._spans:
            try:
                self._spans[file.path] = spans_of(file)
            except FormatError as error:
                note(f"no tensors are shown: {error}")
                self._spans[file.path] = ()
        return self._spans.get(file.path, ())


def as_rows(files: Iterable[FileResidency], *, tensors: bool) -> list[dict[str, Any]]:
    from dataclasses import asdict

    left_out = () if tensors else ("tensors",)
    return [{k: v for k, v in asdict(file).items() if k not in left_out} for file in files]


def show_files(files: Sequence[FileResidency]) -> None:
    if not files:
        return
    say("page cache:")
    rows = [[f"  {f.path}", _resident(f, f.resident), size(f.size), _where(f)] for f in files]
    print_table(["  file", "resident", "of", "by node"], rows)
    for file in files:
        if file.known and file.size:
            say(f"  [{bar(file.cells)}] {_share(file)} of {file.path}")
    rows = [
        [f"  {t.name}", _resident(f, t.resident), size(t.nbytes), _by_node(t)]
        for f in files
        for t in f.tensors
    ]
    if rows:
        print_table(["  tensor", "resident", "of", "by node"], rows)


def bar(cells: Iterable[float]) -> str:
    """Draw a letter for each part of a file: all of it in RAM, at least half, some, nothing."""
    return "".join(FILLED[(cell > 0) + (cell >= 0.5) + (cell >= 1)] for cell in cells)


def _share(file: FileResidency) -> str:
    """Write a share that is never rounded to all or nothing where it is not."""
    percent = 100 * file.resident / file.size
    if 0 < percent < 100:
        percent = min(max(percent, 0.1), 99.9)
    return f"{percent:.3g} %"


def _resident(file: FileResidency, nbytes: int) -> str:
    return size(nbytes) if file.known else "unknown"


def _where(file: FileResidency) -> str:
    return _by_node(file) if file.known else "unknown: the kernel tells only the file's owner"


def _by_node(found: FileResidency | TensorResidency) -> str:
    text = ", ".join(f"{node}: {size(nbytes)}" for node, nbytes in found.on_nodes.items())
    return text + (f" (+-{size(found.nodes_error)})" if found.nodes_error else "")


def evict(options: argparse.Namespace) -> int:
    from numaload.pagecache.evict import evict as give_back

    report = give_back(options.files)
    if options.json:
        print_json(report.to_dict())
    for file in report.files:
        if not options.json:
            say(f"{file.path}: {_did(file)}")
        if file.why:
            left = f"{size(file.stays)} stay in RAM: " if file.stays else ""
            complain(f"{file.path}: {left}{file.why}")
    return 0 if report.done else 1


def _did(file: EvictedFile) -> str:
    if not file.known:
        did = "given back; how much was in RAM the kernel tells only the file's owner"
    elif not file.before:
        return "nothing of it was in RAM"
    elif file.stays:
        did = f"{size(file.given_back)} of {size(file.before)} given back"
    else:
        did = f"{size(file.before)} given back"
    if file.written is None:
        return f"{did}, written to storage first where it was not yet"
    return f"{did}, {size(file.written)} of it written to storage first" if file.written else did
