"""Verbs on replicas: ``plan``, ``mirror``, ``status``, ``verify``, ``release``."""

from __future__ import annotations

import argparse
import time
from typing import Any

from numaload.cli.output import complain, note, print_json, print_table, progress_bar, rate, size

TEACH = (
    "no models known since boot: numaload mirror MODEL.gguf, or numaload prewarm MODEL.gguf first"
)


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
    from numaload.storage import known
    from numaload.weights import open_weights

    if files:
        return [open_weights(file) for file in files]
    found = []
    for model in known.recall():
        if model.unchanged():
            found.append(open_weights(model.paths[0]))
        else:
            note(f"{model.paths[0]} changed or went away since it was used; left out")
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


def _chosen(files: list[str]) -> list[Any]:
    """Entries of the store for these files, found by path: the file may have changed or gone."""
    import os

    from numaload.formats.splits import sibling_paths
    from numaload.replicas import store

    store.sweep()
    if not files:
        return store.entries()
    wanted = {os.path.abspath(p) for f in files for p in (f, *_siblings(sibling_paths, f))}
    return [entry for entry in store.entries() if wanted & set(entry.model.paths)]


def _siblings(find: Any, path: str) -> list[str]:
    from numaload.errors import SplitError

    try:
        return list(find(path))
    except SplitError:
        return [path]


def status(options: argparse.Namespace) -> int:
    from numaload.formats.splits import sibling_paths
    from numaload.storage import known

    entries = _chosen(options.files)
    used = {p for m in known.recall() for p in m.paths}
    files = [p for f in options.files for p in _siblings(sibling_paths, f)] or sorted(used)
    stored = [_entry_status(entry) for entry in entries]
    cached = [row for row in map(_file_status, files) if row]
    if options.json:
        print_json({"replicas": stored, "page_cache": cached})
        return 0
    print("replicas:" if stored else "replicas: none")
    for row in stored:
        note_ = "" if row["unchanged"] else ", the file CHANGED since: release it"
        print(f"  {row['paths'][0]}: {size(row['nbytes'])}, built {row['age_s']:.0f} s ago{note_}")
        for node, placement in row["placements"].items():
            print(f"    node {node}: {_where(placement)}")
            print(f"    node {node}: {row['replicas'][node][0]}")
    if cached:
        print("page cache:")
        print_table(
            ["  file", "resident", "of", "by node"],
            [[f"  {r['path']}", size(r["resident"]), size(r["size"]), _by_node(r)] for r in cached],
        )
    return 0


def _by_node(row: dict[str, Any]) -> str:
    if not row["known"]:
        return "unknown: the kernel tells only the owner"
    return ", ".join(f"{n}: {size(b)}" for n, b in row["on_nodes"].items())


def _entry_status(entry: Any) -> dict[str, Any]:
    from numaload.replicas import store
    from numaload.replicas.verify import placements_of

    lease = store.Lease(entry)
    try:
        placements = placements_of({node: lease.map(node) for node in entry.nodes})
    finally:
        lease.close()
    count = range(len(entry.model.paths))
    return {
        "paths": list(entry.model.paths),
        "nbytes": entry.model.size,
        "age_s": time.time() - entry.created,
        "unchanged": entry.model.unchanged(),
        "placements": placements,
        "replicas": {node: [entry.path(node, i) for i in count] for node in entry.nodes},
    }


def _file_status(path: str) -> dict[str, Any] | None:
    import os

    from numaload.storage.files import SourceFile
    from numaload.storage.residency import cached_on, residency

    if not os.path.exists(path):
        return None
    with SourceFile(path) as file:
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
    from numaload.mirrors import attach

    paths = options.files or sorted({e.model.paths[0] for e in _chosen([])})
    if not paths:
        complain("nothing in the store: numaload mirror MODEL.gguf")
        return 1
    right, rows = True, []
    for path in paths:
        with attach(path) as one:
            found = one.verify()
        right &= found.right
        rows.append({"path": path} | found.to_dict())
        for node, placement in () if options.json else sorted(found.placements.items()):
            bad = len(found.wrong_chunks.get(node, []))
            sums = "all checksums right" if not bad else f"{bad} chunks DIFFER from the source"
            print(f"{path}: node {node}: {_where(placement)}; {sums}")
    if options.json:
        print_json(rows)
    return 0 if right else 1


def release(options: argparse.Namespace) -> int:
    from numaload.replicas import store

    chosen = _chosen(options.files)
    if options.files and not chosen:
        complain(f"no replicas of {', '.join(options.files)}")
        return 1
    done = store.release(chosen)
    if options.json:
        print_json(done)
        return 0
    for one in done:
        later = (
            "; still in use, the memory comes back when the last process closes it"
            if one.in_use
            else ""
        )
        print(f"released {one.entry.model.paths[0]}: {size(one.nbytes)}{later}")
    if not done:
        print("nothing was in the store")
    return 0
