"""Verbs on files: ``inspect`` and ``prewarm``."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import Any

from numaload.cli import prewarming
from numaload.cli.output import (
    byte_count,
    note,
    print_json,
    print_table,
    progress_bar,
    rate,
    say,
    size,
)

SHOWN = 8  # elements of an array that inspect prints
WIDTH = 100

PREWARM_OPTIONS: dict[str, dict[str, Any]] = {
    "--nodes": {"metavar": "LIST", "help": "nodes that the page cache is to land on"},
    "--policy": {"choices": ["bind", "interleave"], "help": "bind unless given"},
    "--move": {"action": "store_true", "help": "move there what is in RAM on other nodes"},
    "--tensors": {"metavar": "REGEX", "help": "only tensors in whose names this is found"},
    "--layers": {"metavar": "LIST", "help": "only these layers, as 0-9,12"},
    "--way": {"choices": ["mapped", "buffered"], "help": "how to read, instead of the plan's way"},
    "--threads": {"type": int, "metavar": "N", "help": "reading threads, instead of the plan's"},
    "--chunk": {"type": byte_count, "metavar": "SIZE", "help": "bytes a read, as 8M"},
    "--order": {"choices": ["file", "stripes"], "help": "stripes: a part for each thread"},
    "--max-rate": {"type": byte_count, "metavar": "SIZE", "help": "bytes a second, as 200M"},
    "--force": {
        "action": "store_true",
        "help": "begin what does not fit in memory; it stops before it pushes itself out",
    },
    "--background": {"action": "store_true", "help": "return at once, another process reads"},
    "--lock": {"action": "store_true", "help": "another process keeps it in RAM until release"},
}


def add_verbs(verbs: Any) -> None:
    parser = verbs.add_parser("inspect", help="tensors, types, split files and bytes of a model")
    parser.add_argument(
        "file",
        metavar="FILE",
        help="any one of the model's files, GGUF or safetensors; of these also index or folder",
    )
    parser.add_argument("--metadata", action="store_true", help="print the metadata too")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.set_defaults(run=inspect)

    parser = verbs.add_parser("prewarm", help="read files into the page cache, in parallel")
    parser.add_argument("files", metavar="FILE", nargs="+")
    for option, settings in PREWARM_OPTIONS.items():
        parser.add_argument(option, **settings)
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=prewarm)


def inspect(options: argparse.Namespace) -> int:
    from numaload.weights import open_weights

    with open_weights(options.file) as weights:
        if options.json:
            print_json(_as_dict(weights, with_metadata=options.metadata))
            return 0
        for part in weights.parts:
            header, count = part.header, len(part.header.tensors)
            say(f"{part.file.path}: {header.title}, {count} tensors, {size(part.file.size)}")
        rows = [
            [t.name, t.type_name, "x".join(map(str, t.shape)), t.nbytes] for t in weights.values()
        ]
        print_table(["tensor", "type", "shape", "bytes"], rows)
        print_table(["type", "tensors", "bytes"], _by_type(weights))
        _note_unusable(weights)
        if options.metadata:
            for key, value in weights.metadata.items():
                say(f"{key} ({weights.metadata.type_name(key)}) = {_short(value)}")
    return 0


def _by_type(weights: Any) -> list[list[Any]]:
    counts, nbytes = Counter[str](), Counter[str]()
    for tensor in weights.values():
        counts[tensor.type_name] += 1
        nbytes[tensor.type_name] += tensor.nbytes
    return [[name, counts[name], nbytes[name]] for name, _ in nbytes.most_common()]


def _note_unusable(weights: Any) -> None:
    """Say it once for each type: a model may have hundreds of such tensors."""
    from numaload.errors import UnknownQuantTypeError

    said = set()
    for tensor in weights.values():
        if tensor.type_name in said:
            continue
        try:
            tensor.check_type()
        except UnknownQuantTypeError as error:
            note(error)
            said.add(tensor.type_name)


def _as_dict(weights: Any, *, with_metadata: bool) -> dict[str, Any]:
    data: dict[str, Any] = {
        "files": [
            {
                "path": p.file.path, "size": p.file.size,
                "format": p.header.title.split()[0], "version": p.header.version,
                "byte_order": p.header.byte_order, "alignment": p.header.alignment,
            }
            for p in weights.parts
        ],
        "tensors": [
            {
                "name": t.name, "qtype": t.type_name, "dims": t.dims, "shape": t.shape,
                "offset": t.offset, "nbytes": t.nbytes, "path": t.path,
            }
            for t in weights.values()
        ],
    }  # fmt: skip
    if with_metadata:
        data["metadata"] = dict(weights.metadata)
    return data


def _short(value: Any) -> str:
    if isinstance(value, str):
        text = repr(value)
        return text if len(text) <= WIDTH else f"{text[:WIDTH]}... ({len(value)} characters)"
    if not hasattr(value, "tolist"):
        return repr(value)
    if len(value) <= SHOWN:
        return repr(value.tolist())
    return f"[{', '.join(map(repr, value[:SHOWN]))}, ...] ({len(value)} elements)"


def prewarm(options: argparse.Namespace) -> int:
    from numaload.pagecache.prewarm import prewarm as warm

    names = [option.removeprefix("--").replace("-", "_") for option in PREWARM_OPTIONS]
    given = {name: getattr(options, name) for name in names}
    with progress_bar("prewarm", quiet=options.json) as progress:
        report = warm(options.files, **given, progress=progress, announce=_announce)
    goes_on = options.background and report.holder is not None
    if options.json:
        print_json(report.to_dict())
    else:
        if not goes_on:
            _tell(report)
        prewarming.tell_started(report, background=goes_on)
    return 0 if report.done or goes_on else 1


def _announce(plan: Any) -> None:
    note(f"plan: {plan}")


def _tell(report: Any) -> None:
    from numaload.numa.lists import format_list

    known = "" if report.residency_known else " (the kernel tells only owners what is resident)"
    had = f"{size(report.resident_before)} were resident{known}"
    got = "done"
    if report.read:
        speed = f"{rate(report.read, report.seconds)}, threads: {report.threads}"
        got = f"{size(report.read)} read in {report.seconds:.2f} s ({speed})"
    of = "" if report.tensors is None else f"{report.tensors} tensors of "
    say(f"{of}{len(report.paths)} files, {size(report.size)}: {had}, {got}")
    if report.plan and report.plan.tried:
        say(f"read: {report.plan}")
    if report.nodes:
        where = ", ".join(f"node {n}: {size(b)}" for n, b in report.on_nodes.items())
        say(
            f"asked for node {format_list(report.nodes)} ({report.policy}); the kernel says {where}"
        )
    if report.followed is not None:
        say(f"process {report.followed} read {size(report.read_by_others)} meanwhile")
    for line in _lacks(report):
        note(line)


def _lacks(report: Any) -> Iterator[str]:
    if report.moved:
        yield f"{size(report.moved)} were moved between nodes"
    for why, nbytes in report.unmoved.items():
        yield f"{size(nbytes)} cannot be moved: {why} (others map it, or that node is full)"
    if report.elsewhere:
        yield (
            f"{size(report.elsewhere)} are on other nodes: page cache stays where it was first"
            " read: --move moves it, or numaload evict FILE and prewarm again"
        )
    if report.stopped:
        yield f"stopped at {size(report.resident)} of {size(report.size)}: {report.stopped}"
    elif report.resident < report.size and report.residency_known:
        of = f"{size(report.resident)} of {size(report.size)}"
        yield f"only {of} are resident now: memory is short"
    if report.holder and report.holder.lock and report.locked < report.size:
        yield f"only {size(report.locked)} of {size(report.size)} are locked: memory is short"
