"""Opened weight files: who they are, and reads that either give every byte or say why not."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import NamedTuple

from numaload.errors import FileChangedError, ReadError, reason
from numaload.formats.shards import SUFFIX, find_shards, is_layout
from numaload.formats.splits import sibling_paths
from numaload.numa.netmounts import network_of

HEAD_BYTES = 1 << 20  # of the file's start, which holds the header, go into the identity

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


class Identity(NamedTuple):
    """A file that was not replaced or rewritten has the same. ``head`` hashes its first MiB."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    head: str = ""

    @classmethod
    def of(cls, status: os.stat_result, head: str = "") -> Identity:
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            head,
        )


def _open(path: str) -> int:
    """Opening a FIFO without O_NONBLOCK would wait for a writer for ever."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        # Somebody has a lease on it, a file server perhaps, and the kernel has asked for it back.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags)


class SourceFile:
    """A regular file open for reading. Raises: ReadError for anything else.

    ``network``: the network file system it is on, None for one of this machine.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.network = network_of(path)
        try:
            found = os.stat(path)
            # Some devices do something when they are opened: a watchdog starts, a tape rewinds.
            self.fd = _open(path) if stat.S_ISREG(found.st_mode) else -1
        except OSError as error:
            raise ReadError(reason(error), path=path) from error
        except ValueError as error:  # a NUL in it
            raise ReadError(str(error), path=path) from error
        status = found if self.fd < 0 else self._status()
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise ReadError(f"expected a file, found {kind}", path=path)
        os.set_blocking(self.fd, True)  # or some file systems may answer EAGAIN
        self.size, self._opened = status.st_size, Identity.of(status)

    @property
    def is_network(self) -> bool:
        """Whether reading waits for another machine, or for a FUSE server."""
        return self.network is not None

    def identity(self) -> Identity:
        head = self.read_at(0, min(HEAD_BYTES, self.size))
        return self._opened._replace(head=hashlib.blake2b(head, digest_size=16).hexdigest())

    def check_unchanged(self) -> None:
        """Raises: FileChangedError if the open file was written to or cut since it was opened."""
        now = Identity.of(self._status())
        if now != self._opened:
            fields = [f for f in Identity._fields if getattr(now, f) != getattr(self._opened, f)]
            raise FileChangedError(f"changed while in use ({', '.join(fields)})", path=self.path)

    def _status(self) -> os.stat_result:
        try:
            return os.fstat(self.fd)
        except OSError as error:  # a file of a network that is gone there
            raise ReadError(reason(error), path=self.path) from error

    def read_at(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``. Raises: ReadError, FileChangedError for bytes gone."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self.fd, [view[done:]], offset + done)
            except OSError as error:
                raise ReadError(reason(error), path=self.path, offset=offset + done) from error
            if count == 0:
                raise FileChangedError(
                    f"ends early: {len(view) - done} bytes are missing",
                    path=self.path,
                    offset=offset + done,
                )
            done += count

    def drop_cache(self, offset: int, nbytes: int) -> None:
        """Give page cache back. Pages that someone maps or writes stay."""
        os.posix_fadvise(self.fd, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        fd, self.fd = self.fd, -1  # before it is free for others
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def read_whole(path: str, most: int) -> bytes:
    """All of a regular file of at most ``most`` bytes. Raises: ReadError."""
    with SourceFile(path) as file:
        if file.size > most:
            raise ReadError(f"{file.size} bytes, expected at most {most}", path=path)
        return file.read_at(0, file.size)


def model_paths(path: str) -> list[str]:
    """All files of the model that this is a file of: GGUF splits, or safetensors shards.

    path: of these also their index, or the folder that they are in. Raises: SplitError, ReadError.
    """
    if is_layout(path) or path.endswith(SUFFIX):
        return find_shards(path, read_whole).paths
    return sibling_paths(path)
