"""Compiled kernels on disk: a folder per version of everything that the code depends on.

So no other version's code can be served, and processors that share a home do not meet. Files are
written aside and renamed: processes that start at once may each compile, none sees half a file. It
is code, so it is only taken from a file, and from a folder, that belongs to this user and that
nobody else may write to or put another one in its place, and everything goes through the descriptor
that was checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from importlib.util import find_spec

from numaload.errors import reason
from numaload.formats.qtypes import BLOCKS
from numaload.kernels.jit.target import target

VARIABLE = "NUMALOAD_CACHE_DIR"
FOLDER = re.compile(r"kernels-[0-9a-f]{32}")
FILE = re.compile(r"[a-z0-9_]+(\.[0-9a-f]{32})?")  # kernels, and those that are being written
KEPT = 8  # folders of other versions; those that were used longest ago are removed
MAGIC = b"numaload kernel\n"
LARGEST = 16 << 20  # bytes; a kernel has some thousands
DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Not to wait for somebody's named pipe.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
NO_FILE = {errno.ELOOP, errno.ENXIO}  # what opening a link, and a socket, fails with
WRITE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# numba's variables that change the code; the processor's are in `target`.
SETTINGS = (
    "NUMBA_OPT", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE", "NUMBA_BOUNDSCHECK",
    "NUMBA_DEBUG", "NUMBA_DEBUGINFO", "NUMBA_DISABLE_INTEL_SVML",
)  # fmt: skip

_problem = ""


def problem() -> str:
    """Return what first kept compiled code from being kept, for people; empty if nothing did."""
    return _problem


def _say(text: str) -> None:
    global _problem  # noqa: PLW0603 - who calls kernels says it once
    _problem = _problem or text


def _failed(error: OSError) -> None:
    hint = f"set {VARIABLE} to the full path of a folder of your own on a disk"
    where = f"{error.filename}: " if error.filename else ""
    _say(f"compiled kernels are not kept, each process compiles: {where}{reason(error)}; {hint}")


def load(name: str) -> bytes | None:
    """Return the object file kept under ``name``, None if there is none that is whole."""
    try:
        path = _path(name)
        with _opened(path, create=False) as folder:
            content = _read(folder, path)
    except FileNotFoundError:
        return None
    except OSError as error:
        _failed(error)
        return None
    magic, digest, code = content[:16], content[16:48], content[48:]
    return code if magic == MAGIC and digest == _digest(name, code) else None


def save(name: str, code: bytes) -> None:
    """Keep an object file; `problem` says what prevents it."""
    try:
        with _opened(_path(name), create=True) as folder:
            _write(folder, name, MAGIC + _digest(name, code) + code)
    except OSError as error:
        _failed(error)
        return
    with contextlib.suppress(OSError):
        _remove_old(_base())


@contextmanager
def _opened(kernel: str, *, create: bool) -> Iterator[int]:
    """Open the folder of this kernel, which is this user's alone. Raises: OSError that names it."""
    path = os.path.dirname(kernel)
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
        except OSError as error:
            error.filename = kernel  # from the root; it has a name inside the folder, or none
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


def _path(name: str) -> str:
    """Return where this version keeps the kernel. Raises: OSError."""
    return os.path.join(_base(), f"kernels-{version()}", name)


def _base() -> str:
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


@cache
def version() -> str:
    """Hash everything that the code depends on. Raises: OSError if that cannot be read."""
    settings = [os.environ.get(name) for name in SETTINGS]
    found = hashlib.sha256(repr((target(), settings, sorted(BLOCKS.items()))).encode())
    package = resources.files("numaload.kernels")
    sources = {
        f"{folder}{one.name}": one
        for folder, files in (("", package), ("jit/", package / "jit"))
        for one in files.iterdir()
        if one.name.endswith(".py")
    }
    if not sources:
        raise FileExistsError("the sources of numaload.kernels are not there, only compiled Python")
    for name, source in sorted(sources.items()):
        found.update(f"{name}\n".encode() + hashlib.sha256(source.read_bytes()).digest())
    found.update(_numba())
    return found.hexdigest()[:32]


def _numba() -> bytes:
    """Return what tells numba's version and settings, without importing it."""
    spec = find_spec("numba")
    folders = list(spec.submodule_search_locations or []) if spec else []
    content = b""
    for path in [os.path.join(folder, "_version.py") for folder in folders] + [
        ".numba_config.yaml"
    ]:
        with contextlib.suppress(OSError), open(path, "rb") as file:
            content += file.read()
    return content


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + code).digest()


def _read(folder: int, path: str) -> bytes:
    try:
        fd = os.open(os.path.basename(path), READ, dir_fd=folder)
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
        _say_foreign(path)
        return b""
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not _mine(found):
            _say_foreign(path)
            return b""
        with open(fd, "rb", closefd=False) as file:
            return file.read() if found.st_size <= LARGEST else b""
    finally:  # of a folder, open() raises and leaves it open
        os.close(fd)


def _say_foreign(path: str) -> None:
    _say(
        f"{path} was not a file that only this user may write to: it was not run, but compiled"
        " again"
    )


def _write(folder: int, name: str, content: bytes) -> None:
    aside = f"{name}.{uuid.uuid4().hex}"
    try:
        with open(os.open(aside, WRITE, 0o600, dir_fd=folder), "wb") as file:
            file.write(content)
        os.replace(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside, dir_fd=folder)
        raise


def _remove_old(base: str) -> None:
    """Remove folders of other versions, beyond some, and nothing that this module did not make."""
    ours, used = f"kernels-{version()}", {}
    for entry in os.scandir(base):
        found = entry.stat(follow_symlinks=False)
        mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
        if mine and entry.name != ours and FOLDER.fullmatch(entry.name):
            used[entry.path] = found.st_mtime
    for path in sorted(used, key=lambda one: used[one])[:-KEPT]:
        with contextlib.suppress(OSError):  # others may be cleaning too, or have put files there
            _remove(path)


def _remove(path: str) -> None:
    folder = os.open(path, DIRECTORY)
    try:
        for name in filter(FILE.fullmatch, os.listdir(folder)):
            if _is_ours(folder, name):
                os.unlink(name, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(path)


def _is_ours(folder: int, name: str) -> bool:
    """Return whether this is a file that begins as kernels of every version do."""
    with contextlib.suppress(OSError):  # a link, say
        fd = os.open(name, READ, dir_fd=folder)
        try:
            return stat.S_ISREG(os.fstat(fd).st_mode) and os.read(fd, len(MAGIC)) == MAGIC
        finally:
            os.close(fd)
    return False
