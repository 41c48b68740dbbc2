"""Verbs on files: ``inspect`` and ``prewarm``."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from numaload.cli.output import note, print_json, print_table, printable, progress_bar, rate, size

SHOWN = 8  # elements of an array that inspect prints
WIDTH = 100


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
    parser.add_argument("--nodes", metavar="LIST", help="nodes that the page cache is to land on")
    parser.add_argument("--policy", choices=["bind", "interleave"], help="bind unless given")
    parser.add_argument("--threads", type=int, metavar="N", help="reading threads")
    parser.add_argument(
        "--force", action="store_true", help="read even what does not fit in memory"
    )
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
            print(f"{part.file.path}: {header.title}, {count} tensors, {size(part.file.size)}")
        rows = [
            [t.name, t.type_name, "x".join(map(str, t.shape)), t.nbytes] for t in weights.values()
        ]
        print_table(["tensor", "type", "shape", "bytes"], rows)
        print_table(["type", "tensors", "bytes"], _by_type(weights))
        _note_unusable(weights)
        if options.metadata:
            for key, value in weights.metadata.items():
                print(f"{printable(key)} ({weights.metadata.type_name(key)}) = {_short(value)}")
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
            note(printable(error))
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

    with progress_bar("prewarm", quiet=options.json) as progress:
        report = warm(
            options.files, nodes=options.nodes, policy=options.policy,
            threads=options.threads, force=options.force, progress=progress,
        )  # fmt: skip
    if options.json:
        print_json(report.to_dict())
    else:
        _tell(report)
    return 0 if report.done else 1


def _tell(report: Any) -> None:
    from numaload.numa.lists import format_list

    known = "" if report.residency_known else " (the kernel tells only owners what is resident)"
    had = f"{size(report.resident_before)} were resident{known}"
    speed = f"{rate(report.read, report.seconds)}, threads: {report.threads}"
    got = f"{size(report.read)} read in {report.seconds:.2f} s ({speed})" if report.read else "done"
    print(f"{len(report.paths)} files, {size(report.size)}: {had}, {got}")
    if report.nodes:
        where = ", ".join(f"node {n}: {size(b)}" for n, b in report.on_nodes.items())
        print(
            f"asked for node {format_list(report.nodes)} ({report.policy}); the kernel says {where}"
        )
    if report.elsewhere:
        note(
            f"{size(report.elsewhere)} are on other nodes: page cache stays where it was first"
            " read; to drop it, then prewarm again: dd if=FILE iflag=nocache count=0"
        )
    if report.resident < report.size and report.residency_known:
        note(
            f"only {size(report.resident)} of {size(report.size)} are resident now: memory is short"
        )
