"""Errors: the tree is as drawn, each is provoked, all can be pickled; fallbacks are said once."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from pathlib import Path

import pytest

from every_error import ELSEWHERE, PROVOKED
from numaload import errors

ROOT = Path(__file__).parents[2]


def public() -> dict[str, type[errors.NumaloadError]]:
    members = inspect.getmembers(errors, inspect.isclass)
    return {n: c for n, c in members if issubclass(c, errors.NumaloadError) and n[0] != "_"}


def test_the_tree_in_the_docstring_names_every_error() -> None:
    drawn = re.findall(r"^\s*[|`\- ]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(public())


def test_a_fallback_is_said_once(nothing_said: None) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            errors.warn_once("a", "lesser way")
        errors.warn_once("b", "another")
    assert [str(w.message) for w in caught] == ["lesser way", "another"]


def test_every_error_is_provoked_by_a_test() -> None:
    """One without subclasses, that is; of the others those that are raised themselves."""
    leaves = {kind for kind in public().values() if not kind.__subclasses__()}
    covered = {*PROVOKED, *ELSEWHERE}
    assert not leaves - covered, "add how to get it to tests/every_error.py"
    assert not PROVOKED.keys() & ELSEWHERE.keys()


@pytest.mark.parametrize("kind", ELSEWHERE, ids=lambda kind: kind.__name__)
def test_an_error_that_is_provoked_elsewhere_is(kind: type[errors.NumaloadError]) -> None:
    text = (ROOT / ELSEWHERE[kind]).read_text(encoding="utf-8")
    assert re.search(rf"raises\(\s*{kind.__name__}\b", text)


EXAMPLES: list[errors.NumaloadError] = [
    errors.FormatError("text", path="/m.gguf", offset=7),
    errors.TensorNotFoundError("blk.0", {"blk.1": lambda: None}),
    errors.MetadataKeyError("a.b", ("a.c", "x")),
    errors.ReadError("text", path="/m.gguf", offset=7),
    errors.NumaError("text", call="mbind", node=3, errno=22),
    errors.PlacementError("text", {0: {1: 2}}),
    errors.NodeMemoryError("text", node=1, needed=2, free=3),
    errors.ChecksumError("text", path="/m.gguf", chunk=4),
    errors.ProgramError("text", 2),
    errors.CancelledError("text", done=5, total=6),
    errors.StalledError("text", path="/m.gguf", seconds=7.0, server="host:/export", mount="/m"),
]


def examples() -> list[errors.NumaloadError]:
    """One of every class: those without an __init__ of their own take what another one takes."""
    found = {type(example): example for example in EXAMPLES}
    for kind in public().values():
        like = next((one for one in EXAMPLES if kind.__init__ is type(one).__init__), None)
        if kind in found or like is None:
            continue
        fields = {k: v for k, v in vars(like).items() if not k.startswith("_")}
        fields |= {"errno": like.errno} if isinstance(like, errors.NumaError) else {}
        found[kind] = kind("text", **fields)
    plain = {kind for kind in public().values() if kind not in found}
    return [*found.values(), *(kind("text") for kind in plain)]


def test_the_examples_are_of_every_class() -> None:
    assert {type(example) for example in examples()} == set(public().values())


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_errors_survive_pickling_and_copying(error: errors.NumaloadError) -> None:
    """As between processes: the same class, text and fields, and what the builtin base has."""
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - our own
        assert_same(again, error)
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert_same(again, error)


def assert_same(again: errors.NumaloadError, error: errors.NumaloadError) -> None:
    assert type(again) is type(error)
    assert (str(again), again.args) == (str(error), error.args)
    assert getattr(again, "errno", None) == getattr(error, "errno", None)
    known = {"_known"}  # of all names only the close ones are kept
    fields = {k: v for k, v in vars(error).items() if k not in known}
    assert {k: v for k, v in vars(again).items() if k not in known} == fields


def test_only_so_many_names_are_compared() -> None:
    """In search of close ones: a file may have as many as it likes."""
    names = (f"blk.{i}.weight" for i in range(errors.COMPARED + 1000))
    found = errors.TensorNotFoundError("blk.1.weights", names)
    assert "close: blk.1.weight" in str(found)
    assert next(names) == f"blk.{errors.COMPARED}.weight"


@pytest.mark.parametrize("kind", [errors.TensorNotFoundError, errors.MetadataKeyError])
def test_a_key_that_python_writes_no_text_of_has_its_type_named(
    kind: type[errors.TensorNotFoundError],
) -> None:
    error = kind(10**5000, ["blk.0"])
    assert str(error) == f"no {kind.kind} <int>"
    assert repr(error) == f"<{kind.__name__}>"
    assert str(copy.copy(error)) == str(error)
    assert errors.printable(10**5000) == "<int>"
