"""Memory that replicas are filled into: bound to one node, in huge pages where they can be had."""

from __future__ import annotations

import errno
import os

from numaload.errors import StoreError, warn_once
from numaload.numa import syscalls
from numaload.numa.mapping import Mapping, bind, map_file, map_private
from numaload.numa.syscalls import HUGE
from numaload.storage import userdir

REPLICA_MODE = 0o400


class Arena:
    """Room for one file's replica on ``node``. ``fd`` is None for memory of this process alone."""

    def __init__(self, mapping: Mapping, node: int, fd: int | None = None) -> None:
        self.mapping, self.node, self.fd = mapping, node, fd
        bind(mapping, [node])

    def prepare(self, start: int, stop: int) -> None:
        """Have huge pages under [start, stop) before it is filled.

        Private memory was advised when it was mapped. Shared memory gets them, without root and
        whatever the mount says, by collapsing a range that holds one touched byte per 2 MiB:
        three times as fast as filling small pages, nine times as fast as collapsing full ones.
        """
        first, last = -(-start // HUGE) * HUGE, stop // HUGE * HUGE
        if self.fd is None or first >= last:
            return
        view = self.mapping.view(write=True)
        for offset in range(first, last, HUGE):
            view[offset] = 0
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
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


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
        raise StoreError(f"{userdir.path()}: no O_TMPFILE: {error.strerror}") from error
    try:
        os.ftruncate(fd, size)
        return Arena(map_file(fd, size, write=True), node, fd)
    except BaseException:
        os.close(fd)
        raise
