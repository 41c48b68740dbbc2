"""What people see: sizes, tables, JSON, and machines of one to many nodes."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from machines import CPUSET, EVERY_CPU, MACHINES, NPS4, POWER, XEON, Machine
from numaload.cli import machine as cli_machine
from numaload.cli.machine import print_nodes
from numaload.cli.output import (
    WORTH_A_BAR,
    complain,
    count,
    duration,
    files_of,
    note,
    print_json,
    print_table,
    progress_bar,
    rate,
    show_step,
    show_warnings,
    size,
)
from numaload.errors import NumaloadWarning
from numaload.linux.placement import Placement
from numaload.linux.syscalls import LIBNUMA, NO_CALLS, SYSTEM_CALLS
from numaload.machine.topology import topology

Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (1 << 20, "1.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1.0 TiB"),
        (5000 << 40, "5000.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_size(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_counts_agree_with_their_noun() -> None:
    assert [count(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]
    assert files_of(["/m.gguf"]) == "/m.gguf"
    assert files_of(["/m-1.gguf", "/m-2.gguf"]) == "/m-1.gguf (2 files)"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (2 * 86400, "2 days")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_rate() -> None:
    assert rate(3_000_000_000, 2) == "1.50 GB/s"
    assert rate(0, 0) == "0.00 GB/s"


def test_table_lines_up(capsys: Capture) -> None:
    print_table(["node", "what", "rest"], [[0, "a", ""], [10, "longer", "x"]])
    assert capsys.readouterr().out.splitlines() == [
        "node  what    rest",
        "   0  a",
        "  10  longer  x",
    ]


def test_table_without_rows(capsys: Capture) -> None:
    print_table(["file", "bytes"], [])
    assert capsys.readouterr().out == "file  bytes\n"


def test_json_prints_reports_and_arrays(capsys: Capture) -> None:
    found = Placement([1], 2, {1: 2})
    print_json({"at": found, "values": np.arange(2, dtype=np.uint8), "path": Path("/m")})
    printed = json.loads(capsys.readouterr().out)
    assert printed["at"]["placed"] == 2
    assert printed["values"] == [0, 1]
    assert printed["path"] == "/m"


def test_messages_go_to_stderr(capsys: Capture) -> None:
    complain("no such file")
    note("nothing to do")
    captured = capsys.readouterr()
    assert captured.err == "numaload: error: no such file\nnumaload: nothing to do\n"
    assert captured.out == ""


@pytest.fixture
def own_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        yield


@pytest.mark.usefixtures("own_warnings")
def test_warnings_are_one_line(capsys: Capture) -> None:
    show_warnings()
    warnings.warn("small pages", NumaloadWarning, stacklevel=1)
    assert capsys.readouterr().err == "numaload: warning: small pages\n"


@pytest.mark.parametrize(("term", "shown"), [("dumb", ""), ("xterm", "\r\x1b[Kreading")])
def test_a_step_is_shown_where_its_line_can_be_cleared(
    term: str, shown: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", term)
    show_step("reading")
    assert capsys.readouterr().err == shown


@pytest.mark.parametrize(("terminal", "quiet"), [(False, False), (True, True)])
def test_no_bar(
    terminal: bool, quiet: bool, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    with progress_bar("reading", quiet=quiet) as advance:
        assert advance is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [WORTH_A_BAR - 1, WORTH_A_BAR])
def test_a_bar_where_there_is_time_for_one(
    total: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("reading", quiet=False) as advance:
        assert advance is not None
        advance(total // 2, total)
        advance(total, total)
    captured = capsys.readouterr()
    assert ("reading" in captured.err) == (total == WORTH_A_BAR)
    assert captured.out == ""


def printed(machine: Machine, root: Path, capsys: Capture, **options: Any) -> list[str]:
    print_nodes(topology(**machine.write(root), **({"allowed": EVERY_CPU} | options)))
    return capsys.readouterr().out.splitlines()


def test_nodes_of_nps4(tmp_path: Path, capsys: Capture) -> None:
    lines = printed(NPS4, tmp_path, capsys)
    assert re.split(r"  +", lines[0]) == ["node", "memory", "free", "distances", "CPUs"]
    assert lines[1] == "   0  93.8 GiB  46.9 GiB  10 to 0; 12 to 1-3; 32 to 4-7    0-7"
    assert lines[6] == "   5  93.8 GiB  46.9 GiB  10 to 5; 12 to 4,6-7; 32 to 0-3  40-47"
    assert lines[9] == "all: 0-7"
    assert lines[10].startswith("all is 8 nodes in 2 sockets: 8 copies; --per socket makes 2")


def test_nodes_of_power_with_gpus(tmp_path: Path, capsys: Capture) -> None:
    lines = printed(POWER, tmp_path, capsys)
    assert lines[1].split("  ")[-1].strip() == "0-15"
    assert "10 to 0; 40 to 8; 80 to 250-255" in lines[1]
    assert lines[3].split("  ")[-1].strip() == "none"
    assert lines[9:] == [
        "all: 0,8",
        "node 250-255 is left out of all: has no CPUs, but may be named",
    ]


def test_nodes_left_out_that_cannot_be_named(tmp_path: Path, capsys: Capture) -> None:
    lines = printed(CPUSET, tmp_path, capsys)
    why = "its memory is not allowed to this process (cpuset)"
    assert lines[-2:] == ["all: 1", f"node 0 is left out of all: {why}"]


@pytest.mark.parametrize(
    ("allowed", "ends"),
    [
        ({0, 1, 16, 17}, ["0-1 (30 more not allowed here)", "16-17 (30 more not allowed here)"]),
        ({5}, ["5 (31 more not allowed here)", "none (32 not allowed here)"]),
    ],
)
def test_cpus_that_are_not_allowed(
    allowed: set[int], ends: list[str], tmp_path: Path, capsys: Capture
) -> None:
    lines = printed(XEON, tmp_path, capsys, allowed=frozenset(allowed))
    assert [line.split("  ")[-1].strip() for line in lines[1:3]] == ends


def test_256_nodes_are_a_screen_wide(tmp_path: Path, capsys: Capture) -> None:
    many = range(256)
    row = [["10" if i == j else "20" if i // 4 == j // 4 else "40" for j in many] for i in many]
    nodes = {node: (f"{node * 2}-{node * 2 + 1}", 1000) for node in many}
    lines = printed(Machine(nodes, [" ".join(words) for words in row]), tmp_path, capsys)
    assert len(lines) == 1 + 256 + 2
    assert max(map(len, lines)) < 110


@pytest.mark.parametrize("machine", MACHINES.values(), ids=MACHINES)
def test_every_machine_can_be_printed(machine: Machine, tmp_path: Path, capsys: Capture) -> None:
    lines = printed(machine, tmp_path, capsys)
    assert [line.split()[0] for line in lines[1:]][: len(machine.nodes)] == [
        str(node) for node in machine.nodes
    ]


def test_unknown_distances(tmp_path: Path, capsys: Capture) -> None:
    machine = Machine(XEON.nodes, XEON.rows, files={"node0/distance": None})
    assert "  unknown  " in printed(machine, tmp_path, capsys)[1]


@pytest.mark.parametrize(
    ("name", "how"),
    [
        (LIBNUMA, "through libnuma.so.1"),
        (SYSTEM_CALLS, "by system calls used directly: libnuma.so.1 not found"),
        (NO_CALLS, "by nothing: libnuma.so.1 not found"),
    ],
)
def test_how_memory_is_bound(name: str, how: str) -> None:
    assert cli_machine._how(name).startswith(how)
    assert ("apt-get install libnuma1" in cli_machine._how(name)) == (name != LIBNUMA)
