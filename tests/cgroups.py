"""Cgroups for tests that run under limits. Only root makes them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
VERSION_1 = ROOT / "memory"


@contextmanager
def cgroup(limits: Mapping[str, str]) -> Iterator[str]:
    """A new group with these limits, as its folder: {"memory.max": "64M", "cpuset.mems": "1"}."""
    controllers = {name.partition(".")[0] for name in limits}
    try:
        there = set((ROOT / "cgroup.subtree_control").read_text().split())
    except OSError:
        there = set()
    if os.geteuid() or not controllers <= there:
        pytest.skip(f"needs root and cgroup 2 with {', '.join(sorted(controllers))}")
    folder = ROOT / f"numaload-test-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        for name, value in limits.items():
            (folder / name).write_text(value)
        yield str(folder)
    finally:
        folder.rmdir()


@contextmanager
def memory_limit(nbytes: int) -> Iterator[str]:
    """A new group that may use so much memory, of whichever version limits it here."""
    if os.geteuid() or not (VERSION_1 / "memory.limit_in_bytes").exists():
        with cgroup({"memory.max": str(nbytes)}) as folder:
            yield folder
        return
    made = VERSION_1 / f"numaload-test-{secrets.token_hex(4)}"
    made.mkdir()
    try:
        (made / "memory.limit_in_bytes").write_text(str(nbytes))
        yield str(made)
    finally:
        made.rmdir()
