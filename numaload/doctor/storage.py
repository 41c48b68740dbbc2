"""Storage: what every check of a file has, and whether the file is whole.

Two gaps are priced. A program that maps the file reads it slower than the disk gives: one of
``Mapped``, ``ReadAhead``, ``HubMount`` and ``FarAway`` (``reading.py``) claims those seconds. The
disk gives less than it could: each of the others (``disks.py``) claims a part, and leaves out what
more specific ones claim.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from itertools import count
from shlex import join, quote

import xxhash

from numaload.doctor.check import Check, Price, Unknown
from numaload.doctor.speeds import pieces
from numaload.doctor.system import System
from numaload.errors import NumaloadError, ReadError, StoreError
from numaload.files.holes import find_holes, tensors_in
from numaload.files.residency import ByteRange
from numaload.files.source import SourceFile, real_path
from numaload.formats.splits import some
from numaload.linux.mounts import real
from numaload.replicas.layout import MIXED
from numaload.replicas.verify import Checksum

GIB = 1 << 30
LEAST_S = 0.5  # seconds of a load that are worth a finding
NO_DISKS = ("network", "share", "memory")  # kinds of devices
PARTITION = re.compile(r"(?<=\d)p\d+$|(?<=[a-z])\d+$")
CACHED = re.compile(r"/models--([^/]+)/snapshots/([^/]+)/(.+)")  # in the cache of the hub
SHA256 = re.compile(r"/blobs/([0-9a-f]{64})$")  # how that cache names what it checked


class OfFile(Check):
    """A check of a file, which must be given. ``why``: its explanation."""

    why = ""

    def explain(self) -> str:
        return self.why

    def available(self) -> bool:
        return self.system.size > 0

    def known(self, *rates: float | None) -> bool:
        """Return whether these were measured. Raises: Unknown where they could not be."""
        speeds = self.system.speeds
        if not all(rates) and speeds.why_not and not speeds.stalled_s:
            raise Unknown(speeds.why_not)
        return all(rates)

    def lost(self, rate: float | None, better: float | None) -> float:
        """Return the seconds that what is absent takes longer at ``rate``; 0 if not known."""
        if not rate or not better:
            return 0.0
        return max(0.0, self.system.absent / rate - self.system.absent / better)

    @property
    def rate(self) -> float | None:
        """Return how fast a program reads the file; None: not measured."""
        return self.system.speeds.mapped or self.system.speeds.disk

    @property
    def disk_s(self) -> float:
        """Return how long the disk takes for what is absent; 0 if not known."""
        disk = self.system.speeds.disk
        return self.system.absent / disk if self.known(disk) and disk else 0.0

    def claimed(self, *others: type[Check]) -> float:
        """Return the seconds that other checks claim: nobody may claim them twice."""
        prices = (_price(one(self.system)) for one in others)
        return sum(price.seconds for price in prices if price)

    @property
    def paths(self) -> list[str]:
        return [file.path for file in self.system.files] or [self.system.path or ""]

    @property
    def path(self) -> str:
        return quote(self.system.path or "")


def _price(check: Check) -> Price | None:
    with suppress(Unknown, NumaloadError, OSError):
        if check.available() and check.measure():
            return check.price()
    return None


class NotWhole(OfFile):
    id, title = "NL109", "The file is not whole, or no model"
    source = "docs/errors.md; lseek(2), SEEK_HOLE, 2026-11"
    why = (
        "A download that did not finish leaves a file too short, or with holes that read as"
        " zeros; a model with them fails, or answers nonsense."
    )

    def available(self) -> bool:
        return self.system.path is not None  # also one that is empty

    def measure(self) -> str:
        self.where = self.system.damaged or self.system.path or ""
        if self.system.damage:
            return self.system.damage
        return "; ".join(self._holes())

    def _holes(self) -> Iterator[str]:
        for part in self.system.weights.parts if self.system.weights else ():
            holes = find_holes(part.file, part.header.data_start)
            named = tensors_in(part.header.tensors, holes)
            if named:
                self.where = part.file.path
                nbytes = sum(stop - start for start, stop in holes)
                yield (
                    f"{part.file.path}: {size_of(nbytes)} from byte {holes[0][0]} on are on no disk"
                    f" and read as zeros, in tensors {some(named)}"
                )

    def fix(self) -> str:
        return _again(self.where)


class Unreadable(OfFile):
    """Only with --deep: it reads all of the model, past the page cache."""

    id, title = "NL117", "Part of the file is unreadable or was changed"
    source = "checksums of the store (XXH3-64) and of the hub's cache (SHA-256), 2026-11"
    why = "A disk that fails, or a program that wrote to it, makes a model answer nonsense."
    MOST = 3  # pieces of a file that are wrong, after which no more are read: each may take long

    def available(self) -> bool:
        return self.system.deep and bool(self.system.files)

    def measure(self) -> str:
        weights = self.system.weights
        files = [part.file for part in weights.parts] if weights else self.system.files
        sums = _stored_sums(self.system, files)
        return "; ".join(said for i, file in enumerate(files) for said in self._read(i, file, sums))

    def _read(self, i: int, file: SourceFile, sums: Sequence[Sequence[Checksum]]) -> Iterator[str]:
        """Read a file piece by piece; yield what is wrong, with the tensors that are there."""
        wrong: list[tuple[ByteRange, str]] = []
        by_hub, whole = SHA256.search(real_path(file.path)), sha256()
        expected = {(start, stop): checksum for start, stop, checksum in sums[i]} if sums else {}
        for its, read in pieces(file, list(expected), self.system.device):
            if isinstance(read, ReadError):
                wrong.append((its, f"cannot be read ({read})"))
            elif its in expected and xxhash.xxh3_64_intdigest(read) != expected[its]:
                wrong.append((its, "differ from what replicas were built from"))
            elif by_hub:
                whole.update(read)
            if len(wrong) >= self.MOST:
                break
        weights = self.system.weights
        for its, why in wrong:
            named = tensors_in(weights.parts[i].header.tensors, [its]) if weights else []
            where = f", in tensors {some(named)}" if named else ""
            self.where = file.path
            yield f"{file.path}: bytes {its[0]} to {its[1]} {why}{where}"
        if by_hub and not wrong and whole.hexdigest() != by_hub[1]:
            self.where = file.path
            yield f"{file.path}: its SHA-256 is {whole.hexdigest()}, the hub's is {by_hub[1]}"

    def fix(self) -> str:
        return f"{_again(self.where)}  # of the disk smartctl -a tells more, as root"


def _stored_sums(system: System, files: Sequence[SourceFile]) -> Sequence[Sequence[Checksum]]:
    """Return the checksums that the store has of these files, a row for each, or nothing."""
    wanted = [file.opened[:-1] for file in files]
    with suppress(StoreError):
        for entry in system.stored:
            its = [one[:-1] for one in entry.model.identities]
            if entry.policy != MIXED and its == wanted:
                return entry.sums()
    return ()


def whole_disk(system: System) -> str:
    """Return the block device, not a partition, that the file system is on; "" for none."""
    if system.device.kind in NO_DISKS:
        return ""
    for name in (system.disks.device, system.device.name):
        for whole in (name, PARTITION.sub("", name)):
            if whole and "/" not in whole and system.exists(f"/sys/block/{whole}/queue"):
                return whole
    return ""


def unused(path: str) -> str:
    """Return the path, with a number where something is there: a command would overwrite that."""
    paths = (f"{path}{number or ''}" for number in count())
    return next(one for one in paths if not os.path.lexists(one))


def _again(path: str) -> str:
    """Say how to get the file once more."""
    cached = CACHED.search(path)
    if cached:
        words = [cached[1].replace("--", "/", 1), cached[3], "--revision", cached[2]]
        cache = path[: cached.start()]
        if real(cache) != real(_hub_cache()):
            words += ["--cache-dir", cache]
        return f"hf download {join(words)} --force-download"
    return f"download it again; its checksum tells whether it is whole: sha256sum {quote(path)}"


def _hub_cache() -> str:
    """Return where ``hf download`` keeps files when it is not told."""
    told = os.environ
    home = told.get("HF_HOME") or f"{told.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    return os.path.expanduser(told.get("HF_HUB_CACHE") or f"{home}/hub")


def gb(rate: float | None) -> str:
    return f"{(rate or 0) / 1e9:.2f} GB/s"


def size_of(nbytes: int) -> str:
    return f"{nbytes / GIB:.1f} GiB" if nbytes >= GIB else f"{nbytes / (1 << 20):.1f} MiB"


CHECKS: tuple[type[Check], ...] = (
    NotWhole,
    Unreadable,
)
