"""What the doctor says about memory: room, swap, the store's tmpfs, huge pages."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doctor_systems import FAST, GIB, constructed, looked
from machines import CXL, ONE, SNC2, XEON, Machine
from numaload.doctor import memory
from numaload.doctor.check import (
    ESTIMATED,
    LOAD,
    MEASURED,
    ONCE,
    PASS,
    Check,
    Finding,
    Price,
    Unknown,
)
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import System
from numaload.errors import NumaloadError
from numaload.linux.syscalls import PAGE
from numaload.machine import logout
from numaload.machine.devices import Device, Gpu
from numaload.machine.userdir import SHARED_MEMORY
from numaload.replicas.mirror import mirror

THP = "/sys/kernel/mm/transparent_hugepage"
POOL = "/sys/kernel/mm/hugepages/hugepages-2048kB"
DEMOTION = "/sys/kernel/mm/numa/demotion_enabled"
SWAPS = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
NO_STORE = f"{SHARED_MEMORY}/numaload-test-never-made"
DISK = FAST.disk or 0.0
# What a machine says on which there is nothing to mend: the defaults of a distribution.
HEALTHY: dict[str, str] = {
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/hugepages-2048kB/enabled": "always [inherit] madvise never\n",
    f"{THP}/shmem_enabled": "always within_size advise [never] deny force\n",
    f"{POOL}/nr_hugepages": "0\n",
    f"{POOL}/free_hugepages": "0\n",
    f"{POOL}/resv_hugepages": "0\n",
    DEMOTION: "false\n",
    "/proc/swaps": SWAPS + "/swap.img file 8388604 0 -2\n",
    "/proc/vmstat": "pswpin 0\npswpout 0\n",
    "/proc/sys/vm/overcommit_memory": "0\n",
    "/proc/self/cgroup": "0::/user.slice\n",
    "/proc/self/mountinfo": "30 25 0:27 / /dev/shm rw - tmpfs tmpfs rw\n",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No store, and no waiting between two looks."""
    monkeypatch.setenv("NUMALOAD_STORE", NO_STORE)
    monkeypatch.setattr(time, "sleep", lambda _: None)


def on(
    tmp_path: Path,
    files: dict[str, str] | None = None,
    machine: Machine = ONE,
    size: int = GIB,
    **said: Any,
) -> System:
    """Return a system with these files over the healthy ones."""
    return constructed(tmp_path, machine, HEALTHY | (files or {}), size=size, **said)


def found(check: type[Check], system: System) -> Finding:
    finding = looked(check, system)
    assert finding is not None
    return finding


def meminfo(available: int, **more: int) -> dict[str, str]:
    rows = {"MemTotal": 16 * GIB, "MemFree": available, "MemAvailable": available} | more
    return {"/proc/meminfo": "".join(f"{k}: {v >> 10} kB\n" for k, v in rows.items())}


def entry(*groups: tuple[int, ...], nbytes: int = GIB, **more: Any) -> Any:
    """Return what is asked of an entry of the store."""
    nodes = {node: nbytes // len(group) for group in groups for node in group}
    facts = {"groups": groups, "on_nodes": nodes, "policy": "mirror", "holder": None}
    return SimpleNamespace(**(facts | {"seconds": 7.0, "paths": lambda _: []} | more))


Stored = Callable[..., None]


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Stored:
    return lambda *entries: monkeypatch.setattr(memory, "stored", lambda _: list(entries))


# Nothing to mend, and nothing to read.


@pytest.mark.parametrize("machine", [ONE, XEON, SNC2, CXL])
@pytest.mark.parametrize("size", [0, 4 * GIB])
def test_a_healthy_machine_has_no_finding(tmp_path: Path, size: int, machine: Machine) -> None:
    system = on(tmp_path, machine=machine, size=size)
    assert [check for check in memory.CHECKS if looked(check, system)] == []


@pytest.mark.parametrize("content", [None, "", "what\n", "[]\n"])
@pytest.mark.parametrize("pid", [None, 77])
def test_what_cannot_be_read_is_unknown(
    tmp_path: Path, content: str | None, pid: int | None
) -> None:
    system = on(tmp_path, pid=pid)
    for name in [*HEALTHY, "/proc/meminfo"]:
        (tmp_path / name.lstrip("/")).unlink()
        if content is not None:
            (tmp_path / name.lstrip("/")).write_text(content)
    for check in memory.CHECKS:
        with suppress(Unknown):
            assert looked(check, system) is None


def test_ids_and_titles() -> None:
    ids = [check.id for check in memory.CHECKS]
    assert len(set(ids)) == len(ids)
    assert all(name.startswith("NL2") for name in ids)
    assert all(len(check.title) < 60 for check in memory.CHECKS)


def test_docs_have_every_title() -> None:
    text = (Path(__file__).parents[2] / "docs/findings.md").read_text()
    headings = [f"\n### {check.id} {check.title}\n" for check in memory.CHECKS]
    assert [one for one in headings if one not in text] == []


# Room for the model.


def test_a_model_larger_than_ram_is_read_again_by_each_pass(tmp_path: Path) -> None:
    finding = found(memory.LargerThanRam, on(tmp_path, meminfo(10 * GIB), size=13 * GIB))
    assert "the model has 13.0 GiB, this machine (MemAvailable) has room for 10.0" in finding.seen
    assert finding.price == Price(3 * GIB / DISK, MEASURED, PASS)
    assert "numaload plan /models/model.gguf" in finding.fix


def test_what_is_locked_of_the_model_has_room(tmp_path: Path) -> None:
    files = meminfo(10 * GIB, Mlocked=2 * GIB)
    finding = found(memory.LargerThanRam, on(tmp_path, files, size=13 * GIB, absent=10 * GIB))
    assert finding.price == Price(GIB / DISK, MEASURED, PASS)


def test_with_gpus_the_price_is_an_estimate(tmp_path: Path) -> None:
    card = Gpu("0000:01:00.0", "NVIDIA", "10de:2330", "nvidia", 0, frozenset())
    system = on(tmp_path, meminfo(10 * GIB), size=13 * GIB, gpus=[card])
    price = found(memory.LargerThanRam, system).price
    assert price
    assert price.how == ESTIMATED


@pytest.mark.parametrize(
    "said",
    [
        {"absent": 0},  # it is in RAM
        {"device": Device("memory", "tmpfs", "tmpfs")},  # as is a file in shared memory
        {"pid": 77},  # the process has it
        {"size": 10 * GIB},
    ],
)
def test_what_is_in_ram_or_fits_is_not_larger(tmp_path: Path, said: dict[str, Any]) -> None:
    files = meminfo(10 * GIB) | {"/proc/77/status": f"RssAnon: {13 << 20} kB\n"}
    assert looked(memory.LargerThanRam, on(tmp_path, files, **({"size": 13 * GIB} | said))) is None


@pytest.mark.parametrize("check", [memory.LargerThanRam, memory.NoRoomForCopy])
@pytest.mark.parametrize("size", [13, 9])
def test_a_replica_needs_no_page_cache(
    tmp_path: Path, stored: Stored, check: type[Check], size: int
) -> None:
    stored(entry((0,)))
    assert looked(check, on(tmp_path, meminfo(10 * GIB), size=size * GIB)) is None


def test_without_a_measured_disk_there_is_no_price(tmp_path: Path) -> None:
    system = on(tmp_path, meminfo(10 * GIB), size=13 * GIB, speeds=Speeds())
    assert found(memory.LargerThanRam, system).price is None


@pytest.mark.parametrize(
    ("absent", "lost"),
    [(8, 0), (7, 0), (6, 0), (5, 1), (1, 5)],  # what is absent, a load reads all the same
)
def test_a_copy_pushes_out_what_was_read(tmp_path: Path, absent: int, lost: int) -> None:
    system = on(tmp_path, meminfo(10 * GIB), size=8 * GIB, absent=absent * GIB)
    finding = found(memory.NoRoomForCopy, system)
    assert "8.0 GiB, this machine (MemAvailable) has room for 10.0" in finding.seen
    assert finding.price == (Price(lost * GIB / DISK, ESTIMATED, LOAD) if lost else None)
    assert "evict" not in finding.fix


@pytest.mark.parametrize("size", [6, 11])
def test_one_and_a_half_times_the_model_is_enough(tmp_path: Path, size: int) -> None:
    assert looked(memory.NoRoomForCopy, on(tmp_path, meminfo(10 * GIB), size=size * GIB)) is None


@pytest.mark.parametrize(("private", "is_found"), [(1, False), (5, True)])
def test_a_process_that_maps_the_file_makes_no_copy(
    tmp_path: Path, private: int, is_found: bool
) -> None:
    files = meminfo(5 * GIB) | {"/proc/77/status": f"RssAnon: {private << 20} kB\n"}
    system = on(tmp_path, files, size=(5 + private) * GIB - GIB, pid=77)
    assert bool(looked(memory.NoRoomForCopy, system)) is is_found


def group(tmp_path: Path, path: str, limit: int, process: str = "self") -> dict[str, str]:
    base = f"/sys/fs/cgroup{path}".rstrip("/")
    return {
        f"/proc/{process}/cgroup": f"0::{path}\n",
        f"{base}/memory.max": f"{limit}\n",
        f"{base}/memory.current": f"{GIB}\n",
        f"{base}/memory.stat": f"inactive_file {GIB}\nactive_file 0\n",
    }


def test_a_limit_smaller_than_the_model(tmp_path: Path) -> None:
    files = meminfo(12 * GIB) | group(tmp_path, "/job.slice", 4 * GIB)
    finding = found(memory.SmallGroup, on(tmp_path, files, size=7 * GIB))
    path = f"{tmp_path}/sys/fs/cgroup/job.slice/memory.max"
    assert "(memory.max) has room for 4.0 GiB, the machine for 12.0 GiB" in finding.seen
    assert finding.price == Price(3 * GIB / DISK, MEASURED, PASS)
    assert finding.fix == f"echo {7 * GIB} > {path}"
    assert finding.undo == f"echo {4 * GIB} > {path}"


@pytest.mark.parametrize(
    ("swap", "is_raised"),
    [(0, True), (2, True), (3, False), (1 << 32, False)],  # GiB beside 4 of memory
)
def test_a_limit_of_memory_and_swap_is_raised_first(
    tmp_path: Path, swap: int, is_raised: bool
) -> None:
    folder = "/sys/fs/cgroup/memory/job"
    limit, both = f"{folder}/memory.limit_in_bytes", f"{folder}/memory.memsw.limit_in_bytes"
    files = meminfo(12 * GIB) | {
        "/proc/self/cgroup": "4:memory:/job\n",
        limit: f"{4 * GIB}\n",
        both: f"{(4 + swap) * GIB}\n",
        f"{folder}/memory.usage_in_bytes": "0\n",
    }
    finding = found(memory.SmallGroup, on(tmp_path, files, size=7 * GIB))
    raised, lowered = ([f"echo {n * GIB} > {tmp_path}{limit}"] for n in (7, 4))
    if is_raised:
        raised.insert(0, f"echo {(7 + swap) * GIB} > {tmp_path}{both}")
        lowered.append(f"echo {(4 + swap) * GIB} > {tmp_path}{both}")
    assert (finding.fix, finding.undo) == (" && ".join(raised), " && ".join(lowered))


def test_a_container_s_limit_is_set_from_outside(tmp_path: Path) -> None:
    files = meminfo(12 * GIB) | group(tmp_path, "/", 4 * GIB)
    finding = found(memory.SmallGroup, on(tmp_path, files, size=7 * GIB))
    assert "docker run --memory 8g" in finding.fix
    assert finding.undo == ""


def test_it_is_the_group_of_the_process_that_counts(tmp_path: Path) -> None:
    files = meminfo(12 * GIB) | group(tmp_path, "/job.slice", 4 * GIB, "77")
    files |= {"/proc/77/status": "RssAnon: 0 kB\n"}
    assert looked(memory.SmallGroup, on(tmp_path, files, size=7 * GIB)) is None
    assert looked(memory.SmallGroup, on(tmp_path, files, size=7 * GIB, pid=77))


@pytest.mark.parametrize(("size", "limit"), [(3, 4), (13, 4), (3, 2)])
def test_one_check_alone_claims_what_lacks(tmp_path: Path, size: int, limit: int) -> None:
    files = meminfo(12 * GIB) | group(tmp_path, "/job.slice", limit * GIB)
    checks = (memory.LargerThanRam, memory.NoRoomForCopy, memory.SmallGroup)
    seen = [looked(check, on(tmp_path, files, size=size * GIB)) for check in checks]
    assert len([one for one in seen if one]) == 1


# Replicas.


def test_replicas_that_do_not_fit_on_every_node(tmp_path: Path) -> None:
    finding = found(memory.MirrorsDoNotFit, on(tmp_path, machine=XEON, size=200 * GIB))
    assert "a replica takes 200.0 GiB, node 0 has room for 187.2 GiB, node 1" in finding.seen
    assert finding.price is None
    assert "numaload mirror /models/model.gguf --policy stripe  # " in finding.fix
    assert "numaload plan /models/model.gguf" in finding.fix
    assert finding.undo == "numaload release /models/model.gguf"


def test_with_several_nodes_a_socket_one_for_each_socket(tmp_path: Path) -> None:
    assert (
        "--per socket"
        in found(memory.MirrorsDoNotFit, on(tmp_path, machine=SNC2, size=300 * GIB)).fix
    )


def test_all_replicas_together_count_against_the_limit(tmp_path: Path) -> None:
    files = group(tmp_path, "/job.slice", 100 * GIB)
    finding = found(memory.MirrorsDoNotFit, on(tmp_path, files, XEON, 60 * GIB))
    assert "has room for 100.0 GiB, all need 120.0 GiB" in finding.seen


@pytest.mark.parametrize(
    ("entries", "is_found"),
    [
        ([((0,),)], True),
        ([((0,), (1,))], False),
        ([((0, 1),)], False),  # stripes: what this check advises
    ],
)
def test_replicas_that_are_there_need_no_room(
    tmp_path: Path, stored: Stored, entries: list[tuple[tuple[int, ...], ...]], is_found: bool
) -> None:
    stored(*(entry(*groups, nbytes=200 * GIB) for groups in entries))
    finding = looked(memory.MirrorsDoNotFit, on(tmp_path, machine=XEON, size=200 * GIB))
    assert bool(finding) is is_found
    if finding:
        assert "node 0" not in finding.seen


def test_a_hidden_node_is_not_full(tmp_path: Path) -> None:
    system = on(tmp_path, machine=XEON, size=200 * GIB)
    (tmp_path / "sys/devices/system/node/node1/meminfo").unlink()
    with pytest.raises(Unknown, match="node 1"):
        looked(memory.MirrorsDoNotFit, system)


def test_the_store_is_read_by_file(tmp_path: Path, model: str, store: Path) -> None:
    before = System(model)
    assert memory.stored(before) == []
    with mirror(model, shared=True):
        pass
    names = sorted(os.listdir(store))
    assert [one.policy for one in memory.stored(System(model))] == ["mirror"]
    assert len(memory.stored(System())) == 1
    assert memory.stored(System(str(tmp_path / "other.gguf"))) == []
    assert sorted(os.listdir(store)) == names


SHM = "30 25 0:99 / {} rw - tmpfs tmpfs rw,size={}k\n"


def tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> dict[str, str]:
    """Have the store on a tmpfs of so many bytes."""
    status = SimpleNamespace(f_blocks=size >> 12, f_bfree=size >> 12, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    place = tmp_path / "store"
    place.mkdir()
    monkeypatch.setenv("NUMALOAD_STORE", str(place))
    return meminfo(12 * GIB) | {"/proc/self/mountinfo": SHM.format(place, size >> 10)}


def test_a_small_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmpfs(tmp_path, monkeypatch, 2 * GIB)
    finding = found(memory.SmallTmpfs, on(tmp_path, files, size=3 * GIB))
    where = tmp_path / "store"
    assert finding.seen.startswith(f"a replica has 3.0 GiB; the size of {where} is {2 * GIB} bytes")
    assert f"mount -o remount,size=3G {where}" in finding.fix
    assert "numaload mirror --hold" in finding.fix
    assert finding.undo == f"mount -o remount,size={2 << 20}k {where}"


def test_a_container_s_tmpfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tmpfs(tmp_path, monkeypatch, 64 << 20)
    finding = found(memory.SmallTmpfs, on(tmp_path, files, size=GIB))
    assert "start it with --shm-size=1g" in finding.fix
    assert finding.undo == ""


@pytest.mark.parametrize(("tmpfs_size", "size"), [(4, 3), (0, 3), (2, 13)])
def test_a_tmpfs_that_is_large_or_has_no_limit_or_ram_is_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tmpfs_size: int, size: int
) -> None:
    files = tmpfs(tmp_path, monkeypatch, tmpfs_size * GIB)
    assert looked(memory.SmallTmpfs, on(tmp_path, files, size=size * GIB)) is None


def test_a_tmpfs_that_shows_no_size_has_half_of_ram(tmp_path: Path) -> None:
    assert looked(memory.SmallTmpfs, on(tmp_path, meminfo(12 * GIB), size=8 * GIB)) is None
    assert looked(memory.SmallTmpfs, on(tmp_path, meminfo(12 * GIB), size=9 * GIB))


def test_without_a_table_of_mounts(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="mounts"):
        looked(memory.SmallTmpfs, on(tmp_path, {"/proc/self/mountinfo": ""}))


@pytest.fixture
def logind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Have logind empty the store of an ordinary user; return what says that."""
    (tmp_path / "run/systemd/system").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/loginctl"
    program.write_text("#!/bin/sh\necho RemoveIPC=yes\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(logout, "_current", lambda: logout.User(1000, "ann"))
    return program


@pytest.mark.usefixtures("logind")
def test_replicas_that_a_logout_removes(tmp_path: Path, stored: Stored) -> None:
    stored(entry((0,)), entry((1,)))
    finding = found(memory.EmptiedAtLogout, on(tmp_path))
    assert finding.seen.startswith(f"{NO_STORE}/")
    assert "is emptied when your last session ends" in finding.seen
    assert finding.price == Price(14.0, ESTIMATED, LOAD)
    assert (finding.fix, finding.undo) == ("loginctl enable-linger", "loginctl disable-linger")


def test_replicas_that_a_logout_leaves(tmp_path: Path, stored: Stored, logind: Path) -> None:
    stored(entry((0,), holder=object()))
    assert looked(memory.EmptiedAtLogout, on(tmp_path)) is None
    stored(entry((0,)))
    logind.write_text("#!/bin/sh\necho RemoveIPC=no\n")
    assert looked(memory.EmptiedAtLogout, on(tmp_path)) is None


# Swap.

IN_USE = SWAPS + f"/dev/sda\\0402 partition 8388604 {2 << 20} 5\n/swap.img file 8388604 1024 -2\n"


def swapping(files: dict[str, str], **status: int) -> dict[str, str]:
    rows = "".join(f"{name}: {value >> 10} kB\n" for name, value in status.items())
    return {"/proc/swaps": IN_USE, "/proc/77/status": rows or "Pid: 77\n"} | files


def test_a_process_that_was_swapped_out(tmp_path: Path) -> None:
    files = swapping(meminfo(8 * GIB), VmSwap=GIB)
    finding = found(memory.SwapInUse, on(tmp_path, files, pid=77))
    assert finding.seen == "1.0 GiB of process 77 are in swap; disks hold 2.0 GiB of swap"
    assert finding.price == Price(GIB / DISK, ESTIMATED, ONCE)
    assert finding.fix == "swapoff '/dev/sda 2' /swap.img"
    assert finding.undo == "swapon -p 5 '/dev/sda 2' && swapon /swap.img"


def test_what_does_not_fit_cannot_come_back(tmp_path: Path) -> None:
    finding = found(memory.SwapInUse, on(tmp_path, swapping(meminfo(GIB), VmSwap=GIB), pid=77))
    assert finding.fix.startswith("end what else")
    assert finding.price == Price(GIB / DISK, ESTIMATED, PASS)


def test_swap_goes_on_where_a_group_has_no_room(tmp_path: Path) -> None:
    files = swapping(meminfo(8 * GIB), VmSwap=GIB, RssAnon=GIB)
    files |= group(tmp_path, "/job.slice", GIB, "77")
    price = found(memory.SwapInUse, on(tmp_path, files, pid=77)).price
    assert price == Price(GIB / DISK, ESTIMATED, PASS)


ZRAM = "/dev/zram0 partition 8388604 2000000 100\n"


@pytest.mark.parametrize(
    ("swaps", "zswapped", "kib"),
    [
        (f"{ZRAM}/dev/sda2 partition 8388604 97152 -2\n", 0, 97152),
        ("/dev/sda2 partition 8388604 2097152 -2\n", GIB, GIB >> 10),
        (ZRAM, 0, 0),
        (f"{ZRAM}/dev/sda2 partition 8388604 64 -2\n", 0, 0),
        ("/dev/sda2 partition 8388604 2097152 -2\n", 2 * GIB, 0),
        ("/dev/sda2 partition 8388604 2097152 -2\n", 3 * GIB, 0),
    ],
)
def test_swap_in_ram_is_not_charged_to_a_disk(
    tmp_path: Path, swaps: str, zswapped: int, kib: int
) -> None:
    files = meminfo(8 * GIB, Zswapped=zswapped) | {"/proc/swaps": SWAPS + swaps}
    system = on(tmp_path, swapping(files, VmSwap=2 * GIB), pid=77)
    finding = looked(memory.SwapInUse, system)
    assert bool(finding) == bool(kib)
    if finding:
        assert finding.seen.startswith("2.0 GiB of process 77 are in swap; disks hold ")
        assert finding.price == Price((kib << 10) / DISK, ESTIMATED, ONCE)


def test_pages_that_come_back_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = on(tmp_path, swapping(meminfo(8 * GIB)))
    later = f"pswpin {(3 << 20) // PAGE}\n"
    monkeypatch.setattr(time, "sleep", lambda _: (tmp_path / "proc/vmstat").write_text(later))
    finding = found(memory.SwapInUse, system)
    assert "3.0 MiB came back from swap in 0.1 s" in finding.seen
    assert finding.price == Price(GIB / DISK, ESTIMATED, PASS)
    # The kernel counts what zram has, too.
    both = on(tmp_path, swapping(meminfo(8 * GIB) | {"/proc/swaps": IN_USE + ZRAM}))
    assert looked(memory.SwapInUse, both) is None


def test_replicas_that_were_swapped_out(
    tmp_path: Path, stored: Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = tmp_path / "replica"
    replica.write_bytes(b"x")
    stored(entry((0,), paths=lambda _: [str(replica)]))
    out = SimpleNamespace(known=True, size=GIB, resident=GIB // 4)
    monkeypatch.setattr(memory, "residency", lambda _: out)
    finding = found(memory.SwapInUse, on(tmp_path, swapping(meminfo(8 * GIB))))
    assert finding.seen.startswith("0.8 GiB of replicas in the store are in swap")


@pytest.mark.parametrize(
    "files",
    [
        swapping({}),  # what is idle
        swapping({}, VmSwap=32 << 20),
        swapping({"/proc/swaps": SWAPS + "/dev/zram0 partition 8388604 4194304 100\n"}, VmSwap=GIB),
    ],
)
def test_swap_that_costs_nothing(tmp_path: Path, files: dict[str, str]) -> None:
    assert looked(memory.SwapInUse, on(tmp_path, files, pid=77)) is None


@pytest.mark.parametrize("hidden", ["/proc/swaps", "/proc/vmstat"])
def test_swap_that_is_hidden(tmp_path: Path, hidden: str) -> None:
    with pytest.raises(Unknown, match=hidden):
        looked(memory.SwapInUse, on(tmp_path, swapping({hidden: ""})))


# Settings of the kernel.


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("enabled", {f"{THP}/enabled": "always madvise [never]\n"}),
        (
            "hugepages-2048kB/enabled",
            {f"{THP}/hugepages-2048kB/enabled": "always inherit madvise [never]\n"},
        ),
    ],
)
def test_huge_pages_that_are_off(tmp_path: Path, name: str, files: dict[str, str]) -> None:
    finding = found(memory.NoHugePages, on(tmp_path, files, size=29 * GIB // 10))
    assert finding.seen == f"{THP}/{name} is set to never"
    assert finding.price
    assert finding.price.seconds == pytest.approx(GIB / 1e9 * (1 - 2.9 / 10.7), rel=1e-6)
    assert finding.price.how == ESTIMATED
    assert finding.fix == f"echo madvise > {THP}/{name}"
    assert finding.undo == f"echo never > {THP}/{name}"
    assert finding.root


def test_huge_pages_of_their_size_decide(tmp_path: Path) -> None:
    files = {
        f"{THP}/enabled": "always madvise [never]\n",
        f"{THP}/hugepages-2048kB/enabled": "always inherit [madvise] never\n",
    }
    assert looked(memory.NoHugePages, on(tmp_path, files)) is None


DENIED = {f"{THP}/shmem_enabled": "always within_size advise never [deny] force\n"}


def test_huge_pages_that_are_denied_to_replicas(tmp_path: Path) -> None:
    finding = found(memory.NoSharedHugePages, on(tmp_path, DENIED, XEON))
    assert finding.seen == f"{THP}/shmem_enabled is set to deny"
    assert finding.fix == f"echo never > {THP}/shmem_enabled"
    assert finding.undo == f"echo deny > {THP}/shmem_enabled"


def test_where_no_replicas_are_made_nothing_is_denied(tmp_path: Path, stored: Stored) -> None:
    assert looked(memory.NoSharedHugePages, on(tmp_path, DENIED)) is None
    stored(entry((0,)))
    assert looked(memory.NoSharedHugePages, on(tmp_path, DENIED))


def pages(count: int, free: int, promised: int = 0) -> dict[str, str]:
    named = {"nr": count, "free": free, "resv": promised}
    return {f"{POOL}/{name}_hugepages": f"{value}\n" for name, value in named.items()}


def test_huge_pages_that_nobody_uses(tmp_path: Path) -> None:
    files = meminfo(10 * GIB) | pages(1200, 1100, 76)
    system = on(tmp_path, files, size=13 * GIB)
    finding = found(memory.IdleHugePages, system)
    assert finding.seen == "2.0 GiB of 16.0 GiB are set aside as huge pages, and unused"
    assert finding.price == Price(2 * GIB / DISK, MEASURED, PASS)
    assert finding.fix == f"echo 176 > {POOL}/nr_hugepages"
    assert finding.undo == f"echo 1200 > {POOL}/nr_hugepages"
    # What lacks besides is the other check's.
    rest = found(memory.LargerThanRam, system)
    assert rest.price == Price(GIB / DISK, MEASURED, PASS)


@pytest.mark.parametrize(
    ("size", "absent", "is_found", "lost"),
    [(0, 0, True, 0), (5, 5, False, 0), (8, 8, True, 0), (8, 5, True, 1), (8, 1, True, 2)],
)
def test_huge_pages_matter_where_the_model_lacks_room(
    tmp_path: Path, size: int, absent: int, is_found: bool, lost: int
) -> None:
    files = meminfo(10 * GIB) | pages(1024, 1024)
    system = on(tmp_path, files, size=size * GIB, absent=absent * GIB)
    finding = looked(memory.IdleHugePages, system)
    assert bool(finding) is is_found
    if finding:
        assert finding.price == (Price(lost * GIB / DISK, ESTIMATED, LOAD) if lost else None)


@pytest.mark.parametrize("pool", [pages(1200, 200), pages(1200, 1200, 1200), pages(700, 700)])
def test_huge_pages_in_use_or_promised_or_few(tmp_path: Path, pool: dict[str, str]) -> None:
    assert looked(memory.IdleHugePages, on(tmp_path, meminfo(10 * GIB) | pool, size=0)) is None


@pytest.mark.parametrize("word", ["true", "1"])
def test_demotion_to_a_node_without_cpus(tmp_path: Path, word: str) -> None:
    finding = found(memory.Demotion, on(tmp_path, {DEMOTION: f"{word}\n"}, CXL))
    assert finding.seen == f"{DEMOTION} is {word}; nodes with memory and without CPUs: 2"
    assert finding.fix == f"echo false > {DEMOTION}"
    assert finding.undo == f"echo {word} > {DEMOTION}"


def test_demotion_where_every_node_has_cpus(tmp_path: Path) -> None:
    assert looked(memory.Demotion, on(tmp_path, {DEMOTION: "true\n"}, XEON)) is None


def test_demotion_that_says_neither(tmp_path: Path) -> None:
    with pytest.raises(Unknown, match="neither"):
        looked(memory.Demotion, on(tmp_path, {DEMOTION: "perhaps\n"}, CXL))


STRICT = {"/proc/sys/vm/overcommit_memory": "2\n"}


def test_a_copy_that_the_kernel_will_refuse(tmp_path: Path) -> None:
    files = STRICT | meminfo(12 * GIB, CommitLimit=8 * GIB, Committed_AS=6 * GIB)
    finding = found(memory.StrictOvercommit, on(tmp_path, files, size=3 * GIB))
    assert finding.seen == "2.0 GiB of 8.0 GiB may still be allocated, the model has 3.0 GiB"
    assert finding.fix == "echo 0 > /proc/sys/vm/overcommit_memory"
    assert finding.undo == "echo 2 > /proc/sys/vm/overcommit_memory"
    assert looked(memory.StrictOvercommit, on(tmp_path, files, size=2 * GIB)) is None


@pytest.mark.parametrize(
    ("check", "files", "why"),
    [
        (memory.LargerThanRam, {"/proc/meminfo": ""}, "available"),
        (memory.NoRoomForCopy, {"/proc/meminfo": ""}, "available"),
        (memory.SmallGroup, {"/proc/meminfo": ""}, "available"),
        (memory.NoHugePages, {f"{THP}/enabled": "never\n"}, "brackets"),
        (memory.NoSharedHugePages, {f"{THP}/shmem_enabled": "deny\n"}, "brackets"),
        (memory.IdleHugePages, {f"{POOL}/free_hugepages": "many\n"}, "free_hugepages"),
        (memory.StrictOvercommit, STRICT, "CommitLimit"),
    ],
)
def test_what_is_hidden(
    tmp_path: Path, check: type[Check], files: dict[str, str], why: str
) -> None:
    with pytest.raises(Unknown, match=why):
        looked(check, on(tmp_path, files, XEON))


def test_a_store_of_somebody_else_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMALOAD_STORE", str(tmp_path))
    folder = tmp_path / f"numaload-{os.geteuid()}"
    folder.mkdir(mode=0o755)
    (folder / "numaload-store").touch()
    system = on(tmp_path, meminfo(10 * GIB), size=13 * GIB)
    del system.stored
    with pytest.raises(NumaloadError, match="0755"):
        looked(memory.LargerThanRam, system)
