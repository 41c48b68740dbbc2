"""Keep the reading plans that ``numaload tune`` measured, and use them while nothing changed.

::

    ~/.cache/numaload/tuned/HASH.json    of one device and file system, by this machine

A plan is for its device, file system, kernel, processors and version of numaload. Records are only
taken from where nobody else can have put them (``machine/cachedir.py``), and their numbers checked.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from numaload._version import __version__
from numaload.errors import WAYS_OUT, StoreError, check_limits, reason, warn_once
from numaload.files.plan import (
    FITTING,
    MOST_THREADS,
    Forced,
    ReadMethod,
    ReadPlan,
    Tuned,
    make_plan,
)
from numaload.files.source import SourceFile, digest
from numaload.linux.sysfs import SysFiles
from numaload.machine import cachedir
from numaload.machine.devices import Device, Storage, device_of, storage_of
from numaload.machine.userdir import UNREADABLE, number

FOLDER = "tuned"
RECORD = re.compile(r"[0-9a-f]{32}\.json")
LARGEST = 16 << 10  # bytes of a record; one has about 1,000
KEPT = 64  # records
TRIAL = "trial"  # no record: what is written to see whether one could be
MOST_GAIN = 10**6


class Record(NamedTuple):
    """Plans by sink. ``conditions``: {what they depend on: what that was}."""

    name: str  # of its file
    host: str  # homes are shared by machines
    mount: str
    when: int  # seconds since 1970
    conditions: Mapping[str, str]
    plans: Mapping[str, Tuned]

    def changed(self, now: Mapping[str, str]) -> list[str]:
        """Return what is not as it was, in words."""
        return [
            f"{what} is {is_now}, was {self.conditions.get(what)}"
            for what, is_now in now.items()
            if self.conditions.get(what) != is_now
        ]

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%d", time.localtime(self.when))

    def to_dict(self) -> dict[str, Any]:
        plans = {
            sink: tuned.way._asdict() | {"gain": tuned.gain} for sink, tuned in self.plans.items()
        }
        return {**self._asdict(), "conditions": dict(self.conditions), "plans": plans}

    @classmethod
    def parse(cls, name: str, text: bytes) -> Record:
        """Parse a record. Raises: userdir.UNREADABLE for what ``keep`` did not write."""
        import json

        data = json.loads(text)
        words = [data["host"], data["mount"], *data["conditions"].values()]
        if not all(type(word) is str for word in words):
            raise ValueError("a host, mount or condition that is no text")
        record = cls(name, data["host"], data["mount"], 0, data["conditions"], {})
        record = record._replace(when=number(data["when"], below=1 << 33))
        plans = {sink: _tuned(sink, row, record.date) for sink, row in data["plans"].items()}
        return record._replace(plans=plans)


def _tuned(sink: str, row: Any, date: str) -> Tuned:
    if sink not in FITTING:
        raise ValueError(f"{sink!r} is no sink")
    threads = number(row["threads"], least=1, below=MOST_THREADS + 1)
    way = ReadMethod(row["name"], threads, number(row["chunk"]))
    Forced(*way).check(sink)
    return Tuned(way, number(row["gain"], float, least=1, below=MOST_GAIN), date)


def plan_reading(
    sink: str, file: SourceFile, total: int, *, forced: Forced | None = None, seen: bool = True
) -> ReadPlan:
    """Plan the reading of ``total`` absent bytes, most of them of this file.

    forced, seen: as of ``make_plan``. Raises: UsageError, ReadError.
    """
    device = device_of(file.path, network=file.is_network, numbers=file.device)
    # Where nothing is read, or all is forced, nobody asks for a tuned plan.
    tuned = recall(sink, file, device) if total and forced in (None, Forced()) else None
    return make_plan(sink, device, total, forced=forced, seen=seen, tuned=tuned)


def recall(sink: str, file: SourceFile, device: Device) -> Tuned | None:
    """Return what was measured on this device; where that is out of date, say so once."""
    found = records()
    if not found:  # nearly everywhere: /sys is not looked at
        return None
    storage = storage_of(file.path, device, numbers=file.device)
    now = conditions(device, storage)
    for record in found:
        if not record.changed(now):
            return record.plans.get(sink)
    for record in found:
        if _is_of(record, storage, now):
            changes = "; ".join(record.changed(now))
            warn_once(
                f"tuned {record.name}",
                f"the plan tuned {record.date} for {record.mount} is not used: {changes}; run"
                " numaload tune FILE again, or numaload tune --forget FILE",
            )
            break
    return None


def _is_of(record: Record, storage: Storage, now: Mapping[str, str]) -> bool:
    """Return whether it is of this device: with equal conditions, whichever host measured it.

    One with other conditions may be in use by another host. It is of this device if this host
    measured it there, or on what was mounted there.
    """
    same = record.conditions.get("device") == storage.device
    same |= record.mount == storage.mount != ""
    return not record.changed(now) or (same and record.host == os.uname().nodename)


def conditions(device: Device, storage: Storage) -> dict[str, str]:
    """Return what a plan depends on: if one of it changes, the plan is of no use."""
    files, system = SysFiles(), "/sys/devices/system"
    online = [files.text(f"{system}/{one}/online") or "unknown" for one in ("cpu", "node")]
    return {
        "device": storage.device,
        "file system": storage.file_system,
        "kernel": os.uname().release,
        "numaload": __version__,
        "processors": f"CPUs {online[0]} on nodes {online[1]}",
        "read-ahead": f"{device.read_ahead >> 10} KiB",
    }


def records(tell: Callable[[str, str], object] = warn_once) -> list[Record]:
    """Return what was kept, latest first. What is no record is told once, and left out.

    Raises: ReadError if this process may open no more files.
    """
    try:
        where = _where()
        if not os.path.isdir(where):
            return []
        with cachedir.opened(where, create=False) as folder:
            names = list(filter(RECORD.fullmatch, os.listdir(folder)))[: 2 * KEPT]
            found = [one for name in names for one in _read(folder, where, name, tell)]
    except (NotADirectoryError, FileNotFoundError):  # nowhere to keep anything, or gone meanwhile
        return []
    except OSError as error:
        check_limits(error, where)
        tell("tuned", f"tuned plans are not used: {reason(error)}; {cachedir.HINT}")
        return []
    return sorted(found, key=lambda record: record.when, reverse=True)


def _read(
    folder: int, where: str, name: str, tell: Callable[[str, str], object]
) -> Iterator[Record]:
    try:
        yield Record.parse(name, cachedir.read(folder, name, LARGEST))
    except FileNotFoundError:
        pass
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno in WAYS_OUT:
            raise  # this says nothing of the record
        path, why = f"{where}/{name}", reason(error) if isinstance(error, OSError) else error
        tell(
            path,
            f"{path}: no tuned plan that can be used ({why}); left out:"
            " numaload tune --forget removes it",
        )


def check_kept() -> None:
    """Check that plans can be kept. Raises: StoreError."""
    with _named("kept"), cachedir.opened(_where(), create=True) as folder:
        cachedir.write(folder, TRIAL, b"{}")
        with suppress(FileNotFoundError):  # another tune took it away
            os.unlink(TRIAL, dir_fd=folder)


def keep(file: SourceFile, device: Device, plans: Mapping[str, Tuned]) -> str:
    """Keep these plans, by sink, in place of older ones; return the record's path.

    Raises: StoreError.
    """
    import json

    storage = storage_of(file.path, device, numbers=file.device)
    host, when = os.uname().nodename, int(time.time())
    name = f"{digest(repr((host, storage.device)).encode())}.json"
    now = conditions(device, storage)
    record = Record(name, host, storage.mount, when, now, plans)
    with _named("kept"), cachedir.opened(_where(), create=True) as folder:
        cachedir.write(folder, name, json.dumps(record.to_dict()).encode())
    others = [one for one in records() if one.name != name]
    rest = [one for one in others if not _is_of(one, storage, now)]
    _remove([one.name for one in others if one not in rest[: KEPT - 1]])
    return f"{_where()}/{name}"


def forget(file: SourceFile | None = None) -> tuple[list[Record], int]:
    """Remove the plans of this file's device, or all and what is damaged.

    Returns: the plans, and how many are damaged, of whichever device. Raises: StoreError.
    """
    found, names = records((lambda *_: None) if file is None else warn_once), list[str]()
    with _named("removed"), suppress(FileNotFoundError, NotADirectoryError):
        names += filter(RECORD.fullmatch, os.listdir(_where()))
    damaged = len(names) - len(found)
    if file is not None:
        device = device_of(file.path, network=file.is_network, numbers=file.device)
        storage = storage_of(file.path, device, numbers=file.device)
        now = conditions(device, storage)
        found = [one for one in found if _is_of(one, storage, now)]
        names = [one.name for one in found]
    _remove(names)
    return found, damaged


def _remove(names: list[str]) -> None:
    if names:
        with _named("removed"), cachedir.opened(_where(), create=False) as folder:
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=folder)


def _where() -> str:
    return os.path.join(cachedir.base(), FOLDER)


@contextmanager
def _named(done: str) -> Iterator[None]:
    """Say what cannot be done without the folder. Raises: StoreError."""
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        said = f"tuned plans cannot be {done}: {where}{reason(error)}; {cachedir.HINT}"
        raise StoreError(said) from error
