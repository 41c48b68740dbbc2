"""Make kt-kernel take its GGUF weights from numaload, and keep what it has addresses of."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numaload.backends.kt_kernel.hook import Hook, find_hook
from numaload.backends.kt_kernel.loader import Loader
from numaload.backends.kt_kernel.report import Given, Report, own_memory, pages_by_node
from numaload.backends.kt_kernel.workers import Worker, check, thread_ids, workers
from numaload.errors import (
    ClosedError,
    ModelNotFoundError,
    NotCopyable,
    UsageError,
    printable,
    warn_once,
)
from numaload.files.reader import Progress
from numaload.files.source import absolute
from numaload.linux.lists import format_list
from numaload.machine.topology import topology
from numaload.pagecache.prewarm import prewarm
from numaload.replicas.mirror import mirror
from numaload.replicas.views import Mirror
from numaload.weights import Tensor, Weights, open_weights

Memories = dict[int | None, Sequence[Weights]]  # by node; None: the files themselves
# Memory whose addresses kt-kernel may still have: a list of each handle's, until its release.
_KEPT: list[list[memoryview]] = []


def install(
    weight_path: str | os.PathLike[str],
    nodes: str | int | Sequence[int] | None = None,
    *,
    shared: bool = False,
    hold: bool = False,
    strict: bool = False,
    mirrors: Mirror | Sequence[Mirror] | None = None,
    warm: bool = True,
    progress: Progress | None = None,
) -> Handle:
    """Make kt-kernel take the GGUF weights of this path from here; before the model is loaded.

    weight_path: as kt-kernel gets it: a .gguf file (its split siblings are found) or a folder.
    nodes: the nodes that get a replica, as for ``mirror``, of which ``shared``, ``hold``,
    ``strict`` and ``progress`` are options too; None: no replicas, the mapped files themselves.
    mirrors: what ``numaload.mirror`` or ``numaload.attach`` gave, instead; they stay the caller's.
    warm: read what is not copied into the page cache now.
    Raises: BackendError where kt-kernel is missing, broken or of an unknown make; UsageError if
    there is an open handle for this path; FileNotFoundError; all that ``mirror`` raises.
    """
    hook, path = find_hook(), absolute(os.fspath(weight_path))
    there = hook.get(path)
    if isinstance(there, _ChoosingLoader):
        raise UsageError(
            f"a handle of this path is open: {there.handle!r} is in place: close() it first"
        )
    if nodes is not None and mirrors is not None:
        raise UsageError("give nodes or mirrors, not both: mirrors already have their nodes")
    if nodes is None and (shared or hold or strict):
        raise UsageError("shared, hold and strict are of replicas that nodes= asks for")
    given = [mirrors] if isinstance(mirrors, Mirror) else list(mirrors or ())
    own: list[Weights | Mirror] = []
    try:
        models = [] if given else list(_models(path, own))
        if nodes is not None:
            kind: dict[str, Any] = {"shared": shared, "hold": hold, "strict": strict}
            for model in models:
                given.append(mirror(model, nodes, progress=progress, **kind))
                own.insert(0, given[-1])  # closed before the weights that it is of
        if warm and models and all(m.report.kind == "mapped" for m in given):
            prewarm(models, progress=progress)
        return Handle(hook, path, _memories(models, given), own)
    except BaseException:
        _close(own)
        raise


def _models(path: str, opened: list[Any]) -> Iterator[Weights]:
    """Open every model in a folder, as kt-kernel merges them, or the one of a file."""
    names = [path] if os.path.isfile(path) else _gguf_files(path)
    seen: set[str] = set()
    for name in names:
        if os.path.realpath(name) not in seen:
            model = open_weights(name)
            opened.append(model)
            seen.update(map(os.path.realpath, model.paths))
            yield model


def _gguf_files(folder: str) -> list[str]:
    # macOS's ._NAME.gguf is no model.
    names = sorted(n for n in os.listdir(folder) if n.endswith(".gguf") and n[0] != ".")
    if not names:
        raise ModelNotFoundError("no .gguf files in this folder", path=folder)
    return [os.path.join(folder, name) for name in names]


def _memories(models: Sequence[Weights], mirrors: Sequence[Mirror]) -> Memories:
    if not mirrors:
        return {None: models}
    # By their reports, for which the kernel is asked, and all pages are mapped.
    nodes = set(mirrors[0].report.asked).intersection(*(m.report.asked for m in mirrors))
    return {node: [m.view(node) for m in mirrors] for node in sorted(nodes)}


def _close(things: Sequence[Weights | Mirror]) -> None:
    for thing in things:
        thing.close()


class Handle(NotCopyable):
    """One path for which numaload is installed. ``nodes``: those with a replica, if any.

    kt-kernel keeps bare addresses, so whatever it was given stays mapped after ``close()``, and
    when this object is gone, until ``release()``.
    """

    def __init__(
        self, hook: Hook, path: str, memories: Memories, own: Sequence[Weights | Mirror]
    ) -> None:
        self.path, self._hook, self._memories, self._own = path, hook, memories, own
        self.nodes = [node for node in memories if node is not None]
        self._machine, self._threads = topology(), thread_ids()
        self._seen = frozenset[int]()  # threads that were looked at
        self._for_node: int | None = None  # that all workers are for, when last looked at
        self._moved: list[str] = []
        self._pools: dict[int, Any] = {}  # the CPUInfer of each node that ``on`` was used for
        self._given: dict[int | None, dict[int, Tensor]] = {}  # {node: {address: tensor}}
        self._memory_before: dict[int, int] | None = None
        self._buffers: list[memoryview] = []
        _KEPT.append(self._buffers)
        self._closed = False
        self._loaders = {node: _KeepingLoader(self, node) for node in memories}
        self._before, self._chosen = hook.get(path), _ChoosingLoader(self, None)
        hook.put(path, self._chosen)

    def views(self, node: int | None = None) -> Sequence[Weights]:
        """Return the weights in the memory of ``node``; None: of the first, or the files.

        One for each model, of which a folder can have several.
        Raises: ClosedError, UsageError for a node without replica.
        """
        return self._memories[self._key(node)]

    def view(self, node: int | None = None) -> Weights:
        """Return the one model's weights. Raises: as ``views``, UsageError if there are more."""
        views = self.views(node)
        if len(views) > 1:
            raise UsageError(f"{self.path} has {len(views)} models: views() returns all of them")
        return views[0]

    def loader(self, node: int | None = None) -> Loader:
        """Return a loader of that memory, for MOEs of one's own making. Raises: as ``views``."""
        return self._loaders[self._key(node)]

    def _key(self, node: int | None) -> int | None:
        if self._closed:
            raise ClosedError(f"{self!r}: nothing can be taken from it after close()")
        if node is None:
            return next(iter(self._memories))
        if node not in self._memories:
            there = format_list(self.nodes) or "no node: the files themselves are used"
            raise UsageError(f"no replica on node {node}; there are on {there}")
        return node

    @contextmanager
    def on(self, node: int) -> Iterator[Handle]:
        """Give wrappers made inside the block this node's replica, and worker threads of their own.

        For several MOEs in one process, each on its node, with threadpool_count=1 and
        numa_nodes=[node]. Not for several threads at a time. Raises: as ``views``.
        """
        before, chosen = self._hook.get(self.path), self.loader(node)
        self._hook.put(self.path, chosen)
        try:
            with self._hook.pool(self._pools, node):
                yield self
        finally:
            self._hook.put(self.path, before)

    def check(self) -> Report:
        """Move stray workers to the CPUs of their node, and report as ``report`` does."""
        return self._ask(repair=True)

    @property
    def report(self) -> Report:
        """Report where weights, copies and threads are now, and change nothing."""
        return self._ask(repair=False)

    def _ask(self, *, repair: bool) -> Report:
        report = Report(self._hook.version, self._hook.name, self.path, grown=self._grown())
        for node, tensors in self._given.items():
            ranges = [(address, tensor.nbytes) for address, tensor in tensors.items()]
            nodes, nbytes = list(self._memories[node][0].nodes), sum(n for _, n in ranges)
            report.given.append(Given(nodes, len(ranges), nbytes, pages_by_node(ranges)))
        report.workers = self._check_workers(repair=repair)
        report.notes += self._moved
        others = {w.node for w in report.workers if w.node is not None} - set(self.nodes)
        if others and self.nodes:
            wanted, there = format_list(others), format_list(self.nodes)
            report.notes.append(
                f"kt-kernel has workers for node {wanted}, but replicas are on node {there}:"
                f" install with nodes={wanted!r}"
            )
        return report

    def _grown(self) -> dict[int, int] | None:
        now = own_memory() if self._given else None
        if now is None or self._memory_before is None:
            return None
        difference = Counter(now)
        difference.subtract(self._memory_before)
        return {node: nbytes for node, nbytes in difference.items() if nbytes}

    def _workers(self) -> list[Worker]:
        only = self.nodes[0] if len(self.nodes) == 1 else None
        return workers(self._threads, only)

    def _check_workers(self, *, repair: bool) -> list[Worker]:
        found = self._workers()
        for worker in found:
            check(worker, self._machine, repair=repair)
        self._moved += [f"moved: {worker}" for worker in found if worker.repaired]
        return found

    def _node_of_workers(self) -> int | None:
        """Return the node that all of kt-kernel's workers are for, where it has a replica.

        Called for each of a model's hundreds of tensors, so threads are looked at only when there
        are new ones. Those that may run elsewhere are moved.
        """
        now = thread_ids()
        if now <= self._seen:
            return self._for_node
        self._seen = now
        found = self._check_workers(repair=True)
        nodes = {worker.node for worker in found}
        self._for_node = nodes.pop() if len(nodes) == 1 and nodes <= set(self.nodes) else None
        moved = [worker for worker in found if worker.repaired]
        if moved:
            names = ", ".join(worker.name for worker in moved)
            warn_once(
                "kt-kernel-workers",
                f"kt-kernel {self._hook.version} left {len(moved)} of its threads free to run"
                f" beside other nodes ({names}): they were put on their node's CPUs; the handle's"
                " report has them",
            )
        return self._for_node

    def _keep(self, node: int | None, tensor: Tensor) -> memoryview:
        """Return a tensor's blocks and keep them: kt-kernel has only their address."""
        self._key(node)
        if not self._given:
            self._memory_before = own_memory()
        buffer, address = tensor.memory(), tensor.address
        self._buffers.append(buffer)
        self._given.setdefault(node, {})[address] = tensor
        self._node_of_workers()
        return buffer

    def close(self) -> None:
        """Take the hook away. What kt-kernel was given stays mapped, see ``release``."""
        if self._closed:
            return
        self._closed = True
        if self._hook.get(self.path) is self._chosen:
            self._hook.put(self.path, self._before)
        self._before = None
        self._pools.clear()
        _close(self._own)

    def release(self) -> None:
        """Let go of what kt-kernel was given: only when its MOEs are gone, or have copied it.

        An MOE that computes from this memory afterwards ends the process.
        """
        self._buffers.clear()
        self._given.clear()

    @property
    def kept(self) -> int:
        """Count the bytes that stay mapped because kt-kernel may have their addresses."""
        return sum(t.nbytes for given in self._given.values() for t in given.values())

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where = f"nodes {format_list(self.nodes)}" if self.nodes else "the files themselves"
        state = ", closed" if self._closed else ""
        return printable(f"<kt-kernel from {self.path}, {where}{state}>")


class _KeepingLoader(Loader):
    """Load from the memory of one node; the handle keeps whatever was handed out."""

    def __init__(self, handle: Handle, node: int | None) -> None:
        super().__init__(handle.views(node))
        self.handle, self.node = handle, node

    def blocks_of(self, tensor: Tensor) -> memoryview:
        return self.handle._keep(self.node, tensor)  # noqa: SLF001


class _ChoosingLoader(_KeepingLoader):
    """Load from the node that kt-kernel's workers are for; this loader is handed to kt-kernel."""

    def get_undequanted_tensor_and_ggml_type(self, name: str) -> tuple[Any, Any]:
        node = self.handle._node_of_workers()  # noqa: SLF001
        return self.handle.loader(node).get_undequanted_tensor_and_ggml_type(name)
