"""Imports point one way: the drawing in docs/architecture.md against every import statement."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "numaload"
HEADING = "## Who may import whom"
OUTSIDE = {"__init__", "__main__", "_version"}


def drawing() -> dict[str, int]:
    """{unit: its line}; smaller may import larger."""
    text = (ROOT / "docs/architecture.md").read_text().split(HEADING)[1]
    lines = text.split("```")[1].strip().splitlines()
    return {unit: rank for rank, line in enumerate(lines) for unit in line.split()}


def sources() -> list[Path]:
    kernels = sorted((ROOT / "kernels").rglob("*.py"))
    own = [p for p in sorted(PACKAGE.rglob("*.py")) if "kernels" not in p.parts]
    return own + kernels


def unit_of(path: Path) -> str:
    if ROOT / "kernels" in path.parents:
        return "kernels"
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[str]:
    """Units of numaload that this file imports, anywhere in it, TYPE_CHECKING blocks included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("numaload."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            parts = (node.module or "").split(".")
            if parts[0] == "numaload":
                yield from parts[1:2] or [alias.name for alias in node.names]


def module_of(path: Path) -> str:
    below = path.relative_to(ROOT).with_suffix("")
    parts = below.parts if below.parts[0] == "numaload" else ("numaload", *below.parts)
    return ".".join(parts).removesuffix(".__init__")


def imported_files(path: Path, known: set[str]) -> set[str]:
    """Modules that this file imports, anywhere in it; imports for types alone aside."""
    tree = ast.parse(path.read_text())
    for_types = {
        id(inside)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for inside in ast.walk(block)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & known
            names |= inner or {node.module}
    return names & known - {module_of(path)}


def wrong_imports(path: Path, ranks: dict[str, int]) -> list[str]:
    unit = unit_of(path)
    return [
        other
        for other in imported(path)
        if other not in OUTSIDE and other != unit and ranks[other] <= ranks[unit]
    ]


INSIDE = [path for path in sources() if unit_of(path) not in OUTSIDE]


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert wrong_imports(path, drawing()) == []


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {module_of(path): path for path in sources()}
    graph = {name: imported_files(path, set(files)) for name, path in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the files


def test_drawing_names_every_unit() -> None:
    units = {unit_of(path) for path in sources()} - OUTSIDE
    assert units == set(drawing())


def test_a_wrong_import_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "files.py"
    file.write_text("def f():\n    from numaload.weights import Weights\n    return Weights\n")
    monkeypatch.setattr("test_imports.unit_of", lambda _: "files")
    assert wrong_imports(file, drawing()) == ["weights"]


def test_only_syscalls_uses_ctypes() -> None:
    """And who calls code that was compiled here, or elsewhere as a baseline."""
    users = {p.name for p in sources() if "import ctypes" in p.read_text()}
    assert users == {"syscalls.py", "objects.py", "baselines.py"}
