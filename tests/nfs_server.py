"""The kernel's own NFS server, exporting one folder to this machine, without other programs.

What rpc.mountd answers, the kernel asks through files in /proc/net/rpc. Needs root, the modules
nfsd, nfs and nfsv4, and a machine to itself: it is for guests. Sources: fs/nfsd/nfsctl.c,
fs/nfsd/export.c and net/sunrpc/cache.c of Linux; nfs(5).
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROL = Path("/proc/fs/nfsd")
RECOVERY = Path("/var/lib/nfs/v4recovery")  # where the kernel notes its clients
NEVER = 2147483647  # when an answer goes out of date
PORT, THREADS = 2049, 4
# Of an export: read only, insecure ports, asynchronous, no subtree check, fsid.
FLAGS = 0x1 | 0x2 | 0x10 | 0x400 | 0x2000
LARGEST = 1 << 20  # bytes of a reply; where RAM is small, the server's own limit is lower
SIOCSIFFLAGS, SIOCSIFADDR, IFF_UP = 0x8914, 0x8916, 0x1
HERE, ELSEWHERE = "127.0.0.1", "192.0.2.1"  # by the second one it looks like another machine's


def _write(name: str, text: str) -> None:
    """Write a control file in one call, as it demands."""
    fd = os.open(CONTROL / name, os.O_RDWR)
    try:
        os.write(fd, text.encode() + b"\n")
    finally:
        os.close(fd)


def _answer(cache: str, reply: Callable[[list[str]], str]) -> None:
    """Answer what the kernel asks about one of its caches, as long as this process lives."""
    channel = open(f"/proc/net/rpc/{cache}/channel", "r+b", buffering=0)  # noqa: SIM115

    def work() -> None:
        waiting = select.poll()
        waiting.register(channel, select.POLLIN)
        while True:
            waiting.poll()
            asked = (channel.read(4096) or b"").decode().splitlines()
            channel.writelines(f"{reply(line.split())}\n".encode() for line in asked)

    threading.Thread(target=work, daemon=True).start()


def _serve(folder: str) -> None:
    """Start the server, for this folder as its root. It stays until the guest ends."""
    with socket.socket() as asking:
        fcntl.ioctl(asking, SIOCSIFFLAGS, struct.pack("16sh", b"lo", IFF_UP))
        address = struct.pack("16sHH4s8x", b"lo:0", socket.AF_INET, 0, socket.inet_aton(ELSEWHERE))
        fcntl.ioctl(asking, SIOCSIFADDR, address)
    RECOVERY.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "nfsd", "nfsd", CONTROL], check=True)
    _answer("auth.unix.ip", lambda ask: f"{ask[0]} {ask[1]} {NEVER} *")
    _answer("auth.unix.gid", lambda ask: f"{ask[0]} {NEVER} 0")
    _answer("nfsd.export", lambda ask: f"{ask[0]} {ask[1]} {NEVER} {FLAGS} 65534 65534 0")
    _answer("nfsd.fh", lambda ask: f"{ask[0]} {ask[1]} {ask[2]} {NEVER} {folder}")
    _write("versions", "-3 +4 +4.1 +4.2")  # version 3 needs rpcbind
    _write("max_block_size", str(LARGEST))
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("", PORT))
        listening.listen(16)
        _write("portlist", str(listening.fileno()))
    _write("threads", str(THREADS))
    _write("v4_end_grace", "Y")  # until then no file may be opened


@contextmanager
def exported(folder: Path, point: Path, options: str = "", address: str = HERE) -> Iterator[Path]:
    """Export ``folder`` and mount it at ``point`` by NFS. options: of nfs(5), as rsize=32768.

    Every mount has the folder of the first one, on a file system such as tmpfs, not an overlay.
    address: HERE, or ELSEWHERE.
    """
    if not (CONTROL / "threads").exists():
        _serve(str(folder))
    point.mkdir(exist_ok=True)
    given = f"vers=4.2,addr={address},clientaddr={address},sec=sys{options and f',{options}'}"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(f"{address}:/".encode(), bytes(point), b"nfs4", 0, given.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(point))
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)
