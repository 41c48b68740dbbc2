"""The processor that kernels are compiled for: this one, unless numba is told otherwise."""

from __future__ import annotations

import os
import re
from functools import cache
from typing import NamedTuple

import llvmlite
import llvmlite.binding as llvm

from numaload.kernels.jit import SettingError

NATIVE_HALVES = "avx512fp16"


class Target(NamedTuple):
    triple: str
    cpu: str
    features: str  # as LLVM writes them: +avx2,-sse4a,...
    compiler: str

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")


@cache
def target() -> Target:
    """Return what numba would choose, from the same variables. Raises: SettingError."""
    triple, features = llvm.get_process_triple(), _features()
    # With native float16 LLVM drops the mark that a store passes the caches: half the speed. Last
    # in the list, as the processor's name and other features bring it along.
    asked = os.environ.get("NUMBA_CPU_FEATURES", "").split(",")
    if triple.startswith("x86_64") and f"+{NATIVE_HALVES}" not in asked:
        features = f"{features},-{NATIVE_HALVES}".lstrip(",")
    return Target(
        triple,
        os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name(),
        features,
        f"llvmlite {llvmlite.__version__}",
    )


def _features() -> str:
    given = os.environ.get("NUMBA_CPU_FEATURES")
    if given is None and os.environ.get("NUMBA_CPU_NAME", "").lower() == "generic":
        given = ""
    if given is not None:
        # LLVM ends the process for anything else.
        if not all(re.fullmatch(r"[+-][\w.-]+", one) for one in given.split(",") if given):
            raise SettingError(f"NUMBA_CPU_FEATURES={given}: expected +feature,-feature,...")
        return given
    try:
        found = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know
        return ""
    if os.environ.get("NUMBA_ENABLE_AVX") == "0":
        found.update({name: False for name in found if name.startswith("avx")})
    flat: str = found.flatten()
    return flat


def machine() -> llvm.TargetMachine:
    """Make what emits and links code for that processor."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()
    found = target()
    return llvm.Target.from_triple(found.triple).create_target_machine(
        cpu=found.cpu, features=found.features, opt=3, codemodel="jitdefault", jit=True
    )
