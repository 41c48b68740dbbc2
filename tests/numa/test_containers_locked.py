"""Locked page cache where memory is short, and for ordinary users."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cgroups import cgroup
from commands import Numaload, evict, resident, running
from confined import Confined
from numaload.files.source import SourceFile, model_paths

MIB = 1 << 20
USER = 1000
READ = """
import sys
with open(sys.argv[1], "rb", buffering=0) as file:
    for _ in range(300):
        file.read(1 << 20)
"""


def test_locked_pages_outlast_what_pushes_others_out(numaload: Numaload, model: str) -> None:
    """Within 160 MiB: a model of 44 MiB, and then 300 MiB of a file that somebody reads."""
    filler = os.path.join(os.path.dirname(model), "filler")
    with SourceFile(model) as first:
        paths, nbytes = model_paths(model), first.size
    with cgroup({"memory.max": str(160 * MIB)}) as folder:
        there = numaload.within(cgroup=folder)
        evict(paths)
        report = there.json("prewarm", "--lock", model)
        assert report["locked"] == report["size"] > nbytes
        subprocess.run(
            [sys.executable, "-c", READ, filler], check=True,
            preexec_fn=Confined(cgroup=folder).enter,
        )  # fmt: skip
        assert sum(map(resident, paths)) == report["size"]
        assert resident(filler) < 160 * MIB
        numaload("release")
        assert not running(report["holder"]["pid"])
    evict([*paths, filler])


def test_an_ordinary_user_may_lock_little(numaload: Numaload, model: str) -> None:
    if os.geteuid() or "NUMA_VM" not in os.environ:
        pytest.skip("needs root in a virtual machine, to become another user")
    for path in (sys.base_prefix, sys.prefix, __file__):
        for folder in Path(path).resolve().parents:
            folder.chmod(folder.stat().st_mode | 0o5)
    os.chown(numaload.store.parent, USER, USER)
    there = numaload.within(user=USER)
    evict(model_paths(model))
    done = there("prewarm", "--lock", model, status=1)
    assert "(RLIMIT_MEMLOCK)" in done.stderr
    assert "LimitMEMLOCK" in done.stderr
    assert resident(model) < MIB
    report = there.json("prewarm", "--background", model)
    assert report["holder"]
    there("release")
