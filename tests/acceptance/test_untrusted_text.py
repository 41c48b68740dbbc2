"""Names and values that anybody may have written: in everything that is printed or raised.

A terminal obeys escape sequences, shows text after U+202E backwards and U+200B not at all; rich and
% formatting have signs of their own. All of that is shown as it is written, none of it is obeyed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import gguf_builder as gb
import numaload as api
import safetensors_builder as sb
from commands import LIMIT_S, Numaload
from numaload import errors
from numaload.backends.kt_kernel import Loader
from numaload.backends.kt_kernel.workers import Worker
from numaload.backends.ktransformers import SafeTensorLoader
from numaload.backends.lora import open_adapter
from numaload.cli.output import print_table, say
from numaload.errors import LONGEST, printable
from numaload.linux.mounts import Mount
from numaload.machine.devices import Device

CONTROL = "\x00\x07\n\r\t\x1b]0;P\x07\x1b[2J\x7f\x85\x9b2J"
HIDDEN = "\u200b\u202a\u202e\u2066\u2069\u2028\u2029\ufeff\udcff"
MARKUP = "[red]x[link=y]%s%(a)d{0}{x}\\"
PLAIN = "模型-Ж-😀"
EVIL = CONTROL.replace("\0", "") + HIDDEN + MARKUP + PLAIN  # may be a file's name
TEXT = EVIL.replace("\udcff", "")  # may be in a header


def safe(text: str) -> bool:
    """Whether it is lines that a terminal shows as they are, none of them without end."""
    lines = text.replace("\t", " ").split("\n")  # of errors that have a line for each parameter
    return all(line.isprintable() and len(line) < LONGEST + 200 for line in lines)


def test_what_a_terminal_obeys_or_hides_is_escaped() -> None:
    shown = printable(CONTROL + HIDDEN)
    assert shown.isascii()
    assert shown.isprintable()
    assert shown.startswith(r"\x00\x07\n\r\t\x1b]0;P\x07\x1b[2J\x7f\x85\x9b2J\u200b\u202a\u202e")
    assert shown.endswith(r"\ufeff\udcff")
    assert printable(MARKUP + PLAIN) == MARKUP + PLAIN


@pytest.mark.parametrize("text", ["a" * 5000, "\x1b" * 5000, "\x1b" * 1900, "😀" * 10**6])
def test_the_middle_of_long_text_is_left_out(text: str) -> None:
    shown = printable(f"first {text} last")
    assert len(shown) == LONGEST
    assert shown.startswith("first ")
    assert shown.endswith(" last")
    assert "characters)..." in shown


@pytest.mark.parametrize("text", ["", EVIL, MARKUP, "\x1b" * 5000, r"\x1b", "a" * LONGEST])
def test_text_that_is_printable_stays_as_it_is(text: str) -> None:
    assert printable(printable(text)) == printable(text)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of an evil name, with an evil model of each format in it."""
    folder = tmp_path / EVIL
    folder.mkdir()
    rows = [gb.tensor(f"blk.0.{TEXT}"), gb.tensor(TEXT, type_id=133, offset=128)]
    entries = [gb.entry(name, gb.STRING, gb.string(TEXT)) for name in ("general.name", TEXT)]
    (folder / f"{EVIL}.gguf").write_bytes(gb.build(entries, rows, bytes(256)))
    tables = {TEXT: ("F32", (2,)), "t": ("F32", (2,))}
    (folder / f"{EVIL}.safetensors").write_bytes(sb.model(tables, {TEXT: TEXT}))
    return folder


VERBS: list[Sequence[str]] = [
    ("inspect", "--metadata"), ("nodes",), ("plan",), ("mirror",), ("status", "--tensors"),
    ("verify",), ("release",), ("prewarm",), ("prewarm", "--tensors", EVIL), ("evict",),
    ("prewarm", "--lock"), ("release",), ("doctor", "--deep"), ("doctor", "--report"),
    ("bench", "read", "--ways", EVIL),
]  # fmt: skip


@pytest.mark.parametrize("suffix", [".gguf", ".safetensors"])
def test_every_verb_shows_names_escaped(numaload: Numaload, folder: Path, suffix: str) -> None:
    path = folder / (EVIL + suffix)
    for words in VERBS:
        done = run(numaload, *words, path)
        assert safe(done.stdout + done.stderr), words
        assert "Traceback" not in done.stderr, done.stderr
    assert PLAIN in numaload("inspect", path).stdout
    assert json.loads(numaload("inspect", path, "--json").stdout)["files"][0]["path"] == str(path)


@pytest.mark.parametrize("verb", ["inspect", "plan", "prewarm", "evict", "nodes", "release"])
def test_every_verb_shows_names_of_what_is_not_there_escaped(
    numaload: Numaload, tmp_path: Path, verb: str
) -> None:
    done = run(numaload, verb, tmp_path / EVIL)
    assert done.returncode == 1
    assert safe(done.stdout + done.stderr)
    assert PLAIN in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        (EVIL,), ("inspect", "m", EVIL), (f"--{EVIL}",), ("prewarm", "m", "--threads", EVIL),
        ("prewarm", "m", "--chunk", "9" * 5000), ("prewarm", "m", "--way", EVIL),
        ("mirror", "m", "--nodes", EVIL), ("prewarm", "m", "--io-timeout", EVIL),
        ("doctor", "--pid", "9" * 4000), ("bench", "dequant", "--qtype", EVIL),
        ("bench", "dequant", "--plot", EVIL), ("bench", "read", "m", "--threads", "9" * 5000),
    ],
    ids=lambda words: words[0] if words[0].isprintable() else "verb",
)  # fmt: skip
def test_arguments_are_repeated_escaped(numaload: Numaload, words: Sequence[str]) -> None:
    done = run(numaload, *words)
    assert done.returncode == 2
    assert safe(done.stderr)
    assert done.stdout == ""


def run(numaload: Numaload, *words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        numaload.command(*words), capture_output=True, text=True, env=numaload.environment,
        errors="surrogateescape", timeout=LIMIT_S, check=False,
    )  # fmt: skip


# Its main thread may run on one core, as OpenMP libraries pin it: that is a finding, variables too.
NAMED = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
with open("/proc/self/comm", "wb") as file:
    file.write(b"\\x1b[2J\\xe2\\x80\\xae\\xff%s\\n")
print(flush=True)
sys.stdin.read()
"""


def test_names_of_processes_are_shown_escaped(numaload: Numaload) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", NAMED], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {"OMP_PROC_BIND": "true", "OMP_PLACES": EVIL},
    ) as process:  # fmt: skip
        assert process.stdout
        process.stdout.readline()
        shown = [run(numaload, "doctor", "--pid", process.pid, *how) for how in ((), ("--report",))]
        process.kill()
    for done in shown:
        assert done.returncode in (0, 1)
        assert safe(done.stdout + done.stderr)
    name = r"\x1b[2J\u202e\udcff%s\n"
    assert shown[0].stdout.startswith(f"process {process.pid}: {name}\n")
    assert f"1  {name} (main)" in shown[0].stdout


@pytest.fixture
def weights(folder: Path) -> api.Weights:
    return api.open(folder / f"{EVIL}.gguf")


def a_link_to_nothing(folder: Path) -> Any:
    (folder / EVIL).symlink_to(f"{EVIL}-00001-of-99999.gguf")
    return api.open(folder / EVIL)


def an_index(folder: Path) -> Any:
    names = {f"{TEXT}{i}": f"{TEXT}{i}.safetensors" for i in range(100)}
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    return api.open(path)


def a_long_index(folder: Path) -> Any:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"t": "\x1b" * 10**6}}))
    return api.open(path)


def splits(folder: Path, *second: bytes) -> Any:
    for number, entries in (
        (0, [gb.entry("general." + TEXT, gb.STRING, gb.string("a"))]),
        (1, second),
    ):
        head = [gb.u32("split.count", 2), *([gb.u32("split.no", number)] * (number == 0))]
        path = folder / f"{EVIL}-0000{number + 1}-of-00002.gguf"
        path.write_bytes(gb.build([*head, *entries]))
    return api.open(folder / f"{EVIL}-00001-of-00002.gguf")


def a_long_path(folder: Path) -> Any:
    deep = folder
    for _ in range(5):
        deep /= "m" * 250
    deep.mkdir(parents=True)
    (deep / "m.gguf").write_bytes(gb.build([gb.u32("general.alignment", 3)]))
    return api.open(deep / "m.gguf")


RAISED: dict[str, Callable[[Path], Any]] = {
    "absent": lambda folder: api.open(folder / (EVIL * 3)),
    "absent-split": lambda folder: api.open(folder / f"{EVIL}-00001-of-00002.gguf"),
    "link": a_link_to_nothing,
    "path": a_long_path,
    "index": an_index,
    "long-index": a_long_index,
    "split.no": lambda f: splits(f, gb.entry("split.no", gb.STRING, gb.string(TEXT * 10**5))),
    "kin": lambda f: splits(
        f, gb.u32("split.no", 1), gb.entry("general." + TEXT, gb.STRING, gb.string("b" * 10**6))
    ),
    "tensor": lambda folder: api.open(folder / f"{EVIL}.gguf")[EVIL * 10**5],
    "metadata": lambda folder: api.open(folder / f"{EVIL}.gguf").metadata[EVIL],
    "number": lambda folder: api.open(folder / f"{EVIL}.gguf")[0],  # type: ignore[index]
    "type": lambda folder: api.open(folder / f"{EVIL}.gguf")[TEXT].dequantize(),
    "prewarm": lambda folder: api.prewarm(folder / f"{EVIL}.gguf", tensors=EVIL),
    "layers": lambda folder: api.prewarm(folder / f"{EVIL}.gguf", layers="0," * 10**6 + EVIL),
    "attach": lambda folder: api.attach(folder / f"{EVIL}.gguf"),
    "adapter": lambda folder: open_adapter(folder / f"{EVIL}.safetensors"),
    "kt-kernel": lambda folder: Loader([api.open(folder / f"{EVIL}.gguf")])
    .get_ggml_type(EVIL),
}  # fmt: skip


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("what", RAISED)
def test_errors_of_the_api_are_safe_to_print(folder: Path, what: str) -> None:
    with pytest.raises(errors.NumaloadError) as caught:
        RAISED[what](folder)
    error = caught.value
    shown = "".join(traceback.format_exception_only(error)).rstrip("\n")
    for text in (str(error), repr(error), shown):
        assert safe(text), text
        assert len(text.encode()) < 3 * LONGEST + 200


def test_the_error_of_a_long_path_says_what_is_wrong(folder: Path) -> None:
    with pytest.raises(errors.MetadataError, match=r"general.alignment is 3, expected") as caught:
        a_long_path(folder)
    assert caught.value.path.endswith("/m.gguf")  # type: ignore[union-attr]
    assert "characters)..." in str(caught.value)


def test_missing_keys_are_as_many_as_can_be_read() -> None:
    missing = [f"{EVIL}{i}" for i in range(10_000)]
    lines = "".join(f"\n\tsize mismatch for {printable(name)}" for name in missing)
    error = errors.StateDictError(f"Error(s) in loading {EVIL}:{lines}", missing=missing)
    assert safe(str(error))
    assert str(error).count("\n\t") == 6
    assert str(error).endswith("\n\tand 9995 more")
    assert error.missing == missing


def test_warnings_are_safe_to_print() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        errors.warn_once(f"test-{EVIL}", EVIL * 10**4)
    assert safe(str(caught[0].message))


def test_what_objects_say_of_themselves_is_safe_to_print(weights: api.Weights) -> None:
    worker = Worker(1, EVIL, 0, [0], [0])
    network = Mount("0:1", EVIL, "nfs", source=f"{EVIL}:/export")
    device = Device("network", EVIL, EVIL)
    for one in (weights, weights[TEXT], worker, network, device):
        assert safe(str(one)), type(one)
        assert safe(repr(one)), type(one)


def test_a_table_shows_names_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_table([EVIL], [[EVIL], ["\x1b" * 10**6]])
    say(EVIL)
    out = capsys.readouterr().out
    assert safe(out)
    assert out.count("\n") == 4


def test_metadata_of_kt_kernel_s_loader_is_printed_escaped(
    weights: api.Weights, capsys: pytest.CaptureFixture[str]
) -> None:
    Loader([weights]).print_metadata()
    out = capsys.readouterr().out
    assert safe(out)
    assert PLAIN in out


def test_braces_in_names_stand_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    layer = "model.{0}{x}%s"
    names = [f"{layer}.experts.{i}.{p}_proj.weight" for i in (0, 1) for p in ("up", "gate", "down")]
    path = tmp_path / "m.safetensors"
    path.write_bytes(sb.model(dict.fromkeys(names, ("F32", (2, 2)))))
    found = SafeTensorLoader(tmp_path).load_experts(f"{layer}.experts")
    assert found["down"].shape[0] == 2
