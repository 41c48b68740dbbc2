"""What is in RAM by cachestat and by mincore: they agree, and ask no more than needed.

The witness is mincore about every page of the file.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import evict
from numaload.files import residency as module
from numaload.files.residency import (
    AbsentRange,
    ByteRange,
    Residency,
    asked_by,
    between,
    cached_bytes,
    cached_on,
    give_back,
    merged,
    overlaps,
    present,
    residency,
)
from numaload.files.source import SourceFile
from numaload.linux import syscalls
from numaload.linux.mapping import map_file, populate_read
from numaload.pagecache import residency_report
from numaload.pagecache.residency_report import FileResidency, Span, look, spread, uncertain
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


SPANS = [Span(f"{start} to {stop}", start, stop - start) for start, stop in RAGGED]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("nodes", [[0], [0, 1]], ids=["one node", "two nodes"])
def test_files_and_tensors_are_counted_as_mincore_says(file: SourceFile, nodes: list[int]) -> None:
    pages, report = steady(file, partial(look, file, SPANS, nodes))
    assert report.resident == (resident_of(pages, 0, SIZE) if report.known else 0)
    for tensor, (start, stop) in zip(report.tensors, RAGGED, strict=report.known):
        assert tensor.resident == resident_of(pages, start, stop)
    edges = [SIZE * i // 60 for i in range(61)]
    for cell, (start, stop) in zip(report.cells, pairwise(edges), strict=report.known):
        assert round(cell * (stop - start)) == resident_of(pages, start, stop)


def test_a_call_that_stops_answering_does_not_say_that_nothing_is_there(
    file: SourceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answered when it was asked whether it does."""
    monkeypatch.setattr(residency_report, "asked_by", lambda _: "cachestat")
    monkeypatch.setattr(residency_report, "cached_bytes", lambda *_: None)
    pages, report = steady(file, partial(look, file, SPANS, [0]))
    assert report.resident == resident_of(pages, 0, SIZE)
    for tensor, (start, stop) in zip(report.tensors, RAGGED, strict=True):
        assert tensor.resident == resident_of(pages, start, stop)


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
        assert (asked.stats, asked.mincore_bytes) == (2, 0)
        for nodes in ([0], [0, 1]) if not warm else ([0],):
            asked.stats = 0
            assert look(file, [], nodes).resident == (MIB if warm else 0)
            assert (asked.stats, asked.mincore_bytes) == (2, 0)  # one: whether it tells at all


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with SourceFile(str(tmp_path / "empty")) as file:
        found = residency(file)
        assert (found.absent, found.resident, found.known) == ((), 0, True)
        assert cached_bytes(file) == 0
        for nodes in ([0], [0, 1]):
            report = look(file, [Span("empty", 0, 0)], nodes)
            assert (report.resident, report.known, report.cells) == (0, True, [])
            assert report.tensors[0].resident == 0


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


# Nodes, on a machine that need not have several.


def by_two_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's answer for odd pages is another node's: only that one is replaced."""
    real = syscalls.pages_nodes

    def pages_nodes(addresses: list[int]) -> list[int]:
        return [n + a // PAGE % 2 if n >= 0 else n for n, a in zip(real(addresses), addresses)]  # noqa: B905

    monkeypatch.setattr(syscalls, "pages_nodes", pages_nodes)


@pytest.mark.parametrize("ranges", [1024, 1], ids=["one mapping", "many mappings"])
def test_nodes_of_parts(file: SourceFile, monkeypatch: pytest.MonkeyPatch, ranges: int) -> None:
    by_two_nodes(monkeypatch)
    monkeypatch.setattr(residency_report, "RANGES", ranges)
    pages, report = steady(file, partial(look, file, SPANS, [0, 1]))
    assert (report.nodes_error, {tensor.nodes_error for tensor in report.tensors}) == (0, {0})
    for tensor, (start, stop) in zip(report.tensors, RAGGED, strict=True):
        its = range(start // PAGE, -(-stop // PAGE))
        odd, even = (sum(pages[i] for i in its if i % 2 == which) for which in (1, 0))
        on = tensor.on_nodes
        assert sum(on.values()) == resident_of(pages, start, stop)
        assert set(on) <= {0, 1}
        if odd + even:
            assert abs(on.get(1, 0) - sum(on.values()) * odd / (odd + even)) <= 1


def test_nodes_by_samples(file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two_nodes(monkeypatch)
    monkeypatch.setattr(residency_report, "SAMPLED_FROM", 0)
    monkeypatch.setattr(residency_report, "FILE_SAMPLES", 400)
    before = look(file, SPANS, [0])
    report = look(file, SPANS, [0, 1])
    assert sum(report.on_nodes.values()) == report.resident
    assert report.resident == 0 or 0 < report.nodes_error <= report.resident
    for tensor in report.tensors:
        assert sum(tensor.on_nodes.values()) == tensor.resident
        assert tensor.resident < PAGE or 0 < tensor.nodes_error <= tensor.resident
    if report.resident > MIB:
        assert abs(report.on_nodes[0] - report.resident / 2) <= 2 * report.nodes_error
    assert look(file, SPANS, [0]).resident <= before.resident  # and nothing was read


@pytest.fixture
def sampled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SourceFile]:
    """A file of which too many pages are resident to ask about the node of each."""
    monkeypatch.setattr(residency_report, "SAMPLED_FROM", 0)
    monkeypatch.setattr(residency_report, "FILE_SAMPLES", 200)
    monkeypatch.setattr(random, "random", random.Random(3).random)
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * MIB))
    evict([str(path)])
    with SourceFile(str(path)) as file:
        os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_RANDOM)
        draw = random.Random(5)
        for _ in range(1500):
            os.pread(file.fd, 1, draw.randrange(file.size))
        yield file


@pytest.mark.slow
def test_the_stated_error_holds(sampled: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    by_two_nodes(monkeypatch)

    def ask() -> list[FileResidency]:
        return [look(sampled, [], [0, 1]) for _ in range(200)]

    pages, tries = steady(sampled, ask)
    odd = sum(pages[1::2]) * PAGE
    assert all(0 < found.nodes_error < found.resident / 5 for found in tries)
    right = sum(abs(found.on_nodes[1] - odd) <= found.nodes_error for found in tries)
    assert right >= 0.93 * len(tries)
    assert any(found.on_nodes[1] != odd for found in tries)  # or they were no samples


def test_samples_on_one_node_are_not_sure_to_be_all(sampled: SourceFile) -> None:
    found = look(sampled, [], [0, 1])
    assert list(found.on_nodes.values()) == [found.resident]
    assert found.nodes_error == round(3 / 200 * found.resident)
    assert uncertain(0, 200) == uncertain(1, 200) == 3 / 200


def test_spread_samples_are_one_of_each_part() -> None:
    found = list(spread(100, 1100, 50))
    assert [(page - 100) // 20 for page in found] == list(range(50))
    assert len({(page - 100) % 20 for page in found}) > 5


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
    with SourceFile(str(path)) as file:
        with pytest.warns(NumaloadWarning, match="nodes are told of whole files"):
            report = look(file, [Span("a", 0, PAGE)], [0, 1])
        assert sum(report.on_nodes.values()) == report.resident == MIB
        (tensor,) = report.tensors
        assert (tensor.resident, tensor.on_nodes, tensor.nodes_error) == (PAGE, {}, 0)


# Arithmetic.

RANGES = st.lists(st.integers(0, 60), unique=True).map(
    lambda edges: list(zip(sorted(edges)[::2], sorted(edges)[1::2], strict=False))
)
ANY_RANGES = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)))


def bytes_of(ranges: list[ByteRange]) -> set[int]:
    return {i for first, last in ranges for i in range(first, last)}


@given(RANGES, st.integers(0, 60), st.integers(1, 20))
def test_overlaps(ranges: list[ByteRange], start: int, length: int) -> None:
    stop = start + length
    found = list(overlaps(ranges, start, stop))
    assert bytes_of(found) == bytes_of(ranges) & set(range(start, stop))
    assert all(first < last for first, last in found)


def test_overlaps_do_not_look_at_all_ranges() -> None:
    class Counted(list[ByteRange]):
        looks = 0

        def __getitem__(self, i: Any) -> Any:
            self.looks += 1
            return super().__getitem__(i)

        def __iter__(self) -> Iterator[ByteRange]:
            self.looks += len(self)
            return super().__iter__()

    ranges = Counted((2 * i, 2 * i + 1) for i in range(100_000))
    assert list(overlaps(ranges, 100_000, 100_003)) == [(100_000, 100_001), (100_002, 100_003)]
    assert ranges.looks < 50


@given(ANY_RANGES)
def test_merged(ranges: list[ByteRange]) -> None:
    found = list(merged(ranges))
    assert bytes_of(found) == bytes_of(ranges)
    assert all(first < last for first, last in found)
    assert all(one[1] < two[0] for one, two in pairwise(found))


@given(RANGES)
def test_between(ranges: list[ByteRange]) -> None:
    found = list(between(ranges, 0, 61))
    assert bytes_of(found) == set(range(61)) - bytes_of(ranges)
    assert all(first < last for first, last in found)


@given(RANGES, st.integers(0, 60), st.integers(0, 20))
def test_parts_of_what_is_resident(absent: list[AbsentRange], start: int, length: int) -> None:
    found = Residency(61, tuple(absent))
    assert bytes_of(list(present(found))) == set(range(61)) - bytes_of(absent)
    assert found.resident == 61 - len(bytes_of(absent)) == found.resident_in(0, 61)
    part = set(range(start, start + length)) & set(range(61))
    assert found.resident_in(start, start + length) == len(part - bytes_of(absent))
    assert found.resident_in(70, 70 + length) == 0


@pytest.mark.parametrize("told", [True, False], ids=["cachestat", "before Linux 6.5"])
def test_what_cannot_be_given_back_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Pages that somebody uses stay, and so do those that a slow disk has not answered for."""
    path = tmp_path / "file"
    path.write_bytes(bytes(16 * MIB))
    if not told:
        without_cachestat(monkeypatch)
    with SourceFile(str(path)) as opened:
        os.fsync(opened.fd)
        first, last = (0, 4 * MIB), (12 * MIB, 16 * MIB)
        with map_file(opened.fd, opened.size) as used:
            populate_read(used, 0, PAGE)
            assert give_back(opened, [first, last]) == [first]
        assert give_back(opened, [first, last]) == []
