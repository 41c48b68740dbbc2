"""What the doctor finds in a process: its threads, and memory that is far from them or in swap."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from doctor_systems import GIB, constructed, looked
from machines import CXL, ONE, SNC2, XEON
from numaload.cli.doctor import show
from numaload.doctor.check import ESTIMATED, ONCE, PASS, Price, Unknown
from numaload.doctor.diagnosis import examine
from numaload.doctor.findings import ThreadReport
from numaload.doctor.memory import SwapInUse
from numaload.doctor.process import (
    CHECKS,
    LOCAL_RATE,
    BoundLate,
    MainPinned,
    Quota,
    RemoteShare,
    Swapped,
)
from numaload.doctor.speeds import Speeds
from numaload.doctor.system import System
from numaload.linux.lists import parse_list
from numaload.linux.syscalls import PAGE
from numaload.machine.threads import Thread
from numaload.machine.topology import Topology

PID = 4711
MAPS, STATUS, SWAPS = f"/proc/{PID}/numa_maps", f"/proc/{PID}/status", "/proc/swaps"
SWAP = "Filename Type Size Used Priority\n"
NODE_0, NODE_1, BOTH = "0-15,32-47", "16-31,48-63", "0-63"  # CPUs of XEON


def line(nbytes: Mapping[int, int], policy: str = "default", what: str = "") -> str:
    """One line of numa_maps. nbytes: by node."""
    counts = " ".join(f"N{node}={n // PAGE}" for node, n in nbytes.items())
    return f"7f0000000000 {policy}{what} anon=1 dirty=1 {counts} kernelpagesize_kB={PAGE >> 10}\n"


def model_line(nbytes: Mapping[int, int], file: str = "/m/a.gguf") -> str:
    return line(nbytes, what=f" file={file}").replace(" anon=1 dirty=1", " mapped=1")


# On a machine with nothing to mend. Threads are given beside it: threads=at(NODE_0).
HEALTHY: dict[str, str] = {
    MAPS: line({0: 8 * GIB, 1: 100 << 20}) + model_line({0: 4 * GIB}),
    STATUS: "Name:\tpython\nVmSwap:\t    1024 kB\n",
    SWAPS: SWAP + "/dev/sda2 partition 8388604 1024 -2\n",
}


def at(cpus: str, others: str = "", *, on: int = -1, **values: Any) -> ThreadReport:
    """Two threads that may run there and work; a third that is idle. on: the CPU they run on."""
    rest: dict[str, Any] = {"state": "R", "cpu_s": 60.0, "mems": frozenset(), "cpu": on} | values
    places = [cpus, cpus, others or cpus]
    found = [
        Thread(PID + i, f"a\x1b{i}", i == 0, cpus=frozenset(parse_list(its)), **rest)
        for i, its in enumerate(places)
    ]
    found[2] = found[2]._replace(cpu_s=0.0)
    busy = frozenset(t.tid for t in found[:2])
    running = busy if on >= 0 else frozenset[int]()
    return ThreadReport(PID, tuple(found), running, Topology({}, ""), {}, None)


def process(root: Path, threads: ThreadReport, maps: str | None = None, **said: Any) -> System:
    """A process on XEON whose memory lies so."""
    files = HEALTHY | ({} if maps is None else {MAPS: maps}) | said.pop("files", {})
    system = constructed(root, said.pop("machine", XEON), files, pid=PID, **said)
    system.threads = replace(threads, machine=system.machine)
    return system


# Far from its threads.


def test_memory_where_no_thread_may_run(tmp_path: Path) -> None:
    maps = line({0: 10 * GIB, 1: 2 * GIB}) + model_line({0: 4 * GIB})
    system = process(tmp_path, at(NODE_1, BOTH), maps, size=GIB)
    found = looked(RemoteShare, system)
    assert found is not None
    assert found.seen == (
        "its threads work on node 1, but 14336 MiB of 16384 MiB (88%) of its memory and the"
        f" model's pages lie on node 0; {system.interconnect}"
    )
    assert found.price == Price(14 * GIB / LOCAL_RATE, ESTIMATED, PASS)
    assert found.fix == (
        f"migratepages {PID} 0 1  # next time start it so:"
        " numaload exec --node 1 /models/model.gguf -- PROGRAM -m {model}"
    )
    assert found.undo == f"migratepages {PID} 1 0"
    assert not found.root


@pytest.mark.parametrize(
    ("maps", "threads"),
    [
        (line({0: 9 * GIB, 1: 1 * GIB}), at(NODE_0, BOTH)),  # 10 %
        (line({0: 40 << 20, 1: 40 << 20}), at(NODE_0, BOTH)),  # 40 MiB
        (line({0: 9 * GIB, 1: 9 * GIB}), at(BOTH)),  # they are idle, and may run on both
        (line({0: GIB, 1: GIB}, "interleave:0-1"), at(NODE_0, BOTH)),
        (line({0: GIB, 1: GIB}, "weighted interleave:0-1"), at(NODE_0, BOTH)),
        (model_line({1: GIB}, "/usr/lib/libc.so.6"), at(NODE_0, BOTH)),
        (model_line({1: GIB}, "/s/numaload-0/a/node1/m.gguf"), at(NODE_0, BOTH)),
        (line({0: GIB, 1: GIB}), at(NODE_0, BOTH, cpu_s=0.5)),  # they hardly worked
        (line({1: GIB}), at("", BOTH)),  # the kernel does not say where they may run
    ],
)
def test_memory_that_is_near_enough(maps: str, threads: ThreadReport, tmp_path: Path) -> None:
    assert looked(RemoteShare, process(tmp_path, threads, maps)) is None


@pytest.mark.parametrize(
    "file",
    ["/m/a.safetensors", r"/m/a.gguf\040(deleted)", f"/hub/blobs/{'0a' * 32}",
     f"/ollama/blobs/sha256-{'0a' * 32}"],
)  # fmt: skip
def test_models_are_known_by_their_names(file: str, tmp_path: Path) -> None:
    assert looked(RemoteShare, process(tmp_path, at(NODE_0, BOTH), model_line({1: GIB}, file)))
    other = model_line({1: GIB}, f"{file}/lib.so")
    assert not looked(RemoteShare, process(tmp_path, at(NODE_0, BOTH), other))


def test_threads_that_may_run_anywhere_count_where_they_run(tmp_path: Path) -> None:
    found = looked(RemoteShare, process(tmp_path, at(BOTH, on=20), line({0: GIB, 1: GIB})))
    assert found is not None
    assert "its threads work on node 1, but 1024 MiB of 2048 MiB (50%)" in found.seen
    assert "MODEL" in found.fix
    assert looked(RemoteShare, process(tmp_path, at(BOTH, on=20), line({1: GIB}))) is None


def test_the_model_of_a_process_that_was_bound_late_is_looked_at_alone(tmp_path: Path) -> None:
    system = process(tmp_path, at(NODE_1), line({0: GIB}) + model_line({0: 3 * GIB}))
    late, far = looked(BoundLate, system), looked(RemoteShare, system)
    assert late is not None
    assert late.price == Price(GIB / LOCAL_RATE, ESTIMATED, PASS)
    assert far is not None
    assert far.price == Price(3 * GIB / LOCAL_RATE, ESTIMATED, PASS)


def test_a_node_of_the_same_socket_costs_less(tmp_path: Path) -> None:
    """SNC2: node 2 is at a distance of 11 from node 0, node 1 at 21."""
    near, far = (
        looked(RemoteShare, process(tmp_path, at("0", "0-15"), line({n: GIB}), machine=SNC2))
        for n in (2, 1)
    )
    assert near is not None
    assert far is not None
    assert (near.price, far.price) == (
        Price(0.1 * GIB / LOCAL_RATE, ESTIMATED, PASS),
        Price(GIB / LOCAL_RATE, ESTIMATED, PASS),
    )


def test_threads_on_several_nodes_are_started_by_numactl(tmp_path: Path) -> None:
    maps = line({1: GIB, 3: GIB})
    found = looked(RemoteShare, process(tmp_path, at("0,2", "0-15"), maps, machine=SNC2))
    assert found is not None
    assert found.fix == (
        f"migratepages {PID} 1,3 0,2  # next time start it so:"
        " numactl --cpunodebind=0,2 --membind=0,2 PROGRAM"
    )


# Bound late.


@pytest.mark.parametrize(
    ("maps", "threads"),
    [
        (line({0: GIB, 1: GIB}), at(NODE_1)),
        (line({0: GIB, 1: GIB}), at(BOTH, mems=frozenset({1}))),  # cpuset
        (line({0: GIB, 1: GIB}, "bind:1"), at(BOTH)),
        (line({0: GIB, 1: GIB}, "bind=static:1", " heap"), at(BOTH)),
        (line({0: GIB, 1: GIB}, "prefer:1"), at(BOTH)),
        (line({0: GIB, 1: GIB}, "prefer (many):1"), at(BOTH)),
    ],
)
def test_memory_from_before_it_was_bound(maps: str, threads: ThreadReport, tmp_path: Path) -> None:
    system = process(tmp_path, threads, maps)
    found = looked(BoundLate, system)
    assert found is not None
    assert found.seen == (
        "the process is bound to node 1 now, but 1024 MiB of 2048 MiB (50%) of its anonymous"
        f" memory lie on node 0; {system.interconnect}"
    )
    assert found.fix.startswith(f"migratepages {PID} 0 1  # next time start it so: numaload exec")
    assert found.undo == f"migratepages {PID} 1 0"


@pytest.mark.parametrize(
    ("maps", "threads"),
    [
        (line({0: GIB, 1: GIB}), at(BOTH)),  # nothing binds it
        (line({0: GIB, 1: GIB}), at(NODE_1, BOTH)),  # not all its threads
        (line({0: GIB}, "bind:0"), at(NODE_1)),  # as it was asked for
        (line({0: GIB, 1: GIB}, "interleave:0-1"), at(NODE_1)),
        (line({1: GIB, 0: 50 << 20}), at(NODE_1)),
        (model_line({0: GIB}) + line({1: GIB}), at(NODE_1)),  # no memory of its own
        (line({0: GIB, 1: GIB}, "bind:9-1"), at(BOTH)),  # no list of nodes
    ],
)
def test_memory_that_follows(maps: str, threads: ThreadReport, tmp_path: Path) -> None:
    assert looked(BoundLate, process(tmp_path, threads, maps)) is None


def test_memory_that_shall_be_partly_here_and_partly_there(tmp_path: Path) -> None:
    maps = line({0: GIB}, "bind:1") + line({1: GIB}, "bind:0")
    found = looked(BoundLate, process(tmp_path, at(BOTH), maps))
    assert found is not None
    assert found.fix == "numactl --cpunodebind=0-1 --membind=0-1 PROGRAM"
    assert found.undo == ""


def test_nodes_without_cpus_are_nobody_s_mistake(tmp_path: Path) -> None:
    system = process(tmp_path, at("0-7"), line({0: GIB, 2: GIB}), machine=CXL)
    assert looked(BoundLate, system) is None
    assert looked(RemoteShare, system) is None


# In swap.


IN_SWAP = {
    STATUS: "Name:\tpython\nVmSwap:\t  976563 kB\n",
    SWAPS: SWAP + "/dev/sda2 partition 8388604 1000000 -2\n/a\\040b file 1024 8 5\n/c file 9 0 4\n",
    "/proc/vmstat": "pswpin 0\n",
    "/proc/meminfo": "MemAvailable: 9000000 kB\nSwapTotal: 9000000 kB\nSwapFree: 8000000 kB\n",
}


def test_memory_in_swap(tmp_path: Path) -> None:
    found = looked(Swapped, process(tmp_path, at(NODE_0), files=IN_SWAP, size=GIB))
    assert found is not None
    assert found.seen == "953 MiB of it are in swap"
    assert found.fix == (
        "swapoff /dev/sda2 && swapon /dev/sda2 && swapoff '/a b' && swapon -p 5 '/a b'"
    )
    assert (found.undo, found.root) == ("", True)


def test_seconds_of_swap_are_claimed_once(tmp_path: Path) -> None:
    system = process(tmp_path, at(NODE_0), files=IN_SWAP, size=GIB, speeds=Speeds(disk=2e9))
    found = [looked(check, system) for check in (SwapInUse, Swapped)]
    prices = [(one.id, one.price) for one in found if one]
    assert prices == [("NL204", Price(976563 * 1024 / 2e9, ESTIMATED, ONCE)), ("NL710", None)]


def test_swap_without_room_for_what_is_in_it(tmp_path: Path) -> None:
    files = {STATUS: "VmSwap:\t 9765630 kB\n", SWAPS: SWAP + "odd\n"}
    found = looked(Swapped, process(tmp_path, at(NODE_0), files=files))
    assert found is not None
    assert found.fix == "end what else takes memory, then: swapoff -a && swapon -a"


# All of them.


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_nothing_is_found_where_nothing_is_wrong(check: Any, tmp_path: Path) -> None:
    assert looked(check, process(tmp_path, at(NODE_0))) is None
    assert looked(check, process(tmp_path, at("0-3"), machine=ONE)) is None
    assert not check(constructed(tmp_path)).available()  # no process was named


@pytest.mark.parametrize("check", [BoundLate, RemoteShare, Swapped], ids=lambda check: check.id)
@pytest.mark.parametrize("text", [None, "", "N0=1\n", "x default N0=3\n", "VmSwap: x kB\n"])
def test_what_cannot_be_read_is_unknown(check: Any, text: str | None, tmp_path: Path) -> None:
    files = {} if text is None else {MAPS: text, STATUS: text}
    with pytest.raises(Unknown, match=str(PID)):
        looked(check, constructed(tmp_path, XEON, files, pid=PID, threads=at(NODE_0)))


@pytest.mark.parametrize("mine", [True, False])
def test_threads_of_others_are_moved_by_root(tmp_path: Path, mine: bool) -> None:
    uid = os.getuid() if mine else os.getuid() + 1
    found = looked(MainPinned, process(tmp_path, at("0", "0-3"), uid=uid))
    assert found is not None
    assert f": taskset -pc 0-3 {PID}" in found.fix
    assert found.root != mine
    crowd = looked(Quota, process(tmp_path, replace(at("0-3", on=0), quota=1.0), uid=uid))
    assert crowd is not None
    assert crowd.fix.endswith("or raise cpu.max as root")
    assert not crowd.root


def test_what_people_see_of_a_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = at(NODE_1)
    show(examine(process(tmp_path, threads, line({0: 4 * GIB})), CHECKS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"process {PID}: a\\x1b0"
    assert lines[1].startswith("threads  name")
    assert "43 ms for each token of a dense model (estimated)" in " ".join(lines)
    assert all(row.isprintable() and len(row) <= 80 for row in lines)


def test_findings_of_threads_are_numbered(tmp_path: Path) -> None:
    system = process(tmp_path, replace(at("0-3", on=0), quota=1.0))
    (finding,) = system.threads.findings
    found = looked(Quota, system)
    assert found is not None
    assert found.seen == finding.text
    assert found.fix == finding.fix
    assert found.price is None
