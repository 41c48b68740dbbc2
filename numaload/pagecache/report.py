"""Report what prewarming did, in numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from numaload.errors import StoreError

if TYPE_CHECKING:
    from numaload.files.plan import ReadPlan
    from numaload.pagecache.background import PrewarmHolder


@dataclass
class PrewarmReport:
    """Bytes throughout. ``on_nodes`` is the kernel's word, where nodes were asked for.

    size: of what was to be in RAM: whole files, or the tensors that were chosen of them.
    read: what was absent and was read. stopped: why not all of it, or empty.
    """

    paths: list[str]
    size: int
    resident_before: int
    read: int = 0
    resident: int = 0
    seconds: float = 0.0
    threads: int = 0
    nodes: list[int] = field(default_factory=list)
    policy: str | None = None
    on_nodes: dict[int, int] = field(default_factory=dict)
    residency_known: bool = True
    tensors: int | None = None  # that were chosen; None: whole files
    moved: int = 0  # between nodes
    unmoved: dict[str, int] = field(default_factory=dict)  # {why: bytes that stayed}
    stopped: str = ""
    followed: int | None = None  # the process that was waited for, since it read the same files
    read_by_others: int = 0  # meanwhile
    holder: PrewarmHolder | None = None  # the process that goes on, or keeps it locked
    locked: int = 0  # by it
    already_held: dict[str, int] = field(default_factory=dict)  # {path: process that had it}
    plan: ReadPlan | None = None  # as it was carried out; None where nothing was read

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
        told = asdict(self) | {"elsewhere": self.elsewhere, "done": self.done}
        return told | {"plan": self.plan.to_dict() if self.plan else None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PrewarmReport:
        """Return the report of a holder, which ``to_dict`` told. Raises: StoreError."""
        from numaload.files.plan import ReadPlan
        from numaload.machine.userdir import UNREADABLE

        names = {field.name for field in fields(cls)}
        try:
            report = cls(**{key: data[key] for key in names & data.keys()})
            report.on_nodes = {int(node): nbytes for node, nbytes in report.on_nodes.items()}
            report.plan = ReadPlan.from_dict(data["plan"]) if data["plan"] else None
        except UNREADABLE as error:
            raise StoreError(f"a report that cannot be read: {error}") from error
        return report
