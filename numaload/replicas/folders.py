"""Write folders of entries so that they appear whole, and remove them without what is foreign."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from numaload import trace
from numaload.errors import ReadError, ReplicaNotFoundError, StoreError, reason, warn_once
from numaload.machine import userdir

PARTS = ".parts"  # ends the names of files that are not whole: nobody takes them for models
MANIFEST, LOCK = "manifest.json", "lock"
ASIDE = re.compile(rf"\.{MANIFEST}\.[0-9a-f]{{8}}")  # while it is written
# Of a node's replica, or of links for those who ask for it by another name or folder.
NODES = re.compile(r"node[0-9,-]+(\.[0-9a-f]{32})?")
LINK, BESIDE = re.compile(r"/proc/\d+/fd/\d+"), re.compile(r"\.\./node[0-9,-]+/[^/]+")
REPLICA_MODE = 0o400
MOST_LINKS = 10_000  # in the folder of a replica
# Errors that say that there is nothing, or no entry. EPERM is raised here, for other file systems.
NO_ENTRY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EPERM)

Links = Sequence[tuple[str, str, str]]  # (folder in the entry, file name, what it leads to)


@contextmanager
def alone(store: int, *, wait: bool = False) -> Iterator[bool]:
    """Lock the store; yield whether nobody else builds there until this ends.

    wait: for who builds now, else the store is left as it is. Raises: StoreError.
    """
    flags, pid = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, os.getpid()
    try:
        lock = os.open(LOCK, flags, 0o600, dir_fd=store)
    except OSError as error:
        why = f"{userdir.path()}/{LOCK}: {reason(error)}"
        if wait:
            raise StoreError(why) from error
        warn_once("lock", f"{why}; what others left there stays")
        yield False
        return
    try:
        free = userdir.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if wait and not free:
            warn_once("building", "another process is building replicas; waiting for it")
            with trace.span("wait"):
                free = userdir.flock(lock, fcntl.LOCK_EX)
        yield free
    finally:
        try:
            # Closing alone would leave it locked where a child was forked meanwhile; in the child
            # the lock is the parent's.
            if os.getpid() == pid:
                userdir.flock(lock, fcntl.LOCK_UN)
        finally:
            os.close(lock)


def write(name: str, manifest: bytes, files: Links, store: int, *, held: bool = False) -> None:
    """Write an entry: all of it appears at once, by one rename. Raises: OSError.

    files: what the names are given to. held: to be linked to, where a process has it open.
    """
    aside = f".{name}"
    try:
        os.mkdir(aside, 0o700, dir_fd=store)
        with userdir.folder(aside, store) as folder:
            userdir.write_whole(MANIFEST, manifest, folder)
            for node in dict.fromkeys(node for node, _, _ in files):
                os.mkdir(node, 0o700, dir_fd=folder)
            for node, file, target in files:
                if held:
                    os.symlink(target, f"{node}/{file}", dir_fd=folder)
                else:  # only with a dir_fd does link follow that of /proc to a nameless file
                    os.link(target, f"{node}/{file}", dst_dir_fd=folder)
        os.rename(aside, name, src_dir_fd=store, dst_dir_fd=store)
    except BaseException:
        remove(aside, store)
        raise


def link_others(folder: str, source: str, apart: Mapping[str, str]) -> str:
    """Link everything in ``source`` that a replica's folder has no file for; return the folder.

    apart: {name asked for: the replica's} where it was mirrored by other names or from another
    folder: who asks so gets a folder of links beside the replica's, and nobody else's files.
    Links that lead to what is no more there are taken away. Raises: StoreError, ReadError;
    ReplicaNotFoundError where the replica was released meanwhile, and its folder with it.
    """
    try:
        names = [name for name in os.listdir(source) if not name.startswith(".")]
    except OSError as error:
        raise ReadError(reason(error), path=source) from error
    if len(names) > MOST_LINKS:
        raise StoreError(f"{source}: {len(names)} files, expected at most {MOST_LINKS} to link")
    links = {name: os.path.join(source, name) for name in names}
    try:
        if apart:
            from numaload.files.source import digest  # not in holders, which link nothing

            own = os.path.basename(folder)
            links |= {name: f"../{own}/{replica}" for name, replica in apart.items()}
            folder += f".{digest(os.fsencode('/'.join((source, *apart))))}"
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
        with userdir.folder(folder, None) as inside:
            _link_others(inside, source, links)
    except FileNotFoundError as error:
        raise ReplicaNotFoundError(
            f"{folder}: the replica was released since it was attached, its folder is gone"
        ) from error
    except OSError as error:
        raise StoreError(f"{folder}: cannot link the source's files: {reason(error)}") from error
    return folder


def _link_others(inside: int, source: str, links: Mapping[str, str]) -> None:
    there = set(os.listdir(inside))
    for name in there.difference(links):
        if _target(name, inside) == os.path.join(source, name):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=inside)
    for name in set(links).difference(there):
        with suppress(FileExistsError):
            os.symlink(links[name], name, dir_fd=inside)


def _target(name: str, folder: int) -> str:
    """Return what a link leads to; "" for what is no link."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:
        return ""


def _is_link(name: str, folder: int) -> bool:
    """Return whether this is a link as ``link_others`` makes them, of whatever source's folder."""
    target = _target(name, folder)
    return os.path.basename(target) == name or BESIDE.fullmatch(target) is not None


def remove(name: str, store: int) -> bool:
    """Remove an entry, following no link and entering no other file system.

    Files that numaload did not make stay, and so do their folders. Returns: True if replicas stay,
    or may stay because the folder cannot be read.
    """
    try:
        folder = _below(name, store)
        try:
            stays = _empty(folder, _named(folder))
        finally:
            os.close(folder)
    except OSError as error:
        stays = error.errno not in NO_ENTRY
    with suppress(OSError):
        os.rmdir(name, dir_fd=store)
    return stays


def _below(name: str, parent: int) -> int:
    folder = os.open(name, userdir.DIRECTORY, dir_fd=parent)
    if os.fstat(folder).st_dev != os.fstat(parent).st_dev:
        os.close(folder)
        raise PermissionError(errno.EPERM, "is another file system", name)
    return folder


def _named(folder: int) -> dict[str, str] | None:
    """Return {replica's name: size} by the manifest, None without one. Raises: OSError."""
    try:
        # Numbers may be of any length.
        row = json.loads(userdir.read_owned(MANIFEST, folder), parse_int=str)
        if row["version"].isdecimal():
            paths = list(map(str, row["model"]["paths"]))
            sizes = {os.path.basename(path) + end: "" for path in paths for end in ("", PARTS)}
            with suppress(LookupError, TypeError):  # damaged: the mode of a replica is enough
                found = [i[2] for i in row["model"]["identities"] for _ in ("", PARTS)]
                sizes.update(zip(sizes, found))  # noqa: B905
            return sizes
    except FileNotFoundError:
        return None
    except userdir.UNREADABLE as error:
        if isinstance(error, OSError) and not isinstance(error, StoreError):
            raise
    raise PermissionError(errno.EPERM, "is no manifest of an entry", MANIFEST)


def _empty(folder: int, sizes: dict[str, str] | None) -> bool:
    """Remove what is in an entry; return whether replicas stay.

    The manifest goes last: it tells who goes on after a kill which files are replicas.
    """
    stays = False
    for node in filter(NODES.fullmatch, os.listdir(folder)):
        stays |= _empty_node(node, folder, sizes)
    found = os.listdir(folder)
    if not any(map(NODES.fullmatch, found)):
        for file in found:
            if file == MANIFEST or ASIDE.fullmatch(file):
                with suppress(FileNotFoundError):  # others remove it at the same time
                    os.unlink(file, dir_fd=folder)
    return stays


def _empty_node(node: str, folder: int, sizes: dict[str, str] | None) -> bool:
    """Remove a node's replicas and links to others; return whether any replicas stay.

    Errors stop neither others nor this.
    """
    stays = False
    try:
        inside = _below(node, folder)
        try:
            for file in os.listdir(inside):
                if _is_link(file, inside):
                    with suppress(FileNotFoundError):
                        os.unlink(file, dir_fd=inside)
                elif sizes is None or file in sizes:
                    stays |= not _unlink(file, inside, sizes or {}) and sizes is not None
        finally:
            os.close(inside)
    except OSError as error:
        stays |= error.errno not in NO_ENTRY
    with suppress(OSError):
        os.rmdir(node, dir_fd=folder)
    return stays


def _unlink(name: str, folder: int, sizes: dict[str, str]) -> bool:
    """Remove this if it looks like a replica; return whether it is gone."""
    try:
        if _is_replica(name, folder, sizes):
            os.unlink(name, dir_fd=folder)
    except OSError as error:
        return error.errno == errno.ENOENT
    return True


def _is_replica(name: str, folder: int, sizes: dict[str, str]) -> bool:
    """Return whether this looks like a replica: a holder's link, or a file of its mode or size."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return LINK.fullmatch(os.readlink(name, dir_fd=folder)) is not None
    is_its_size = stat.S_ISREG(status.st_mode) and str(status.st_size) == sizes.get(name)
    return is_its_size or status.st_mode == stat.S_IFREG | REPLICA_MODE
