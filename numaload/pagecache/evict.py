"""Giving page cache back, without root: what was in RAM of a file, what went, and why what stayed.

The kernel drops clean pages that nobody maps (POSIX_FADV_DONTNEED). So dirty pages are written
first, where there are any or where the kernel does not tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from numaload.errors import reason
from numaload.numa import syscalls
from numaload.numa.syscalls import PAGE
from numaload.pagecache.choice import Source, models_of, real
from numaload.pagecache.users import User, users_of
from numaload.storage.files import SourceFile
from numaload.storage.residency import cached_bytes, residency

TRIES, PAUSE_S = 3, 0.05  # pages that another CPU has just used are held by it for a moment
# File systems of which the page cache is the file: tmpfs, ramfs, hugetlbfs (linux/magic.h).
IN_MEMORY = {0x01021994, 0x858458F6, 0x958458F6}


@dataclass
class EvictedFile:
    """Bytes. ``before`` and ``stays`` are 0 where ``known`` is False.

    written: dirty pages that were written to storage first; None: as many as there were, the
    kernel does not say. why: why pages stay. users: processes that map the file.
    """

    path: str
    size: int
    known: bool = True
    before: int = 0
    stays: int = 0
    written: int | None = 0
    why: str = ""
    users: list[User] = field(default_factory=list)

    @property
    def given_back(self) -> int:
        return max(0, self.before - self.stays)


@dataclass
class EvictReport:
    files: list[EvictedFile]

    @property
    def given_back(self) -> int:
        return sum(file.given_back for file in self.files)

    @property
    def stays(self) -> int:
        return sum(file.stays for file in self.files)

    @property
    def known(self) -> bool:
        return all(file.known for file in self.files)

    @property
    def done(self) -> bool:
        """Whether nothing stays, as far as the kernel tells."""
        return not any(file.stays or file.why for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        files = [asdict(file) | {"given_back": file.given_back} for file in self.files]
        whole = ("given_back", "stays", "known", "done")
        return {"files": files} | {name: getattr(self, name) for name in whole}


def evict(what: Source | Sequence[Source]) -> EvictReport:
    """Give back the page cache of these files, and of their split siblings.

    what: a path, of any file, opened weights (they map the file once tensors were looked at, and
    keep what they map), or several of them.
    Raises: ReadError, SplitError, UsageError. What stays in RAM is no error: see the report.
    """
    paths = {real(path): path for paths in models_of(what) for path in paths}
    done = []
    for path in paths.values():
        with SourceFile(path) as file:
            done.append(_evict(file))
    return EvictReport(done)


def _evict(file: SourceFile) -> EvictedFile:
    before, known = _resident(file)
    report = EvictedFile(file.path, file.size, known, before)
    if before or not known:
        if syscalls.file_system(file.fd) not in IN_MEMORY:
            _write(file, report)
        report.stays = _drop(file)
    if report.stays:
        report.users, unseen = users_of(file)
        report.why = report.why or _why(file, report.users, unseen)
    return report


def _resident(file: SourceFile) -> tuple[int, bool]:
    """(bytes, whether the kernel tells)"""
    counted = cached_bytes(file)
    if counted is not None:
        return counted, True
    found = residency(file)
    return found.resident, found.known


def _write(file: SourceFile, report: EvictedFile) -> None:
    """Through any descriptor: it changes nothing of the file but where it is."""
    counted = syscalls.cachestat(file.fd, 0, 0) if cached_bytes(file, 0, 1) is not None else None
    dirty = None if counted is None else min(file.size, (counted.dirty + counted.writeback) * PAGE)
    if dirty == 0:
        return
    try:
        os.fdatasync(file.fd)
        report.written = dirty
    except OSError as error:
        report.why = f"dirty pages could not be written: {reason(error)}"


def _drop(file: SourceFile) -> int:
    """What stays in RAM."""
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * attempt)
        file.drop_cache(0, 0)
        stays, _ = _resident(file)
        if not stays:
            break
    return stays


def _why(file: SourceFile, users: list[User], unseen: int) -> str:
    if syscalls.file_system(file.fd) in IN_MEMORY:
        return "the file lies in memory: it is all there is of it (delete it to free that)"
    if users:
        return "mapped by " + ", ".join(map(_named, users))
    if unseen:
        return (
            f"in use, perhaps mapped by another user's process: {unseen} could not be looked at"
            " (root may)"
        )
    return "in use by the kernel: just being read or written; try again"


def _named(user: User) -> str:
    who = "this process" if user.pid == os.getpid() else f"process {user.pid} ({user.command})"
    return f"{who}, locked" if user.locked else who
