"""The process that holds replicas: a script on the standard library alone, started by holder.py.

It gets memfds that are filled, one line of JSON on its standard input, and answers with one line:

    {"store": path, "marker": name, "name": entry, "manifest": {...}, "locked": true,
     "links": [["node0", "model.gguf", descriptor], ...]}
    {"pid": 4711, "error": null}

The entry in the store is a folder like any other, its files are links to /proc/PID/fd/N. Once a
second it is looked whether the entry is still there; whoever emptied the folder, it is published
again. SIGTERM ends the holder and takes the entry away first; with it goes the memory.

It maps nothing of what it holds, so the OOM killer sees a process of about 10 MB, and its score
stays as it was.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import stat
import sys
from contextlib import suppress

NAME = "numaload-hold"  # of the process: at most 15 characters
INTERVAL_S = 1.0
MANIFEST, LOCK = "manifest.json", "lock"  # of the store, which takes them from here
ASIDE = re.compile(rf"\.{MANIFEST}\.[0-9a-f]{{8}}")  # while it is written
NODES, LINK = re.compile(r"node[0-9,-]+"), re.compile(r"/proc/\d+/fd/\d+")
REPLICA_MODE = 0o400
MOST = 16 << 20  # bytes of a manifest
# Errors that say that there is nothing, or no entry. EPERM is raised here, for other file systems.
NO_ENTRY = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EPERM)
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Held:
    """An entry of the store, as often as it must be written. ``line`` is the builder's."""

    def __init__(self, line: bytes) -> None:
        row, pid = json.loads(line), os.getpid()
        self.store, self.name, self.locked = row["store"], row["name"], row["locked"]
        self.marker, self.device = row["marker"], 0
        self.links = [(node, name, f"/proc/{pid}/fd/{fd}") for node, name, fd in row["links"]]
        row["manifest"]["holder"].update(pid=pid, start=started(pid))
        self.manifest = json.dumps(row["manifest"]).encode()

    def tend(self) -> None:
        """See to it that the entry is there. Raises: OSError, also while somebody else builds."""
        store = opened(self.store)
        try:
            if self._is_there(store):
                return
            self._check(store)
            if self.locked:  # by the builder, for the first time
                self._write(store)
                return
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            lock = os.open(LOCK, flags, 0o600, dir_fd=store)
            try:  # A sweep would take the folder that is not published yet.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._write(store)
            finally:
                os.close(lock)
        finally:
            os.close(store)

    def _check(self, store: int) -> None:
        """Mark the folder if it is empty, as after a logout. Raises: OSError if it is not ours."""
        device = os.fstat(store).st_dev
        self.device = self.device or device
        if device != self.device:
            raise PermissionError(1, "is on another file system than before", self.store)
        found = os.listdir(store)
        if found and self.marker not in found:
            raise PermissionError(1, "was not made by numaload", self.store)
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        os.close(os.open(self.marker, flags, 0o600, dir_fd=store))

    def _is_there(self, store: int) -> bool:
        inside = [MANIFEST, *(f"{node}/{name}" for node, name, _ in self.links)]
        try:
            for path in inside:
                os.stat(f"{self.name}/{path}", dir_fd=store, follow_symlinks=False)
        except OSError:
            return False
        return True

    def _write(self, store: int) -> None:
        """Aside, then by one rename: it appears whole or not at all."""
        aside = f".{self.name}"
        remove(aside, store)
        try:
            os.mkdir(aside, 0o700, dir_fd=store)
            folder = os.open(aside, DIRECTORY, dir_fd=store)
            try:
                self._fill(folder)
            finally:
                os.close(folder)
            remove(self.name, store)  # what somebody left of it
            os.rename(aside, self.name, src_dir_fd=store, dst_dir_fd=store)
        except BaseException:
            remove(aside, store)
            raise

    def _fill(self, folder: int) -> None:
        aside = f".{MANIFEST}.{os.getpid():08x}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(aside, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(self.manifest)
        os.rename(aside, MANIFEST, src_dir_fd=folder, dst_dir_fd=folder)
        for node in dict.fromkeys(node for node, _, _ in self.links):
            os.mkdir(node, 0o700, dir_fd=folder)
        for node, name, target in self.links:
            os.symlink(target, f"{node}/{name}", dir_fd=folder)

    def withdraw(self) -> None:
        """Take the entry away by one rename; a sweep may remove the rest at the same time."""
        with suppress(OSError):  # then there is nothing that could be taken away
            store = opened(self.store, create=False)
            try:
                os.rename(self.name, f".{self.name}", src_dir_fd=store, dst_dir_fd=store)
                remove(f".{self.name}", store)
            finally:
                os.close(store)


def opened(path: str, *, create: bool = True) -> int:
    """A descriptor of the store's folder: this user's own and closed to others.

    Raises: OSError.
    """
    if create:
        for folder in (os.path.dirname(path), path):  # a logout takes both
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700)
    fd = os.open(path, DIRECTORY)
    status = os.fstat(fd)
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(fd)
        raise PermissionError(1, "is not this user's alone", path)
    return fd


def remove(name: str, parent: int) -> None:
    """Remove an entry below the descriptor, following no link and entering no other file system.

    What does not look like a part of an entry stays, and with it what it lies in.
    """
    with suppress(OSError):
        folder = _below(name, parent)
        try:
            _empty(folder, _named(folder))
        finally:
            os.close(folder)
        os.rmdir(name, dir_fd=parent)


def left(name: str, parent: int) -> bool:
    """Return whether this entry still has replicas, or may have: its folder cannot be read."""
    try:
        folder = _below(name, parent)
    except OSError as error:
        return error.errno not in NO_ENTRY
    try:
        sizes = _named(folder)
        nodes = filter(NODES.fullmatch, os.listdir(folder))
        return any(_holds(node, folder, sizes or {}) for node in nodes)
    except OSError as error:
        return error.errno not in NO_ENTRY
    finally:
        os.close(folder)


def _holds(node: str, folder: int, sizes: dict[str, str]) -> bool:
    inside = _below(node, folder)
    try:
        return any(_is_replica(file, inside, sizes) for file in sizes.keys() & os.listdir(inside))
    finally:
        os.close(inside)


def _below(name: str, parent: int) -> int:
    folder = os.open(name, DIRECTORY, dir_fd=parent)
    if os.fstat(folder).st_dev != os.fstat(parent).st_dev:
        os.close(folder)
        raise PermissionError(1, "is another file system", name)
    return folder


def _named(folder: int) -> dict[str, str] | None:
    """Return {replica's name: size} by the manifest, None without one. Raises: OSError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        fd = os.open(MANIFEST, flags, dir_fd=folder)
    except FileNotFoundError:
        return None
    try:
        with open(fd, "rb", closefd=False) as file:  # not of a folder
            row = json.loads(file.read(MOST), parse_int=str)  # they may be of any length
        if row["version"].isdecimal():
            sizes = {os.path.basename(str(path)): "" for path in row["model"]["paths"]}
            with suppress(LookupError, TypeError):  # damaged: the mode of a replica is enough
                sizes.update(zip(sizes, (i[2] for i in row["model"]["identities"])))  # noqa: B905
            return sizes
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
        pass
    finally:
        os.close(fd)
    raise PermissionError(1, "is no manifest of an entry", MANIFEST)


def _empty(folder: int, sizes: dict[str, str] | None) -> None:
    """The manifest goes last: it tells who goes on after a kill which files are replicas."""
    for node in filter(NODES.fullmatch, os.listdir(folder)):
        with suppress(OSError):  # the others are removed all the same
            _empty_node(node, folder, sizes)
    found = os.listdir(folder)
    if not any(map(NODES.fullmatch, found)):
        for file in found:
            if file == MANIFEST or ASIDE.fullmatch(file):
                with suppress(FileNotFoundError):  # others remove it at the same time
                    os.unlink(file, dir_fd=folder)


def _empty_node(node: str, folder: int, sizes: dict[str, str] | None) -> None:
    inside = _below(node, folder)
    try:
        for file in os.listdir(inside):
            with suppress(OSError):
                if (sizes is None or file in sizes) and _is_replica(file, inside, sizes or {}):
                    os.unlink(file, dir_fd=inside)
    finally:
        os.close(inside)
    os.rmdir(node, dir_fd=folder)


def _is_replica(name: str, folder: int, sizes: dict[str, str]) -> bool:
    """Return whether it looks like one: a holder's link, or a file of its mode or its size."""
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISLNK(status.st_mode):
        return LINK.fullmatch(os.readlink(name, dir_fd=folder)) is not None
    is_its_size = stat.S_ISREG(status.st_mode) and str(status.st_size) == sizes.get(name)
    return is_its_size or status.st_mode == stat.S_IFREG | REPLICA_MODE


def started(pid: int) -> int:
    """When the process began, in clock ticks since boot: tells it from a later one of this id.

    Raises: OSError.
    """
    with open(f"/proc/{pid}/stat", "rb") as file:
        return int(file.read().rpartition(b")")[2].split()[19])  # field 22


def take_name(name: str) -> None:
    """Take the name by which holders are known: no process of another name is ever ended.

    Raises: OSError.
    """
    try:
        with open("/proc/self/comm", "w", encoding="ascii") as file:
            file.write(name)
    except OSError as error:
        error.filename = "/proc/self/comm"
        raise


def answer(pid: int, error: str | None) -> None:
    os.write(1, json.dumps({"pid": pid, "error": error}).encode() + b"\n")


def hold(line: bytes) -> int:
    """Publish, answer, and stay until SIGTERM."""
    try:
        take_name(NAME)
        null = os.open(os.devnull, os.O_RDWR)
        held = Held(line)
        held.tend()
    except (OSError, KeyError, TypeError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error) or type(error).__name__
        path = getattr(error, "filename2", None) or getattr(error, "filename", None)
        answer(0, why if path is None else f"{path}: {why}")
        return 1
    try:
        answer(os.getpid(), None)
    except BrokenPipeError:  # The builder did not wait: for it, nothing was published.
        held.withdraw()
        return 1
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    held.locked = False
    while signal.sigtimedwait({signal.SIGTERM}, INTERVAL_S) is None:
        # A builder at work, a full tmpfs, a folder half removed: a second later again.
        with suppress(OSError):
            held.tend()
    held.withdraw()
    return 0


def main() -> int:
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # Waited for in the loop alone, so that nothing is left half done.
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGTERM})
    os.umask(0o077)
    with open(0, "rb", closefd=False) as file:
        line = file.readline()
    if not line.endswith(b"\n"):  # the builder has gone: so does what it wanted held
        return 1
    # A child of init's: nobody has to wait for it, and no shell has it among its jobs.
    if os.fork():
        return 0
    return hold(line)


if __name__ == "__main__":
    sys.exit(main())
