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
        pools/                        budgets, and a journal of what went
        KEY.TOKEN/                    an entry with a holder: the memory is a process's, which
            node0-3/model.gguf        keeps it beyond logout and the size of the tmpfs; here are
                                      links to /proc/PID/fd/N

KEY is made of the identities of all files of the model, so a changed file finds nothing. A model
may have several entries, for nodes that were mirrored later. Attached processes hold a shared lock
on the entry's folder; releasing takes the names away, the memory goes when the last one closes.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from errno import EEXIST, ENOENT, ENOTEMPTY
from functools import lru_cache

from numaload import trace
from numaload.errors import (
    ReplicaNotFoundError,
    StoreError,
    check_limits,
    reason,
    warn_once,
)
from numaload.files.known import Model
from numaload.files.source import Identity
from numaload.linux.lists import Group
from numaload.machine import userdir
from numaload.replicas import folders
from numaload.replicas import hold as holding
from numaload.replicas.build import Built
from numaload.replicas.entry import BASE, Entry, folder_of
from numaload.replicas.folders import MANIFEST
from numaload.replicas.layout import INTERLEAVE, MIRROR, MIXED

TOKEN_BYTES = 4
PAUSES_S = (0.01,) * 10  # in which others may end what they began to remove
_local = threading.local()


def entries() -> list[Entry]:
    """Return everything in the store, oldest first; what cannot be read is reported."""
    found, damaged = scan()
    for name, why in damaged.items():
        warn_once(f"damaged {name}", why)
    return found


@trace.spanned("store")
def scan() -> tuple[list[Entry], dict[str, str]]:
    """Return the entries, oldest first, and {name: why} of those that cannot be read."""
    found: list[Entry] = []
    damaged: dict[str, str] = {}
    take_over()
    with userdir.existing() as store:
        for name in entry_names(store):
            entry = read(name, store)
            if isinstance(entry, Entry):
                found.append(entry)
            elif has(name, store):  # or else it was released by someone just now
                damaged[name] = (
                    f"{userdir.path()}/{name}: this entry cannot be read ({entry}) and is left out;"
                    " numaload release, without FILE, removes it if it can tell that it is"
                    " numaload's, or else remove that folder yourself"
                )
    return sorted(found, key=lambda entry: entry.created), damaged


@trace.spanned("store")
def take_over() -> None:
    """Move entries here that an earlier version made, and a holder of that may make again."""
    with userdir.earlier() as old:
        names = [name for name in entry_names(old) if isinstance(read(name, old), Entry)]
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


def read(name: str, store: int | None) -> Entry | str:
    """Return the entry, or why it cannot be read."""
    try:
        with userdir.folder(name, store) as folder:
            return _parsed(name, userdir.read_owned(MANIFEST, folder))
    except userdir.UNREADABLE as error:
        check_limits(error, f"{userdir.path()}/{name}")  # no damage that may be released
        why = reason(error) if isinstance(error, OSError) else str(error)
        return why or type(error).__name__


@lru_cache(maxsize=16)
def _parsed(name: str, manifest: bytes) -> Entry:
    """Parse a manifest, once: those of large models take longer than opening them."""
    return Entry.from_json(name, manifest)


def entry_names(store: int | None) -> list[str]:
    """Return the names that entries may have."""
    return [name for name in userdir.listed(store) if userdir.ENTRY.fullmatch(name)]


def is_there(entry: Entry) -> bool:
    with userdir.existing() as store:
        return store is not None and has(entry.name, store)


def has(name: str, store: int | None) -> bool:
    """Return whether something has this name in the store."""
    with userdir.named(f"{userdir.path()}/{name}"):
        try:
            os.stat(name, dir_fd=store, follow_symlinks=False)
        except FileNotFoundError:
            return False
    return True


def find(model: Model, policy: str = "") -> dict[Group, Entry]:
    """Return what is there of exactly this model: {nodes: its newest entry}.

    policy: only of this one; by default what patterns placed only if there is nothing else. Without
    what cannot be reached: its holder has died, or is another container's.
    """
    return _reached(lambda entry: entry.model.key == model.key and policy in ("", entry.policy))


def find_of(opened: Sequence[Identity], policy: str = "") -> dict[Group, Entry]:
    """Return the same of files that are open now, without reading of them what they begin with.

    A file that was written to has another ctime.
    """
    wanted = [one[:-1] for one in opened]
    return _reached(
        lambda entry: (
            policy in ("", entry.policy) and [one[:-1] for one in entry.model.identities] == wanted
        )
    )


@trace.spanned("store")
def _reached(chosen: Callable[[Entry], bool]) -> dict[Group, Entry]:
    found: list[Entry] = []
    take_over()
    with userdir.existing() as store:
        for name in entry_names(store):
            entry = read(name, store)
            if isinstance(entry, Entry) and chosen(entry) and reachable(entry):
                found.append(entry)
    found = [entry for entry in found if entry.policy != MIXED] or found
    found.sort(key=lambda entry: entry.created)
    return {group: entry for entry in found for group in entry.groups}


def reachable(entry: Entry) -> bool:
    """Return whether its memory is there: it has no holder, or one of this container that lives."""
    holder = entry.holder
    return holder is None or (not holder.foreign and holder.alive())


def publish(
    model: Model,
    built: Built,
    store: int,
    *,
    hold: bool = False,
    policy: str = MIRROR,
    pool: str = "",
    keep: bool = False,
) -> Entry:
    """Give the files their names: all of them appear at once, by one rename.

    hold: they are memory files, which a holder process takes over. pool, keep: see ``Entry``; ""
    for the pool of the replicas of the files as they were before, or ``BASE``.
    """
    before = changed(model)
    pool = pool or next((entry.pool for entry in before), BASE)
    keep = keep or any(entry.keep for entry in before)
    layouts = list(built.layouts.values())
    is_mixed = policy == MIXED
    entry = Entry(
        name=f"{model.key}.{secrets.token_hex(TOKEN_BYTES)}",
        model=model,
        groups=tuple(built.arenas),
        checksums=tuple(tuple(row) for row in built.checksums),
        created=time.time(),
        seconds=built.seconds,
        bound=built.bound,
        pool=pool,
        keep=keep,
        policy=policy,
        turns=layouts[0].turns if policy == INTERLEAVE else (),
        stripes=layouts[-1].stripes,
        copied=layouts[0].only if is_mixed and not layouts[0].stripes else (),
        once=layouts[-1].only if is_mixed and layouts[-1].stripes else (),
    )
    links = [
        (folder_of(group), name, arena.fd)
        for group, arenas in built.arenas.items()
        for name, arena in zip(entry.file_names, arenas, strict=True)
        if arena.fd is not None  # as all have that are to be published
    ]
    if hold:
        return _publish_held(entry, links, store)
    files = [(node, file, f"/proc/self/fd/{fd}") for node, file, fd in links]
    folders.write(entry.name, json.dumps(entry.manifest()).encode(), files, store)
    return entry


def _publish_held(entry: Entry, links: list[tuple[str, str, int]], store: int) -> Entry:
    process = holding.hold(entry.name, entry.manifest(), links)
    published = read(entry.name, store)
    if isinstance(published, Entry):
        return published
    there, where = has(entry.name, store), f"{userdir.path()}/{entry.name}"
    with suppress(OSError):  # it has ended, if its entry was released
        process.end()
    if not there:
        raise ReplicaNotFoundError(f"{where}: released while it was published")
    raise StoreError(f"{where}: its holder wrote no manifest that can be read: {published}")


@trace.spanned("store")
def mark(entry: Entry, *, pool: str = "", keep: bool = False) -> None:
    """Put an entry into another pool, or have it kept; the caller holds the lock.

    Raises: StoreError.
    """
    asked = replace(entry, pool=pool or entry.pool, keep=keep or entry.keep)
    if asked == entry:
        return
    where = f"{userdir.path()}/{entry.name}"
    with (
        userdir.existing() as store,
        userdir.named(where),
        suppress(FileNotFoundError),  # somebody released it just now
        userdir.folder(entry.name, store) as folder,
    ):
        row = json.loads(userdir.read_owned(MANIFEST, folder))
        row |= {"pool": asked.pool, "keep": asked.keep}
        userdir.write_whole(MANIFEST, json.dumps(row).encode(), folder)


def changed(model: Model) -> list[Entry]:
    """Return replicas of the same files as they were before they changed."""
    found = entries()
    return [e for e in found if e.model.paths == model.paths and e.model.key != model.key]
