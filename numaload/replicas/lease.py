"""Map replicas of the store, so that ``release`` knows that they are in use."""

from __future__ import annotations

import fcntl
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from numaload.errors import (
    NotCopyable,
    NumaloadError,
    ReplicaNotFoundError,
    StoreError,
    check_limits,
    reason,
)
from numaload.linux.lists import Group
from numaload.linux.mapping import MappedMemory, map_file
from numaload.machine import userdir
from numaload.replicas.entry import Entry, folder_of


class Lease(NotCopyable):
    """An entry in use: while this is open, ``release`` says so, and it does not go for room.

    uses: note the time, now and at the end, from which idle time is counted.
    Raises: ReplicaNotFoundError where somebody released it meanwhile.
    """

    __slots__ = ("fd",)  # not in __dict__: who copies that does not own it
    fd: int

    def __init__(self, entry: Entry, *, uses: bool = False) -> None:
        self.entry, self.uses, self.fd = entry, uses, -1
        with userdir.existing() as store, self._gone():
            if store is None:
                raise FileNotFoundError
            self.fd = os.open(entry.name, userdir.DIRECTORY, dir_fd=store)
        try:
            userdir.flock(self.fd, fcntl.LOCK_SH)
            self.note_use()
        except BaseException:
            self.close()
            raise

    def map(self, group: Group) -> list[MappedMemory]:
        """Map the files of the replica on these nodes, read-only. Raises: StoreError."""
        with self._gone(), userdir.folder(folder_of(group), self.fd) as folder:
            return [
                _map_replica(self.entry, self.entry.path(group, i), identity.size, folder)
                for i, identity in enumerate(self.entry.model.identities)
            ]

    @contextmanager
    def _gone(self) -> Iterator[None]:
        where, source = f"{userdir.path()}/{self.entry.name}", self.entry.model.paths[0]
        try:
            yield
        except NumaloadError:
            raise
        except FileNotFoundError as error:
            went = "was released or removed"
            if os.path.exists(where):  # only files in it: nothing mends that but a new one
                went = f"lacks files, which were removed: {_remedy(self.entry)}"
            raise ReplicaNotFoundError(f"{source}: its replica ({where}) {went}") from error
        except OSError as error:
            check_limits(error, where)
            raise StoreError(
                f"{source}: its replica cannot be opened: {where}: {reason(error)}"
            ) from error

    def note_use(self) -> None:
        if self.uses:
            with suppress(OSError):
                os.utime(self.fd)

    def close(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.note_use()
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def damage(entry: Entry) -> str:
    """Return what is wrong with the replicas' files, or ""; their bytes are not looked at."""
    for group in entry.groups:
        for i, identity in enumerate(entry.model.identities):
            path = entry.path(group, i)
            try:
                status = os.stat(path, follow_symlinks=entry.holder is not None)
            except OSError as error:
                return f"{path}: {reason(error)}"
            if entry.holder is None and (wrong := _wrong(status, identity.size)):
                return f"{path} {wrong}"
    return ""


def _map_replica(entry: Entry, path: str, size: int, folder: int) -> MappedMemory:
    if entry.holder is not None:
        fd = _open_held(entry, path, folder)
    else:
        # A FIFO would otherwise be waited for.
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(os.path.basename(path), flags, dir_fd=folder)
    try:
        if wrong := _wrong(os.fstat(fd), size):
            raise StoreError(f"replica {path} {wrong}; {_remedy(entry)}")
        return map_file(fd, size)
    finally:
        os.close(fd)


def _wrong(status: os.stat_result, size: int) -> str:
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        return "is not a file of this user's"
    if status.st_nlink > 1:
        return f"has {status.st_nlink} names, expected this alone"
    return f"has {status.st_size} bytes, expected {size}" if status.st_size != size else ""


def _remedy(entry: Entry) -> str:
    return f"release it, then mirror again: numaload release {shlex.quote(entry.model.paths[0])}"


def _open_held(entry: Entry, path: str, folder: int) -> int:
    """Open what the link leads to, after checking that it is what the holder was given.

    Another process may have the pid by now.
    """
    found = os.open(os.path.basename(path), os.O_PATH | os.O_CLOEXEC, dir_fd=folder)
    try:
        status = os.fstat(found)
        if (status.st_dev, status.st_ino) not in entry.held:
            pid = entry.holder.pid if entry.holder else None
            raise StoreError(
                f"replica {path} is not what process {pid} was given to hold; {_remedy(entry)}"
            )
        return os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(found)
