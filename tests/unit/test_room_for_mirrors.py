"""Page cache of the source makes room where memory cannot be bound and the plan needs it."""

from __future__ import annotations

import os

import pytest

import numaload as api
from commands import KEPT, resident
from numaload.errors import NumaloadWarning
from numaload.replicas.mirror import fitted
from numaload.replicas.plan import PRIVATE, MirrorPlan, Need

pytestmark = pytest.mark.usefixtures("store")


@pytest.mark.parametrize(
    ("free", "bound", "fits", "dropped"),
    [
        ((100,), False, True, False),
        ((50, 200), False, True, True),
        ((50, 60), False, False, True),
        ((50,), True, False, False),  # what is bound pushes page cache out by itself
    ],
    ids=["fits", "fits-then", "never", "bound"],
)
def test_it_is_given_back_where_that_helps(
    model_files: list[str],
    free: tuple[int, ...],
    bound: bool,
    fits: bool,
    dropped: bool,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plans need 100 bytes, of which so many are free one time after another."""
    left = list(free)

    def planned(*_: object, **__: object) -> MirrorPlan:
        return MirrorPlan((), (Need("node 0", 100, left.pop(0), 0),))

    monkeypatch.setattr("numaload.replicas.mirror.plan", planned)
    api.prewarm(model_files[0])
    size = sum(map(os.path.getsize, model_files))
    with api.open(model_files[0]) as weights:
        made = fitted([], [weights], api.topology(), kept=PRIVATE, bound=bound)
    assert left == []
    assert made.fits == fits
    there = resident(model_files)
    assert there < size / 4 if dropped else there > KEPT * size
    said = [w for w in recwarn if issubclass(w.category, NumaloadWarning)]
    assert len(said) <= int(dropped and fits)
