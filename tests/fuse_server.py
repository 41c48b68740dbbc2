"""A file system of a network as tests need it: a FUSE server that stalls when it is told to.

It serves the files of one folder, read-only, and is a process of its own: ``FuseServer`` starts it,
mounts it, and tells it what to do. Structures and numbers: linux/fuse.h, protocol 7.31. Needs root
and /dev/fuse.
"""

from __future__ import annotations

import errno
import heapq
import os
import select
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

DEVICE = "/dev/fuse"
MAX_READ = 1 << 20
BUFFER = MAX_READ + 4096
ROOT = 1  # node id; files have the next ones, in the order of their names
VALID_S = 1  # that the kernel may keep names and attributes

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE = 1, 2, 3, 14, 15, 17, 18
FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 25, 26, 27, 28, 29
INTERRUPT, DESTROY, BATCH_FORGET = 36, 38, 42
UNANSWERED = (FORGET, INTERRUPT, BATCH_FORGET)
ASYNC_READ, MAX_PAGES, DIRECT_IO, KEEP_CACHE = 1 << 0, 1 << 22, 1 << 0, 1 << 1

IN, OUT = struct.Struct("<IIQQIIIHH"), struct.Struct("<IiQ")
INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
ATTR = struct.Struct("<6Q10I")
ATTR_OUT = struct.Struct("<QII")
ENTRY_OUT = struct.Struct("<QQQQII")
OPEN_OUT = struct.Struct("<QII")
READ_IN = struct.Struct("<QQI")
STATFS_OUT = struct.Struct("<5Q4I24x")
DIRENT = struct.Struct("<QQII")


class Refusal(Exception):  # noqa: N818 - no error of the server's
    """The answer is an errno."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Server:
    """``stalled``: what is not answered for now: nothing, "reads", or "all"."""

    def __init__(self, folder: str, fd: int) -> None:
        self.folder, self.fd = folder, fd
        self.names = sorted(os.listdir(folder))
        self.stalled, self.slow_s, self.flushes = "", 0.0, False
        self.opened = KEEP_CACHE
        self.broken: dict[str, int] = {}  # a byte that gives EIO
        self.sizes: dict[str, int] = {}  # other than they are
        self.waiting: list[bytes] = []
        self.later: list[tuple[float, bytes]] = []
        self.answers: dict[int, Callable[[int, bytes], bytes]] = {
            INIT: self.init, LOOKUP: self.lookup, GETATTR: self.getattr, OPEN: self.open,
            OPENDIR: self.open, READ: self.read, READDIR: self.readdir, STATFS: self.statfs,
            RELEASE: self.nothing, RELEASEDIR: self.nothing, DESTROY: self.nothing,
            FLUSH: self.flush,
        }  # fmt: skip

    def serve(self) -> None:
        ready = select.poll()
        ready.register(self.fd, select.POLLIN)
        ready.register(0, select.POLLIN)
        while True:
            left = self.later[0][0] - time.monotonic() if self.later else None
            for fd, _ in ready.poll(None if left is None else max(0.0, left) * 1000):
                if fd == 0:
                    self.obey(sys.stdin.readline().split())
                else:
                    self.request()
            while self.later and self.later[0][0] <= time.monotonic():
                self.answer(heapq.heappop(self.later)[1])

    def obey(self, words: list[str]) -> None:
        what, *rest = words or ["quit"]
        if what == "quit":
            sys.exit(0)
        elif what == "stall":
            self.stalled = rest[0]
        elif what == "slow":
            self.slow_s = float(rest[0])
        elif what == "break":
            self.broken[rest[0]] = int(rest[1])
        elif what == "size":
            self.sizes[rest[0]] = int(rest[1])
        elif what == "open":
            self.opened = {"direct": DIRECT_IO, "anew": 0}[rest[0]]
        elif what == "flushes":
            self.flushes = True
        elif what == "work":
            self.slow_s = 0.0
            self.broken.clear()
            self.sizes.clear()
        if what in ("work", "answer"):
            self.stalled = ""
            waiting, self.waiting = self.waiting, []
            for request in waiting:
                self.answer(request)
        print("done", len(self.waiting), flush=True)

    def request(self) -> None:
        try:
            request = os.read(self.fd, BUFFER)
        except OSError as error:
            if error.errno == errno.ENODEV:  # unmounted
                sys.exit(0)
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):  # taken back
                return
            raise
        opcode = IN.unpack_from(request)[1]
        if opcode in UNANSWERED:
            return
        if self.stalled == "all" or (self.stalled == "reads" and opcode == READ):
            self.waiting.append(request)
        elif self.slow_s and opcode == READ:
            heapq.heappush(self.later, (time.monotonic() + self.slow_s, request))
        else:
            self.answer(request)

    def answer(self, request: bytes) -> None:
        _, opcode, unique, node, *_ = IN.unpack_from(request)
        error, data = 0, b""
        try:
            if opcode not in self.answers:
                raise Refusal(errno.ENOSYS)
            data = self.answers[opcode](node, request[IN.size :])
        except Refusal as refusal:
            error = -refusal.number
        try:
            os.write(self.fd, OUT.pack(OUT.size + len(data), error, unique) + data)
        except OSError as failed:
            if failed.errno != errno.ENOENT:  # whoever asked was killed
                raise

    def init(self, _: int, body: bytes) -> bytes:
        read_ahead = struct.unpack_from("<I", body, 8)[0]
        pages = MAX_READ // 4096
        return INIT_OUT.pack(
            7, 31, read_ahead, ASYNC_READ | MAX_PAGES, 64, 48, 1 << 17, 1, pages, 0, 0
        )

    def nothing(self, *_: object) -> bytes:
        return b""

    def flush(self, *_: object) -> bytes:
        """Most servers have it, and closing waits for its answer."""
        if not self.flushes:
            raise Refusal(errno.ENOSYS)
        return b""

    def name(self, node: int) -> str:
        if not 0 <= node - ROOT - 1 < len(self.names):
            raise Refusal(errno.ENOENT)
        return self.names[node - ROOT - 1]

    def size(self, name: str) -> int:
        return self.sizes.get(name, os.path.getsize(os.path.join(self.folder, name)))

    def attributes(self, node: int) -> bytes:
        if node == ROOT:
            mode, size = stat.S_IFDIR | 0o755, 0
        else:
            mode, size = stat.S_IFREG | 0o644, self.size(self.name(node))
        return ATTR.pack(
            node, size, -(-size // 512), 1, 1, 1, 0, 0, 0, mode, 1, os.geteuid(), 0, 0, 4096, 0
        )

    def lookup(self, _: int, body: bytes) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        if name not in self.names:
            raise Refusal(errno.ENOENT)
        node = ROOT + 1 + self.names.index(name)
        return ENTRY_OUT.pack(node, 0, VALID_S, VALID_S, 0, 0) + self.attributes(node)

    def getattr(self, node: int, _: bytes) -> bytes:
        return ATTR_OUT.pack(VALID_S, 0, 0) + self.attributes(node)

    def open(self, *_: object) -> bytes:
        return OPEN_OUT.pack(0, self.opened, 0)

    def read(self, node: int, body: bytes) -> bytes:
        name = self.name(node)
        _, offset, size = READ_IN.unpack_from(body)
        end = min(offset + size, self.size(name))
        if offset <= self.broken.get(name, -1) < end:
            raise Refusal(errno.EIO)
        with open(os.path.join(self.folder, name), "rb") as file:
            return os.pread(file.fileno(), max(0, end - offset), offset)

    def readdir(self, _: int, body: bytes) -> bytes:
        _, offset, _ = READ_IN.unpack_from(body)
        data = b""
        for i, name in enumerate([".", "..", *self.names][offset:], offset):
            raw = os.fsencode(name)
            kind = (stat.S_IFDIR if i < 2 else stat.S_IFREG) >> 12
            entry = DIRENT.pack(max(ROOT, i), i + 1, len(raw), kind) + raw
            data += entry + bytes(-len(entry) % 8)
        return data

    def statfs(self, *_: object) -> bytes:
        return STATFS_OUT.pack(1 << 20, 0, 0, 1 << 10, 0, 4096, 255, 4096, 0)


def main() -> None:
    folder, point = sys.argv[1:]
    fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={fd},rootmode=40755,user_id={os.geteuid()},group_id=0,max_read={MAX_READ}"
    server = Server(folder, fd)
    mount = ["mount", "-i", "-t", "fuse", "-o", options, "test-server", point]
    subprocess.run(mount, pass_fds=(fd,), check=True)
    print("mounted", flush=True)
    server.serve()


class FuseServer:
    """The server's process, as those that start it see it."""

    def __init__(self, folder: Path, point: Path) -> None:
        self.folder, self.point = folder, point
        self.job = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(point)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._line() == "mounted\n"

    def _line(self) -> str:
        assert self.job.stdout is not None
        return self.job.stdout.readline()

    def tell(self, *words: object) -> int:
        """How many requests it has and does not answer."""
        assert self.job.stdin is not None
        print(*words, file=self.job.stdin, flush=True)
        return int(self._line().split()[1])

    def waiting(self) -> int:
        return self.tell("count")

    def freeze(self) -> None:
        """It does not even hear requests: those who wait for an answer can be killed then."""
        self.job.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.job.send_signal(signal.SIGCONT)

    def end(self) -> None:
        """With it, every wait for its answers ends."""
        self.job.kill()
        self.job.communicate()
        subprocess.run(["umount", "-l", str(self.point)], check=True)


@contextmanager
def served(folder: Path, point: Path) -> Iterator[FuseServer]:
    point.mkdir(exist_ok=True)
    server = FuseServer(folder, point)
    try:
        yield server
    finally:
        server.end()


def why_not() -> str | None:
    """Why no such file system can be mounted here."""
    if os.geteuid() != 0:
        return "needs root, who may mount"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"needs {DEVICE}: modprobe fuse, or docker run --device {DEVICE}"
    return None


if __name__ == "__main__":
    main()
