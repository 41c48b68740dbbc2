"""`numaload bench dequant`: a readable table per type, with its baselines, machine and versions."""

from __future__ import annotations

from pathlib import Path

import pytest

import numaload as package
from commands import Numaload
from numaload.bench import dequant, wanted
from numaload.bench.dequant import DequantReport, Row
from numaload.errors import UsageError

FEW = ("--qtype", "q4_k,Q1_0,F32", "--rounds", "1")


@pytest.fixture(scope="module")
def two_cpus() -> None:
    if len(package.topology().cpus) < 2:
        pytest.skip("two CPUs are needed")


def test_a_line_for_each_type_and_every_baseline(numaload: Numaload) -> None:
    done = numaload("bench", "dequant", *FEW)
    lines = done.stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("type "))
    for column in ("float32 Gw/s", "GB/s", "x fill", "x past caches", "x memcpy", "x gguf-py",
                   "float16 Gw/s", "bfloat16 Gw/s"):  # fmt: skip
        assert column in lines[start]
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["Q4_K", "Q1_0", "F32"]
    assert len({len(line) for line in lines[start : start + 4]}) == 1
    for said in ("processor ", "numba ", "gguf ", "huge pages ", "16 Mi weights", "must: 10 times"):
        assert said in done.stdout


def test_json_is_the_apis_report(numaload: Numaload) -> None:
    report = numaload.json("bench", "dequant", *FEW, "--dtype", "bfloat16")
    assert [row["qtype"] for row in report["rows"]] == ["Q4_K", "Q1_0", "F32"]
    quantized, binary, plain = report["rows"]
    assert quantized["bits_per_weight"] == 4.5
    assert {"bfloat16", "float32", "gguf-py", "fill", "past caches", "memcpy"} <= set(
        quantized["rates"]
    )
    assert quantized["same"] == {"gguf-py": True, "gguf-py warm": True, "bfloat16": True}
    # Of float32, in whatever order dtypes are named.
    for name in ("fill", "gguf-py"):
        ratio = quantized["rates"]["float32"] / quantized["rates"][name]
        assert quantized["ratios"][name] == pytest.approx(ratio)
    ratio = quantized["rates"]["bfloat16"] / quantized["rates"]["float32"]
    assert quantized["ratios"]["bfloat16"] == pytest.approx(ratio)
    assert "gguf-py" not in binary["rates"]  # which does not have it
    assert "gguf-py" not in plain["rates"]  # which only looks at it in another way
    assert set(report["baselines"]) == {"fill", "past caches", "memcpy"}
    assert report["machine"]["numaload"] == package.__version__
    assert all(rate > 0 for row in report["rows"] for rate in row["rates"].values())


def test_several_threads(numaload: Numaload, two_cpus: None) -> None:
    report = numaload.json("bench", "dequant", "--qtype", "Q8_0", "--rounds", "1", "--threads", 2)
    (row,) = report["rows"]
    assert row["rates"]["threads"] > 0
    assert row["ratios"]["threads"] > 0
    assert row["same"]["threads"] is True
    assert "2 threads Gw/s" in numaload("bench", "dequant", "--qtype", "Q8_0", "--rounds", "1",
                                        "--threads", 2).stdout  # fmt: skip


def test_a_plot(numaload: Numaload, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "out.svg"
    numaload("bench", "dequant", *FEW, "--plot", path)
    text = path.read_text()
    assert text.startswith("<?xml")
    for word in ("Q4_K", "Q1_0", "F32", "gguf-py", "Gweights/s"):
        assert word in text


WRONG: dict[str, tuple[tuple[object, ...], str]] = {
    "type": (("--qtype", "Q4_K,Q9_K"), "type Q9_K: expected one of F32, F16"),
    "type-without-floats": (("--qtype", "I32"), "type I32: expected one of"),
    "dtype": (("--dtype", "float64"), "dtype float64: expected float32, float16, bfloat16"),
    "no-threads": (("--threads", 0), "threads 0: expected 1 to"),
    "threads": (("--threads", 100_000), "threads 100000: expected 1 to"),
    "rounds": (("--rounds", 0), "rounds 0: expected at least 1"),
    "plot": (("--plot", "/nowhere/x.svg"), "/nowhere cannot be written to"),
    "plot-nowhere": (("--plot", ""), "expected a name that ends in .svg"),
    "no-type": (("--qtype", ""), "type : expected one of"),
    "library-named-as-ours": (("--ggml", "float32=x.so"), "ggml named 'float32': expected another"),
    "library-without-a-name": (("--ggml", "=x.so"), "ggml named '': expected another name"),
    "two-libraries": (
        ("--ggml", "a.so", "--ggml", "b.so"),
        "--ggml b.so: one is named ggml already",
    ),
    "plot-ending": (("--plot", "x.doc"), "x.doc: expected a name that ends in .svg"),
}


@pytest.mark.parametrize(("words", "said"), WRONG.values(), ids=WRONG)
def test_wrong_words_are_refused_at_once(
    numaload: Numaload, words: tuple[object, ...], said: str
) -> None:
    if "--plot" in words:
        pytest.importorskip("matplotlib")
    assert said in numaload("bench", "dequant", *words, status=2).stderr


def test_without_matplotlib_the_extra_is_named(numaload: Numaload) -> None:
    hidden = "import sys; sys.modules['matplotlib'] = None; from numaload.cli.main import main;"
    program = (
        f"{hidden} import json; print(json.dumps(main(['bench', 'dequant', '--plot', 'x.svg'])))"
    )
    assert numaload.python(program) == 2


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF nothing"], ids=["none", "empty", "junk"])
def test_a_library_that_is_none(numaload: Numaload, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "libggml-base.so"
    if content is not None:
        path.write_bytes(content)
    done = numaload("bench", "dequant", *FEW, "--ggml", path, status=1)
    assert f"{path}: it cannot be loaded as libggml-base.so" in done.stderr


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
    import subprocess

    compiler = shutil.which("cc")
    if not compiler:
        pytest.skip("a C compiler is needed: sudo apt-get install -y gcc")
    source, library = tmp_path / "x.c", tmp_path / "other.so"
    source.write_text(STRANGER)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    done = numaload(
        "bench", "dequant", "--qtype", "Q8_0,Q5_0,Q4_K", "--rounds", 1,
        "--ggml", f"other={library}", status=1,
    )  # fmt: skip
    for name in ("Q8_0", "Q5_0"):  # the one that writes nothing has not our result
        assert f"{name}: other is not the same, bit for bit" in done.stderr
    assert "Q4_K: " not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("Q4_K")]
    assert " - " in line


# What is wanted, on reports that say what they like ---------------------------------------------


def report_of(**ratios: dict[str, float]) -> DequantReport:
    rows = [Row(name, 1.0, {}, found, {}) for name, found in ratios.items()]
    return DequantReport({}, 0, 0, 1, {}, {}, rows)


def verdicts(report: DequantReport) -> dict[str, bool]:
    return {f"{f.wish.level} {f.wish.baseline} {f.wish.least:.2f}": f.met
            for f in wanted.findings(report)}  # fmt: skip


def test_what_is_missed_is_said() -> None:
    report = report_of(Q4_K={"ggml": 0.9, "gguf-py": 11.0}, IQ2_S={"ggml": 7.0, "gguf-py": 9.9})
    assert verdicts(report) == {"must ggml 1.00": False, "must ggml 6.00": True,
                                "must gguf-py 10.00": False}  # fmt: skip
    text = [str(finding) for finding in wanted.findings(report)]
    assert "must: as fast as ggml as shipped: 0.90 (Q4_K), wanted 1.00: MISSED" in text


def test_f16_need_not_be_ten_times_gguf_py() -> None:
    assert verdicts(report_of(F16={"gguf-py": 3.0}, Q8_0={"gguf-py": 10.5})) == {
        "must gguf-py 10.00": True
    }


def test_the_median_counts_for_the_median() -> None:
    ratios = [0.5, 0.8, 0.9]
    report = report_of(**{f"T{i}": {"past caches": ratio} for i, ratio in enumerate(ratios)})
    assert verdicts(report) == {"goal past caches 0.45": True, "goal past caches 0.75": True}


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
