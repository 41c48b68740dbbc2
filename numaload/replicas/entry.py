"""One entry of the store: whose replicas, on which nodes, and what proves them. Its manifest."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from numaload.files.known import Model
from numaload.files.residency import ByteRange
from numaload.holder.process import HolderProcess
from numaload.linux.lists import Group, format_list
from numaload.machine import userdir
from numaload.replicas.folders import PARTS
from numaload.replicas.layout import (
    CHUNK,
    INTERLEAVE,
    MIRROR,
    MIXED,
    STRIPE,
    Layout,
    Spans,
    Stripes,
    are_spans,
    are_stripes,
    pieces_of,
    sums_of,
)
from numaload.replicas.plan import nodes_of

VERSION = 2
MOST_NODES = 1 << 16  # kernels are built for at most 1024
LATEST = 1 << 40  # seconds since the epoch, which calendars still have
BASE = "base"  # the pool of what is not said to be in another one
POOL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


@dataclass(frozen=True)
class Entry:
    """Replicas of one model that were built together."""

    name: str  # of its folder in the store
    model: Model
    groups: tuple[Group, ...]  # a replica each
    checksums: tuple[tuple[int, ...], ...]
    created: float  # seconds since the epoch
    seconds: float  # that building took
    bound: bool = True  # False: placed by first touch, where binding was refused
    pool: str = BASE
    keep: bool = False  # never goes to make room
    policy: str = MIRROR  # by which its replicas lie on their nodes
    turns: Group = ()  # of the policy "interleave": the nodes that blocks go to
    stripes: tuple[Stripes, ...] = ()  # of the policy "stripe": the ranges of each file
    copied: tuple[Spans, ...] = ()  # of "mixed": the parts of each file that each node has
    once: tuple[Spans, ...] = ()  # of "mixed": the parts of each file that there are once
    holder: HolderProcess | None = None  # that keeps its memory files open
    held: frozenset[tuple[int, int]] = frozenset()  # (st_dev, st_ino) of these

    @property
    def nodes(self) -> list[int]:
        return nodes_of(self.groups)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all its replicas."""
        if self.policy == MIXED:
            return sum(self.on_nodes.values())
        return self.model.size * len(self.groups)

    def layout(self, group: Group) -> Layout:
        """Return on which node each range of the replica on these nodes lies."""
        if self.policy == MIXED:
            if self.once and group == self.groups[-1]:
                return Layout((), self.stripes, self.once)
            return Layout(group, (), self.copied)
        return Layout(() if self.stripes else self.turns or group, self.stripes)

    def sums(self) -> list[list[tuple[int, int, int]]]:
        """Return (first byte, end, XXH3-64) of each piece of each file."""
        return sums_of(self.pieces(), self.checksums)

    def pieces(self) -> list[list[ByteRange]]:
        """Return (first byte, end) of each of the ``checksums``."""
        layouts = [self.layout(group) for group in self.groups]
        sizes = [identity.size for identity in self.model.identities]
        return [pieces_of(layouts, i, size) for i, size in enumerate(sizes)]

    @cached_property
    def on_nodes(self) -> dict[int, int]:
        """Return {node: bytes} that its replicas take."""
        found = Counter(dict.fromkeys(self.nodes, 0))
        for group in self.groups:
            found.update(self.layout(group).on_nodes(self.model))
        return dict(found)

    def paths(self, group: Group) -> list[str]:
        """Return the paths at which programs can open the files of a replica.

        None where patterns placed its tensors: these files have holes where others would be.
        """
        files = range(len(self.model.paths)) if self.policy != MIXED else ()
        return [self.path(group, i) for i in files]

    def path(self, group: Group, i: int) -> str:
        """Return the path of the replica of file ``i``."""
        return f"{userdir.path()}/{self.name}/{folder_of(group)}/{self.file_names[i]}"

    @property
    def file_names(self) -> list[str]:
        """Return what its files are called: as the model's, unless they are no whole files."""
        end = PARTS if self.policy == MIXED else ""
        return [os.path.basename(path) + end for path in self.model.paths]

    def manifest(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "model": json.loads(self.model.to_json()),
            "groups": self.groups,
            "chunk": CHUNK,
            "checksums": [[f"{c:016x}" for c in row] for row in self.checksums],
            "created": self.created,
            "seconds": self.seconds,
            "bound": self.bound,
            "pool": self.pool,
            "keep": self.keep,
            "policy": self.policy,
            "turns": self.turns,
            "stripes": self.stripes,
            "copied": self.copied,
            "once": self.once,
        }

    @classmethod
    def from_json(cls, name: str, text: bytes) -> Entry:
        """Parse a manifest. Raises: userdir.UNREADABLE for what ``manifest`` did not make."""
        row = json.loads(text)
        if (row["version"], row["chunk"]) != (VERSION, CHUNK):
            raise ValueError("built by another version of numaload")
        entry = cls(
            name=name,
            model=Model.from_json(json.dumps(row["model"]).encode()),
            groups=tuple(tuple(group) for group in row["groups"]),
            checksums=tuple(tuple(int(c, 16) for c in sums) for sums in row["checksums"]),
            created=userdir.number(row["created"], float, below=LATEST),
            seconds=userdir.number(row["seconds"], float),
            bound=row["bound"] is True,
            pool=str(row.get("pool", BASE)),  # as earlier versions had none
            keep=row.get("keep") is True,
            policy=row.get("policy", MIRROR),
            turns=tuple(row.get("turns", ())),
            stripes=_pairs(row.get("stripes", ())),
            copied=_pairs(row.get("copied", ())),
            once=_pairs(row.get("once", ())),
            holder=holder_of(row),
            held=_held(row),
        )
        entry._check()
        return entry

    def _check(self) -> None:
        """Check the manifest: fewer checksums than chunks would let the rest pass unverified."""
        names = [os.path.basename(path) for path in self.model.paths]
        expected = {
            "name": self.name.startswith(f"{self.model.key}."),
            "nodes": self.groups and all(map(_is_group, self.groups)),
            "replicas": len(set(self.groups)) == len(self.groups),
            "file names": names and not {"", ".", ".."} & set(names),
            "pool": POOL.fullmatch(self.pool) is not None,
            "policy": self._is_policy(),
        }
        expected["checksums"] = expected["policy"] and self._are_all_checksums()
        wrong = [what for what, holds in expected.items() if not holds]
        if wrong:
            raise ValueError(f"wrong {', '.join(wrong)}")

    def _is_policy(self) -> bool:
        """Return whether the layout is one, of the nodes and the sizes that are said."""
        nodes = self.groups[-1] if self.groups else ()
        sizes = [identity.size for identity in self.model.identities]
        if not all(map(_is_group, (self.turns or (0,), *self.groups))):
            return False
        has = (bool(self.turns), bool(self.stripes), bool(self.copied or self.once))
        if self.policy == MIRROR:
            return not any(has)
        if self.policy == INTERLEAVE:
            return has == (True, False, False) and set(self.turns) == set(nodes)
        are_striped = [
            are_stripes(stripes, size, nodes)
            for stripes, size in zip(self.stripes, sizes, strict=bool(self.stripes))
        ]
        if self.policy == STRIPE:
            return has == (False, True, False) and all(are_striped) and len(self.groups) == 1
        spans = [
            are_spans(one, size)
            for each in (self.copied, self.once)
            for one, size in zip(each, sizes, strict=bool(each))
        ]
        return self.policy == MIXED and not self.turns and all((*spans, *are_striped))

    def _are_all_checksums(self) -> bool:
        """Return whether there are as many as pieces, of which sizes may ask for any number."""
        given = [len(row) for row in self.checksums]
        sizes = [identity.size for identity in self.model.identities]
        if self.policy != MIXED:
            return given == [-(-size // CHUNK) for size in sizes]
        every = [span for spans in (*self.copied, *self.once) for span in spans]
        least = sum((stop - start) // CHUNK for start, stop in every) // 2  # two may have the same
        return least <= sum(given) and given == [len(each) for each in self.pieces()]


def _pairs(rows: Any) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple((one, other) for one, other in row) for row in rows)


def folder_of(group: Group) -> str:
    """Return ``node0``, or ``node0-3`` for a replica that these share."""
    return f"node{format_list(group)}"


def _is_group(group: Sequence[Any]) -> bool:
    return bool(group) and all(type(n) is int and 0 <= n < MOST_NODES for n in group)


def holder_of(row: dict[str, Any]) -> HolderProcess | None:
    """Return the process that holds an entry of this manifest. Raises: userdir.UNREADABLE."""
    found = row.get("holder")
    if found is None:
        return None
    return HolderProcess.checked(found["pid"], found["start"], row["pid_namespace"])


def _held(row: dict[str, Any]) -> frozenset[tuple[int, int]]:
    found, number = row.get("holder"), userdir.number
    files = () if found is None else found["files"]
    return frozenset((number(device), number(inode)) for device, inode in files)
