"""The doctor as a whole: what comes first on machines that users told of, and where all is well."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from doctor_stories import HEALTHY, STORIES, told
from doctor_systems import GIB
from machines import MACHINES, NPS1, ONE, XEON, Machine
from numaload.cli.doctor import show
from numaload.doctor import paste
from numaload.doctor.check import Check
from numaload.doctor.diagnosis import CHECKS, examine
from numaload.doctor.system import System
from numaload.machine.devices import Device
from numaload.machine.userdir import SHARED_MEMORY

DOCS = Path(__file__).parents[2] / "docs/findings.md"


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMALOAD_STORE", f"{SHARED_MEMORY}/numaload-none/numaload-0")


@pytest.mark.parametrize("name", STORIES)
def test_a_story_has_its_finding_first(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    story = STORIES[name]
    found = examine(story.make(tmp_path))
    show(found)
    said = capsys.readouterr().out
    assert found.findings, said
    assert found.findings[0].id == story.first, said
    assert story.command in found.findings[0].fix
    assert all(len(line) <= 80 for line in said.splitlines() if " " in line.strip())


@pytest.mark.parametrize("machine", [ONE, XEON, NPS1], ids=["one", "xeon", "nps1"])
def test_nothing_is_found_where_all_is_well(
    machine: Machine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = examine(told(tmp_path, machine, 4 * GIB))
    assert [finding.id for finding in found.findings] == []
    show(found)
    assert "nothing to mend; this file loads in 1.5 s, 97% of what the storage gives" in (
        capsys.readouterr().out.replace("\n", " ")
    )


@pytest.mark.parametrize(
    ("kind", "name", "file_system"),
    [
        ("network", "alice@box.lab:/srv/alice", "fuse.sshfs"),
        ("network", "alice-drive:alice/x", "fuse.rclone"),
        ("network", "10.1.2.3:6789,10.1.2.4:6789:/alice", "ceph"),
        ("unknown", "tank/alice/box", "zfs"),
        ("share", "alice", "9p"),
    ],
)
def test_the_block_to_paste_names_no_server_or_bucket(
    kind: str, name: str, file_system: str, tmp_path: Path
) -> None:
    system = told(tmp_path, ONE, GIB, device=Device(kind, name, file_system))
    said = paste.block(examine(system))
    assert f"(SOURCE, {file_system})" in said
    assert not re.search(r"alice|box|10\.1\.", said)


@pytest.mark.parametrize("content", [None, "", "what\n"], ids=["absent", "empty", "words"])
@pytest.mark.parametrize("size", [0, GIB])
def test_what_cannot_be_read_is_neither_raised_nor_none(
    tmp_path: Path, content: str | None, size: int
) -> None:
    system = told(tmp_path, XEON, size)
    for name in HEALTHY:
        (tmp_path / name.lstrip("/")).unlink()
        if content is not None:
            (tmp_path / name.lstrip("/")).write_text(content)
    found = examine(system)
    assert found.findings == ()
    assert found.unknown


@pytest.mark.filterwarnings("ignore:.*shows no node")
def test_no_check_raises_on_an_empty_tree(tmp_path: Path) -> None:
    assert examine(System(None, root=str(tmp_path))).findings == ()


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_is_looked_at(name: str, tmp_path: Path) -> None:
    """What is found is about the nodes alone: nothing else is wrong with these."""
    found = examine(told(tmp_path, MACHINES[name], GIB))
    assert {finding.id[:3] for finding in found.findings} <= {"NL3"}


def test_numbers_are_unique_and_explained() -> None:
    numbers = [check.id for check in CHECKS]
    assert len(set(numbers)) == len(numbers)
    headings = [line[4:] for line in DOCS.read_text().splitlines() if line.startswith("### NL")]
    assert sorted(headings) == sorted(f"{check.id} {check.title}" for check in CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.id)
def test_a_threshold_has_a_source_with_its_date(check: type[Check]) -> None:
    assert len(check.title) <= 60
    assert check.source
    assert re.search(r"20[12][0-9]", check.source)
