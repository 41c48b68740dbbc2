"""llama.cpp on a replica of one node: where its pages and its copies are, and its threads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import numaload
from llama_model import Shape, write_llama
from llama_run import run
from numaload.formats.qtypes import QuantType
from numaload.linux.lists import parse_list

pytest.importorskip("xllamacpp")

IN_PLACE = {"no_extra_bufts": True}
NONE = IN_PLACE | {"load_mode": ["llama_load_mode", "LLAMA_LOAD_MODE_NONE"]}
WHOLE, SMALL = 0.9, 0.3


@contextmanager
def on(node: int) -> Iterator[None]:
    """Have this thread, and so what it starts, run on the node's CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, numaload.topology().nodes[node].usable_cpus)
    yield
    os.sched_setaffinity(0, before)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    shape = Shape(width=1024, inner=8192, layers=2, heads=8, qtype=QuantType.Q4_K)
    return write_llama(tmp_path_factory.mktemp("model") / "m.gguf", shape)[0]


@pytest.mark.usefixtures("store")
def test_pages_stay_on_their_node_and_copies_land_where_it_runs(source: str) -> None:
    size = os.path.getsize(source)
    numaload.mirror(source, nodes="all", shared=True).close()
    for node, cpus in ((1, 0), (0, 1)):
        path = str(Path(numaload.store.folder(source, node), "m.gguf"))
        with on(cpus):
            mapped, copied = run(path, IN_PLACE), run(path, NONE)
        assert set(mapped.nodes) == {node}
        assert mapped.nodes[node] > WHOLE * size
        own = {n: copied.own_nodes.get(n, 0) - mapped.own_nodes.get(n, 0) for n in (0, 1)}
        assert own[cpus] > WHOLE * size, own
        assert own[1 - cpus] < SMALL * size, own


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("strategy", ["DISABLED", "ISOLATE", "NUMACTL", "DISTRIBUTE"])
def test_any_numa_option_lets_threads_leave_the_node_they_were_pinned_to(
    tmp_path: Path, strategy: str
) -> None:
    (source,) = write_llama(tmp_path / "m.gguf")
    numaload.mirror(source, nodes="1", shared=True).close()
    path = str(Path(numaload.store.folder(source, 1), "m.gguf"))
    numa = ["ggml_numa_strategy", f"GGML_NUMA_STRATEGY_{strategy}"]
    with on(1):
        ran = run(path, IN_PLACE | {"numa": numa, "n_threads": 2})
    here = numaload.topology().nodes[1].usable_cpus
    left = [cpus for cpus in ran.threads if not set(parse_list(cpus)) <= set(here)]
    assert bool(left) == (strategy != "DISABLED"), ran.threads
    assert set(ran.nodes) == {1}  # the pages stay
