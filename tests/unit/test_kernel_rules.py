"""What every kernel file must look like, read from its syntax tree without importing it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

from numaload.kernels import registry

KERNELS = Path(__file__).parents[2] / "kernels"
TREES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"), path.name)
    for path in sorted(KERNELS.glob("*.py"))
}
FAMILIES = sorted(set(TREES) - {"__init__", "registry"})
each_family = pytest.mark.parametrize("family", FAMILIES)


def functions(family: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[family]) if isinstance(node, ast.FunctionDef)]


def public_kernels(family: str) -> list[ast.FunctionDef]:
    return [f for f in functions(family) if f.name.startswith(("dequantize_", "narrow_"))]


def imported(name: str) -> list[str]:
    modules = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append("." * node.level + (node.module or ""))
    return modules


def is_njit(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "njit"


def test_there_are_kernels() -> None:
    assert {"floats", "legacy", "kquants"} <= set(FAMILIES)
    assert all(public_kernels(family) for family in FAMILIES if functions(family))


@each_family
def test_njit_states_its_options(family: str) -> None:
    # Exactly these three: parallel=True, for one, aborts the process when two threads enter.
    expected = {"nogil": True, "cache": True, "fastmath": False}
    for function in functions(family):
        for decorator in function.decorator_list:
            assert isinstance(decorator, ast.Call), f"{function.name}: options not stated"
            assert is_njit(decorator), f"{function.name}: not njit"
            options = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords}
            assert options == expected, function.name


@each_family
def test_every_call_of_njit_is_a_decorator(family: str) -> None:
    calls = [node for node in ast.walk(TREES[family]) if isinstance(node, ast.Call)]
    decorators = [d for f in functions(family) for d in f.decorator_list]
    assert sum(map(is_njit, calls)) == len(decorators)


@each_family
def test_imports_no_kernel_and_no_numaload(family: str) -> None:
    # numba's cache notices changes of one file only: code from another would go stale.
    roots = {module.partition(".")[0] for module in imported(family)}
    assert roots <= {"__future__", "numba", "numpy"}


def test_registry_imports_only_the_types() -> None:
    own = [module for module in imported("registry") if module.startswith((".", "numaload"))]
    assert own == ["numaload.formats.qtypes"]
    others = {module.partition(".")[0] for module in imported("registry")} - {"numaload"}
    assert others <= {*sys.stdlib_module_names, "numpy"}


def test_package_imports_nothing() -> None:
    assert imported("__init__") == []


def test_copies_of_a_helper_stay_alike() -> None:
    # What two families need stands in both files.
    seen: dict[str, str] = {}
    for family in FAMILIES:
        for function in functions(family):
            text = ast.unparse(function)
            assert seen.setdefault(function.name, text) == text, f"{family}.{function.name}"


@each_family
def test_no_global_arrays(family: str) -> None:
    # A global array is frozen into compiled code, and the cache does not notice a change of it.
    for node in TREES[family].body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            names = {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
            assert not names & {"np", "numpy"}, ast.unparse(node)


@each_family
def test_public_kernels(family: str) -> None:
    for function in public_kernels(family):
        arguments = [argument.arg for argument in function.args.args]
        assert arguments[:4] == ["src", "out", "start", "stop"], function.name
        assert ast.get_docstring(function), f"{function.name} has no docstring"
        compiled = [d for d in function.decorator_list if isinstance(d, ast.Call) and d.args]
        assert compiled, f"{function.name} has no signature"


def test_registry_names_every_kernel_once() -> None:
    named = [*registry.KERNELS.values(), *registry.NARROW.values()]
    written = [(family, f.name) for family in FAMILIES for f in public_kernels(family)]
    assert sorted(named) == sorted(written)
