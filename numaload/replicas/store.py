"""The store: replicas in shared memory that outlive their builder, for every process of the user.

::

    /dev/shm/numaload-1000/           0700, this user's
        numaload-store                numaload made this folder
        lock                          held while something is built: two plans cannot share room
        known/HASH.json               models that were used since boot
        KEY.TOKEN/                    one entry: appears by one rename, disappears by one
            manifest.json             whose replicas, on which nodes, checksums
            node0/model.gguf          0400; the file itself, so that other engines can map it too
            node1/model.gguf
        KEY.TOKEN/                    an entry with a holder: the memory is a process's, which
            node0-3/model.gguf        keeps it beyond logout and the size of the tmpfs; here are
                                      links to /proc/PID/fd/N

KEY is made of the identities of all files of the model, so a changed file finds nothing. A model
may have several entries, for nodes that were mirrored later. Attached processes hold a shared lock
on the entry's folder; releasing takes the names away, the memory goes when the last one closes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from errno import EEXIST, ENOENT, ENOTEMPTY
from typing import Any

from numaload.errors import (
    ReplicaNotFoundError,
    StoreError,
    UsageError,
    check_limits,
    reason,
    warn_once,
)
from numaload.files.known import Model
from numaload.holder.process import HolderProcess
from numaload.linux.lists import Group
from numaload.machine import userdir
from numaload.replicas import folders
from numaload.replicas import hold as holding
from numaload.replicas.build import Built
from numaload.replicas.entry import Entry, folder_of, holder_of
from numaload.replicas.folders import MANIFEST

TOKEN_BYTES = 4
PAUSES_S = (0.01,) * 10  # in which others may end what they began to remove
_local = threading.local()


def entries() -> list[Entry]:
    """Return everything in the store, oldest first; what cannot be read is reported."""
    found, damaged = scan()
    for name, why in damaged.items():
        warn_once(f"damaged {name}", why)
    return found


def scan() -> tuple[list[Entry], dict[str, str]]:
    """Return the entries, oldest first, and {name: why} of those that cannot be read."""
    found: list[Entry] = []
    damaged: dict[str, str] = {}
    _take_over()
    with userdir.existing() as store:
        for name in _entry_names(store):
            entry = _read(name, store)
            if isinstance(entry, Entry):
                found.append(entry)
            elif _is_there(name, store):  # or else it was released by someone just now
                damaged[name] = (
                    f"{userdir.path()}/{name}: this entry cannot be read ({entry}) and is left out;"
                    " numaload release, without FILE, removes what numaload made of it"
                )
    return sorted(found, key=lambda entry: entry.created), damaged


def _take_over() -> None:
    """Move entries here that an earlier version made, and a holder of that may make again."""
    with userdir.earlier() as old:
        names = [name for name in _entry_names(old) if isinstance(_read(name, old), Entry)]
        if old is None or not names:
            return
        with userdir.opened() as store, folders.alone(old) as alone:
            for name in names if alone else ():
                try:
                    os.rename(name, name, src_dir_fd=old, dst_dir_fd=store)
                except OSError as error:  # noqa: PERF203 - the others are moved all the same
                    if error.errno not in (ENOENT, ENOTEMPTY, EEXIST):  # it was moved before
                        why = f"{name}, of an earlier version, stays where it is: {reason(error)}"
                        warn_once(why, why)


def _read(name: str, store: int | None) -> Entry | str:
    """Return the entry, or why it cannot be read."""
    try:
        with userdir.folder(name, store) as folder:
            return Entry.from_json(name, userdir.read_owned(MANIFEST, folder))
    except userdir.UNREADABLE as error:
        check_limits(error, f"{userdir.path()}/{name}")  # no damage that may be released
        why = reason(error) if isinstance(error, OSError) else str(error)
        return why or type(error).__name__


def _entry_names(store: int | None) -> list[str]:
    return [name for name in userdir.listed(store) if userdir.ENTRY.fullmatch(name)]


def is_there(entry: Entry) -> bool:
    with userdir.existing() as store:
        return store is not None and _is_there(entry.name, store)


def _is_there(name: str, store: int | None) -> bool:
    with userdir.named(f"{userdir.path()}/{name}"):
        try:
            os.stat(name, dir_fd=store, follow_symlinks=False)
        except FileNotFoundError:
            return False
    return True


def find(model: Model) -> dict[Group, Entry]:
    """Return what is there of exactly this model: {nodes: its newest entry}.

    Without what cannot be reached: its holder has died, or is another container's.
    """
    return {
        group: entry
        for entry in entries()
        if entry.model.key == model.key and _reachable(entry)
        for group in entry.groups
    }


@contextmanager
def building() -> Iterator[int]:
    """Hold the store for one builder: its plan stays true while it builds. Waits for others.

    Yields the store's descriptor, cleared of what killed builders left.
    """
    _take_over()
    with userdir.opened() as store:
        if getattr(_local, "builds", False):
            raise UsageError(
                "called in the progress callback of another mirror(shared=True): the store has one"
                " builder at a time; call it when that has returned"
            )
        with folders.alone(store, wait=True):
            _local.builds = True
            try:
                _sweep(store)
                yield store
            finally:
                _local.builds = False


def sweep() -> list[str]:
    """Clear what killed processes left, unless someone builds; return why replicas stay."""
    _take_over()
    with userdir.existing() as store:
        if store is not None:
            with folders.alone(store) as alone:
                if alone:
                    return _sweep(store)
    return []


def _sweep(store: int) -> list[str]:
    """Clear what killed processes left; return why replicas stay, if any do."""
    left = [name for name in userdir.listed(store) if userdir.ENTRY.fullmatch(name[1:])]
    stays = [_remove(name, store) for name in left if name.startswith(".")]
    for name in _entry_names(store):
        entry = _read(name, store)
        lost = _lost(entry) if isinstance(entry, Entry) else None
        if isinstance(entry, Entry) and lost and _is_there(name, store):
            warn_once(
                f"holder {entry.name}",
                f"process {lost.pid}, which held the replicas of {entry.model.paths[0]}, is gone,"
                " and they with it: it was killed, or its container ended",
            )
            stays.append(_take_away(name, store))
    stays = [why for why in stays if why]
    for why in stays:
        warn_once(why, why)
    return stays


def _lost(entry: Entry) -> HolderProcess | None:
    """Return the entry's holder if it has died; in another container that cannot be seen."""
    holder = entry.holder
    return None if holder is None or holder.foreign or holder.alive() else holder


def _reachable(entry: Entry) -> bool:
    holder = entry.holder
    return holder is None or (not holder.foreign and holder.alive())


def publish(model: Model, built: Built, store: int, *, hold: bool = False) -> Entry:
    """Give the files their names: all of them appear at once, by one rename.

    hold: they are memory files, which a holder process takes over.
    """
    entry = Entry(
        name=f"{model.key}.{secrets.token_hex(TOKEN_BYTES)}",
        model=model,
        groups=tuple(built.arenas),
        checksums=tuple(tuple(row) for row in built.checksums),
        created=time.time(),
        seconds=built.seconds,
        bound=built.bound,
    )
    links = [
        (folder_of(group), os.path.basename(path), arena.fd)
        for group, arenas in built.arenas.items()
        for path, arena in zip(model.paths, arenas, strict=True)
        if arena.fd is not None  # as all have that are to be published
    ]
    if hold:
        return _publish_held(entry, links, store)
    files = [(node, file, f"/proc/self/fd/{fd}") for node, file, fd in links]
    folders.write(entry.name, json.dumps(entry.manifest()).encode(), files, store)
    return entry


def _publish_held(entry: Entry, links: list[tuple[str, str, int]], store: int) -> Entry:
    process = holding.hold(entry.name, entry.manifest(), links)
    published = _read(entry.name, store)
    if isinstance(published, Entry):
        return published
    there, where = _is_there(entry.name, store), f"{userdir.path()}/{entry.name}"
    with suppress(OSError):  # it has ended, if its entry was released
        process.end()
    if not there:
        raise ReplicaNotFoundError(f"{where}: released while it was published")
    raise StoreError(f"{where}: its holder wrote no manifest that can be read: {published}")


@dataclass(frozen=True)
class Released:
    entry: Entry
    nbytes: int
    in_use: bool  # then the memory goes when the processes that use it close it
    error: str = ""  # why it is not released after all, or comes back

    def to_dict(self) -> dict[str, Any]:
        e = self.entry
        return {
            "paths": e.model.paths,
            "nodes": e.nodes,
            "groups": e.groups,
            "holder": e.holder.pid if e.holder else None,
            "nbytes": self.nbytes,
            "in_use": self.in_use,
            "error": self.error,
        }


def release(chosen: Sequence[Entry]) -> list[Released]:
    """Take these entries out of the store. One that fails reports why and stops no other."""
    done = []
    with userdir.existing() as store:
        for entry in chosen if store is not None else ():
            try:
                with userdir.folder(entry.name, store) as folder:
                    in_use = not userdir.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue  # someone else released it just now
            except OSError:  # what is wrong with it shows when it is taken away
                in_use = False
            error = _end(entry.holder) if entry.holder else ""
            error = _take_away(entry.name, store) or error
            done.append(Released(entry, entry.nbytes, in_use, error))
    return done


def _end(holder: HolderProcess) -> str:
    """End the holder, which takes its entry away; alive, it would publish again what vanishes.

    Return why it is not ended, or an empty string.
    """
    if holder.foreign:
        return (
            f"process {holder.pid} of another container or process namespace holds it: while that"
            " lives, it publishes the entry again: release it there"
        )
    try:
        holder.end()
    except StoreError as error:
        return str(error)
    return ""


def release_damaged() -> tuple[list[str], list[str]]:
    """Take away what is in the place of entries and cannot be read as one.

    Returns the paths taken away, and those that stay because numaload did not make them.
    """
    with userdir.existing() as store:
        if store is None:
            return [], []
        stays = {name for name in userdir.listed(store) if not userdir.OURS.fullmatch(name)}
        damaged = scan()[1]
        for name in damaged:
            _end_damaged(name, store)
            folders.remove(name, store)
        stays |= {name for name in damaged if _is_there(name, store)}
    where = userdir.path()
    gone = [f"{where}/{name}" for name in damaged if name not in stays]
    return gone, [f"{where}/{name}" for name in sorted(stays)]


def _end_damaged(name: str, store: int | None) -> None:
    """End the holder that a manifest tells of, which may be damaged or another version's."""
    with suppress(*userdir.UNREADABLE):
        with userdir.folder(name, store) as folder:
            data = userdir.read_owned(MANIFEST, folder)
        holder = holder_of(json.loads(data, parse_int=lambda digits: int(digits[:20])))
        if holder is not None and not holder.foreign:
            holder.end()


def _take_away(name: str, store: int | None) -> str:
    """Take an entry away; return why its replicas stay, or an empty string."""
    assert store is not None  # noqa: S101 - what has a name is in a store
    why = ""
    try:
        os.rename(name, f".{name}", src_dir_fd=store, dst_dir_fd=store)
    except FileNotFoundError:
        pass
    except OSError:  # what an earlier one of the name left is in the way
        why = _remove(name, store)
    return _remove(f".{name}", store) or why  # also what a holder could not remove


def _remove(name: str, store: int) -> str:
    """Remove an entry's folder, again where others do so now; return why replicas stay, or ""."""
    for pause in PAUSES_S:
        replicas = folders.remove(name, store)
        if not _is_there(name, store):
            return ""
        time.sleep(pause)
    why = f"{userdir.path()}/{name} stays: some of it cannot be removed, or is not numaload's"
    if replicas:
        return why
    warn_once(why, why)
    return ""
