"""``numaload status``, ``verify`` and ``release``: verbs on what is in the store."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from numaload.cli import pagecache, prewarming
from numaload.cli.machine import memory
from numaload.cli.output import (
    complain,
    count,
    duration,
    files_of,
    note,
    on_nodes,
    print_json,
    print_table,
    say,
    size,
)
from numaload.cli.replicas import PLACED, by_replica, where

if TYPE_CHECKING:
    from numaload.files.source import Identity

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
        ("status", status, "what is in the store, where it is, and what is in the page cache"),
        ("verify", verify, "ask the kernel for every page again and check every checksum"),
        ("release", release, "take replicas out of the store and free their memory"),
    ):
        parser = verbs.add_parser(name, help=text)
        parser.add_argument(
            "files", metavar="FILE", nargs="*", help="by default everything in the store"
        )
        parser.set_defaults(run=run)
        if run is status:
            pagecache.add_options(parser)
        if run is verify:
            parser.add_argument(
                "--checksum",
                action="store_true",
                help="also read the files, and find changes that their size and times do not tell",
            )
        if run is status:
            parser.add_argument(
                "--ready",
                action="store_true",
                help="only whether replicas of FILE, as it is now, serve every node: copies, or one"
                " in stripes or turns; by exit status too",
            )


class _Chosen(NamedTuple):
    """Entries of the store, for some files or all.

    missing: files that have no entry. damaged: {name: why} of entries that cannot be read; if files
    were named and each has an entry, none. If none were named, stays: why leftovers of entries
    cannot be cleared.
    """

    entries: list[Any]
    missing: list[str]
    damaged: dict[str, str]
    stays: list[str]


def _chosen(files: list[str]) -> _Chosen:
    """Find entries by the paths of their files, through links too: these may have changed.

    Or by the files themselves, as ``mirror`` does: they may have other names now.
    """
    from numaload.replicas import reclaim, store

    stays = reclaim.sweep()
    entries, damaged = store.scan()
    if not files:
        return _Chosen(entries, [], damaged, stays)
    names = [_names(e.model.paths) | set(map(_known_by, e.model.identities)) for e in entries]
    wanted = {file: its | _as_they_are(file) for file, its in _wanted(files).items()}
    every = set().union(*wanted.values())
    chosen = [entry for entry, its in zip(entries, names, strict=True) if its & every]
    missing = [file for file in files if not any(its & wanted[file] for its in names)]
    return _Chosen(chosen, missing, damaged if missing else {}, [])


def _wanted(files: list[str]) -> dict[str, set[str]]:
    """Return {file: all paths that its model may be known by}."""
    return {file: _names([file, *_siblings(file)]) for file in files}


def _names(paths: Iterable[str]) -> set[str]:
    """Return the names that these files may be known by, with and without links."""
    from numaload.files.source import real_path

    return {name for path in paths for name in (os.path.abspath(path), real_path(path))}


def _known_by(identity: Identity) -> str:
    """Return what a file is known by whatever its name is. A link to it changes its ctime."""
    return str(identity[:4])


def _as_they_are(file: str) -> set[str]:
    """Return what this model's files are known by, as far as they can be opened."""
    from numaload.errors import ReadError
    from numaload.files.source import SourceFile

    found = set()
    for path in _siblings(file):
        with suppress(ReadError), SourceFile(path) as one:
            found.add(_known_by(one.opened))
    return found


def _complain_none(missing: list[str]) -> None:
    for file in missing:
        how = f"numaload mirror {shlex.quote(file)}"
        complain(f"{file}: no replicas of it in the store; to make them: {how}")


def _complain_damaged(damaged: dict[str, str]) -> bool:
    """Say what cannot be read; return whether there is any."""
    for why in damaged.values():
        complain(why)
    return bool(damaged)


def _siblings(path: str) -> list[str]:
    """Return all files of the model that this one belongs to, as far as they can be told."""
    from numaload.errors import ReadError, SplitError
    from numaload.files.source import model_paths

    try:
        return list(model_paths(path))
    except (ReadError, SplitError):
        return [path]


def status(options: argparse.Namespace) -> int:
    if options.ready:
        if options.tensors or options.watch is not None:
            from numaload.errors import UsageError

            raise UsageError("--ready says one thing, once: leave out --tensors and --watch")
        return _ready(options)
    given = dict.fromkeys(path for file in options.files for path in _siblings(file))
    files = pagecache.Files(given or _used(), tensors=options.tensors)
    dumb = os.environ.get("TERM") == "dumb"  # or else nothing would be drawn
    in_place = sys.stdout.isatty() and not (dumb or options.json)
    return pagecache.repeat(lambda: _show_status(options, files), options.watch, in_place=in_place)


def _ready(options: argparse.Namespace) -> int:
    files = options.files or _used()
    found = {file: _why_not_ready(file) for file in files} or {"": "no models known since boot"}
    why = {file: text for file, text in found.items() if text}
    if options.json:
        print_json({"ready": not why, "why": why})
    else:
        for file, text in why.items():
            say(f"not ready: {file}: {text}" if file else f"not ready: {text}")
        if not why:
            say("ready")
    return 1 if why else 0


def _why_not_ready(file: str) -> str:
    from numaload.errors import NumaloadError
    from numaload.machine.topology import topology
    from numaload.replicas.mirror import lacking

    try:
        lacks = lacking(file, topology().all)
    except NumaloadError as error:
        return str(error)
    return f"no whole replica of it as it is now on {on_nodes(lacks)}" if lacks else ""


def _used() -> list[str]:
    from numaload.errors import StoreError
    from numaload.files import known

    try:
        return sorted({path for model in known.recall() for path in model.paths})
    except StoreError:  # the status of the store says why
        return []


def _show_status(options: argparse.Namespace, files: pagecache.Files) -> int:
    from numaload.errors import StoreError
    from numaload.formats.splits import is_there
    from numaload.machine.topology import topology

    stored, warming, cached, whole = [], [], files.look(), False
    try:
        chosen = _chosen(options.files)
        stored = [row for row in map(_entry_status, chosen.entries) if row]
        warming = prewarming.look(_wanted(options.files))
        whole = not _complain_damaged(chosen.damaged)
        for file in chosen.missing:
            if not is_there(file):  # of others there are replicas, or pages at least
                complain(f"{file}: {os.strerror(errno.ENOENT)}")
                whole = False
    except StoreError as error:
        complain(str(error))
    stored_all = whole and not any(row.get("error") for row in (*stored, *warming))
    nodes = [] if options.watch is None else list(topology().nodes.values())
    if options.json:
        rows = pagecache.as_rows(cached, tensors=options.tensors)
        told: dict[str, Any] = {"replicas": stored, "prewarming": warming, "page_cache": rows}
        if nodes:
            told["nodes"] = [
                {key: getattr(node, key) for key in ("id", "memory_total", "memory_free")}
                for node in nodes
            ]
        print_json(told, a_line=options.watch is not None)
        return 0 if stored_all else 1
    _print_stored(stored)
    prewarming.show(warming)
    if nodes:
        print_table(["node", "memory", "free"], [[node.id, *memory(node)] for node in nodes])
    pagecache.show_files(cached)
    return 0 if stored_all else 1


def _print_stored(stored: list[dict[str, Any]]) -> None:
    say("replicas:" if stored else "replicas: none")
    for row in stored:
        about = SOURCE_NOTES[row["source"]]
        built = f"{size(row['nbytes'])}, built {duration(row['age_s'])} ago"
        say(f"  {files_of(row['paths'])}: {built}{about}")
        for nodes, placement in by_replica(row["placements"]):
            say(f"    {nodes}: {where(placement)}")
        for group, paths in zip(row["groups"], row["replicas"].values(), strict=True):
            file = paths[0] if paths else "no file has all of it: Weights alone reads it"
            say(f"    replica on {on_nodes(group)}: {file}")
        if row["holder"]:
            say(f"    held by process {row['holder']}")
        if not row["bound"]:
            say(f"    {PLACED}")


def _entry_status(entry: Any) -> dict[str, Any] | None:
    from numaload.errors import NumaloadError
    from numaload.linux.lists import format_list
    from numaload.replicas import store
    from numaload.replicas.mirror import placements_of_entry
    from numaload.replicas.verify import by_node

    placements, failed = {}, {}
    try:
        placements = by_node(placements_of_entry(entry))
    except NumaloadError as error:  # the others are still worth showing
        if not store.is_there(entry):
            return None  # released by someone else just now
        complain(str(error))
        failed = {"error": str(error)}
    source = entry.model.state()
    return {
        "paths": list(entry.model.paths),
        "nbytes": entry.model.size,
        "age_s": time.time() - entry.created,
        "unchanged": source == "unchanged",
        "source": source,
        "placements": placements,
        "replicas": {format_list(group): entry.paths(group) for group in entry.groups},
        "groups": entry.groups,
        "bound": entry.bound,
        "holder": entry.holder.pid if entry.holder else None,
    } | failed


def verify(options: argparse.Namespace) -> int:
    from numaload.errors import NumaloadError
    from numaload.machine.topology import topology
    from numaload.replicas.mirror import verify_entry

    entries, missing, damaged, _ = _chosen(options.files)
    if not _complain_damaged(damaged):  # which may be what is missing
        _complain_none(missing)
    if not (entries or missing or damaged):
        complain("nothing in the store; to fill it: numaload mirror MODEL.gguf")
    right, rows, here = bool(entries) and not (missing or damaged), [], topology()
    for entry in entries:
        path, source = entry.model.paths[0], entry.model.state()
        try:
            found = verify_entry(entry, here)
        except NumaloadError as error:  # the others are still worth verifying
            complain(str(error))
            rows.append({"path": path, "source": source, "right": False, "error": str(error)})
            right = False
            continue
        right &= found.right
        wrong = _differs(entry, source) if options.checksum else []
        right &= not wrong
        rows.append({"path": path, "source": source} | found.to_dict() | {"differs": wrong})
        if source != "unchanged":
            note(f"{path}: {SOURCE_TEXTS[source]}; verified is the replica as it was built")
        for nodes, placement in () if options.json else by_replica(found.placements):
            bad = len(found.wrong_chunks.get(placement.asked[0], []))
            sums = f"{count(bad, 'chunk')} DIFFER from the source" if bad else "all checksums right"
            say(f"{path}: {nodes}: {where(placement)}; {sums}")
    if options.json:
        print_json(rows)
    return 0 if right else 1


def _differs(entry: Any, source: str) -> list[tuple[str, int]]:
    """Compare the source's own bytes, as far as it is what it was; say what differs."""
    from numaload.replicas.verify import differing

    found = differing(entry.model.paths, entry.sums()) if source == "unchanged" else []
    for path in dict.fromkeys(path for path, _ in found):
        n = count(sum(path == other for other, _ in found), "chunk")
        complain(f"{path}: {n} of the file differ from its replica, though its times do not tell")
    return found


def release(options: argparse.Namespace) -> int:
    from numaload.replicas import reclaim

    damaged, foreign = ([], []) if options.files else reclaim.release_damaged()
    chosen, missing, unread, stays = _chosen(options.files)
    named = {os.path.basename(path) for path in foreign}
    unread = {name: why for name, why in unread.items() if name not in named}
    ended = prewarming.release(_wanted(options.files))
    missing = [file for file in missing if file not in ended.files]
    if options.files and not missing:
        unread = {}
    if not _complain_damaged(unread):  # which may be what is missing
        _complain_none(missing)
    for why in stays:
        complain(why)
    done = reclaim.release(chosen)
    failed = [one for one in done if one.error]
    for one in failed:
        complain(f"{one.entry.model.paths[0]}: {one.error}")
    status = 1 if missing or unread or stays or failed or ended.failed else 0
    if options.json:
        print_json([*done, *ended.rows])
        return status
    for path in damaged:
        say(f"removed {path}, which could not be read")
    for path in foreign:
        note(f"{path} stays: it is not as numaload makes it; remove it yourself if it may go")
    for one in done:
        if not one.error:
            say(f"released {files_of(one.entry.model.paths)}: {size(one.nbytes)}{_later(one)}")
    prewarming.tell_released(ended)
    if not (done or damaged or foreign or unread or stays or missing or ended.rows):
        say("nothing was in the store")
    return status


def _later(released: Any) -> str:
    still = "; still in use, the memory comes back when the last process closes it"
    return still if released.in_use else ""
