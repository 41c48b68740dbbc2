"""libnuma's view of the machine: an optional package that dies and disagrees in its own ways."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from machines import EVERY_CPU, POWER, XEON, Machine
from numaload.doctor import opinion
from numaload.doctor.opinion import second_opinion
from numaload.linux.syscalls import LIBNUMA, NO_CALLS, SYSTEM_CALLS, Binding, binding
from numaload.machine.topology import Topology, topology


class Info(ModuleType):
    """py-libnuma's ``numa.info``, seeing a machine."""

    def __init__(self, machine: Topology) -> None:
        super().__init__("numa.info")
        self.machine, self.available, self.asked = machine, True, set[int]()

    def numa_available(self) -> bool:
        return self.available

    def get_max_node(self) -> int:
        return max(self.machine.nodes)

    def node_to_cpus(self, node: int) -> list[int]:
        self.asked.add(node)
        return sorted(self.machine.nodes[node].cpus)  # KeyError, where the real one crashes

    def numa_distance(self, node: int, other: int) -> int:
        self.asked |= {node, other}
        return self.machine.nodes[node].distances[other]


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "numa"]:
        del sys.modules[name]


@pytest.fixture(autouse=True)
def no_numa_imported() -> Iterator[None]:
    """Each test imports its own package of that name."""
    _forget()
    yield
    _forget()


def machine_of(described: Machine, root: Path) -> Topology:
    return topology(**described.write(root), allowed=EVERY_CPU)


def install(monkeypatch: pytest.MonkeyPatch, info: ModuleType) -> None:
    package = ModuleType("numa")
    monkeypatch.setattr(package, "info", info, raising=False)
    monkeypatch.setitem(sys.modules, "numa", package)


def libnuma(monkeypatch: pytest.MonkeyPatch, name: str = LIBNUMA) -> None:
    monkeypatch.setattr(opinion, "binding", lambda: Binding(name, {}))


@pytest.fixture
def xeon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Topology:
    libnuma(monkeypatch)
    return machine_of(XEON, tmp_path / "ours")


@pytest.mark.parametrize("described", [XEON, POWER], ids=["dual-xeon", "power"])
def test_agreement(described: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    libnuma(monkeypatch)
    machine = machine_of(described, tmp_path)
    info = Info(machine)
    install(monkeypatch, info)
    assert second_opinion(machine) == "libnuma agrees on CPUs and distances"
    assert info.asked <= set(machine.nodes)


OTHERS = {
    "fewer-cpus": (
        Machine({0: ("0-15", 1), 1: XEON.nodes[1]}, XEON.rows),
        "node 0: libnuma has CPUs 0-15, /sys 0-15,32-47",
    ),
    "no-cpus": (
        Machine({0: ("", 1), 1: XEON.nodes[1]}, XEON.rows),
        "node 0: libnuma has CPUs none, /sys 0-15,32-47",
    ),
    "distance": (
        Machine(XEON.nodes, ["10 20", "21 10"]),
        "distance 0 to 1: libnuma 20, /sys 21",
    ),
    "more-nodes": (
        Machine(XEON.nodes | {4: ("", 1)}, ["10 21 40", "21 10 40", "40 40 10"]),
        "libnuma's highest node is 4, /sys has 1",
    ),
}


@pytest.mark.parametrize(("theirs", "difference"), OTHERS.values(), ids=OTHERS)
def test_differences_are_named(
    theirs: Machine,
    difference: str,
    xeon: Topology,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    install(monkeypatch, Info(machine_of(theirs, tmp_path / "theirs")))
    assert second_opinion(xeon) == difference


def test_fewer_nodes_are_not_asked_about(
    xeon: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = Info(machine_of(Machine({0: XEON.nodes[0]}, ["10"]), tmp_path / "theirs"))
    monkeypatch.setattr(
        info, "numa_distance", lambda node, other: xeon.nodes[node].distances[other]
    )
    install(monkeypatch, info)
    assert second_opinion(xeon) == "libnuma's highest node is 0, /sys has 1"
    assert info.asked == {0}


def test_libnuma_without_numa(xeon: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    info = Info(xeon)
    info.available = False
    install(monkeypatch, info)
    assert second_opinion(xeon) == "libnuma says that NUMA is not available here"


BROKEN = {
    "dies-on-import": (
        'raise AttributeError("undefined symbol: numa_num_possible_nodes")',
        "none, py-libnuma failed: AttributeError",
    ),
    "another-package": ("", "none, py-libnuma is not installed"),
    "warns": (
        "import warnings; warnings.warn('old'); raise OSError('file too short')",
        "none, py-libnuma failed: OSError('file too short')",
    ),
}


@pytest.mark.parametrize(("code", "said"), BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_no_opinion(
    code: str, said: str, xeon: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "numa").mkdir()
    (tmp_path / "numa/__init__.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    assert second_opinion(xeon).startswith(said)


def test_package_is_not_installed(xeon: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numa", None)
    expected = "none, py-libnuma is not installed: pip install numaload[libnuma]"
    assert second_opinion(xeon) == expected


@pytest.mark.parametrize("name", [SYSTEM_CALLS, NO_CALLS])
def test_without_libnuma_the_package_is_not_even_imported(
    name: str, xeon: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    libnuma(monkeypatch, name)
    assert second_opinion(xeon) == f"none, {LIBNUMA} is not installed"
    assert "numa" not in sys.modules


@pytest.fixture
def py_libnuma() -> None:
    """The real package. Without libnuma its import dies of other things than ImportError."""
    try:
        importlib.import_module("numa.info")
    except Exception as error:  # noqa: BLE001 - see above
        pytest.skip(f"py-libnuma is not usable here: {error!r}")


@pytest.mark.usefixtures("py_libnuma")
def test_the_real_package_agrees_on_this_machine() -> None:
    if binding().name != LIBNUMA:
        pytest.skip(f"{LIBNUMA} is not installed")
    assert second_opinion(topology()) == "libnuma agrees on CPUs and distances"
