"""``numaload doctor`` as a command: its exit statuses, and the block to paste."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
from pathlib import Path

import pytest

import numaload as api
from commands import Numaload
from numaload.cli.doctor import _show_remedy as show_remedy
from numaload.cli.doctor import remedy
from numaload.doctor.paste import PATH, redacted


@pytest.mark.parametrize(
    "words", [["--pid", "x"], ["--pid", "0"], ["a.gguf", "b.gguf"], ["--deeper"]]
)
def test_what_cannot_be_understood_is_usage(numaload: Numaload, words: list[str]) -> None:
    assert numaload("doctor", *words, status=2).stdout == ""


def test_the_command_says_what_the_call_returns(numaload: Numaload, model: str) -> None:
    found = json.loads(numaload("doctor", model, "--json", status=(0, 1)).stdout)
    called = api.diagnose(model).to_dict()
    assert found.keys() == called.keys()
    assert found["size"] == called["size"]
    assert found["path"] == os.path.abspath(model)
    assert found["threads"] is None


def test_the_machine_alone_is_looked_at(numaload: Numaload) -> None:
    found = json.loads(numaload("doctor", "--json", status=(0, 1)).stdout)
    assert (found["path"], found["size"], found["load_s"]) == (None, 0, None)
    assert found["checked"] > 5


def test_the_block_to_paste_names_nobody(numaload: Numaload, model: str, tmp_path: Path) -> None:
    folder = tmp_path / "of-somebody"
    folder.mkdir()
    shutil.copyfile(model, folder / "secret-weights.gguf")
    with (folder / "secret-weights.gguf").open("r+b") as file:
        file.truncate(1 << 20)  # so that there is a finding, with the path in it
    done = numaload("doctor", folder / "secret-weights.gguf", "--report", status=1)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("```", "```")
    assert "NL109" in done.stdout
    for word in ("of-somebody", "secret", str(tmp_path), socket.gethostname()):
        assert word not in done.stdout


def test_other_folders_are_left_out_too() -> None:
    seen = "loop0 reads '/srv/a team/anna.img' and /home/bo/x, see /sys/block/loop0/loop/dio"
    assert PATH.sub("PATH", seen) == "loop0 reads PATH and PATH, see /sys/block/loop0/loop/dio"


def test_an_empty_file_is_not_whole(numaload: Numaload, tmp_path: Path) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert "NL109" in numaload("doctor", empty, status=1).stdout


def test_a_folder_that_lacks_a_shard_is_named(numaload: Numaload, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "missing" in numaload("doctor", tmp_path, status=3).stderr


def test_a_quoted_path_is_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["numaload", "mirror", "/a folder/with/it's/a long name of several words.gguf", "--x"]
    fix = f"see what fits; then: {shlex.join(words)}  # as often as it is used"
    show_remedy("fix", fix, 40, root=False)
    first, *command, remark = capsys.readouterr().out.splitlines()
    assert first == "   fix  see what fits; then:"
    assert shlex.split(" ".join(line.removesuffix(" \\") for line in command)) == words
    assert remark == "        # as often as it is used"


@pytest.mark.parametrize(
    "name", ["/m/a  # b", "/m/my: rm x", "/it's: cp  # '", "/m/\u65e5 \U0001f600"]
)
@pytest.mark.parametrize("sentence", ["", "the file's own; then:", "the engines' one, or:"])
def test_a_name_does_not_divide_a_remedy(name: str, sentence: str) -> None:
    command = f"numaload mirror --x={shlex.quote(name)} {shlex.quote(name)}"
    text = f"{sentence} {command}  # it's a remark".lstrip()
    assert remedy(text, root=False) == (sentence, command, "it's a remark")
    said = f"start it with {shlex.quote(f'{name}: rm x')} again"
    assert remedy(said, root=False) == (said, "", "")


@pytest.mark.parametrize("name", ["/m/nb\xa0sp", "/m/a\nb", "/m/\udcff", "/m/" + "x" * 4000])
def test_a_command_that_cannot_be_printed_is_not_printed(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    show_remedy("fix", f"then: numaload mirror {shlex.quote(name)}  # often", 80, root=True)
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("fix then: a command that cannot be printed, ")
    assert said.endswith("--json has it (as root) # often")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("filer.example.org:/of/anna (nfs4)", "SERVER:/EXPORT (nfs4)"),
        ("monitors 10.1.2.3:6789, anna@filer:/m", "monitors ADDRESS, SERVER:/EXPORT"),
        ("served by 10.1.2.3 and [fe80::1]:/x", "served by ADDRESS and SERVER:/EXPORT"),
        ("fe80::1 and fe80:0:0:1:2:3:4:5 are there", "ADDRESS and ADDRESS are there"),
        (
            "GPU 0000:ae:00.0: 2.5 GT/s, read_ahead_kb is 128",
            "GPU 0000:ae:00.0: 2.5 GT/s, read_ahead_kb is 128",
        ),
        (
            "/data/anna/Qwen-00001-of-00002.gguf: cut short",
            "FOLDER/MODEL-00001-of-00002.gguf: cut short",
        ),
    ],
)
def test_names_are_replaced(text: str, expected: str) -> None:
    assert redacted(text, "/data/anna/Qwen-00001-of-00002.gguf") == expected
