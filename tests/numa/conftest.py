"""Tests on a kernel with several NUMA nodes: scripts/guest-tests runs them in a virtual machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload, evict
from forked import ForkedNumaload
from witness import free_bytes, kernel_killed

FEW = ("one-node", "memory-less")  # guests that have one node with memory, on purpose


def pytest_configure(config: pytest.Config) -> None:
    """Outside a guest these tests are not collected, so here the machine must be right."""
    if len(api.topology().all) < 2 and os.environ.get("NUMALOAD_GUEST") not in FEW:
        raise pytest.UsageError("two NUMA nodes are needed: scripts/guest-tests boots them")


@pytest.fixture(autouse=True)
def nobody_was_killed() -> Iterator[None]:
    yield
    assert kernel_killed() == []


@pytest.fixture
def numaload(store: Path) -> Numaload:
    return ForkedNumaload(store)


@pytest.fixture
def fill_with_page_cache(model: str, store: Path) -> Iterator[Callable[[int], None]]:
    """Fills a node with it, as reading a model does: nothing but that is in its memory."""
    filler = os.path.join(os.path.dirname(model), "filler")

    def fill(node: int) -> None:
        for _ in range(10):  # kswapd may go on giving back a little of it
            api.prewarm(filler, nodes=node, force=True)
            if free_bytes(node) < 128 << 20:
                break
        assert free_bytes(node) < 128 << 20

    yield fill
    evict([filler])


@pytest.fixture
def free_nodes() -> None:
    """Give all page cache back: memory that is not bound goes to another node before it does."""
    Path("/proc/sys/vm/drop_caches").write_text("1")


@pytest.fixture(scope="session")
def guest() -> str:
    """Which guest this is: two-nodes, no-libnuma, user, or a shape that test_shapes.py knows."""
    return os.environ.get("NUMALOAD_GUEST", "two-nodes")


@pytest.fixture(scope="session")
def nodes() -> list[int]:
    return api.topology().all
