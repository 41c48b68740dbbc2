"""The user's cache folder on disk: ``NUMALOAD_CACHE_DIR``, or numaload in ``XDG_CACHE_HOME``.

What is in it is only taken from a file, and from a folder, that belongs to this user and that
nobody else may write to or put another one in its place. Everything goes through the descriptor
that was checked. Files are written aside and renamed: no process sees half a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

VARIABLE = "NUMALOAD_CACHE_DIR"
HINT = f"set {VARIABLE} to the full path of a folder of your own on a disk"
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not to wait for somebody's named pipe.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NO_FILE = {errno.ELOOP, errno.ENXIO}  # what opening a link, and a socket, fails with
FOREIGN = "it is no file that only this user may write to"
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class ForeignFileError(OSError):
    """What has this name is no file that only this user may write to."""


def base() -> str:
    """Return the cache folder's path, whether it is there or not. Raises: OSError."""
    given = os.environ.get(VARIABLE)
    if given:
        if not os.path.isabs(given):
            raise NotADirectoryError(f"{VARIABLE} is {given!r}, which is no full path")
        return given
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # the XDG specification has relative ones ignored
        return os.path.join(shared, "numaload")
    home = os.path.expanduser("~")
    if not os.path.isabs(home) or os.environ.get("HOME") == "":  # no such user; "" would be "/"
        raise NotADirectoryError("there is no home folder")
    return os.path.join(home, ".cache", "numaload")


@contextmanager
def opened(path: str, *, create: bool) -> Iterator[int]:
    """Open a folder in the cache, which is this user's alone.

    Raises: OSError; one of what is done inside names the folder.
    """
    if create:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    folder = os.open(path, DIRECTORY)
    try:
        if not _mine(os.fstat(folder)):
            raise PermissionError(f"{path} is not a folder that only this user may write to")
        _check_above(path)
        with contextlib.suppress(OSError):
            os.utime(folder)  # it is in use
        try:
            yield folder
        except OSError as error:  # from the root; it has a name inside the folder, or none
            error.filename = os.path.join(path, os.path.basename(error.filename or ""))
            raise
    finally:
        os.close(folder)


def _mine(found: os.stat_result) -> bool:
    """Return whether it is this user's, and nobody else may write to it."""
    return found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _check_above(path: str) -> None:
    """Refuse a path if others may rename a folder that leads to it. Raises: PermissionError."""
    trusted = {os.geteuid(), os.stat("/").st_uid}  # the latter is root, whatever its number here
    above = os.path.realpath(path)
    while above != "/":
        above = os.path.dirname(above)
        found = os.stat(above)
        open_to_others = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
        if found.st_uid not in trusted or open_to_others:
            raise PermissionError(f"others than this user may rename what is in {above}")


def read(folder: int, name: str, largest: int) -> bytes:
    """Read a file of the folder; nothing of one with more bytes than ``largest``.

    Raises: ForeignFileError for what is no file that only this user may write to; OSError.
    """
    try:
        fd = os.open(name, READ, dir_fd=folder)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        raise ForeignFileError(error.errno, FOREIGN, name) from error
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _mine(found):
            raise ForeignFileError(errno.EPERM, FOREIGN, name)
        with open(fd, "rb", closefd=False) as file:
            return file.read() if found.st_size <= largest else b""
    finally:  # of a folder, open() raises and leaves it open
        os.close(fd)


def write(folder: int, name: str, content: bytes) -> None:
    """Write a file that others see whole or not at all. Raises: OSError."""
    aside = f"{name}.{os.urandom(16).hex()}"
    try:
        with open(os.open(aside, WRITE, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        if isinstance(error, OSError):
            error.filename = name
        raise
