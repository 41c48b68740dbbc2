"""The memory of new results: huge pages, whose it is, when it is given back, what is used again."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

import numaload
from numaload.errors import NodeMemoryError
from numaload.formats.qtypes import QuantType
from numaload.linux.syscalls import HUGE
from numaload.machine import buffers, memory
from numaload.replicas.plan import PRIVATE, plan
from numaload.samples import random_blocks

COLUMNS = 4096
ROWS = 512  # 8 MiB of float32
LARGE, SMALL = (0, ROWS), (0, 4)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[numaload.Weights]:
    path = tmp_path_factory.mktemp("results") / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    for seed, qtype in enumerate((QuantType.Q4_K, QuantType.BF16)):
        blocks = random_blocks(qtype, ROWS, COLUMNS, np.random.default_rng(seed))
        kind = gguf.GGMLQuantizationType(qtype.value)
        writer.add_tensor(qtype.name, blocks.reshape(ROWS, -1), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with numaload.open(path) as weights:
        yield weights


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    """Begin with memory of nobody else, and a recent look at how much there is."""
    gc.collect()
    buffers._results.clear()
    memory.require(2 * memory.TRUSTED, "a look", "")
    yield
    gc.collect()
    buffers._results.clear()


def maps(address: int | None = None) -> list[str]:
    """Lines of /proc/self/maps: all, or of the range that holds an address."""
    found = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        start, stop = (int(word, 16) for word in line.split()[0].split("-"))
        if address is None or start <= address < stop:
            found.append(line)
    return found


def in_huge_pages(address: int) -> int:
    """Bytes in huge pages of the mapping that begins at an address."""
    text = Path("/proc/self/smaps").read_text()
    (entry,) = re.findall(
        rf"^{address:08x}-.*?^AnonHugePages: +(\d+) kB$", text, re.MULTILINE | re.DOTALL
    )
    return int(entry) << 10


def same(found: Any, expected: Any) -> bool:
    """Whether they are bit for bit the same, NaN included."""
    return np.array_equal(found.view(np.uint8), expected.view(np.uint8))


def into(tensor: Any, dtype: str, rows: tuple[int, int]) -> Any:
    out = np.empty((rows[1] - rows[0], COLUMNS), numaload.dequantize.DTYPES[dtype])
    return tensor.dequantize(dtype, out=out, rows=rows)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [127, 128, 129, 300, ROWS])
def test_results_are_those_of_out(weights: numaload.Weights, dtype: str, rows: int) -> None:
    for tensor in weights.values():
        for _ in range(2):  # in new memory, and in memory that is used again
            found = tensor.dequantize(dtype, rows=(ROWS - rows, ROWS))
            expected = into(tensor, dtype, (ROWS - rows, ROWS))
            assert found.dtype == expected.dtype
            assert found.shape == expected.shape
            assert same(found, expected)
            del found


def test_large_results_are_in_huge_pages(weights: numaload.Weights) -> None:
    found = weights["Q4_K"].dequantize()
    assert found.ctypes.data % HUGE == 0
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" not in enabled:
        assert in_huge_pages(found.ctypes.data) == found.nbytes


def test_small_results_are_numpys_own(weights: numaload.Weights) -> None:
    assert weights["Q4_K"].dequantize(rows=SMALL).flags.owndata
    assert not buffers._results._free


def test_a_result_is_an_ordinary_array(weights: numaload.Weights) -> None:
    found = weights["BF16"].dequantize()
    expected = into(weights["BF16"], "float32", LARGE)
    assert found.flags.writeable
    assert found.flags.c_contiguous
    assert found.flags.aligned
    pickled = pickle.loads(pickle.dumps(found))  # noqa: S301 - our own
    copies = (copy.copy(found), copy.deepcopy(found), pickled)
    found[:] = 0
    for one in copies:
        assert same(one, expected)


def test_memory_lives_as_long_as_its_last_view(weights: numaload.Weights) -> None:
    found = weights["Q4_K"].dequantize()
    address, last = found.ctypes.data, found[-1, -8:]
    expected = last.copy()
    del found
    other = weights["BF16"].dequantize()
    assert other.ctypes.data != address
    assert np.array_equal(last, expected)
    del last
    assert weights["BF16"].dequantize().ctypes.data == address  # used again


def test_what_is_dropped_is_unmapped_or_kept_within_bounds(
    weights: numaload.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor = weights["Q4_K"]
    nbytes = 4 * tensor.size
    monkeypatch.setattr(buffers, "KEPT", 2 * nbytes)
    tensor.dequantize()
    before = len(maps())
    held = [tensor.dequantize() for _ in range(20)]
    assert len(maps()) >= before + 20
    held.clear()
    assert sum(one.length for one in buffers._results._free) == 2 * nbytes
    assert len(maps()) <= before + 5
    for _ in range(100):
        tensor.dequantize()
    assert len(maps()) <= before + 5
    (address, *_) = [one.address for one in buffers._results._free]
    buffers._results.clear()
    assert maps(address) == []


def test_nothing_is_kept_where_memory_is_scarce(
    weights: numaload.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    nbytes = 4 * weights["Q4_K"].size
    monkeypatch.setattr(memory, "left", lambda: buffers.SHARE * nbytes - 1)
    address = weights["Q4_K"].dequantize().ctypes.data
    assert maps(address) == []


def test_what_is_kept_goes_before_memory_is_refused(weights: numaload.Weights) -> None:
    address = weights["Q4_K"].dequantize().ctypes.data
    assert maps(address)
    with pytest.raises(NodeMemoryError):
        memory.require(1 << 60, "a lot", "take less")
    assert maps(address) == []


def test_what_is_kept_goes_before_replicas_are_planned(weights: numaload.Weights) -> None:
    address = weights["Q4_K"].dequantize().ctypes.data
    assert maps(address)
    plan([], numaload.topology(), kept=PRIVATE)
    assert maps(address) == []


def test_a_result_that_does_not_fit_is_a_named_error(
    weights: numaload.Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = memory.Limit("this test", 1 << 20)
    monkeypatch.setattr(memory, "known_limits", lambda *_: [limit])
    monkeypatch.setattr(memory, "_trusted", 0)
    before = len(maps())
    with pytest.raises(NodeMemoryError, match=r"'Q4_K' as float32: needs .*this test.*rows="):
        weights["Q4_K"].dequantize()
    assert len(maps()) <= before


def test_a_fork_has_its_own(weights: numaload.Weights) -> None:
    tensor = weights["BF16"]
    expected, found = into(tensor, "float32", LARGE), tensor.dequantize()
    tensor.dequantize()  # kept
    child = os.fork()
    if not child:
        status = 1
        try:
            kept = len(buffers._results._free)
            right = same(tensor.dequantize(), expected)
            found[:] = 0
            status = 0 if right and kept == 0 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert same(found, expected)
    assert same(tensor.dequantize(), expected)


def test_threads_get_memory_of_their_own(weights: numaload.Weights) -> None:
    expected = {name: into(tensor, "float32", LARGE) for name, tensor in weights.items()}
    wrong: list[str] = []

    def work(name: str) -> None:
        found = (weights[name].dequantize() for _ in range(20))
        wrong.extend(name for one in found if not same(one, expected[name]))

    threads = [threading.Thread(target=work, args=(name,)) for name in [*weights] * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_torch_tensors_are_in_the_same_memory(weights: numaload.Weights) -> None:
    torch = pytest.importorskip("torch")
    tensor = weights["Q4_K"]
    found = tensor.torch("float32")
    assert found.data_ptr() % HUGE == 0
    assert torch.equal(found, torch.from_numpy(into(tensor, "float32", LARGE)))
    assert found.untyped_storage().nbytes() == 4 * tensor.size
    assert torch.equal(pickle.loads(pickle.dumps(found)), found)  # noqa: S301 - our own
    address, row = found.data_ptr(), found[3]
    expected = row.clone()
    del found
    assert tensor.torch("float32").data_ptr() != address
    assert torch.equal(row, expected)
    buffers._results.clear()
    del row
    assert tensor.dequantize().ctypes.data == address
