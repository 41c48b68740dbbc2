"""Tests with the real programs, in the environment that scripts/clients makes."""

from __future__ import annotations

import pytest

import numaload

collect_ignore = [] if len(numaload.topology().all) > 1 else ["numa"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run kt-kernel's last: imported after torch, it changes what torch does in this process.

    ``with torch.device("meta")`` no longer counts then, and subnormal numbers become zero.
    """
    items.sort(key=lambda item: "kt_kernel" in item.path.name)
