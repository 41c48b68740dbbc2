"""Replicas held by a process: memfds, which neither a tmpfs' size nor a logout takes away.

Shared memory without a name lives as long as somebody has it open. The holder does, and nothing
else; the files of the entry are links to /proc/PID/fd/N. Once a second it looks whether the entry
is still there, and publishes it again, whoever emptied the folder. SIGTERM takes the entry away,
and the end of the process its memory. It maps nothing of what it holds, so the OOM killer sees a
small process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from numaload.errors import StoreError
from numaload.holder.process import HolderProcess, portable, start
from numaload.machine import userdir
from numaload.replicas import folders

if TYPE_CHECKING:
    from numaload.holder.main import Host

NAME = "numaload-hold"
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
F_SEAL_FUTURE_WRITE = 0x10  # linux/fcntl.h, since Linux 5.1


def hold(
    name: str, manifest: dict[str, Any], files: Sequence[tuple[str, str, int]]
) -> HolderProcess:
    """Seal these memfds, and have a new process hold them and publish them as the entry ``name``.

    files: (folder in the entry, file name, descriptor). The manifest gets two keys more:
    "pid_namespace", and "holder" with "pid", "start" and "files", the (st_dev, st_ino) of each.
    The caller holds the store's lock, and may close the descriptors after.
    Raises: StoreError: then nothing is published and nothing held. OSError for other files.
    """
    with ExitStack() as copies:
        given = [
            (folder, portable(file), _above_standard(fd, copies)) for folder, file, fd in files
        ]
        fds = [fd for _, _, fd in given]
        for fd in fds:
            _seal(fd)
        identities = [(status.st_dev, status.st_ino) for status in map(os.fstat, fds)]
        manifest = manifest | {"holder": {"files": identities}}
        arguments = {"name": name, "manifest": manifest, "files": given}
        try:
            return start(NAME, arguments, fds)[0]
        except StoreError as error:
            where = userdir.path()
            raise StoreError(f"{where}: replicas cannot be held: {error}") from error


def _above_standard(fd: int, copies: ExitStack) -> int:
    """Return the descriptor under a number that is not the holder's standard input's or output's.

    In a process without standard input a memfd may have such a number.
    """
    if fd > 2:
        return fd
    copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    copies.callback(os.close, copy)
    return copy


def _seal(fd: int) -> None:
    """Let nobody write, shrink or grow this memfd any more; mappings that are there stay.

    Kernels before 5.1 cannot forbid writing: there its mode does, to all but its owner.
    Raises: OSError for what is no memfd that may be sealed.
    """
    os.fchmod(fd, stat.S_IRUSR)
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS | F_SEAL_FUTURE_WRITE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)


# --- in the holder ------------------------------------------------------------------------------


def run(host: Host, name: str, manifest: dict[str, Any], files: Sequence[Sequence[Any]]) -> None:
    """Publish the entry, and keep it until SIGTERM."""
    entry = _HeldEntry(host.process, name, manifest, files)
    entry.publish()
    try:
        with suppress(BrokenPipeError):  # the builder did not wait: for it, nothing is published
            host.answer()
            host.keep(entry)
    finally:
        entry.withdraw()


class _HeldEntry:
    """An entry of the store, written as often as it must be."""

    def __init__(
        self,
        process: HolderProcess,
        name: str,
        manifest: dict[str, Any],
        files: Sequence[Sequence[Any]],
    ) -> None:
        self.name = name
        holder = manifest["holder"] | {"pid": process.pid, "start": process.start}
        told = manifest | {"holder": holder, "pid_namespace": process.namespace}
        self.manifest = json.dumps(told).encode()
        self.links = [(node, file, f"/proc/{process.pid}/fd/{fd}") for node, file, fd in files]
        self.seen = (0, 0)  # the manifest that was looked at last

    def publish(self) -> None:
        """Write it for the first time: the builder holds the lock. Raises: StoreError, OSError."""
        with userdir.opened() as store:
            self._write(store)

    def tend(self) -> None:
        """See to it that the entry is there, unless somebody builds now. Raises: OSError."""
        with userdir.opened() as store:
            if self._is_there(store):
                self._take_over(store)
                return
            with folders.alone(store) as alone:  # a sweep would take what is half written
                if alone:
                    self._write(store)

    def _take_over(self, store: int) -> None:
        """Remember what others wrote into the manifest: its pool, and whether it is kept."""
        with suppress(*userdir.UNREADABLE), userdir.folder(self.name, store) as folder:
            status = os.stat(folders.MANIFEST, dir_fd=folder, follow_symlinks=False)
            seen, self.seen = self.seen, (status.st_ino, status.st_mtime_ns)
            if seen == self.seen:  # asked every second, and it may be long
                return
            found = userdir.read_owned(folders.MANIFEST, folder)
            if json.loads(found)["holder"] == json.loads(self.manifest)["holder"]:
                self.manifest = found

    def withdraw(self) -> None:
        """Take it away by one rename; a sweep may remove the rest at the same time."""
        with suppress(OSError), userdir.existing() as store:
            if store is not None:
                os.rename(self.name, f".{self.name}", src_dir_fd=store, dst_dir_fd=store)
                folders.remove(f".{self.name}", store)

    def _is_there(self, store: int) -> bool:
        inside = [folders.MANIFEST, *(f"{node}/{file}" for node, file, _ in self.links)]
        try:
            for path in inside:
                os.stat(f"{self.name}/{path}", dir_fd=store, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _write(self, store: int) -> None:
        for left in (f".{self.name}", self.name):  # what somebody left of it
            folders.remove(left, store)
        folders.write(self.name, self.manifest, self.links, store, held=True)
