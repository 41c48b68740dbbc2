"""scripts/measure: what it counts, on small sources."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A module."""

import os  # a comment


def f():
    """Return nothing."""
    # another one
    return """two
    lines"""
'''
IMPORTS = """
from typing import TYPE_CHECKING
import a.b
if TYPE_CHECKING:
    from a import d
def f():
    from a import c
"""


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    loader = SourceFileLoader("measure", str(ROOT / "scripts/measure"))
    spec = importlib.util.spec_from_loader("measure", loader)
    assert spec
    module = sys.modules["measure"] = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_lines_without_docstrings_are_counted(measure: ModuleType) -> None:
    assert measure.lines_of(SOURCE, ast.parse(SOURCE)) == (4, 2)


def test_imports_inside_functions_count_and_those_for_types_do_not(measure: ModuleType) -> None:
    known = dict.fromkeys(("a", "a.b", "a.c", "a.d"), Path())
    assert measure.imports_of(ast.parse(IMPORTS), "x", known) == {"a.b", "a.c"}


def test_circles_are_found_through_other_modules(measure: ModuleType) -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert measure.circles(imports) == [["a", "b", "c"]]


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [("Return it.", False), ("What is left.", True), ("``x`` as bytes.", True)],
)
def test_docstrings_without_a_verb(measure: ModuleType, docstring: str, expected: bool) -> None:
    assert measure.without_verb(docstring) is expected


def test_work_of_a_prewarm_and_an_open_is_counted(measure: ModuleType) -> None:
    assert all(found > 0 for found in measure.work().values())
