"""The parts of the kt-kernel backend that need no kt-kernel; tests/clients has the real one."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import gguf_builder as gb
from moe_model import PLAIN, Shape, write_moe
from numaload import weights as package
from numaload.backends import kt_kernel, kt_kernel_copies, kt_kernel_workers
from numaload.backends.kt_kernel_hook import MISSING, hook_of
from numaload.backends.kt_kernel_loader import Loader
from numaload.errors import BackendError, TensorNotFoundError
from numaload.numa import syscalls
from numaload.numa.lists import format_list
from numaload.numa.threads import name_thread
from numaload.numa.topology import Node, Topology, topology
from numaload.weights.slices import Slice

SHAPE = Shape(experts=3, hidden=256, inner=1280, types=PLAIN)
INSTALLED = importlib.util.find_spec("kt_kernel") is not None


@pytest.fixture
def weights(tmp_path: Path) -> Iterator[Any]:
    with package.open_weights(write_moe(tmp_path / "m.gguf", SHAPE)) as opened:
        yield opened


def test_without_kt_kernel_there_is_the_line_that_installs_it(tmp_path: Path) -> None:
    if INSTALLED:
        pytest.skip("kt-kernel is installed here")
    with pytest.raises(BackendError, match="pip install kt-kernel"):
        kt_kernel.install(tmp_path / "m.gguf")


def test_an_unknown_make_is_named_with_both_versions() -> None:
    with pytest.raises(BackendError, match=r"9\.9\.9.*_gguf_loaders_by_path.*0\.7\.2.*0\.7\.0"):
        hook_of(type("LlamafileMoEWrapper", (), {}), "9.9.9")


def test_the_later_hook_is_by_real_path(tmp_path: Path) -> None:
    wrapper = type("LlamafileMoEWrapper", (), {"_gguf_loaders_by_path": {}})
    (tmp_path / "real").touch()
    (tmp_path / "link").symlink_to("real")
    hook, loader = hook_of(wrapper, "0.7.2"), object()
    assert not hook.copies
    hook.put(str(tmp_path / "link"), loader)
    assert wrapper._gguf_loaders_by_path == {str(tmp_path / "real"): loader}  # type: ignore[attr-defined]
    assert hook.get(str(tmp_path / "real")) is loader
    hook.put(str(tmp_path / "real"), MISSING)
    assert hook.get(str(tmp_path / "link")) is MISSING


def test_the_earlier_hook_is_one_for_all() -> None:
    wrapper = type("LlamafileMoEWrapper", (), {"_gguf_loader_instance": None})
    hook, loader = hook_of(wrapper, "0.7.0"), object()
    assert hook.copies
    assert hook.get("/a") is MISSING
    hook.put("/a", loader)
    assert wrapper._gguf_loader_instance is loader  # type: ignore[attr-defined]
    hook.put("/a", MISSING)
    assert wrapper._gguf_loader_instance is None  # type: ignore[attr-defined]


def test_the_pool_of_before_comes_back() -> None:
    base = type("Base", (), {"_cpu_infer_instance": "first"})
    wrapper: Any = type("W", (base,), {"_gguf_loaders_by_path": {}})
    hook = hook_of(wrapper, "0.7.2")
    with hook.pool(None) as used:
        assert wrapper._cpu_infer_instance is None
        wrapper._cpu_infer_instance = "second"
        assert used() == "second"
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
        found = Loader([weights], lambda tensor: tensor.buffer).metadata
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
        loader = Loader([weights], lambda tensor: tensor.buffer)
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
            name_thread(name)
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
    before = kt_kernel_workers.thread_ids()
    ours = [named("numa_0_t_1"), named("numa_3_m_32697"), named("numa_0_x_1"), named("numa_0_t_-5")]
    found = {worker.tid: worker for worker in kt_kernel_workers.workers(before)}
    assert [found[tid].node for tid in (ours[0], ours[1], ours[3])] == [0, 3, 0]
    assert ours[2] not in found
    assert found[ours[0]].cpus == sorted(os.sched_getaffinity(ours[0]))
    assert found[ours[0]].memory == []


def test_a_worker_without_a_name_is_known_by_its_memory(named: Callable[..., int]) -> None:
    """Where the number is too long for a name, and so pthread_setname_np refuses."""
    node, own = topology().all[0], Path("/proc/self/comm").read_text().strip()
    before = kt_kernel_workers.thread_ids()
    bound = named(own, lambda: syscalls.set_mempolicy(syscalls.MPOL_BIND, [node]))
    free_one = named(own)
    found = {worker.tid: worker for worker in kt_kernel_workers.workers(before, node)}
    assert found[bound].node == node
    assert found[bound].memory == [node]
    assert not found[bound].far_memory
    assert free_one not in found
    assert bound not in {worker.tid for worker in kt_kernel_workers.workers({bound}, node)}
    (lost,) = (w for w in kt_kernel_workers.workers(before) if w.tid == bound)
    kt_kernel_workers.check(lost, topology(), repair=True)
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

    def look(*, repair: bool) -> kt_kernel_workers.Worker:
        (worker,) = (w for w in kt_kernel_workers.workers() if w.tid == tid)
        kt_kernel_workers.check(worker, machine, repair=repair)
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
    (worker,) = (w for w in kt_kernel_workers.workers() if w.tid == tid)
    kt_kernel_workers.check(worker, topology(), repair=True)
    assert not worker.right
    assert "node 63, which it is for, is not on this machine" in worker.problem
    assert "WRONG" in str(worker)


# --- copies ---------------------------------------------------------------------------------------


def malloc(data: bytes) -> int:
    """The same memory that ``new uint8_t[]`` gives."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    address = libc.malloc(ctypes.c_size_t(len(data)))
    ctypes.memmove(address, data, len(data))
    return int(address)


def free(address: int) -> None:
    ctypes.CDLL(None).free(ctypes.c_void_p(address))


@pytest.mark.parametrize("experts", [1, 3], ids=["of the heap", "of pages of their own"])
@pytest.mark.parametrize("part", [0, 1])
def test_copies_are_found_by_what_is_in_them(tmp_path: Path, experts: int, part: int) -> None:
    inner = 512 if experts == 1 else SHAPE.inner
    shape = Shape(experts, 1, 256 if experts > 1 else 32, inner, 1, PLAIN)
    with package.open_weights(write_moe(tmp_path / "m.gguf", shape)) as weights:
        tensors = list(weights.values())
        parts = [weights.tp(part, 2)[tensor.name] for tensor in tensors]
        made = [malloc(one.blocks.tobytes()) for one in parts]
        try:
            found, searched = kt_kernel_copies.find_copies(tensors, [])
        finally:
            for address in made:
                free(address)
    assert searched
    assert len(made) == 3
    wanted = {
        (one.name, address, one.nbytes, one.range.start, len(one.range))
        for one, address in zip(parts, made, strict=True)
        if isinstance(one, Slice)
    }
    assert wanted <= {(c.name, c.address, c.nbytes, c.first, c.count) for c in found}


def test_what_was_changed_is_no_copy(weights: Any) -> None:
    tensor = weights["blk.0.ffn_down_exps.weight"]
    data = bytearray(weights.tp(0, 2)[tensor.name].blocks.tobytes())
    data[-1] ^= 1
    address = malloc(bytes(data))
    try:
        found, _ = kt_kernel_copies.find_copies([tensor], [])
    finally:
        free(address)
    assert address not in [copied.address for copied in found]


def test_more_memory_than_is_searched_is_said(
    weights: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kt_kernel_copies, "SEARCHED", 4096)
    _, searched = kt_kernel_copies.find_copies(list(weights.values()), [])
    assert not searched


def test_the_report_can_be_printed_and_stored(weights: Any) -> None:
    report = kt_kernel.Report("0.7.2", "_gguf_loaders_by_path", "/m.gguf")
    assert report.right
    assert report.to_dict()["copied"] == {}
    report.copies = [kt_kernel_copies.Copy("a", 0, 8192, 0, 256, {0: 1, 1: 1})]
    assert report.copied == {0: 4096, 1: 4096}
    assert "weights 0 to 256" in str(report)
    assert SimpleNamespace(**report.to_dict()).copies[0]["count"] == 256
