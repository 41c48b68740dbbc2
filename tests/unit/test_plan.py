"""Does it fit: what replicas take, against every limit that they count against."""

from __future__ import annotations

from pathlib import Path

import pytest

from machines import EVERY_CPU, MACHINES
from numaload.errors import NodeMemoryError
from numaload.files.known import Model
from numaload.files.source import Identity
from numaload.linux.lists import Group
from numaload.machine import memory
from numaload.machine.topology import Topology, topology
from numaload.replicas import plan as plans
from numaload.replicas.layout import Layout
from numaload.replicas.plan import (
    LEAST_FREE,
    PRIVATE,
    SMALL,
    STORED,
    Build,
    MirrorPlan,
    footprint,
    free_on,
    plan,
)

GIB = 1 << 30


def model(*sizes: int) -> Model:
    paths = tuple(f"/models/{i}.gguf" for i in range(len(sizes)))
    return Model(paths, tuple(Identity(1, i, size, 0, 0) for i, size in enumerate(sizes)))


def machine(name: str, root: Path) -> Topology:
    return topology(**MACHINES[name].write(root), allowed=EVERY_CPU)


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Room by limit; tests change it."""
    room = {"node": 100 * GIB, "machine": 1000 * GIB, "cgroup": 1000 * GIB, "tmpfs": 1000 * GIB}
    monkeypatch.setattr(memory, "node_free", lambda _: room["node"])
    monkeypatch.setattr(
        memory, "machine_available", lambda *_: memory.Limit("machine", room["machine"])
    )
    monkeypatch.setattr(
        memory, "cgroup_limits", lambda *_: [memory.Limit("cgroup", room["cgroup"])]
    )
    monkeypatch.setattr(plans, "_store_need", lambda n, **_: plans.Need("tmpfs", n, room["tmpfs"]))
    return room


def needs(found: MirrorPlan) -> dict[str, int]:
    return {need.name: need.needed for need in found.needs}


def build(model: Model, groups: list[Group]) -> Build:
    return Build(model, {group: Layout(group) for group in groups})


def test_footprint_is_whole_pages_per_file() -> None:
    assert footprint(model(1, 4096, 4097)) == 4096 + 4096 + 8192
    assert footprint(model(0)) == 0


def test_models_add_up_on_a_node_and_nodes_on_what_they_share(tmp_path: Path) -> None:
    builds = [build(model(4096), [(0,), (1,)]), build(model(8192), [(1,)]), build(model(4096), [])]
    found = plan(builds, machine("dual-xeon", tmp_path), kept=STORED)
    assert needs(found) == {
        "node 0": 4096, "node 1": 12288, "machine": 16384, "cgroup": 16384, "tmpfs": 16384 + SMALL,
    }  # fmt: skip
    assert found.nbytes == 16384
    assert found.fits


def test_private_replicas_take_nothing_of_the_tmpfs(tmp_path: Path) -> None:
    found = plan([build(model(4096), [(0,)])], machine("dual-xeon", tmp_path), kept=PRIVATE)
    assert "tmpfs" not in needs(found)


def test_nothing_to_build_needs_nothing(tmp_path: Path, limits: dict[str, int]) -> None:
    limits.update(dict.fromkeys(limits, 0))
    found = plan([build(model(4096), [])], machine("dual-xeon", tmp_path), kept=STORED)
    assert found.needs == ()
    found.check()


@pytest.mark.parametrize("name", ["node", "machine", "cgroup", "tmpfs"])
def test_any_limit_that_is_too_small_refuses(
    tmp_path: Path, limits: dict[str, int], name: str
) -> None:
    limits[name] = 5 * GIB
    found = plan([build(model(6 * GIB), [(1,)])], machine("dual-xeon", tmp_path), kept=STORED)
    with pytest.raises(NodeMemoryError, match=rf"{name}.* needs 6442\d+ bytes \(6\.00") as caught:
        found.check()
    assert caught.value.node == (1 if name == "node" else None)


def test_what_fits_is_not_stopped_at_its_end(tmp_path: Path, limits: dict[str, int]) -> None:
    """Filling stops where less than LEAST_FREE is left: the plan must know."""
    where = machine("dual-xeon", tmp_path)
    limits["node"] = 6 * GIB + LEAST_FREE
    assert plan([build(model(6 * GIB), [(0,)])], where, kept=PRIVATE).fits
    limits["node"] -= 1
    assert not plan([build(model(6 * GIB), [(0,)])], where, kept=PRIVATE).fits


def test_where_all_memory_is_on_one_node_a_reserve_stays_too(tmp_path: Path) -> None:
    one = machine("one-node", tmp_path)
    assert free_on(0, one) == 1000 * GIB - memory.reserve(one.nodes[0].memory_total)
    assert free_on(0, machine("dual-xeon", tmp_path / "two")) == 100 * GIB
