"""Whether a narrow mask is an OpenMP library's doing, and what was allowed before it."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from numaload.linux.syscalls import openmp_places
from numaload.machine.affinity import allowed_by_cpuset, before_binding, undo_binding

HERE = frozenset(os.sched_getaffinity(0))
SIXTEEN = frozenset(range(16))
EIGHT = frozenset(range(8))
BOUND = {"OMP_PROC_BIND": "true"}


def places(*cpus: range) -> list[frozenset[int]]:
    return [frozenset(one) for one in cpus]


def one_each(count: int) -> list[frozenset[int]]:
    return places(*(range(cpu, cpu + 1) for cpu in range(count)))


CHOICES = {  # mask, places of the libraries, variables, what counts of 16 CPUs
    "pinned": ({0}, one_each(16), BOUND, SIXTEEN),
    "pinned-under-numactl": ({0}, one_each(8), BOUND, EIGHT),
    "pinned-to-a-socket": (range(8), places(range(8), range(8, 16)), BOUND, SIXTEEN),
    "numactl-is-one-place": (range(8), places(range(8)), BOUND | {"OMP_PLACES": "sockets"}, EIGHT),
    "listed": ({3}, places(range(3, 4)), {"GOMP_CPU_AFFINITY": "3"}, SIXTEEN),
    "listed-places": (range(4), places(range(4)), {"OMP_PLACES": "{0:4}"}, SIXTEEN),
    "listed-elsewhere": (range(8), places(range(2)), {"OMP_PLACES": "{0:2}"}, EIGHT),
    "inherited": ({0}, None, BOUND, SIXTEEN),
    "inherited-core": ({0, 1}, None, BOUND, SIXTEEN),
    "inherited-and-loaded": ({0}, places(range(1)), BOUND, SIXTEEN),
    "numactl-without-library": (range(8), None, BOUND, EIGHT),
    "library-binds-nothing": ({0}, [], BOUND, frozenset({0})),
    "intel": ({4}, None, {"KMP_AFFINITY": "granularity=fine,compact"}, SIXTEEN),
}


@pytest.mark.parametrize(("mask", "found", "variables", "chosen"), CHOICES.values(), ids=CHOICES)
def test_choices(
    mask: set[int],
    found: list[frozenset[int]] | None,
    variables: dict[str, str],
    chosen: frozenset[int],
    tmp_path: Path,
) -> None:
    for cpu in range(16):  # two threads per core
        folder = tmp_path / f"devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        first = cpu // 2 * 2
        (folder / "thread_siblings_list").write_text(f"{first}-{first + 1}\n")
    got = undo_binding(frozenset(mask), SIXTEEN, found, variables, sys_root=str(tmp_path))
    assert got == chosen


NOT_BOUND: list[dict[str, str]] = [
    {},
    {"OMP_PROC_BIND": "false", "OMP_PLACES": "cores", "GOMP_CPU_AFFINITY": "0"},
    {"OMP_PROC_BIND": " FALSE "},
    {"KMP_AFFINITY": "disabled"},
    {"KMP_AFFINITY": "none,verbose"},
    {"OMP_PLACES": ""},
]


@pytest.mark.parametrize("variables", NOT_BOUND, ids=str)
def test_without_binding_the_mask_counts(variables: dict[str, str]) -> None:
    one = frozenset({min(HERE)})
    assert before_binding(one, variables) == (one, "")


def test_a_whole_mask_counts() -> None:
    assert before_binding(HERE, BOUND) == (HERE, "")


def test_the_kernel_says_what_the_cpuset_allows() -> None:
    assert allowed_by_cpuset() >= HERE
    before = os.sched_getaffinity(0)
    if len(HERE) > 1:
        os.sched_setaffinity(0, {min(HERE)})
        try:
            assert allowed_by_cpuset() >= HERE  # whatever this thread is pinned to
            assert os.sched_getaffinity(0) == {min(HERE)}
        finally:
            os.sched_setaffinity(0, before)


def test_places_are_asked_of_a_library_that_is_there() -> None:
    libgomp = next((lib for lib in ("libgomp.so.1",) if loads(lib)), None)
    if libgomp is None:
        assert openmp_places() is None
    else:
        assert openmp_places() == []  # these tests run with no such variable


def loads(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True
