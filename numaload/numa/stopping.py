"""Whether what a thread does is still wanted: asked by those who wait, and could wait long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_local = threading.local()


@contextmanager
def until(over: Callable[[], bool]) -> Iterator[None]:
    """What this thread does inside is not wanted any more as soon as ``over()`` is true."""
    before = getattr(_local, "over", ())
    _local.over = (*before, over)
    try:
        yield
    finally:
        _local.over = before


def stopping() -> bool:
    """Whether nobody wants any more what this thread does now."""
    return any(over() for over in getattr(_local, "over", ()))
