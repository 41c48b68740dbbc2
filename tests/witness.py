"""Independent witnesses of where pages are: nothing here uses numaload's own code.

``by_numa_maps`` reads another process's /proc/PID/numa_maps; ``by_move_pages`` asks the kernel for
every page of a range of this process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

MOVE_PAGES = {"x86_64": 279, "aarch64": 239}[os.uname().machine]
PAGE = mmap.PAGESIZE


def by_numa_maps(pid: int | str, name: str) -> dict[int, int]:
    """{node: base pages} of the mappings of files whose path contains ``name``."""
    found: Counter[int] = Counter()
    for line in Path(f"/proc/{pid}/numa_maps").read_text(errors="replace").splitlines():
        if f"{name}" not in line:
            continue
        unit = int(match[1]) if (match := re.search(r"kernelpagesize_kB=(\d+)", line)) else 4
        for node, count in re.findall(r" N(\d+)=(\d+)", line):
            found[int(node)] += int(count) * unit * 1024 // PAGE
    return dict(found)


def by_move_pages(address: int, nbytes: int) -> dict[int, int]:
    """{node, or negative errno: pages} of all pages from ``address`` on."""
    count = -(-(address % PAGE + nbytes) // PAGE)
    start = address - address % PAGE
    pages = (ctypes.c_void_p * count)(*range(start, start + count * PAGE, PAGE))
    status = (ctypes.c_int * count)(*[-(1 << 20)] * count)
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = (ctypes.c_long(MOVE_PAGES), ctypes.c_int(0), ctypes.c_ulong(count))
    done = libc.syscall(*arguments, pages, None, status, ctypes.c_int(0))
    assert done == 0, os.strerror(ctypes.get_errno())
    return dict(Counter(status))


def cpus_of(node: int) -> set[int]:
    """From the kernel's own per-CPU links, not from the node's list."""
    folder = Path(f"/sys/devices/system/node/node{node}")
    return {int(p.name[3:]) for p in folder.glob("cpu[0-9]*")}


def free_bytes(node: int) -> int:
    text = Path(f"/sys/devices/system/node/node{node}/meminfo").read_text()
    match = re.search(r"MemFree:\s+(\d+) kB", text)
    assert match
    return int(match[1]) << 10


def kernel_killed() -> list[str]:
    """Lines of the kernel's log that tell of a process killed for memory."""
    log = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout
    return [
        line
        for line in log.splitlines()
        if re.search(r"oom-kill|Out of memory|Killed process", line)
    ]


def mapped(address: int) -> bool:
    """Whether this process can reach the address; reserved neighbours do not count."""
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        start, stop = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= address < stop:
            return line.split()[1] != "---p"
    return False
