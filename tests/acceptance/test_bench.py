"""`numaload bench dequant`: a readable table per type, with its baselines, machine and versions."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import numaload as package
from commands import Numaload, command_lines
from numaload.bench import dequant, table
from numaload.errors import UsageError

FEW = ("--qtype", "q4_k,Q1_0,F32", "--rounds", "1")
THREADS = min(2, len(package.topology().cpus))


@pytest.mark.fast
def test_a_line_for_each_type_and_every_baseline(numaload: Numaload) -> None:
    done = numaload("bench", "dequant", *FEW, "--threads", THREADS)
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("type "))
    for column in ("float32 Gw/s", "GB/s", "x fill", "x past caches", "x memcpy", "x gguf-py",
                   "float16 Gw/s", "bfloat16 Gw/s"):  # fmt: skip
        assert column in lines[start]
    assert ("2 threads Gw/s" in lines[start]) == (THREADS == 2)
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["Q4_K", "Q1_0", "F32"]
    assert len({len(line) for line in lines[start : start + 4]}) == 1
    for said in ("processor ", "numba ", "gguf ", "huge pages ", "16 Mi weights"):
        assert said in done.stdout
    for level in ("must", "goal", "MISSED", "wanted"):  # the maintainers' scripts know those
        assert level not in done.stdout + done.stderr


def test_json_is_the_apis_report_and_the_plot_is_drawn(numaload: Numaload, tmp_path: Path) -> None:
    path = tmp_path / "out.svg"
    pytest.importorskip("matplotlib")
    words = (*FEW, "--dtype", "bfloat16", "--threads", THREADS, "--plot", path)
    report = numaload.json("bench", "dequant", *words)
    assert [row["qtype"] for row in report["rows"]] == ["Q4_K", "Q1_0", "F32"]
    check_report(report)
    text = path.read_text()
    assert text.startswith("<?xml")
    for word in ("Q4_K", "Q1_0", "F32", "gguf-py", "Gweights/s"):
        assert word in text


def check_report(report: dict[str, Any]) -> None:
    quantized, binary, plain = report["rows"]
    assert quantized["bits_per_weight"] == 4.5
    assert {"bfloat16", "float32", "gguf-py", "fill", "past caches", "memcpy"} <= set(
        quantized["rates"]
    )
    several = {"threads": True} if THREADS == 2 else {}
    assert quantized["same"] == {"gguf-py": True, "gguf-py warm": True, "bfloat16": True} | several
    # Of float32, in whatever order dtypes are named.
    for name in ("fill", "gguf-py"):
        ratio = quantized["rates"]["float32"] / quantized["rates"][name]
        assert quantized["ratios"][name] == pytest.approx(ratio)
    ratio = quantized["rates"]["bfloat16"] / quantized["rates"]["float32"]
    assert quantized["ratios"]["bfloat16"] == pytest.approx(ratio)
    assert "gguf-py" not in binary["rates"]  # which does not have it
    assert "gguf-py" not in plain["rates"]  # which only looks at it in another way
    past_caches = {"threads past caches"} if several else set()
    assert set(report["baselines"]) == {"fill", "past caches", "memcpy"} | past_caches
    assert report["machine"]["numaload"] == package.__version__
    assert all(rate > 0 for row in report["rows"] for rate in row["rates"].values())
    assert all(row["ratios"]["threads"] > 0 for row in report["rows"] if several)


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "type": (("--qtype", "Q4_K,Q9_K"), "type Q9_K: expected one of F32, F16"),
    "type-without-floats": (("--qtype", "I32"), "type I32: expected one of"),
    "dtype": (("--dtype", "float64"), "dtype float64: expected float32, float16, bfloat16"),
    "no-threads": (("--threads", "0"), "threads 0: expected 1 to"),
    "threads": (("--threads", "100000"), "threads 100000: expected 1 to"),
    "rounds": (("--rounds", "0"), "rounds 0: expected at least 1"),
    "plot-nowhere": (("--plot", ""), "expected a name that ends in .svg"),
    "no-type": (("--qtype", ""), "type : expected one of"),
    "library-named-as-ours": (("--ggml", "float32=x.so"), "ggml named 'float32': expected another"),
    "library-without-a-name": (("--ggml", "=x.so"), "ggml named '': expected another name"),
    "two-libraries": (
        ("--ggml", "a.so", "--ggml", "b.so"),
        "--ggml b.so: one is named ggml already",
    ),
    "plot-ending": (("--plot", "x.doc"), "x.doc: expected a name that ends in .svg"),
    "plot-tex": (("--plot", "x.pgf"), "x.pgf: expected a name that ends in .svg"),
}


def test_wrong_words_are_refused_at_once(numaload: Numaload) -> None:
    pytest.importorskip("matplotlib")
    lines = [("bench", "dequant", *words) for words, _ in WRONG.values()]
    for (_, said), (status, _, told) in zip(
        WRONG.values(), command_lines(numaload, lines), strict=True
    ):
        assert (status, said in told) == (2, True), told


def test_a_plot_replaces_a_whole_file_or_nothing(numaload: Numaload, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "fifo.svg")
    (tmp_path / "full.svg").symlink_to("/dev/full")
    for name in ("fifo.svg", "full.svg"):  # neither is opened
        with pytest.raises(UsageError, match=f"{name} cannot be written to as a file"):
            table.check_plot(str(tmp_path / name))
    earlier = tmp_path / "earlier.svg"
    earlier.write_text("a picture")
    words = ("bench", "dequant", "--qtype", "F16", "--dtype", "float32", "--rounds", "1")
    limited = f"""
import json, resource
from numaload.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
print(json.dumps(main.main({[*words, "--json", "--plot", str(earlier)]!r})))
"""
    done = subprocess.run(
        [sys.executable, "-c", limited], capture_output=True, text=True, check=True,
        env=numaload.environment,
    )  # fmt: skip
    assert f"--plot {earlier}: File too large" in done.stderr
    assert done.stdout.endswith("\n1\n")
    with pytest.raises(OSError, match="/nowhere cannot be written to"):
        table.check_plot("/nowhere/x.svg")
    assert earlier.read_text() == "a picture"
    assert len(os.listdir(tmp_path)) == 3


def test_without_matplotlib_the_extra_is_named(numaload: Numaload) -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None; from numaload.cli.main import main;"
    program = (
        f"{hidden} import json; print(json.dumps(main(['bench', 'dequant', '--plot', 'x.svg'])))"
    )
    assert numaload.python(program) == 2


def test_a_library_that_is_none(numaload: Numaload, tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "junk").write_bytes(b"\x7fELF nothing")
    paths = [str(tmp_path / name) for name in ("none", "empty", "junk")]
    lines = [("bench", "dequant", *FEW, "--ggml", path) for path in paths]
    for path, (status, _, told) in zip(paths, command_lines(numaload, lines), strict=True):
        assert status == 1
        assert f"{path}: it cannot be loaded as libggml-base.so" in told
    spec = find_spec("xxhash._xxhash")  # a library, but of something else
    assert spec
    other = str(spec.origin)
    done = numaload("bench", "dequant", *FEW, "--ggml", other, status=1)
    assert f"{other}: it has no dequantize_row_q8_0" in done.stderr


def test_without_jit_there_is_nothing_to_measure(
    numaload: Numaload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    assert "kernels are Python" in numaload("bench", "dequant", *FEW, status=2).stderr


STRANGER = """
void dequantize_row_q8_0(const void *x, float *y, long k) { while (k--) y[k] = 7; }
void dequantize_row_q5_0(const void *x, float *y, long k) { }
"""


def test_another_librarys_floats_are_compared(numaload: Numaload, tmp_path: Path) -> None:
    """One that computes something else: said, and exit status 1. It lacks other types: a dash."""
    import shutil

    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("a C compiler is needed: sudo apt-get install -y gcc")
    source, library = tmp_path / "x.c", tmp_path / "other.so"
    source.write_text(STRANGER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    done = numaload(
        "bench", "dequant", "--qtype", "Q8_0,Q5_0,Q4_K", "--dtype", "float32", "--rounds", 1,
        "--ggml", f"other={library}", status=1,
    )  # fmt: skip
    for name in ("Q8_0", "Q5_0"):  # the one that writes nothing has not our result
        assert f"{name}: other is not the same, bit for bit" in done.stderr
    assert "Q4_K: " not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Q4_K")]
    assert " - " in line


def test_the_api_refuses_what_the_command_line_does() -> None:
    with pytest.raises(UsageError, match="expected one of"):
        dequant.measure(["Q9_K"])


def test_nothing_heavy_is_imported_for_help(numaload: Numaload) -> None:
    program = (
        "import sys, json, contextlib, io\nfrom numaload.cli.main import main\n"
        "with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):\n"
        "    main(['bench', 'dequant', '--help'])\n"
        "print(json.dumps(sorted({'numpy', 'numba', 'gguf', 'llvmlite'} & set(sys.modules))))"
    )
    assert numaload.python(program) == []
