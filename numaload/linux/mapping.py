"""Address ranges with an owner: mapped files and memory bound to a node.

Views keep the range alive. ``close()`` only lets go of it: the pages are unmapped when the last
view is gone, so no array can be left pointing at nothing.
"""

from __future__ import annotations

import errno
import mmap
import os
import weakref
from collections.abc import Collection

from numaload.errors import ClosedError, NodeMemoryError, NotCopyable, NumaError, UsageError
from numaload.linux import syscalls
from numaload.linux.syscalls import HUGE, PAGE

NO_MAPS = "its file system maps no files, as FUSE with direct_io: open it with copy=True"
MORE_ADDRESSES = "raise ulimit -v and -d, or set vm.overcommit_memory to another value than 2"


class MappedMemory(NotCopyable):
    """``length`` bytes at ``address``, which is 2 MiB-aligned and has unmapped neighbours."""

    def __init__(
        self, address: int, length: int, reserved: tuple[int, int], page: int = PAGE
    ) -> None:
        self.address, self.length, self.page = address, length, page
        self.nodes: tuple[int, ...] = ()  # that it is meant for, as far as that is said
        self._view: memoryview | None = memoryview(b"")
        if length:
            memory = syscalls.memory_at(address, length)
            # The finalizer hangs on what views refer to, not on this object.
            weakref.finalize(memory, syscalls.munmap, *reserved).atexit = False
            self._view = memoryview(memory).cast("B")

    @property
    def closed(self) -> bool:
        return self._view is None

    @property
    def range(self) -> tuple[int, int]:
        return self.address, self.length

    def view(
        self, offset: int = 0, nbytes: int | None = None, *, write: bool = False
    ) -> memoryview:
        """Return the bytes as a flat buffer that keeps the range alive, read-only unless asked."""
        if self._view is None:
            raise ClosedError("this memory was closed")
        stop = self.length if nbytes is None else offset + nbytes
        if not 0 <= offset <= stop <= self.length:  # a slice would silently be shorter
            raise UsageError(f"bytes {offset} to {stop} of a mapping of {self.length}")
        found = self._view[offset:stop]
        return found if write else found.toreadonly()

    def close(self) -> None:
        self._view = None

    def __enter__(self) -> MappedMemory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def map_file(fd: int, length: int, *, write: bool = False) -> MappedMemory:
    """Map the first ``length`` bytes of a file, shared. Raises: NumaError."""
    prot = mmap.PROT_READ | (mmap.PROT_WRITE if write else 0)
    try:
        return _map(length, prot, mmap.MAP_SHARED, fd)
    except NumaError as error:
        if error.errno == errno.ENODEV:
            error.args = (error.errno, f"{error}: {NO_MAPS}")
        raise


def map_private(length: int, *, hugetlb: bool = False) -> MappedMemory:
    """Map zeroed memory of this process, in huge pages where the kernel gives them.

    hugetlb: in those that the administrator set aside. Populate them before they are touched: a
    node that has none left would end the process.
    Raises: NodeMemoryError where the process may not have so much.
    """
    prot, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        if hugetlb:
            return _map(length, prot, flags | syscalls.MAP_HUGETLB_2M, page=HUGE)
        mapping = _map(length, prot, flags)
    except NumaError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise NodeMemoryError(f"{error}: {MORE_ADDRESSES}", needed=length) from error
    if length >= HUGE:
        syscalls.madvise(mapping.address, mapping.length, syscalls.MADV_HUGEPAGE)
    return mapping


def _map(length: int, prot: int, flags: int, fd: int = -1, *, page: int = PAGE) -> MappedMemory:
    """Reserve more than needed, then map on a 2 MiB boundary inside.

    Huge pages need an address congruent to the file's offset, and the reserved rest keeps the
    kernel from merging this range with another in /proc/self/numa_maps.
    """
    if length == 0:
        return MappedMemory(0, 0, (0, 0))
    size = -(-length // page) * page
    total = size + HUGE + PAGE
    none = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
    start = syscalls.mmap_at(0, total, syscalls.PROT_NONE, none)
    address = -(-(start + PAGE) // HUGE) * HUGE
    try:
        syscalls.mmap_at(address, size, prot, flags | syscalls.MAP_FIXED, fd)
    except NumaError:
        syscalls.munmap(start, total)
        raise
    return MappedMemory(address, length, (start, total), page)


def bind(
    mapping: MappedMemory, nodes: Collection[int], start: int = 0, stop: int | None = None
) -> None:
    """Bind pages that are not there yet: strictly to one node, or in turn to each of several.

    The kernel moves no bound page to the node whose CPUs read it (numa_balancing).
    Whole pages are bound. Raises: NumaError.
    """
    start -= start % mapping.page
    stop = mapping.length if stop is None else stop
    if start < stop:
        size = -(-(stop - start) // mapping.page) * mapping.page
        mode = syscalls.MPOL_BIND if len(nodes) == 1 else syscalls.MPOL_INTERLEAVE
        syscalls.mbind(mapping.address + start, size, mode, nodes)


def populate_write(mapping: MappedMemory, start: int, stop: int) -> None:
    """Have memory under [start, stop); start: a page's. Before Linux 5.14 writing has it."""
    size = -(-(stop - start) // PAGE) * PAGE
    syscalls.madvise(mapping.address + start, size, syscalls.MADV_POPULATE_WRITE)


def populate_read(mapping: MappedMemory, start: int = 0, stop: int | None = None) -> None:
    """Map what is in RAM into this process, so that the kernel's counts include it.

    start: a multiple of the page size. Raises: NumaError where the file got shorter or cannot be
    read; touching such a page would kill the process. Only for what is in RAM: Linux 6.1 never
    returns from reading a page here whose storage fails.
    """
    stop = mapping.length if stop is None else stop
    size = -(-(stop - start) // PAGE) * PAGE
    failed = size and syscalls.madvise(mapping.address + start, size, syscalls.MADV_POPULATE_READ)
    if failed == errno.EINVAL:  # kernels before 5.14
        view = mapping.view()
        for offset in range(start, stop, PAGE):
            view[offset]
    elif failed:
        raise NumaError(
            f"madvise: bytes {start} to {stop} cannot be read: {os.strerror(failed)};"
            " was the file cut short?",
            call="madvise",
            errno=failed,
        )
