"""Tests with the real programs on a machine with several NUMA nodes: scripts/clients boots one."""

from __future__ import annotations

import pytest

import numaload


def pytest_configure(config: pytest.Config) -> None:
    """Outside a guest these tests are not collected, so here the machine must be right."""
    if len(numaload.topology().all) < 2:
        raise pytest.UsageError("two NUMA nodes are needed: scripts/clients boots them")
