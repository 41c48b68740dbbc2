"""Weights: all tensors of a model by name, over its files or over one replica."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import RLock
from typing import TYPE_CHECKING, NamedTuple, Protocol

from numaload.errors import (
    ClosedError,
    NotCopyable,
    TensorNotFoundError,
    UsageError,
    printable,
)
from numaload.files.known import Model
from numaload.files.source import SourceFile
from numaload.formats import gguf, safetensors
from numaload.formats.metadata import Metadata
from numaload.linux.lists import Group, format_list
from numaload.linux.mapping import MappedMemory, map_file
from numaload.machine.stopping import renewed
from numaload.machine.topology import Topology, topology
from numaload.weights.scales import Companions, config_beside
from numaload.weights.tensor import Tensor

if TYPE_CHECKING:
    from numaload.files.reader import Progress
    from numaload.machine.workers import Workers


class SupportsClose(Protocol):
    """What can be closed."""

    def close(self) -> None: ...


AnyHeader = gguf.Header | safetensors.Header


@dataclass(frozen=True)
class Part:
    """One file of a model, opened, with its parsed header."""

    file: SourceFile
    header: AnyHeader


class Memory(NamedTuple):
    """Mapped memory that holds some tensors of each file at their offsets, and its nodes."""

    mappings: Sequence[MappedMemory]
    nodes: Group


class Weights(NotCopyable, Mapping[str, Tensor]):
    """All tensors of a model, in file order, by name; over its files or over one replica.

    ``close()`` gives up the memory; arrays handed out before stay valid, raw addresses do not.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        mappings: Sequence[MappedMemory] | None = None,
        nodes: Group = (),
        apart: Mapping[str, Memory] | None = None,
    ) -> None:
        """Make weights of opened files. apart: tensors that are in other memory than the rest."""
        self._parts, self.nodes, self._closed = parts, nodes, False
        self._apart = apart or {}
        self._machine: Topology | None = None
        self.in_files = mappings is None  # rather than in memory that was filled from them
        self._mappings: list[MappedMemory | None] = [None] * len(parts)
        self._mappings[:] = mappings or self._mappings
        self._companions: Companions | None = None
        self.owned: list[SupportsClose] = []  # what is closed with it
        self._lock = renewed(RLock())
        self._tensors = {
            info.name: Tensor(info, self, index)
            for index, part in enumerate(parts)
            for info in part.header.tensors
        }

    @property
    def node(self) -> int | None:
        """Return the node whose memory this is; None for page cache and for what several share."""
        return self.nodes[0] if len(self.nodes) == 1 else None

    @property
    def paths(self) -> list[str]:
        """Return the paths of the opened files, from the root."""
        return [part.file.path for part in self._parts]

    @property
    def metadata(self) -> Metadata:
        """Return the first file's metadata: the others only say that they are splits."""
        return self._parts[0].header.metadata

    @property
    def nbytes(self) -> int:
        """Return the bytes of all files."""
        return sum(part.file.size for part in self._parts)

    @property
    def parts(self) -> Sequence[Part]:
        return self._parts

    @property
    def companions(self) -> Companions:
        """Return which tensors hold scales of others; looked up when it is first asked for."""
        if self._companions is None:
            self._companions = Companions(self._tensors, config_beside(self.paths[0]))
        return self._companions

    def model(self) -> Model:
        """Return the identity under which replicas of these files are kept."""
        return Model(tuple(self.paths), tuple(part.file.identity() for part in self._parts))

    def workers(self, name: str = "") -> Workers:
        """Return the threads that work on these weights, or on a tensor: beside their memory."""
        from numaload.machine.workers import pool

        if self._machine is None:
            self._machine = topology()
        return pool(self._machine, self.nodes_of(name))

    def nodes_of(self, name: str) -> Group:
        """Return the nodes whose memory a tensor is in; () for page cache."""
        if not self._apart:
            return self.nodes
        return self._apart[name].nodes if name in self._apart else ()

    def is_apart(self, name: str) -> bool:
        """Return whether a tensor is in other memory than the rest."""
        return name in self._apart

    def _mapping(self, part: int, name: str = "") -> MappedMemory:
        if name in self._apart and not self._closed:
            return self._apart[name].mappings[part]
        mapping = self._mappings[part]
        if mapping is None:
            with self._lock:  # one that another one replaced would take its addresses with it
                mapping = self._mappings[part]
                if mapping is None and not self._closed:
                    file = self._parts[part].file
                    file.check_unchanged()
                    mapping = file.ask(map_file, file.fd, file.size)
                    self._mappings[part] = mapping
        # Without the lock, which threads that stream a replica would wait for: who holds it may run
        # a finalizer that waits for them.
        if self._closed or mapping is None or mapping.closed:
            raise ClosedError(f"the weights of {self.paths[0]} were closed")
        return mapping

    def image(self, part: int = 0) -> memoryview:
        """Return all bytes of one file of this view, header included, read-only, zero-copy.

        Raises: UsageError where tensors were placed apart: then no memory has a whole file.
        """
        if self._apart:
            raise UsageError(
                f"{self.paths[0]}: its tensors were placed by patterns (place): no memory has the"
                " whole file; programs that need one take the policies mirror, stripe, interleave"
            )
        return self._mapping(part).view()

    def copied(self, progress: Progress | None = None) -> Weights:
        """Read all files into memory of this process, which goes with the last array of it.

        Raises: ClosedError, and what ``open_weights`` raises for a copy.
        """
        from numaload.files.copy import copy_files  # most never copy

        files = [part.file for part in self._parts]
        for file in files:
            self._check_open(file)
        return Weights(self._parts, copy_files(files, progress))

    def read_into(self, part: int, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset`` of a file.

        Raises: ReadError, FileChangedError, ClosedError.
        """
        self.read_by(part, lambda file: file.read_into(view, offset))

    def read_by(self, part: int, read: Callable[[SourceFile], None]) -> None:
        """Have ``read`` read from a part's open file, and check that the file stayed the same.

        Raises: what ``read`` raises, FileChangedError, ClosedError.
        """
        file = self._parts[part].file
        self._check_open(file)
        try:
            read(file)
            file.check_unchanged()  # not before: what is written while it is read counts
        finally:
            self._check_open(file)  # once it is closed, its descriptor may be another file's

    def _check_open(self, file: SourceFile) -> None:
        if self._closed or file.closed:
            raise ClosedError(f"the weights of {self.paths[0]} were closed")

    def __getitem__(self, name: str) -> Tensor:
        found = self._find(name)
        if found is None:
            raise TensorNotFoundError(name, self._tensors)
        return found

    def __contains__(self, name: object) -> bool:
        return self._find(name) is not None

    def _find(self, name: object) -> Tensor | None:
        """Return the tensor of this name, or the one whose weights are known by it."""
        if name in self._tensors:
            return self._tensors[str(name)]
        found = self._tensors.get(f"{name}_blocks") if isinstance(name, str) else None
        return found if found is not None and found.weight_name == name else None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for mapping in self._mappings:
                if mapping is not None:
                    mapping.close()
            if not self.nodes:  # files belong to the weights that were opened from them
                for part in self._parts:
                    part.file.close()
            owned, self.owned = self.owned, []
        for one in owned:
            one.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f" on node {format_list(self.nodes)}" if self.nodes else ""
        about = f"{len(self)} tensors, {self.nbytes} bytes{where}"
        return printable(f"<Weights {self.paths[0]}: {about}>")
