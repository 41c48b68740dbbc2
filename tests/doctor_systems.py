"""Systems that tests construct for the doctor: a machine as a tree, and what it would say."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from machines import EVERY_CPU, XEON, Machine
from numaload.cli.doctor import COMMANDS, remedy
from numaload.doctor.check import Check, Finding
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import DiskUse, System
from numaload.machine.devices import Device, FileDevice
from numaload.machine.topology import topology

GIB = 1 << 30
NVME = Device("nvme", "nvme0n1", "ext4", 1, read_ahead=4 << 20)
# What a machine says on which there is nothing to mend.
FAST = Speeds(disk=3.0e9, mapped=2.9e9, warm=12e9, nbytes=200 << 20, seconds=0.2)


def constructed(
    root: Path,
    machine: Machine = XEON,
    files: Mapping[str, str] | None = None,
    **said: Any,
) -> System:
    """Return a system of this machine below ``root``.

    files: {path from the root: text}, over what the machine has. said: values of the system's
    properties; with ``size`` a model of so many bytes is there, cold on a fast NVMe.
    """
    roots = machine.write(root)
    for name, text in (files or {}).items():
        place = root / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    system = System("/models/model.gguf" if said.get("size") else None, root=str(root))
    facts: dict[str, Any] = {
        "files": [],
        "residency": [],
        "_opened": (None, ""),
        "size": 0,
        "absent": said.get("size", 0),
        "device": NVME,
        "disks": FileDevice("/models/model.gguf", "ext4", "nvme0n1", ("nvme0n1",), (0,), ""),
        "mount": None,
        "speeds": FAST,
        "disk_use": DiskUse(0.0, 0.0),
        "machine": topology(**roots, allowed=EVERY_CPU),
        "binding": "libnuma.so.1",
        "refused": "",
        "opinion": "libnuma agrees on CPUs and distances",
        "cache_nodes": {},
        "stored": [],
        "replicas": [],
        "interconnect": "perf counts 0.02 GB/s over UPI, 1.5 million cache misses a second",
        "uid": 1000,
        "environment": {},
        "gpus": [],
    }
    for name, value in (facts | said).items():
        setattr(system, name, value)
    return system


OTHERS = {"grep", "seq", "nvidia-cuda-mps-control"}  # after the first command of a remedy


def assert_runs(text: str) -> None:
    """Check that what is to be pasted into sh are commands, with no word of a sentence."""
    _, command, _ = remedy(text, root=False)
    if not command:
        return
    subprocess.run(["sh", "-n", "-c", command], check=True)
    lexer = shlex.shlex(
        command.replace("{", "").replace("}", ""), posix=True, punctuation_chars=True
    )
    lexer.whitespace_split = True
    first, words = True, list(lexer)
    for word in words:
        if word and set(word) <= set("();<>|&"):
            first = bool(set(word) & set(";|&("))
        elif first and word not in ("do", "done") and "=" not in word:
            assert word in COMMANDS | OTHERS, f"{word!r} in {text!r}"
            first = False
        assert not word.endswith((",", ":")), f"{word!r} in {text!r}"


def looked(check: type[Check], system: System) -> Finding | None:
    """Run one check; None where there is nothing to look at, or nothing was found.

    What it finds must be complete: an explanation, a remedy, seconds that are not negative.
    """
    one = check(system)
    if not one.available():
        return None
    seen = one.measure()
    if not seen:
        return None
    finding = one.finding(seen)
    assert finding.why
    assert finding.fix
    assert finding.price is None or finding.price.seconds >= 0
    for text in (finding.fix, finding.undo):
        assert_runs(text)
    return finding
