"""Point 4: containers that refuse the calls, kernels that lack them, limits that are too small."""

from __future__ import annotations

import os

import pytest

from commands import Numaload, evict, used_bytes
from confined import DOCKER, NO_NUMA

MIB = 1 << 20
REFUSALS = {"docker": (DOCKER, "Operation not permitted"), "no-numa": (NO_NUMA, "not implemented")}


@pytest.fixture(params=REFUSALS)
def refused(request: pytest.FixtureRequest, numaload: Numaload) -> tuple[Numaload, str]:
    """The command line where binding is refused, and how the kernel words it."""
    deny, text = REFUSALS[request.param]
    return numaload.within(deny=deny), text


def test_placed_not_bound(refused: tuple[Numaload, str], model: str) -> None:
    numaload, text = refused
    done = numaload("mirror", model)
    assert "(100 %)" in done.stdout
    assert "placed, not bound" in done.stdout
    assert "--cap-add SYS_NICE" in done.stderr
    assert text in done.stderr
    (row,) = numaload.json("status")["replicas"]
    assert row["bound"] is False
    assert "placed, not bound" in numaload("status").stdout
    assert "all checksums right" in numaload("verify").stdout


def test_each_fallback_is_said_once(numaload: Numaload, model: str) -> None:
    said = numaload.within(deny=DOCKER)("mirror", model).stderr
    assert said.count("warning: mbind") == 1
    assert said.count("placement is verified by numa_maps alone") == 1


def test_the_report_names_what_is_not_bound(refused: tuple[Numaload, str], model: str) -> None:
    numaload, _ = refused
    (report,) = numaload.json("mirror", model)
    assert report["placed"]
    assert report["unbound"] == report["built"] == report["asked"]
    assert all(not placement["sampled"] for placement in report["placements"].values())


def test_strict_refuses_at_once(refused: tuple[Numaload, str], model: str) -> None:
    numaload, text = refused
    used = used_bytes(numaload.store)
    done = numaload("mirror", model, "--strict", status=1)
    assert text in done.stderr
    assert "plan:" not in done.stderr
    assert used_bytes(numaload.store) - used < MIB
    assert numaload.json("status")["replicas"] == []


def test_strict_does_not_take_what_is_there_unbound(numaload: Numaload, model: str) -> None:
    numaload.within(deny=DOCKER)("mirror", model)
    done = numaload("mirror", model, "--strict", status=1)
    assert "mirrored already, placed, not bound; release it first: numaload release" in done.stderr
    numaload("release", model)
    numaload("mirror", model, "--strict")


def test_strict_builds_where_binding_works(numaload: Numaload, model: str) -> None:
    done = numaload("mirror", model, "--strict")
    assert "bound by" in done.stdout
    (row,) = numaload.json("status")["replicas"]
    assert row["bound"] is True


def test_move_pages_alone_denied(numaload: Numaload, model: str) -> None:
    done = numaload.within(deny="move_pages=EPERM")("mirror", model)
    assert "bound by" in done.stdout
    assert "move_pages was not asked" in done.stdout
    assert "numa_maps alone" in done.stderr


def test_the_api_in_a_container(numaload: Numaload, model: str) -> None:
    """One program that mirrors, attaches and reads, where every call is refused."""
    program = """
import json, sys, warnings, confined, numaload
confined.Confined(deny=confined.DOCKER).enter()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    with numaload.mirror(sys.argv[1], shared=True) as mirror:
        found = {"unbound": mirror.report.unbound, "right": mirror.verify().right}
    try:
        numaload.mirror(sys.argv[1], shared=True, strict=True)
    except numaload.errors.NumaUnavailableError as error:
        found["strict"] = error.errno
print(json.dumps(found | {"said": [str(w.message) for w in said]}))
"""
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = numaload.python(f"import sys; sys.path.insert(0, {tests!r})\n{program}", model)
    assert found["right"]
    assert found["unbound"]
    assert found["strict"] == 1
    assert len([text for text in found["said"] if "mbind" in text]) == 1


def test_private_replicas_in_a_container(numaload: Numaload, model: str) -> None:
    """Counted by another process, while they are there."""
    program = """
import json, sys, confined, witness, numaload
from numaload.replicas.mirror import MirrorOptions, private
confined.Confined(deny=confined.DOCKER).enter()
machine, weights = numaload.topology(), numaload.open(sys.argv[1])
with private(weights, machine, MirrorOptions(machine.groups(machine.all)), None) as mirror:
    try:
        mirror.paths(mirror.nodes[0])
    except numaload.errors.UsageError as error:
        print(json.dumps([mirror.report.unbound, mirror.verify().right, str(error)]))
"""
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    found = numaload.python(f"import sys; sys.path.insert(0, {tests!r})\n{program}", model)
    unbound, right, no_paths = found
    assert (bool(unbound), right) == (True, True)
    assert "shared=True" in no_paths


def test_prewarm_where_policies_are_refused(numaload: Numaload, model_files: list[str]) -> None:
    evict(model_files)
    done = numaload.within(deny=DOCKER)("prewarm", model_files[0], "--nodes", "all")
    assert "read by threads on these nodes" in done.stderr
    assert "the kernel says node" in done.stdout
