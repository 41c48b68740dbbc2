"""How replicas leave the store: released, for room, replaced, or after their holder was killed.

What somebody uses goes only where it is released: it loses its names then, and its memory comes
back with its last user.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from numaload import trace
from numaload.errors import NumaloadError, StoreError, UsageError, warn_once
from numaload.holder.process import HolderProcess
from numaload.linux.users import users_of
from numaload.machine import userdir
from numaload.machine.topology import Topology
from numaload.replicas import folders, pools
from numaload.replicas import store as stored
from numaload.replicas.entry import Entry, folder_of, holder_of
from numaload.replicas.folders import MANIFEST
from numaload.replicas.lease import damage
from numaload.replicas.plan import Need

PAUSES_S = (0.01,) * 10  # in which others may end what they began to remove
_local = threading.local()


@contextmanager
def building() -> Iterator[int]:
    """Hold the store for one builder: its plan stays true while it builds. Waits for others.

    Yields the store's descriptor, cleared of what killed builders left.
    """
    stored.take_over()
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
    stored.take_over()
    with userdir.existing() as store:
        if store is not None:
            with folders.alone(store) as alone:
                if alone:
                    return _sweep(store)
    return []


@trace.spanned("store")
def _sweep(store: int) -> list[str]:
    """Clear what killed processes left; return why replicas stay, if any do."""
    left = [name for name in userdir.listed(store) if userdir.ENTRY.fullmatch(name[1:])]
    stays = [_remove(name, store) for name in left if name.startswith(".")]
    for name in stored.entry_names(store):
        entry = stored.read(name, store)
        lost = _lost(entry) if isinstance(entry, Entry) else None
        if isinstance(entry, Entry) and lost and stored.has(name, store):
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
    used: set[str] = set()
    with suppress(NumaloadError):  # they are released whoever uses them
        used = {name for name, use in uses(chosen).items() if use.users}
    with userdir.existing() as store:
        done = [_release(entry, store, why) for entry in chosen if store is not None]
    return [replace(one, in_use=one.in_use or one.entry.name in used) for one in done if one]


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
        names += [f"{entry.name}/{folder_of(group)}/{file}" for file in entry.file_names]
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
    own = [
        e
        for e in stored.entries()
        if e.pool == pool and e.model.key not in but and stored.reachable(e)
    ]
    if not own or not [need for need in needs if not need.fits]:
        return [], f"pool {pool} has nothing that could go"
    used = uses(own)
    may = [entry for entry in own if not entry.keep and not used[entry.name].users]
    going, enough = pools.chosen(may, needs, {name: use.idle_s for name, use in used.items()})
    if enough:
        return going, ""
    return [], f"what may go of pool {pool} is not enough{_staying(own, used)}"


def _staying(entries: Sequence[Entry], used: Mapping[str, Use]) -> str:
    """Say of each entry that may not go why it stays."""
    said = ""
    for entry in entries:
        users = ", ".join(used[entry.name].users)
        if users or entry.keep:
            said += f"; {entry.model.paths[0]} is {f'used by {users}' if users else 'kept'}"
    return said


def tell_over(entries: Sequence[Entry], used: Mapping[str, Use], machine: Topology) -> None:
    """Say which pools are over their budget, and why."""
    for pool in sorted({entry.pool for entry in entries}):
        own = [entry for entry in entries if entry.pool == pool]
        for need in pools.over(pool, own, machine):
            over = f"{need.name}: {-(need.free or 0)} bytes over its budget{_staying(own, used)}"
            warn_once(over, over)


def _of_pool(pool: str) -> list[Entry]:
    """Return what may be reclaimed of this pool, or of all if it is ""."""
    found = stored.entries()
    return [e for e in found if pool in ("", e.pool) and stored.reachable(e)]


def collect(machine: Topology, pool: str = "", idle_s: float | None = None) -> list[Released]:
    """Have replicas go that nobody uses: of files that changed, and of pools over their budget.

    pool: only of this one. idle_s: also all that were not used for so long. Those to be kept stay.
    """
    with building():
        found = [
            entry
            for entry in stored.entries()
            if pool in ("", entry.pool) and stored.reachable(entry)
        ]
        used = uses(found)
        free = [entry for entry in found if not used[entry.name].users]
        changed = (e for e in free if not e.keep and e.model.state() == "changed")
        why = {e.name: "the file changed" for e in changed}
        for entry in free if idle_s is not None else ():
            if not entry.keep and used[entry.name].idle_s >= (idle_s or 0):
                why.setdefault(entry.name, f"not used for {idle_s:g} s or longer")
        idle = {name: use.idle_s for name, use in used.items()}
        for name in sorted({entry.pool for entry in found}):
            left = [entry for entry in found if entry.name not in why]
            may = [e for e in left if e.pool == name and e in free and not e.keep]
            for entry in pools.chosen(may, pools.over(name, left, machine), idle)[0]:
                why[entry.name] = f"pool {name} was over its budget"
        done = [one for e in free if e.name in why for one in _take(e, why[e.name])]
        gone = {one.entry.name for one in done}
        tell_over([entry for entry in found if entry.name not in gone], used, machine)
        return done


def drop_replaced() -> None:
    """Have replicas go that newer ones of the same files replace, where nobody uses them.

    Others go with their last lease, when somebody next builds or looks.
    """
    found = stored.entries()
    newest = {entry.model.paths: entry.model.key for entry in found}
    before = [entry for entry in found if entry.model.key != newest[entry.model.paths]]
    used = uses(before) if before else {}
    for entry in before:
        if not used[entry.name].users and entry.model.state() == "changed":
            _take(entry, "the file changed")


def drop_damaged(keys: Collection[str]) -> None:
    """Release replicas of these models that lack files or ends of files: they are built again."""
    for entry in stored.entries():
        if entry.model.key not in keys or not stored.reachable(entry):
            continue
        if (why := damage(entry)) and stored.is_there(entry):  # or else it was released just now
            text = f"{entry.model.paths[0]}: a damaged replica is built again: {why}"
            warn_once(f"gone {entry.name}", text)
            release([entry], f"damaged: {why}")


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
        damaged = stored.scan()[1]
        for name in damaged:
            _end_damaged(name, store)
            folders.remove(name, store)
        stays |= {name for name in damaged if stored.has(name, store)}
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
        if not stored.has(name, store):
            return ""
        time.sleep(pause)
    why = f"{userdir.path()}/{name} stays: some of it cannot be removed, or is not numaload's"
    if replicas:
        return why
    warn_once(why, why)
    return ""
