"""Reading the kernel's page counts, and judging them."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from numaload.errors import NumaError, NumaloadWarning, PlacementError
from numaload.linux import pagemap, placement, syscalls
from numaload.linux.mapping import MappedMemory, bind, map_file, map_private, populate_read
from numaload.linux.placement import (
    ABSENT,
    HUGE_FIELDS,
    Asked,
    Placement,
    count_pages,
    locate,
    parse_numa_maps,
    parse_smaps,
)
from numaload.linux.syscalls import HUGE, PAGE
from numaload.machine.topology import topology

NODE = topology().usable[0]


def map_memory(length: int) -> MappedMemory:
    """Pages of a tmpfs, as a replica has them."""
    fd = os.memfd_create("numaload-test")
    try:
        os.ftruncate(fd, length)
        return map_file(fd, length)
    finally:
        os.close(fd)


# Lines as kernels print them; the counts are in base pages.
NUMA_MAPS: dict[str, tuple[str, dict[int, int]]] = {
    "nothing-there": ("7f0000000000 default file=/usr/lib/libc.so.6", {}),
    "plain": ("7f0000000000 default anon=5 dirty=5 N0=5 kernelpagesize_kB=4", {0: 5}),
    "bind": ("7f0000000000 bind:1 anon=512 dirty=512 N1=512 kernelpagesize_kB=4", {1: 512}),
    "static": ("7f0000000000 bind=static:0 anon=1 N0=1 kernelpagesize_kB=4", {0: 1}),
    "policy-with-blank": (
        "7f0000000000 prefer (many):0-1 anon=7 N0=3 N1=4 kernelpagesize_kB=4",
        {0: 3, 1: 4},
    ),
    "weighted": (
        "7f0000000000 weighted interleave:0-1 anon=3 N0=2 N1=1 kernelpagesize_kB=4",
        {0: 2, 1: 1},
    ),
    "wide-ids": ("7f0000000000 default anon=9 N8=4 N250=5 kernelpagesize_kB=4", {8: 4, 250: 5}),
    "escaped-name": (
        r"7f0000000000 bind:0 file=/m/a\040N9\0755\040N1=7 mapped=2 N0=2 kernelpagesize_kB=4",
        {0: 2},
    ),
    "name-like-a-count": (
        "7f0000000000 default file=/N1=5/N2=6 mapped=2 N0=2 kernelpagesize_kB=4",
        {0: 2},
    ),
    "hugetlb": (
        r"7f0000000000 bind:1 file=/anon\040(deleted) huge anon=3 N1=3 kernelpagesize_kB=2048",
        {1: 3 * 512},
    ),
    "transparent-huge": (
        "7f0000000000 bind:0 anon=1024 dirty=1024 N0=1024 kernelpagesize_kB=4",
        {0: 1024},
    ),
}


@pytest.mark.skipif(PAGE != 4096, reason="the lines are of a kernel with 4 KiB pages")
@pytest.mark.parametrize(("line", "counts"), NUMA_MAPS.values(), ids=NUMA_MAPS)
def test_numa_maps_lines(line: str, counts: dict[int, int]) -> None:
    areas = parse_numa_maps([line + "\n"])
    assert [area[:2] for area in areas] == ([(0x7F0000000000, counts)] if counts else [])


@pytest.mark.parametrize(
    ("line", "policy", "file"),
    [
        ("7f00 default heap anon=3 N1=3 kernelpagesize_kB=4", "default", ""),
        ("7f00 prefer (many):0-1 anon=3 N1=3 kernelpagesize_kB=4", "prefer (many):0-1", ""),
        ("7f00 bind=static:0 huge anon=3 N1=3 kernelpagesize_kB=2048", "bind=static:0", ""),
        (r"7f00 weighted interleave:0 file=/\040 N0=2", "weighted interleave:0", r"/\040"),
        ("7f00 local N0=2", "local", ""),
    ],
)  # fmt: skip
def test_policies_and_files_of_numa_maps(line: str, policy: str, file: str) -> None:
    (area,) = parse_numa_maps([line + "\n"])
    assert (area.policy, area.file) == (policy, file)


SMAPS = """\
55d5e0c00000-55d5e0e00000 r--p 00000000 00:1c 1234   /m/a: b-c
Size:               2048 kB
AnonHugePages:         0 kB
VmFlags: rd mr mw me sd
7f0000000000-7f0000800000 rw-p 00000000 00:00 0
Rss:                8192 kB
AnonHugePages:      4096 kB
ShmemPmdMapped:        0 kB
FilePmdMapped:         0 kB
THPeligible:           1
7f0000a00000-7f0000e00000 r--s 00000000 00:1b 77     /dev/shm/AnonHugePages:
ShmemPmdMapped:     2048 kB
FilePmdMapped:      2048 kB
"""


def test_both_tell_the_same_of_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """pagemap's scan and smaps, of memory with a huge page here and there, and of more runs than
    one answer takes.
    """
    with map_private(1 << 30) as mapping:
        for offset in (*range(0, 600 << 20, 2 * HUGE), 700 << 20, 702 << 20):
            syscalls.madvise(mapping.address + offset, HUGE, syscalls.MADV_POPULATE_WRITE)
        ranges = [
            mapping.range,
            (mapping.address, 100 << 20),
            (mapping.address + (699 << 20), PAGE),
        ]
        found = pagemap.huge_ranges(ranges)
        if found is None:
            pytest.skip("before Linux 6.7 smaps alone tells")
        told = list(placement._huge_bytes(ranges, found))
        assert told[:1] == list(placement._huge_bytes(ranges[:1], None))
        assert told[0] > 100 << 20
        assert told[1:] == [50 << 20, 0]


def test_smaps_paragraphs() -> None:
    lines = SMAPS.splitlines(keepends=True)
    starts = (0x55D5E0C00000, 0x7F0000000000, 0x7F0000A00000)
    huge, present = (0, 4 << 20, 4 << 20), (0, 8 << 20, 0)
    assert parse_smaps(lines, HUGE_FIELDS) == list(zip(starts, huge, strict=True))
    assert parse_smaps(lines, ("Rss:",)) == list(zip(starts, present, strict=True))


@pytest.mark.parametrize(
    ("on", "right"),
    [
        ({0: 50_000, 1: 50_000}, True),
        ({0: 52_000, 1: 48_000}, True),
        ({0: 60_000, 1: 40_000}, False),
        ({0: 100_000}, False),
        ({0: 50_000, 1: 49_999, 2: 1}, False),
    ],
)
def test_nodes_that_share_a_replica_have_like_parts(on: dict[int, int], right: bool) -> None:
    found = Placement([0, 1], 100_000, on)
    assert found.right is right
    if not right:
        with pytest.raises(PlacementError, match="100000 pages asked for"):
            found.check("x")


def test_what_cannot_be_divided_may_be_on_one_node() -> None:
    assert Placement([0, 1], (16 << 20) // PAGE, {0: (16 << 20) // PAGE}).right


def test_a_kernel_without_numa_has_everything_on_node_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no numa_maps. The same range, counted by what smaps says is there."""
    (tmp_path / "smaps").symlink_to("/proc/self/smaps")
    monkeypatch.setattr(placement, "PROC", str(tmp_path))
    monkeypatch.setattr(syscalls, "pages_nodes", refused)
    with map_private(64 * PAGE) as mapping:
        mapping.view(write=True)[: 9 * PAGE] = bytes(9 * PAGE)
        with pytest.raises(NumaError, match="numa_maps: No such file"):
            count_pages([mapping.range])
        monkeypatch.setattr(placement, "NODES", str(tmp_path / "none"))
        (counts,) = count_pages([mapping.range])
    assert counts == {0: 9}


@pytest.mark.parametrize("own_pages", [1, 3, 200])
def test_counts_of_one_mapping_among_others(own_pages: int) -> None:
    with map_private(own_pages * PAGE) as mapping, map_private(5 * PAGE) as other:
        for one in (mapping, other):
            one.view(write=True)[:] = bytes(one.length)
        counts = list(count_pages([other.range, mapping.range, (1 << 40, PAGE), other.range]))
    assert [sum(count.values()) for count in counts] == [5, own_pages, 0, 5]


def test_a_mapping_that_the_kernel_split_is_counted_whole() -> None:
    with map_private(8 * PAGE) as mapping:
        bind(mapping, [NODE])
        mapping.view(write=True)[:] = bytes(mapping.length)
        middle = mapping.address + 2 * PAGE
        syscalls.mbind(middle, 2 * PAGE, syscalls.MPOL_INTERLEAVE, [NODE])
        areas = parse_numa_maps(Path("/proc/self/numa_maps").read_text().splitlines())
        inside = [a for a in areas if mapping.address <= a.start < mapping.address + mapping.length]
        assert len(inside) == 3
        assert next(count_pages([mapping.range])) == {NODE: 8}


def test_locate_several_at_once() -> None:
    with map_private(3 * HUGE) as first, map_private(PAGE + 1) as second, map_private(0) as empty:
        bind(first, [NODE])
        bind(second, [NODE])
        first.view(write=True)[: HUGE + 1 : PAGE] = bytes(HUGE // PAGE + 1)
        second.view(write=True)[:] = bytes(second.length)
        found = locate(
            [Asked([NODE], [first]), Asked([NODE], [second, empty]), Asked([NODE], [empty])]
        )
    assert [p.pages for p in found] == [3 * HUGE // PAGE, 2, 0]
    assert found[0].on[ABSENT] == found[0].elsewhere > 0
    assert not found[0].right
    assert found[0].huge_pages % HUGE == 0
    assert found[1].on == {NODE: 2}
    assert found[1].sampled == {NODE: 2}
    assert found[1].right
    assert found[2].right


@pytest.mark.parametrize("when", ["before the counts", "before the sample"])
def test_what_the_kernel_unmapped_is_mapped_again(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its reclaim does with idle pages of a tmpfs, which stay in RAM."""
    with map_memory(4 * PAGE) as mapping:
        populate_read(mapping)
        if when == "before the sample":
            asked = placement.sample

            def sample(ranges: Sequence[tuple[int, int]]) -> dict[int, int]:
                monkeypatch.setattr(placement, "sample", asked)
                assert not syscalls.madvise(mapping.address, PAGE, mmap.MADV_DONTNEED)
                return asked(ranges)

            monkeypatch.setattr(placement, "sample", sample)
        else:
            assert not syscalls.madvise(mapping.address, PAGE, mmap.MADV_DONTNEED)
        (found,) = locate([Asked([NODE], [mapping])])
    assert found.right
    assert found.on == found.sampled == {NODE: 4}


@pytest.mark.parametrize(
    ("on", "sampled", "right"),
    [
        ({1: 100}, {1: 10}, True),
        ({1: 100}, {}, True),  # the second witness may be refused
        ({1: 99, ABSENT: 1}, {1: 10}, False),
        ({0: 1, 1: 99}, {1: 10}, False),
        ({1: 100}, {0: 1, 1: 9}, False),
        ({1: 100}, {ABSENT: 1, 1: 9}, False),
        ({}, {}, False),
    ],
)
def test_both_witnesses_must_agree(
    on: dict[int, int], sampled: dict[int, int], right: bool
) -> None:
    found = Placement([1], 100, on, sampled)
    assert found.right == right
    assert found.elsewhere == 100 - on.get(1, 0)
    if right:
        found.check("replica")
        return
    with pytest.raises(PlacementError, match="replica: 100 pages asked for on node 1") as caught:
        found.check("replica")
    assert caught.value.placements == {1: on or sampled}


def test_pages_on_any_node_asked_for_are_right() -> None:
    found = Placement([0, 1], 10, {0: 5, 1: 5})
    assert found.placed == 10
    assert found.to_dict() | {"placed": 10, "elsewhere": 0} == found.to_dict()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The addresses that the second witness is asked about."""
    addresses: list[int] = []

    def pages_nodes(chosen: list[int]) -> list[int]:
        addresses.extend(chosen)
        return [-errno.ENOENT if address == 3 * PAGE else 1 for address in chosen]

    monkeypatch.setattr(syscalls, "pages_nodes", pages_nodes)
    return addresses


def test_few_pages_are_all_sampled(asked: list[int]) -> None:
    found = placement.sample([(3 * PAGE, 2 * PAGE), (1 << 30, PAGE + 1)])
    assert asked == [3 * PAGE, 4 * PAGE, 1 << 30, (1 << 30) + PAGE]
    assert found == {ABSENT: 1, 1: 3}


def test_many_pages_are_sampled_at_random_from_all_ranges(asked: list[int]) -> None:
    ranges = [(i << 40, (i + 1) * 1000 * PAGE) for i in range(1, 4)]
    placement.sample(ranges, samples=900)
    assert len(asked) == 900
    assert len(set(asked)) > 700  # some come twice
    per_range = [sum(a <= one < a + n for one in asked) for a, n in ranges]
    assert sum(per_range) == 900
    # Each by its share of the 9,000 pages, 200, 300 and 400; never at a fixed distance.
    assert all(abs(n - share) < 80 for n, share in zip(per_range, (200, 300, 400), strict=True))
    steps = {b - a for a, b in zip(sorted(asked), sorted(asked)[1:], strict=False)}
    assert len(steps) > 10


def test_a_refused_sample_is_said_once(nothing_said: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "pages_nodes", refused)
    with pytest.warns(NumaloadWarning, match="verified by numa_maps alone"):
        assert placement.sample([(0, PAGE)]) == {}
    assert placement.sample([(0, PAGE)]) == {}


@pytest.fixture
def hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that tell where pages are cannot be opened."""

    def absent(path: str, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", path)

    monkeypatch.setattr(placement, "open", absent, raising=False)
    monkeypatch.setattr(pagemap, "open", absent, raising=False)


def refused(_: Any) -> list[int]:
    raise NumaError("move_pages: refused", call="move_pages", errno=errno.EPERM)


@pytest.mark.usefixtures("hidden")
def test_where_page_counts_are_hidden_move_pages_tells() -> None:
    with map_private(64 * PAGE) as mapping:
        mapping.view(write=True)[: 9 * PAGE] = bytes(9 * PAGE)
        (counts,) = count_pages([mapping.range])
    assert sum(counts.values()) == 9
    assert list(placement._huge_bytes([(0, PAGE)], None)) == [0]


def test_page_counts_that_are_empty_are_hidden_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numa_maps").touch()  # as where /dev/null is mounted over it
    monkeypatch.setattr(placement, "PROC", str(tmp_path))
    with map_private(PAGE) as mapping:
        mapping.view(write=True)[0] = 1
        assert [sum(counts.values()) for counts in count_pages([mapping.range])] == [1]


@pytest.mark.usefixtures("hidden")
def test_where_nothing_tells_where_pages_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "pages_nodes", refused)
    with pytest.raises(NumaError, match=r"numa_maps: No such file.*refused") as caught:
        count_pages([(0, PAGE)])
    assert caught.value.call == "numa_maps"
    monkeypatch.setattr(placement, "NODES", "/nowhere")
    with pytest.raises(NumaError, match="smaps: No such file"):
        count_pages([(0, PAGE)])
