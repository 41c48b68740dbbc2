"""Report what prewarming did, in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from numaload.errors import StoreError

if TYPE_CHECKING:
    from numaload.files.plan import ReadPlan
    from numaload.pagecache.background import PrewarmHolder


class PrewarmReport:
    """Bytes throughout. ``on_nodes`` is the kernel's word, where nodes were asked for.

    size: of what was to be in RAM: whole files, or the tensors that were chosen of them.
    read: what was absent and was read. stopped: why not all of it, or empty.
    """

    # No dataclass: importing what makes one takes half as long as Python takes to start.
    def __init__(
        self,
        paths: Sequence[str],
        size: int,
        resident_before: int,
        read: int = 0,
        resident: int = 0,
        seconds: float = 0.0,
        threads: int = 0,
        nodes: Sequence[int] = (),
        policy: str | None = None,
        on_nodes: Mapping[int, int] | None = None,
        residency_known: bool = True,
        tensors: int | None = None,
        moved: int = 0,
        unmoved: Mapping[str, int] | None = None,
        stopped: str = "",
        followed: int | None = None,
        read_by_others: int = 0,
        holder: PrewarmHolder | None = None,
        locked: int = 0,
        already_held: Mapping[str, int] | None = None,
        plan: ReadPlan | None = None,
    ) -> None:
        self.paths, self.size = list(paths), size
        self.resident_before, self.read, self.resident = resident_before, read, resident
        self.seconds, self.threads = seconds, threads
        self.nodes, self.policy, self.on_nodes = list(nodes), policy, dict(on_nodes or {})
        self.residency_known = residency_known
        self.tensors = tensors  # that were chosen; None: whole files
        self.moved = moved  # between nodes
        self.unmoved = dict(unmoved or {})  # {why: bytes that stayed}
        self.stopped = stopped
        self.followed = followed  # the process that was waited for, since it read the same files
        self.read_by_others = read_by_others  # meanwhile
        self.holder = holder  # the process that goes on, or keeps it locked
        self.locked = locked  # by it
        self.already_held = dict(already_held or {})  # {path: process that had it}
        self.plan = plan  # as it was carried out; None where nothing was read

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PrewarmReport) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment] # what it says may change

    @property
    def elsewhere(self) -> int:
        """Return the bytes in RAM on nodes that were not asked for."""
        return sum(n for node, n in self.on_nodes.items() if node not in self.nodes)

    @property
    def done(self) -> bool:
        """Return whether all of it is in RAM, and on the nodes asked for if any were."""
        whole = self.resident == self.size or not self.residency_known
        counted = sum(self.on_nodes.values()) >= self.size
        placed = not self.nodes or (counted and not self.elsewhere)
        locked = self.holder is None or not self.holder.lock or self.locked >= self.size
        return not self.stopped and whole and placed and locked

    def to_dict(self) -> dict[str, Any]:
        from copy import deepcopy

        holder = vars(self.holder) if self.holder else None
        plan = self.plan.to_dict() if self.plan else None
        told = deepcopy(vars(self) | {"holder": holder, "plan": plan})
        return told | {"elsewhere": self.elsewhere, "done": self.done}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrewarmReport:
        """Return the report of a holder, which ``to_dict`` told. Raises: StoreError."""
        from numaload.files.plan import ReadPlan
        from numaload.machine.userdir import UNREADABLE

        names = vars(cls([], 0, 0)).keys()
        try:
            report = cls(**{name: data[name] for name in names & data.keys()})
            report.on_nodes = {int(node): nbytes for node, nbytes in report.on_nodes.items()}
            report.plan = ReadPlan.from_dict(data["plan"]) if data["plan"] else None
        except UNREADABLE as error:
            raise StoreError(f"a report that cannot be read: {error}") from error
        return report
