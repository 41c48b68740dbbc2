"""Memory that replicas are filled into: bound to one node, in huge pages where they can be had."""

from __future__ import annotations

import errno
import os

from numaload.errors import NodeMemoryError, StoreError, warn_once
from numaload.numa import syscalls
from numaload.numa.mapping import Mapping, bind, map_file, map_private
from numaload.numa.syscalls import HUGE, PAGE
from numaload.storage import userdir

REPLICA_MODE = 0o400


class Arena:
    """Room for one file's replica on ``node``. ``fd`` is None for memory of this process alone."""

    fd: int | None = None

    def __init__(self, mapping: Mapping, node: int, fd: int | None = None) -> None:
        self.mapping, self.node, self.fd = mapping, node, fd
        try:
            bind(mapping, [node])
        except BaseException:
            self.close()
            raise

    def prepare(self, start: int, stop: int) -> None:
        """Have huge pages under [start, stop) before it is filled.

        Private memory was advised when it was mapped. Shared memory gets them, without root and
        whatever the mount says, by collapsing a range that holds one touched byte per 2 MiB:
        three times as fast as filling small pages, nine times as fast as collapsing full ones.
        Raises: NodeMemoryError where the tmpfs is full.
        """
        if self.fd is None:
            return
        first, last = -(-start // HUGE) * HUGE, stop // HUGE * HUGE
        for offset in range(first, last, HUGE):
            self._populate(offset, offset + PAGE)
        if first < last:
            self._collapse(first, last)
        self._populate(start, stop)

    def _populate(self, start: int, stop: int) -> None:
        """Have pages here: on a full tmpfs this fails, where touching them would kill by SIGBUS."""
        size = -(-(stop - start) // PAGE) * PAGE
        failed = syscalls.madvise(self.mapping.address + start, size, syscalls.MADV_POPULATE_WRITE)
        if failed and failed != errno.EINVAL:  # kernels before 5.14: filling makes the pages
            status = os.statvfs(userdir.path())
            free = status.f_bavail * status.f_frsize
            raise NodeMemoryError(
                f"tmpfs {userdir.path()} ran out while node {self.node} was filled"
                f" ({os.strerror(failed)}): needs {size} bytes more, has {free}; all of it is given"
                " back: free some of the tmpfs, or mirror to fewer nodes",
                needed=size,
                free=free,
            )

    def _collapse(self, first: int, last: int) -> None:
        failed = syscalls.madvise(
            self.mapping.address + first, last - first, syscalls.MADV_COLLAPSE
        )
        if failed:
            reason = "needs Linux 6.1" if failed == errno.EINVAL else os.strerror(failed)
            warn_once(
                "collapse",
                f"no huge pages for shared replicas (MADV_COLLAPSE: {reason}); small ones are used,"
                " filling is about 3 times slower",
            )

    def close(self) -> None:
        self.mapping.close()
        self._let_go()

    def _let_go(self) -> None:
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        # A descriptor that nobody closes would keep the nameless file. The mapping has an owner.
        self._let_go()


def private_arena(size: int, node: int) -> Arena:
    """Anonymous memory: gone with this process."""
    return Arena(map_private(size), node)


def shared_arena(size: int, node: int, folder: int) -> Arena:
    """A nameless file on the store's tmpfs: it vanishes with its builder unless it gets a name.

    folder: descriptor of the store. Raises: StoreError, NumaError.
    """
    try:
        fd = os.open(".", os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, REPLICA_MODE, dir_fd=folder)
    except OSError as error:
        raise StoreError(f"{userdir.path()}: no nameless file: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
        mapping = map_file(fd, size, write=True)
    except BaseException:
        os.close(fd)
        raise
    return Arena(mapping, node, fd)
