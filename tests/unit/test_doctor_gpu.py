"""The doctor's checks of GPUs, on constructed machines; NVML and torch are stand-ins."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from doctor_systems import GIB, NVME, constructed, looked
from machines import ONE, SNC2, Machine
from numaload.doctor import gpu as subject
from numaload.doctor.check import ESTIMATED, Check, Price, Unknown
from numaload.doctor.gpu import (
    FarCpus,
    FarPeers,
    FarStorage,
    LinkErrors,
    Mps,
    NarrowLink,
    NoDriver,
    NotPersistent,
    SlowLink,
)
from numaload.doctor.system import System
from numaload.machine.devices import Device, FileDevice, gpus
from numaload.machine.topology import topology

TWO = Machine({0: ("0-3", 257_000), 1: ("4-7", 258_000)}, ["10 21", "21 10"], {0: 0, 1: 1})
CARD, PORT = "0000:3b:00.0", "0000:3a:00.0"
# GPUs of one machine on the other socket, and an AMD GPU behind the switch that its card has.
SECOND, AMD = "0000:af:00.0", "0000:03:00.0"
SIZE = 10 * GIB
GEN4, GEN1 = "16.0 GT/s PCIe", "2.5 GT/s PCIe"
NO_ERRORS = "RxErr 0\nBadTLP 0\nBadDLLP 0\nRollover 0\nTimeout 0\nNonFatalErr 0\nTOTAL_ERR_COR 0\n"
# What these checks read on a machine with nothing to mend: a GPU that draws, with its full link.
HEALTHY: dict[str, str] = {"/proc/uptime": "86400.11 340000.00\n"} | {
    f"/sys/bus/pci/devices/{CARD}/{name}": f"{text}\n"
    for name, text in {
        "class": "0x030000",
        "vendor": "0x10de",
        "device": "0x2684",
        "numa_node": "0",
        "local_cpulist": "0-15,32-47",
        "current_link_speed": GEN4,
        "max_link_speed": GEN4,
        "current_link_width": "16",
        "max_link_width": "16",
        "power/runtime_status": "active",
        "aer_dev_correctable": NO_ERRORS,
    }.items()
}


def link(speed: str = GEN4, width: int = 16, most: str = GEN4, lanes: int = 16) -> dict[str, str]:
    """What one end of a link says."""
    return {
        "current_link_speed": speed,
        "max_link_speed": most,
        "current_link_width": str(width),
        "max_link_width": str(lanes),
    }


def put(root: Path, way: str, driver: str, files: dict[str, str]) -> None:
    """Write a device at the end of this way of PCI addresses, and the link to it."""
    folder = root / f"sys/devices/pci0000:00/{way}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    by_address = root / "sys/bus/pci/devices" / folder.name
    by_address.parent.mkdir(parents=True, exist_ok=True)
    by_address.symlink_to(folder)
    drivers = root / "sys/bus/pci/drivers"
    (drivers / driver).mkdir(parents=True, exist_ok=True)
    if driver:
        (folder / "driver").symlink_to(drivers / driver)


def put_card(
    root: Path, files: dict[str, str] | None = None, *, second: bool = False, **other: Any
) -> None:
    """Write an NVIDIA GPU in a slot that can do as much. other: code, node, driver, slot."""
    address, port = (SECOND, "0000:ae:00.0") if second else (CARD, PORT)
    said = {"vendor": "0x10de", "device": "0x2330", "class": other.get("code", "0x030200")}
    said["numa_node"] = str(other.get("node", 0))
    slot = {"class": "0x060400", "vendor": "0x8086"} | link() | other.get("slot", {})
    put(root, port, "", slot)
    driver = other.get("driver", "nvidia")
    put(root, f"{port}/{address}", driver, said | link() | (files or {}))


def put_amd(root: Path, uplink: dict[str, str], states: str) -> None:
    """Write an AMD GPU: only the link above its card's switch is that of the slot."""
    way = "0000:00:01.0/0000:01:00.0/0000:02:00.0"
    put(root, "0000:00:01.0", "", {"vendor": "0x1022"} | link())
    put(root, "0000:00:01.0/0000:01:00.0", "", {"vendor": "0x1002"} | uplink)
    put(root, way, "", {"vendor": "0x1002"} | link())
    said = {"class": "0x030000", "vendor": "0x1002", "device": "0x744c", "numa_node": "0"}
    put(root, f"{way}/{AMD}", "amdgpu", said | link() | {"pp_dpm_pcie": states})


class Nvml:
    """Answers as nvidia-ml-py's ``pynvml``: {"PersistenceMode": 0} to nvmlDeviceGet..."""

    def __init__(self, **said: Any) -> None:
        self.said, self.asked = said, list[str]()

    def nvmlDeviceGetHandleByPciBusId(self, address: str) -> str:  # noqa: N802
        self.asked.append(address)
        return address

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda _handle, *_more: self.said[name.removeprefix("nvmlDeviceGet")]


BUSY = {"PerformanceState": 2, "UtilizationRates": SimpleNamespace(gpu=97)}
IDLE = BUSY | {"UtilizationRates": SimpleNamespace(gpu=0)}  # in a high state, as for a while after


def found(
    root: Path,
    machine: Machine = TWO,
    files: dict[str, str] | None = None,
    *,
    allowed: frozenset[int] | None = None,
    **said: Any,
) -> System:
    """The system of this tree, with the GPUs that were put there. allowed: CPUs, if not all."""
    listed = gpus(str(root / "sys"), str(root / "proc"))
    system = constructed(root, machine, files, **{"gpus": listed, "nvml": None} | said)
    if allowed is not None:
        system.machine = topology(system.sys, system.proc, allowed)
    return system


def price(system: System, check: type[Check]) -> Price:
    finding = looked(check, system)
    assert finding is not None
    assert finding.price is not None
    return finding.price


# NL402: lanes.


def test_narrow_link_says_lanes_and_prices_the_copy(tmp_path: Path) -> None:
    put_card(tmp_path, link(width=4))
    finding = looked(NarrowLink, found(tmp_path, size=SIZE))
    assert finding is not None
    assert finding.seen == f"GPU {CARD}: x4 of x16 lanes"
    assert "reseat" in finding.fix
    assert not finding.undo
    assert finding.price is not None
    lane = 16e9 / 8 * 128 / 130 * 0.8
    assert finding.price.how == ESTIMATED
    assert finding.price.seconds == pytest.approx(SIZE / lane * (1 / 4 - 1 / 16))


@pytest.mark.parametrize(
    ("memory", "part"),
    [(None, 24 * GIB), (SimpleNamespace(total=8 * GIB), 8 * GIB)],
)
def test_no_more_than_fits_the_gpu_is_priced(tmp_path: Path, memory: Any, part: int) -> None:
    put_card(tmp_path, link(width=8))
    nvml = Nvml(MemoryInfo=memory) if memory else None
    lane = 16e9 / 8 * 128 / 130 * 0.8
    cost = price(found(tmp_path, size=400 * GIB, nvml=nvml), NarrowLink)
    assert cost.seconds == pytest.approx(part / lane / 16)


def test_without_a_file_a_narrow_link_has_no_price(tmp_path: Path) -> None:
    put_card(tmp_path, link(width=8))
    finding = looked(NarrowLink, found(tmp_path))
    assert finding is not None
    assert finding.price is None


@pytest.mark.parametrize(
    ("said", "other"),
    [
        (link(), {}),
        (link(speed=GEN1), {}),
        (link(width=8, lanes=8), {}),
        (link(width=8), {"slot": link(lanes=8)}),
        (link(width=8), {"driver": "vfio-pci"}),
    ],
    ids=["full", "idle", "card-of-8", "slot-of-8", "a-vm-has-it"],
)
def test_what_the_slot_or_the_card_cannot_is_no_finding(
    tmp_path: Path, said: dict[str, str], other: dict[str, Any]
) -> None:
    put_card(tmp_path, said, **other)
    assert looked(NarrowLink, found(tmp_path, size=SIZE)) is None


@pytest.mark.parametrize(
    ("said", "slot"),
    [
        (link(width=8), {"vendor": "0x1b36"}),
        (link(width=8), {"max_link_width": "255"}),
        (link(width=63), {}),
        (link(speed="Unknown"), {}),
        (link() | {"current_link_width": "word"}, {}),
    ],
    ids=["port-made-up", "port-hidden", "switched-off", "speed-unknown", "word"],
)
def test_links_that_cannot_be_judged_are_unknown(
    tmp_path: Path, said: dict[str, str], slot: dict[str, str]
) -> None:
    put_card(tmp_path, said, slot=slot)
    with pytest.raises(Unknown):
        looked(NarrowLink, found(tmp_path))


def test_one_gpu_that_is_unknown_hides_no_other(tmp_path: Path) -> None:
    put_card(tmp_path, link(speed="Unknown"))
    put_card(tmp_path, link(width=8), second=True)
    finding = looked(NarrowLink, found(tmp_path))
    assert finding is not None
    assert finding.seen == f"GPU {SECOND}: x8 of x16 lanes"


@pytest.mark.parametrize(
    ("states", "seen"),
    [
        ("0: 2.5GT/s, x1 619Mhz *\n1: 16.0GT/s, x16 619Mhz", ""),
        ("0: 2.5GT/s, x1 619Mhz\n1: 16.0GT/s, x8 619Mhz *", f"GPU {AMD}: x8 of x16 lanes"),
    ],
)
def test_amd_links_are_judged_above_the_cards_switch(
    tmp_path: Path, states: str, seen: str
) -> None:
    put_amd(tmp_path, link(width=8), states)
    finding = looked(NarrowLink, found(tmp_path, size=SIZE))
    assert (finding.seen if finding else "") == seen


# NL401: speed.


@pytest.mark.parametrize("nvml", [None, Nvml(**BUSY | {"PerformanceState": 8}), Nvml(**IDLE)])
def test_idle_gpus_at_gen1_are_no_finding(tmp_path: Path, nvml: Nvml | None) -> None:
    put_card(tmp_path, link(speed=GEN1))
    assert looked(SlowLink, found(tmp_path, size=SIZE, nvml=nvml)) is None


def test_slow_link_of_a_busy_gpu_is_unproven(tmp_path: Path) -> None:
    put_card(tmp_path, link(speed="5.0 GT/s PCIe", width=8))
    system = found(tmp_path, size=SIZE, nvml=Nvml(**BUSY, MemoryInfo=SimpleNamespace(total=SIZE)))
    finding = looked(SlowLink, system)
    assert finding is not None
    assert finding.seen.startswith(f"GPU {CARD}: 5 of 16 GT/s (unproven")
    assert "BIOS" in finding.fix
    # What lanes cost is NL402's: both together are what the whole link costs.
    raw = SIZE / 0.8 * 8 / 1e9
    whole = raw / (5 * 0.8 * 8) - raw / (16 * 128 / 130 * 16)
    lanes = price(system, NarrowLink).seconds
    assert finding.price is not None
    assert finding.price.seconds + lanes == pytest.approx(whole)


def test_slow_link_of_an_amd_gpu_in_its_highest_state(tmp_path: Path) -> None:
    states = "0: 2.5GT/s, x16 619Mhz\n1: 8.0GT/s, x16 619Mhz *"
    put_amd(tmp_path, link(speed="8.0 GT/s PCIe"), states)
    finding = looked(SlowLink, found(tmp_path))
    assert finding is not None
    assert "8 of 16 GT/s" in finding.seen


class Torch(ModuleType):
    """torch with GPUs at these addresses, which do something while they are copied to."""

    uint8 = "uint8"

    def __init__(self, places: list[tuple[int, int]], at_work: Callable[[], object]) -> None:
        super().__init__("torch")
        self.copies, self.at_work = list[str](), at_work
        told = [SimpleNamespace(pci_domain_id=0, pci_bus_id=b, pci_device_id=d) for b, d in places]
        self.cuda = SimpleNamespace(
            is_available=lambda: bool(places),
            device_count=lambda: len(places),
            get_device_properties=lambda index: told[index],
            synchronize=lambda _index: None,
        )

    def empty(self, nbytes: int, **_said: Any) -> int:
        return nbytes

    def empty_like(self, _source: int, device: str) -> Any:
        def copy_(_source: int, **_said: Any) -> None:
            self.copies.append(device)
            self.at_work()

        return SimpleNamespace(copy_=copy_)


@pytest.mark.parametrize(("under_load", "seen"), [(GEN4, ""), (GEN1, "2.5 of 16 GT/s (under")])
def test_a_copy_proves_the_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, under_load: str, seen: str
) -> None:
    put_card(tmp_path, link(speed=GEN1))
    put_card(tmp_path, second=True)
    speed = tmp_path / f"sys/bus/pci/devices/{CARD}/current_link_speed"
    torch = Torch([(0xAF, 0), (0x3B, 0)], lambda: speed.write_text(under_load))
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setattr(SlowLink, "copy_seconds", 0.002)
    system = found(tmp_path, size=SIZE)
    system.deep = True
    finding = looked(SlowLink, system)
    assert set(torch.copies) == {"cuda:1"}
    assert seen in (finding.seen if finding else "")
    assert bool(finding) == bool(seen)


def test_without_a_gpu_in_torch_nothing_is_proven(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_card(tmp_path, link(speed=GEN1))
    monkeypatch.setitem(sys.modules, "torch", Torch([], lambda: None))
    system = found(tmp_path)
    system.deep = True
    assert looked(SlowLink, system) is None


def test_suspended_gpus_are_left_alone(tmp_path: Path) -> None:
    put_card(tmp_path, link(speed=GEN1, width=1))
    folder = tmp_path / f"sys/bus/pci/devices/{CARD}/power"
    folder.mkdir()
    (folder / "runtime_status").write_text("suspended\n")
    system = found(tmp_path, nvml=Nvml(**BUSY, PersistenceMode=0))
    for check in (SlowLink, NarrowLink, NotPersistent):
        assert not check(system).available()
    assert not system.nvml.asked


# NL403: errors.


@pytest.mark.parametrize(
    ("card", "slot", "seen"),
    [
        (NO_ERRORS.replace("BadTLP 0", "BadTLP 36000"), NO_ERRORS, "36000 errors"),
        (NO_ERRORS, "RxErr 18000\nTimeout 18000", "36000 errors"),
        ("BadTLP 400\nTOTAL_ERR_COR 99999", NO_ERRORS, ""),
        ("NonFatalErr 90000", NO_ERRORS, ""),
        ("\n\0BadTLP\nBadTLP many", NO_ERRORS, ""),
    ],
)
def test_errors_of_a_link(tmp_path: Path, card: str, slot: str, seen: str) -> None:
    name = "aer_dev_correctable"
    put_card(tmp_path, {name: card}, slot={name: slot})
    finding = looked(LinkErrors, found(tmp_path, files={"/proc/uptime": "60000.5 1.0"}))
    assert seen in (finding.seen if finding else "")
    assert bool(finding) == bool(seen)
    if finding:
        assert "36 a minute" in finding.seen
        assert finding.price is None


def test_replays_come_from_nvml(tmp_path: Path) -> None:
    put_card(tmp_path)
    uptime = {"/proc/uptime": "600.0 1.0"}
    finding = looked(LinkErrors, found(tmp_path, files=uptime, nvml=Nvml(PcieReplayCounter=500)))
    assert finding is not None
    assert finding.seen == f"GPU {CARD}: 500 errors since the start, 50 a minute"


def test_errors_need_the_time_since_the_start(tmp_path: Path) -> None:
    put_card(tmp_path)
    system = found(tmp_path, nvml=Nvml(PcieReplayCounter=500))
    for text in ("", "soon"):
        (tmp_path / "proc/uptime").write_text(text)
        with pytest.raises(Unknown):
            looked(LinkErrors, system)
    assert not LinkErrors(found(tmp_path)).available()  # nobody counts


# NL404 and NL405: nodes.


def disk(*nodes: int, why: str = "") -> FileDevice:
    return FileDevice("/models/model.gguf", "ext4", "nvme0n1", ("nvme0n1",), nodes, why)


NODE0, NODE1 = frozenset(range(4)), frozenset(range(4, 8))


def test_storage_on_another_socket_than_the_gpu(tmp_path: Path) -> None:
    put_card(tmp_path, node=1)
    finding = looked(FarStorage, found(tmp_path, size=SIZE, absent=SIZE // 2, disks=disk(0)))
    assert finding is not None
    assert finding.seen == f"nvme0n1 on node 0; GPU {CARD} on node 1"
    command, _, _ = finding.fix.partition("  # ")
    assert command == "numaload exec --node 1 /models/model.gguf -- PROGRAM -m {model}"
    assert finding.price is not None
    assert finding.price.seconds == pytest.approx(SIZE / 4 * (1 / 4.5e9 - 1 / 12.7e9))


@pytest.mark.parametrize(
    "said",
    [
        {"disks": disk(1)},
        {"disks": disk(0, 1)},
        {"disks": disk(0), "absent": 0},
        {"disks": disk(0), "environment": {"CUDA_VISIBLE_DEVICES": ""}},
        {"disks": disk(0), "device": Device("memory", "tmpfs", "tmpfs")},
    ],
    ids=["same", "striped", "in-ram", "no-gpu-used", "tmpfs"],
)
def test_storage_that_is_not_far(tmp_path: Path, said: Any) -> None:
    put_card(tmp_path, node=1)
    assert looked(FarStorage, found(tmp_path, **{"size": SIZE} | said)) is None


def test_a_gpu_on_each_socket_or_a_program_beside_it_mends_far_storage(tmp_path: Path) -> None:
    put_card(tmp_path, node=1)
    assert looked(FarStorage, found(tmp_path, size=SIZE, disks=disk(0), allowed=NODE1)) is None
    put_card(tmp_path, second=True, node=0)
    assert looked(FarStorage, found(tmp_path, size=SIZE, disks=disk(0))) is None


def test_nodes_of_one_socket_are_near(tmp_path: Path) -> None:
    put_card(tmp_path, node=1)
    near, far = disk(3), disk(2)
    assert looked(FarStorage, found(tmp_path, SNC2, size=SIZE, disks=near)) is None
    assert looked(FarStorage, found(tmp_path, SNC2, size=SIZE, disks=far)) is not None


@pytest.mark.parametrize(("node", "seen"), [("0", "eth0 on node 0"), ("1", "")])
def test_the_network_of_a_mount(tmp_path: Path, node: str, seen: str) -> None:
    put_card(tmp_path, node=1)
    files = {
        "/sys/class/net/eth0/operstate": "up\n",
        "/sys/class/net/eth0/device/numa_node": f"{node}\n",
        "/sys/class/net/eth1/operstate": "down\n",
        "/sys/class/net/eth1/device/numa_node": "1\n",
        "/sys/class/net/lo/operstate": "unknown\n",
    }
    nfs = Device("network", "server:/models", "nfs4")
    finding = looked(FarStorage, found(tmp_path, files=files, size=SIZE, device=nfs))
    assert seen in (finding.seen if finding else "")
    assert bool(finding) == bool(seen)


UP = {"/sys/class/net/eth0/operstate": "up\n", "/sys/class/net/eth0/device/numa_node": "0\n"}
FUSE = Device("network", "x", "fuse.x")  # nobody knows where it has the file from


@pytest.mark.parametrize(
    "said",
    [
        {"disks": disk(why="the firmware does not say")},
        {"device": Device("network", "server:/models", "nfs4")},
        {"device": FUSE, "disks": disk(why="no block device"), "files": UP},
        {"environment": {"CUDA_VISIBLE_DEVICES": "GPU-0a1b"}},
    ],
    ids=["disk", "interface", "fuse", "uuid"],
)
def test_nodes_that_are_not_said_are_unknown(tmp_path: Path, said: Any) -> None:
    put_card(tmp_path, node=1)
    with pytest.raises(Unknown):
        looked(FarStorage, found(tmp_path, **{"size": SIZE, "device": NVME} | said))


def test_no_cpu_beside_the_gpu(tmp_path: Path) -> None:
    put_card(tmp_path, node=1)
    system = found(tmp_path, size=SIZE, disks=disk(0), allowed=NODE0)
    finding = looked(FarCpus, system)
    assert finding is not None
    assert finding.seen == f"CPUs 0-3 may be used; GPU {CARD} on node 1"
    assert finding.fix == "numactl --cpunodebind=1 --membind=1 PROGRAM"
    assert finding.price is not None
    assert finding.price.seconds == pytest.approx(SIZE * (1 / 4.5e9 - 1 / 12.7e9))
    assert looked(FarStorage, system) is None  # the same seconds


def test_the_process_counts_where_one_is_named(tmp_path: Path) -> None:
    put_card(tmp_path, node=1)
    for cpus, is_far in ((NODE0, True), (NODE1, False)):
        system = found(tmp_path, threads=SimpleNamespace(cpus=cpus))
        system.pid = 1
        assert (looked(FarCpus, system) is not None) == is_far


@pytest.mark.parametrize(
    ("variables", "seen"),
    [
        ({}, SECOND),
        ({"CUDA_VISIBLE_DEVICES": "0"}, ""),
        ({"CUDA_VISIBLE_DEVICES": " 1,7"}, SECOND),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, ""),
    ],
)
def test_only_gpus_that_are_visible_count(
    tmp_path: Path, variables: dict[str, str], seen: str
) -> None:
    put_card(tmp_path)
    put_card(tmp_path, second=True, node=1)
    finding = looked(FarCpus, found(tmp_path, environment=variables, allowed=NODE0))
    assert seen in (finding.seen if finding else "")
    assert bool(finding) == bool(seen)


def test_numbers_of_unlike_gpus_need_the_order_of_the_bus(tmp_path: Path) -> None:
    put_card(tmp_path)
    put_card(tmp_path, {"device": "0x2684"}, second=True, node=1)
    variables = {"CUDA_VISIBLE_DEVICES": "1"}
    with pytest.raises(Unknown):
        looked(FarCpus, found(tmp_path, environment=variables, allowed=NODE0))
    variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    assert looked(FarCpus, found(tmp_path, environment=variables, allowed=NODE0)) is not None


def test_one_node_and_nodes_that_are_unknown_are_no_finding(tmp_path: Path) -> None:
    put_card(tmp_path, node=-1)
    assert not FarCpus(found(tmp_path / "one", ONE)).available()
    system = found(tmp_path, size=SIZE, disks=disk(1), allowed=NODE0)
    assert looked(FarCpus, system) is None
    assert looked(FarStorage, system) is None


# NL406: the ways between GPUs.

PCI_ONLY = {"TopologyCommonAncestor": 50, "NvLinkState": 0}


def put_far(root: Path) -> None:
    """Write a GPU on each socket, and a third beside the second."""
    put_card(root)
    put_card(root, second=True, node=1)
    said = {"vendor": "0x10de", "device": "0x2330", "class": "0x030200", "numa_node": "1"}
    put(root, "0000:b0:00.0", "nvidia", said)


@pytest.mark.parametrize(
    ("before", "undo"),
    [
        ({}, "unset CUDA_DEVICE_ORDER; unset CUDA_VISIBLE_DEVICES"),
        (
            {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            "unset CUDA_DEVICE_ORDER; export CUDA_VISIBLE_DEVICES=0,1,2",
        ),
    ],
)
@pytest.mark.parametrize("said", [PCI_ONLY, {"NvLinkState": 0}, {}])
def test_gpus_on_different_sockets(
    tmp_path: Path, said: dict[str, int], before: dict[str, str], undo: str
) -> None:
    put_far(tmp_path)
    finding = looked(FarPeers, found(tmp_path, size=SIZE, nvml=Nvml(**said), environment=before))
    assert finding is not None
    assert finding.seen == f"socket 0: {CARD}; socket 1: {SECOND}, 0000:b0:00.0"
    assert finding.fix == "export CUDA_DEVICE_ORDER=PCI_BUS_ID CUDA_VISIBLE_DEVICES=1,2"
    assert finding.undo == undo
    assert finding.price is None


@pytest.mark.parametrize(("order", "fix"), [("1,0,2", "1,2,0"), ("0,1,2", ""), ("", ""), ("0", "")])
def test_a_model_that_needs_all_gpus_needs_their_order(
    tmp_path: Path, order: str, fix: str
) -> None:
    put_far(tmp_path)
    told = {"CUDA_VISIBLE_DEVICES": order}
    nvml = Nvml(**PCI_ONLY, MemoryInfo=SimpleNamespace(total=80 * GIB))
    finding = looked(FarPeers, found(tmp_path, size=159 * GIB, nvml=nvml, environment=told))
    assert (finding.fix.rpartition("=")[2] if finding else "") == fix


@pytest.mark.parametrize(
    "said", [PCI_ONLY | {"NvLinkState": 1}, PCI_ONLY | {"TopologyCommonAncestor": 40}]
)
def test_gpus_that_are_joined_are_no_finding(tmp_path: Path, said: dict[str, int]) -> None:
    put_far(tmp_path)
    assert looked(FarPeers, found(tmp_path, size=SIZE, nvml=Nvml(**said))) is None


@pytest.mark.parametrize(("node", "nvml"), [(1, None), (-1, Nvml(**PCI_ONLY))])
def test_links_and_sockets_that_nobody_tells_are_unknown(
    tmp_path: Path, node: int, nvml: Nvml | None
) -> None:
    put_card(tmp_path)
    put_card(tmp_path, second=True, node=node)
    with pytest.raises(Unknown):
        looked(FarPeers, found(tmp_path, size=SIZE, nvml=nvml))


@pytest.mark.parametrize(
    ("hives", "fix"),
    [
        (("1", "1"), ""),
        (("1", "2"), "export HIP_VISIBLE_DEVICES=0"),
        (("", ""), "export HIP_VISIBLE_DEVICES=0"),
    ],
)
def test_amd_gpus_of_one_hive_are_joined(tmp_path: Path, hives: tuple[str, str], fix: str) -> None:
    for node, address in enumerate((CARD, SECOND)):
        said = {"vendor": "0x1002", "device": "0x74a1", "class": "0x120000", "numa_node": str(node)}
        put(tmp_path, address, "amdgpu", said)
        if hives[node]:
            folder = tmp_path / f"sys/bus/pci/devices/{address}/xgmi_hive_info"
            folder.mkdir()
            (folder / "xgmi_hive_id").write_text(hives[node])
    finding = looked(FarPeers, found(tmp_path, size=SIZE))
    assert (finding.fix if finding else "") == fix


# NL407: MPS.

PIPES, THREADS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"
MEM_LIMIT = "CUDA_MPS_PINNED_DEVICE_MEM_LIMIT"


@pytest.mark.parametrize(
    ("told", "folder"),
    [({PIPES: "/run/an mps"}, "'/run/an mps'"), ({THREADS: "100"}, "/tmp/nvidia-mps")],  # noqa: S108
)
def test_mps_without_its_daemon(tmp_path: Path, told: dict[str, str], folder: str) -> None:
    put_card(tmp_path)
    finding = looked(Mps, found(tmp_path, environment=told))
    assert finding is not None
    assert finding.seen.startswith("no control daemon in /")
    control = f"{PIPES}={folder} nvidia-cuda-mps-control"
    assert finding.fix == f"mkdir -p {folder} && CUDA_MPS_LOG_DIRECTORY={folder} {control} -d"
    assert finding.undo == f"echo quit | {control}"


@pytest.mark.parametrize(
    ("told", "limit"),
    [
        ({THREADS: "50"}, THREADS),
        ({THREADS: "99.5"}, THREADS),
        ({THREADS: "100", PIPES: "/tmp/nvidia-mps"}, ""),  # noqa: S108
        ({MEM_LIMIT: "0=9G"}, MEM_LIMIT),
        ({MEM_LIMIT: "0=512mb, 1=1GB", "CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2"}, MEM_LIMIT),
        ({MEM_LIMIT: "0=10G"}, ""),
        ({MEM_LIMIT: "1=1G"}, ""),
        ({PIPES: "/dev/null", THREADS: "50"}, ""),
        ({PIPES: ""}, ""),
    ],
)
def test_limits_of_mps(tmp_path: Path, told: dict[str, str], limit: str) -> None:
    put_card(tmp_path)
    files = {"/tmp/nvidia-mps/control": ""}  # noqa: S108
    finding = looked(Mps, found(tmp_path, files=files, size=SIZE, environment=told))
    assert (finding.seen if finding else "") == (f"{limit}={told[limit]}" if limit else "")
    if finding:
        assert finding.fix == f"unset {limit}"
        assert finding.undo.startswith(f"export {limit}=")
        assert finding.price is None


@pytest.mark.parametrize(
    "told", [{THREADS: "half"}, {MEM_LIMIT: "0=9"}, {MEM_LIMIT: "0=9G,1"}, {PIPES: "mps"}]
)
def test_words_for_mps_are_unknown(tmp_path: Path, told: dict[str, str]) -> None:
    put_card(tmp_path)
    files = {"/tmp/nvidia-mps/control": ""}  # noqa: S108
    with pytest.raises(Unknown):
        looked(Mps, found(tmp_path, files=files, size=SIZE, environment=told))


def test_mps_is_looked_for_where_the_process_sees_it(tmp_path: Path) -> None:
    put_card(tmp_path)
    system = found(tmp_path, environment={PIPES: "/mps"})
    system.pid = 7
    with pytest.raises(Unknown):  # its root is hidden
        looked(Mps, system)
    (tmp_path / "proc/7/root/mps").mkdir(parents=True)
    assert looked(Mps, system) is not None
    (tmp_path / "proc/7/root/mps/control").touch()
    assert looked(Mps, system) is None


# NL408 and NL409: the driver.


@pytest.mark.parametrize(
    ("driver", "vendor", "code", "module"),
    [
        ("", "0x10de", "0x030200", "nvidia"),
        ("", "0x1002", "0x120000", "amdgpu"),
        ("nvidia", "0x10de", "0x030200", ""),
        ("", "0x10de", "0x030000", ""),
        ("", "0x1a03", "0x030200", ""),
        ("vfio-pci", "0x10de", "0x030200", ""),
    ],
    ids=["nvidia", "amd", "bound", "draws", "aspeed", "a-vm-has-it"],
)
def test_a_gpu_without_a_driver(
    tmp_path: Path, driver: str, vendor: str, code: str, module: str
) -> None:
    put_card(tmp_path, {"vendor": vendor}, driver=driver, code=code)
    finding = looked(NoDriver, found(tmp_path))
    assert (finding.fix if finding else "") == (f"modprobe {module}" if module else "")
    if finding:
        assert finding.root
        assert finding.undo == f"modprobe -r {module}"


INFORMATION = f"/proc/driver/nvidia/gpus/{CARD}/information"
ASLEEP = "Model: \t\t NVIDIA L40S\nGPU UUID: \t GPU-????????-????-????-????-????????????\n"


def test_a_gpu_that_the_driver_let_go(tmp_path: Path) -> None:
    put_card(tmp_path)
    nvml = Nvml(PersistenceMode=1)
    finding = looked(NotPersistent, found(tmp_path, files={INFORMATION: ASLEEP}, size=1, nvml=nvml))
    assert finding is not None
    assert finding.seen == f"GPU {CARD}: the driver has not initialised it"
    assert finding.fix == f"nvidia-smi -i {CARD} -pm 1"
    assert finding.undo == f"nvidia-smi -i {CARD} -pm 0"
    assert finding.price == Price(2.0)
    assert not nvml.asked  # it would have been initialised by that


@pytest.mark.parametrize(
    ("mode", "code", "seen"),
    [(0, "0x030200", "persistence mode is off"), (1, "0x030200", ""), (0, "0x030000", "")],
)
def test_persistence_mode(tmp_path: Path, mode: int, code: str, seen: str) -> None:
    put_card(tmp_path, code=code)
    finding = looked(NotPersistent, found(tmp_path, nvml=Nvml(PersistenceMode=mode)))
    assert seen in (finding.seen if finding else "")
    assert bool(finding) == bool(seen)


def test_gpus_of_other_containers_are_left_out(tmp_path: Path) -> None:
    put_card(tmp_path, link(width=8))
    (tmp_path / f"proc/driver/nvidia/gpus/{SECOND}").mkdir(parents=True)
    assert not NarrowLink(found(tmp_path)).available()


# The whole subject.


def test_a_healthy_machine_has_no_findings(tmp_path: Path) -> None:
    put_card(tmp_path, second=True)
    nvml = Nvml(
        PersistenceMode=1,
        PcieReplayCounter=3,
        **BUSY,
        MemoryInfo=SimpleNamespace(total=80 * GIB),
    )
    constructed(tmp_path, TWO, HEALTHY)
    system = found(tmp_path, size=SIZE, nvml=nvml)
    assert [gpu.address for gpu in system.gpus] == [CARD, SECOND]
    checks = [check for check in subject.CHECKS if check(system).available()]
    assert checks == list(subject.CHECKS)
    assert [check.id for check in checks if looked(check, system)] == []


@pytest.mark.parametrize("text", ["", "word\n", "\0\n\n??? 1 *"])
def test_odd_files_are_unknown_at_most(tmp_path: Path, text: str) -> None:
    put_card(tmp_path, dict.fromkeys([*link(), "pp_dpm_pcie", "aer_dev_correctable"], text))
    files = {INFORMATION: text, "/proc/uptime": text}
    system = found(tmp_path, files=files, size=SIZE, nvml=Nvml())
    for check in subject.CHECKS:
        with suppress(Unknown):
            assert looked(check, system) is None or check is NotPersistent


def test_an_empty_tree_has_nothing_to_look_at(tmp_path: Path) -> None:
    system = System(root=str(tmp_path))
    for check in subject.CHECKS:
        assert not check(system).available()
    assert system.nvml is None


def test_each_check_is_in_the_page_by_its_title() -> None:
    page = (Path(__file__).parents[2] / "docs/findings.md").read_text(encoding="utf-8")
    for check in subject.CHECKS:
        assert f"### {check.id} {check.title}\n" in page
        assert len(check.title) < 60
        assert check.source


@pytest.fixture
def pynvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    module = ModuleType("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def test_nvml_is_started_once_and_ended(pynvml: Any) -> None:
    calls: list[str] = []
    pynvml.nvmlInit = lambda: calls.append("init")
    pynvml.nvmlShutdown = lambda: calls.append("shutdown")
    system = System()
    assert system.nvml is system.nvml is pynvml
    system.close()
    assert calls == ["init", "shutdown"]
    System().close()  # which nobody asked
    assert calls == ["init", "shutdown"]


def test_nvml_without_its_driver_is_none(pynvml: Any) -> None:
    def fail() -> None:
        raise RuntimeError("Driver Not Loaded")

    pynvml.nvmlInit = fail
    system = System()
    assert system.nvml is None
    system.close()
