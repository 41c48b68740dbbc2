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

import fcntl
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from errno import EEXIST, ENOENT, ENOTEMPTY
from functools import lru_cache
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
from numaload.files.source import Identity
from numaload.holder.process import HolderProcess
from numaload.linux.lists import Group
from numaload.linux.users import users_of
from numaload.machine import userdir
from numaload.machine.topology import Topology
from numaload.replicas import folders, pools
from numaload.replicas import hold as holding
from numaload.replicas.build import Built
from numaload.replicas.entry import BASE, Entry, folder_of, holder_of
from numaload.replicas.folders import MANIFEST
from numaload.replicas.plan import Need

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
            return _parsed(name, userdir.read_owned(MANIFEST, folder))
    except userdir.UNREADABLE as error:
        check_limits(error, f"{userdir.path()}/{name}")  # no damage that may be released
        why = reason(error) if isinstance(error, OSError) else str(error)
        return why or type(error).__name__


@lru_cache(maxsize=16)
def _parsed(name: str, manifest: bytes) -> Entry:
    """Parse a manifest, once: those of large models take longer than opening them."""
    return Entry.from_json(name, manifest)


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
    return _reached(lambda entry: entry.model.key == model.key)


def find_of(opened: Sequence[Identity]) -> dict[Group, Entry]:
    """Return the same of files that are open now, without reading of them what they begin with.

    A file that was written to has another ctime.
    """
    wanted = [one[:-1] for one in opened]
    return _reached(lambda entry: [one[:-1] for one in entry.model.identities] == wanted)


def _reached(chosen: Callable[[Entry], bool]) -> dict[Group, Entry]:
    found: list[Entry] = []
    _take_over()
    with userdir.existing() as store:
        for name in _entry_names(store):
            entry = _read(name, store)
            if isinstance(entry, Entry) and chosen(entry) and _reachable(entry):
                found.append(entry)
    found.sort(key=lambda entry: entry.created)
    return {group: entry for entry in found for group in entry.groups}


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
            idle = _idle_s(entry, store)
            stays.append(_take_away(name, store))
            pools.note(entry, f"process {lost.pid}, which held it, was killed", idle)
    drop_replaced()
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


def publish(
    model: Model,
    built: Built,
    store: int,
    *,
    hold: bool = False,
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


def release(chosen: Sequence[Entry], why: str = "released") -> list[Released]:
    """Take these entries out of the store. One that fails reports why and stops no other.

    why: for the journal.
    """
    with userdir.existing() as store:
        done = [_release(entry, store, why) for entry in chosen if store is not None]
    return [one for one in done if one is not None]


def _release(entry: Entry, store: int, why: str, *, unless_used: bool = False) -> Released | None:
    """Take an entry away; None where it went already, or somebody uses it that shall not lose it.

    Who takes a lease meanwhile waits, and finds that it is gone.
    """
    in_use = False
    with ExitStack() as held:
        try:
            folder = held.enter_context(userdir.folder(entry.name, store))
            in_use = not userdir.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return None
        except OSError:  # what is wrong with it shows when it is taken away
            in_use = unless_used  # who cannot be asked may be using it
        if in_use and unless_used:
            return None
        idle = _idle_s(entry, store)
        error = _end(entry.holder) if entry.holder else ""
        error = _take_away(entry.name, store) or error
    if not error:
        pools.note(entry, why, idle)
    return Released(entry, entry.nbytes, in_use, error)


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


@dataclass(frozen=True)
class Use:
    """Who uses an entry, and for how long nobody did. users: "name (pid)" of each process."""

    users: list[str]
    idle_s: float


def uses(of: Sequence[Entry]) -> dict[str, Use]:
    """Return who uses these entries, by name: who has a lease, or their files open or mapped.

    Programs that know nothing of numaload are seen where /proc shows them. Raises: ReadError.
    """
    found: dict[str, list[str]] = {entry.name: [] for entry in of}
    with userdir.existing() as store:
        files = {file: entry for entry in of for file in _files(entry, store)}
        for file, users in users_of(files).items():
            entry = files[file]
            holder = entry.holder.pid if entry.holder else None
            found[entry.name] += [str(user) for user in users if user.pid != holder]
        for entry in of:
            if found[entry.name]:
                with suppress(OSError):
                    os.utime(entry.name, dir_fd=store, follow_symlinks=False)
            elif not _is_free(entry, store):
                found[entry.name] = ["a process that cannot be seen"]
        return {
            entry.name: Use(sorted(set(found[entry.name])), _idle_s(entry, store)) for entry in of
        }


def _files(entry: Entry, store: int | None) -> Iterator[tuple[int, int]]:
    """Yield (st_dev, st_ino) of the entry's folder, which leases have open, and of its files."""
    yield from entry.held
    names = [entry.name]
    for group in entry.groups if not entry.held else ():
        bases = map(os.path.basename, entry.model.paths)
        names += [f"{entry.name}/{folder_of(group)}/{base}" for base in bases]
    for name in names:
        with userdir.named(f"{userdir.path()}/{name}"), suppress(FileNotFoundError):  # it went
            status = os.stat(name, dir_fd=store, follow_symlinks=False)
            yield status.st_dev, status.st_ino


def _is_free(entry: Entry, store: int | None) -> bool:
    """Return whether nobody, in another container either, has a lease."""
    try:
        with userdir.folder(entry.name, store) as folder:
            return userdir.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:  # it went
        return True
    except OSError:  # who cannot be asked may be using it
        return False


def _idle_s(entry: Entry, store: int | None) -> float:
    with suppress(OSError):
        status = os.stat(entry.name, dir_fd=store, follow_symlinks=False)
        return max(0.0, time.time() - status.st_mtime)
    return 0.0


def make_room(needs: Sequence[Need], pool: str, but: Collection[str], whom: str) -> str:
    """Have replicas of a pool go so that these needs fit; the caller holds the lock.

    but: keys of models that stay. whom: for what there shall be room. Nothing goes if all that may
    go is not enough. Returns: why it is not, or "".
    """
    going, why = room(needs, pool, but)
    if not why:
        for entry in going:
            _take(entry, f"room for {whom}")
    return why


def room(needs: Sequence[Need], pool: str, but: Collection[str]) -> tuple[list[Entry], str]:
    """Return what would go for room, in order, and why it is not enough, or ""."""
    own = [e for e in entries() if e.pool == pool and e.model.key not in but and _reachable(e)]
    if not own or not [need for need in needs if not need.fits]:
        return [], f"pool {pool} has nothing that could go"
    used = uses(own)
    may = [entry for entry in own if not entry.keep and not used[entry.name].users]
    going, enough = pools.chosen(may, needs, {name: use.idle_s for name, use in used.items()})
    if enough:
        return going, ""
    stays = ""
    for entry in own:
        users = ", ".join(used[entry.name].users)
        if users or entry.keep:
            stays += f"; {entry.model.paths[0]} is {f'used by {users}' if users else 'kept'}"
    return [], f"what may go of pool {pool} is not enough{stays}"


def collect(machine: Topology, pool: str = "", idle_s: float | None = None) -> list[Released]:
    """Have replicas go that nobody uses: of files that changed, and of pools over their budget.

    pool: only of this one. idle_s: also all that were not used for so long. Those to be kept stay.
    """
    with building():
        found = [entry for entry in entries() if pool in ("", entry.pool) and _reachable(entry)]
        used = uses(found)
        free = [entry for entry in found if not used[entry.name].users]
        why = {e.name: "the file changed" for e in free if e.model.state() == "changed"}
        for entry in free if idle_s is not None else ():
            if not entry.keep and used[entry.name].idle_s >= (idle_s or 0):
                why.setdefault(entry.name, f"not used for {idle_s:g} s or longer")
        idle = {name: use.idle_s for name, use in used.items()}
        for name in sorted({entry.pool for entry in found}):
            left = [entry for entry in found if entry.name not in why]
            may = [e for e in left if e.pool == name and e in free and not e.keep]
            for entry in pools.chosen(may, pools.over(name, left, machine), idle)[0]:
                why[entry.name] = f"pool {name} was over its budget"
        return [one for e in free if e.name in why for one in _take(e, why[e.name])]


def drop_replaced() -> None:
    """Have replicas go that newer ones of the same files replace, where nobody uses them.

    Others go with their last lease, when somebody next builds or looks.
    """
    found = entries()
    newest = {entry.model.paths: entry.model.key for entry in found}
    before = [entry for entry in found if entry.model.key != newest[entry.model.paths]]
    used = uses(before) if before else {}
    for entry in before:
        if not used[entry.name].users and entry.model.state() == "changed":
            _take(entry, "the file changed")


def _take(entry: Entry, why: str) -> list[Released]:
    """Take an entry away unless somebody has a lease by now, and say so."""
    with userdir.existing() as store:
        done = None if store is None else _release(entry, store, why, unless_used=True)
    if done is None:
        return []
    if not done.error:
        warn_once(f"gone {entry.name}", f"{entry.model.paths[0]}: its replicas went: {why}")
    return [done]


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
