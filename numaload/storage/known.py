"""The models that this user prewarmed or mirrored since boot: what a bare ``mirror`` works on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from numaload.errors import NumaloadError, StoreError, check_limits, warn_once
from numaload.formats.splits import is_there
from numaload.storage import userdir
from numaload.storage.files import Identity, SourceFile, reached

FOLDER = "known"


@dataclass(frozen=True)
class Model:
    """A model's files, in split order, with what they were like when they were used."""

    paths: tuple[str, ...]
    identities: tuple[Identity, ...]

    @property
    def key(self) -> str:
        """Names this model in the store. Other content, another key."""
        return hashlib.blake2b(repr(self.identities).encode(), digest_size=16).hexdigest()

    @property
    def size(self) -> int:
        return sum(identity.size for identity in self.identities)

    def unchanged(self) -> bool:
        return self.state() == "unchanged"

    def state(self) -> str:
        """What the files are now, next to what they were: unchanged, changed, gone, unreadable."""
        try:
            with reached(self.paths[0]):
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
        """Raises: ValueError, TypeError, KeyError for what to_json did not write."""
        data = json.loads(text)
        identities = tuple(Identity(*row) for row in data["identities"])
        paths = tuple(data["paths"])
        numbers = [number for identity in identities for number in identity[:-1]]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError("wrong numbers in identities")
        if not paths or not all(type(p) is str for p in paths) or len(paths) != len(identities):
            raise ValueError("wrong paths")
        return cls(paths, identities)


def identify(paths: Sequence[str]) -> Model:
    identities = []
    for path in paths:
        with SourceFile(path) as file:
            identities.append(file.identity())
    return Model(tuple(os.path.abspath(path) for path in paths), tuple(identities))


def remember(model: Model) -> None:
    """Note that this user uses the model. If that fails, only ``mirror`` without FILE suffers."""
    try:
        with userdir.opened() as store, _folder(store, create=True) as folder:
            _clear(folder)
            fcntl.flock(folder, fcntl.LOCK_SH)
            userdir.write_whole(f"{model.key}.json", model.to_json(), folder)
    except (OSError, StoreError) as error:
        warn_once("known", f"{error}; a later `numaload mirror` without FILE will not find this")


def recall() -> list[Model]:
    """What was remembered last of each model, latest first, changed or not."""
    with userdir.opened(create=False) as store:
        if store is None or FOLDER not in os.listdir(store):
            return []
        with _folder(store) as folder:
            _clear(folder)
            names = [n for n in os.listdir(folder) if n.endswith(".json")]
            names.sort(key=lambda n: os.stat(n, dir_fd=folder).st_mtime_ns, reverse=True)
            found = [model for name in names for model in _recalled(name, folder)]
    latest: dict[tuple[str, ...], Model] = {}
    for model in found:
        latest.setdefault(model.paths, model)
    return list(latest.values())


def forget(paths: Sequence[str]) -> None:
    """Take back what ``remember`` noted of exactly these files."""
    for model in recall():
        if model.paths == tuple(map(os.path.abspath, paths)):
            with userdir.opened() as store, _folder(store) as folder, suppress(FileNotFoundError):
                os.unlink(f"{model.key}.json", dir_fd=folder)


def _clear(folder: int) -> None:
    """Take away what writers left that were killed: those alive hold the folder."""
    left = [name for name in os.listdir(folder) if name.startswith(".")]
    if left:
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in left:
                os.unlink(name, dir_fd=folder)


def _recalled(name: str, folder: int) -> Iterator[Model]:
    try:
        yield Model.from_json(userdir.read_owned(name, folder))
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        where = f"{userdir.path()}/{FOLDER}/{name}"
        check_limits(error, where)
        warn_once(where, f"{where}: no record that can be read ({error}); left out: rm {where}")


class _folder:  # noqa: N801 - a context manager
    def __init__(self, store: int | None, *, create: bool = False) -> None:
        if store is None:
            raise StoreError(f"{userdir.path()} is not there")
        if create:
            with suppress(FileExistsError):
                os.mkdir(FOLDER, 0o700, dir_fd=store)
        self.fd = os.open(FOLDER, userdir.DIRECTORY, dir_fd=store)

    def __enter__(self) -> int:
        return self.fd

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)
