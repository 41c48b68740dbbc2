"""Point 2, README: its two commands are what is there, and the demo does the whole main job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from commands import Numaload
from numaload.cli.main import VERBS, main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_exist() -> None:
    typed = re.findall(r"^(scripts/\S+)$", README, re.MULTILINE)
    assert typed[:2] == ["scripts/demo", "scripts/check"]
    assert all(os.access(ROOT / command, os.X_OK) for command in typed)
    assert "scripts/check" in (ROOT / ".ci/run").read_text()


def test_demo_runs_the_main_job(numaload: Numaload, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/demo.py", "--size", "48M"], text=True,
        capture_output=True, check=False, env=numaload.environment | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("3 files", "memory is bound", "read in", "pages there (100 %)",
                 "all checksums right", "million weights", "released"):  # fmt: skip
        assert said in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.fast
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_explained_and_has_help(
    verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"`numaload {verb}" in README
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    assert f"usage: numaload {verb}" in capsys.readouterr().out


@pytest.mark.fast
def test_without_a_verb_there_is_help_and_something_to_try(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(verb in said for verb in VERBS)
    assert len(re.findall("^  numaload [a-z]+ ", said, re.MULTILINE)) == 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("mirrr", "no verb 'mirrr': did you mean mirror?"),
        ("xyzzy", "no verb 'xyzzy': expected one of inspect, nodes, "),
    ],
)
def test_a_mistyped_verb_names_the_right_one(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word, "m.gguf"])
    assert ended.value.code == 2
    assert f"numaload: error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_python_example_runs(
    numaload: Numaload, model: str, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    """On the test's model, of which nothing stays mapped: other tests evict it."""
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert "model.gguf" in example
    names: dict[str, Any] = {}
    exec(compile(example.replace("model.gguf", model), page, "exec"), names)  # noqa: S102
    names["weights"].close()


def test_links_lead_to_files_that_are_there() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), (page, link)


def test_the_picture_is_the_one_that_its_script_draws(tmp_path: Path) -> None:
    drawn = tmp_path / "mirror.svg"
    subprocess.run([sys.executable, ROOT / "scripts/draw_mirror.py", drawn], check=True)
    assert drawn.read_text() == (ROOT / "docs/mirror.svg").read_text()
    assert "(docs/mirror.svg)" in README
    asked = [sys.executable, str(ROOT / "scripts/draw_mirror.py"), "--help"]
    told = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "draw_mirror.py [FILE]" in told.stderr
    assert list(tmp_path.iterdir()) == [drawn]
