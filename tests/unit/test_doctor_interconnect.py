"""Traffic between nodes and cache misses, as a program in perf's place tells them."""

from __future__ import annotations

from pathlib import Path

import pytest

from doctor_systems import constructed
from machines import XEON
from numaload.doctor.interconnect import HIDDEN, NOTHING, REFUSED, interconnect_command, observe
from numaload.doctor.system import RECORDED, System

ROOT, USER = "CapEff:\t000001ffffffffff\n", "CapEff:\t0000000000000000\n"
PERFMON = "CapEff:\t0000004000000000\n"
UPI = "Intel(R) Xeon(R) Platinum 8480+"
# What perf 6.1 printed, with other numbers and names.
SENT = "281250000,,upi,403344231,100.00,,"
MISSED = "9000000,,cache-misses,0,100.00,,\n240000,,node-load-misses:u,0,100.00,,\n"
UNSUPPORTED = (
    "<not supported>,,cache-misses,0,100.00,,\n<not supported>,,node-load-misses,0,100.00,,\n"
)
UNCOUNTED = "<not counted>,,cache-misses,0,100.00,,\n"
NO_PMU = "event syntax error: 'uncore_upi/event=0x2'\n   \\___ Cannot find PMU `uncore_upi'\n"
LIMITED = "Error:\nAccess is limited.\nperf_event_paranoid setting is 2:\n"


def machine(root: Path, processor: str = UPI, caps: str = ROOT, paranoid: str = "2\n") -> System:
    files = {"/proc/self/status": caps, "/proc/sys/kernel/perf_event_paranoid": paranoid}
    return constructed(root, XEON, files, pid=4711, processor=processor)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Be the only folder on the PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def perf(place: Path, of_all: str, of_process: str, status: int = 0) -> None:
    (place / "all").write_text(of_all)
    (place / "process").write_text(of_process)
    program = place / "perf"
    program.write_text(
        '#!/bin/sh\ncd "${0%/*}"\ncase "$*" in\n'
        f'"stat -x, -a -e "*) /bin/cat all >&2; exit {status};;\n'
        '"stat -x, -p 4711 -e "*) /bin/cat process >&2;;\nesac\n'
    )
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("processor", "event", "count"),
    [
        (UPI, "uncore_upi/event=0x2,umask=0xf,name=upi/", 1),
        (
            "Intel(R) Xeon(R) CPU E5-2690 v3 @ 2.60GHz",
            "uncore_qpi/event=0x0,umask=0x2,name=qpi/",
            1,
        ),
        ("AMD EPYC 7702 64-Core Processor", "amd_df/event=0x887,umask=0x2,name=xgmi3/", 4),
        ("AMD EPYC 7R13 Processor", "amd_df/event=0x7c7,umask=0x2,name=xgmi0/", 4),
        ("AMD EPYC 9654 96-Core Processor", "amd_df/event=0xd1f,umask=0xf3e,name=xgmi7/", 8),
        ("AMD EPYC 9755 128-Core Processor", "amd_df/event=0xe9f,umask=0xf3e,name=xgmi5/", 6),
        ("", "node-load-misses", 1),
    ],
)
def test_interconnect_command(processor: str, event: str, count: int) -> None:
    command = interconnect_command(processor)
    assert command.startswith("perf stat -a --per-socket -e ")
    assert f"-e {event} " in command
    assert command.count("-e ") == count
    assert command.endswith(" -- sleep 10")


@pytest.mark.parametrize(
    "allowed", [(ROOT, "2\n"), (PERFMON, "4\n"), (USER, "0\n"), (USER, "-1\n")]
)
def test_traffic_and_misses(allowed: tuple[str, str], tmp_path: Path, place: Path) -> None:
    perf(place, SENT, MISSED)
    assert observe(machine(tmp_path, UPI, *allowed)) == (
        "perf counts 10.00 GB/s over UPI, 45.0 million cache misses a second,"
        " 1.2 million loads from other nodes a second"
    )


def test_links_of_amd_are_added(tmp_path: Path, place: Path) -> None:
    processor = "AMD EPYC 7763 64-Core Processor"
    perf(place, "\n".join(f"15625000,,xgmi{i},1,100.00,," for i in range(4)), UNCOUNTED)
    text = observe(machine(tmp_path, processor))
    assert text.startswith(f"perf counts 10.00 GB/s over xGMI; {NOTHING}; to count cache misses: ")
    assert text.endswith(": perf stat -p 4711 -e cache-misses -e node-load-misses -- sleep 10")
    perf(place, "15625000,,xgmi0,1,100.00,,", MISSED)  # one of four
    assert f"; {NOTHING}; to count traffic" in observe(machine(tmp_path, processor))


@pytest.mark.parametrize(("caps", "sudo"), [(ROOT, ""), (USER, "sudo ")])
def test_perf_is_not_installed(caps: str, sudo: str, tmp_path: Path, place: Path) -> None:
    assert place.exists()
    command = f"to count traffic between nodes: {sudo}{interconnect_command(UPI)}"
    assert observe(machine(tmp_path, UPI, caps)) == f"perf is not installed; {command}"


@pytest.mark.parametrize("paranoid", ["1\n", "2\n", "4\n"])
def test_only_the_process_may_be_counted(paranoid: str, tmp_path: Path, place: Path) -> None:
    perf(place, "never asked", MISSED)
    text = observe(machine(tmp_path, UPI, USER, paranoid))
    assert text.startswith("perf counts 45.0 million cache misses a second, 1.2 million loads")
    assert text.endswith(f"; {REFUSED}; to count traffic between nodes: sudo "
                         f"{interconnect_command(UPI)}")  # fmt: skip


@pytest.mark.parametrize(
    ("said", "status", "why"),
    [
        (NO_PMU, 129, HIDDEN),
        (UNSUPPORTED, 0, HIDDEN),
        ("", 0, HIDDEN),
        (LIMITED, 255, REFUSED),
        ("WARNING: perf not found for kernel 6.8", 2, "perf failed: WARNING: perf not found"),
        ("Error:", 1, "perf failed: status 1"),
    ],
)
def test_what_perf_cannot_count(
    said: str, status: int, why: str, tmp_path: Path, place: Path
) -> None:
    perf(place, said, UNSUPPORTED, status)
    text = observe(machine(tmp_path))
    assert text.startswith(why)
    assert interconnect_command(UPI) in text


@pytest.mark.parametrize("text", ["", "word\n"])
def test_where_settings_are_hidden_perf_decides(text: str, tmp_path: Path, place: Path) -> None:
    perf(place, SENT, MISSED)
    assert observe(machine(tmp_path, UPI, text, text)).startswith("perf counts 10.00 GB/s")


def test_perf_that_hangs_is_given_up(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("numaload.doctor.interconnect.LIMIT_S", 0.05)
    (place / "perf").write_text("#!/bin/sh\nwhile :; do :; done\n")
    (place / "perf").chmod(0o755)
    assert observe(machine(tmp_path)).startswith("perf did not answer: ")
    (place / "perf").write_text("no program")
    assert observe(machine(tmp_path)).startswith("perf did not answer: ")


def test_a_recorded_machine_is_not_counted(tmp_path: Path) -> None:
    assert System(pid=4711, root=str(tmp_path)).interconnect == RECORDED
