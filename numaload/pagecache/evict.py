"""Give page cache back, without root, and say why bytes stay in RAM.

The kernel drops clean pages that nobody maps (POSIX_FADV_DONTNEED). So dirty pages are written
first, where there are any or where the kernel does not tell.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from numaload import trace
from numaload.errors import reason
from numaload.files.residency import asked_by, cached_bytes, residency
from numaload.files.source import Identity, SourceFile, real_path
from numaload.linux import syscalls, users
from numaload.linux.placement import parse_smaps
from numaload.linux.syscalls import PAGE
from numaload.pagecache.choice import Source, models_of, real

TRIES, PAUSE_S = 3, 0.05  # pages that another CPU has just used are held by it for a moment
# File systems of which the page cache is the file: tmpfs, ramfs, hugetlbfs (linux/magic.h).
IN_MEMORY = {0x01021994, 0x858458F6, 0x958458F6}
UNSEEN = "unseen"


@dataclass(frozen=True)
class Mapper:
    """Name a process that maps a file. ``resident``: bytes of the file that it has mapped.

    locked: of them, by mlock; of a page that several map the kernel counts a share to each.
    """

    pid: int
    command: str
    resident: int
    locked: int


@dataclass
class EvictedFile:
    """Count bytes of a file. ``before`` and ``stays`` are 0 where ``known`` is False.

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
    users: list[Mapper] = field(default_factory=list)

    @property
    def given_back(self) -> int:
        return max(0, self.before - self.stays)


@dataclass
class EvictReport:
    """Report what went out of RAM, file by file."""

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
        """Return whether nothing stays, as far as the kernel tells."""
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
        with SourceFile(path) as file, trace.span("evict", file=path) as span:
            done.append(_evict(file))
            span.nbytes = done[-1].given_back
    return EvictReport(done)


def _evict(file: SourceFile) -> EvictedFile:
    before, known = _resident(file)
    report = EvictedFile(file.path, file.size, known, before)
    if before or not known:
        if file.ask(syscalls.file_system, file.fd) not in IN_MEMORY:
            _write(file, report)
        report.stays = _drop(file)
    if report.stays:
        report.users, unseen = users_of(file)
        report.why = report.why or _why(file, report.users, unseen)
    return report


def _resident(file: SourceFile) -> tuple[int, bool]:
    """Return (bytes in RAM, whether the kernel tells)."""
    counted = cached_bytes(file)
    if counted is not None:
        return counted, True
    found = residency(file)
    return found.resident, found.known


def _write(file: SourceFile, report: EvictedFile) -> None:
    """Write dirty pages to storage; any descriptor may, it changes nothing of the file."""
    counted = syscalls.cachestat(file.fd, 0, 0) if asked_by(file) == "cachestat" else None
    dirty = None if counted is None else min(file.size, (counted.dirty + counted.writeback) * PAGE)
    if dirty == 0:
        return
    try:
        file.ask(os.fdatasync, file.fd, patient=True)
        report.written = dirty
    except OSError as error:
        report.why = f"dirty pages could not be written: {reason(error)}"


def _drop(file: SourceFile) -> int:
    """Drop the pages; return how many bytes stay in RAM."""
    for attempt in range(TRIES):
        time.sleep(PAUSE_S * attempt)
        file.drop_cache(0, 0)
        stays, _ = _resident(file)
        if not stays:
            break
    return stays


def _why(file: SourceFile, users: list[Mapper], unseen: int) -> str:
    if file.ask(syscalls.file_system, file.fd) in IN_MEMORY:
        return "the file lies in memory: it is all there is of it (delete it to free that)"
    if users:
        return "mapped by " + ", ".join(map(_named, users))
    if unseen:
        return (
            f"in use, perhaps mapped by another user's process: {unseen} could not be looked at"
            " (root may)"
        )
    return "in use by the kernel: just being read or written; try again"


def _named(user: Mapper) -> str:
    who = "this process" if user.pid == os.getpid() else f"process {user.pid} ({user.command})"
    return f"{who}, locked" if user.locked else who


def users_of(file: SourceFile) -> tuple[list[Mapper], int]:
    """Return who maps it, and how many processes, at least, could not be looked at."""
    name = real_path(file.path)
    seen = [_mapper(pid, file.opened, name) for pid in users.pids()]
    hidden = not os.path.exists("/proc/1")  # mounted with hidepid=2: all of other users
    return [user for user in seen if isinstance(user, Mapper)], seen.count(UNSEEN) + hidden


def _mapper(pid: int, file: Identity, name: str) -> Mapper | str | None:
    try:
        areas = set(_areas(pid, file, name))
        return _counted(pid, areas) if areas else None
    except PermissionError:
        return UNSEEN
    except OSError:
        return None  # it ended


def _areas(pid: int, file: Identity, name: str) -> Iterator[int]:
    """Yield first addresses of its mappings.

    Some file systems show another device here than stat does: there, the name decides.
    """
    for area in users.areas(pid):
        device, inode = area.file
        if inode == file.inode and (device == file.device or area.name == name):
            yield area.address


def _counted(pid: int, areas: set[int]) -> Mapper:
    counts = []
    for row in ("Rss:", "Locked:"):
        with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as lines:
            counts.append(sum(n for start, n in parse_smaps(lines, (row,)) if start in areas))
    return Mapper(pid, users.command(pid), *counts)
