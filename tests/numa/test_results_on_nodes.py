"""New results of a node's view lie on that node, whoever asks; the kernel counts their pages."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import confined
import numaload as api
from commands import LIMIT_S, sparse_model, wait_for
from confined import DOCKER
from numaload.errors import NodeMemoryError
from numaload.machine import buffers
from witness import PAGE, by_move_pages, cpus_of

MIB = 1 << 20
NAME = "big.weight"
SIZE = 24 * MIB
# An ordinary user cannot write to the cache that root may have left in the host's /tmp.
pytestmark = pytest.mark.filterwarnings("ignore:compiled kernels are not kept")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return sparse_model(tmp_path / "m.gguf", SIZE)


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    buffers._results.clear()
    yield
    buffers._results.clear()


def counted(address: int) -> dict[int, int]:
    """{node: base pages} of the mapping that begins at an address, by /proc/self/numa_maps."""
    for line in Path("/proc/self/numa_maps").read_text().splitlines():
        if int(line.split()[0], 16) == address:
            unit = int(re.search(r"kernelpagesize_kB=(\d+)", line)[1]) * 1024 // PAGE  # type: ignore[index]
            return {int(n): int(pages) * unit for n, pages in re.findall(r" N(\d+)=(\d+)", line)}
    return {}


def check(result: Any, node: int) -> None:
    address, nbytes = result.ctypes.data, result.nbytes
    every = {node: nbytes // PAGE}
    # A page that the kernel is just moving, to make room for huge ones, is counted nowhere.
    wait_for(lambda: counted(address) == every, f"{counted(address)}, expected {every}", 5)
    assert by_move_pages(address, nbytes) == every


PROGRAM = """
import json, sys
import numaload as api
sys.path[:0] = sys.argv[2:]
from test_results_on_nodes import NAME, counted

with api.mirror(sys.argv[1], nodes="all") as mirror:
    found = {}
    for node in mirror.nodes:
        result = mirror.view(node)[NAME].dequantize()
        found[node] = counted(result.ctypes.data)
    print(json.dumps(found))
"""


def test_results_where_memory_cannot_be_bound(path: str, nodes: list[int], store: Path) -> None:
    """The node's own threads are the first to touch it.

    First of all tests: page cache of later ones would push unbound memory to another node.
    """
    folders = [str(Path(__file__).parent), str(Path(confined.__file__).parent)]
    command = [sys.executable, confined.__file__, "--deny", DOCKER, "--"]
    command += [sys.executable, "-W", "ignore", "-c", PROGRAM, path, *folders]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, check=False,
        env=os.environ | {"NUMALOAD_STORE": str(store)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {int(node): counts for node, counts in json.loads(done.stdout).items()}
    assert found == {node: {str(node): SIZE // PAGE} for node in nodes}


@pytest.mark.parametrize("caller", ["unpinned", "on its node", "on another node"])
def test_results_lie_on_the_node_of_the_view(caller: str, path: str, nodes: list[int]) -> None:
    before = os.sched_getaffinity(0)
    with api.mirror(path, nodes=nodes) as mirror:
        for node, other in zip(nodes, [*nodes[1:], nodes[0]], strict=True):
            near = {"on its node": node, "on another node": other}.get(caller)
            os.sched_setaffinity(0, before if near is None else cpus_of(near) or before)
            try:
                tensor = mirror.view(node)[NAME]
                for dtype in ("float32", "bfloat16"):
                    for _ in range(2):  # in new memory, and in memory that is used again
                        check(tensor.dequantize(dtype), node)
            finally:
                os.sched_setaffinity(0, before)


def test_memory_of_one_nodes_results_is_not_used_for_anothers(path: str, nodes: list[int]) -> None:
    with api.mirror(path, nodes=nodes) as mirror:
        for _ in range(3):
            for node in nodes:
                check(mirror.view(node)[NAME].dequantize(), node)


def test_results_beside_page_cache_that_fills_the_node(
    path: str, nodes: list[int], fill_with_page_cache: Callable[[int], None]
) -> None:
    """First touch alone would take another node's free pages."""
    with api.mirror(path, nodes=nodes) as mirror:
        fill_with_page_cache(nodes[0])
        tensor = mirror.view(nodes[0])[NAME]
        for _ in range(3):
            held = [tensor.dequantize() for _ in range(3)]
            for result in held:
                check(result, nodes[0])


def test_a_node_without_room_is_a_named_error(path: str, nodes: list[int]) -> None:
    with api.mirror(path, nodes=nodes) as mirror:
        held: list[Any] = []
        tensor = mirror.view(nodes[0])[NAME]
        words = rf"node {nodes[0]} has room for.*rows="
        with pytest.raises(NodeMemoryError, match=words) as caught:
            held.extend(tensor.dequantize() for _ in range(200))
        assert caught.value.node == nodes[0]
        held.clear()
        check(tensor.dequantize(), nodes[0])


def test_results_of_a_replica_on_several_nodes_are_spread(path: str, nodes: list[int]) -> None:
    with api.mirror(path, nodes=nodes, policy="interleave") as mirror:
        result = mirror.local()[NAME].dequantize()
        pages = by_move_pages(result.ctypes.data, result.nbytes)
        assert set(pages) == set(nodes)
        assert max(pages.values()) - min(pages.values()) <= 2 * MIB // PAGE


def test_results_of_files_are_there_too(path: str) -> None:
    with api.open(path) as weights:
        result = weights[NAME].dequantize()
        assert sum(counted(result.ctypes.data).values()) == result.nbytes // PAGE
