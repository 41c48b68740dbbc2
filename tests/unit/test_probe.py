"""Whether binding works, asked on one page: refusals, sandboxes that only pretend, full nodes."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from numaload.errors import NumaError, NumaUnavailableError
from numaload.linux import syscalls
from numaload.machine import memory, probe
from numaload.machine.probe import why_not_bound
from numaload.machine.topology import topology
from numaload.replicas.mirror import MirrorOptions, can_bind

MACHINE = topology()
NODE = MACHINE.usable[0]
ABSENT = 1000


def test_binding_works_here() -> None:
    assert why_not_bound([NODE]) is None


def test_an_absent_node_is_an_error_of_its_own() -> None:
    with pytest.raises(NumaError, match=f"node {ABSENT}.*absent") as caught:
        why_not_bound([ABSENT])
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("witness", ["move_pages", "numa_maps"])
def test_a_sandbox_that_only_pretends(monkeypatch: pytest.MonkeyPatch, witness: str) -> None:
    """The call returns and nothing is bound: here, to a node that is not there."""
    monkeypatch.setattr(syscalls, "mbind", lambda *_: None)
    if witness == "numa_maps":

        def refuse(_: Any) -> list[int]:
            raise NumaError("refused", call="move_pages")

        monkeypatch.setattr(syscalls, "pages_nodes", refuse)
    monkeypatch.setattr(memory, "node_free", lambda _: 1 << 30)
    refused = why_not_bound([NODE, ABSENT])
    assert refused is not None
    assert f"bound to node {ABSENT} is on node {NODE}" in str(refused)


def test_a_full_node_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    def touched(_: Any) -> list[int]:
        raise AssertionError

    monkeypatch.setattr(syscalls, "pages_nodes", touched)
    monkeypatch.setattr(memory, "node_free", lambda _: 0)
    assert why_not_bound([NODE]) is None


def test_strict_raises_what_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal = NumaUnavailableError("mbind: no", call="mbind", node=NODE, errno=errno.EPERM)
    monkeypatch.setattr("numaload.replicas.mirror.why_not_bound", lambda _: refusal)
    with pytest.raises(NumaUnavailableError) as caught:
        can_bind(MirrorOptions([(NODE,)], strict=True), MACHINE)
    assert caught.value is refusal
    monkeypatch.setattr("numaload.errors._said", {"first touch"})
    assert can_bind(MirrorOptions([(NODE,)]), MACHINE) is False
    assert probe.why_not_bound([NODE]) is None
