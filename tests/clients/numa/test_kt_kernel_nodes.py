"""kt-kernel on two NUMA nodes: where its weights are, where its copies go, where its threads run.

One process for all tests, since importing torch takes half a minute under emulation. Witnesses are
the kernel's files and move_pages, asked for every page without numaload's code.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kt_checks
import kt_moe as kt
import numaload as api
from moe_model import Shape, write_moe
from numaload.backends import kt_kernel
from numaload.backends.kt_kernel import place, tp
from numaload.linux.syscalls import HUGE
from witness import by_move_pages, cpus_of

SHAPE = Shape(experts=5, hidden=512, inner=1280)
pytestmark = [
    pytest.mark.filterwarnings("ignore:kt-kernel 0.7.2 left:numaload.errors.NumaloadWarning"),
    pytest.mark.filterwarnings("ignore:The given NumPy array is not writable"),
]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_moe(tmp_path_factory.mktemp("moe") / "m.gguf", SHAPE)


@pytest.fixture(scope="module")
def wanted(path: str) -> list[Any]:
    """What kt-kernel's own loader gives."""
    return kt_checks.outputs(kt.wrapper(path, SHAPE), SHAPE)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Workers of the test's own: kt-kernel keeps the first ones for the process."""
    wrapper = kt_checks.wrapper_class()
    before, wrapper._cpu_infer_instance = wrapper._cpu_infer_instance, None
    yield
    wrapper._cpu_infer_instance = before


def new_threads(before: set[int], node: int) -> dict[str, set[int]]:
    """{name: CPUs} of the threads that kt-kernel made for this node since."""
    found = {}
    for tid in {int(name) for name in os.listdir("/proc/self/task")} - before:
        name = Path(f"/proc/self/task/{tid}/comm").read_text().strip()
        if name.startswith(f"numa_{node}_"):
            found[name] = set(os.sched_getaffinity(tid))
    return found


def thread_ids() -> set[int]:
    return {int(name) for name in os.listdir("/proc/self/task")}


def pages_of(handle: kt_kernel.Handle, node: int) -> dict[int, int]:
    """{node: pages} of every address that kt-kernel was given, by move_pages."""
    found: dict[int, int] = {}
    for name in kt.names():
        data, _ = handle.loader(node).get_undequanted_tensor_and_ggml_type(name)
        for there, pages in by_move_pages(data.data_ptr(), data.numel()).items():
            found[there] = found.get(there, 0) + pages
    return found


def test_an_moe_on_each_node_of_one_process(path: str, wanted: list[Any]) -> None:
    with kt_kernel.install(path, nodes="0,1") as handle:
        for node in (0, 1):
            before = thread_ids()
            with handle.on(node):
                made = kt.wrapper(path, SHAPE, nodes=[node])
            assert kt_checks.equal(kt_checks.outputs(made, SHAPE), wanted)
            assert set(pages_of(handle, node)) == {node}
            threads = new_threads(before, node)
            assert len(threads) == 2, threads
            assert all(cpus <= cpus_of(node) for cpus in threads.values()), threads
        report = handle.check()
        assert report.right, str(report)
        assert [(given.nodes, set(given.pages)) for given in report.given] == [
            ([0], {0}),
            ([1], {1}),
        ]
        assert report.copied == {}
        assert any("numa_1_m_" in note for note in report.notes), report.notes


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("node", [1, 0])
def test_a_process_on_one_node(path: str, wanted: list[Any], node: int) -> None:
    before = thread_ids()
    with kt_kernel.install(path, nodes=node) as handle:
        assert handle.nodes == [node]
        made = kt.wrapper(path, SHAPE, nodes=[node])
        assert kt_checks.equal(kt_checks.outputs(made, SHAPE), wanted)
        assert set(pages_of(handle, node)) == {node}
        threads = new_threads(before, node)
        assert threads
        assert all(cpus <= cpus_of(node) for cpus in threads.values()), threads


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("node", [0, 1])
def test_the_replica_is_that_of_the_workers(
    path: str, wanted: list[Any], node: int, store: Path
) -> None:
    """All nodes are installed, from the store; kt-kernel alone is told where to run."""
    api.mirror(path, shared=True).close()
    others = set(thread_ids())
    with api.attach(path) as mirror, kt_kernel.install(path, mirrors=mirror) as handle:
        with only_workers_of(handle, others):
            made = kt.wrapper(path, SHAPE, nodes=[node])
        assert kt_checks.equal(kt_checks.outputs(made, SHAPE), wanted)
        (given,) = handle.report.given
        assert given.nodes == [node]
        assert set(given.pages) == {node}
        address = next(iter(handle._given[node]))
        assert set(by_move_pages(address, 1 << 20)) == {node}


@pytest.mark.usefixtures("fresh", "store")
def test_it_computes_the_same_from_a_striped_replica(path: str, wanted: list[Any]) -> None:
    """One copy, of whose experts each node has some: kt-kernel reads it on both."""
    api.mirror(path, shared=True, policy="stripe").close()
    with api.attach(path, policy="stripe") as mirror:
        assert mirror.report.placed
        with kt_kernel.install(path, mirrors=mirror) as handle:
            made = kt.wrapper(path, SHAPE, nodes=[0])
            assert kt_checks.equal(kt_checks.outputs(made, SHAPE), wanted)
            assert set(pages_of(handle, 0)) == {0, 1}


def only_workers_of(handle: kt_kernel.Handle, others: set[int]) -> Any:
    """Earlier tests' workers live as long as their MOEs, that is as long as this process."""
    patch = pytest.MonkeyPatch()
    found: Callable[[], Any] = handle._workers
    patch.setattr(handle, "_workers", lambda: [w for w in found() if w.tid not in others])
    patch.setattr(handle, "_seen", frozenset())
    return patch.context()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("nodes", [[0, 1], [1, 0]])
def test_copies_of_two_subpools(path: str, nodes: list[int]) -> None:
    """The report says what the kernel says; where the copies land is kt-kernel's doing."""
    before = thread_ids()
    with kt_kernel.install(path) as handle:
        made = kt.wrapper(path, SHAPE, nodes=nodes)
        report = handle.check()  # before computing takes memory as well
        found = kt_checks.outputs(made, SHAPE)
        # What else grows or shrinks in this process, or ends within a huge page, counts as well.
        assert SHAPE.nbytes() - HUGE <= sum(report.copied.values()) < 2 * SHAPE.nbytes()
        print(f"{nodes}: {report}")
        far = {worker.name for worker in report.workers if worker.far_memory}
        assert ("numa_1_m_0" in far) == (nodes == [1, 0])
        if nodes == [0, 1]:  # the first part has three of five units
            for node, units in ((0, 3), (1, 2)):
                part = SHAPE.nbytes() * units // 5
                assert part - HUGE <= report.copied[node] < part + HUGE
        for node in (0, 1):
            threads = new_threads(before, node)
            assert all(cpus <= cpus_of(node) for cpus in threads.values()), threads
        t = kt.tokens(SHAPE, kt_checks.COUNTS[1])
        assert kt.error(found[1], kt.reference(handle.view(), t)) < 0.03
        assert torch.isfinite(found[0]).all()


def test_parts_of_tp_in_the_memory_of_their_node(path: str) -> None:
    with api.open(path) as weights:
        for part in (0, 1):
            placed = place(tp(weights, part, 2), part)
            assert list(placed) == kt.names()
            for tensor in placed.values():
                assert set(by_move_pages(tensor.address, tensor.nbytes)) == {part}
