"""How long mapped memory lives, and what happens at its edges."""

from __future__ import annotations

import errno
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from numaload.errors import ClosedError, NumaError, UsageError
from numaload.linux import syscalls
from numaload.linux.mapping import MappedMemory, bind, map_file, map_private, populate_read
from numaload.linux.placement import count_pages
from numaload.linux.syscalls import HUGE, PAGE

SIZE = 3 * PAGE + 100  # files rarely end on a page


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(bytes(i % 251 for i in range(SIZE)))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def unmapped(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The munmap calls, as they are made."""
    calls: list[tuple[int, int]] = []
    real = syscalls.munmap

    def munmap(address: int, length: int) -> None:
        calls.append((address, length))
        real(address, length)

    monkeypatch.setattr(syscalls, "munmap", munmap)
    return calls


def areas() -> list[tuple[int, int, str]]:
    """(start, stop, permissions) of everything that is mapped."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    edges = [(words[0].split("-"), words[1]) for words in lines]
    return [(int(start, 16), int(stop, 16), mode) for (start, stop), mode in edges]


def is_mapped(address: int) -> bool:
    return any(start <= address < stop and mode[0] == "r" for start, stop, mode in areas())


def test_a_file_is_its_bytes(file: int) -> None:
    with map_file(file, SIZE) as mapping:
        assert bytes(mapping.view()) == os.pread(file, SIZE, 0)
        assert bytes(mapping.view(PAGE, 10)) == os.pread(file, 10, PAGE)
        assert mapping.range == (mapping.address, SIZE)


def test_writing_reaches_the_file(file: int) -> None:
    with map_file(file, SIZE, write=True) as mapping:
        mapping.view(5, 3, write=True)[:] = b"abc"
        assert os.pread(file, 3, 5) == b"abc"


def test_views_are_read_only_unless_asked(file: int) -> None:
    with map_private(SIZE) as mapping:
        assert mapping.view().readonly
        assert not np.frombuffer(mapping.view(), np.uint8).flags.writeable
        assert not mapping.view(write=True).readonly


@pytest.mark.parametrize("size", [1, PAGE, SIZE, HUGE, HUGE + 1])
def test_ranges_stand_alone_on_a_huge_page_boundary(size: int) -> None:
    """Neighbours would be counted with them in numa_maps."""
    with map_private(size) as mapping, map_private(size) as other:
        assert mapping.address % HUGE == other.address % HUGE == 0
        for one in (mapping, other):
            stop = one.address + -(-size // PAGE) * PAGE
            around = [a for a in areas() if a[0] <= stop and a[1] >= one.address]
            modes = {mode for start, end, mode in around if end == one.address or start == stop}
            assert modes == {"---p"}


def test_memory_lives_as_long_as_its_last_view(unmapped: list[tuple[int, int]]) -> None:
    mapping = map_private(SIZE)
    address = mapping.address
    mapping.view(write=True)[SIZE - 1] = 7
    array = np.frombuffer(mapping.view(), np.uint8)
    part = array[PAGE:]
    mapping.close()
    mapping.close()
    del array
    gc.collect()
    assert part[-1] == 7
    assert not unmapped
    del part
    gc.collect()
    assert len(unmapped) == 1
    assert not is_mapped(address)


def test_memory_is_unmapped_when_nobody_closes_it(unmapped: list[tuple[int, int]]) -> None:
    mapping = map_private(SIZE)
    gone = weakref.ref(mapping)
    start, length = mapping.address, mapping.length
    del mapping
    gc.collect()
    assert gone() is None
    ((reserved, total),) = unmapped
    assert reserved < start
    assert reserved + total > start + length


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_closing_in_a_forked_child_is_its_own_affair() -> None:
    mapping = map_private(SIZE)
    child = os.fork()
    if child == 0:
        mapping.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert mapping.view()[0] == 0
    mapping.close()


@pytest.mark.parametrize("size", [0, SIZE])
def test_used_after_close(size: int) -> None:
    mapping = map_private(size)
    states = [mapping.closed]
    mapping.close()
    assert [*states, mapping.closed] == [False, True]
    with pytest.raises(ClosedError):
        mapping.view()


def test_zero_length(file: int, unmapped: list[tuple[int, int]]) -> None:
    with map_file(file, 0) as mapping:
        assert mapping.view().nbytes == 0
        bind(mapping, [0])
        populate_read(mapping)
    assert not unmapped


@pytest.mark.parametrize("edges", [(0, SIZE + 1), (SIZE + 1, 0), (-1, 1), (SIZE, 1), (5, -1)])
def test_nothing_outside_can_be_seen(edges: tuple[int, int]) -> None:
    with map_private(SIZE) as mapping, pytest.raises(UsageError, match=f"mapping of {SIZE}"):
        mapping.view(*edges)


@pytest.mark.parametrize("edges", [(SIZE, 0), (SIZE, None), (0, 0)])
def test_empty_views_inside(edges: tuple[int, int | None]) -> None:
    with map_private(SIZE) as mapping:
        assert mapping.view(*edges).nbytes == 0


def test_a_failed_mapping_leaves_no_reservation(unmapped: list[tuple[int, int]]) -> None:
    fd = os.open(os.devnull, os.O_WRONLY)
    try:
        with pytest.raises(NumaError) as caught:
            map_file(fd, SIZE)
    finally:
        os.close(fd)
    assert caught.value.errno == errno.EACCES
    assert len(unmapped) == 1


def mapped_pages(mapping: MappedMemory) -> int:
    return sum(next(count_pages([mapping.range])).values())


@pytest.mark.parametrize("old_kernel", [False, True], ids=["madvise", "touching"])
def test_populate_read(old_kernel: bool, file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if old_kernel:
        monkeypatch.setattr(syscalls, "madvise", lambda *_: errno.EINVAL)
    with map_file(file, SIZE) as mapping:
        assert mapped_pages(mapping) == 0
        populate_read(mapping)
        assert mapped_pages(mapping) == 4


def test_populating_what_was_cut_off_is_an_error_not_a_signal(file: int) -> None:
    with map_file(file, SIZE) as mapping:
        os.ftruncate(file, PAGE)
        with pytest.raises(NumaError, match="was the file cut short") as caught:
            populate_read(mapping)
        assert (caught.value.call, caught.value.errno) == ("madvise", errno.EFAULT)
        populate_read(mapping, 0, PAGE)
