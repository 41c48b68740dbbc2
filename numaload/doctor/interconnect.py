"""Traffic between nodes, and cache misses: the processor counts them, ``perf stat`` reads them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from numaload.doctor.check import Unknown

if TYPE_CHECKING:
    from numaload.doctor.system import System

SECONDS, LIMIT_S = 0.2, 1.0  # that perf counts for; after which it is given up
PARANOID = "/proc/sys/kernel/perf_event_paranoid"
SYS_ADMIN, PERFMON = 21, 38  # bits of capabilities, Linux include/uapi/linux/capability.h, 2026-11
MISSES = {"cache-misses": "cache misses", "node-load-misses": "loads from other nodes"}  # perf-list
HIDDEN = "the kernel shows perf no such counters, as in virtual machines and containers"
REFUSED = "kernel.perf_event_paranoid keeps this to root and CAP_PERFMON"
NOTHING = "perf counted nothing: no thread ran, or other programs use the counters"


class Link(NamedTuple):
    """What joins nodes. events: of perf, for all that is sent. nbytes: of data for each."""

    name: str
    events: Sequence[str]
    nbytes: float


def interconnect_command(processor: str) -> str:
    """Return the command that counts, for ten seconds, what is sent between nodes.

    processor: its name as in /proc/cpuinfo.
    """
    return _command(["-a", "--per-socket"], _link(processor).events)


def observe(system: System) -> str:
    """Say what is sent between nodes, and how often the process misses its caches.

    Where that cannot be counted, say why, and give the command that counts it.
    """
    told, lost = list[str](), dict[str, str]()  # lost: {why: what, and the command}
    link, target, allowed = _link(system.processor), ["-p", str(system.pid)], _permitted(system)
    root = "" if allowed else "sudo "
    try:
        counts = _counts(["-a"], link.events, allowed=allowed)
        if len(counts) < len(link.events):  # a part would look like all
            raise Unknown(NOTHING)
        sent = counts.total() * link.nbytes / SECONDS
        told.append(f"{sent / 1e9:.2f} GB/s {link.name}")
    except Unknown as error:
        command = interconnect_command(system.processor)
        lost[str(error)] = f"traffic between nodes: {root}{command}"
    try:
        for event, count in _counts(target, MISSES).items():
            told.append(f"{count / SECONDS / 1e6:.1f} million {MISSES[event]} a second")
    except Unknown as error:
        lost.setdefault(str(error), f"cache misses: {root}{_command(target, MISSES)}")
    texts = [f"perf counts {', '.join(told)}"] if told else []
    return "; ".join([*texts, *(f"{why}; to count {what}" for why, what in lost.items())])


def _permitted(system: System) -> bool:
    """Return whether this process may count what all do; perf itself may still be refused."""
    with suppress(Unknown, ValueError):
        found = re.search(r"CapEff:\s*([\da-f]+)", system.text("/proc/self/status"))
        if found and int(found[1], 16) & (1 << SYS_ADMIN | 1 << PERFMON):
            return True
        return int(system.text(PARANOID)) <= 0
    return True


def _command(target: Sequence[str], events: Iterable[str]) -> str:
    return " ".join(["perf stat", *target, *_options(events), "-- sleep 10"])


def _options(events: Iterable[str]) -> list[str]:
    return [word for event in events for word in ("-e", event)]


def _counts(target: Sequence[str], events: Iterable[str], *, allowed: bool = True) -> Counter[str]:
    """Return {event: count} of those that are counted, at least one. Raises: Unknown."""
    program = shutil.which("perf")
    if program is None:
        raise Unknown("perf is not installed")
    if not allowed:  # perf would count user mode alone, and say of links: not supported
        raise Unknown(REFUSED)
    words = [program, "stat", "-x,", *target, *_options(events), "sleep", str(SECONDS)]
    try:
        done = subprocess.run(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            env=os.environ | {"LC_ALL": "C"}, timeout=LIMIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise Unknown(f"perf did not answer: {type(error).__name__}") from error
    lines = done.stderr.decode(errors="replace").splitlines()
    if done.returncode:
        raise Unknown(_complaint(lines, done.returncode))
    # Count, unit, event: tools/perf/Documentation/perf-stat.txt, CSV FORMAT, 2026-11.
    rows = [row for row in (line.split(",") for line in lines) if len(row) > 2]
    found = Counter[str]()
    for row in rows:
        if row[0].isdecimal():
            found[row[2].partition(":")[0]] += int(row[0])
    if not found:
        raise Unknown(NOTHING if any(row[0] == "<not counted>" for row in rows) else HIDDEN)
    return found


def _complaint(lines: Sequence[str], status: int) -> str:
    said = "\n".join(lines)
    if "event syntax error" in said:  # no such PMU
        return HIDDEN
    if "perf_event_paranoid" in said:
        return REFUSED
    words = (line.strip() for line in lines if line.strip(": ") not in ("", "Error"))
    return f"perf failed: {next(words, f'status {status}')}"


def _link(processor: str) -> Link:
    """Return what joins the nodes of this processor.

    Events are given by number: perf is often older than the processor and lacks the names, and
    named UPI events of Skylake are scaled by 7.11e-6. Source of numbers and bytes: Linux
    tools/perf/pmu-events/arch/x86, 2026-11, by metric or event.
    """
    epyc = re.search(r"EPYC \d\w\w(\d)", processor)
    if epyc and epyc[1] in "123":  # amdzen1 to amdzen3: remote_outbound_data_controller_0 to _3
        return _xgmi(range(0x7C7, 0x8C7, 0x40), 0x2, 32)
    if epyc and epyc[1] == "4":  # amdzen4: local_socket_outbound_data_beats_link0 to link7
        return _xgmi(range(0xB5F, 0xD5F, 0x40), 0xF3E, 64)
    if epyc and epyc[1] == "5":  # amdzen5: local_socket_outbound_data_beats_link_0 to _5
        return _xgmi(range(0xD5F, 0xEDF, 0x40), 0xF3E, 64)
    if "Xeon" in processor and re.search(r" E[57]-", processor):  # qpi_data_transmit_bw
        return Link("over QPI", ["uncore_qpi/event=0x0,umask=0x2,name=qpi/"], 8)
    if "Xeon" in processor:  # upi_data_transmit_bw
        return Link("over UPI", ["uncore_upi/event=0x2,umask=0xf,name=upi/"], 64 / 9)
    return Link("of loads from other nodes", ["node-load-misses"], 64)  # a line of cache each


def _xgmi(numbers: Iterable[int], umask: int, nbytes: float) -> Link:
    events = [f"amd_df/event={n:#x},umask={umask:#x},name=xgmi{i}/" for i, n in enumerate(numbers)]
    return Link("over xGMI", events, nbytes)
