"""The four memory calls, both ways into the kernel, on whatever nodes this machine has."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import pytest

from numaload.errors import NumaError, NumaUnavailableError
from numaload.linux import syscalls
from numaload.linux.mapping import MappedMemory, bind, map_private
from numaload.linux.syscalls import (
    LIBNUMA,
    MASK_BITS,
    MPOL_BIND,
    MPOL_DEFAULT,
    MPOL_INTERLEAVE,
    NUMBERS,
    PAGE,
    PROTOTYPES,
    SYSTEM_CALLS,
)
from numaload.machine.topology import topology

T = TypeVar("T")
NODES = topology().usable
NODE = NODES[0]
ABSENT = [max(topology().nodes) + 1, MASK_BITS - 1]
PAGES = 4


@pytest.fixture(params=[LIBNUMA, SYSTEM_CALLS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """How the calls reach the kernel; a library that is not there is hidden by its name."""
    if request.param != LIBNUMA:
        monkeypatch.setattr(syscalls, "LIBNUMA", "libnuma-hidden.so.1")
    elif not _loads(LIBNUMA):
        pytest.skip(f"{LIBNUMA} is not installed")
    syscalls.binding.cache_clear()
    yield request.param
    syscalls.binding.cache_clear()


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


@pytest.fixture
def mapping() -> Iterator[MappedMemory]:
    with map_private(PAGES * PAGE) as mapping:
        yield mapping


def in_thread(function: Callable[[], T]) -> T:
    """Policies are a thread's own: they end with this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_binding_says_which_way(way: str) -> None:
    assert syscalls.binding().name == way
    assert set(syscalls.binding().calls) == set(PROTOTYPES)


@pytest.mark.usefixtures("way")
def test_bound_pages_are_on_their_node(mapping: MappedMemory) -> None:
    bind(mapping, [NODE])
    mapping.view(write=True)[:: PAGE // 2] = bytes(2 * PAGES)
    addresses = [mapping.address + i * PAGE for i in range(PAGES)]
    assert syscalls.pages_nodes(addresses) == [NODE] * PAGES


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("node", ABSENT)
def test_an_absent_node_is_an_error(node: int, mapping: MappedMemory) -> None:
    with pytest.raises(NumaError, match=f"mbind: {PAGES * PAGE} bytes to node") as caught:
        bind(mapping, [node])
    error = caught.value
    assert (error.call, error.node, error.errno) == ("mbind", node, errno.EINVAL)
    assert "the node is absent" in str(error)


@pytest.mark.usefixtures("way")
def test_errors_of_addresses(mapping: MappedMemory) -> None:
    with pytest.raises(NumaError) as caught:
        syscalls.mbind(mapping.address - PAGE * 2, 1 << 40, MPOL_BIND, [NODE])
    assert caught.value.errno == errno.EFAULT
    assert "(" not in str(caught.value)  # nothing is guessed about it


@pytest.mark.parametrize("node", [-1, MASK_BITS])
def test_nodes_beyond_the_mask(node: int, mapping: MappedMemory) -> None:
    with pytest.raises(NumaError, match=f"node {node} is beyond 1023") as caught:
        bind(mapping, [node])
    assert caught.value.node == node


def test_mask_words() -> None:
    words = list(syscalls._mask([0, 63, 64, 1023]))
    assert len(words) == 16
    assert words == [1 | 1 << 63, 1, *[0] * 13, 1 << 63]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", [MPOL_BIND, MPOL_INTERLEAVE])
def test_policy_is_read_back_and_is_a_thread_s_own(mode: int) -> None:
    def there_and_back() -> list[tuple[int, list[int]]]:
        syscalls.set_mempolicy(mode, NODES)
        found = [syscalls.get_mempolicy()]
        syscalls.set_mempolicy(MPOL_DEFAULT, [])
        return [*found, syscalls.get_mempolicy()]

    before = syscalls.get_mempolicy()
    assert in_thread(there_and_back) == [(mode, NODES), (MPOL_DEFAULT, [])]
    assert syscalls.get_mempolicy() == before


@pytest.mark.usefixtures("way")
def test_policy_of_an_absent_node() -> None:
    with pytest.raises(NumaError, match="set_mempolicy: node") as caught:
        in_thread(lambda: syscalls.set_mempolicy(MPOL_BIND, [ABSENT[0]]))
    assert (caught.value.node, caught.value.errno) == (ABSENT[0], errno.EINVAL)


@pytest.mark.usefixtures("way")
def test_pages_that_are_not_there(mapping: MappedMemory) -> None:
    mapping.view(write=True)[PAGE] = 1
    absent, there = syscalls.pages_nodes([mapping.address, mapping.address + PAGE])
    assert absent in (-errno.ENOENT, -errno.EFAULT)
    assert there in NODES
    assert syscalls.pages_nodes([]) == []


@pytest.mark.usefixtures("way")
def test_errno_is_the_thread_s_own(mapping: MappedMemory) -> None:
    """Calls of other threads between a failure and its report must not change it."""
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            syscalls.madvise(1, PAGE, 0)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(disturb)
        try:
            for _ in range(200):
                with pytest.raises(NumaError) as caught:
                    syscalls.mbind(mapping.address, 1 << 40, MPOL_BIND, [NODE])
                assert caught.value.errno == errno.EFAULT
        finally:
            stop.set()
        future.result()


REFUSALS = {
    errno.EPERM: (NumaUnavailableError, "--cap-add SYS_NICE"),
    errno.ENOSYS: (NumaUnavailableError, "without NUMA"),
    errno.EINVAL: (NumaError, "absent, has no memory or is outside"),
    errno.ENOMEM: (NumaError, "Cannot allocate memory"),
}
CALLS: dict[str, Callable[[], object]] = {
    "mbind": lambda: syscalls.mbind(0, PAGE, MPOL_BIND, [NODE]),
    "set_mempolicy": lambda: syscalls.set_mempolicy(MPOL_BIND, [NODE]),
    "get_mempolicy": syscalls.get_mempolicy,
    "move_pages": lambda: syscalls.pages_nodes([0]),
}


def refuse(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refused(*_: object) -> int:
        ctypes.set_errno(code)
        return -1

    calls = dict.fromkeys(PROTOTYPES, refused)
    monkeypatch.setattr(syscalls, "binding", lambda: syscalls.Binding("refusing", calls))


@pytest.mark.parametrize("call", ["mbind", "set_mempolicy", "get_mempolicy"])
@pytest.mark.parametrize("code", REFUSALS, ids=errno.errorcode.get)
def test_refusals_say_what_to_do(call: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, code)
    kind, hint = REFUSALS[code]
    with pytest.raises(kind, match=hint) as caught:
        CALLS[call]()
    assert type(caught.value) is kind
    assert (caught.value.call, caught.value.errno) == (call, code)


def test_no_hint_for_move_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    # Containers refuse it whatever capabilities they have.
    refuse(monkeypatch, errno.EPERM)
    with pytest.raises(
        NumaError, match=r"move_pages: asking for 1 pages: Operation not permitted$"
    ):
        CALLS["move_pages"]()


@pytest.mark.parametrize("call", CALLS)
def test_neither_library_nor_numbers(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "LIBNUMA", "libnuma-hidden.so.1")
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="vax"))
    syscalls.binding.cache_clear()
    try:
        assert syscalls.binding().name == syscalls.NO_CALLS
        with pytest.raises(NumaUnavailableError, match="numbers for vax: apt-get install libnuma1"):
            CALLS[call]()
    finally:
        syscalls.binding.cache_clear()


def test_a_library_without_the_symbols_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "LIBNUMA", "libm.so.6")
    syscalls.binding.cache_clear()
    try:
        assert syscalls.binding().name == SYSTEM_CALLS
    finally:
        syscalls.binding.cache_clear()


def test_every_machine_has_all_numbers() -> None:
    assert all(set(numbers) == set(PROTOTYPES) for numbers in NUMBERS.values())
    assert all(len(set(numbers.values())) == len(numbers) for numbers in NUMBERS.values())


def test_madvise_answers_with_errno(mapping: MappedMemory) -> None:
    assert syscalls.madvise(mapping.address, PAGE, mmap.MADV_NORMAL) == 0
    assert syscalls.madvise(mapping.address + 1, PAGE, mmap.MADV_NORMAL) == errno.EINVAL
    assert syscalls.madvise(mapping.address - PAGE * 2, 1 << 40, mmap.MADV_NORMAL) == errno.ENOMEM


def test_mincore_has_a_byte_per_page(mapping: MappedMemory) -> None:
    mapping.view(write=True)[PAGE] = 1
    assert syscalls.mincore(mapping.address, PAGES * PAGE) == b"\0\1\0\0"
    assert syscalls.mincore(mapping.address + PAGE, PAGE + 1) == b"\1\0"


def test_mincore_of_nothing_mapped(mapping: MappedMemory) -> None:
    with pytest.raises(NumaError, match="mincore") as caught:
        syscalls.mincore(mapping.address, 1 << 40)
    assert caught.value.errno == errno.ENOMEM


def test_mmap_errors_are_named(tmp_path: Path) -> None:
    with pytest.raises(NumaError, match="mmap: 4096 bytes") as caught:
        syscalls.mmap_at(0, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd=-1)
    assert (caught.value.call, caught.value.errno) == ("mmap", errno.EBADF)
    with pytest.raises(NumaError) as caught:
        syscalls.munmap(1, PAGE)
    assert caught.value.errno == errno.EINVAL


def test_memory_at_is_the_memory_itself(mapping: MappedMemory) -> None:
    memory = syscalls.memory_at(mapping.address, 8)
    memory[3] = 7
    assert bytes(mapping.view(0, 8)) == bytes([0, 0, 0, 7, 0, 0, 0, 0])
    assert syscalls.address_of(memory) == mapping.address
