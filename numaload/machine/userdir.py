"""The user's own folder in shared memory: 0700, since /dev/shm is everybody's.

It lasts until the machine restarts (or it is emptied), as does the memory that it describes.
NUMALOAD_STORE names another folder on a tmpfs to make it in. Nothing in there is trusted, and
nothing is removed but what has the form of what numaload makes.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import re
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOENT
from functools import lru_cache
from typing import Any

from numaload.errors import StoreError, reason, warn_once
from numaload.linux import syscalls
from numaload.linux.mounts import mount_of

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
SPARE = 12  # descriptors that work in the store needs at a time, starting a holder most
SHARED_MEMORY = "/dev/shm"  # noqa: S108 - what is made there is checked for its owner
TMPFS = 0x01021994  # linux/magic.h
MARKER = "numaload-store"  # a file: numaload made the folder. No dot: earlier versions clear those
ENTRY = re.compile(r"[0-9a-f]{32}\.[0-9a-f]{8}")  # with a dot in front: not there yet, or no more
OURS = re.compile(rf"lock|known|pools|prewarming|reading|\.?{ENTRY.pattern}|{MARKER}")
MOST = 16 << 20  # bytes of a record; the manifest of a model of 10 TB has less
# What reading and checking a record that anybody wrote may raise.
UNREADABLE = (
    OSError, LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError,
)  # fmt: skip


def path() -> str:
    """Return the folder's path: numaload-UID in NUMALOAD_STORE, or that itself if it has that name.

    Raises: StoreError.
    """
    name = f"numaload-{os.geteuid()}"
    base = _base(os.environ.get("NUMALOAD_STORE") or SHARED_MEMORY)
    return base if os.path.basename(base) == name else os.path.join(base, name)


@lru_cache
def _base(given: str) -> str:
    # Absolute: paths of replicas are printed for others. Once: a process may change its folder.
    try:
        # Above what a link leads to is another folder than above the link.
        return os.path.realpath(given) if ".." in given.split("/") else os.path.abspath(given)
    except (OSError, ValueError) as error:  # no working directory
        raise StoreError(
            f"NUMALOAD_STORE={given}: {os.strerror(ENOENT)}: the working folder is gone; give a"
            " path from /"
        ) from error


@contextmanager
def opened() -> Iterator[int]:
    """Give a descriptor of the folder, made if it is not there, and checked.

    Everything below is reached through the descriptor, so that nobody can swap the folder.
    Raises: StoreError if it is not this user's own, open to others, or not made by numaload.
    """
    where = path()
    for made in (os.path.dirname(where), where):
        if not os.path.isdir(made):
            check_tmpfs(os.path.dirname(made))
            with suppress(FileExistsError), named(made):
                os.mkdir(made, 0o700)
    with existing() as store:
        if store is None:
            raise StoreError(f"{where}: was removed while it was made")
        yield store


@contextmanager
def existing() -> Iterator[int | None]:
    """Give a descriptor of the folder, checked; None where there is none.

    Raises: StoreError, also where NUMALOAD_STORE says a place in which none can be.
    """
    where = path()
    fd = _open(where)
    if fd is None:
        if os.environ.get("NUMALOAD_STORE"):
            given = os.path.dirname(where)
            check_tmpfs(given if os.path.isdir(given) else os.path.dirname(given))
        yield None
        return
    try:
        with named(where):
            _check(where, fd)
        check_spare(fd)
        yield fd
    finally:
        os.close(fd)


def _open(where: str) -> int | None:
    try:
        _check_owner(where, os.lstat(where))  # whose it is, also where it may not be opened
        return os.open(where, DIRECTORY)
    except FileNotFoundError:
        return None
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"{where}: expected a folder of yours: {reason(error)}; set NUMALOAD_STORE to another"
            " folder on a tmpfs"
        ) from error


@contextmanager
def named(where: str) -> Iterator[None]:
    """Say where it is that something failed. Raises: StoreError."""
    try:
        yield
    except (FileExistsError, StoreError):
        raise
    except OSError as error:
        raise StoreError(
            f"{where}: {reason(error)}; set NUMALOAD_STORE to another folder on a tmpfs"
        ) from error


@contextmanager
def earlier(name: str = ".") -> Iterator[int | None]:
    """Give a descriptor of the folder that earlier versions used in place of ``path``.

    That was the very folder that NUMALOAD_STORE names. None where it cannot have been.
    """
    with ExitStack() as opened:
        fd = None
        with suppress(OSError):
            base = os.open(os.path.dirname(path()), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            opened.callback(os.close, base)
            if _is_private(os.fstat(base)):
                fd = opened.enter_context(folder(name, base))
        yield fd


@contextmanager
def folder(name: str, parent: int | None) -> Iterator[int]:
    """Give a descriptor of a folder below another one, following no link. Raises: OSError."""
    fd = os.open(name, DIRECTORY, dir_fd=parent)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def within(name: str, *, create: bool = True) -> Iterator[int | None]:
    """Give a descriptor of this folder of the user's, made if it is not there.

    create: False gives None where there is none; also, with a warning, where something else has
    its name. Raises: StoreError.
    """
    with opened() if create else existing() as store, ExitStack() as held:
        fd, where = None, f"{path()}/{name}"
        try:
            if create:
                with suppress(FileExistsError):
                    os.mkdir(name, 0o700, dir_fd=store)
            if store is not None:
                fd = held.enter_context(folder(name, store))
        except FileNotFoundError:
            pass
        except OSError as error:
            said = f"{where}: expected a folder of yours: {reason(error)}"
            if create:
                raise StoreError(said) from error
            warn_once(where, f"{said}; left out")
        if create and fd is None:
            raise StoreError(f"{where}: was removed while it was made")
        yield fd


def check_spare(fd: int) -> None:
    """Refuse to begin if this process may not open the files that work in the store needs.

    Running out half-way would prevent even cleaning up. ``fd``: any that is open.
    Raises: StoreError.
    """
    spare: list[int] = []
    try:
        for _ in range(SPARE):
            spare.append(os.dup(fd))  # noqa: PERF401 - those that there were are closed again
    except OSError as error:
        raise StoreError(
            f"{path()}: {reason(error)}: {SPARE} more descriptors are needed, {len(spare)} are left"
        ) from error
    finally:
        for one in spare:
            os.close(one)


def _check_owner(where: str, status: os.stat_result) -> None:
    user = os.geteuid()
    if status.st_uid != user:
        owner: object = status.st_uid
        with suppress(KeyError):
            owner = pwd.getpwuid(status.st_uid).pw_name
        raise StoreError(
            f"{where} belongs to user {owner}, expected {user}: ask {owner} to remove it, or set"
            " NUMALOAD_STORE to a folder of yours on a tmpfs"
        )


def _check(where: str, fd: int) -> None:
    status = os.fstat(fd)
    _check_owner(where, status)
    if not _is_private(status):
        said = f"{where} has mode {stat.S_IMODE(status.st_mode):04o}, expected 0700"
        way_out = "set NUMALOAD_STORE to another folder on a tmpfs"  # others may use this one
        if _is_marked(fd):
            import shlex

            way_out = f"chmod 700 {shlex.quote(where)}"
        raise StoreError(f"{said}: {way_out}")
    if syscalls.file_system(fd) != TMPFS:
        check_tmpfs(where)
    with named(f"{where}/{MARKER}"):
        _check_made(where, fd)


def _is_private(status: os.stat_result) -> bool:
    return status.st_uid == os.geteuid() and not stat.S_IMODE(status.st_mode) & 0o077


def _check_made(where: str, fd: int) -> None:
    """Mark a folder that is empty or has only numaload's names: its maker may have been killed."""
    if _is_marked(fd):
        return
    foreign = sorted(n for n in listed(fd) if n == MARKER or not OURS.fullmatch(n))
    if foreign and not _is_marked(fd):  # not even just now, by another process
        raise StoreError(
            f"{where}: numaload did not make it, found {foreign[0]} in it: move that elsewhere, or"
            " set NUMALOAD_STORE to another folder on a tmpfs"
        )
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    os.close(os.open(MARKER, flags, 0o600, dir_fd=fd))


def _is_marked(store: int) -> bool:
    with suppress(FileNotFoundError):
        status = os.stat(MARKER, dir_fd=store, follow_symlinks=False)
        return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return False


def read_owned(name: str, folder: int) -> bytes:
    """Read a small file of this user's inside the folder. Raises: OSError, StoreError."""
    # A FIFO would otherwise be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags, dir_fd=folder)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise StoreError(f"{name} in {path()} is not a file of this user's")
        with open(fd, "rb", closefd=False) as file:
            data = file.read(MOST + 1)
        if len(data) > MOST:
            raise StoreError(f"{name} in {path()}: {status.st_size} bytes, expected at most {MOST}")
        return data
    finally:
        os.close(fd)


def listed(folder: int | None) -> list[str]:
    """Return the names in a folder of the user's, none where there is none. Raises: StoreError."""
    if folder is None:
        return []
    with named(path()):
        return os.listdir(folder)


def flock(fd: int, how: int) -> bool:
    """Lock or unlock it; return False if others have it. Raises: StoreError."""
    with named(path()), suppress(BlockingIOError):
        fcntl.flock(fd, how)
        return True
    return False


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
    """Refuse other file systems: they ignore where memory is bound to. Raises: StoreError."""
    with named(where):
        mount = mount_of(where)
    if mount is not None and mount.kind != "tmpfs":
        raise StoreError(
            f"{where} is on {mount.kind}, expected a tmpfs: set NUMALOAD_STORE to a folder on"
            " a tmpfs, such as one in /dev/shm"
        )


def number(value: Any, kind: type = int, *, least: int = 0, below: int = 1 << 64) -> Any:
    """Return a number of a record, where anything may stand. Raises: ValueError."""
    if type(value) not in (int, kind) or not least <= value < below:
        raise ValueError("a number of another type, or out of range")
    return kind(value)


def paths(values: Any) -> tuple[str, ...]:
    """Return paths of a record, where anything may stand. Raises: ValueError, TypeError."""
    for value in values:
        if type(value) is not str or not os.path.isabs(value) or b"\0" in os.fsencode(value):
            raise ValueError("a path that is no text, is not absolute, or has a NUL in it")
    return tuple(values)
