"""The user's own folder in shared memory: 0700, since /dev/shm is everybody's.

It lives until the machine restarts (or is emptied), which is as long as what it speaks of.
NUMALOAD_STORE names another place on a tmpfs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from numaload.errors import StoreError

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - what is made there is checked for its owner


def path() -> str:
    return os.environ.get("NUMALOAD_STORE") or f"{SHARED_MEMORY}/numaload-{os.geteuid()}"


@contextmanager
def opened(*, create: bool = True) -> Iterator[int | None]:
    """A descriptor of the folder, checked; None where there is none and none is to be made.

    Everything below is reached through the descriptor, so that nobody can swap the folder.
    Raises: StoreError if it is not this user's own, or open to others.
    """
    where = path()
    if create:
        try:
            os.mkdir(where, 0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise StoreError(
                f"{where}: {error.strerror}; set NUMALOAD_STORE to a folder on a tmpfs"
            ) from error
    try:
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise StoreError(f"{where}: expected a folder of yours: {error.strerror}") from error
    try:
        _check(where, os.fstat(fd))
        yield fd
    finally:
        os.close(fd)


def _check(where: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise StoreError(f"{where} belongs to user {status.st_uid}, expected {os.geteuid()}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise StoreError(f"{where} has mode {mode:04o}, expected 0700: chmod 700 {where}")


def read_owned(name: str, folder: int) -> bytes:
    """A small file of this user's inside the folder. Raises: OSError, StoreError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
    with open(fd, "rb") as file:
        if os.fstat(fd).st_uid != os.geteuid():
            raise StoreError(f"{name} in {path()} belongs to another user")
        return file.read()


def write_whole(name: str, data: bytes, folder: int) -> None:
    """Write a small file so that others see all of it or nothing."""
    aside = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(aside, flags, 0o600, dir_fd=folder), "wb") as file:
        file.write(data)
    os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
