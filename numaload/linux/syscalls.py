"""The kernel's memory calls, by ctypes, and some of libgomp's.

Four calls need no libnuma but are taken from it where it loads (its own exported symbols, not its
wrappers, which hide errno): mbind, get_mempolicy, set_mempolicy, move_pages. ``binding()`` says
which way they go. Numbers and flags: linux/mempolicy.h, asm/unistd.h; aarch64 is untested.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import NamedTuple

from numaload.errors import NumaError, NumaUnavailableError
from numaload.linux.lists import format_list

LIBNUMA = "libnuma.so.1"
LIBNUMA_HINT = "apt-get install libnuma1"
SYSTEM_CALLS, NO_CALLS = "system calls", "none"  # other names of a binding

# What a refused policy call usually means; the kernel gives only a number.
HINTS = {
    errno.EPERM: "forbidden, as in a container: start it with --cap-add SYS_NICE",
    errno.ENOSYS: "a kernel without NUMA, or a container that hides it",
    errno.EINVAL: "the node is absent, has no memory or is outside this process's cpuset",
}

# mempolicy.h
MPOL_DEFAULT, MPOL_PREFERRED, MPOL_BIND, MPOL_INTERLEAVE = 0, 1, 2, 3
MPOL_MF_MOVE = 2
# mman.h; Python 3.10 to 3.12 lack these
MAP_HUGETLB_2M = 0x40000 | 21 << 26  # asm-generic/mman-common.h, linux/mman.h
PROT_NONE, MAP_FIXED, MAP_NORESERVE = 0, 0x10, 0x4000
MADV_HUGEPAGE, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 14, 22, 23, 25

MLOCK_ONFAULT = 1
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15  # prctl.h

PAGE = mmap.PAGESIZE
HUGE = 2 << 20
STATFS_BYTES = 256  # struct statfs has 120; f_type comes first
MASK_BITS = 1024  # the kernel's MAX_NUMNODES at most
WORD_BITS = 64

NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "get_mempolicy": 239, "move_pages": 279},
    "aarch64": {"mbind": 235, "get_mempolicy": 236, "set_mempolicy": 237, "move_pages": 239},
}
CACHESTAT = 451  # the same on both, since Linux 6.5

_void_p, _int, _long, _ulong = ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_ulong
_Mask = _ulong * (MASK_BITS // WORD_BITS)
PROTOTYPES: dict[str, list[type]] = {
    "mbind": [_void_p, _ulong, _int, _void_p, _ulong, ctypes.c_uint],
    "set_mempolicy": [_int, _void_p, _ulong],
    "get_mempolicy": [_void_p, _void_p, _ulong, _void_p, _ulong],
    "move_pages": [_int, _ulong, _void_p, _void_p, _void_p, _int],
}


class Binding(NamedTuple):
    """How the four calls reach the kernel; ``calls`` return -1 and set errno as in C."""

    name: str
    calls: dict[str, Callable[..., int]]


@cache
def binding() -> Binding:
    """Return libnuma's symbols where it loads, else raw system calls.

    Where both are missing the calls raise NumaUnavailableError: much can be done without them.
    """
    try:
        library = ctypes.CDLL(LIBNUMA, use_errno=True)
        return Binding(LIBNUMA, {name: _symbol(library, name) for name in PROTOTYPES})
    except (OSError, AttributeError):
        numbers = NUMBERS.get(os.uname().machine)
    if numbers is None:
        return Binding(NO_CALLS, dict.fromkeys(PROTOTYPES, _unavailable))
    return Binding(SYSTEM_CALLS, {name: _raw(name, numbers[name]) for name in PROTOTYPES})


def _symbol(library: ctypes.CDLL, name: str) -> Callable[..., int]:
    function = getattr(library, name)
    function.argtypes, function.restype = PROTOTYPES[name], _long
    return function  # type: ignore[no-any-return]


def _raw(name: str, number: int) -> Callable[..., int]:
    function = ctypes.CDLL(None, use_errno=True)["syscall"]
    function.argtypes, function.restype = [_long, *PROTOTYPES[name]], _long
    return partial(function, number)


def _unavailable(*_: object) -> int:
    raise NumaUnavailableError(
        f"no {LIBNUMA} and no system call numbers for {os.uname().machine}: {LIBNUMA_HINT}",
        errno=errno.ENOSYS,
    )


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = _void_p
    library.mmap.argtypes = [_void_p, ctypes.c_size_t, _int, _int, _int, ctypes.c_int64]
    library.munmap.argtypes = [_void_p, ctypes.c_size_t]
    library.madvise.argtypes = [_void_p, ctypes.c_size_t, _int]
    library.mincore.argtypes = [_void_p, ctypes.c_size_t, _void_p]
    library.fstatfs.argtypes = [_int, _void_p]
    library.prctl.argtypes = [_int, _void_p]
    return library


def _failed(call: str, what: str) -> NumaError:
    code = ctypes.get_errno()
    return NumaError(f"{call}: {what}: {os.strerror(code)}", call=call, errno=code)


def _refused(call: str, what: str, nodes: Collection[int] = ()) -> NumaError:
    """Return the error of a policy call, with what to do about it."""
    code = ctypes.get_errno()
    kind = NumaUnavailableError if code in (errno.EPERM, errno.ENOSYS) else NumaError
    hint = f" ({HINTS[code]})" if code in HINTS else ""
    node = next(iter(nodes)) if len(nodes) == 1 else None
    return kind(f"{call}: {what}: {os.strerror(code)}{hint}", call=call, node=node, errno=code)


def _mask(nodes: Collection[int]) -> ctypes.Array[ctypes.c_ulong]:
    mask = _Mask()
    for node in nodes:
        if not 0 <= node < MASK_BITS:
            raise NumaError(f"node {node} is beyond {MASK_BITS - 1}", call="nodemask", node=node)
        mask[node // WORD_BITS] |= 1 << node % WORD_BITS
    return mask


def mbind(address: int, length: int, mode: int, nodes: Collection[int]) -> None:
    """Set the policy of pages not yet there. Returning proves nothing: count the pages after."""
    # The kernel reads one bit less than maxnode says.
    if binding().calls["mbind"](address, length, mode, _mask(nodes), MASK_BITS + 1, 0) != 0:
        raise _refused("mbind", f"{length} bytes to node {format_list(nodes)}", nodes)


def set_mempolicy(mode: int, nodes: Collection[int]) -> None:
    """Set the policy of the calling thread's allocations, page cache that it reads included."""
    if binding().calls["set_mempolicy"](mode, _mask(nodes), MASK_BITS + 1) != 0:
        raise _refused("set_mempolicy", f"node {format_list(nodes)}", nodes)


def get_mempolicy() -> tuple[int, list[int]]:
    """Return mode and nodes of the calling thread's policy."""
    mode, mask = _int(), _Mask()
    if binding().calls["get_mempolicy"](ctypes.byref(mode), mask, MASK_BITS + 1, None, 0) != 0:
        raise _refused("get_mempolicy", "this thread")
    words = [i for i, word in enumerate(mask) if word]
    bits = [(i * WORD_BITS + bit, mask[i] >> bit & 1) for i in words for bit in range(WORD_BITS)]
    return mode.value, [node for node, is_set in bits if is_set]


def pages_nodes(addresses: Sequence[int]) -> list[int]:
    """Return each page's node by move_pages; a negative errno where none (-2: not in RAM)."""
    # Arrays: ctypes' own take three times as long to make and to read as the call itself.
    pages, status = array("Q", addresses), array("i", [-(1 << 20)]) * len(addresses)
    where = (pages.buffer_info()[0], None, status.buffer_info()[0])
    if binding().calls["move_pages"](0, len(pages), *where, 0) < 0:
        raise _failed("move_pages", f"asking for {len(pages)} pages")
    return status.tolist()


def move_pages(addresses: Sequence[int], nodes: Sequence[int]) -> list[int]:
    """Move the page at each address to a node; where each is now, or -errno where it stayed.

    Only pages that this process alone maps. Raises: NumaError.
    """
    count = len(addresses)
    status = (_int * count)()
    pages, wanted = (_void_p * count)(*addresses), (_int * count)(*nodes)
    if binding().calls["move_pages"](0, count, pages, wanted, status, MPOL_MF_MOVE) < 0:
        raise _refused("move_pages", f"{count} pages", set(nodes))
    return list(status)


def mmap_at(address: int, length: int, prot: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Call mmap(2); return the address. Raises: NumaError."""
    result = _libc().mmap(address, length, prot, flags, fd, offset)
    if result is None or result == ctypes.c_void_p(-1).value:
        raise _failed("mmap", f"{length} bytes")
    return int(result)


def munmap(address: int, length: int) -> None:
    if _libc().munmap(address, length) != 0:
        raise _failed("munmap", f"{length} bytes")


def madvise(address: int, length: int, advice: int) -> int:
    """Call madvise(2); return 0, or an errno that the caller decides about."""
    return ctypes.get_errno() if _libc().madvise(address, length, advice) != 0 else 0


def mlock_on_fault(address: int, length: int) -> int:
    """Call mlock2(2): pages stay in RAM once they are mapped. Return 0, or an errno."""
    try:
        call = _libc().mlock2
    except AttributeError:  # a C library before 2018
        return errno.ENOSYS
    call.argtypes = [_void_p, ctypes.c_size_t, ctypes.c_uint]
    return ctypes.get_errno() if call(address, length, MLOCK_ONFAULT) != 0 else 0


def mincore(address: int, length: int) -> bytes:
    """Return a byte per page of the range, 1 where it is in RAM."""
    vector = ctypes.create_string_buffer(-(-length // PAGE))
    if _libc().mincore(address, length, vector) != 0:
        raise _failed("mincore", f"{length} bytes")
    return vector.raw.translate(_LOWEST_BIT)


_LOWEST_BIT = bytes(i & 1 for i in range(256))


class CacheStat(NamedTuple):
    """Pages of a range, as struct cachestat of linux/mman.h counts them."""

    cached: int
    dirty: int
    writeback: int
    evicted: int
    recently_evicted: int


_Pair, _Five = ctypes.c_uint64 * 2, ctypes.c_uint64 * 5
NO_CACHESTAT = {errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EOPNOTSUPP}


@cache
def _cachestat() -> Callable[..., int] | None:
    if os.uname().machine not in NUMBERS:
        return None
    function = ctypes.CDLL(None, use_errno=True)["syscall"]
    function.argtypes = [_long, _int, _void_p, _void_p, ctypes.c_uint]
    function.restype = _long
    return partial(function, CACHESTAT)


def cachestat(fd: int, offset: int, length: int) -> CacheStat | None:
    """Count page cache of ``length`` bytes from ``offset``; 0: all that follow. Map nothing.

    None where the kernel does not tell: before Linux 6.5, in a sandbox that does not know the
    call, on hugetlbfs, and on later kernels to those who neither own nor may write the file.
    Raises: NumaError for anything else.
    """
    call, counts = _cachestat(), _Five()
    if call is None:
        return None
    if call(fd, _Pair(offset, length), counts, 0) == 0:
        return CacheStat(*counts)
    if ctypes.get_errno() in NO_CACHESTAT:
        return None
    raise _failed("cachestat", f"{length} bytes from {offset}")


def file_system(fd: int) -> int:
    """Return the number of a file's file system (linux/magic.h); 0: unknown."""
    status = ctypes.create_string_buffer(STATFS_BYTES)
    failed = _libc().fstatfs(fd, status) != 0
    return 0 if failed else ctypes.c_long.from_buffer(status).value & 0xFFFFFFFF


def name_thread(name: str) -> None:
    """Name the calling thread in the kernel, which keeps 15 bytes: for top, perf and status.

    Before Python 3.14 its threads have the name of the process.
    """
    _libc().prctl(PR_SET_NAME, name.encode())


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when the thread that started it ends.

    It stays so in the program that replaces this one, unless that gains rights. Source: prctl(2).
    """
    _libc().prctl(PR_SET_PDEATHSIG, number)


def memory_at(address: int, nbytes: int) -> ctypes.Array[ctypes.c_ubyte]:
    """Return the bytes at an address as an object with the buffer protocol. It owns nothing."""
    return (ctypes.c_ubyte * nbytes).from_address(address)


def address_of(array: ctypes.Array[ctypes.c_ubyte]) -> int:
    return ctypes.addressof(array)


def copy_bytes(target: memoryview, source: bytearray) -> None:
    """Fill ``target`` from ``source``, which is as long at least, while other threads go on."""
    if target:
        ours, theirs = ctypes.c_ubyte.from_buffer(source), ctypes.c_ubyte.from_buffer(target)
        ctypes.memmove(ctypes.byref(theirs), ctypes.byref(ours), len(target))


def openmp_places() -> list[frozenset[int]] | None:
    """Return the CPUs of every place that this process's libgomp binds to; empty: it binds none.

    None where that is not known: there is no OpenMP library, or another that must not be asked,
    since the question itself would make it pin. Source: OpenMP 4.5, 3.2.23 to 3.2.25.
    """
    try:
        with open(
            "/proc/self/maps", encoding="utf-8", errors="surrogateescape", newline="\n"
        ) as file:
            paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in file if ".so" in line}
    except OSError:
        return None
    names = {path: os.path.basename(path) for path in paths}
    known = [path for path, name in names.items() if name.startswith("libgomp")]
    asked_not = any(name.startswith(("libiomp", "libomp")) for name in names.values())
    try:
        found = [place for path in known for place in _places(path)]
    except (OSError, AttributeError):
        return None  # deleted since, or older than OpenMP 4.5
    return found if found or (known and not asked_not) else None


def _places(path: str) -> list[frozenset[int]]:
    library, found = ctypes.CDLL(path, mode=os.RTLD_LAZY | os.RTLD_NOLOAD), []
    for place in range(library.omp_get_num_places()):
        cpus = (_int * max(0, library.omp_get_place_num_procs(place)))()
        library.omp_get_place_proc_ids(place, cpus)
        found.append(frozenset(cpus))
    return found
