"""Control groups of this process, versions 1 and 2: where they are, and their share of the CPUs.

Source: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1; /proc/self/cgroup: cgroups(7).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from numaload.linux.sysfs import SysFiles, number_in


def folders(
    controller: str, sys_root: str = "/sys", proc_root: str = "/proc", process: str = "self"
) -> Iterator[tuple[str, int]]:
    """Yield (folder, version) of every group that limits the process, its own first.

    process: its id, as a folder of ``proc_root``.
    """
    base = f"{sys_root}/fs/cgroup"
    for row in filter(None, (SysFiles().text(f"{proc_root}/{process}/cgroup") or "").split("\n")):
        _, controllers, group = [*row.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        root, version = (f"{base}/{controller}", 1) if controllers else (base, 2)
        if version == 2 and os.path.isdir(f"{base}/unified"):  # beside version 1, by systemd
            root = f"{base}/unified"
        # Inside a container the path may be the host's; then only the root is there.
        while True:
            folder = f"{root}{group}".rstrip("/")
            if os.path.isdir(folder):
                yield folder, version
            if group in ("", "/"):
                break
            group = os.path.dirname(group)


def cpu_quota(
    sys_root: str = "/sys", proc_root: str = "/proc", process: str = "self"
) -> float | None:
    """Return how many CPUs' time the process may use, as in 1.5; None without a limit.

    It says nothing about which CPUs, and can be far below their number.
    """
    found = []
    for folder, version in folders("cpu", sys_root, proc_root, process):
        quota, period = _quota_1(folder) if version == 1 else _quota_2(folder)
        if quota and period and quota > 0 and period > 0:  # version 1: -1 is no limit
            found.append(quota / period)
    return min(found, default=None)


def _quota_1(folder: str) -> tuple[int | None, int | None]:
    files = SysFiles()
    return files.number(f"{folder}/cpu.cfs_quota_us"), files.number(f"{folder}/cpu.cfs_period_us")


def _quota_2(folder: str) -> tuple[int | None, int | None]:
    """Parse ``150000 100000``, in microseconds; ``max 100000`` is no limit."""
    quota, period = [*(SysFiles().text(f"{folder}/cpu.max") or "").split(), "", ""][:2]
    return number_in(quota), number_in(period)
