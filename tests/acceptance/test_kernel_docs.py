"""What README.md and docs/kernels.md show of kernels: made from figures and sources, musts met."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from numaload.bench.wanted import findings
from numaload.kernels import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """scripts/dequant_figures.py"""
    path = ROOT / "scripts/dequant_figures.py"
    spec = importlib.util.spec_from_file_location("dequant_figures", path)
    assert spec
    assert spec.loader
    module = sys.modules["dequant_figures"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["README.md", "docs/kernels.md"])
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
    assert "docs/dequant.svg" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "docs/dequant.svg").stat().st_size > 10_000


def test_every_must_is_met_and_measured(figures: ModuleType) -> None:
    """In the figures that are shown; a missed goal is told there too."""
    found = findings(figures.report())
    assert {f.wish.baseline for f in found} == {
        "ggml", "native", "gguf-py", "float16", "bfloat16", "threads", "two callers", "past caches",
    }  # fmt: skip
    assert [str(f) for f in found if f.wish.level == "must" and not f.met] == []
    assert figures.report().same
    assert len(figures.report().rows) == 28


def test_how_to_add_a_type_names_files_that_are_there() -> None:
    section = (ROOT / "docs/kernels.md").read_text(encoding="utf-8").split("## To add a type")[1]
    section = section.split("## Figures")[0]
    named = {word for word in section.split("`") if "/" in word and word.endswith(".py")}
    assert len(named) >= 6
    assert all((ROOT / path).exists() for path in named), named
