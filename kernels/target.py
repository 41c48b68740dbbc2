"""The processor that kernels are compiled for: this one, unless numba is told otherwise."""

from __future__ import annotations

import os
from functools import cache
from typing import NamedTuple

import llvmlite
import llvmlite.binding as llvm


class Target(NamedTuple):
    triple: str
    cpu: str
    features: str  # as LLVM writes them: +avx2,-sse4a,...
    compiler: str

    def has(self, feature: str) -> bool:
        return f"+{feature}" in self.features.split(",")


@cache
def target() -> Target:
    """Read without numba, but from the same variables: NUMBA_CPU_NAME and NUMBA_CPU_FEATURES."""
    cpu = os.environ.get("NUMBA_CPU_NAME")
    features = os.environ.get("NUMBA_CPU_FEATURES")
    if features is None:
        # As numba: what a processor of another name has is in its name.
        features = "" if cpu else llvm.get_host_cpu_features().flatten()
    return Target(
        llvm.get_process_triple(),
        cpu or llvm.get_host_cpu_name(),
        features,
        f"llvmlite {llvmlite.__version__}",
    )


def machine() -> llvm.TargetMachine:
    """What emits and links code for it."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    found = target()
    return llvm.Target.from_triple(found.triple).create_target_machine(
        cpu=found.cpu, features=found.features, opt=3, codemodel="jitdefault", jit=True
    )
