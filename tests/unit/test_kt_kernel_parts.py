"""The parts of the kt-kernel backend that need no kt-kernel; tests/clients has the real one."""

from __future__ import annotations

import importlib.util
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
from numaload import weights as package
from numaload.backends import kt_kernel
from numaload.backends.kt_kernel import Loader, Report, workers
from numaload.backends.kt_kernel.hook import Hook
from numaload.backends.kt_kernel.report import Given, own_memory
from numaload.errors import BackendError, TensorNotFoundError
from numaload.linux import syscalls
from numaload.linux.lists import format_list
from numaload.machine.topology import Node, Topology, topology

INSTALLED = importlib.util.find_spec("kt_kernel") is not None


def test_without_kt_kernel_there_is_the_line_that_installs_it(tmp_path: Path) -> None:
    if INSTALLED:
        pytest.skip("kt-kernel is installed here")
    with pytest.raises(BackendError, match="pip install kt-kernel"):
        kt_kernel.install(tmp_path / "m.gguf")


def test_an_unknown_make_is_named_with_both_versions() -> None:
    with pytest.raises(BackendError, match=r"9\.9\.9.*_gguf_loaders_by_path.*0\.7\.2.*0\.7\.0"):
        Hook(type("LlamafileMoEWrapper", (), {}), "9.9.9")


def test_the_later_hook_is_by_real_path(tmp_path: Path) -> None:
    wrapper = type("LlamafileMoEWrapper", (), {"_gguf_loaders_by_path": {}})
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    hook, loader = Hook(wrapper, "0.7.2"), object()
    hook.put(str(tmp_path / "link"), loader)
    assert wrapper._gguf_loaders_by_path == {str(tmp_path / "real"): loader}  # type: ignore[attr-defined]
    assert hook.get(str(tmp_path / "real")) is loader
    hook.put(str(tmp_path / "real"), None)
    assert hook.get(str(tmp_path / "link")) is None


def test_the_earlier_hook_is_one_for_all() -> None:
    wrapper = type("LlamafileMoEWrapper", (), {"_gguf_loader_instance": None})
    hook, loader = Hook(wrapper, "0.7.0"), object()
    assert hook.get("/a") is None
    hook.put("/a", loader)
    assert wrapper._gguf_loader_instance is loader  # type: ignore[attr-defined]
    hook.put("/a", None)
    assert wrapper._gguf_loader_instance is None  # type: ignore[attr-defined]


def test_the_pool_of_before_comes_back() -> None:
    base = type("Base", (), {"_cpu_infer_instance": "first"})
    wrapper: Any = type("W", (base,), {"_gguf_loaders_by_path": {}})
    hook, pools = Hook(wrapper, "0.7.2"), dict[int, Any]()
    with hook.pool(pools, 1):
        assert wrapper._cpu_infer_instance is None
        wrapper._cpu_infer_instance = "second"
    assert pools == {1: "second"}
    assert wrapper._cpu_infer_instance == "first"
    assert "_cpu_infer_instance" not in vars(wrapper)


# --- the loader's face ----------------------------------------------------------------------------


def test_metadata_is_in_arrays_of_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    entries = [
        gb.entry("text", gb.STRING, gb.string("x")),
        gb.entry("u8", gb.U8, gb.scalar(gb.U8, 7)),
        gb.entry("f64", gb.F64, gb.scalar(gb.F64, 0.5)),
        gb.entry("words", gb.ARRAY, gb.array(gb.STRING, gb.string("a"), gb.string("b"))),
        gb.entry("none", gb.ARRAY, gb.array(gb.I32)),
    ]
    path.write_bytes(gb.build(entries, [gb.tensor("t", (32,))]))
    with package.open_weights(path) as weights:
        found = Loader([weights]).metadata
    assert found["text"] == "x"
    assert found["words"] == "a"
    assert found["u8"].tolist() == [7]
    assert found["f64"].dtype == np.float64
    assert len(found["none"]) == 0


def test_config_from_shapes_where_metadata_has_none(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    info = gb.tensor("blk.0.ffn_gate_exps.weight", (32, 4, 2))
    path.write_bytes(gb.build([], [info], bytes(32 * 4 * 2 * 4)))
    with package.open_weights(path) as weights:
        loader = Loader([weights])
        assert loader.get_model_config(0) == {
            "num_experts": 2, "num_experts_per_tok": None, "hidden_size": 32,
            "moe_intermediate_size": 4,
        }  # fmt: skip
        assert loader.get_model_config(1)["hidden_size"] is None
        with pytest.raises(TensorNotFoundError, match="ffn_up"):
            loader.get_ggml_type("model.layers.0.mlp.up_proj.weight")


# --- workers --------------------------------------------------------------------------------------


@pytest.fixture
def named() -> Iterator[Callable[..., int]]:
    """Starts a thread that has this name for the kernel and does this first; its id."""
    stop, started = threading.Event(), []

    def start(name: str, first: Callable[[], object] = lambda: None) -> int:
        ready = threading.Event()

        def run() -> None:
            syscalls.name_thread(name)
            first()
            ready.set()
            stop.wait()

        thread = threading.Thread(target=run)
        thread.start()
        started.append(thread)
        ready.wait()
        assert thread.native_id is not None
        return thread.native_id

    yield start
    stop.set()
    for thread in started:
        thread.join()


def test_workers_are_known_by_name(named: Callable[[str], int]) -> None:
    before = workers.thread_ids()
    ours = [named("numa_0_t_1"), named("numa_3_m_32697"), named("numa_0_x_1"), named("numa_0_t_-5")]
    found = {worker.tid: worker for worker in workers.workers(before)}
    assert [found[tid].node for tid in (ours[0], ours[1], ours[3])] == [0, 3, 0]
    assert ours[2] not in found
    assert found[ours[0]].cpus == sorted(os.sched_getaffinity(ours[0]))
    assert found[ours[0]].memory == []


def test_a_worker_without_a_name_is_known_by_its_memory(named: Callable[..., int]) -> None:
    """Where the number is too long for a name, and so pthread_setname_np refuses."""
    node, own = topology().all[0], Path("/proc/self/comm").read_text().strip()
    before = workers.thread_ids()
    bound = named(own, lambda: syscalls.set_mempolicy(syscalls.MPOL_BIND, [node]))
    free_one = named(own)
    found = {worker.tid: worker for worker in workers.workers(before, node)}
    assert found[bound].node == node
    assert found[bound].memory == [node]
    assert not found[bound].far_memory
    assert free_one not in found
    assert bound not in {worker.tid for worker in workers.workers({bound}, node)}
    (lost,) = (w for w in workers.workers(before) if w.tid == bound)
    workers.check(lost, topology(), repair=True)
    assert not lost.right
    assert "no name" in lost.problem


def two_halves() -> Topology:
    """The machine's CPUs as two nodes', if there are two of them."""
    cpus = sorted(topology().cpus)
    halves = cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :]
    nodes = {
        node: Node(node, frozenset(half), frozenset(half), has_memory=True, memory_total=1,
                   memory_free=1, memory_allowed=True)
        for node, half in enumerate(halves)
    }  # fmt: skip
    return Topology(nodes, "test")


def test_a_worker_that_may_run_elsewhere_is_moved(named: Callable[[str], int]) -> None:
    machine = two_halves()
    if not machine.nodes[0].cpus:
        pytest.skip("one CPU")
    tid = named("numa_1_m_0")
    wanted = machine.nodes[1].cpus

    def look(*, repair: bool) -> workers.Worker:
        (worker,) = (w for w in workers.workers() if w.tid == tid)
        workers.check(worker, machine, repair=repair)
        return worker

    only_looked = look(repair=False)
    assert not only_looked.right
    assert f"node 1 has {format_list(wanted)}" in only_looked.problem
    assert os.sched_getaffinity(tid) == os.sched_getaffinity(0)
    moved = look(repair=True)
    assert moved.right
    assert moved.repaired
    assert os.sched_getaffinity(tid) == wanted
    assert look(repair=False).problem == ""


def test_a_worker_of_a_node_that_is_not_here(named: Callable[[str], int]) -> None:
    tid = named("numa_63_t_1")
    (worker,) = (w for w in workers.workers() if w.tid == tid)
    workers.check(worker, topology(), repair=True)
    assert not worker.right
    assert "node 63, which it is for, is not on this machine" in worker.problem
    assert "WRONG" in str(worker)


# --- the report -----------------------------------------------------------------------------------


def test_own_memory_grows_by_what_is_touched_and_not_by_files(tmp_path: Path) -> None:
    nbytes = 32 << 20
    (tmp_path / "file").write_bytes(bytes(nbytes))
    before = own_memory()
    if before is None:
        pytest.skip("a kernel without numa_maps")
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.write(bytes(nbytes))
        with (
            open(tmp_path / "file", "rb") as file,
            mmap.mmap(file.fileno(), nbytes, prot=mmap.PROT_READ) as mapped,
        ):
            assert not any(mapped[offset] for offset in range(0, nbytes, mmap.PAGESIZE))
            after = own_memory()
    assert after is not None
    grown = sum(after.values()) - sum(before.values())
    assert nbytes <= grown < 3 * nbytes // 2


def test_the_report_can_be_printed_and_stored() -> None:
    report = Report("0.7.2", "_gguf_loaders_by_path", "/m.gguf")
    assert report.right
    assert report.to_dict()["copied"] == {}
    report.given = [Given([0], 3, 8 << 20, {0: 2048})]
    assert "copies: unknown" in str(report)
    report.grown = {0: 1 << 20, 1: -4096}
    assert report.copied == {}
    assert "no copies: kt-kernel computes from these pages" in str(report)
    report.grown = {0: 5 << 20, 1: 3 << 20}
    assert report.copied == {0: 5 << 20, 1: 3 << 20}
    assert "grew by 5.0 MiB on node 0, 3.0 MiB on node 1" in str(report)
    stored = report.to_dict()
    assert stored["given"][0]["local"]
    assert stored["copied"] == report.copied
