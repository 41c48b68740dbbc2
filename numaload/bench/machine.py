"""What figures were measured on and with."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from numaload._version import __version__
from numaload.bench.memory import huge_pages
from numaload.kernels.target import target

PACKAGES = ("numba", "llvmlite", "numpy", "gguf")


def describe(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """{what: words}, with versions of these packages."""
    found = {
        "processor": f"{_processor()} ({target().cpu}), {os.cpu_count()} CPUs",
        "system": f"{platform.system()} {_release()} {platform.machine()}",
        "huge pages": huge_pages(),
        "python": platform.python_version(),
        "numaload": __version__,
    }
    return found | {name: _version(name) for name in packages}


def _release() -> str:
    """Of the kernel, without what its builder added."""
    return platform.release().partition("-")[0]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            names = (line.partition(":")[2].strip() for line in file if "model name" in line)
            return next(names, platform.machine())
    except OSError:
        return platform.machine()
