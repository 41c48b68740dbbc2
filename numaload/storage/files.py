"""Opened weight files: who they are, and reads that either give every byte or say why not."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

from numaload.errors import FileChangedError, NotCopyable, ReadError, reason, warn_once
from numaload.formats.shards import SUFFIX, find_shards, is_layout
from numaload.formats.splits import sibling_paths
from numaload.numa.mounts import real
from numaload.numa.netmounts import Network, is_network, mount_on, network_of

if TYPE_CHECKING:
    from numaload.storage.netfile import NetworkFile, Status

MANY_FILES = 64  # of a model: fewer never need another limit
MOST_EACH = 16  # descriptors for each: the file, its replicas, direct reads, a holder's
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
    def of(cls, status: os.stat_result | Status, head: str = "") -> Identity:
        return cls(
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
            head,
        )


def absolute(path: str) -> str:
    """The same name from the root: what it leads to changes with no working directory.

    What is before ".." is resolved, since above a link's target is another folder.
    """
    if not path:  # no name, which is not the working directory's
        return path
    try:
        whole = os.path.join(os.getcwd(), path)
        before, up, after = f"{whole}/".rpartition("/../")
        return os.path.normpath(os.path.join(real_path(f"{before}/.."), after) if up else whole)
    except (OSError, ValueError):  # no working directory, or a NUL: opening it says so
        return path


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


class SourceFile(NotCopyable):
    """A regular file open for reading. Raises: ReadError for anything else.

    ``path``: from the root, so that it means the same after a change of the working directory.
    ``network``: the network file system it is on, None for one of this machine. Those are asked by
    processes that can be killed (netreader.py), so that reading them can be given up.
    ``opened``: what it was like then.
    """

    __slots__ = ("_far", "_fd")  # not in __dict__: who copies that owns neither
    _far: NetworkFile | None
    _fd: int

    def __init__(self, path: str) -> None:
        self.path = path = absolute(path)
        self._fd, self._far, self.closed = -1, None, False
        self.network = network_of(path)
        try:
            status = self._open()
        except BaseException as error:
            self.close()
            if isinstance(error, ReadError) or not isinstance(error, (OSError, ValueError)):
                raise
            # ValueError: a NUL in it.
            why = reason(error) if isinstance(error, OSError) else str(error)
            raise ReadError(why, path=self.path) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise ReadError(f"expected a file, found {kind}", path=path)
        self.size, self.opened = status.st_size, Identity.of(status)

    def _open(self) -> os.stat_result | Status:
        """Raises: OSError, ReadError, ValueError."""
        far = self._open_far(self.network) if self.network else None
        return far or self._open_near()

    def _open_near(self) -> os.stat_result:
        found = os.stat(self.path)
        # Some devices do something when they are opened: a watchdog starts, a tape rewinds.
        if not stat.S_ISREG(found.st_mode):
            return found
        self._fd = _open(self.path)
        os.set_blocking(self._fd, True)  # or some file systems may answer EAGAIN
        return os.fstat(self._fd)

    def _open_far(self, network: Network) -> Status | None:
        """None where it turns out to be on this machine, and where no process can be started."""
        from numaload.storage.netfile import NetworkFile
        from numaload.storage.netreader import CannotAskError

        self._far = NetworkFile(self.path, network)
        try:
            status = self._far.open()
        except CannotAskError as error:
            self._leave_far()
            warn_once(
                "netreader",
                f"{self.path}: read by this process, which then cannot be stopped while"
                f" {network} does not answer: {error}",
            )
            return None
        mount = mount_on(status.st_dev)  # a link there may lead elsewhere
        if mount is not None and not is_network(mount.kind):
            self._leave_far()
            self.network = None
            return None
        return status

    def _leave_far(self) -> None:
        far, self._far = self._far, None
        if far is not None:
            far.close()

    @property
    def fd(self) -> int:
        """-1 once it is closed. A network file's is opened when it is first asked for.

        Having it, this process may have to wait for the server: mapping it is worth that.
        """
        return self._fd if self._far is None else self._far.descriptor(_open)

    @property
    def far(self) -> NetworkFile | None:
        """Who asks the network file system about it, where it is on one."""
        return self._far

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of what the opened file lies on, whatever has its name now."""
        return os.major(self.opened.device), os.minor(self.opened.device)

    @property
    def is_network(self) -> bool:
        """Whether reading waits for another machine, or for a FUSE server."""
        return self.network is not None

    def identity(self) -> Identity:
        head = self.read_at(0, min(HEAD_BYTES, self.size))
        import hashlib

        return self.opened._replace(head=hashlib.blake2b(head, digest_size=16).hexdigest())

    def check_name(self) -> None:
        """For those who open it once more, by ``path``.

        Raises: FileChangedError if another file, or none, has that name now; StalledError.
        """
        with reached(self.path):
            try:
                now = os.stat(self.path)
            except OSError as error:
                message = f"renamed or removed since it was opened: {reason(error)}"
                raise FileChangedError(message, path=self.path) from error
        if (now.st_dev, now.st_ino) != self.opened[:2]:
            message = "is another file now: this name was given away since it was opened"
            raise FileChangedError(message, path=self.path)

    def check_unchanged(self) -> None:
        """Raises: FileChangedError if the open file was written to or cut since it was opened."""
        now = Identity.of(self._status())
        if now != self.opened:
            fields = [f for f in Identity._fields if getattr(now, f) != getattr(self.opened, f)]
            raise FileChangedError(f"changed while in use ({', '.join(fields)})", path=self.path)

    def _status(self) -> os.stat_result | Status:
        if self._far is not None:
            return self._far.status()
        try:
            return os.fstat(self._fd)
        except OSError as error:  # a file of a network that is gone there
            raise ReadError(reason(error), path=self.path) from error

    def read_at(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``.

        Raises: ReadError, FileChangedError for bytes gone; of a network file also StalledError, and
        CancelledError where nobody wants it any more.
        """
        done, far = 0, self._far
        while done < len(view):
            try:
                if far is None:
                    count = os.preadv(self._fd, [view[done:]], offset + done)
                else:
                    count = far.read(view[done:], offset + done)
            except ReadError:
                raise
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
        """Give page cache back. Pages that someone maps or writes stay. Raises: ReadError."""
        if self._far is not None:
            self._far.drop(offset, nbytes)
            return
        try:
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ReadError(
                f"page cache cannot be given back: {reason(error)}", path=self.path, offset=offset
            ) from error

    def close(self) -> None:
        self.closed = True
        fd, self._fd = self._fd, -1  # before it is free for others
        far, self._far = self._far, None
        if far is not None:
            far.close()
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        far = getattr(self, "_far", None)
        if far is not None:
            self._far = None
            self._fd = far.leave()  # locks may be held by whoever is collecting garbage
        if getattr(self, "_fd", -1) >= 0:
            self.close()


def make_room_for(count: int) -> None:
    """Raise the soft limit of open files where a model of so many files needs it, as anybody may.

    A library leaves its process's limits alone otherwise: select(2) fails beyond 1024.
    """
    if count < MANY_FILES:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = MOST_EACH * count
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        text = f"{count} files: up to {needed} may be open now (ulimit -n was {soft})"
        warn_once("open files", text)


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
    with reached(path):
        if is_layout(path) or path.endswith(SUFFIX):
            return find_shards(path, read_whole).paths
        return sibling_paths(path)


@contextmanager
def reached(path: str) -> Iterator[None]:
    """For whoever looks at names and folders in this process: only once their server answers.

    It waits for that as reading does; then the kernel knows the name for a while. What is on this
    machine costs nothing. Raises: ReadError, UsageError.
    """
    network = network_of(path)
    if network is None:
        yield
        return
    from numaload.storage.netfile import looked_up

    with looked_up(path, network):
        yield


def real_path(path: str) -> str:
    """The name without links. Where a network does not soon tell, the one that is given."""
    network = network_of(path)
    if network is None:
        return real(path)
    from numaload.storage.netfile import name_of

    return name_of(path, network)


@contextmanager
def io_timeout(seconds: float | None, files: Iterable[SourceFile] = ()) -> Iterator[None]:
    """The longest wait for a network's answer, for files opened inside, and inside for ``files``.

    None changes nothing. Raises: UsageError.
    """
    if seconds is None:
        yield
        return
    from numaload.storage.netfile import asked_for

    with asked_for(seconds, [file.far for file in files if file.far is not None]):
        yield
