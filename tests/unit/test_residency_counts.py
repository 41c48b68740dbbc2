"""What is in RAM by cachestat, by mincore and by samples: they agree, and ask no more than needed.

The witness is mincore about every page of the file.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import pytest

from commands import evict
from numaload.files import residency as module
from numaload.files.residency import asked_by, cached_bytes, cached_on, present, residency
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import map_file
from numaload.pagecache import counting as counting_module
from numaload.pagecache import located
from numaload.pagecache.counting import BySamples, Counting, Runs, counting, spread
from witness import PAGE

MIB = 1 << 20
SIZE = 9 * MIB + 1234  # the last page is not whole
TIB = 1 << 40
RAGGED = [(0, SIZE), (0, 1), (5, 3 * PAGE), (PAGE, 2 * PAGE), (MIB - 1, MIB + 1),
          (4 * MIB + 77, SIZE - 3), (SIZE - 1, SIZE), (SIZE - 2000, SIZE)]  # fmt: skip


@pytest.fixture(params=["some", "runs", "all", "none", "last", "holes"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SourceFile]:
    """Of it these pages are resident, or about these: the witness knows."""
    path, holes = tmp_path / "file", request.param == "holes"
    with path.open("wb") as out:
        out.write(b"" if holes else os.urandom(SIZE))
        out.truncate(SIZE)
    evict([str(path)])
    draw = random.Random(7)
    chosen = {
        "some": [(draw.randrange(SIZE), 1) for _ in range(300)],
        "runs": [(draw.randrange(SIZE), 70_000) for _ in range(9)],
        "all": [(0, SIZE)],
        "none": [],
        "last": [(SIZE - 1, 1)],
        "holes": [(3 * MIB, MIB), (SIZE - 1, 1)],
    }[request.param]
    with SourceFile(str(path)) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, nbytes in chosen:
            os.pread(file.fd, nbytes, offset)
        yield file


def witness(file: SourceFile) -> list[bool]:
    with map_file(file.fd, file.size) as mapping:
        return [byte == 1 for byte in syscalls.mincore(mapping.address, mapping.length)]


def resident_of(pages: list[bool], start: int, stop: int) -> int:
    """Bytes of a range that are on these pages, one page after another."""
    return sum(
        min(stop, (i + 1) * PAGE) - max(start, i * PAGE)
        for i in range(start // PAGE, -(-stop // PAGE))
        if pages[i]
    )


T = TypeVar("T")


def steady(file: SourceFile, ask: Callable[[], T]) -> tuple[list[bool], T]:
    """The answer between two looks of the witness that were the same: pages may be paged out."""
    for _ in range(50):
        before, answer = witness(file), ask()
        if witness(file) == before:
            return before, answer
    pytest.fail("this machine pages out all the time")


def without_cachestat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "cachestat", lambda *_: None)


@pytest.fixture(params=["as it is", "without cachestat", "without mincore", "small steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "without cachestat":
        without_cachestat(monkeypatch)
    if request.param == "without mincore":
        monkeypatch.setattr(module, "may_ask", lambda _: False)
    if request.param == "small steps":
        monkeypatch.setattr(module, "MIXED", 64 << 10)
    return str(request.param)


def test_residency_is_what_mincore_says(file: SourceFile, way: str) -> None:
    for start, stop in RAGGED:
        pages, found = steady(file, partial(residency, file, start, stop))
        if way == "without mincore" and asked_by(file) is None:
            assert not found.known
            continue
        assert (found.size, found.start, found.known) == (stop - start, start, True)
        assert found.resident == resident_of(pages, start, stop)
        runs = list(present(found))
        assert sum(b - a for a, b in runs) == found.resident
        assert all(resident_of(pages, a, b) == b - a for a, b in runs)
        assert all(a < b for a, b in found.absent)
        assert all(one[1] < two[0] for one, two in pairwise(found.absent))


def test_cached_bytes_is_what_mincore_says(file: SourceFile) -> None:
    for start, stop in RAGGED:
        pages, found = steady(file, partial(cached_bytes, file, start, stop - start))
        assert found in (None, resident_of(pages, start, stop))
        assert (found is None) == (asked_by(file) == "mincore")
    pages, found = steady(file, partial(cached_bytes, file))
    assert found in (None, resident_of(pages, 0, SIZE))


@pytest.mark.usefixtures("way")
def test_counting_is_what_mincore_says(file: SourceFile) -> None:
    for start, stop in RAGGED:

        def ask(start: int = start, stop: int = stop) -> tuple[bool, int, list[tuple[int, int]]]:
            with counting(file) as count:
                runs = count.runs()
                within = list(runs.within(start, stop)) if runs else []
                return count.known, count(start, stop, 10)[0], within

        pages, (known, counted, within) = steady(file, ask)
        expected = resident_of(pages, start, stop) if known else 0
        assert counted == expected == sum(b - a for a, b in within)


class Asked:
    """How often and about how much the kernel is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stats, self.mincore_bytes = 0, 0
        stat, mincore = syscalls.cachestat, syscalls.mincore

        def count_stat(*args: int) -> syscalls.CacheStat | None:
            self.stats += 1
            return stat(*args)

        def count_mincore(address: int, length: int) -> bytes:
            self.mincore_bytes += length
            return mincore(address, length)

        monkeypatch.setattr(syscalls, "cachestat", count_stat)
        monkeypatch.setattr(syscalls, "mincore", count_mincore)


@pytest.fixture
def sparse(tmp_path: Path) -> Iterator[SourceFile]:
    """8 TiB, of which a page in the middle and the last one were read."""
    path = tmp_path / "sparse"
    path.touch()
    os.truncate(path, 8 * TIB)
    with SourceFile(str(path)) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        for offset in (3 * TIB + 5, 8 * TIB - 1):
            os.pread(file.fd, 1, offset)
        if asked_by(file) != "cachestat":
            pytest.skip("this kernel or file system has no cachestat(2)")
        yield file


def test_most_of_a_large_sparse_file_is_never_asked_about(
    sparse: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Asked(monkeypatch)
    found = residency(sparse)
    assert found.known
    assert PAGE <= found.resident <= MIB
    assert any(a <= 3 * TIB < b for a, b in present(found))
    assert found.absent[-1][1] < 8 * TIB
    assert asked.stats < 400
    assert asked.mincore_bytes <= 2 * module.MIXED


@pytest.mark.parametrize("warm", [True, False])
def test_all_or_nothing_takes_one_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, warm: bool
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    evict([str(path)])
    with SourceFile(str(path)) as file:
        if warm:
            file.read_at(0, MIB)
        if asked_by(file) != "cachestat":
            pytest.skip("this kernel or file system has no cachestat(2)")
        asked = Asked(monkeypatch)
        assert cached_bytes(file) == (MIB if warm else 0)
        assert (asked.stats, asked.mincore_bytes) == (1, 0)
        assert residency(file).absent == (() if warm else ((0, MIB),))
        assert (asked.stats, asked.mincore_bytes) == (3, 0)  # one more: whether it tells at all


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with SourceFile(str(tmp_path / "empty")) as file, counting(file) as count:
        found = residency(file)
        assert (found.absent, found.resident, found.known) == ((), 0, True)
        assert cached_bytes(file) == 0
        assert count(0, 0, 10) == (0, 0)


def test_looking_does_not_read_on(tmp_path: Path) -> None:
    """A reader in order leaves marks on pages: who touches these reads on, unless he is careful."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(32 * MIB))
    evict([str(path)])
    with SourceFile(str(path)) as file:
        for _ in range(8):
            os.read(file.fd, 128 << 10)
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        found = residency(file)
        assert 0 < found.resident < file.size
        on = cached_on(file, found)
        assert residency(file).resident <= found.resident
        assert sum(on.values()) <= found.resident


# Samples.


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Counting, int]]:
    """A file of which every page would be too much to ask about, and its resident bytes."""
    without_cachestat(monkeypatch)
    monkeypatch.setattr(counting_module, "SAMPLED_FROM", MIB)
    monkeypatch.setattr(random, "random", random.Random(3).random)
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * MIB))
    evict([str(path)])
    with SourceFile(str(path)) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        draw = random.Random(5)
        for _ in range(700):
            os.pread(file.fd, 1, draw.randrange(file.size))
        with counting(file) as count:
            yield count, sum(witness(file)) * PAGE


def test_the_stated_error_holds(sampled: tuple[Counting, int]) -> None:
    count, truth = sampled
    assert count.how == "sampled mincore"
    tries = [count(0, count.file.size, 200) for _ in range(200)]
    assert all(0 < error < count.file.size / 10 for _, error in tries)
    right = sum(abs(found - truth) <= error for found, error in tries)
    assert right >= 0.93 * len(tries)
    assert any(found != truth for found, _ in tries)  # or they were no samples


def test_a_small_part_is_asked_about_whole(sampled: tuple[Counting, int]) -> None:
    count, truth = sampled
    assert count(0, count.file.size, 600) == (truth, 0)


def test_nothing_found_is_not_sure_to_be_nothing(sampled: tuple[Counting, int]) -> None:
    count, _ = sampled
    assert isinstance(count, BySamples)
    count.file.drop_cache(0, 0)
    assert count(0, count.file.size, 200) == (0, round(3 / 200 * count.file.size))
    assert count.runs() is None


def test_spread_samples_are_one_of_each_part() -> None:
    found = list(spread(100, 1100, 50))
    assert [(page - 100) // 20 for page in found] == list(range(50))
    assert len({(page - 100) % 20 for page in found}) > 5


# Nodes, on a machine that need not have several.


def by_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer for odd pages is another node's: only that one is replaced."""
    real = syscalls.pages_nodes

    def pages_nodes(addresses: list[int]) -> list[int]:
        return [n + a // PAGE % 2 if n >= 0 else n for n, a in zip(real(addresses), addresses)]  # noqa: B905

    monkeypatch.setattr(syscalls, "pages_nodes", pages_nodes)


def test_nodes_of_parts(file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two_nodes(monkeypatch)
    for start, stop in RAGGED:

        def ask(start: int = start, stop: int = stop) -> dict[int, int]:
            with counting(file) as count:
                resident = count(0, file.size, 1)[0]
                its = count(start, stop, 1)[0]
                return located.locating(file, count, [0, 1], resident).on(start, stop, its, 1)[0]

        pages, on = steady(file, ask)
        its = range(start // PAGE, -(-stop // PAGE))
        odd, even = (sum(pages[i] for i in its if i % 2 == which) for which in (1, 0))
        assert isinstance(on, dict)
        assert sum(on.values()) == resident_of(pages, start, stop)
        assert set(on) <= {0, 1}
        if odd + even:
            assert abs(on.get(1, 0) - sum(on.values()) * odd / (odd + even)) <= 1


def test_nodes_by_samples(file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two_nodes(monkeypatch)
    monkeypatch.setattr(located, "SAMPLED_FROM", 0)
    with counting(file) as count:
        resident = count(0, file.size, 1)[0]
        on, error = located.locating(file, count, [0, 1], resident).on(0, file.size, resident, 400)
        assert sum(on.values()) == resident
        assert resident == 0 or 0 < error <= resident
        if resident > MIB:
            assert abs(on[0] - resident / 2) <= 2 * error
        assert count(0, file.size, 1)[0] <= resident  # and nothing was read


def test_where_move_pages_is_refused_files_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from numaload.errors import NumaloadWarning, NumaUnavailableError

    def refuse(_: list[int]) -> list[int]:
        raise NumaUnavailableError("move_pages: refused", call="move_pages")

    monkeypatch.setattr(syscalls, "pages_nodes", refuse)
    monkeypatch.setattr("numaload.errors._said", set())
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    with SourceFile(str(path)) as file, counting(file) as count:
        with pytest.warns(NumaloadWarning, match="nodes are told of whole files"):
            found = located.locating(file, count, [0, 1], MIB)
        assert sum(found.on(0, MIB, MIB, 1)[0].values()) == MIB
        assert found.on(0, PAGE, PAGE, 1) == ({}, 0)


def test_runs_within() -> None:
    found = module.Residency(100, ((0, 10), (20, 30), (90, 100)))
    runs = Runs(found)
    assert list(runs) == [(10, 20), (30, 90)]
    assert runs(0, 100) == 70
    assert runs(15, 31) == 6
    assert runs(20, 30) == 0
    assert list(runs.within(15, 40)) == [(15, 20), (30, 40)]
    assert list(runs.within(0, 5)) == list(runs.within(90, 100)) == []
