"""Records of the holders of page cache: ``prewarming/PID-START.json`` in the user's folder.

A holder writes its record whole, by a rename, and takes it away when it ends. What failed or was
killed leaves it for the next ``status``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from numaload.errors import StoreError, check_limits, reason, warn_once
from numaload.holder.process import HolderProcess, namespace, packed
from numaload.machine import userdir

FOLDER = "prewarming"
READING, HELD, FAILED, KILLED = "reading", "held", "failed", "killed"
STATES = (READING, HELD, FAILED)
MOST_PATHS = 1 << 14  # models have thousands at most; following the links of one takes 0.25 ms
RECORD = re.compile(r"(\d{1,18})-(\d{1,18})\.json")
ASIDE = re.compile(rf"\.{RECORD.pattern}\.[0-9a-f]{{8}}")  # as userdir.write_whole names it


@dataclass(frozen=True)
class Record:
    """What a holder of page cache does. ``files``: (device, inode) of each path.

    Bytes: done of total read, locked of size.
    """

    pid: int
    start: int
    namespace: str
    paths: tuple[str, ...]
    files: tuple[tuple[int, int], ...]
    part: tuple[str, str]  # tensors and layers that were asked for, empty: all
    lock: bool
    since: float  # seconds since 1970
    state: str = READING
    done: int = 0
    total: int = 0
    locked: int = 0
    notes: tuple[str, ...] = ()  # fallbacks
    error: dict[str, Any] = field(default_factory=dict)  # as holder.process packs it
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def process(self) -> HolderProcess:
        return HolderProcess(self.pid, self.start, self.namespace)

    @property
    def name(self) -> str:
        return f"{self.pid}-{self.start}.json"

    @property
    def foreign(self) -> bool:
        """Return whether it is of another container: whether it lives cannot be seen from here."""
        return self.process.foreign

    @property
    def ended(self) -> bool:
        return self.state in (FAILED, KILLED)

    def covers(self, other: tuple[int, int], part: tuple[str, str], *, lock: bool) -> bool:
        """Return whether this keeps that file, or reads it, as it is asked for."""
        return other in self.files and self.part in (part, ("", "")) and (self.lock or not lock)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Parse a record. Raises: userdir.UNREADABLE for what to_json did not write."""
        data, number = json.loads(text), userdir.number
        process = HolderProcess.checked(data["pid"], data["start"], data["namespace"])
        data["namespace"] = process.namespace
        for key in ("done", "total", "locked"):
            number(data[key])
        if data["state"] not in STATES or type(data["lock"]) is not bool:
            raise ValueError("no state that is known")
        if len(data["paths"]) > MOST_PATHS:
            raise ValueError(f"more than {MOST_PATHS} paths")
        data["paths"] = userdir.paths(data["paths"])
        if not data["paths"] or len(data["paths"]) != len(data["files"]):
            raise ValueError("wrong paths")
        data["since"] = number(data["since"], float)
        data["files"] = tuple((number(device), number(inode)) for device, inode in data["files"])
        data["part"] = (str(data["part"][0]), str(data["part"][1]))
        data["notes"] = tuple(str(note) for note in data["notes"])
        data["error"], data["report"] = dict(data["error"]), dict(data["report"])
        return cls(**data)


def write(record: Record) -> None:
    """Write a record, or write it anew. Raises: StoreError."""
    with userdir.within(FOLDER) as folder:
        assert folder is not None  # noqa: S101 - it was made
        try:
            userdir.write_whole(record.name, record.to_json(), folder)
        except OSError as error:
            where = f"{userdir.path()}/{FOLDER}/{record.name}"
            raise StoreError(f"{where}: {reason(error)}") from error


def remove(record: Record) -> None:
    """Take a record away, if it is there."""
    with userdir.within(FOLDER, create=False) as folder, suppress(FileNotFoundError):
        if folder is not None:
            os.unlink(record.name, dir_fd=folder)


def sweep() -> None:
    """Clear what holders left that were killed while they wrote."""
    take_over()
    with userdir.within(FOLDER, create=False) as folder:
        for name in userdir.listed(folder):
            match = ASIDE.fullmatch(name)
            if match and not HolderProcess(int(match[1]), int(match[2]), namespace()).alive():
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)


def take_over() -> None:
    """Move the records here that processes of an earlier version write."""
    with userdir.earlier(FOLDER) as old:
        for name in userdir.listed(old):
            with suppress(*userdir.UNREADABLE):  # no record
                _parsed(name, old)
                with userdir.within(FOLDER) as folder:
                    os.rename(name, name, src_dir_fd=old, dst_dir_fd=folder)


def records() -> list[Record]:
    """Return all there are, oldest first: of holders that live, failed or were killed."""
    take_over()
    with userdir.within(FOLDER, create=False) as folder:
        names = filter(RECORD.fullmatch, userdir.listed(folder))
        found = [record for name in names for record in _read(name, folder)]
    return sorted(found, key=lambda record: record.since)


def _parsed(name: str, folder: int | None) -> Record:
    """Return the record of this name. Raises: userdir.UNREADABLE where there is none."""
    assert folder is not None  # noqa: S101 - names come from it
    record = Record.from_json(userdir.read_owned(name, folder))
    if record.name != name:
        raise ValueError("the record of another process")
    return record


def _read(name: str, folder: int | None) -> Iterator[Record]:
    """Give the record, if it is one: with its end, where its holder was killed."""
    with suppress(FileNotFoundError):  # it ended just now
        try:
            record = _parsed(name, folder)
        except FileNotFoundError:
            raise
        except userdir.UNREADABLE as error:
            where = f"{userdir.path()}/{FOLDER}/{name}"
            check_limits(error, where)
            warn_once(where, f"{where}: no record that can be read ({error}); left out, remove it")
            return
        if record.state == FAILED or record.foreign or record.process.alive():
            yield record
            return
        # It may have taken its record away and ended since that was read.
        os.stat(name, dir_fd=folder, follow_symlinks=False)
        yield replace(record, error=packed(_killed(record)), state=KILLED)


def _killed(record: Record) -> StoreError:
    return StoreError(
        f"process {record.pid}, which {'kept' if record.state == HELD else 'was reading'}"
        f" {record.paths[0]}, is gone: it was killed, or its container ended"
    )
