"""Check that docs/types.md and docs/kernels.md show what figures and sources say, musts met."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from numaload.bench.dequant import DequantReport, Row
from numaload.kernels import registry
from script_modules import script

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    return script("dequant_figures")


@pytest.mark.parametrize("name", ["docs/types.md", "docs/kernels.md"])
def test_tables_are_those_of_the_figures(figures: ModuleType, name: str) -> None:
    """After a change: scripts/dequant_figures.py."""
    assert figures.renewed(ROOT / name) == (ROOT / name).read_text(encoding="utf-8")


def test_every_type_is_in_both(figures: ModuleType) -> None:
    for path in figures.PARTS:
        text = path.read_text(encoding="utf-8")
        for qtype in registry.KERNELS:
            assert f"| {qtype.name} |" in text
    layouts = figures.layouts()
    assert all(f"\n{qtype.name}, " in layouts for qtype in registry.KERNELS)
    assert "(dequant.svg)" in (ROOT / "docs/types.md").read_text(encoding="utf-8")
    assert (ROOT / "docs/dequant.svg").stat().st_size > 10_000


def test_every_must_is_met_and_measured(figures: ModuleType) -> None:
    """In the figures that are shown."""
    found = figures.judged(figures.report())
    assert {f.level.baseline for f in found} == {
        "ggml", "native", "gguf-py", "float16", "bfloat16", "threads", "two callers", "past caches",
    }  # fmt: skip
    assert [str(f) for f in found if f.level.level == "must" and not f.met] == []
    assert figures.report().same
    assert len(figures.report().rows) == 28


def test_how_to_add_a_type_names_files_that_are_there() -> None:
    section = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").split("## To add a type")[1]
    section = section.split("## Figures")[0]
    named = {word for word in section.split("`") if "/" in word and word.endswith(".py")}
    assert len(named) >= 6
    assert all((ROOT / path).exists() for path in named), named


# Levels, on reports that say what they like ------------------------------------------------------


def report_of(**ratios: dict[str, float]) -> DequantReport:
    rows = [Row(name, 1.0, {}, found, {}) for name, found in ratios.items()]
    return DequantReport({}, 0, 0, 1, {}, {}, rows)


def verdicts(figures: ModuleType, report: DequantReport) -> dict[str, bool]:
    return {f"{f.level.level} {f.level.baseline} {f.level.least:.2f}": f.met
            for f in figures.judged(report)}  # fmt: skip


def test_what_is_missed_is_said(figures: ModuleType) -> None:
    report = report_of(Q4_K={"ggml": 0.9, "gguf-py": 11.0}, IQ2_S={"ggml": 7.0, "gguf-py": 9.9})
    assert verdicts(figures, report) == {"must ggml 1.00": False, "must ggml 6.00": True,
                                         "must gguf-py 10.00": False}  # fmt: skip
    text = [str(finding) for finding in figures.judged(report)]
    assert "must: as fast as ggml as shipped: 0.90 (Q4_K), wanted 1.00: MISSED" in text


def test_f16_need_not_be_ten_times_gguf_py(figures: ModuleType) -> None:
    assert verdicts(figures, report_of(F16={"gguf-py": 3.0}, Q8_0={"gguf-py": 10.5})) == {
        "must gguf-py 10.00": True
    }


def test_the_median_counts_for_the_median(figures: ModuleType) -> None:
    ratios = [0.5, 0.8, 0.9]
    report = report_of(**{f"T{i}": {"past caches": ratio} for i, ratio in enumerate(ratios)})
    assert verdicts(figures, report) == {
        "goal past caches 0.45": True, "goal past caches 0.75": True,
    }  # fmt: skip
