"""Compiled kernels on disk: a folder per version of everything that the code depends on.

So no other version's code can be served, and processors that share a home do not meet. Processes
that start at once may each compile, none sees half a file. It is code, so it is only taken from
where nobody else can have put it: ``machine/cachedir.py`` has the rules.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from functools import cache
from importlib import resources
from importlib.util import find_spec

from numaload.errors import reason
from numaload.formats.qtypes import BLOCKS
from numaload.kernels.jit.target import target
from numaload.machine.cachedir import (
    DIRECTORY,
    HINT,
    READ,
    ForeignFileError,
    base,
    opened,
    read,
    write,
)

FOLDER = re.compile(r"kernels-[0-9a-f]{32}")
FILE = re.compile(r"[a-z0-9_]+(\.[0-9a-f]{32})?")  # kernels, and those that are being written
KEPT = 8  # folders of other versions; those that were used longest ago are removed
MAGIC = b"numaload kernel\n"
LARGEST = 16 << 20  # bytes; a kernel has some thousands
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
    where = f"{error.filename}: " if error.filename else ""
    _say(f"compiled kernels are not kept, each process compiles: {where}{reason(error)}; {HINT}")


def load(name: str) -> bytes | None:
    """Return the object file kept under ``name``, None if there is none that is whole."""
    try:
        with opened(_folder(), create=False) as folder:
            content = read(folder, name, LARGEST)
    except FileNotFoundError:
        return None
    except ForeignFileError as error:
        _say(
            f"{error.filename} was not a file that only this user may write to: it was not run,"
            " but compiled again"
        )
        return None
    except OSError as error:
        _failed(error)
        return None
    magic, digest, code = content[:16], content[16:48], content[48:]
    return code if magic == MAGIC and digest == _digest(name, code) else None


def save(name: str, code: bytes) -> None:
    """Keep an object file; `problem` says what prevents it."""
    try:
        with opened(_folder(), create=True) as folder:
            write(folder, name, MAGIC + _digest(name, code) + code)
    except OSError as error:
        _failed(error)
        return
    with contextlib.suppress(OSError):
        _remove_old()


def _folder() -> str:
    """Return where this version keeps kernels. Raises: OSError."""
    return os.path.join(base(), f"kernels-{version()}")


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


def _remove_old() -> None:
    """Remove folders of other versions, beyond some, and nothing that this module did not make."""
    ours, used = f"kernels-{version()}", {}
    for entry in os.scandir(base()):
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
