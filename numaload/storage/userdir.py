"""The user's own folder in shared memory: 0700, since /dev/shm is everybody's.

It lives until the machine restarts (or is emptied), which is as long as what it speaks of.
NUMALOAD_STORE names another place on a tmpfs.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from numaload.errors import StoreError, reason
from numaload.numa.mounts import mount_of

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
SPARE = 12  # descriptors that work in the store needs at a time, starting a holder most
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - what is made there is checked for its owner


def path() -> str:
    # Absolute: paths of replicas are printed for others. And O_NOFOLLOW follows "link/".
    given = os.environ.get("NUMALOAD_STORE")
    return os.path.abspath(given) if given else f"{SHARED_MEMORY}/numaload-{os.geteuid()}"


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
                f"{where}: {reason(error)}; set NUMALOAD_STORE to a folder on a tmpfs"
            ) from error
    try:
        fd = os.open(where, DIRECTORY)
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise StoreError(f"{where}: expected a folder of yours: {reason(error)}") from error
    try:
        _check(where, os.fstat(fd))
        check_spare(fd)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def folder(name: str, parent: int | None) -> Iterator[int]:
    """A descriptor of a folder below another one, following no link. Raises: OSError."""
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def within(name: str, *, create: bool = True) -> Iterator[int | None]:
    """A descriptor of this folder of the user's; None where it is not there and not to be made.

    Raises: StoreError, also for what is in its place.
    """
    with opened(create=create) as store:
        if store is None:
            yield None
            return
        try:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=store)
            fd = os.open(name, DIRECTORY, dir_fd=store)
        except FileNotFoundError:
            fd = -1
        except OSError as error:
            raise StoreError(f"{path()}/{name}: {reason(error)}") from error
        try:
            yield None if fd < 0 else fd
        finally:
            if fd >= 0:
                os.close(fd)


def check_spare(fd: int) -> None:
    """Raises: StoreError if this process may not open the files that work in the store needs.

    Asked before: half-way, what was begun could not even be taken away. ``fd``: any that is open.
    """
    spare: list[int] = []
    try:
        for _ in range(SPARE):
            spare.append(os.dup(fd))  # noqa: PERF401 - those that there were are closed again
    except OSError as error:
        raise StoreError(
            f"{path()}: {reason(error)}: {SPARE} descriptors more are needed, {len(spare)} are left"
        ) from error
    finally:
        for one in spare:
            os.close(one)


def _check(where: str, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid():
        raise StoreError(f"{where} belongs to user {status.st_uid}, expected {os.geteuid()}")
    if stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        raise StoreError(f"{where} has mode {mode:04o}, expected 0700: chmod 700 {where}")


def read_owned(name: str, folder: int) -> bytes:
    """A small file of this user's inside the folder. Raises: OSError, StoreError."""
    # A FIFO would otherwise be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreError(f"{name} in {path()} is not a file of this user's")
        with open(fd, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(fd)


def write_whole(name: str, data: bytes, folder: int) -> None:
    """Write a small file so that others see all of it or nothing."""
    aside = f".{name}.{os.urandom(4).hex()}"  # other threads may write the same name
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(aside, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(data)
        os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(aside, dir_fd=folder)
        raise


def check_tmpfs(where: str) -> None:
    """Raises: StoreError elsewhere: other file systems ignore where memory is bound to."""
    mount = mount_of(where)
    if mount is not None and mount.kind != "tmpfs":
        raise StoreError(
            f"{where} is on {mount.kind}, expected a tmpfs: set NUMALOAD_STORE to a folder on one,"
            " as in /dev/shm"
        )
