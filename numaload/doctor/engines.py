"""TODO."""

from __future__ import annotations

from numaload.doctor.check import Check

CHECKS: tuple[type[Check], ...] = ()
