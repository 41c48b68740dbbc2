"""What the doctor finds about nodes, on constructed machines."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doctor_systems import FAST, GIB, constructed, looked
from machines import (
    APART,
    CXL,
    GH200,
    L3_AS_NUMA,
    MACHINES,
    MEMORYLESS,
    NPS1,
    NPS4,
    ONE,
    POWER,
    SNC2_IN_ORDER,
    XEON,
    Machine,
)
from numaload.doctor import system as systems
from numaload.doctor.check import COPY, ESTIMATED, LOAD, PASS, Check, Finding, Price, Unknown
from numaload.doctor.diagnosis import examine
from numaload.doctor.numa import (
    CHECKS,
    MIRRORED,
    MIRRORED_INSIDE,
    Balancing,
    CacheOnOneNode,
    FarCache,
    LeftOut,
    ManyNodes,
    NoLibnuma,
    NoMemory,
    OtherOpinion,
    Refused,
    StaleReplicas,
    ZoneReclaim,
)
from numaload.doctor.system import System
from numaload.errors import NumaloadError
from numaload.files.known import identify
from numaload.files.residency import present
from numaload.files.source import SourceFile
from numaload.linux.syscalls import NO_CALLS, PAGE, SYSTEM_CALLS
from numaload.machine import userdir
from numaload.machine.devices import Device
from numaload.machine.topology import topology
from numaload.replicas import store
from numaload.replicas.entry import Entry

BALANCING, RECLAIM = "/proc/sys/kernel/numa_balancing", "/proc/sys/vm/zone_reclaim_mode"
HEALTHY = {BALANCING: "0\n", RECLAIM: "0\n"}  # of any machine
SIZE = 100 * GIB
# Two sockets as of XEON with few CPUs, and two nodes in one socket.
TWO = Machine({0: ("0-1", 257_000), 1: ("2-3", 258_000)}, XEON.rows, XEON.sockets)
ONE_SOCKET = replace(TWO, rows=["10 12", "12 10"], sockets={0: 0, 1: 0})
PASSES = SIZE / 200e9  # seconds of one over two sockets
EPERM = "mbind: 4096 bytes to node 0: Operation not permitted (forbidden, as in a container)"


def found(check: type[Check], system: System) -> Finding:
    finding = looked(check, system)
    assert finding is not None
    assert len(finding.title) < 60
    return finding


def cpuinfo(name: str) -> dict[str, str]:
    return {"/proc/cpuinfo": f"processor : 0\nmodel name\t: {name}\n"}


def seconds(price: Price | None, on: str = PASS) -> float:
    assert price is not None
    assert (price.how, price.on) == (ESTIMATED, on)
    return price.seconds


# The subject as a whole.


@pytest.mark.parametrize("machine", [ONE, XEON, NPS1, POWER, GH200, APART])
@pytest.mark.parametrize("size", [0, 8 * GIB])
def test_nothing_is_found_on_a_healthy_machine(machine: Machine, size: int, tmp_path: Path) -> None:
    diagnosis = examine(constructed(tmp_path, machine, HEALTHY, size=size), CHECKS)
    assert not diagnosis.findings
    assert not diagnosis.unknown


@pytest.mark.parametrize("name", MACHINES)
def test_no_machine_makes_a_check_fail(name: str, tmp_path: Path) -> None:
    system = constructed(tmp_path, MACHINES[name], HEALTHY)
    assert not examine(system, CHECKS).unknown
    system.size, system.cache_nodes = SIZE, {0: SIZE}
    assert not examine(system, CHECKS).unknown


@pytest.mark.filterwarnings("ignore::numaload.errors.NumaloadWarning")
@pytest.mark.parametrize("hidden", ["all", "proc", "sys", "words"])
def test_hidden_files_are_unknown(hidden: str, tmp_path: Path) -> None:
    if hidden == "all":
        system = System(root=str(tmp_path))
    else:
        odd = {BALANCING: "many\n", RECLAIM: "\n"} if hidden == "words" else {}
        system = constructed(tmp_path, TWO, odd, size=SIZE)
        if not odd:
            shutil.rmtree(tmp_path / hidden)
    diagnosis = examine(system, CHECKS)
    assert not diagnosis.findings
    unknown = [] if hidden == "all" else ["NL304", "NL305"]
    assert [one.id for one in diagnosis.unknown] == unknown


def test_a_recorded_machine_is_not_asked(tmp_path: Path) -> None:
    system = System(root=str(tmp_path))
    for name in ("refused", "opinion"):
        with pytest.raises(Unknown, match="recorded"):
            getattr(system, name)


# libnuma.


@pytest.mark.parametrize(
    ("release", "fix", "undo"),
    [
        (
            "ID=ubuntu\nID_LIKE=debian\n",
            "apt-get install -y libnuma1",
            "apt-get remove libnuma1",
        ),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "dnf install -y numactl-libs", "dnf remove"),
        ('ID=opensuse-leap\nID_LIKE="suse opensuse"\n', "zypper install -y libnuma1", "zypper rem"),
        ("ID=arch\n", "pacman -S --noconfirm numactl", "pacman -R"),
        ("ID=own\n", "or the package of this distribution that has libnuma.so.1", ""),
        ("", "apt-get install libnuma1  # or", ""),
    ],
)
def test_a_missing_libnuma(release: str, fix: str, undo: str, tmp_path: Path) -> None:
    files = {"/etc/os-release": release} if release else {}
    system = constructed(tmp_path, TWO, files, size=SIZE, binding=SYSTEM_CALLS)
    finding = found(NoLibnuma, system)
    assert "each of 2 nodes reads 50% of it from another" in finding.seen
    assert seconds(finding.price) == pytest.approx(MIRRORED * PASSES)
    assert fix in finding.fix
    assert finding.undo.startswith(undo)
    assert bool(finding.undo) == bool(undo)
    assert finding.root


def test_a_missing_libnuma_costs_most_of_what_an_epyc_lacks(tmp_path: Path) -> None:
    files = HEALTHY | {BALANCING: "1\n"}
    system = constructed(tmp_path, TWO, files, size=SIZE, binding=SYSTEM_CALLS)
    assert [one.id for one in examine(system, CHECKS).findings] == ["NL301", "NL304"]


@pytest.mark.parametrize("machine", [ONE, replace(TWO, mems_allowed="1")])
def test_one_node_needs_no_libnuma(machine: Machine, tmp_path: Path) -> None:
    assert looked(NoLibnuma, constructed(tmp_path, machine, binding=NO_CALLS)) is None


def test_nodes_of_one_socket_lose_less(tmp_path: Path) -> None:
    system = constructed(tmp_path, ONE_SOCKET, size=SIZE, binding=SYSTEM_CALLS)
    price = found(NoLibnuma, system).price
    assert seconds(price) == pytest.approx(MIRRORED_INSIDE * SIZE / 100e9)


@pytest.mark.parametrize(
    ("opinion", "expected"),
    [
        ("none, py-libnuma is not installed: pip install numaload[libnuma]", False),
        ("libnuma agrees on CPUs and distances", False),
        ("libnuma says that NUMA is not available here", True),
        ("libnuma's highest node is 0, /sys has 1", True),
    ],
)
def test_another_opinion(opinion: str, *, expected: bool, tmp_path: Path) -> None:
    system = constructed(tmp_path, TWO, size=SIZE, opinion=opinion)
    if not expected:
        assert looked(OtherOpinion, system) is None
        return
    finding = found(OtherOpinion, system)
    assert finding.seen == opinion
    assert finding.price is None
    # Nothing is to be installed: the newest that a distribution has may be too old.
    assert finding.fix.startswith(
        "numaload exec --node 0 /models/model.gguf -- PROGRAM -m {model}  # instead of"
    )
    assert "2.0.19" in finding.fix
    assert not finding.root


# What the machine is.


@pytest.mark.parametrize(
    ("machine", "name", "seen"),
    [
        (SNC2_IN_ORDER, "Intel(R) Xeon(R) Platinum 8480+", "4 nodes in 2 sockets, SNC2: "),
        (
            NPS4,
            "AMD EPYC 9654 96-Core Processor",
            "8 nodes in 2 sockets, NPS4: ",
        ),
        (L3_AS_NUMA, "AMD EPYC 7763 64-Core Processor", "sockets, L3 cache as NUMA domain: "),
        (NPS4, "", "makes 8 copies (64.0 GiB) where 2 copies (16.0 GiB) would do"),
    ],
)
def test_sockets_that_are_split(machine: Machine, name: str, seen: str, tmp_path: Path) -> None:
    size = 8 * GIB
    finding = found(ManyNodes, constructed(tmp_path, machine, cpuinfo(name), size=size))
    assert seen in finding.seen
    assert "do not fit" not in finding.seen
    more = len(machine.nodes) - 2
    assert seconds(finding.price, COPY) == pytest.approx(more * size / 10e9)
    assert finding.fix == "numaload mirror --per socket /models/model.gguf"
    assert finding.undo == "numaload release /models/model.gguf"


@pytest.mark.parametrize(("size", "fits"), [(100 * GIB, True), (250 * GIB, False), (0, True)])
def test_two_copies_in_a_socket_are_found_where_they_do_not_fit(
    size: int, *, fits: bool, tmp_path: Path
) -> None:
    finding = looked(ManyNodes, constructed(tmp_path, ONE_SOCKET, size=size))
    assert (finding is None) == fits
    if finding:
        assert "250.0 GiB do not fit on node 0-1" in finding.seen
        assert "--per socket" in finding.fix


def test_a_socket_is_too_small(tmp_path: Path) -> None:
    finding = found(ManyNodes, constructed(tmp_path, ONE_SOCKET, size=500 * GIB))
    assert finding.fix == "numaload mirror --policy stripe /models/model.gguf"


def test_nodes_of_a_guest_are_not_near(tmp_path: Path) -> None:
    guest = Machine({n: (f"{n}", 32_000) for n in range(3)}, ["10 20 20", "20 10 20", "20 20 10"])
    system = constructed(tmp_path, guest, size=SIZE, binding=SYSTEM_CALLS)
    assert looked(ManyNodes, system) is None
    assert seconds(found(NoLibnuma, system).price) == pytest.approx(MIRRORED * SIZE / 100e9)


def test_a_node_without_memory(tmp_path: Path) -> None:
    finding = found(NoMemory, constructed(tmp_path, MEMORYLESS, size=SIZE))
    assert finding.seen == "node 1 has none, and uses node 2's"
    assert seconds(finding.price) == pytest.approx(SIZE / 3 / 100e9)
    assert "memory modules" in finding.fix
    assert not finding.undo


@pytest.mark.parametrize("machine", [TWO, CXL, APART, GH200])
def test_memory_is_near_all_cpus(machine: Machine, tmp_path: Path) -> None:
    assert looked(NoMemory, constructed(tmp_path, machine, size=SIZE)) is None


# What the kernel is told.


@pytest.mark.parametrize(("value", "without"), [(1, 0), (3, 2)])
def test_balancing(value: int, without: int, tmp_path: Path) -> None:
    system = constructed(tmp_path, TWO, {BALANCING: f"{value}\n"}, size=SIZE)
    finding = found(Balancing, system)
    assert finding.seen == f"kernel.numa_balancing is {value}"
    assert seconds(finding.price) == pytest.approx(0.065536 * PASSES)
    assert finding.fix == f"sysctl -w kernel.numa_balancing={without}"
    assert finding.undo == f"sysctl -w kernel.numa_balancing={value}"
    assert finding.root


@pytest.mark.parametrize(
    ("machine", "files"),
    [
        (TWO, {BALANCING: "0\n"}),
        (TWO, {BALANCING: "2\n"}),  # tiers of memory only
        (TWO, {"/proc/sys/kernel/pid_max": "32768\n"}),  # a kernel without it
        (ONE, {BALANCING: "1\n"}),
    ],
)
def test_no_balancing(machine: Machine, files: dict[str, str], tmp_path: Path) -> None:
    assert looked(Balancing, constructed(tmp_path, machine, files, size=SIZE)) is None


def test_zone_reclaim(tmp_path: Path) -> None:
    system = constructed(tmp_path, TWO, {RECLAIM: "1\n"}, size=300 * GIB)
    finding = found(ZoneReclaim, system)
    assert "is 1; the file has 300.0 GiB, the largest node 252.0 GiB" in finding.seen
    more = (300 << 30) - (258_000 << 20)
    assert seconds(finding.price, LOAD) == pytest.approx(more / 3.0e9)
    assert finding.fix == "sysctl -w vm.zone_reclaim_mode=0"
    assert finding.undo == "sysctl -w vm.zone_reclaim_mode=1"


@pytest.mark.parametrize(
    ("value", "size", "is_found"), [(1, 0, True), (1, SIZE, False), (0, 0, False)]
)
def test_zone_reclaim_matters_to_large_files(
    value: int, size: int, *, is_found: bool, tmp_path: Path
) -> None:
    system = constructed(tmp_path, TWO, {RECLAIM: f"{value}\n"}, size=size)
    assert (looked(ZoneReclaim, system) is not None) == is_found


def test_zone_reclaim_without_a_speed_has_no_price(tmp_path: Path) -> None:
    slow = FAST._replace(disk=None)
    system = constructed(tmp_path, TWO, {RECLAIM: "1\n"}, size=300 * GIB, speeds=slow)
    assert found(ZoneReclaim, system).price is None


# What this process may do.


def test_a_cpuset_leaves_a_node_out(tmp_path: Path) -> None:
    finding = found(LeftOut, constructed(tmp_path, replace(TWO, mems_allowed="1"), size=SIZE))
    assert finding.seen == "node 0: its memory is not allowed to this process (cpuset)"
    assert seconds(finding.price) == pytest.approx(SIZE / 2 / 100e9)
    assert "--cpuset-cpus=0-3 --cpuset-mems=0-1 CONTAINER" in finding.fix
    assert "--cpuset-mems=1 CONTAINER" in finding.undo


def test_affinity_leaves_a_node_out(tmp_path: Path) -> None:
    roots = TWO.write(tmp_path / "tree")
    machine = topology(**roots, allowed=frozenset(range(2)))
    system = constructed(tmp_path / "system", TWO)
    system.machine = machine
    finding = found(LeftOut, system)
    assert "node 1: none of its CPUs are allowed" in finding.seen
    assert finding.price is None
    assert "--cpuset-cpus=0-1" in finding.undo


def test_refused_binding(tmp_path: Path) -> None:
    system = constructed(tmp_path, TWO, size=SIZE, refused=EPERM)
    finding = found(Refused, system)
    assert finding.seen == EPERM
    assert seconds(finding.price) == pytest.approx(MIRRORED * PASSES)
    assert "--cap-add SYS_NICE" in finding.fix
    assert looked(Refused, constructed(tmp_path / "other", TWO, size=SIZE)) is None


def test_the_same_seconds_are_claimed_once(tmp_path: Path) -> None:
    system = constructed(tmp_path, TWO, size=SIZE, refused=EPERM, binding=SYSTEM_CALLS)
    assert found(Refused, system).price
    assert found(NoLibnuma, system).price is None


# Where the file is.


@pytest.mark.parametrize(
    ("machine", "on", "seen", "passes"),
    [
        (TWO, {0: SIZE}, "100% of 100.0 GiB in RAM are on node 0", 3),
        (TWO, {0: 2 * GIB, 1: 18 * GIB}, "90% of 20.0 GiB in RAM are on node 1", 3),
        (NPS4, {5: SIZE}, "are on node 5", 3),
    ],
)
def test_page_cache_on_one_node(
    machine: Machine, on: dict[int, int], seen: str, passes: float, tmp_path: Path
) -> None:
    finding = found(CacheOnOneNode, constructed(tmp_path, machine, size=SIZE, cache_nodes=on))
    assert seen in finding.seen
    assert seconds(finding.price) == pytest.approx(passes * PASSES)
    assert finding.fix == (
        "numaload evict /models/model.gguf &&"
        " numaload prewarm --nodes all --policy interleave /models/model.gguf"
    )
    assert not finding.undo


def test_a_file_in_tmpfs_cannot_be_evicted(tmp_path: Path) -> None:
    memory = Device("memory", "tmpfs", "tmpfs")
    system = constructed(tmp_path, TWO, size=SIZE, cache_nodes={0: SIZE}, device=memory)
    system.path = f"{tmp_path}/a model.gguf"
    Path(f"{system.path}.new").touch()  # somebody's own
    assert found(CacheOnOneNode, system).fix == (
        f"numactl --interleave=all cp '{system.path}' '{system.path}.new1'"
        f" && mv '{system.path}.new1' '{system.path}'"
    )


@pytest.mark.parametrize(
    "on",
    [{}, {0: 50 * GIB, 1: 50 * GIB}, {0: 75 * GIB, 1: 25 * GIB}, {0: GIB}],
    ids=["absent", "interleaved", "uneven", "little"],
)
def test_page_cache_is_spread_or_absent(on: dict[int, int], tmp_path: Path) -> None:
    assert looked(CacheOnOneNode, constructed(tmp_path, TWO, size=SIZE, cache_nodes=on)) is None


def test_page_cache_without_cpus(tmp_path: Path) -> None:
    system = constructed(tmp_path, CXL, size=SIZE, cache_nodes={0: 10 * GIB, 2: 90 * GIB})
    finding = found(FarCache, system)
    assert finding.seen == "90.0 GiB of 100.0 GiB in RAM are on node 2"
    assert seconds(finding.price) == pytest.approx(90 * GIB / 30e9)
    assert "--policy interleave" in finding.fix
    assert looked(CacheOnOneNode, system) is None  # the same seconds


@pytest.mark.parametrize(
    ("machine", "name", "on"),
    [
        (CXL, "", {0: 50 * GIB, 1: 50 * GIB}),
        (CXL, "Intel(R) Xeon(R) CPU Max 9480", {2: SIZE}),
        (APART, "", {2: SIZE}),  # the nearest to its CPUs
    ],
)
def test_page_cache_is_near_cpus(
    machine: Machine, name: str, on: dict[int, int], tmp_path: Path
) -> None:
    system = constructed(tmp_path, machine, cpuinfo(name), size=SIZE, cache_nodes=on)
    assert looked(FarCache, system) is None


def test_nodes_of_the_page_cache_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(8 << 20))
    looked_at: list[tuple[int, int]] = []

    def two_nodes(_: SourceFile, some: Any) -> dict[int, int]:
        looked_at.extend(present(some))
        return {0: 3 * some.resident // 4, 1: some.resident // 4}

    monkeypatch.setattr(systems, "cached_on", two_nodes)
    monkeypatch.setattr(systems, "PLACES", 16)
    system = System(str(path))
    try:
        resident = sum(one.resident for one in system.residency)
        assert system.cache_nodes == {0: resident * 3 // 4, 1: resident // 4}
    finally:
        system.close()
    total = sum(stop - start for start, stop in looked_at)
    assert 0 < total <= 16 * systems.PLACE
    assert all(start % PAGE == 0 for start, _ in looked_at)


def test_nodes_of_the_page_cache_of_this_machine(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(bytes(1 << 20))
    system = System(str(path))
    try:
        assert sum(system.cache_nodes.values()) == pytest.approx(
            1 << 20, abs=len(system.machine.nodes)
        )
    finally:
        system.close()


# The store.


def entry(path: Path, nodes: Sequence[int], policy: str = "mirror") -> Entry:
    groups = tuple((node,) for node in nodes)
    return Entry(f"{0:032x}.{0:08x}", identify([str(path)]), groups, (), 0.0, 1.0, policy=policy)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.mark.parametrize(
    ("nodes", "policy", "seen"),
    [
        ([0], "mirror", "the store has replicas on node 0, none on node 1"),
        ([0, 1], "mirror", ""),
        ([0], "bind", ""),  # as it was asked for
        ([], "", ""),
    ],
)
def test_replicas_on_some_nodes(
    nodes: list[int], policy: str, seen: str, model: Path, tmp_path: Path
) -> None:
    with SourceFile(str(model)) as file:
        entries = [entry(model, nodes, policy)] if nodes else []
        system = constructed(tmp_path / "root", TWO, size=SIZE, path=str(model), replicas=entries)
        system.files = [file]
        finding = looked(StaleReplicas, system)
    assert (finding.seen if finding else "") == seen
    if finding:
        assert seconds(finding.price) == pytest.approx(MIRRORED * PASSES / 2)
        assert finding.fix == f"numaload mirror {model}"
        assert finding.undo == f"numaload release {model}"


@pytest.mark.parametrize("policy", ["mirror", "interleave"])
def test_replicas_of_a_file_that_changed(policy: str, model: Path, tmp_path: Path) -> None:
    before = entry(model, [0, 1], policy)
    model.write_bytes(b"other weights")
    with SourceFile(str(model)) as file:
        system = constructed(tmp_path / "root", TWO, size=SIZE, path=str(model), replicas=[before])
        system.files, system.binding = [file], SYSTEM_CALLS
        finding = found(StaleReplicas, system)
        assert found(NoLibnuma, system).price is None  # the same seconds
    assert "on node 0-1, of the file as it was before it changed" in finding.seen
    assert seconds(finding.price) == pytest.approx(MIRRORED * PASSES)
    assert finding.fix == f"numaload release {model}; numaload mirror {model}"


def test_the_store_is_looked_at_and_left_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = tmp_path / "numaload-store"
    monkeypatch.setattr(userdir, "path", lambda: str(where))
    system = System(str(model))
    assert system.replicas == []
    assert not where.exists()
    mine, other = entry(model, [0]), entry(model, [0])
    (tmp_path / "other.gguf").write_bytes(b"")
    other = replace(other, model=identify([str(tmp_path / "other.gguf")]))
    where.mkdir()
    (where / userdir.MARKER).touch()
    monkeypatch.setattr(userdir, "existing", lambda: nullcontext(0))
    monkeypatch.setattr(store, "entry_names", lambda _: ["mine", "other", "damaged"])
    monkeypatch.setattr(
        store, "read", lambda name, _: {"mine": mine, "other": other}.get(name, "damaged")
    )
    system.close()
    system = System(str(model))
    try:
        assert system.replicas == [mine]
    finally:
        system.close()
    assert [path.name for path in where.iterdir()] == [userdir.MARKER]


def test_a_store_that_cannot_be_read_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / userdir.MARKER).touch()
    (tmp_path / "link").symlink_to("there")
    monkeypatch.setattr(userdir, "path", lambda: str(tmp_path / "link"))
    system = System(str(model))
    try:
        with pytest.raises(NumaloadError, match="link"):
            _ = system.replicas
    finally:
        system.close()
