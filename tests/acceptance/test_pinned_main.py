"""libgomp pins the main thread at ``import torch``: that hides no CPU from numaload.

With a real torch. What narrows a process on purpose (taskset, a batch system) still counts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

HERE = frozenset(os.sched_getaffinity(0))
SEEN = """
import json, os, sys, warnings
if sys.argv[1] == "first":
    import torch
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import numaload
    from numaload.machine.workers import finish, pool
    machine = [numaload.topology() for _ in range(2)][0]
main = sorted(os.sched_getaffinity(0))
pools = {n: pool(machine, [n]) for n in machine.all}
pinned = {n: sorted(*finish([p.submit(os.sched_getaffinity, 0)])) for n, p in pools.items()}
if sys.argv[1] == "after":
    import torch
print(json.dumps({
    "main": main, "cpus": sorted(machine.cpus), "said": [str(w.message) for w in said],
    "nodes": {n: sorted(machine.nodes[n].usable_cpus) for n in machine.all}, "pools": pinned,
}))
"""
VARIABLES = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
FIRST, LAST = str(min(HERE)), str(max(HERE))
BINDINGS: list[dict[str, str]] = [
    {"OMP_PROC_BIND": "true"},
    {"OMP_PROC_BIND": "spread", "OMP_PLACES": "cores"},
    {"OMP_PLACES": "threads"},
    {"OMP_PLACES": f"{{{FIRST}}}"},
    {"GOMP_CPU_AFFINITY": LAST},
]
several = pytest.mark.skipif(len(HERE) < 2, reason="one CPU cannot be divided")


def seen(torch: str, variables: dict[str, str], cpus: frozenset[int] = HERE) -> dict[str, Any]:
    """What a process sees that may use ``cpus``; torch: "first" before numaload, "after", "no"."""
    if torch != "no":
        pytest.importorskip("torch")
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | variables
    done = subprocess.run(
        [sys.executable, "-c", SEEN, torch], capture_output=True, text=True, env=environment,
        timeout=120, check=False, preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@several
@pytest.mark.parametrize("variables", BINDINGS, ids=",".join)
def test_a_main_thread_pinned_by_libgomp_hides_no_cpu(variables: dict[str, str]) -> None:
    found = seen("first", variables)
    assert len(found["main"]) == 1, "libgomp did not pin: nothing is tried here"
    assert found["cpus"] == sorted(HERE)
    (said,) = found["said"]
    assert all(f"{name}={value}" in said for name, value in variables.items())
    # Our own threads go where they belong all the same.
    assert found["pools"] == found["nodes"]


@several
@pytest.mark.parametrize(
    "variables", [{}, {"OMP_PROC_BIND": "false", "OMP_PLACES": "cores"}, {"KMP_AFFINITY": "none"}]
)
def test_a_process_narrowed_on_purpose_stays_so(variables: dict[str, str]) -> None:
    found = seen("first", variables, frozenset({max(HERE)}))
    assert found["cpus"] == found["main"] == [max(HERE)]
    assert found["said"] == []
    assert list(found["pools"].values()) == [[max(HERE)]]


@several
def test_numaload_first_sees_everything_and_says_nothing() -> None:
    found = seen("after", BINDINGS[0])
    assert found["main"] == found["cpus"] == sorted(HERE)
    assert found["said"] == []


@several
def test_the_child_of_a_pinned_process_is_not_narrowed_by_that() -> None:
    """It inherits the mask of one core and the variables, with no libgomp of its own."""
    found = seen("no", BINDINGS[0], frozenset({min(HERE)}))
    assert found["cpus"] == sorted(HERE)
    assert len(found["said"]) == 1
