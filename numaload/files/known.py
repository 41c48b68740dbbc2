"""The models that this user prewarmed or mirrored since boot: what a bare ``mirror`` works on."""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from numaload import trace
from numaload.errors import NumaloadError, StoreError, check_limits, reason, warn_once
from numaload.files.source import Identity, SourceFile, digest, reach
from numaload.formats.splits import is_there
from numaload.machine import userdir

FOLDER = "known"
KEPT = 100  # records
RECORD = re.compile(r"[0-9a-f]{32}\.json")
ASIDE = re.compile(rf"\.{RECORD.pattern}\.[0-9a-f]{{8}}")


class Model(NamedTuple):
    """A model's files, in split order, with what they were like when they were used."""

    paths: tuple[str, ...]
    identities: tuple[Identity, ...]

    @property
    def key(self) -> str:
        """Return the model's name in the store. Other content has another key."""
        return digest(repr(self.identities).encode())

    @property
    def size(self) -> int:
        return sum(identity.size for identity in self.identities)

    def unchanged(self) -> bool:
        return self.state() == "unchanged"

    def state(self) -> str:
        """Compare the files with what they were: unchanged, changed, gone or unreadable."""
        try:
            reach(self.paths[0])
            if not all(map(is_there, self.paths)):
                return "gone"
            same = identify(self.paths).identities == self.identities
        except NumaloadError:
            return "unreadable"
        return "unchanged" if same else "changed"

    def to_json(self) -> bytes:
        return json.dumps({"paths": self.paths, "identities": self.identities}).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Model:
        """Parse a record. Raises: userdir.UNREADABLE for what to_json did not write."""
        data = json.loads(text)
        identities = tuple(Identity(*row) for row in data["identities"])
        paths = userdir.paths(data["paths"])
        for identity in identities:
            userdir.number(identity.size)
            for number in identity[:-1]:  # times may lie before 1970
                userdir.number(number, least=-1 << 63)
            if type(identity.head) is not str:
                raise ValueError("wrong identities")
        if not paths or len(paths) != len(identities):
            raise ValueError("wrong paths")
        return cls(paths, identities)


def identify(paths: Sequence[str]) -> Model:
    identities = []
    for path in paths:
        with SourceFile(path) as file:
            identities.append(file.identity())
    return Model(tuple(os.path.abspath(path) for path in paths), tuple(identities))


@trace.spanned("store")
def remember(model: Model) -> None:
    """Note that this user uses the model. If that fails, only ``mirror`` without FILE suffers."""
    try:
        with userdir.within(FOLDER) as folder:
            assert folder is not None  # noqa: S101 - it was made
            _clear(folder)
            fcntl.flock(folder, fcntl.LOCK_SH)
            written = _name(model.paths)
            try:
                userdir.write_whole(written, model.to_json(), folder)
            finally:  # closing alone would leave it locked where a child was forked meanwhile
                fcntl.flock(folder, fcntl.LOCK_UN)
            # Those of before the clock was set back look later than the one just written.
            others = [name for name in _names(folder) if name != written]
            for name in others[KEPT - 1 :]:
                with suppress(OSError):
                    os.unlink(name, dir_fd=folder)
    except OSError as error:
        why = str(error) if isinstance(error, StoreError) else f"{_where()}: {reason(error)}"
        warn_once(why, f"{why}; a later `numaload mirror` without FILE will not find this")


def recall() -> list[Model]:
    """Return each model as last remembered, latest first, changed or not."""
    with userdir.within(FOLDER, create=False) as folder:
        if folder is None:
            return []
        _clear(folder)
        found = [model for name in _names(folder) for model in _recalled(name, folder)]
    latest: dict[tuple[str, ...], Model] = {}  # earlier versions named records by the content
    for model in found:
        latest.setdefault(model.paths, model)
    return list(latest.values())


def forget(paths: Sequence[str]) -> None:
    """Take back what ``remember`` noted of exactly these files."""
    with suppress(OSError), userdir.within(FOLDER, create=False) as folder:
        if folder is not None:
            os.unlink(_name([os.path.abspath(path) for path in paths]), dir_fd=folder)


def _name(paths: Sequence[str]) -> str:
    """Return the name of a model's record, whatever its content."""
    names = b"\0".join(map(os.fsencode, paths))
    return f"{digest(names)}.json"


def _names(folder: int) -> list[str]:
    """Return the names of all records, latest first."""
    times = {}
    for name in userdir.listed(folder):
        if RECORD.fullmatch(name):
            with suppress(FileNotFoundError):
                times[name] = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mtime_ns
    return sorted(times, key=lambda name: times[name], reverse=True)


def _clear(folder: int) -> None:
    """Take away what writers left that were killed: those alive hold the folder."""
    left = [name for name in userdir.listed(folder) if ASIDE.fullmatch(name)]
    if left:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                for name in left:
                    os.unlink(name, dir_fd=folder)
            finally:
                fcntl.flock(folder, fcntl.LOCK_UN)


def _recalled(name: str, folder: int) -> Iterator[Model]:
    try:
        yield Model.from_json(userdir.read_owned(name, folder))
    except FileNotFoundError:  # somebody took it away just now
        pass
    except userdir.UNREADABLE as error:
        where = f"{_where()}/{name}"
        check_limits(error, where)
        warn_once(where, f"{where}: no record that can be read ({error}); left out, remove it")


def _where() -> str:
    return f"{userdir.path()}/{FOLDER}"
