"""Mirroring: replicas of a model in NUMA nodes' own memory, and local views of them for threads.

``mirror`` builds, ``attach`` finds what is in the store. Both give a Mirror.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from numaload.errors import UsageError
from numaload.mirrors.private import mapped, private
from numaload.mirrors.shared import attach_shared, mirror_shared
from numaload.mirrors.views import Mirror, MirrorReport
from numaload.mirrors.wanted import Wanted
from numaload.numa.topology import topology
from numaload.storage.files import io_timeout as waiting
from numaload.storage.reader import Progress
from numaload.weights import Weights, open_weights

__all__ = ["Mirror", "MirrorReport", "attach", "mirror"]

POLICIES = ("mirror",)


def mirror(
    weights: Weights | str | os.PathLike[str],
    nodes: str | int | Sequence[int] = "all",
    policy: str = "mirror",
    *,
    per: str = "node",
    shared: bool = False,
    hold: bool = False,
    strict: bool = False,
    drop_source: bool = False,
    io_timeout: float | None = None,
    progress: Progress | None = None,
) -> Mirror:
    """Put a verified replica of the model into each of these nodes' own memory.

    nodes: "all" (with CPUs and memory), "0,2-3", "!1", "local", an id or ids.
    per: "node", or "socket": one replica for these nodes of each socket, interleaved over them.
    shared: keep them in the store, for other processes and after this one, until released;
    otherwise they are this process's. On a machine with one node nothing is copied unless shared:
    the view is the mapped file, and ``report.note`` says so.
    hold: shared, by a holder process: not limited by the tmpfs, not emptied at logout.
    strict: refuse where memory cannot be bound. Otherwise threads on the nodes touch it first, and
    if the kernel then counts every page where it was asked for, ``report.unbound`` names the nodes.
    drop_source: give back all page cache of the files, not only what reading them brought in.
    io_timeout: seconds to wait for an answer of a network file system, then StalledError.
    progress(bytes done, bytes in all): returning False cancels.
    Raises: NodeMemoryError before anything is touched if it does not fit; NumaUnavailableError,
    PlacementError, ChecksumError, ReadError, FileChangedError, CancelledError, StoreError: then
    nothing is left.
    """
    if policy not in POLICIES:
        raise UsageError(f"policy {policy!r}: expected {' or '.join(POLICIES)}")
    if hold and not shared:
        raise UsageError("hold: only shared replicas have a holder (shared=True)")
    machine = topology()
    groups = machine.groups(machine.select(nodes), per)
    wanted = Wanted(groups, hold=hold, strict=strict, drop_source=drop_source)

    def make(model: Weights) -> Mirror:
        if shared:
            return mirror_shared([model], machine, wanted, progress)[0]
        if len(machine.usable) == 1:
            return mapped(model, machine, groups)
        return private(model, machine, wanted, progress)

    opened = [part.file for part in weights.parts] if isinstance(weights, Weights) else []
    with waiting(io_timeout, opened):
        return _opened(weights, make)


def attach(
    path: str | os.PathLike[str] | Weights, nodes: str | int | Sequence[int] | None = None
) -> Mirror:
    """The replicas of this model that are in the store, for this process to use.

    nodes: which are needed; by default all that is there. Where their pages are is asked of the
    kernel, for ``report``; ``verify()`` asks again and checks the checksums too.
    Raises: ReplicaNotFoundError, saying whether the file changed since it was mirrored.
    """
    machine = topology()
    needed = None if nodes is None else machine.select(nodes)
    return _opened(path, lambda weights: attach_shared(weights, machine, needed))


def _opened(what: Weights | str | os.PathLike[str], make: Callable[[Weights], Mirror]) -> Mirror:
    """Weights that were opened here are closed with the mirror, or with its failure."""
    if isinstance(what, Weights):
        return make(what)
    weights = open_weights(what)
    try:
        made = make(weights)
    except BaseException:
        weights.close()
        raise
    made._owns_weights = True  # noqa: SLF001
    return made
