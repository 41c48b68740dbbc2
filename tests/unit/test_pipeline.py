"""Parts of the pipeline: memory that is used again, parts of a place, what is in RAM."""

from __future__ import annotations

import os
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

import numaload
from commands import evict
from numaload.dequantize import SCATTERED
from numaload.linux.mapping import MappedMemory, map_private
from numaload.machine.buffers import Buffers
from numaload.machine.stopping import CancelToken
from numaload.pipeline.ahead import Ahead, resident
from numaload.pipeline.fill import PART, parts

MIB = 1 << 20


def marked(buffers: Buffers, nbytes: int, mark: int) -> Any:
    """Memory that says later whether it is the same: the kernel's own is zeros."""
    taken, _ = buffers.take(nbytes)
    assert taken.size == nbytes
    taken[:] = mark
    return taken


def test_what_came_back_is_given_out_again() -> None:
    buffers = Buffers(64 * MIB)
    first = marked(buffers, 8 * MIB, 7)
    view = first[5:].view(np.uint8)[:3]
    del first
    other, _ = buffers.take(8 * MIB)
    assert other[0] == 0  # a view of the first is still there
    del view
    small, _ = buffers.take(2 * MIB)
    assert small[0] == 0  # the first is far too large for it
    again, promise = buffers.take(5 * MIB)
    assert promise is None  # it is touched
    assert (again == 7).all()
    assert (other.sum(), small.sum()) == (0, 0)


def test_no_more_is_kept_than_allowed() -> None:
    buffers = Buffers(10 * MIB)
    held = [marked(buffers, 4 * MIB, i + 1) for i in range(5)]
    held.clear()
    assert sum(one.length for one in buffers._free) == 8 * MIB
    buffers.close()
    last = marked(buffers, 4 * MIB, 9)
    del last
    assert not buffers._free
    assert buffers.take(4 * MIB)[0][0] == 0


def test_arrays_may_end_in_any_thread() -> None:
    buffers, errors = Buffers(4 * MIB), []

    def work() -> None:
        try:
            for _ in range(200):
                marked(buffers, 2 * MIB, 1)
        except BaseException as error:  # noqa: BLE001 - shown below
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sum(one.length for one in buffers._free) <= 4 * MIB


PLACES: dict[str, NDArray[Any]] = {
    "flat": np.zeros(3 * MIB, np.float32),
    "rows": np.zeros((1000, 4096), np.float32)[:, :2048],
    "turned": np.zeros((512, 768), np.float32).T,
    "one row": np.zeros((3, 2, 5 * MIB), np.uint16)[:, :1, :],
    "deep": np.zeros((4, 6, 256, 512), np.float32).swapaxes(0, 1),
    "small": np.zeros((3, 5), np.float32)[:, ::2],
    "strided": np.zeros(1000, np.float32)[::3],
    "nothing": np.zeros((0, 7), np.float32),
    "scalar": np.zeros((), np.float32),
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("unit", [1, 256])
@pytest.mark.parametrize("first", [0, 512])
def test_parts_are_the_whole_place_in_order(name: str, unit: int, first: int) -> None:
    place = PLACES[name]
    place[...] = np.arange(place.size, dtype=np.int64).reshape(place.shape) % 60_000
    cut = list(parts(place, unit, first))
    seen = [part.place.reshape(-1) for part in cut]
    whole = np.concatenate([np.zeros(0, place.dtype), *seen])
    np.testing.assert_array_equal(whole, np.arange(place.size, dtype=np.int64) % 60_000)
    at = first
    for part in cut:
        assert part.first == at
        at += part.place.size
        assert np.shares_memory(part.place, place)
        most = PART if part.place.flags.c_contiguous else SCATTERED
        assert part.place.nbytes <= max(most, 4 * unit)
    if place.flags.c_contiguous:
        assert all(part.place.size % unit == 0 for part in cut[:-1])


def test_who_waits_for_what_is_read_ahead_ends_when_cancelled() -> None:
    """Also where the server does not answer, and nobody stops reading ahead before it has ended."""
    ahead, token = Ahead([], 1), CancelToken()
    reader = threading.Thread(target=token.wait, args=(10,))
    ahead._threads, ahead._active = [reader], 1

    def work() -> None:
        with token:
            ahead.wait(1)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(0.1)
    assert worker.is_alive()
    token.cancel()
    worker.join(60)
    assert not worker.is_alive()


def test_what_is_in_ram(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * MIB))
    fd = os.open(path, os.O_RDONLY)
    try:
        os.pread(fd, 4 * MIB, 0)
        assert resident(fd, 0, MIB)
        assert not resident(fd, 4 * MIB, MIB)  # after the end
        evict([str(path)])
        if not resident(fd, 0, MIB):
            os.pread(fd, 4096, 2 * MIB)
            assert not resident(fd, 0, 4 * MIB)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("slow", "bounds"), [(600, (16, 80)), (0, (128, 256))])
def test_more_memory_is_taken_for_those_who_take_their_time(
    slow: float,
    bounds: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """New memory must be cleared; whoever waits for tensors anyway gains nothing by more of it."""
    taken: list[int] = []

    def mapped(nbytes: int) -> MappedMemory:
        taken.append(nbytes)
        return map_private(nbytes)

    monkeypatch.setattr("numaload.machine.buffers.map_private", mapped)
    monkeypatch.setattr(import_module("numaload.pipeline.stream"), "SLOW_S", slow)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    rows = np.ones((512, 4096), np.float16)
    for i in range(40):
        writer.add_tensor(f"blk.{i}.weight", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with numaload.open(path) as weights:
        stream: Any = numaload.stream(weights, "float32")
        for _, floats in stream:
            assert floats[0, 0] == 1
            del floats
            ready = stream.gi_frame.f_locals["ready"]
            while not slow and not all(one.done for one in ready):  # others keep the CPUs busy
                threading.Event().wait(0.01)
    assert bounds[0] * MIB <= sum(taken) <= bounds[1] * MIB
