"""Verbs on replicas: ``plan``, ``mirror``, ``status``, ``verify``, ``release``."""

from __future__ import annotations

import argparse
import time
from typing import Any

from numaload.cli.output import complain, note, print_json, print_table, progress_bar, rate, size

TEACH = (
    "no models known since boot: numaload mirror MODEL.gguf, or numaload prewarm MODEL.gguf first"
)

# By what has become of the file that was mirrored.
SOURCE_TEXTS = {
    "changed": "the file changed since it was mirrored",
    "gone": "the file is gone since it was mirrored",
    "unreadable": "the file cannot be read any more",
}
SOURCE_NOTES = {
    "unchanged": "",
    "changed": ", the file CHANGED since: release it",
    "gone": ", the file is GONE: this may be the last copy",
    "unreadable": ", the file cannot be read any more",
}


def add_verbs(verbs: Any) -> None:
    for name, run, text in (
        ("mirror", mirror, "put a verified replica into every node's memory, kept until released"),
        ("plan", show_plan, "say what mirror would build and whether it fits; changes nothing"),
    ):
        parser = verbs.add_parser(name, help=text)
        _common(parser, run, "any one of a model's files; by default the models used since boot")
        parser.add_argument("--nodes", metavar="LIST", default="all", help="default: all")
        parser.add_argument(
            "--policy", choices=["mirror"], default="mirror", help="a replica per node"
        )
    for name, run, text in (
        ("status", status, "what is in the store, where it is, and what is in the page cache"),
        ("verify", verify, "ask the kernel for every page again and check every checksum"),
        ("release", release, "take replicas out of the store and free their memory"),
    ):
        _common(verbs.add_parser(name, help=text), run, "by default everything in the store")


def _common(parser: argparse.ArgumentParser, run: Any, help_: str) -> None:
    parser.add_argument("files", metavar="FILE", nargs="*", help=help_)
    parser.add_argument("--json", action="store_true", help="print the API's report")
    parser.set_defaults(run=run)


def _models(files: list[str]) -> list[Any]:
    """The models given, or those used since boot that are still what they were."""
    from numaload.errors import NumaloadError
    from numaload.storage import known
    from numaload.weights import open_weights

    if files:  # of which several may belong to one model: model-*.gguf
        return list({opened.model().key: opened for opened in map(open_weights, files)}.values())
    found = []
    for model in known.recall():
        if not model.unchanged():
            note(f"{model.paths[0]} changed or went away since it was used; left out")
            continue
        try:
            found.append(open_weights(model.paths[0]))
        except NumaloadError as error:
            note(f"{error}; left out")
    return found


def _plan(options: argparse.Namespace) -> tuple[list[Any], Any, list[int]]:
    from numaload.cli.machine import left_out
    from numaload.numa.topology import topology

    machine = topology()
    nodes = machine.select(options.nodes)
    if options.nodes == "all":
        for line in left_out(machine):
            note(line)
    return _models(options.files), machine, nodes


def show_plan(options: argparse.Namespace) -> int:
    from numaload.mirrors import plan_shared

    models, machine, nodes = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    todo = plan_shared(models, machine, nodes)
    if options.json:
        print_json(todo)
    else:
        _print_plan(todo, print)
    return 0 if todo.fits else 1


def _print_plan(todo: Any, tell: Any) -> None:
    from numaload.numa.lists import format_list

    for model, nodes in todo.builds:
        where = (
            f"to build on node {format_list(nodes)}" if nodes else "already on every node asked for"
        )
        tell(f"plan: {model.paths[0]}, {size(model.size)}: {where}")
    for need in todo.needs:
        tell(f"plan: {need}")


def mirror(options: argparse.Namespace) -> int:
    from numaload.mirrors import mirror_shared

    models, machine, nodes = _plan(options)
    if not models:
        complain(TEACH)
        return 2
    with progress_bar("mirror", quiet=options.json) as progress:
        mirrors = mirror_shared(
            models, machine, nodes, progress, lambda todo: _print_plan(todo, note)
        )
    if options.json:
        print_json([m.report for m in mirrors])
    for one in () if options.json else mirrors:
        _tell(one.report)
    return 0 if all(m.report.placed for m in mirrors) else 1


def _tell(report: Any) -> None:
    copied = report.nbytes * len(report.built)
    if copied:
        speed = rate(copied, report.seconds)
        print(
            f"{report.paths[0]}: {size(copied)} in {report.seconds:.2f} s ({speed}),"
            f" bound by {report.binding}"
        )
    else:
        print(f"{report.paths[0]}: replicas were there already")
    for node, placement in sorted(report.placements.items()):
        print(f"node {node}: {_where(placement)}")


def _where(placement: Any) -> str:
    share = 100 * placement.placed / max(placement.pages, 1)
    sample = sum(placement.sampled.values())
    witness = f"move_pages agrees on {sample} pages" if sample else "move_pages was not asked"
    others = {n: c for n, c in placement.on.items() if n not in placement.asked}
    text = f"{placement.placed} of {placement.pages} pages there ({share:.4g} %), {witness}"
    huge = f", {size(placement.huge_pages)} in huge pages"
    return text + huge + (f"; ELSEWHERE by node: {others}" if others else "")


def _chosen(files: list[str]) -> tuple[list[Any], list[str]]:
    """Entries of the store for these files, and those of the files that have none.

    They are found by path, through links too: the file may have changed or gone.
    """
    from numaload.formats.splits import sibling_paths
    from numaload.replicas import store

    store.sweep()
    entries = store.entries()
    if not files:
        return entries, []
    names = [_names(entry.model.paths) for entry in entries]
    wanted = {file: _names([file, *_siblings(sibling_paths, file)]) for file in files}
    every = set().union(*wanted.values())
    chosen = [entry for entry, its in zip(entries, names, strict=True) if its & every]
    return chosen, [file for file in files if not any(its & wanted[file] for its in names)]


def _names(paths: Any) -> set[str]:
    import os

    return {name for path in paths for name in (os.path.abspath(path), os.path.realpath(path))}


def _complain_none(missing: list[str]) -> None:
    for file in missing:
        complain(f"{file}: no replicas of it in the store: numaload mirror {file}")


def _siblings(find: Any, path: str) -> list[str]:
    from numaload.errors import SplitError

    try:
        return list(find(path))
    except SplitError:
        return [path]


def status(options: argparse.Namespace) -> int:
    from numaload.formats.splits import sibling_paths
    from numaload.storage import known

    chosen, _ = _chosen(options.files)
    used = {p for m in known.recall() for p in m.paths}
    given = dict.fromkeys(p for f in options.files for p in _siblings(sibling_paths, f))
    stored = [row for row in map(_entry_status, chosen) if row]
    cached = [row for row in map(_file_status, given or sorted(used)) if row]
    stored_all = all("error" not in row for row in stored)
    if options.json:
        print_json({"replicas": stored, "page_cache": cached})
        return 0 if stored_all else 1
    print("replicas:" if stored else "replicas: none")
    for row in stored:
        about = SOURCE_NOTES[row["source"]]
        print(f"  {row['paths'][0]}: {size(row['nbytes'])}, built {row['age_s']:.0f} s ago{about}")
        for node, placement in row["placements"].items():
            print(f"    node {node}: {_where(placement)}")
            print(f"    node {node}: {row['replicas'][node][0]}")
    if cached:
        print("page cache:")
        print_table(
            ["  file", "resident", "of", "by node"],
            [[f"  {r['path']}", size(r["resident"]), size(r["size"]), _by_node(r)] for r in cached],
        )
    return 0 if stored_all else 1


def _by_node(row: dict[str, Any]) -> str:
    if not row["known"]:
        return "unknown: the kernel tells only the owner"
    return ", ".join(f"{n}: {size(b)}" for n, b in row["on_nodes"].items())


def _entry_status(entry: Any) -> dict[str, Any] | None:
    from numaload.errors import NumaloadError
    from numaload.replicas import store
    from numaload.replicas.verify import placements_of

    placements, failed = {}, {}
    try:
        lease = store.Lease(entry)
        try:
            placements = placements_of({node: lease.map(node) for node in entry.nodes})
        finally:
            lease.close()
    except NumaloadError as error:  # the others are still worth showing
        if not store.is_there(entry):
            return None  # released by someone else just now
        complain(str(error))
        failed = {"error": str(error)}
    count = range(len(entry.model.paths))
    source = entry.model.state()
    return {
        "paths": list(entry.model.paths),
        "nbytes": entry.model.size,
        "age_s": time.time() - entry.created,
        "unchanged": source == "unchanged",
        "source": source,
        "placements": placements,
        "replicas": {node: [entry.path(node, i) for i in count] for node in entry.nodes},
    } | failed


def _file_status(path: str) -> dict[str, Any] | None:
    import os

    from numaload.errors import ReadError
    from numaload.storage.files import SourceFile
    from numaload.storage.residency import cached_on, residency

    if not os.path.exists(path):
        return None
    try:
        file = SourceFile(path)
    except ReadError as error:  # the others are still worth showing
        note(str(error))
        return None
    with file:
        found = residency(file)
        on = cached_on(file, found) if found.known else {}
    resident = found.resident
    return {
        "path": path,
        "size": file.size,
        "resident": resident,
        "known": found.known,
        "on_nodes": on,
    }


def verify(options: argparse.Namespace) -> int:
    from numaload.errors import NumaloadError
    from numaload.mirrors import verify_entry
    from numaload.numa.topology import topology

    entries, missing = _chosen(options.files)
    _complain_none(missing)
    if not entries and not missing:
        complain("nothing in the store: numaload mirror MODEL.gguf")
    right, rows, machine = bool(entries) and not missing, [], topology()
    for entry in entries:
        path, source = entry.model.paths[0], entry.model.state()
        try:
            found = verify_entry(entry, machine)
        except NumaloadError as error:  # the others are still worth verifying
            complain(str(error))
            rows.append({"path": path, "source": source, "right": False, "error": str(error)})
            right = False
            continue
        right &= found.right
        rows.append({"path": path, "source": source} | found.to_dict())
        if source != "unchanged":
            note(f"{path}: {SOURCE_TEXTS[source]}; verified is the replica as it was built")
        for node, placement in () if options.json else sorted(found.placements.items()):
            bad = len(found.wrong_chunks.get(node, []))
            sums = "all checksums right" if not bad else f"{bad} chunks DIFFER from the source"
            print(f"{path}: node {node}: {_where(placement)}; {sums}")
    if options.json:
        print_json(rows)
    return 0 if right else 1


def release(options: argparse.Namespace) -> int:
    from numaload.replicas import store

    chosen, missing = _chosen(options.files)
    _complain_none(missing)
    damaged = [] if options.files else store.release_damaged()
    done = store.release(chosen)
    if options.json:
        print_json(done)
        return 1 if missing else 0
    for path in damaged:
        print(f"removed {path}, which could not be read")
    for one in done:
        later = (
            "; still in use, the memory comes back when the last process closes it"
            if one.in_use
            else ""
        )
        print(f"released {one.entry.model.paths[0]}: {size(one.nbytes)}{later}")
    if not done and not damaged and not missing:
        print("nothing was in the store")
    return 1 if missing else 0
