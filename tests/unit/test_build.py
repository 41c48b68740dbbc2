"""Filling replicas: memory, errors in the middle, what is given back. On the memory of one node."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import numaload as api
from commands import evict
from numaload.errors import CancelledError, NodeMemoryError
from numaload.files.residency import residency
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.machine import userdir, workers
from numaload.machine.workers import Workers
from numaload.replicas import build as builds
from numaload.replicas import plan as plans
from numaload.replicas.arena import Arena, private_memory, store_memory
from numaload.replicas.build import build
from numaload.replicas.layout import CHUNK, Layout
from numaload.replicas.plan import LEAST_FREE, TRUSTED
from witness import mapped

MIB = 1 << 20
NODE = api.topology().all[0]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[SourceFile]:
    """Four chunks and a bit, not in the page cache."""
    path = tmp_path / "source"
    path.write_bytes(os.urandom(4 * CHUNK + 5000))
    evict([str(path)])
    with SourceFile(str(path)) as file:
        yield file


def run(file: SourceFile, **options: Any) -> builds.Built:
    allocate = options.pop("allocate", private_memory())
    return build([file], {(NODE,): Layout((NODE,))}, allocate, api.topology(), **options)


def test_what_was_given_back_is_counted_by_all_threads(
    source: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = SourceFile.drop_cache

    def slowly(self: SourceFile, offset: int, nbytes: int) -> None:
        real(self, offset, nbytes)
        time.sleep(0.05)  # so that several threads are in the middle of it

    monkeypatch.setattr(SourceFile, "drop_cache", slowly)
    before = residency(source)
    built = run(source)
    built.close()
    assert built.given_back >= source.size - before.resident > 4 * CHUNK


@pytest.mark.parametrize("shared", [False, True], ids=["private", "shared"])
def test_a_failed_build_is_freed_though_its_error_is_kept(
    source: SourceFile, store: Path, shared: bool, descriptors: Callable[[], int]
) -> None:
    addresses: list[int] = []
    with userdir.opened() as folder:
        assert folder is not None

        real = store_memory(folder) if shared else private_memory()

        def allocate(size: int, layout: Layout, file: int) -> Arena:
            arena = real(size, layout, file)
            addresses.append(arena.mapping.address)
            return arena

        before = descriptors()
        with pytest.raises(CancelledError) as kept:
            run(source, allocate=allocate, progress=lambda done, _: done == 0)
        assert kept.value.done > 0
        assert descriptors() == before
    assert [mapped(address) for address in addresses] == [False]


def test_no_more_threads_than_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    class Watched(Workers):
        def __init__(self, cpus: Any, count: int, name: str, **how: Any) -> None:
            counts.append(count)
            super().__init__(cpus, count, name, **how)

    monkeypatch.setattr(workers, "Workers", Watched)
    (tmp_path / "x").write_bytes(b"tiny")
    with SourceFile(str(tmp_path / "x")) as file:
        run(file).close()
    assert counts == [1]


def test_an_empty_file_among_others(tmp_path: Path, source: SourceFile) -> None:
    (tmp_path / "empty").touch()
    with SourceFile(str(tmp_path / "empty")) as empty:
        for files in ([empty], [empty, source]):
            built = build(files, {(NODE,): Layout((NODE,))}, private_memory(), api.topology())
            assert [len(row) for row in built.checksums] == [-(-f.size // CHUNK) for f in files]
            assert built.placements[NODE,].right
            built.close()


class Filled:
    """A build that fills nothing, on a node whose free memory is what ``free`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
        self.free, self.looks = free, 0
        monkeypatch.setattr(plans, "free_on", self.look)
        self.budget = plans.MemoryBudget(api.topology(), [(NODE,)], bound=True)

    def look(self, *_: object, bound: bool) -> int:
        assert bound
        self.looks += 1
        return self.free

    def fill(self, chunks: int) -> None:
        for _ in range(chunks):
            with self.budget.taken([(0, CHUNK, NODE)]):
                self.free -= CHUNK


def test_with_plenty_of_room_a_look_is_good_for_several_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node = Filled(monkeypatch, 1 << 40)
    node.fill(1000)
    assert node.looks <= 1 + 1000 / (TRUSTED / CHUNK)


def test_with_little_room_every_chunk_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Filled(monkeypatch, LEAST_FREE + 3 * CHUNK)
    node.fill(3)
    assert node.looks == 3
    with pytest.raises(NodeMemoryError, match=f"node {NODE} ran out.* has {LEAST_FREE}") as caught:
        node.fill(1)
    assert caught.value.needed == CHUNK + LEAST_FREE


def test_someone_else_who_fills_the_node_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Filled(monkeypatch, 1 << 40)
    node.fill(1)
    node.free = 0
    with pytest.raises(NodeMemoryError):
        node.fill(1 + TRUSTED // CHUNK)


def test_a_full_tmpfs_is_an_error_before_it_is_a_signal(
    source: SourceFile, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel answers is tested with a real one in the acceptance tests."""
    real = syscalls.madvise

    def full(address: int, length: int, advice: int) -> int:
        return 14 if advice == syscalls.MADV_POPULATE_WRITE else real(address, length, advice)

    monkeypatch.setattr(syscalls, "madvise", full)
    with userdir.opened() as folder:
        assert folder is not None
        with pytest.raises(NodeMemoryError, match=r"tmpfs .* ran out while node"):
            run(source, allocate=store_memory(folder))


def test_kernels_that_cannot_populate_fill_all_the_same(
    source: SourceFile, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = syscalls.madvise
    new = (syscalls.MADV_POPULATE_WRITE, syscalls.MADV_COLLAPSE)

    def old(address: int, length: int, advice: int) -> int:
        return 22 if advice in new else real(address, length, advice)

    monkeypatch.setattr(syscalls, "madvise", old)
    monkeypatch.setattr("numaload.errors._said", {"collapse"})
    with userdir.opened() as folder:
        assert folder is not None
        built = run(source, allocate=store_memory(folder))
        view = built.arenas[NODE,][0].mapping.view()
        assert view == source.read_at(0, source.size)
        built.close()
