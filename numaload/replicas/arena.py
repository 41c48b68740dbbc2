"""Memory that replicas are filled into: bound to its nodes, in huge pages where they can be had."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable

from numaload.errors import NodeMemoryError, NotCopyable, StoreError, reason, warn_once
from numaload.files.known import Model
from numaload.linux import syscalls
from numaload.linux.lists import format_list
from numaload.linux.mapping import MappedMemory, bind, map_file, map_private
from numaload.linux.syscalls import HUGE, PAGE
from numaload.linux.sysfs import SysFiles
from numaload.machine import userdir
from numaload.replicas.layout import Layout, Spans

REPLICA_MODE = 0o400
MEMFD = "numaload-replica"
MFD_NOEXEC_SEAL = 0x8  # linux/memfd.h


class Arena(NotCopyable):
    """Room for one file of a replica. ``fd`` is None for memory of this process alone.

    layout: says on which node each of its bytes shall be; file: its number there.
    bound: False where memory cannot be bound here: then pages land where threads first touch them.
    """

    __slots__ = ("fd",)  # not in __dict__: who copies that does not own it
    fd: int | None

    def __init__(
        self,
        mapping: MappedMemory,
        layout: Layout,
        file: int = 0,
        fd: int | None = None,
        *,
        bound: bool = True,
    ) -> None:
        self.mapping, self.layout, self.file, self.fd = mapping, layout, file, fd
        self._by_policy = bound and len(layout.nodes) > 1
        try:
            if bound and not self._by_policy:
                bind(mapping, layout.nodes)
        except BaseException:
            self.close()
            raise

    @property
    def spans(self) -> Spans:
        """Return the parts of the file that are filled here."""
        return self.layout.spans(self.file, self.mapping.length)

    def prepare(self, start: int, stop: int) -> None:
        """Have huge pages under [start, stop) before it is filled.

        Private memory was advised when it was mapped. Shared memory gets them, without root and
        whatever the mount says, by collapsing a range that holds one written byte per 2 MiB:
        three times as fast as filling small pages, nine times as fast as collapsing full ones.
        Raises: NodeMemoryError where the tmpfs is full.
        """
        if self._by_policy:
            self._prepare_by_policy(start, stop)
        else:
            self._prepare(start, stop)

    def _prepare(self, start: int, stop: int) -> None:
        if self.fd is not None:
            self._collapse(self.fd, start, stop)
        if self.fd is not None or self._by_policy or self.mapping.page == HUGE:
            self._populate(start, stop)

    def _prepare_by_policy(self, start: int, stop: int) -> None:
        """Put every range on its node, strictly, by the policy of the thread.

        The kernel's own interleaving only prefers: beside a node that page cache fills, it takes
        another's free pages, and says nothing. A policy of each range would need a mapping each,
        of which a process may have 65,530.
        """
        try:
            for first, last, node in self.layout.ranges(self.file, start, stop):
                syscalls.set_mempolicy(syscalls.MPOL_BIND, [node])
                self._prepare(first, last)
        finally:
            syscalls.set_mempolicy(syscalls.MPOL_DEFAULT, ())
        # Else numa_balancing moves them to the nodes whose threads copy from here, before all is
        # filled. Pages that are read back from swap come to these nodes too.
        bind(self.mapping, self.layout.nodes, start, stop)

    def _populate(self, start: int, stop: int) -> None:
        """Allocate pages: on a full tmpfs that is an error, but touching them would be SIGBUS."""
        size = -(-(stop - start) // PAGE) * PAGE
        failed = syscalls.madvise(self.mapping.address + start, size, syscalls.MADV_POPULATE_WRITE)
        if failed and failed != errno.EINVAL:  # kernels before 5.14: filling makes the pages
            raise self._ran_out(size, os.strerror(failed))

    def _ran_out(self, needed: int, why: str) -> NodeMemoryError:
        status = os.fstatvfs(self.fd) if self.fd is not None else None
        free = status.f_bavail * status.f_frsize if status else 0
        limited = status is not None and status.f_blocks > 0  # memfds have no tmpfs' limit
        where = f"tmpfs {userdir.path()}" if limited else "memory"
        return NodeMemoryError(
            f"{where} ran out while node {format_list(self.layout.nodes)} was filled ({why}): needs"
            f" {needed} bytes more{f', has {free}' if limited else ''}; all of it is given back:"
            " free memory, mirror to fewer nodes"
            + (", or --hold, which no tmpfs limits" if limited else ""),
            needed=needed,
            free=free,
        )

    def _collapse(self, fd: int, start: int, stop: int) -> None:
        """Make huge pages; the kernel makes each on the node of the page that is there."""
        first, last = -(-start // HUGE) * HUGE, stop // HUGE * HUGE
        if first >= last:
            return
        try:
            for offset in range(first, last, HUGE):
                # Not through the mapping: a page that is mapped must be unmapped on every CPU.
                os.pwrite(fd, b"\0", offset)
        except OSError as error:
            raise self._ran_out(last - first, reason(error)) from error
        failed = syscalls.madvise(
            self.mapping.address + first, last - first, syscalls.MADV_COLLAPSE
        )
        if failed:
            warn_once(
                "collapse",
                "parts of shared replicas may be in small pages, which are filled more slowly"
                f" (MADV_COLLAPSE, of Linux 6.1 and later: {os.strerror(failed)})",
            )

    def close(self) -> None:
        self.mapping.close()
        self._let_go()

    def _let_go(self) -> None:
        fd, self.fd = getattr(self, "fd", None), None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        # A descriptor that nobody closes would keep the nameless file. The mapping has an owner.
        self._let_go()


Allocate = Callable[[int, Layout, int], Arena]  # (size in bytes, layout, file) -> where to fill


def private_memory(*, bound: bool = True, hugetlb: bool = False) -> Allocate:
    """Allocate anonymous memory: gone with this process. hugetlb: huge pages set aside for it."""
    return lambda size, layout, file: Arena(
        map_private(size, hugetlb=hugetlb), layout, file, bound=bound
    )


def hugetlb_lacks(model: Model, layouts: Iterable[Layout]) -> str:
    """Say which nodes are not known to have enough huge pages set aside, or return "".

    Source: Documentation/ABI/testing/sysfs-kernel-mm-hugepages.
    """
    needed: Counter[int] = Counter()
    for layout in layouts:
        for i, identity in enumerate(model.identities):
            for start, stop, node in layout.ranges(i, 0, identity.size):
                needed[node] += -(-stop // HUGE) - start // HUGE
    files, lacks = SysFiles(), []
    for node, pages in sorted(needed.items()):
        folder = f"/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB"
        free, there = (files.number(f"{folder}/{n}_hugepages") for n in ("free", "nr"))
        if free is None or there is None:
            lacks.append(f"how many huge pages node {node} has cannot be read ({folder})")
        elif free < pages:
            more = pages - free + there
            lacks.append(
                f"node {node} has {free} free huge pages set aside, {pages} are needed (echo {more}"
                f" | sudo tee {folder}/nr_hugepages)"
            )
    return "; ".join(lacks)


def store_memory(folder: int, *, bound: bool = True) -> Allocate:
    """Allocate nameless files on the store's tmpfs: without names they vanish with their builder.

    folder: descriptor of the store. They raise: StoreError, NumaError.
    """
    flags = os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC

    def allocate(size: int, layout: Layout, file: int) -> Arena:
        try:
            fd = os.open(".", flags, REPLICA_MODE, dir_fd=folder)
        except OSError as error:
            raise StoreError(
                f"{userdir.path()}: cannot make a nameless file: {reason(error)}"
            ) from error
        return _of_file(fd, size, layout, file, bound=bound)

    return allocate


def held_memory(*, bound: bool = True) -> Allocate:
    """Allocate memory files of no file system: a holder process must keep them open."""

    def allocate(size: int, layout: Layout, file: int) -> Arena:
        try:
            fd = _memory_file()
        except OSError as error:
            raise StoreError(f"cannot make a memory file for a holder: {reason(error)}") from error
        return _of_file(fd, size, layout, file, bound=bound)

    return allocate


def _memory_file() -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        # From Linux 6.3 on a machine may demand to be told that nothing will be executed from it.
        return os.memfd_create(MEMFD, flags | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(MEMFD, flags)


def _resize(fd: int, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise StoreError(
            f"cannot make a memory file of {size} bytes for a replica: {reason(error)}"
        ) from error


def _of_file(fd: int, size: int, layout: Layout, file: int, *, bound: bool) -> Arena:
    try:
        userdir.check_spare(fd)
        _resize(fd, size)
        mapping = map_file(fd, size, write=True)
    except BaseException:
        os.close(fd)
        raise
    return Arena(mapping, layout, file, fd, bound=bound)
