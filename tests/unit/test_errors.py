"""Errors: the drawn tree is the real one, and fallbacks are said once."""

from __future__ import annotations

import inspect
import re
import warnings

import pytest

from numaload import errors


def public() -> dict[str, type[Exception]]:
    members = inspect.getmembers(errors, inspect.isclass)
    return {n: c for n, c in members if issubclass(c, errors.NumaloadError) and n[0] != "_"}


def test_the_tree_in_the_docstring_names_every_error() -> None:
    drawn = re.findall(r"^\s*[|`\- ]*(\w+Error)\b", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(public())


def test_a_fallback_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(errors, "_said", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            errors.warn_once("a", "lesser way")
        errors.warn_once("b", "another")
    assert [str(w.message) for w in caught] == ["lesser way", "another"]
