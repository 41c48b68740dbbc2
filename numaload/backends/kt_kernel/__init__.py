"""kt-kernel's CPU experts (ktransformers, sglang) over numaload's replicas.

``install`` before the model is loaded. Then kt-kernel 0.7.2 with one subpool computes straight from
a replica; with several subpools it copies for itself, from memory that is warm. docs/kt-kernel.md
"""

from __future__ import annotations

from numaload.backends.kt_kernel.handle import Handle, install
from numaload.backends.kt_kernel.loader import Loader, translate_name_to_gguf
from numaload.backends.kt_kernel.parts import ExpertPart, place, tp
from numaload.backends.kt_kernel.report import Report

__all__ = [
    "ExpertPart",
    "Handle",
    "Loader",
    "Report",
    "install",
    "place",
    "tp",
    "translate_name_to_gguf",
]
