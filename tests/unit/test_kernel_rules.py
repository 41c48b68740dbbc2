"""What every kernel file must look like, read from its syntax tree without importing it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from numaload.formats.qtypes import BLOCKS
from numaload.kernels import grids, registry
from numaload.kernels.lanes import CHUNK, LANES
from numaload.kernels.loops import STEP

KERNELS = Path(__file__).parents[2] / "kernels"
# {"legacy", "jit.cache", ...: text}
SOURCES = {
    ".".join(path.relative_to(KERNELS).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted(KERNELS.rglob("*.py"))
}
TREES = {name: ast.parse(text, name) for name, text in SOURCES.items()}
NAMED = {*registry.KERNELS.values(), *(one[:2] for one in registry.SCALED.values())}
FAMILIES = sorted({module for module, _ in NAMED})
WORDS = {"lanes", "grids"}
LOWERING = {"jit.lowering", "jit.halves"}
JIT = {
    f"jit.{n}" for n in ("__init__", "cache", "compile", "loads", "objects", "target")
} | LOWERING
FLOATS = "floats"  # the family whose functions read 16 weights instead of a block
PACKAGE = "numaload.kernels"
# {module that is no part of Python or of this package: the files that may import it}
OUTSIDE = {
    "numpy": {*FAMILIES, *WORDS, "registry"},
    "numba": {"jit.compile", *LOWERING},
    "llvmlite": {"jit.compile", "jit.objects", "jit.target", *LOWERING},
}
STEPS = 16  # a loop is unrolled: of more, code would outgrow its cache

each_file = pytest.mark.parametrize("name", SOURCES)
each_family = pytest.mark.parametrize("family", FAMILIES)


def functions(name: str) -> list[ast.FunctionDef]:
    return [node for node in TREES[name].body if isinstance(node, ast.FunctionDef)]


def is_helper(function: ast.FunctionDef) -> bool:
    return bool(function.decorator_list) or function.name.startswith("_")


def decoders(family: str) -> list[ast.FunctionDef]:
    return [function for function in functions(family) if not is_helper(function)]


DECODERS = [(family, function) for family in FAMILIES for function in decoders(family)]
each_decoder = pytest.mark.parametrize(
    ("family", "function"), DECODERS, ids=[function.name for _, function in DECODERS]
)


def imported(name: str) -> set[str]:
    """Modules, those of this package by their full name."""
    modules = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            packages = (PACKAGE, f"{PACKAGE}.jit")
            modules |= members if node.module in packages else {str(node.module)}
    return modules - {f"{PACKAGE}.jit.SettingError"}


def names_in(tree: ast.AST) -> set[str]:
    found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    found |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return found | {str(node.arg) for node in ast.walk(tree) if isinstance(node, ast.keyword)}


def calls(tree: ast.AST, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            yield node


# files -----------------------------------------------------------------------------------------


def test_every_file_has_a_part() -> None:
    assert set(SOURCES) == {*FAMILIES, *WORDS, *JIT, "loops", "registry", "__init__"}


# Each may import those to its right, in functions too: so there is no circle.
ORDER = [
    "registry",
    "objects",
    "loads",
    "compile",
    "halves",
    "lowering",
    "cache",
    "target",
    "loops",
    "lanes",
]


@each_file
def test_imports_point_one_way(name: str) -> None:
    own = name.rpartition(".")[2]
    if own in ORDER:
        ours = {m.rpartition(".")[2] for m in imported(name) if m.startswith(f"{PACKAGE}.")}
        assert ours <= {*ORDER[ORDER.index(own) + 1 :], "jit"}


@each_family
def test_family_imports_only_words(family: str) -> None:
    allowed = {"__future__", "numpy", *(f"{PACKAGE}.{name}" for name in WORDS)}
    assert imported(family) <= allowed


@each_file
def test_imports_of_others(name: str) -> None:
    for module in imported(name):
        root = module.partition(".")[0]
        if root == "numaload":
            ours = module.startswith(f"{PACKAGE}.")
            assert ours or module in {
                f"numaload.{name}"
                for name in ("errors", "forks", "formats.qtypes", "machine.cachedir")
            }
        elif root not in sys.stdlib_module_names:
            assert name in OUTSIDE.get(root, set()), f"{name} imports {module}"


@each_file
def test_only_objects_knows_ctypes(name: str) -> None:
    assert ("ctypes" in imported(name)) == (name == "jit.objects")


def test_package_imports_nothing() -> None:
    # But for finding the package that others mean by this folder's name.
    assert imported("__init__") == {"importlib.machinery", "importlib.util", "os", "sys"}


# compiling -------------------------------------------------------------------------------------


def test_options_are_stated() -> None:
    # fastmath would change results, the python error model checks every division; wrappers refer
    # to Python, which is not there when an object file is linked.
    (options,) = (
        ast.literal_eval(node.value)
        for node in TREES["jit.compile"].body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "OPTIONS"
    )
    assert options == {
        "nogil": True,
        "fastmath": False,
        "error_model": "numpy",
        "no_cpython_wrapper": True,
        "no_cfunc_wrapper": True,
    }


def test_njit_takes_these_options() -> None:
    found = [ast.unparse(call) for call in calls(TREES["jit.compile"], "njit")]
    assert sorted(found) == ["njit(**OPTIONS)", "njit(forceinline=True, **OPTIONS)"]


@each_file
def test_nothing_runs_in_parallel(name: str) -> None:
    # parallel=True aborts the process when two threads enter.
    assert not names_in(TREES[name]) & {"parallel", "prange", "guvectorize", "vectorize"}


@each_file
def test_only_compile_runs_numba(name: str) -> None:
    found = [call for runner in ("njit", "jit", "cfunc") for call in calls(TREES[name], runner)]
    assert not found or name == "jit.compile"


# decode functions ------------------------------------------------------------------------------


def test_registry_names_every_decode_function_once() -> None:
    written = [(family, function.name) for family, function in DECODERS]
    assert sorted(NAMED) == sorted(written)
    assert len(set(registry.KERNELS.values())) == len(registry.KERNELS)


def test_functions_have_the_names_of_their_types() -> None:
    assert all(name == qtype.name.lower() for qtype, (_, name) in registry.KERNELS.items())


@each_decoder
def test_parameters(family: str, function: ast.FunctionDef) -> None:
    arguments = [argument.arg for argument in function.args.args]
    assert arguments == (["src", "at"] if family == FLOATS else ["src", "at", "w", "to"])


@each_decoder
def test_diagram_is_above(family: str, function: ast.FunctionDef) -> None:
    above = SOURCES[family].splitlines()[: function.lineno - 1]
    start = next(i for i in range(len(above), 0, -1) if not above[i - 1].startswith("#"))
    diagram = above[start:]
    assert re.match(rf"# {function.name.upper()}, \d+ bytes -> \d+ weights? +\S", diagram[0])
    assert any(line.startswith("#   byte ") for line in diagram)


@each_decoder
def test_length(family: str, function: ast.FunctionDef) -> None:
    assert function.end_lineno is not None
    assert function.end_lineno - function.lineno < 80


@each_family
def test_loops_are_short_and_known(family: str) -> None:
    for function in functions(family):
        assert not any(isinstance(node, ast.While) for node in ast.walk(function)), function.name
        for node in ast.walk(function):
            if isinstance(node, ast.For):
                assert isinstance(node.iter, ast.Call), function.name
                assert ast.unparse(node.iter.func) == "range", function.name
                trips = range(*map(ast.literal_eval, node.iter.args))
                assert len(trips) <= STEPS, function.name


@each_family
def test_helpers_are_marked(family: str) -> None:
    # Else a compiled function that calls them would not know them.
    for function in functions(family):
        marks = [ast.unparse(mark) for mark in function.decorator_list]
        assert marks == (["helper"] if is_helper(function) and function.name[0] != "_" else [])


def test_blocks_fit_the_loop() -> None:
    for qtype in registry.KERNELS:
        weights, nbytes = registry.step(qtype)
        assert weights % STEP == 0, qtype.name
        assert CHUNK % weights == 0, qtype.name
        assert nbytes * BLOCKS[qtype][0] == weights * BLOCKS[qtype][1], qtype.name
    for code, scaled in registry.SCALED.items():
        assert scaled.weights % STEP == 0 == CHUNK % scaled.weights, code
        assert scaled.group % LANES == 0 == scaled.weights % scaled.group, code


# data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("IQ1", "IQ1_S"),
        ("IQ2_XXS", "IQ2_XXS"),
        ("IQ2_XS", "IQ2_XS"),
        ("IQ2_S", "IQ2_S"),
        ("IQ3_XXS", "IQ3_XXS"),
        ("IQ3_S", "IQ3_S"),
    ],
)
def test_grids_as_gguf_py(ours: str, theirs: str) -> None:
    known = getattr(gguf.quants, theirs)
    known.init_grid()
    expected = known.grid[0, 0]
    grid = getattr(grids, ours)
    assert grid.dtype == np.int64
    values = grid.view(np.int8).reshape(len(grid), 8)
    np.testing.assert_array_equal(values[:, : expected.shape[1]], expected)
    assert not values[:, expected.shape[1] :].any()
