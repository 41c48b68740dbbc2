"""Classes of other programs replaced by ours: in every loaded module that has them, and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any


@dataclass
class Replaced:
    """What was put where. ``undo()``, or the end of a with block, puts back what was there."""

    before: list[tuple[ModuleType, str, Any, Any]] = field(default_factory=list)

    @property
    def places(self) -> list[str]:
        """Each as module.NAME."""
        return sorted(f"{module.__name__}.{name}" for module, name, *_ in self.before)

    def undo(self) -> None:
        """What somebody else put there meanwhile stays."""
        for module, name, theirs, ours in self.before:
            if vars(module).get(name) is ours:
                setattr(module, name, theirs)
        self.before.clear()

    def __enter__(self) -> Replaced:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        return f"numaload's are now {', '.join(self.places) or 'nowhere new'}"


def replace(classes: Mapping[str, tuple[Any, Any]]) -> Replaced:
    """classes: {name in modules: (theirs, ours)}. Modules are not run or imported by this."""
    done = Replaced()
    for module in list(sys.modules.values()):
        members = getattr(module, "__dict__", {})
        for name, (theirs, ours) in classes.items():
            if members.get(name) is theirs and isinstance(module, ModuleType):
                setattr(module, name, ours)
                done.before.append((module, name, theirs, ours))
    return done
