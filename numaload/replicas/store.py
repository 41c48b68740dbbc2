"""The store: replicas in shared memory that outlive their builder, for every process of the user.

::

    /dev/shm/numaload-1000/           0700, this user's
        lock                          held while something is built: two plans cannot share room
        known/KEY.json                models that were used since boot
        KEY.TOKEN/                    one entry: appears by one rename, disappears by one
            manifest.json             whose replicas, on which nodes, checksums
            node0/model.gguf          0400; the file itself, so that other engines can map it too
            node1/model.gguf

KEY is made of the identities of all files of the model, so a changed file finds nothing. A model
may have several entries, for nodes that were mirrored later. Attached processes hold a shared lock
on the entry's folder; releasing takes the names away, the memory goes when the last one closes.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from numaload.errors import ReplicaNotFoundError, StoreError, warn_once
from numaload.numa.mapping import Mapping, map_file
from numaload.replicas.build import CHUNK, Built
from numaload.storage import userdir
from numaload.storage.known import Model

VERSION = 1
MANIFEST, LOCK = "manifest.json", "lock"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
TOKEN_BYTES = 4


@dataclass(frozen=True)
class Entry:
    """Replicas of one model that were built together."""

    name: str  # of its folder in the store
    model: Model
    nodes: tuple[int, ...]
    checksums: tuple[tuple[int, ...], ...]
    created: float  # seconds since the epoch
    seconds: float  # that building took

    def path(self, node: int, i: int) -> str:
        """Where the replica of file ``i`` on ``node`` can be opened by anyone of this user."""
        return f"{userdir.path()}/{self.name}/node{node}/{os.path.basename(self.model.paths[i])}"

    def to_json(self) -> bytes:
        row = {
            "version": VERSION,
            "model": json.loads(self.model.to_json()),
            "nodes": self.nodes,
            "chunk": CHUNK,
            "checksums": [[f"{c:016x}" for c in row] for row in self.checksums],
            "created": self.created,
            "seconds": self.seconds,
        }
        return json.dumps(row).encode()

    @classmethod
    def from_json(cls, name: str, text: bytes) -> Entry:
        """Raises: ValueError, TypeError, KeyError for what to_json did not write."""
        row = json.loads(text)
        if (row["version"], row["chunk"]) != (VERSION, CHUNK):
            raise ValueError("built by another version of numaload")
        sums = tuple(tuple(int(c, 16) for c in sums) for sums in row["checksums"])
        model = Model.from_json(json.dumps(row["model"]).encode())
        created, seconds = float(row["created"]), float(row["seconds"])
        entry = cls(name, model, tuple(row["nodes"]), sums, created, seconds)
        entry._check()
        return entry

    def _check(self) -> None:
        """Fewer checksums than chunks would let the rest pass unseen when it is verified."""
        names = [os.path.basename(path) for path in self.model.paths]
        chunks = [-(-identity.size // CHUNK) for identity in self.model.identities]
        expected = {
            "nodes": all(type(node) is int and node >= 0 for node in self.nodes) and self.nodes,
            "file names": names and not {"", ".", ".."} & set(names),
            "checksums": [len(row) for row in self.checksums] == chunks,
        }
        wrong = [what for what, holds in expected.items() if not holds]
        if wrong:
            raise ValueError(f"wrong {', '.join(wrong)}")


def entries() -> list[Entry]:
    """Everything in the store, oldest first; what cannot be read is left out and said."""
    found, damaged = _scan()
    for name, why in damaged.items():
        warn_once(
            f"damaged {name}",
            f"{userdir.path()}/{name}: no entry that can be read ({why}); left out;"
            " numaload release without FILE takes it away",
        )
    return found


def _scan() -> tuple[list[Entry], dict[str, str]]:
    """Entries, oldest first, and {name: what is wrong with it} of what is none."""
    found: list[Entry] = []
    damaged: dict[str, str] = {}
    with userdir.opened(create=False) as store:
        for name in _entry_names(store) if store is not None else ():
            entry = _read(name, store)
            if isinstance(entry, Entry):
                found.append(entry)
            elif _is_there(name, store):  # or else it was released by someone just now
                damaged[name] = entry
    return sorted(found, key=lambda entry: entry.created), damaged


def _read(name: str, store: int | None) -> Entry | str:
    """The entry, or why it is none."""
    try:
        with _folder(name, store) as folder:
            return Entry.from_json(name, userdir.read_owned(MANIFEST, folder))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        return str(error) or type(error).__name__


def _entry_names(store: int) -> list[str]:
    """A dot in front: not there yet, or no more."""
    return [n for n in os.listdir(store) if "." in n and not n.startswith(".")]


def is_there(entry: Entry) -> bool:
    with userdir.opened(create=False) as store:
        return store is not None and _is_there(entry.name, store)


def _is_there(name: str, store: int | None) -> bool:
    try:
        os.stat(name, dir_fd=store, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def _folder(name: str, parent: int | None) -> Iterator[int]:
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


def find(model: Model) -> list[Entry]:
    """Entries of exactly this model: same files, unchanged."""
    return [entry for entry in entries() if entry.model.key == model.key]


class Lease:
    """An entry in use: while this is open, ``release`` says so.

    Raises: ReplicaNotFoundError where somebody released it meanwhile.
    """

    fd = -1

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        with userdir.opened(create=False) as store, self._gone():
            if store is None:
                raise FileNotFoundError
            self.fd = os.open(entry.name, DIRECTORY, dir_fd=store)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_SH)
        except BaseException:
            self.close()
            raise

    def map(self, node: int) -> list[Mapping]:
        """The replica's files on this node, read-only. Raises: StoreError."""
        mappings = []
        with self._gone(), _folder(f"node{node}", self.fd) as folder:
            for path, identity in zip(
                self.entry.model.paths, self.entry.model.identities, strict=True
            ):
                mappings.append(_map_replica(os.path.basename(path), identity.size, folder))
        return mappings

    @contextmanager
    def _gone(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            where = f"{userdir.path()}/{self.entry.name}"
            raise ReplicaNotFoundError(
                f"{self.entry.model.paths[0]}: its replica ({where}) was released or removed"
            ) from error

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        self.close()


def _map_replica(name: str, size: int, folder: int) -> Mapping:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreError(f"replica {name} is not a file of this user's")
        if status.st_size != size:
            raise StoreError(f"replica {name} has {status.st_size} bytes, expected {size}")
        return map_file(fd, size)
    finally:
        os.close(fd)


@contextmanager
def building() -> Iterator[int]:
    """Hold the store for one builder: its plan stays true while it builds. Waits for others.

    Yields the store's descriptor, cleared of what killed builders left.
    """
    with userdir.opened() as store:
        if store is None:
            raise StoreError(f"{userdir.path()} cannot be made")
        userdir.check_tmpfs(store)
        lock = _lock_file(store)
        try:
            if not _try_lock(lock):
                warn_once("building", "another process is building replicas; waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            _sweep(store)
            yield store
        finally:
            os.close(lock)


def sweep() -> None:
    """Clear what killed processes left, unless someone is building now."""
    with userdir.opened(create=False) as store:
        if store is None:
            return
        lock = _lock_file(store)
        try:
            if _try_lock(lock):
                _sweep(store)
        finally:
            os.close(lock)


def _lock_file(store: int) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(LOCK, flags, 0o600, dir_fd=store)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sweep(store: int) -> None:
    for name in os.listdir(store):
        if name.startswith("."):
            _remove(name, store)


def publish(model: Model, built: Built, store: int) -> Entry:
    """Give the nameless files their names: all of them appear at once, by one rename."""
    nodes = tuple(built.arenas)
    name = f"{model.key}.{secrets.token_hex(TOKEN_BYTES)}"
    sums = tuple(tuple(row) for row in built.checksums)
    entry = Entry(name, model, nodes, sums, time.time(), built.seconds)
    aside = f".{name}"
    try:
        os.mkdir(aside, 0o700, dir_fd=store)
        with _folder(aside, store) as folder:
            for node, arenas in built.arenas.items():
                os.mkdir(f"node{node}", 0o700, dir_fd=folder)
                with _folder(f"node{node}", folder) as inside:
                    for path, arena in zip(model.paths, arenas, strict=True):
                        # Only a call with a dir_fd follows the link of /proc to the nameless file.
                        os.link(
                            f"/proc/self/fd/{arena.fd}", os.path.basename(path), dst_dir_fd=inside
                        )
            userdir.write_whole(MANIFEST, entry.to_json(), folder)
        os.rename(aside, name, src_dir_fd=store, dst_dir_fd=store)
    except BaseException:
        _remove(aside, store)
        raise
    return entry


@dataclass(frozen=True)
class Released:
    entry: Entry
    nbytes: int
    in_use: bool  # then the memory goes when the processes that use it close it

    def to_dict(self) -> dict[str, Any]:
        e = self.entry
        return {
            "paths": e.model.paths,
            "nodes": e.nodes,
            "nbytes": self.nbytes,
            "in_use": self.in_use,
        }


def release(chosen: Sequence[Entry]) -> list[Released]:
    """Take these entries out of the store."""
    done = []
    with userdir.opened(create=False) as store:
        for entry in chosen if store is not None else ():
            try:
                with _folder(entry.name, store) as folder:
                    in_use = not _try_lock(folder)
                    _take_away(entry.name, store)
            except FileNotFoundError:
                continue  # someone else released it just now
            done.append(Released(entry, entry.model.size * len(entry.nodes), in_use))
    return done


def release_damaged() -> list[str]:
    """Take away what is in the place of entries and cannot be read as one; its paths."""
    with userdir.opened(create=False) as store:
        names = [name for name in _scan()[1] if _take_away(name, store)]
    return [f"{userdir.path()}/{name}" for name in names]


def _take_away(name: str, store: int | None) -> bool:
    assert store is not None  # noqa: S101 - what has a name is in a store
    os.rename(name, f".{name}", src_dir_fd=store, dst_dir_fd=store)
    _remove(f".{name}", store)
    return True


def _remove(name: str, parent: int) -> None:
    """Remove a file or folder tree below the descriptor, following no link."""
    try:
        for _, folders, files, fd in os.fwalk(name, topdown=False, dir_fd=parent):
            for file in files:
                os.unlink(file, dir_fd=fd)
            for folder in folders:
                os.rmdir(folder, dir_fd=fd)
        os.rmdir(name, dir_fd=parent)
    except NotADirectoryError:
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
