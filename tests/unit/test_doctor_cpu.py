"""Checks of processors, on machines that are constructed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from doctor_systems import FAST, constructed, looked
from machines import ONE, XEON, Machine
from numaload.doctor import cpu
from numaload.doctor.check import ESTIMATED, LOAD, PASS, Check, Unknown
from numaload.doctor.system import System
from numaload.formats.qtypes import BLOCKS, QuantType
from numaload.linux.lists import parse_list
from numaload.machine.topology import topology

CPUS = "/sys/devices/system/cpu"
FLAGS = "fpu sse2 avx avx2 fma f16c avx512f"
# What the checks read on a machine with nothing to mend; a virtual one has no frequencies.
HEALTHY: dict[str, str] = {
    "/proc/cpuinfo": f"processor\t: 0\nmodel name\t: Intel Xeon\nflags\t\t: {FLAGS}\n",
    "/proc/cmdline": "quiet\n",
    "/proc/loadavg": "0.50 0.40 0.30 1/500 4242\n",
    "/proc/self/cgroup": "0::/\n",
    f"{CPUS}/present": "0-63\n",
    f"{CPUS}/online": "0-63\n",
}
# CPU n and n + 32 share a core.
SIBLINGS = {
    f"{CPUS}/cpu{one}/topology/thread_siblings_list": f"{one % 32},{one % 32 + 32}\n"
    for one in range(64)
}
FREQUENCIES = {
    "scaling_driver": "intel_pstate",
    "scaling_governor": "powersave",
    "energy_performance_preference": "balance_performance",
    "scaling_min_freq": "800000",
    "scaling_max_freq": "3700000",
    "cpuinfo_max_freq": "3700000",
}


def every(leaf: str, text: str, cpus: str = "0-3") -> dict[str, str]:
    return {f"{CPUS}/cpu{one}/cpufreq/{leaf}": text for one in parse_list(cpus)}


SCALED = {path: text for leaf in FREQUENCIES.items() for path, text in every(*leaf).items()}


def weights(**counts: int) -> dict[str, Any]:
    """Tensors of so many weights of each type."""
    found = {}
    for name, count in counts.items():
        block_size, type_size = BLOCKS[QuantType[name]]
        nbytes = count // block_size * type_size
        found[name] = SimpleNamespace(qtype=QuantType[name], nbytes=nbytes)
    return found


def seen(
    root: Path, check: type[Check], files: dict[str, str], machine: Machine = XEON, **said: Any
) -> tuple[str, Any, str, str]:
    """What a check says on a machine that is healthy but for these files."""
    found = looked(check, constructed(root, machine, HEALTHY | files, **said))
    return ("", None, "", "") if found is None else (found.seen, found.price, found.fix, found.undo)


def scaled(
    root: Path, check: type[Check], files: dict[str, str], **said: Any
) -> tuple[str, Any, str, str]:
    """The same of four CPUs whose frequency follows the load."""
    return seen(root, check, SCALED | files, ONE, **said)


@pytest.mark.parametrize("check", cpu.CHECKS)
def test_check_finds_nothing_on_a_healthy_machine(tmp_path: Path, check: type[Check]) -> None:
    told = {"OMP_NUM_THREADS": "32"}
    assert seen(tmp_path, check, SIBLINGS, size=8 << 30, environment=told)[0] == ""
    assert scaled(tmp_path / "scaled", check, {}, size=8 << 30)[0] == ""


@pytest.mark.filterwarnings("ignore:.*shows no node")
@pytest.mark.parametrize("check", cpu.CHECKS)
def test_check_raises_only_unknown_where_nothing_is_shown(
    tmp_path: Path, check: type[Check]
) -> None:
    system = System(root=str(tmp_path))
    try:
        looked(check, system)
    except Unknown:
        pass
    finally:
        system.close()


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (cpu.InstructionSets, "/proc/cpuinfo", ""),
        (cpu.Governor, f"{CPUS}/cpu2/cpufreq/energy_performance_preference", None),
        (cpu.Throttled, "/proc/self/cgroup", None),
        (cpu.Offline, f"{CPUS}/present", "all"),
        (cpu.Offline, f"{CPUS}/online", None),
        (cpu.Busy, "/proc/loadavg", "much"),
        (cpu.Capped, f"{CPUS}/cpu2/cpufreq/scaling_max_freq", "<unknown>"),
    ],
)
def test_check_says_what_it_could_not_read(
    tmp_path: Path, check: type[Check], path: str, text: str | None
) -> None:
    system = constructed(tmp_path, ONE, HEALTHY | SCALED)
    place = tmp_path / path.lstrip("/")
    place.unlink() if text is None else place.write_text(text)
    with pytest.raises(Unknown, match=path):
        looked(check, system)


@pytest.mark.parametrize(
    ("flags", "cmdline", "expected", "fix"),
    [
        ("fpu sse2 hypervisor", "", "avx2, fma, f16c missing: this virtual machine", "-cpu host"),
        ("fpu avx2 fma hypervisor", "", "f16c missing", "host-passthrough"),
        ("fpu fma f16c", "quiet clearcpuid=avx2", "avx2 missing: clearcpuid=avx2", "clearcpuid"),
        ("fpu sse2", "quiet", "", ""),  # a processor that has none
        (f"{FLAGS} hypervisor", "", "", ""),
    ],
)
def test_instruction_sets_are_missed_where_something_hides_them(
    tmp_path: Path, flags: str, cmdline: str, expected: str, fix: str
) -> None:
    cpuinfo = f"model name\t: QEMU Virtual CPU\nflags\t\t: {flags}\n"
    files = {"/proc/cpuinfo": cpuinfo, "/proc/cmdline": cmdline}
    text, price, how, undo = seen(
        tmp_path, cpu.InstructionSets, files, weights=weights(Q4_0=64 * 10**9, F32=10**9)
    )
    assert text.startswith(expected)
    assert bool(text) == bool(expected) == bool(undo)
    assert fix in how
    assert how.endswith("as root") == undo.endswith("as root") == (fix == "clearcpuid")
    if text:
        # 64e9 weights by 64 CPUs: a second of each for 1e9 weights.
        assert price == (pytest.approx(1 / 3.0 - 1 / 5.5), ESTIMATED, PASS)


def test_instruction_sets_of_other_processors_are_not_judged(tmp_path: Path) -> None:
    files = {"/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\n"}
    assert seen(tmp_path, cpu.InstructionSets, files)[0] == ""


@pytest.mark.parametrize(
    ("told", "expected", "fix"),
    [
        ({"OMP_NUM_THREADS": "64"}, "OMP_NUM_THREADS=64, on 32 cores", "OMP_NUM_THREADS=32"),
        ({"OMP_NUM_THREADS": "48,2", "MKL_NUM_THREADS": "8"}, "OMP_NUM_THREADS=48,2, on", "=32"),
        ({"OMP_NUM_THREADS": "32"}, "", ""),
        ({"OMP_NUM_THREADS": "many"}, "", ""),
    ],
)
def test_threads_are_counted_against_cores(
    tmp_path: Path, told: dict[str, str], expected: str, fix: str
) -> None:
    text, price, how, undo = seen(tmp_path, cpu.Hyperthreads, SIBLINGS, environment=told)
    assert text.startswith(expected)
    assert bool(text) == bool(expected)
    assert fix in how
    assert price is None
    assert undo == (f"export OMP_NUM_THREADS={told['OMP_NUM_THREADS']}" if text else "")


@pytest.mark.parametrize(
    ("cpus", "expected"),
    [
        ("0-63", ""),
        ("0,32", "OMP_NUM_THREADS=2, on 1 core with 2 CPUs"),
        ("1", "OMP_NUM_THREADS=2, on 1 core with 1 CPU"),
    ],
)
def test_threads_of_a_process_are_counted_against_its_own_cores(
    tmp_path: Path, cpus: str, expected: str
) -> None:
    its: dict[str, Any] = {"pid": 42, "threads": SimpleNamespace(cpus=frozenset(parse_list(cpus)))}
    system = constructed(tmp_path, XEON, SIBLINGS, environment={"OMP_NUM_THREADS": "2"}, **its)
    system.machine = topology(system.sys, system.proc, allowed=frozenset({0}))  # of the doctor
    found = looked(cpu.Hyperthreads, system)
    assert (found.seen if found else "") == expected


def test_frequencies_and_shares_are_those_of_the_cpus_of_a_process(tmp_path: Path) -> None:
    threads = SimpleNamespace(cpus=frozenset({2}))
    files = every("scaling_driver", "acpi-cpufreq") | every("scaling_governor", "ondemand")
    files |= every("scaling_max_freq", "1850000") | {"/proc/cpuinfo": "flags: hypervisor\n"}
    its: dict[str, Any] = {"pid": 42, "threads": threads, "weights": weights(Q4_0=10**9)}
    assert scaled(tmp_path, cpu.Governor, files, **its)[0].startswith(
        "scaling_governor: ondemand on CPUs 2 ("
    )
    assert scaled(tmp_path, cpu.Capped, files, **its)[0] == "CPUs 2 may run at 1.9 of 3.7 GHz"
    price = scaled(tmp_path, cpu.InstructionSets, files, **its)[1]
    assert price == (pytest.approx(1 / 3.0 - 1 / 5.5), ESTIMATED, PASS)


def test_threads_are_unknown_without_siblings(tmp_path: Path) -> None:
    system = constructed(tmp_path, XEON, environment={"OMP_NUM_THREADS": "64"})
    with pytest.raises(Unknown, match="thread_siblings_list"):
        looked(cpu.Hyperthreads, system)
    for name, value in {"pid": 42, "threads": SimpleNamespace(cpus=frozenset())}.items():
        setattr(system, name, value)
    with pytest.raises(Unknown, match="which CPUs"):
        looked(cpu.Hyperthreads, system)


def test_governor_powersave_stays_at_the_lowest_frequency(tmp_path: Path) -> None:
    files = every("scaling_driver", "acpi-cpufreq") | every("scaling_governor", "schedutil")
    files |= every("scaling_governor", "powersave", "0-1,3")
    text, price, fix, undo = scaled(tmp_path, cpu.Governor, files, size=12 * 10**9)
    assert text == "scaling_governor: powersave on CPUs 0-1,3 (driver acpi-cpufreq)"
    assert price == (pytest.approx(1 - 0.8 / 3.7), ESTIMATED, LOAD)  # of a second to copy it
    where = f"{CPUS}/cpu$cpu/cpufreq/scaling_governor; done"
    which = "for cpu in $(seq 0 1) 3; do echo"
    assert (fix, undo) == (f"{which} performance > {where}", f"{which} powersave > {where}")


def test_governor_ondemand_is_found_and_nobody_knows_its_price(tmp_path: Path) -> None:
    files = every("scaling_driver", "acpi-cpufreq") | every("scaling_governor", "ondemand")
    text, price, _, undo = scaled(tmp_path, cpu.Governor, files, size=8 << 30)
    assert "ondemand on CPUs 0-3" in text
    assert price is None
    where = f"{CPUS}/cpu$cpu/cpufreq/scaling_governor"
    assert undo == f"for cpu in $(seq 0 3); do echo ondemand > {where}; done"


def test_governor_of_an_active_driver_is_judged_by_its_preference(tmp_path: Path) -> None:
    files = every("energy_performance_preference", "power")
    text, _, fix, undo = scaled(tmp_path, cpu.Governor, files)
    assert text.startswith("energy_performance_preference: power on CPUs 0-3")
    assert "echo performance > " in fix
    assert "echo power > " in undo
    assert fix.endswith("/cpufreq/energy_performance_preference; done")


@pytest.mark.parametrize("files", [{}, every("scaling_driver", "amd-pstate-epp")])
def test_governor_powersave_of_an_active_driver_is_no_fault(
    tmp_path: Path, files: dict[str, str]
) -> None:
    assert scaled(tmp_path, cpu.Governor, files)[0] == ""


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("400000 100000", "4 CPUs' time"), ("3300000 100000", ""), ("max 100000", "")],
)
def test_quota_far_below_the_cpus_is_found(tmp_path: Path, quota: str, expected: str) -> None:
    files = {
        "/sys/fs/cgroup/cpu.max": f"{quota}\n",
        "/sys/fs/cgroup/cpu.stat": "usage_usec 5\nnr_periods 900\nnr_throttled 700\n",
    }
    text, price, fix, undo = seen(tmp_path, cpu.Throttled, files)
    assert text.startswith(expected)
    assert bool(text) == bool(expected)
    assert price is None
    if text:
        assert "and 64 CPUs can be seen" in text
        assert "700 of its periods" in text
        assert fix.startswith("docker update --cpus=64 ")
        assert fix.endswith("OMP_NUM_THREADS=4")
        assert undo.startswith("docker update --cpus=4 ")


def test_quota_of_a_process_is_left_to_its_threads(tmp_path: Path) -> None:
    files = {"/sys/fs/cgroup/cpu.max": "400000 100000\n"}
    assert seen(tmp_path, cpu.Throttled, files, pid=42)[0] == ""


@pytest.mark.parametrize(
    ("slow", "warm", "found"),
    [
        (0.9e-9, 12e9, True),
        (0.5e-9, 12e9, False),  # it writes 8 GB/s of floats: memory is the limit
        (0.9e-9, 6e9, False),
        (1.5e-9, 12e9, True),
    ],
)
def test_types_are_compared_with_the_next_cheap_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: float, warm: float, found: bool
) -> None:
    measured = {QuantType.IQ3_S: slow, QuantType.Q3_K: 0.2e-9, QuantType.Q8_0: 0.2e-9}
    monkeypatch.setattr(cpu, "seconds_of", measured.__getitem__)
    text, price, fix, _ = seen(
        tmp_path, cpu.CostlyTypes, {}, deep=True, size=8 << 30,
        weights=weights(IQ3_S=64 * 10**9, Q8_0=10**9), speeds=FAST._replace(warm=warm),
    )  # fmt: skip
    assert bool(text) == found
    if found:
        assert text.startswith(f"IQ3_S takes {slow * 1e9:.2f} ns a weight, Q3_K 0.20")
        assert price == (pytest.approx((slow - 0.2e-9) * 10**9), ESTIMATED, PASS)
        assert fix.startswith("use this model quantized as Q3_K: 0.0 GiB more")


def test_types_that_were_never_compiled_are_unknown_and_stay_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMALOAD_CACHE_DIR", str(tmp_path / "cache"))
    with pytest.raises(Unknown, match="numaload bench dequant --qtype IQ3_S"):
        cpu.seconds_of(QuantType.IQ3_S)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("online", "smt", "expected"),
    [
        ("0-31", "on", "CPUs 32-63 of 64 are offline"),
        ("0-31", "off", ""),
        ("0-62", None, "CPUs 63 of 64"),
        ("0-63", "on", ""),
    ],
)
def test_offline_cpus_are_found_unless_they_are_siblings(
    tmp_path: Path, online: str, smt: str | None, expected: str
) -> None:
    files = {f"{CPUS}/online": online} | ({f"{CPUS}/smt/control": smt} if smt else {})
    text, _, fix, undo = seen(tmp_path, cpu.Offline, files)
    assert text.startswith(expected)
    assert bool(text) == bool(expected)
    if smt and text:
        assert fix == f"for cpu in $(seq 32 63); do echo 1 > {CPUS}/cpu$cpu/online; done"
        assert undo == f"for cpu in $(seq 32 63); do echo 0 > {CPUS}/cpu$cpu/online; done"


@pytest.mark.parametrize(("load", "found"), [("80.25", True), ("64.00", False)])
def test_load_above_the_cpus_is_found(tmp_path: Path, load: str, found: bool) -> None:
    files = {"/proc/loadavg": f"{load} 9.00 9.00 70/900 4242\n"}
    text, price, _, undo = seen(tmp_path, cpu.Busy, files)
    assert bool(text) == found
    assert (price, undo) == (None, "")
    if found:
        assert text.startswith("80.2 threads on average")
        assert text.endswith("64 CPUs")


def test_frequency_caps_are_found_and_taken_back(tmp_path: Path) -> None:
    files = every("scaling_max_freq", "1850000", "0,2")
    text, price, fix, undo = scaled(tmp_path, cpu.Capped, files, size=12 * 10**9)
    assert text == "CPUs 0,2 may run at 1.9 of 3.7 GHz"
    assert price == (pytest.approx(0.5), ESTIMATED, LOAD)
    where = f"{CPUS}/cpu$cpu/cpufreq/scaling_max_freq; done"
    which = "for cpu in 0 2; do echo"
    assert (fix, undo) == (f"{which} 3700000 > {where}", f"{which} 1850000 > {where}")


def test_frequency_cap_has_no_price_where_the_governor_has_it(tmp_path: Path) -> None:
    files = every("scaling_max_freq", "1850000") | every("scaling_driver", "acpi-cpufreq")
    text, price, _, _ = scaled(tmp_path, cpu.Capped, files, size=8 << 30)
    assert text
    assert price is None


def test_frequency_cap_of_a_few_percent_is_no_finding(tmp_path: Path) -> None:
    assert scaled(tmp_path, cpu.Capped, every("scaling_max_freq", "3500000"))[0] == ""
