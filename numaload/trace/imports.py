"""Have imports be spans: the command line imports what it needs once it needs it."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from numaload.trace import span


@contextmanager
def spanned_imports() -> Iterator[None]:
    """Make each import statement, until the end of this, a span, if it loads anything.

    What is imported by what is imported has no span of its own.
    """
    plain, inside = builtins.__import__, list[str]()

    def spanned(
        name: str,
        globals: Any = None,  # noqa: A002 - the names of the one that this replaces
        locals: Any = None,  # noqa: A002
        fromlist: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        found = sys.modules.get(name)
        loaded = found is not None and all(hasattr(found, one) for one in fromlist or ())
        if inside or level or loaded:
            return plain(name, globals, locals, fromlist, level)
        inside.append(name)
        try:
            with span("import", file=name):
                return plain(name, globals, locals, fromlist, level)
        finally:
            inside.clear()

    builtins.__import__ = spanned
    try:
        yield
    finally:
        builtins.__import__ = plain
