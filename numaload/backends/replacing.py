"""Classes of other programs replaced by ours: in every loaded module that has them, and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass
class Replaced:
    """Classes that were put in place. ``undo()``, or the end of a with block, takes them back."""

    before: list[tuple[Any, str, Any, Any]] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """List where numaload's classes are now, each as module.NAME."""
        modules = [row for row in self.before if isinstance(row[0], ModuleType)]
        return sorted(f"{module.__name__}.{name}" for module, name, *_ in modules)

    def set(self, owner: Any, name: str, ours: Any) -> None:
        """Give a module or class an attribute instead of the one that it has."""
        self.before.append((owner, name, vars(owner)[name], ours))
        setattr(owner, name, ours)

    def undo(self) -> None:
        """Put back what was there; what somebody else put there meanwhile stays."""
        for owner, name, theirs, ours in reversed(self.before):
            if vars(owner).get(name) is ours:
                setattr(owner, name, theirs)
        self.before.clear()

    def __enter__(self) -> Replaced:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        return f"numaload's are now {', '.join(self.places) or 'nowhere new'}"


def replace(classes: Mapping[str, tuple[Any, Any]]) -> Replaced:
    """Put our classes where theirs are in every loaded module; none is run or imported by this.

    classes: {name in modules: (theirs, ours)}.
    """
    done = Replaced()
    for module in list(sys.modules.values()):
        members = getattr(module, "__dict__", {})
        for name, (theirs, ours) in classes.items():
            if members.get(name) is theirs and isinstance(module, ModuleType):
                done.set(module, name, ours)
    return done
