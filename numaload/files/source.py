"""Open weight files, know them again, and read every byte of a range or say why not."""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple, TypeVar

try:
    from _blake2 import blake2b  # hashlib has the same one, and takes as long as all else here
except ImportError:  # a Python with its own set of hashes
    from hashlib import blake2b

from numaload import trace
from numaload.errors import (
    CancelledError,
    FileChangedError,
    ModelNotFoundError,
    NotCopyable,
    ReadError,
    StalledError,
    reason,
    warn_once,
)
from numaload.formats.shards import SUFFIX, find_shards, is_layout
from numaload.formats.splits import sibling_paths
from numaload.formats.unusable import absence
from numaload.linux.mounts import is_network, mount_with, network_of, real

if TYPE_CHECKING:  # what asks a network is imported for files that are on one
    from numaload.files.network import Descriptor, NetworkPath

T = TypeVar("T")

MANY_FILES = 64  # of a model: fewer never need another limit
MOST_EACH = 16  # descriptors for each: the file, its replicas, direct reads, a holder's
DROP_S = 1.0  # giving page cache of a network back is not worth more
NAME_S = 5.0  # nor is the other name of a file
PATIENT_S = 60.0  # for what takes this machine's time too
HEAD_BYTES = 1 << 20  # of the file's start, which holds the header, go into the identity

KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def digest(data: bytes | bytearray) -> str:
    """Hash bytes, for names and for comparisons, not against an adversary."""
    return blake2b(data, digest_size=16).hexdigest()


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


def absolute(path: str) -> str:
    """Return the name from the root, which no change of the working directory concerns.

    What is before ".." is resolved, since above a link's target is another folder.
    """
    if not path:  # no name, which is not the working directory's
        return path
    if path[0] == "/" != path[-1] and "/." not in path and "//" not in path:
        return path  # as most are that come here
    try:
        whole = os.path.join(os.getcwd(), path)
        before, up, after = f"{whole}/".rpartition("/../")
        return os.path.normpath(os.path.join(real_path(f"{before}/.."), after) if up else whole)
    except (OSError, ValueError):  # no working directory, or a NUL: opening it says so
        return path


def _open(path: str) -> int:
    """Open it for reading. Without O_NONBLOCK, a FIFO would wait for a writer for ever."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:
        # Somebody has a lease on it, a file server perhaps, and the kernel has asked for it back.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise
        return os.open(path, flags)


def _open_regular(path: str) -> tuple[int, os.stat_result]:
    """Open a regular file; -1 for anything else, which is not opened. Raises: OSError, ValueError.

    Some devices do something when they are opened: a watchdog starts, a tape rewinds.
    """
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        return -1, found
    fd = _open(path)
    try:
        os.set_blocking(fd, True)  # or some file systems may answer EAGAIN
        return fd, os.fstat(fd)
    except BaseException:
        os.close(fd)
        raise


def _open_there(path: str) -> tuple[Descriptor, os.stat_result]:
    """Open it with an owner, who closes it even if nobody waits for this any more."""
    from numaload.files.network import Descriptor

    fd, status = _open_regular(path)
    return Descriptor(fd), status


class SourceFile(NotCopyable):
    """A regular file open for reading. Raises: ReadError for anything else.

    ``path``: from the root, so that it means the same after a change of the working directory.
    ``asked``: how its network file system is asked, by threads that can be abandoned (network.py);
    None for a file of this machine.
    ``opened``: what it was like then. ``fd``: -1 once it is closed.
    """

    __slots__ = ("_there", "fd")  # not in __dict__: who copies that owns neither
    fd: int
    _there: Descriptor | None  # owns a network's file

    def __init__(self, path: str) -> None:
        self.path = path = absolute(path)
        self.fd, self._there, self.closed = -1, None, False
        self.asked = on_network(path)
        try:
            status = self._open()
        except ReadError:
            raise
        except (OSError, ValueError) as error:
            # ValueError: a NUL in it.
            why = reason(error) if isinstance(error, OSError) else str(error)
            if not isinstance(error, FileNotFoundError):
                raise ReadError(why, path=path) from error
            hint = absence(path) if self.asked is None else ""
            raise ModelNotFoundError(f"{why}{hint}", path=path) from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            kind = KINDS.get(stat.S_IFMT(status.st_mode), "no regular file")
            raise ReadError(f"expected a file, found {kind}", path=path)
        self.size, self.opened = status.st_size, Identity.of(status)

    def _open(self) -> os.stat_result:
        """Open the file, or ask its network to. Raises: OSError, ReadError, ValueError."""
        if self.asked is None:
            self.fd, status = _open_regular(self.path)
            return status
        there, status = self.asked.ask(_open_there, self.path)
        mount = mount_with(status.st_dev)  # a link there may lead elsewhere
        if mount is not None and not is_network(mount.kind):
            self.asked, self.fd = None, there.take()
        else:
            self._there, self.fd = there, there.fd
        return status

    def ask(self, function: Callable[..., T], *arguments: object, patient: bool = False) -> T:
        """Call what may wait for the network: see NetworkPath.ask. Here, for files of this machine.

        patient: for what takes its own time as well, whatever the limit is.
        """
        asked = self.asked
        if asked is None:
            return function(*arguments)
        if patient and asked.seconds is not None:
            asked = asked._replace(seconds=max(asked.seconds, PATIENT_S))
        return asked.ask(function, *arguments, keep=self._there)

    @property
    def device(self) -> tuple[int, int]:
        """Major and minor number of what the opened file lies on, whatever has its name now."""
        return os.major(self.opened.device), os.minor(self.opened.device)

    @property
    def is_network(self) -> bool:
        """Whether reading waits for another machine, or for a FUSE server."""
        return self.asked is not None

    @trace.spanned("identify")
    def identity(self) -> Identity:
        head = bytearray(min(HEAD_BYTES, self.size))
        self.read_into(memoryview(head), 0)
        return self.opened._replace(head=digest(head))

    def check_name(self) -> None:
        """Check that ``path`` still leads to this file, before it is opened once more by that.

        Raises: FileChangedError if another file, or none, has that name now; StalledError.
        """
        try:
            now = self.ask(os.stat, self.path)
        except ReadError:
            raise
        except OSError as error:
            message = f"renamed or removed since it was opened: {reason(error)}"
            raise FileChangedError(message, path=self.path) from error
        if (now.st_dev, now.st_ino) != self.opened[:2]:
            message = "is another file now: this name was given away since it was opened"
            raise FileChangedError(message, path=self.path)

    def check_unchanged(self) -> None:
        """Check the open file. Raises: FileChangedError if it was written to or cut since."""
        try:
            now = Identity.of(self.ask(os.fstat, self.fd))
        except ReadError:
            raise
        except OSError as error:  # a file of a network that is gone there
            raise ReadError(reason(error), path=self.path) from error
        if now != self.opened:
            fields = [f for f in Identity._fields if getattr(now, f) != getattr(self.opened, f)]
            raise FileChangedError(f"changed while in use ({', '.join(fields)})", path=self.path)

    def read_at(self, offset: int, nbytes: int) -> bytes:
        buffer = bytearray(nbytes)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from ``offset``.

        Raises: ReadError, FileChangedError for bytes gone; of a network file also StalledError, and
        CancelledError where nobody wants it any more.
        """
        done, asked, there = 0, self.asked, self._there
        while done < len(view):
            try:
                if asked is None or there is None:
                    count = os.preadv(self.fd, [view[done:]], offset + done)
                else:
                    count = asked.read(there, view[done:], offset + done)
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
        with trace.span("drop", file=self.path):
            self._drop_cache(offset, nbytes)

    def _drop_cache(self, offset: int, nbytes: int) -> None:
        if self.asked is not None:
            brief = self.asked._replace(seconds=DROP_S)
            with suppress(OSError, CancelledError):  # StalledError included
                brief.ask(_drop_cache, self.fd, offset, nbytes, keep=self._there)
            return
        try:
            _drop_cache(self.fd, offset, nbytes)
        except OSError as error:
            raise ReadError(
                f"page cache cannot be given back: {reason(error)}", path=self.path, offset=offset
            ) from error

    def close(self) -> None:
        """Close it; of a network as soon as nobody is inside the kernel with it."""
        self.closed = True
        there, self._there = self._there, None
        fd, self.fd = self.fd, -1  # before it is free for others
        if there is not None:
            there.leave()
        elif fd >= 0:
            os.close(fd)

    def __enter__(self) -> SourceFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def _drop_cache(fd: int, offset: int, nbytes: int) -> None:
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)


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
    """Read a regular file of at most ``most`` bytes. Raises: ReadError."""
    with SourceFile(path) as file:
        if file.size > most:
            raise ReadError(f"{file.size} bytes, expected at most {most}", path=path)
        return file.read_at(0, file.size)


def model_paths(path: str) -> list[str]:
    """Return all files of the model that this is one of: GGUF splits, or safetensors shards.

    path: of these also their index, or the folder that they are in. Raises: SplitError, ReadError.
    """
    reach(path)
    if is_layout(path) or path.endswith(SUFFIX):
        return find_shards(path, read_whole).paths
    return sibling_paths(path)


def on_network(path: str) -> NetworkPath | None:
    """Return how the network that ``path`` leads to is asked; None on this machine.

    Raises: UsageError for a time limit that is none.
    """
    mount = network_of(path)
    if mount is None:
        return None
    from numaload.files.network import NetworkPath, limit_now

    return NetworkPath(path, mount, limit_now())


def reach(path: str) -> None:
    """Wait until the server of this name answers, before names and folders are looked at inside.

    The kernel knows the name for a while then. What is on this machine costs nothing.
    Raises: ReadError, UsageError.
    """
    asked = on_network(path)
    if asked is not None:
        try:
            asked.ask(os.stat, path)
        except ReadError:
            raise
        except (OSError, ValueError):
            pass  # that is an answer too


def real_path(path: str) -> str:
    """Return the name without links; where a network does not soon tell, the one given."""
    asked = on_network(path)
    if asked is None:
        return real(path)
    with suppress(StalledError):
        brief = asked._replace(seconds=min(NAME_S, asked.seconds or NAME_S))
        return brief.ask(real, path)
    return os.path.abspath(path)


@contextmanager
def io_timeout(seconds: float | None, files: Iterable[SourceFile] = ()) -> Iterator[None]:
    """Limit each wait for a network's answer: of files opened inside, and inside of ``files``.

    None changes nothing. Raises: UsageError.
    """
    if seconds is None:
        yield
        return
    from numaload.files.network import checked, limit

    most = checked(seconds, "io_timeout")
    token, before = limit.set(most), [(file, file.asked) for file in files]
    try:
        for file, asked in before:
            file.asked = asked._replace(seconds=most) if asked else None
        yield
    finally:
        limit.reset(token)
        for file, asked in before:
            file.asked = asked
