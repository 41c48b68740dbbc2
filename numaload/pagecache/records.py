"""What holders of page cache do, as they write it down: ``prewarming/PID-START.json``.

A holder is known by process id, start time and the namespace of the id, since ids are used again.
It writes its record whole, by a rename, and takes it away when it ends; what failed or was killed
leaves it for the next ``status``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from numaload import errors
from numaload.errors import NumaloadError, StoreError, check_limits, reason, warn_once
from numaload.replicas import holder
from numaload.replicas.holder import namespace
from numaload.storage import userdir

FOLDER = "prewarming"
NAME = "numaload-warm"  # of the process: at most 15 characters
READING, HELD, FAILED, KILLED = "reading", "held", "failed", "killed"
STATES = (READING, HELD, FAILED)
MOST_PATHS = 1 << 14  # models have thousands at most; following the links of one takes 0.25 ms
RECORD = re.compile(r"(\d{1,18})-(\d{1,18})\.json")
ASIDE = re.compile(rf"\.{RECORD.pattern}\.[0-9a-f]{{8}}")  # as userdir.write_whole names it
FieldsOf = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """``files``: (device, inode) of each path. Bytes: done of total read, locked of size."""

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
    error: FieldsOf = field(default_factory=dict)  # see ``packed``
    report: FieldsOf = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.pid}-{self.start}.json"

    @property
    def foreign(self) -> bool:
        """Of another container: whether it lives cannot be seen from here."""
        return self.namespace != namespace()

    @property
    def alive(self) -> bool:
        return self.foreign or alive(self.pid, self.start)

    def covers(self, other: tuple[int, int], part: tuple[str, str], *, lock: bool) -> bool:
        """Whether this keeps that file, or reads it, as it is asked for."""
        return other in self.files and self.part in (part, ("", "")) and (self.lock or not lock)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Record:
        """Raises: userdir.UNREADABLE for what to_json did not write."""
        data, number = json.loads(text), userdir.number
        for key in ("start", "done", "total", "locked"):
            number(data[key])
        number(data["pid"], least=1, below=1 << 31)
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


def alive(pid: int, start: int) -> bool:
    """Whether this is still the process that holds, not another one of its id."""
    return holder.alive(pid, start, NAME)


def write(record: Record) -> None:
    """Raises: StoreError."""
    with userdir.within(FOLDER) as folder:
        assert folder is not None  # noqa: S101 - it was made
        try:
            userdir.write_whole(record.name, record.to_json(), folder)
        except OSError as error:
            where = f"{userdir.path()}/{FOLDER}/{record.name}"
            raise StoreError(f"{where}: {reason(error)}") from error


def remove(record: Record) -> bool:
    """Whether it was there."""
    with userdir.within(FOLDER, create=False) as folder:
        if folder is not None:
            with suppress(FileNotFoundError):
                os.unlink(record.name, dir_fd=folder)
                return True
    return False


def is_there(record: Record) -> bool:
    with userdir.within(FOLDER, create=False) as folder:
        return folder is not None and record.name in userdir.listed(folder)


def sweep() -> None:
    """Clear what holders left that were killed while they wrote."""
    take_over()
    with userdir.within(FOLDER, create=False) as folder:
        for name in userdir.listed(folder) if folder is not None else ():
            match = ASIDE.fullmatch(name)
            if match and not alive(int(match[1]), int(match[2])):
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)


def take_over() -> None:
    """Move the records here that processes of an earlier version write."""
    with userdir.earlier(FOLDER) as old:
        for name in userdir.listed(old) if old is not None else ():
            with suppress(*userdir.UNREADABLE):  # no record
                _parsed(name, old)
                with userdir.within(FOLDER) as folder:
                    os.rename(name, name, src_dir_fd=old, dst_dir_fd=folder)


def records() -> list[Record]:
    """All there are, oldest first: of holders that live, failed or were killed."""
    take_over()
    found: list[Record] = []
    with userdir.within(FOLDER, create=False) as folder:
        for name in userdir.listed(folder) if folder is not None else ():
            found.extend(_read(name, folder))
    return sorted(found, key=lambda record: record.since)


def _parsed(name: str, folder: int | None) -> Record:
    """Raises: userdir.UNREADABLE."""
    assert folder is not None  # noqa: S101 - names come from it
    record = Record.from_json(userdir.read_owned(name, folder))
    if record.name != name:
        raise ValueError("the record of another process")
    return record


def _read(name: str, folder: int | None) -> Iterator[Record]:
    if not RECORD.fullmatch(name):
        return
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
        if record.state == FAILED or record.alive:
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


def packed(error: NumaloadError) -> FieldsOf:
    """An error of numaload's as JSON takes it."""
    _, (kind, args, fields) = error.__reduce__()
    plain: FieldsOf = json.loads(json.dumps({"args": list(args), "fields": fields}, default=str))
    return {"kind": kind.__name__, "text": str(error)} | plain


def unpacked(data: FieldsOf) -> NumaloadError:
    """The error that was packed; a StoreError of its text for one that is not known here."""
    kind = getattr(errors, str(data.get("kind")), None)
    text = str(data.get("text", "failed"))
    if not (isinstance(kind, type) and issubclass(kind, NumaloadError)):
        return StoreError(text)
    try:
        error = errors._rebuilt(kind, tuple(data["args"]), dict(data["fields"]))  # noqa: SLF001
        return error if isinstance(error, NumaloadError) and str(error) else StoreError(text)
    except userdir.UNREADABLE:  # or it lacks what its text is made of
        return StoreError(text)
