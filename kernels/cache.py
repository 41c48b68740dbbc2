"""Compiled kernels on disk: a folder per version of everything that the code depends on.

Versions: the sources of this package, the compiler, the processor. So no other version's code can
be served, and processors that share a home do not meet. Files are written aside and renamed:
processes that start at once may each compile, none sees half a file. Code is only taken from a
folder that belongs to this user and that nobody else may write to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from functools import cache
from pathlib import Path

from numaload.kernels.target import target

VARIABLE = "NUMALOAD_CACHE_DIR"
PREFIX = "kernels-"
KEPT = 8  # folders of other versions; the least recently made are removed
MAGIC = b"numaload kernel\n"

_problem = ""


def problem() -> str:
    """Why compiled code could not be kept, for people; empty while all is well."""
    return _problem


def _failed(what: str) -> None:
    global _problem  # noqa: PLW0603 - the first is said once, by who calls kernels
    hint = f"set {VARIABLE} to a folder of your own on a disk"
    _problem = _problem or f"compiled kernels are not kept, each process compiles: {what}; {hint}"


def load(name: str) -> bytes | None:
    """The object file kept under ``name``, None if there is none that is whole."""
    try:
        folder = _folder()
        if not folder.exists():
            return None
        _check(folder)
        content = (folder / name).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _failed(str(error))
        return None
    magic, digest, code = content[:16], content[16:48], content[48:]
    return code if magic == MAGIC and digest == _digest(name, code) else None


def save(name: str, code: bytes) -> None:
    """Keep an object file; what prevents it is in `problem`."""
    try:
        folder = _folder()
        if not folder.exists():
            _make(folder)
        _check(folder)
        _write(folder / name, MAGIC + _digest(name, code) + code)
    except OSError as error:
        _failed(str(error))


def _folder() -> Path:
    return _base() / f"{PREFIX}{version()}"


def _base() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(shared):  # no such user
        raise FileNotFoundError(f"there is no home folder ({shared})")
    return Path(shared) / "numaload"


@cache
def version() -> str:
    """A hash of everything that the code depends on."""
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("NUMBA_"))
    found = hashlib.sha256(repr((target(), settings)).encode())
    here = Path(__file__).parent
    for path in sorted(here.glob("*.py")):
        found.update(f"{path.name} {path.stat().st_size}\n".encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:32]


def _digest(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\n" + code).digest()


def _make(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    others = [path for path in folder.parent.glob(f"{PREFIX}*") if path != folder]
    others.sort(key=lambda path: path.lstat().st_mtime, reverse=True)
    for path in others[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def _check(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(f"{folder} is not a folder that only this user may write to")


def _write(path: Path, content: bytes) -> None:
    fd, aside = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with open(fd, "wb") as file:
            file.write(content)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
